#![no_main]
include!("../target.rs");
target!(join_token);
