//! Chooses a node for each pending task.
//!
//! Works on a mirror of the state and returns decisions; the leader's loop
//! proposes them. Touches neither network nor clock. Never moves an assigned task.

pub mod constraint;
