#![no_main]
include!("../target.rs");
target!(daemon_config);
