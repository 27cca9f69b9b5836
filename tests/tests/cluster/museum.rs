//! Known bugs can be put back in builds for the simulation, and in no other.

use anyhow::{Result, ensure};
use swarm_tests::museum::{MARK, program_has};

#[test]
fn the_binaries_that_are_shipped_have_no_museum() -> Result<()> {
    for (name, own) in [
        ("swarmd", "swarm.v1.NodeLocal"),
        ("swarm", "swarm.v1.Control"),
    ] {
        ensure!(program_has(name, own)?, "{name} cannot be searched");
        ensure!(
            !program_has(name, MARK)?,
            "{name} has the museum of bugs in it"
        );
    }
    Ok(())
}
