//! Nodes come, change their role, and go.

use anyhow::{Context as _, Result, ensure};
use swarm_tests::cluster::{Cluster, PATIENCE, busybox};
use swarm_tests::lab::wait_until;

#[test]
fn a_promoted_worker_carries_the_cluster_and_a_demoted_manager_works_on() -> Result<()> {
    let cluster = Cluster::up(3, 1)?;
    cluster.service(
        "h1",
        "stay",
        3,
        &["--mode", "global", &busybox(), "sleep", "1000000"],
    )?;
    for host in ["h2", "h3"] {
        let said = cluster.swarm("h1", &["node", "promote", host])?;
        ensure!(
            said.contains(&format!("Node {host} promoted to a manager in the swarm.")),
            "{said}"
        );
        wait_manager(&cluster, "h1", host, true)?;
    }
    // The group counts a member before its own API has begun.
    for host in ["h2", "h3"] {
        wait_until(PATIENCE, "the promoted node answers", || {
            Ok(cluster.swarm(host, &["node", "ls"]).ok())
        })?;
    }
    // Any of them answers, reads what another wrote, and writes.
    cluster.swarm("h3", &["network", "create", "--driver", "overlay", "by-h3"])?;
    ensure!(cluster.swarm("h2", &["network", "ls"])?.contains("by-h3"));
    // The first one goes: the others carry on without it.
    cluster.swarm("h2", &["node", "demote", "h1"])?;
    wait_manager(&cluster, "h2", "h1", false)?;
    cluster.swarm(
        "h2",
        &["network", "create", "--driver", "overlay", "without-h1"],
    )?;
    wait_until(PATIENCE, "the demoted node refuses to be asked", || {
        let output = cluster.run("h1", &["swarm", "node", "ls"])?;
        Ok(String::from_utf8_lossy(&output.stderr)
            .contains("Worker nodes can't be used")
            .then_some(()))
    })?;
    // Nobody's container was touched.
    let tasks = cluster.wait_running("h2", "stay", 3)?;
    ensure!(tasks.len() == 3, "{tasks:?}");
    // Again a manager: with a new identity in the group, and everything it missed.
    cluster.swarm("h2", &["node", "promote", "h1"])?;
    wait_manager(&cluster, "h2", "h1", true)?;
    wait_until(PATIENCE, "the new manager has caught up", || {
        Ok(cluster
            .swarm("h1", &["network", "ls"])
            .is_ok_and(|listed| listed.contains("without-h1"))
            .then_some(()))
    })
}

#[test]
fn what_would_lose_the_quorum_is_refused() -> Result<()> {
    let mut cluster = Cluster::up(3, 3)?;
    cluster.kill("h3")?;
    wait_until(PATIENCE, "h3 is seen as unreachable", || {
        Ok(cluster
            .swarm(
                "h1",
                &["node", "ls", "--format", "{{.Hostname}} {{.ManagerStatus}}"],
            )?
            .contains("h3 Unreachable")
            .then_some(()))
    })?;
    // Two of three are left: without another one, one of two could not decide.
    let output = cluster.run("h1", &["swarm", "node", "demote", "h2"])?;
    let stderr = String::from_utf8_lossy(&output.stderr);
    ensure!(
        output.status.code() == Some(1) && stderr.contains("loss of quorum"),
        "{stderr}"
    );
    // The dead one may go.
    cluster.swarm("h1", &["node", "demote", "h3"])?;
    wait_manager(&cluster, "h1", "h3", false)?;
    cluster.swarm("h1", &["node", "rm", "--force", "h3"])?;
    ensure!(cluster.swarm("h1", &["node", "ls", "-q"])?.lines().count() == 2);
    Ok(())
}

#[test]
fn a_node_that_left_can_be_removed_and_join_again() -> Result<()> {
    let cluster = Cluster::up(2, 1)?;
    cluster.swarm("h1", &["network", "create", "--driver", "overlay", "net"])?;
    cluster.service(
        "h1",
        "web",
        2,
        &[
            "--network",
            "net",
            "--replicas",
            "2",
            "--stop-grace-period",
            "1s",
            &busybox(),
            "sleep",
            "1000000",
        ],
    )?;
    let said = cluster.swarm("h2", &["leave"])?;
    ensure!(said.contains("Node left the swarm."), "{said}");
    // Nothing of the swarm is left on it.
    ensure!(
        cluster.host_sh("h2", "ls /run/swarm/netns 2>/dev/null | wc -l; ip -o link | grep -c swarm || true; nft list tables | wc -l")?
            == "0\n0\n0\n",
        "{}",
        cluster.host_sh("h2", "ls /run/swarm/netns; ip -o link; nft list ruleset")?
    );
    let tasks = cluster.wait_running("h1", "web", 2)?;
    ensure!(tasks.iter().all(|task| task.node == "h1"), "{tasks:?}");
    wait_until(PATIENCE, "the node that left is Down", || {
        Ok((cluster.status_of("h1", "h2")? == "Down").then_some(()))
    })?;
    cluster.swarm("h1", &["node", "rm", "h2"])?;
    let token = cluster.swarm("h1", &["join-token", "-q", "worker"])?;
    let join = ["join", "--token", token.trim(), "172.30.99.1:2377"];
    cluster.swarm("h2", &join)?;
    cluster.wait_ready(PATIENCE)?;

    // Removed while it is alive and runs a task: that runs elsewhere now, so it ends here.
    cluster.swarm("h1", &["service", "scale", "--detach", "web=4"])?;
    let tasks = cluster.wait_running("h1", "web", 4)?;
    ensure!(tasks.iter().any(|task| task.node == "h2"), "{tasks:?}");
    let refused = cluster.attempt("h1", &["swarm", "node", "rm", "h2"])?;
    ensure!(
        refused.0 == Some(1) && refused.1.contains("is not down"),
        "{refused:?}"
    );
    cluster.swarm("h1", &["node", "rm", "--force", "h2"])?;
    cluster.wait_running("h1", "web", 4)?;
    wait_until(PATIENCE, "the removed node has no task left", || {
        let left = cluster.host_sh("h2", "ls /run/swarm/netns 2>/dev/null | wc -l")?;
        Ok((left.trim() == "0").then_some(()))
    })?;
    cluster.swarm("h2", &["leave"])?;
    cluster.swarm("h2", &join)?;
    cluster.wait_ready(PATIENCE)
}

#[test]
fn addresses_ports_and_pools_are_those_of_init() -> Result<()> {
    let cluster = Cluster::unformed(2)?;
    cluster.host_sh("h1", "ip addr add 172.30.99.101/24 dev eth0")?;
    let cases: &[(&[&str], &str)] = &[
        (
            &["--advertise-addr", "nonsense"],
            "\"nonsense\" is neither an IP address",
        ),
        (&["--advertise-addr", "0.0.0.0"], "must be a real address"),
        (
            &[
                "--advertise-addr",
                "172.30.99.1",
                "--listen-addr",
                "172.30.99.77:2377",
            ],
            "cannot listen on 172.30.99.77:2377",
        ),
        (
            &[
                "--advertise-addr",
                "172.30.99.1",
                "--data-path-addr",
                "8.8.8.8",
            ],
            "must be one of this machine's",
        ),
        (
            &[
                "--advertise-addr",
                "172.30.99.1",
                "--default-addr-pool",
                "foo",
            ],
            "invalid default address pool foo: invalid CIDR block notation",
        ),
        (
            &[
                "--advertise-addr",
                "172.30.99.1",
                "--default-addr-pool",
                "10.0.0.5/8",
            ],
            "it should be 10.0.0.0/8",
        ),
        (
            &[
                "--advertise-addr",
                "172.30.99.1",
                "--default-addr-pool-mask-length",
                "4",
            ],
            "must be between 8 and 29, not 4",
        ),
        (
            &["--advertise-addr", "172.30.99.1", "--cert-expiry", "1m"],
            "must be at least 3600s",
        ),
        (
            &[
                "--advertise-addr",
                "172.30.99.1",
                "--availability",
                "sleepy",
            ],
            "sleepy",
        ),
    ];
    for (flags, expected) in cases {
        let argv: Vec<&str> = ["swarm", "init"]
            .into_iter()
            .chain(flags.iter().copied())
            .collect();
        let (code, said) = cluster.attempt("h1", &argv)?;
        ensure!(
            code == Some(1) && said.contains(expected) && said.lines().count() == 1,
            "{argv:?} says {said:?} and exits with {code:?}"
        );
        ensure!(cluster.swarm("h1", &["info"])?.contains("Swarm: inactive"));
    }
    ensure!(cluster.host_sh("h1", "ls /var/lib/swarm")? == "certificates\nruntime\n");
    cluster.swarm(
        "h1",
        &[
            "init",
            "--advertise-addr",
            "172.30.99.1:2400",
            "--listen-addr",
            "172.30.99.1:2400",
            "--data-path-addr",
            "172.30.99.101",
            "--default-addr-pool",
            "10.200.0.0/16",
            "--default-addr-pool-mask-length",
            "26",
        ],
    )?;
    let listening = cluster.host_sh("h1", "ss -Hltn | awk '{print $4}'")?;
    ensure!(
        listening == "172.30.99.1:2400\n",
        "h1 listens on {listening}"
    );
    let said = cluster.swarm("h1", &["join-token", "worker"])?;
    let line = said
        .lines()
        .find(|line| line.contains("swarm join"))
        .context("no line to join with")?;
    ensure!(line.ends_with(" 172.30.99.1:2400"), "{line}");
    // As people do: the line is copied to the other machine.
    cluster.host_sh("h2", line)?;
    for (name, subnet) in [("n1", "10.200.0.0/26"), ("n2", "10.200.0.64/26")] {
        cluster.swarm("h1", &["network", "create", "--driver", "overlay", name])?;
        let ipam = cluster.swarm(
            "h1",
            &[
                "network",
                "inspect",
                "--format",
                "{{json .IPAM.Config}}",
                name,
            ],
        )?;
        ensure!(ipam.contains(subnet), "{name} has {ipam}");
    }
    // Packets of the overlay go to the data path address.
    cluster.client("h1", "a", "h1", "n1")?;
    cluster.client("h1", "b", "h2", "n1")?;
    cluster.sh("h2", "b.1", "ping -c 1 -W 2 tasks.a")?;
    let peers = cluster.host_sh(
        "h2",
        "for f in /run/swarm/netns/net-*; do nsenter --net=$f bridge fdb show | grep -o 'dst [0-9.]*'; done",
    )?;
    ensure!(peers == "dst 172.30.99.101\n", "h2 sends to {peers}");
    Ok(())
}

#[test]
fn drained_and_paused_nodes_get_no_tasks() -> Result<()> {
    let cluster = Cluster::up(2, 1)?;
    cluster.service(
        "h1",
        "web",
        2,
        &[
            "--replicas",
            "2",
            "--stop-grace-period",
            "1s",
            &busybox(),
            "sleep",
            "1000000",
        ],
    )?;
    cluster.swarm("h1", &["node", "update", "--availability", "drain", "h2"])?;
    wait_until(PATIENCE, "all tasks have left h2", || {
        let tasks = cluster.tasks("h1", "web")?;
        Ok(
            (tasks.len() == 2 && tasks.iter().all(|t| t.node == "h1" && t.state == "Running"))
                .then_some(()),
        )
    })?;
    cluster.swarm("h1", &["node", "update", "--availability", "active", "h2"])?;
    cluster.swarm("h1", &["node", "update", "--availability", "pause", "h1"])?;
    cluster.swarm("h1", &["service", "scale", "--detach", "web=4"])?;
    let tasks = cluster.wait_running("h1", "web", 4)?;
    ensure!(
        tasks.iter().filter(|task| task.node == "h2").count() == 2,
        "{tasks:?}"
    );
    Ok(())
}

fn wait_manager(cluster: &Cluster, asked: &str, host: &str, manager: bool) -> Result<()> {
    wait_until(PATIENCE, &format!("{host} is a manager: {manager}"), || {
        let listing = cluster.swarm(
            asked,
            &["node", "ls", "--format", "{{.Hostname}} {{.ManagerStatus}}"],
        )?;
        let line = listing
            .lines()
            .find(|line| line.starts_with(&format!("{host} ")))
            .context("no such node")?;
        let is = line.ends_with("Reachable") || line.ends_with("Leader");
        let not = line.trim() == host;
        Ok(if manager { is } else { not }.then_some(()))
    })
}
