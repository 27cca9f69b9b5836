//! What the flags of `service create` and `network create` do where it counts: inside containers, and
//! where these are placed and how often.

use std::collections::BTreeSet;
use std::net::Ipv4Addr;

use anyhow::{Context as _, Result, ensure};
use swarm_tests::cluster::{Cluster, PATIENCE, busybox};
use swarm_tests::lab::wait_until;

/// Creates a service in the background.
fn create(cluster: &Cluster, name: &str, args: &[&str]) -> Result<String> {
    let head = ["service", "create", "--detach", "--name", name];
    cluster.swarm("h1", &[&head[..], args].concat())
}

/// Waits until the file that a service's containers write has `count` lines, and returns them.
fn lines_of(cluster: &Cluster, file: &str, count: usize) -> Result<Vec<String>> {
    wait_until(PATIENCE, &format!("{file} has {count} lines"), || {
        let text = cluster.host_sh(
            "h1",
            &format!("cat /run/swarm/in/{file} 2>/dev/null || true"),
        )?;
        let lines: Vec<String> = text.lines().map(str::to_owned).collect();
        Ok((lines.len() >= count).then_some(lines))
    })
}

#[test]
fn every_flag_of_a_service_has_its_effect_inside() -> Result<()> {
    let cluster = Cluster::up(1, 1)?;
    cluster.host_sh(
        "h1",
        "mkdir -m 777 /run/swarm/in; echo data >/run/swarm/in/file",
    )?;
    // What the program itself has, not only what is executed beside it.
    let script = "{ echo ids $(id -u) $(id -G); echo dir $(pwd); echo host $(hostname); echo env \"$A|$B\"; \
                  echo arg $0 $1; grep Cap /proc/self/status; echo pid $$; \
                  echo x >/in/self; echo x >/ro/x && echo writable; echo x >/etc/x && echo writable; echo x >/scratch/x; \
                  dd if=/dev/zero of=/scratch/big bs=1M count=3; stat -c 'mode %a' /scratch; \
                  grep -E ' /(scratch|in|ro) ' /proc/mounts; ulimit -n; cat /etc/hosts /etc/resolv.conf; echo end; } 2>&1; \
                  trap 'echo told >/in/told; exit 0' USR1; while :; do sleep 0.05; done";
    let image = busybox();
    let args = [
        "--env",
        "A=b c",
        "--env",
        "B=1",
        "--label",
        "com.example.service=s1",
        "--container-label",
        "com.example.container=c1",
        "--hostname",
        "boxed",
        "--user",
        "65534:4711",
        "--group",
        "4712",
        "--workdir",
        "/made/for/me",
        "--entrypoint",
        "/bin/sh",
        "--mount",
        "type=bind,source=/run/swarm/in,target=/in",
        "--mount",
        "type=bind,source=/run/swarm/in,target=/ro,readonly",
        "--mount",
        "type=tmpfs,target=/scratch,tmpfs-size=2m,tmpfs-mode=1777",
        "--limit-cpu",
        "0.25",
        "--limit-memory",
        "48M",
        "--limit-pids",
        "40",
        "--reserve-cpu",
        "0.1",
        "--reserve-memory",
        "16M",
        "--stop-signal",
        "USR1",
        "--stop-grace-period",
        "50s",
        "--cap-add",
        "SYS_TIME",
        "--cap-drop",
        "NET_RAW",
        "--read-only",
        "--init",
        "--host",
        "elsewhere:192.0.2.7",
        "--dns-search",
        "example.test",
        &image,
        "-c",
        script,
        "zero",
        "one",
    ]
    // One flag and its value a line is what is readable here.
    .to_vec();
    let task = cluster.service("h1", "all", 1, &args)?.remove(0);
    let said = wait_until(PATIENCE, "the program has said everything", || {
        let said = cluster.swarm("h1", &["logs", "all.1"])?;
        Ok(said.lines().any(|line| line == "end").then_some(said))
    })?;
    // 25 = SYS_TIME, 13 = NET_RAW. As a user's, they are in the bounding set only.
    let bounding = said
        .lines()
        .find_map(|line| line.strip_prefix("CapBnd:"))
        .context("no capabilities")?;
    let bounding = u64::from_str_radix(bounding.trim(), 16)?;
    ensure!(
        bounding & (1 << 25) != 0 && bounding & (1 << 13) == 0,
        "{bounding:x}"
    );
    for expected in [
        "ids 65534 4711 4712",
        "dir /made/for/me",
        "host boxed",
        "env b c|1",
        "arg zero one",
        "mode 1777",
        "No space left on device",
        "Read-only file system",
        "192.0.2.7\telsewhere",
        "search example.test",
    ] {
        ensure!(said.contains(expected), "{expected:?} is not in {said}");
    }
    ensure!(
        !said.contains("writable") && !said.contains("pid 1\n"),
        "{said}"
    );
    ensure!(said.matches("Read-only file system").count() == 2, "{said}");
    ensure!(cluster.host_sh("h1", "cat /run/swarm/in/self")? == "x\n");
    // What the kernel holds it to, by either version of cgroups.
    let limits = cluster.sh(
        "h1",
        "all.1",
        "cd /sys/fs/cgroup; cat memory/memory.limit_in_bytes memory.max 2>/dev/null; \
         cat pids/pids.max pids.max 2>/dev/null; \
         cat cpu/cpu.cfs_quota_us cpu/cpu.cfs_period_us cpu.max 2>/dev/null; true",
    )?;
    let limits: Vec<&str> = limits.split_whitespace().collect();
    ensure!(
        limits == ["50331648", "40", "25000", "100000"],
        "{limits:?}"
    );
    let spec = cluster.swarm("h1", &["service", "inspect", "all"])?;
    for expected in [
        "\"com.example.service\": \"s1\"",
        "\"com.example.container\": \"c1\"",
        "\"NanoCPUs\": 100000000",
        "\"MemoryBytes\": 16777216",
    ] {
        ensure!(spec.contains(expected), "{expected} is not in {spec}");
    }
    let by_label = [
        "service",
        "ls",
        "-q",
        "--filter",
        "label=com.example.service=s1",
    ];
    ensure!(cluster.swarm("h1", &by_label)?.lines().count() == 1);
    // It is told by its own signal, through the small init, long before its grace period ends.
    cluster.swarm("h1", &["service", "rm", "all"])?;
    ensure!(lines_of(&cluster, "told", 1)? == ["told"]);
    wait_until(PATIENCE, "its container is gone", || {
        let gone = format!("test ! -e /var/lib/swarm/runtime/containers/{}", task.id);
        Ok(cluster.host_sh("h1", &gone).is_ok().then_some(()))
    })
}

#[test]
fn restarts_follow_condition_delay_and_attempts() -> Result<()> {
    let cluster = Cluster::up(1, 1)?;
    cluster.host_sh("h1", "mkdir -m 777 /run/swarm/in")?;
    let image = busybox();
    let run = |name: &str, policy: &[&str], then: &str| -> Result<String> {
        let script = format!("cut -d' ' -f1 /proc/uptime >>/in/{name}; {then}");
        let mount = ["--mount", "type=bind,source=/run/swarm/in,target=/in"];
        let program = [image.as_str(), "sh", "-c", &script];
        create(&cluster, name, &[policy, &mount, &program].concat())
    };
    let twice = ["--restart-max-attempts", "2", "--restart-delay", "700ms"];
    run("attempts", &twice, "exit 3")?;
    run(
        "success",
        &[
            "--restart-condition",
            "on-failure",
            "--restart-delay",
            "100ms",
        ],
        "exit 0",
    )?;
    run(
        "failure",
        &[
            "--restart-condition",
            "on-failure",
            "--restart-delay",
            "100ms",
        ],
        "exit 1",
    )?;
    run(
        "any",
        &["--restart-condition", "any", "--restart-delay", "100ms"],
        "exit 0",
    )?;
    run(
        "none",
        &["--restart-condition", "none", "--restart-delay", "100ms"],
        "exit 1",
    )?;
    run("later", &twice, "sleep 1; exit 1")?;
    lines_of(&cluster, "failure", 3)?;
    lines_of(&cluster, "any", 3)?;
    let attempts: Vec<f64> = lines_of(&cluster, "attempts", 3)?
        .iter()
        .map(|line| line.parse())
        .collect::<Result<_, _>>()?;
    for pair in attempts.windows(2) {
        ensure!(pair[1] - pair[0] >= 0.7, "restarted too soon: {attempts:?}");
    }
    // Twice as many runs that take a second each: whoever would go on has gone on by then.
    lines_of(&cluster, "later", 3)?;
    for (name, count) in [("attempts", 3), ("success", 1), ("none", 1)] {
        let lines = lines_of(&cluster, name, count)?;
        ensure!(lines.len() == count, "{name} was run {} times", lines.len());
    }
    Ok(())
}

#[test]
fn placement_follows_constraints_preferences_and_reservations() -> Result<()> {
    let cluster = Cluster::up(3, 1)?;
    for (host, zone) in [("h1", "a"), ("h2", "a"), ("h3", "b")] {
        let label = format!("zone={zone}");
        cluster.swarm("h1", &["node", "update", "--label-add", &label, host])?;
    }
    let image = busybox();
    let sleep = [image.as_str(), "sleep", "1000000"];
    let nodes = |name: &str, count: usize| -> Result<Vec<String>> {
        let tasks = cluster.wait_running("h1", name, count)?;
        let mut nodes: Vec<_> = tasks.into_iter().map(|task| task.node).collect();
        nodes.sort_unstable();
        Ok(nodes)
    };
    let place = |name: &str, flags: &[&str]| create(&cluster, name, &[flags, &sleep].concat());
    // Everywhere and here at once: what runs and what waits, and why.
    let waits = |name: &str, running: usize, reason: &str| -> Result<()> {
        wait_until(PATIENCE, &format!("{name} says {reason}"), || {
            let text = cluster.swarm("h1", &["service", "ps", "--no-trunc", name])?;
            let tasks = cluster.tasks("h1", name)?;
            let run = tasks.iter().filter(|task| task.state == "Running").count();
            Ok((run == running && text.contains(reason)).then_some(()))
        })
        .with_context(|| {
            cluster
                .swarm("h1", &["service", "ps", "--no-trunc", name])
                .unwrap_or_default()
        })
    };
    place(
        "spread",
        &[
            "--replicas",
            "4",
            "--placement-pref",
            "spread=node.labels.zone",
        ],
    )?;
    let placed = nodes("spread", 4)?;
    ensure!(placed == ["h1", "h2", "h3", "h3"], "{placed:?}");
    place("most", &["--replicas", "4", "--replicas-max-per-node", "1"])?;
    waits(
        "most",
        3,
        "no suitable node (maximum replicas per node reached on 3 nodes)",
    )?;
    place(
        "here",
        &[
            "--replicas",
            "2",
            "--constraint",
            "node.labels.zone==a",
            "--constraint",
            "node.hostname!=h1",
        ],
    )?;
    ensure!(nodes("here", 2)? == ["h2", "h2"]);
    place(
        "global",
        &["--mode", "global", "--constraint", "node.labels.zone==a"],
    )?;
    ensure!(nodes("global", 2)? == ["h1", "h2"]);
    // More than half of each node's: one fits on each, whatever the machine has.
    let cpus = std::thread::available_parallelism()?.get();
    let most = format!("{}", cpus as f64 * 0.6);
    place("cpus", &["--replicas", "4", "--reserve-cpu", &most])?;
    waits("cpus", 3, "no suitable node (insufficient CPU on 3 nodes)")?;
    cluster.swarm("h1", &["service", "rm", "cpus"])?;
    let kib = std::fs::read_to_string("/proc/meminfo")?
        .split_whitespace()
        .nth(1)
        .and_then(|kib| kib.parse::<u64>().ok())
        .context("no memory")?;
    let most = format!("{}k", kib * 6 / 10);
    place("memory", &["--replicas", "4", "--reserve-memory", &most])?;
    waits(
        "memory",
        3,
        "no suitable node (insufficient memory on 3 nodes)",
    )?;
    // What is given back is used at once.
    cluster.swarm("h1", &["service", "scale", "--detach", "memory=3"])?;
    nodes("memory", 3).map(drop)
}

#[test]
fn a_network_is_what_its_flags_say() -> Result<()> {
    let cluster = Cluster::up(2, 1)?;
    let id = cluster.swarm(
        "h1",
        &[
            "network",
            "create",
            "--driver",
            "overlay",
            "--subnet",
            "10.70.0.0/24",
            "--ip-range",
            "10.70.0.64/29",
            "--gateway",
            "10.70.0.66",
            "--subnet",
            "10.71.0.0/24",
            "--gateway",
            "10.71.0.254",
            "--opt",
            "com.docker.network.driver.mtu=1380",
            "--attachable",
            "--label",
            "com.example.team=blue",
            "several",
        ],
    )?;
    let by_label = [
        "network",
        "ls",
        "-q",
        "--no-trunc",
        "--filter",
        "label=com.example.team=blue",
    ];
    ensure!(cluster.swarm("h1", &by_label)? == id);
    let inspected = cluster.swarm(
        "h1",
        &[
            "network",
            "inspect",
            "--format",
            "{{json .IPAM.Config}} {{.Attachable}} {{json .Options}}",
            "several",
        ],
    )?;
    for expected in [
        "{\"Subnet\":\"10.70.0.0/24\",\"IPRange\":\"10.70.0.64/29\",\"Gateway\":\"10.70.0.66\"}",
        "{\"Subnet\":\"10.71.0.0/24\",\"Gateway\":\"10.71.0.254\"}",
        " true ",
        "\"com.docker.network.driver.mtu\":\"1380\"",
    ] {
        ensure!(
            inspected.contains(expected),
            "{expected:?} is not in {inspected}"
        );
    }
    // Eight addresses in the range, of which the gateway and the service have one each: the others
    // are of the second subnet.
    let image = busybox();
    let args = [
        "--network",
        "several",
        "--replicas",
        "10",
        &image,
        "sleep",
        "1000000",
    ];
    let tasks = cluster.service("h1", "box", 10, &args)?;
    let mut addresses = BTreeSet::new();
    for task in &tasks {
        let shown = cluster.sh(
            &task.node,
            &task.name,
            "ip -4 -o addr show eth0; cat /sys/class/net/eth0/mtu",
        )?;
        ensure!(shown.trim_end().ends_with("1380"), "{shown}");
        let addr = shown
            .split_once("inet ")
            .and_then(|(_, rest)| rest.split_once("/24 "))
            .with_context(|| format!("no address of a /24 in {shown}"))?
            .0;
        addresses.insert(addr.parse::<Ipv4Addr>()?);
    }
    ensure!(addresses.len() == 10, "{addresses:?}");
    let first: Vec<_> = addresses
        .iter()
        .filter(|addr| addr.octets()[1] == 70)
        .collect();
    ensure!(
        (4..=6).contains(&first.len())
            && first
                .iter()
                .all(|addr| (64..72).contains(&addr.octets()[3]) && addr.octets()[3] != 66),
        "{addresses:?}"
    );
    ensure!(
        !addresses.contains(&Ipv4Addr::new(10, 71, 0, 254)),
        "{addresses:?}"
    );
    // Every task reaches every other one, whatever the subnets and hosts of the two, with whole packets.
    let all: Vec<String> = addresses.iter().map(ToString::to_string).collect();
    let script = format!(
        "for a in {}; do ping -c 1 -W 2 -s 1352 $a >/dev/null || echo lost $a; done",
        all.join(" ")
    );
    for task in &tasks {
        let lost = cluster.sh(&task.node, &task.name, &script)?;
        ensure!(lost.is_empty(), "{}: {lost}", task.name);
    }
    Ok(())
}
