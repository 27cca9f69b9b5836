#![no_main]
include!("../target.rs");
target!(image_reference);
