#![no_main]
include!("../target.rs");
target!(log_and_exec);
