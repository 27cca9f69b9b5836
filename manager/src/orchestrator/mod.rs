//! Decides which tasks should exist.
