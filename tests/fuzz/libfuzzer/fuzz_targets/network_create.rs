#![no_main]
include!("../target.rs");
target!(network_create);
