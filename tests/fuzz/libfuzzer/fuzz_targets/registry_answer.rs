#![no_main]
include!("../target.rs");
target!(registry_answer);
