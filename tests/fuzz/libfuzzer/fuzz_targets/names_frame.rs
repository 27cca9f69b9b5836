#![no_main]
include!("../target.rs");
target!(names_frame);
