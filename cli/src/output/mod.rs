//! What people and programs read: tables, templates, JSON in Docker's shape.

pub mod human;
pub mod json;
pub mod list;
pub mod template;

use std::io::{ErrorKind, Write as _};

use crate::failure::{Failure, Result};

/// Writes to standard output. A reader that has gone (`| head`) ends the command quietly.
pub fn print(text: &str) -> Result {
    let mut out = std::io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Ok(()) => Ok(()),
        Err(error) if error.kind() == ErrorKind::BrokenPipe => Err(Failure::Exit(0)),
        Err(error) => Err(Failure::Plain(format!("cannot write the output: {error}"))),
    }
}

/// Writes a line to standard output.
pub fn line(text: &str) -> Result {
    print(&format!("{text}\n"))
}

/// Writes a line to standard error. Nobody can be told when that fails.
pub fn warn(text: &str) {
    let _ = writeln!(std::io::stderr().lock(), "{text}");
}

/// The first twelve characters of an ID.
pub fn short(id: &str) -> &str {
    id.get(..12).unwrap_or(id)
}
