#![no_main]
include!("../target.rs");
target!(netlink_reply);
