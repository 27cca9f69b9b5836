#![no_main]
include!("../target.rs");
target!(dns_query);
