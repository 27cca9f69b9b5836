//! Known bugs can be put back in builds for the simulation, and in no other.

use anyhow::{Context as _, Result, ensure};
use swarm_tests::lab::bin_dir;

/// What a binary with the museum has in it (`swarm_proto::museum::MARK`).
const MARK: &[u8] = b"swarm-museum: known bugs can be put back";

fn has(binary: &[u8], text: &[u8]) -> bool {
    binary.windows(text.len()).any(|window| window == text)
}

#[test]
fn the_binaries_that_are_shipped_have_no_museum() -> Result<()> {
    for (name, own) in [
        ("swarmd", "swarm.v1.NodeLocal"),
        ("swarm", "swarm.v1.Control"),
    ] {
        let path = bin_dir()?.join(name);
        let binary = std::fs::read(&path).with_context(|| path.display().to_string())?;
        ensure!(has(&binary, own.as_bytes()), "{name} cannot be searched");
        ensure!(!has(&binary, MARK), "{name} has the museum of bugs in it");
    }
    Ok(())
}
