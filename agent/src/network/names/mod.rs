//! The name server of the containers: a helper process, and the agent's side of it.

use std::ffi::OsString;

/// Runs the name server until it is told to end; the whole process is its own.
/// `args` are those after `names`.
///
/// # Errors
/// A sentence for people, when the arguments are wrong or the socket cannot be opened.
pub fn names_main(args: impl IntoIterator<Item = OsString>) -> Result<(), String> {
    let args: Vec<OsString> = args.into_iter().collect();
    Err(format!("names: unexpected arguments {args:?}"))
}
