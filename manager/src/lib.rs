//! Everything a manager decides.

pub mod ca;
pub mod clock;
pub mod control;
pub mod leader;
pub mod orchestrator;
pub mod scheduler;
#[cfg(test)]
mod world;
