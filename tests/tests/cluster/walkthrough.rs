//! Docker's multi-host walk-through, from the outside: what a container sees,
//! who answers, and what is on the wire.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use swarm_tests::cluster::{Cluster, PATIENCE, busybox, nginx};
use swarm_tests::lab::wait_until;

#[test]
fn a_container_reaches_a_service_on_other_hosts_by_name() -> Result<()> {
    let cluster = Cluster::up(3, 1)?;
    cluster.swarm(
        "h1",
        &["network", "create", "--driver", "overlay", "my-net"],
    )?;
    let web = cluster.service(
        "h1",
        "web",
        2,
        &[
            "--network",
            "my-net",
            "--replicas",
            "2",
            "--constraint",
            "node.hostname!=h3",
            &nginx(),
        ],
    )?;
    let mut nodes: Vec<_> = web.iter().map(|task| task.node.as_str()).collect();
    nodes.sort_unstable();
    ensure!(
        nodes == ["h1", "h2"],
        "two replicas are spread over two nodes, not {nodes:?}"
    );
    cluster.client("h1", "client", "h3", "my-net")?;

    // What the container sees.
    let addr = cluster.sh("h3", "client.1", "ip addr")?;
    let eth0 = section(&addr, "eth0").context("no eth0")?;
    let eth1 = section(&addr, "eth1").context("no eth1")?;
    ensure!(eth0.contains("mtu 1450"), "{eth0}");
    let ip = word_after(eth0, "inet ").context("no address on eth0")?;
    let (ip, prefix) = ip.split_once('/').context("no prefix length")?;
    ensure!(prefix == "24", "{eth0}");
    let octets: Vec<u8> = ip.split('.').map(str::parse).collect::<Result<_, _>>()?;
    let mac = format!(
        "02:42:{:02x}:{:02x}:{:02x}:{:02x}",
        octets[0], octets[1], octets[2], octets[3]
    );
    ensure!(eth0.contains(&mac), "{eth0} has not {mac}");
    ensure!(eth1.contains("inet 172.18."), "{eth1}");
    let resolv = cluster.sh("h3", "client.1", "cat /etc/resolv.conf")?;
    ensure!(resolv.contains("nameserver 127.0.0.11"), "{resolv}");

    // Names.
    let page = cluster.sh("h3", "client.1", "wget -qO- http://web")?;
    ensure!(page.contains("Welcome to nginx!"), "{page}");
    cluster.sh(
        "h3",
        "client.1",
        "ping -c 1 -W 2 tasks.web && ping -c 1 -W 2 web",
    )?;
    let tasks = cluster.sh("h3", "client.1", "nslookup tasks.web")?;
    ensure!(
        tasks
            .matches(&format!("{}.{}.", octets[0], octets[1]))
            .count()
            >= 2,
        "{tasks}"
    );
    cluster
        .sh("h3", "client.1", "nslookup -type=a registry.lab")
        .context("other names are forwarded")?;

    // The VIP spreads evenly and loses nothing.
    let counts = cluster.sh(
        "h3",
        "client.1",
        "i=0; while [ $i -lt 1000 ]; do timeout 5 wget -qO- http://web/host || echo failed; i=$((i+1)); done | sort | uniq -c",
    )?;
    let counts: BTreeMap<&str, u32> = counts
        .lines()
        .filter_map(|line| {
            let (count, name) = line.trim().split_once(' ')?;
            Some((name, count.parse().ok()?))
        })
        .collect();
    ensure!(
        counts.len() == 2 && counts.values().all(|count| (400..=600).contains(count)),
        "1000 fetches over two replicas: {counts:?}"
    );

    // Outside through eth1, masqueraded: the lab's registry has no route to 172.18.0.0/16.
    cluster.sh(
        "h3",
        "client.1",
        "timeout 5 wget -qO- http://172.30.99.254:5000/v2/",
    )?;

    // A container may listen on port 53 itself.
    cluster.sh(
        "h3",
        "client.1",
        "timeout 1 nc -l -p 53; [ $? -eq 143 ] || [ $? -eq 124 ]",
    )?;
    Ok(())
}

#[test]
fn nothing_is_flooded_and_no_arp_leaves_the_host() -> Result<()> {
    let cluster = Cluster::up(3, 1)?;
    cluster.swarm("h1", &["network", "create", "--driver", "overlay", "quiet"])?;
    let mut captures = Vec::new();
    for host in ["h1", "h2", "h3"] {
        let child = cluster
            .command(host, "tcpdump")?
            .args([
                "-i",
                "eth0",
                "-U",
                "-w",
                "/run/swarm/capture",
                "udp",
                "port",
                "4789",
            ])
            .stderr(std::process::Stdio::null())
            .spawn()?;
        captures.push((host, child));
    }
    for (host, _) in &captures {
        wait_until(PATIENCE, "tcpdump captures", || {
            Ok(cluster
                .host_sh(host, "test -s /run/swarm/capture")
                .is_ok()
                .then_some(()))
        })?;
    }
    cluster.service(
        "h1",
        "web",
        2,
        &[
            "--network",
            "quiet",
            "--replicas",
            "2",
            "--constraint",
            "node.hostname!=h3",
            &nginx(),
        ],
    )?;
    cluster.client("h1", "client", "h3", "quiet")?;
    cluster.sh("h3", "client.1", "for i in 1 2 3 4 5 6; do wget -qO- http://web >/dev/null || exit 1; done; ping -c 2 -W 2 tasks.web")?;
    // An address of the subnet that nobody has: asked for inside, never outside.
    let _ = cluster.sh(
        "h3",
        "client.1",
        "ping -c 1 -W 1 $(ip -4 -o addr show eth0 | awk '{print $4}' | cut -d. -f1-3).250",
    );
    for (host, mut child) in captures {
        nix::sys::signal::kill(
            nix::unistd::Pid::from_raw(i32::try_from(child.id())?),
            nix::sys::signal::Signal::SIGTERM,
        )?;
        child.wait()?;
        let all = cluster.host_sh(host, "tcpdump -e -n -r /run/swarm/capture 2>/dev/null")?;
        if host == "h3" {
            ensure!(
                all.contains("VXLAN"),
                "the capture on {host} saw no overlay traffic"
            );
        }
        for line in all.lines() {
            ensure!(
                !line.contains("ARP") && !line.contains("ff:ff:ff:ff:ff:ff"),
                "{host} sent or got a flooded frame: {line}"
            );
        }
    }
    Ok(())
}

#[test]
fn an_internal_network_has_no_way_out() -> Result<()> {
    let cluster = Cluster::up(2, 1)?;
    cluster.swarm(
        "h1",
        &[
            "network",
            "create",
            "--driver",
            "overlay",
            "--internal",
            "inside",
        ],
    )?;
    cluster.client("h1", "a", "h1", "inside")?;
    cluster.client("h1", "b", "h2", "inside")?;
    cluster.sh("h1", "a.1", "ping -c 1 -W 2 tasks.b")?;
    ensure!(
        cluster
            .sh(
                "h1",
                "a.1",
                "timeout 2 wget -qO- http://172.30.99.254:5000/v2/"
            )
            .is_err(),
        "a container of an internal network reached the outside"
    );
    Ok(())
}

#[test]
fn a_network_exists_only_where_a_task_is_on_it() -> Result<()> {
    let cluster = Cluster::up(3, 1)?;
    let id = cluster.swarm("h1", &["network", "create", "--driver", "overlay", "lazy"])?;
    let id = id.trim();
    // Each node lists its own bridge with an ID of its own, also before it has run a task.
    let own = |host: &str| -> Result<String> {
        let args = ["network", "ls", "--no-trunc", "--filter", "scope=local"];
        let format = ["--format", "{{.ID}} {{.Name}} {{.Driver}}"];
        cluster.swarm(host, &[&args[..], &format].concat())
    };
    let before = [own("h1")?, own("h2")?, own("h3")?];
    for listed in &before {
        ensure!(
            listed.ends_with(" swarm_gwbridge bridge\n") && listed.lines().count() == 1,
            "{listed}"
        );
    }
    ensure!(before[0] != before[1] && before[1] != before[2]);
    cluster.swarm("h2", &["network", "inspect", "swarm_gwbridge"])?;
    cluster.service(
        "h1",
        "web",
        1,
        &[
            "--network",
            "lazy",
            "--constraint",
            "node.hostname==h1",
            &nginx(),
        ],
    )?;
    ensure!(
        trace(&cluster, "h1")? != Trace::default(),
        "h1 runs a task on the network"
    );
    for host in ["h2", "h3"] {
        ensure!(
            trace(&cluster, host)? == Trace::default(),
            "{host} has a trace of the network: {:?}",
            trace(&cluster, host)?
        );
        let listed = cluster.swarm(host, &["network", "ls", "--no-trunc"])?;
        ensure!(
            !listed.contains(id),
            "{host} lists a network that it does not hold: {listed}"
        );
    }
    cluster.swarm(
        "h1",
        &[
            "service",
            "update",
            "--detach",
            "--constraint-rm",
            "node.hostname==h1",
            "--replicas",
            "3",
            "web",
        ],
    )?;
    let tasks = cluster.wait_running("h1", "web", 3)?;
    ensure!(
        tasks
            .iter()
            .map(|t| &t.node)
            .collect::<std::collections::BTreeSet<_>>()
            .len()
            == 3,
        "{tasks:?}"
    );
    for host in ["h1", "h2", "h3"] {
        ensure!(
            trace(&cluster, host)? != Trace::default(),
            "{host} runs a task on the network"
        );
        let listed = cluster.swarm(host, &["network", "ls", "--no-trunc"])?;
        ensure!(
            listed.contains(id),
            "{host} does not list the network: {listed}"
        );
    }
    ensure!(
        [own("h1")?, own("h2")?, own("h3")?] == before,
        "a node's bridge has another ID than before its first task"
    );
    let subnet = "{{range .IPAM.Config}}{{.Subnet}}{{end}}";
    let inspected = ["network", "inspect", "--format", subnet, "swarm_gwbridge"];
    ensure!(cluster.swarm("h2", &inspected)?.starts_with("172.18."));
    // Scaled back, it is gone within a second. A busy machine may be slower once, not each time.
    let mut fastest = PATIENCE;
    for _ in 0..3 {
        let start = Instant::now();
        cluster.swarm("h1", &["service", "scale", "--detach", "web=1"])?;
        wait_until(PATIENCE, "two hosts have no trace of the network", || {
            let mut clean = 0;
            for host in ["h1", "h2", "h3"] {
                clean += usize::from(trace(&cluster, host)? == Trace::default());
            }
            Ok((clean == 2).then_some(()))
        })?;
        fastest = fastest.min(start.elapsed());
        cluster.swarm("h1", &["service", "scale", "--detach", "web=3"])?;
        cluster.wait_running("h1", "web", 3)?;
    }
    ensure!(
        fastest < Duration::from_secs(1),
        "gone after {fastest:?} at best"
    );
    cluster.swarm("h1", &["service", "rm", "web"])?;
    for host in ["h1", "h2", "h3"] {
        wait_until(PATIENCE, "the network is gone with its last task", || {
            Ok((trace(&cluster, host)? == Trace::default()).then_some(()))
        })
        .with_context(|| format!("{host}: {:?}", trace(&cluster, host)))?;
    }
    Ok(())
}

#[test]
fn dnsrr_answers_with_every_task_and_aliases_work() -> Result<()> {
    let cluster = Cluster::up(2, 1)?;
    cluster.swarm("h1", &["network", "create", "--driver", "overlay", "names"])?;
    cluster.service(
        "h1",
        "db",
        3,
        &[
            "--network",
            "name=names,alias=store",
            "--endpoint-mode",
            "dnsrr",
            "--replicas",
            "3",
            &busybox(),
            "sleep",
            "1000000",
        ],
    )?;
    cluster.client("h1", "client", "h2", "names")?;
    for name in ["db", "tasks.db", "store"] {
        let answer = cluster.sh("h2", "client.1", &format!("nslookup -type=a {name}"))?;
        let addresses = answer
            .lines()
            .filter(|line| line.starts_with("Address") && !line.contains("127.0.0.11"))
            .count();
        ensure!(addresses == 3, "{name}: {answer}");
    }
    Ok(())
}

/// What of overlay networks is in a host's kernel.
#[derive(Debug, Default, PartialEq, Eq)]
struct Trace {
    namespaces: Vec<String>,
    links: Vec<String>,
    /// Forwarding entries to other hosts, in the host's own namespace.
    forwarding: Vec<String>,
    /// Packet rules, but for those of the gateway bridge, which belong to no network.
    rules: Vec<String>,
}

fn trace(cluster: &Cluster, host: &str) -> Result<Trace> {
    let lines = |script: &str| -> Result<Vec<String>> {
        Ok(cluster
            .host_sh(host, script)?
            .lines()
            .map(str::to_owned)
            .collect())
    };
    Ok(Trace {
        namespaces: lines("ls /run/swarm/netns 2>/dev/null || true")?,
        links: lines(
            "ip -o link show type vxlan; ip -o link show type veth | grep -v 'eth0@' || true",
        )?,
        forwarding: lines("bridge fdb show | grep dst || true")?,
        rules: lines("nft list tables | grep -v '^table ip swarm$' || true")?,
    })
}

fn section<'a>(addr: &'a str, interface: &str) -> Option<&'a str> {
    let start = addr
        .find(&format!("{interface}@"))
        .or_else(|| addr.find(&format!("{interface}:")))?;
    let rest = &addr[start..];
    let end = rest
        .match_indices('\n')
        .map(|(at, _)| at)
        .find(|&at| rest[at + 1..].starts_with(|c: char| c.is_ascii_digit()))
        .unwrap_or(rest.len());
    Some(&rest[..end])
}

fn word_after<'a>(text: &'a str, what: &str) -> Option<&'a str> {
    let start = text.find(what)? + what.len();
    text[start..].split_whitespace().next()
}
