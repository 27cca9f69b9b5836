#![no_main]
include!("../target.rs");
target!(local_store);
