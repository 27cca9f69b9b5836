#![no_main]
include!("../target.rs");
target!(sealed);
