#![no_main]
include!("../target.rs");
target!(control_requests);
