//! A raft group of one, in memory, for tests of what is built on [`crate::Consensus`].
