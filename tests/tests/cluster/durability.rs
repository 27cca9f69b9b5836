//! What is acknowledged is on disk.

use anyhow::{Context as _, Result, ensure};
use swarm_tests::cluster::{Cluster, busybox};

#[test]
fn a_manager_syncs_each_batch_and_leaves_no_blob_unsynced() -> Result<()> {
    let cluster = Cluster::up(1, 1)?;
    let pid = cluster.swarmd("h1")?;
    let mut trace = cluster
        .command("h1", "strace")?
        .args([
            "-f",
            "-e",
            "trace=fdatasync,fsync",
            "-o",
            "/run/swarm/trace",
            "-p",
            &pid.to_string(),
        ])
        .stderr(std::process::Stdio::piped())
        .spawn()?;
    // strace says when it is attached.
    let mut stderr = std::io::BufReader::new(trace.stderr.take().context("a pipe")?);
    let mut line = String::new();
    std::io::BufRead::read_line(&mut stderr, &mut line)?;
    let writes = 20;
    for number in 0..writes {
        cluster.swarm(
            "h1",
            &[
                "network",
                "create",
                "--driver",
                "overlay",
                &format!("n{number}"),
            ],
        )?;
    }
    // An object of some 900 KiB.
    let label = format!("big={}", "x".repeat(100_000));
    let mut args = vec![
        "service",
        "create",
        "--detach",
        "--no-resolve-image",
        "--name",
        "big",
        "--replicas",
        "0",
    ];
    let labels: Vec<String> = (0..9).map(|number| format!("{number}{label}")).collect();
    for label in &labels {
        args.extend(["--label", label]);
    }
    let image = busybox();
    args.push(&image);
    cluster.swarm("h1", &args)?;
    nix::sys::signal::kill(
        nix::unistd::Pid::from_raw(i32::try_from(trace.id())?),
        nix::sys::signal::Signal::SIGINT,
    )?;
    trace.wait()?;
    let synced: usize = cluster
        .host_sh("h1", "grep -c fdatasync /run/swarm/trace")?
        .trim()
        .parse()?;
    ensure!(
        synced >= writes,
        "{writes} writes one after the other, {synced} fdatasync"
    );
    let blobs = cluster.host_sh(
        "h1",
        "find /var/lib/swarm/raft -path '*blobs*' -type f | wc -l",
    )?;
    ensure!(
        blobs.trim() == "0",
        "{blobs} files in sled's blobs/, which nobody syncs"
    );
    Ok(())
}

#[test]
fn everything_is_there_after_every_manager_was_killed() -> Result<()> {
    let mut cluster = Cluster::up(3, 3)?;
    for number in 0..10 {
        cluster.swarm(
            "h1",
            &[
                "network",
                "create",
                "--driver",
                "overlay",
                &format!("n{number}"),
            ],
        )?;
    }
    for host in ["h1", "h2", "h3"] {
        cluster.kill(host)?;
    }
    for host in ["h1", "h2", "h3"] {
        cluster.start(host)?;
    }
    cluster.wait_ready(swarm_tests::cluster::PATIENCE)?;
    let listed = cluster.swarm("h2", &["network", "ls", "--format", "{{.Name}}"])?;
    for number in 0..10 {
        ensure!(
            listed.lines().any(|line| line == format!("n{number}")),
            "n{number} is lost: {listed}"
        );
    }
    Ok(())
}
