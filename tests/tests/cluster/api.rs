//! The gRPC API as other languages use it.

use anyhow::{Result, ensure};
use swarm_tests::cluster::{Cluster, busybox};

#[test]
fn a_generated_python_client_and_reflection_work() -> Result<()> {
    let cluster = Cluster::up(1, 1)?;
    let sources = concat!(env!("CARGO_MANIFEST_DIR"), "/..");
    let output = cluster.run(
        "h1",
        &[
            "/var/cache/swarm-lab/venv/bin/python",
            &format!("{sources}/tests/python/client.py"),
            "unix:/run/swarm/swarm.sock",
            &format!("{sources}/proto/proto"),
            &busybox(),
        ],
    )?;
    ensure!(
        output.status.success(),
        "{}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    Ok(())
}
