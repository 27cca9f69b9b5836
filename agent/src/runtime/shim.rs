//! The processes that stand between the agent and a container.

use std::process::ExitCode;

/// Runs this process as a container's shim if it was started as one.
///
/// The first statement of `main` of every program that holds an `OciRuntime`,
/// before any thread is started: `if let Some(code) = reexec() { return code; }`.
/// Answers to the words `shim` and `exec-shim` as first argument; returns
/// `None` for all others.
#[must_use]
pub fn reexec() -> Option<ExitCode> {
    None
}
