#![no_main]
include!("../target.rs");
target!(flag_value);
