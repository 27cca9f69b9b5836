#![no_main]
include!("../target.rs");
target!(service_create);
