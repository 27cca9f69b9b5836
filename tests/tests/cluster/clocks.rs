//! Wall clocks that jump under a real cluster: leases do not know them, and certificates forgive or say what is wrong.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use swarm_tests::cluster::{Cluster, PATIENCE, busybox};
use swarm_tests::lab::wait_until;

/// Waits until every node is Ready.
fn all_ready(cluster: &Cluster, asked: &str) -> Result<()> {
    wait_until(PATIENCE, "every node is Ready", || {
        let listed = cluster.swarm(asked, &["node", "ls", "--format", "{{.Status}}"])?;
        Ok(listed.lines().all(|status| status == "Ready").then_some(()))
    })
}

#[test]
fn clocks_that_jump_by_hours_hold_up_nothing_and_end_nothing() -> Result<()> {
    let mut cluster = Cluster::up(4, 3)?;
    let image = busybox();
    let sleep = ["--replicas", "4", &image, "sleep", "1000000"];
    let args = [&["--restart-delay", "2s"][..], &sleep].concat();
    let before = cluster.service("h1", "box", 4, &args)?;
    let leader = cluster.leader("h1")?;
    let others: Vec<&str> = ["h1", "h2", "h3"]
        .into_iter()
        .filter(|h| *h != leader)
        .collect();
    let logged = cluster.log(&leader)?.len();
    cluster.skew(&leader, "+5h".parse()?)?;
    cluster.skew(others[0], "-5h".parse()?)?;
    cluster.skew("h4", "-7h".parse()?)?;
    for host in ["h1", "h2", "h3"] {
        let name = format!("by-{host}");
        cluster.swarm(host, &["network", "create", "--driver", "overlay", &name])?;
    }
    let during = cluster.service("h1", "during", 4, &sleep)?;
    ensure!(cluster.wait_running("h1", "box", 4)? == before);
    let log = cluster.log(&leader)?;
    ensure!(
        !log[logged..].contains("NODE_STATE_DOWN"),
        "a node was taken for dead when clocks jumped"
    );
    // Certificates are not valid yet where it is yesterday: new connections are made all the same.
    cluster.kill("h4")?;
    cluster.start("h4")?;
    all_ready(&cluster, "h1")?;
    wait_until(PATIENCE, "h4 says that its clock is behind", || {
        Ok(cluster
            .log("h4")?
            .contains("is not valid yet by this machine's clock")
            .then_some(()))
    })?;
    // A container fails while the leader's clock is ahead, which is right again before the next one is due.
    let victim = before
        .iter()
        .find(|task| task.node == "h4")
        .context("no task on h4")?;
    let kill = format!("kill -9 $(cat /run/swarm/runtime/{}/init.pid)", victim.id);
    cluster.host_sh("h4", &kill)?;
    wait_until(PATIENCE, "the next one waits for the delay", || {
        let tasks = cluster.tasks("h1", "box")?;
        let listed = cluster.swarm(
            "h1",
            &[
                "service",
                "ps",
                "box",
                "--filter",
                "desired-state=ready",
                "-q",
            ],
        )?;
        Ok((tasks.len() == 3 && listed.lines().count() == 1).then_some(()))
    })?;
    cluster.heal()?;
    let healed = Instant::now();
    let after = cluster.wait_running("h1", "box", 4)?;
    ensure!(
        healed.elapsed() < Duration::from_secs(30),
        "the restart waited {:?} for a clock that had been ahead",
        healed.elapsed()
    );
    let kept = after.iter().filter(|task| before.contains(task)).count();
    ensure!(kept == 3, "{before:?} became {after:?}");
    ensure!(cluster.wait_running("h1", "during", 4)? == during);
    all_ready(&cluster, "h1")
}

#[test]
fn a_clock_beyond_the_end_of_certificates_is_named_and_healed() -> Result<()> {
    let mut cluster = Cluster::up(3, 1)?;
    let pinned = ["--constraint", "node.hostname==h2"];
    let image = busybox();
    let sleep = [image.as_str(), "sleep", "1000000"];
    cluster.service("h1", "box", 1, &[&pinned[..], &sleep].concat())?;
    let container = "ls /var/lib/swarm/runtime/containers";
    let before = cluster.host_sh("h2", container)?;

    // A worker's: it reaches nobody, says why, and keeps what runs.
    cluster.skew("h2", "+2400h".parse()?)?;
    cluster.kill("h2")?;
    cluster.start("h2")?;
    wait_until(PATIENCE, "h2 says that certificates have expired", || {
        let log = cluster.log("h2")?;
        Ok(
            (log.contains("certificate expired") && log.contains("certificate not renewed"))
                .then_some(()),
        )
    })?;
    wait_until(PATIENCE, "h2 is Down", || {
        Ok((cluster.status_of("h1", "h2")? == "Down").then_some(()))
    })?;
    ensure!(cluster.host_sh("h2", container)? == before);
    cluster.heal()?;
    all_ready(&cluster, "h1")?;
    cluster.wait_running("h1", "box", 1)?;

    // The only manager's: nobody reaches it, it says whom it refuses, and its API still answers at home.
    cluster.skew("h1", "+2400h".parse()?)?;
    cluster.kill("h1")?;
    cluster.start("h1")?;
    wait_until(PATIENCE, "h1 says that certificates have expired", || {
        Ok(cluster
            .log("h1")?
            .contains("certificate expired")
            .then_some(()))
    })?;
    cluster.swarm(
        "h1",
        &["network", "create", "--driver", "overlay", "meanwhile"],
    )?;
    cluster.heal()?;
    all_ready(&cluster, "h1")?;
    cluster.wait_running("h1", "box", 1)?;
    Ok(())
}
