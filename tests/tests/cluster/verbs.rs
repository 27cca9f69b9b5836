//! The lab's verbs: each does what it says, to that host only, and is undone.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use swarm_tests::cluster::{Cluster, PATIENCE};
use swarm_tests::lab::wait_until;

/// Pings once; whether an answer came within a second.
fn reaches(cluster: &Cluster, from: &str, to: &str) -> Result<bool> {
    let addr = cluster.addr(to)?.to_owned();
    let output = cluster.run(from, &["ping", "-c", "1", "-W", "1", &addr])?;
    Ok(output.status.success())
}

/// Echo requests that arrive at `to` of those that `from` sends.
fn requests_that_arrive(cluster: &Cluster, from: &str, to: &str) -> Result<usize> {
    let count = |text: &str| -> usize {
        text.lines()
            .filter(|line| line.starts_with("Icmp:"))
            .nth(1)
            .and_then(|line| line.split_whitespace().nth(9))
            .and_then(|number| number.parse().ok())
            .unwrap_or(0)
    };
    let before = count(&cluster.host_sh(to, "cat /proc/net/snmp")?);
    let addr = cluster.addr(to)?.to_owned();
    cluster.run(from, &["ping", "-c", "3", "-i", "0.1", "-W", "1", &addr])?;
    Ok(count(&cluster.host_sh(to, "cat /proc/net/snmp")?) - before)
}

#[test]
fn cuts_and_losses_are_of_the_hosts_named_and_healed() -> Result<()> {
    let cluster = Cluster::unformed(3)?;
    // One way: requests of h1 do not arrive; those of h3 do, and their answers do not.
    ensure!(requests_that_arrive(&cluster, "h1", "h3")? == 3);
    cluster.cut_one_way("h1", "h3")?;
    ensure!(
        requests_that_arrive(&cluster, "h1", "h3")? == 0,
        "h1 is heard"
    );
    ensure!(
        requests_that_arrive(&cluster, "h3", "h1")? == 3,
        "h3 is not heard"
    );
    ensure!(reaches(&cluster, "h1", "h2")?);
    cluster.heal()?;
    ensure!(reaches(&cluster, "h1", "h3")?);

    // A half each way: a quarter of 200 comes back, give or take much.
    cluster.lose("h1", 5000)?;
    let addr = cluster.addr("h1")?.to_owned();
    let script = format!("ping -q -c 200 -i 0.005 -W 1 {addr} || true");
    let said = cluster.host_sh("h2", &script)?;
    let received: u32 = said
        .split(',')
        .find_map(|part| part.trim().strip_suffix(" received")?.parse().ok())
        .unwrap_or(0);
    ensure!(
        (10..=100).contains(&received),
        "{received} of 200 answered: {said}"
    );
    ensure!(reaches(&cluster, "h2", "h3")?, "another link loses packets");
    // A later share takes the place of an earlier one.
    cluster.lose("h1", 10_000)?;
    ensure!(!reaches(&cluster, "h2", "h1")?);
    cluster.heal()?;
    for _ in 0..20 {
        ensure!(
            reaches(&cluster, "h2", "h1")?,
            "a packet is lost after heal"
        );
    }

    for bad in [
        &["cut", "h1", "h1"][..],
        &["cut", "h1", "h9"],
        &["loss", "h1", "5"],
        &["loss", "h9", "5%"],
        &["slow-disk", "h1", "200"],
        &["slow-disk", "h1", "2h"],
        &["skew", "h1", "90s"],
        &["full-disk", "h4"],
    ] {
        let lab = swarm_tests::lab::bin_dir()?.join("lab");
        let output = std::process::Command::new(lab).args(bad).output()?;
        let stderr = String::from_utf8_lossy(&output.stderr);
        ensure!(
            output.status.code() == Some(1) && stderr.lines().count() == 1,
            "{bad:?}: {stderr}"
        );
    }
    Ok(())
}

#[test]
fn disks_and_clocks_are_wrong_while_swarmd_runs_and_right_again_after_heal() -> Result<()> {
    let mut cluster = Cluster::up(1, 1)?;
    let pid = cluster.swarmd("h1")?;
    let mut number = 0;
    let mut write = |cluster: &Cluster| -> Result<Duration> {
        number += 1;
        let name = format!("n{number}");
        let began = Instant::now();
        cluster.swarm("h1", &["network", "create", "--driver", "overlay", &name])?;
        Ok(began.elapsed())
    };
    write(&cluster)?;
    cluster.slow_disk("h1", Duration::from_secs(2))?;
    let slow = write(&cluster)?;
    ensure!(slow >= Duration::from_secs(2), "a write took {slow:?}");
    cluster.heal()?;
    // One sync may still be under way.
    write(&cluster)?;
    let quick = write(&cluster)?;
    ensure!(
        quick < Duration::from_secs(2),
        "a write took {quick:?} after heal"
    );

    // The clock that objects are stamped with.
    let year = |cluster: &Cluster, name: &str| -> Result<String> {
        let format = "{{.Created}}";
        let created = cluster.swarm("h1", &["network", "inspect", "--format", format, name])?;
        Ok(created.trim().chars().take(4).collect())
    };
    let now = year(&cluster, "n1")?;
    cluster.skew("h1", "+87600h".parse()?)?;
    cluster.swarm("h1", &["network", "create", "--driver", "overlay", "later"])?;
    let later = year(&cluster, "later")?;
    ensure!(
        later.parse::<u32>()? >= now.parse::<u32>()? + 9,
        "made in {later}, ten years after {now}"
    );
    cluster.heal()?;
    cluster.swarm("h1", &["network", "create", "--driver", "overlay", "again"])?;
    ensure!(year(&cluster, "again")? == now);
    // Whatever swarmd starts knows nothing of it.
    let inherited = cluster.host_sh(
        "h1",
        "for p in /proc/[0-9]*; do tr '\\0' '\\n' <$p/environ 2>/dev/null; done | grep -c SWARM_FAULTS || true",
    )?;
    // swarmd's own, as it was started: what it gives on has none.
    ensure!(
        inherited.trim() == "1",
        "{inherited} processes have the variable"
    );
    ensure!(cluster.swarmd("h1")? == pid, "swarmd was restarted");

    // Without space a manager ends itself and says why, and goes on once there is some.
    cluster.full_disk("h1")?;
    // It may end before it has answered.
    let _ = write(&cluster);
    wait_until(PATIENCE, "the manager without space ends itself", || {
        Ok(cluster.swarmd("h1").is_err().then_some(()))
    })?;
    let log = std::fs::read_to_string(swarm_tests::lab::host_dir("h1").join("swarmd.log"))?;
    ensure!(
        log.lines()
            .any(|line| line.contains("swarmd ends") && line.contains("No space left")),
        "the log does not say why it has ended"
    );
    cluster.heal()?;
    cluster.start("h1")?;
    cluster.wait_ready(PATIENCE)?;
    let listed = cluster.swarm("h1", &["network", "ls", "--format", "{{.Name}}"])?;
    ensure!(listed.lines().any(|line| line == "again"), "{listed}");
    Ok(())
}
