//! Chooses a node for each pending task.
//!
//! [`Scheduler`] mirrors what placing needs of the state: it is built once per
//! term, then follows every change, so that a wake-up costs what has changed.
//! [`Scheduler::decide`] returns what to write; the loop in [`run`] proposes it.
//! Touches neither network nor clock. Never moves an assigned task.

pub mod constraint;
mod explain;
mod filter;
mod mirror;
pub(crate) mod run;
mod spread;

pub use filter::platform_fits;
pub use mirror::Scheduler;
pub use spread::{Spread, SpreadError};

#[cfg(test)]
mod rules_test;
