//! Known bugs in real processes: `swarmd` built with the feature `museum`.

use anyhow::{Context as _, Result, ensure};

use crate::lab::bin_dir;

/// What a program with the museum has in it (`swarm_proto::museum::MARK`).
pub const MARK: &str = "swarm-museum: known bugs can be put back";
/// Where it finds the name of its bug (`swarm_proto::museum::VARIABLE`).
const VARIABLE: &str = "SWARM_MUSEUM";

/// Whether one of the programs under test has this text in it.
///
/// # Errors
/// It cannot be read.
pub fn program_has(name: &str, text: &str) -> Result<bool> {
    let path = bin_dir()?.join(name);
    let program = std::fs::read(&path).with_context(|| path.display().to_string())?;
    let mut places = program.windows(text.len());
    Ok(places.any(|place| place == text.as_bytes()))
}

/// From now on `swarmd` starts with this bug in it. To be called before there are other threads.
///
/// # Errors
/// It has no museum.
pub fn put_back(bug: &str) -> Result<()> {
    ensure!(
        program_has("swarmd", MARK)?,
        "this swarmd has no museum: build it with `--features museum`, or use tests/fire"
    );
    // SAFETY: nobody else reads or writes the environment now.
    unsafe { std::env::set_var(VARIABLE, bug) };
    Ok(())
}
