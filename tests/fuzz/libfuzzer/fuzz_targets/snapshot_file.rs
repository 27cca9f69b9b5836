#![no_main]
include!("../target.rs");
target!(snapshot_file);
