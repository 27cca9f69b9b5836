#![no_main]
include!("../target.rs");
target!(certificate);
