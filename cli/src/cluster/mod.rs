//! `swarm init | join | join-token | leave | info`

pub mod info;
pub mod init;
pub mod join;
pub mod join_token;
pub mod leave;
