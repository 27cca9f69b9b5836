#![no_main]
include!("../target.rs");
target!(docker_config);
