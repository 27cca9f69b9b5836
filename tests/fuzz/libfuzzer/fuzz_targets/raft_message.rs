#![no_main]
include!("../target.rs");
target!(raft_message);
