//! The overlay between two hosts, in turns with a bridge and VXLAN made by hand between the same, and with the hosts themselves.

use std::io::{Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::process::Stdio;
use std::time::Instant;

use anyhow::{Context as _, Result, ensure};

use super::machine::Conditions;
use super::report::{Report, Samples, Section, number};
use super::{Background, Bench};
use crate::cluster::{Cluster, PATIENCE};
use crate::lab::wait_until;

/// Round trips of one measurement.
const ROUND_TRIPS: usize = 5000;
/// Bytes each way.
const ROUND_TRIP_BYTES: usize = 64;

/// The part.
///
/// # Errors
/// A step of the cluster failed, or iperf3 is not installed.
pub fn run(bench: &Bench, report: &mut Report) -> Result<()> {
    let mut conditions = Conditions::default();
    conditions.look()?;
    let cluster = Cluster::up(2, 1)?;
    cluster.swarm("h1", &["network", "create", "--driver", "overlay", "net"])?;
    cluster.client("h1", "a", "h1", "net")?;
    cluster.client("h1", "b", "h2", "net")?;
    let sandbox = |name: &str| -> Result<String> {
        let id = cluster
            .tasks("h1", name)?
            .first()
            .context("no task")?
            .id
            .clone();
        Ok(format!("/run/swarm/netns/{id}"))
    };
    let (a, b) = (sandbox("a")?, sandbox("b")?);
    let addr = cluster.sh("h1", "a.1", "ip -4 -o addr show eth0 | awk '{print $4}'")?;
    let addr = addr
        .trim()
        .split('/')
        .next()
        .context("an address")?
        .to_owned();

    // The same by hand, between the same hosts.
    for (host, own, other, vtep) in [("h1", 1, 2, "172.30.99.2"), ("h2", 2, 1, "172.30.99.1")] {
        cluster.host_sh(
            host,
            &format!(
                "ip link add hand type vxlan id 77 dstport 4790 remote {vtep} && ip link add handbr type bridge && \
                 ip link set hand master handbr up && ip link set handbr up && ip netns add hand && \
                 ip link add hand0 type veth peer name eth0 netns hand && ip link set hand0 master handbr up && \
                 ip link set hand0 mtu 1450 && ip -n hand link set eth0 mtu 1450 up && \
                 ip -n hand addr add 192.168.77.{own}/24 dev eth0 && ping -c 1 -W 1 192.168.77.{other} >/dev/null 2>&1 || true"
            ),
        )?;
    }
    // What the machine can do without either: from host to host.
    let (hand, bare) = ("/run/netns/hand", "/proc/self/ns/net");
    let mut seen: [Samples; 6] = Default::default();
    for _ in 0..bench.rounds {
        for (index, server, client, addr) in [
            (0, a.as_str(), b.as_str(), addr.as_str()),
            (2, hand, hand, "192.168.77.1"),
            (4, bare, bare, cluster.addr("h1")?),
        ] {
            let (stream, round_trip) = link(&cluster, server, client, addr)?;
            seen[index].push(stream);
            seen[index + 1].push(round_trip);
        }
    }
    for host in ["h1", "h2"] {
        cluster.host_sh(
            host,
            "ip netns del hand; ip link del hand; ip link del handbr",
        )?;
    }
    let mut section = Section::of_figures("Overlay between two hosts");
    for (samples, name) in seen.iter().zip([
        "Gbit/s, overlay, one TCP stream",
        "µs, overlay, round trip of 64 bytes",
        "Gbit/s, bridge + VXLAN by hand, one TCP stream",
        "µs, bridge + VXLAN by hand, round trip of 64 bytes",
        "Gbit/s, bare: from host to host, one TCP stream",
        "µs, bare: from host to host, round trip of 64 bytes",
    ]) {
        section.figure(name, samples, None);
    }
    section.note(format!(
        "The overlay has {} times the stream and {} times the round trip of the one made by hand, {} and {} times those of the bare hosts. \
         Docker Swarm 29.7.2 on such a machine: 11.2 Gbit/s, 74 µs, 0.7 and 1.28 times the bare hosts (16.0, 58).",
        number(seen[0].p50() / seen[2].p50()),
        number(seen[1].p50() / seen[3].p50()),
        number(seen[0].p50() / seen[4].p50()),
        number(seen[1].p50() / seen[5].p50()),
    ));
    conditions.look()?;
    section.under(conditions);
    report.add(section);
    Ok(())
}

/// Stream in Gbit/s and round trip in µs between a namespace of h1 and one of h2.
fn link(cluster: &Cluster, server: &str, client: &str, addr: &str) -> Result<(f64, f64)> {
    let bench = std::env::current_exe()?.to_string_lossy().into_owned();
    let within = |host: &str, netns: &str, argv: &[&str]| -> Result<std::process::Command> {
        let mut command = cluster.command(host, "nsenter")?;
        command
            .arg(format!("--net={netns}"))
            .args(argv)
            .stdin(Stdio::null());
        Ok(command)
    };
    let mut iperf = Background(
        within("h1", server, &["iperf3", "-s", "-1", "-B", addr])?
            .stdout(Stdio::null())
            .spawn()?,
    );
    let stream = wait_until(PATIENCE, "iperf3 measures", || {
        let output = within("h2", client, &["iperf3", "-J", "-t", "3", "-c", addr])?.output()?;
        let report: serde_json::Value = serde_json::from_slice(&output.stdout)?;
        Ok(report["end"]["sum_received"]["bits_per_second"].as_f64())
    })?;
    iperf.0.wait()?;
    let addr = format!("{addr}:7777");
    let mut echo = Background(within("h1", server, &[&bench, "echo", &addr])?.spawn()?);
    let round_trip = wait_until(PATIENCE, "the echo answers", || {
        let output = within("h2", client, &[&bench, "round-trip", &addr])?.output()?;
        ensure!(
            output.status.success(),
            "{}",
            String::from_utf8_lossy(&output.stderr)
        );
        Ok(Some(
            String::from_utf8(output.stdout)?.trim().parse::<f64>()?,
        ))
    })?;
    echo.0.wait()?;
    Ok((stream / 1e9, round_trip))
}

/// Answers each message of one client with itself.
///
/// # Errors
/// The address cannot be listened at.
pub fn echo(addr: &str) -> Result<()> {
    let (mut stream, _) = TcpListener::bind(addr)?.accept()?;
    stream.set_nodelay(true)?;
    let mut buffer = [0; ROUND_TRIP_BYTES];
    while stream.read_exact(&mut buffer).is_ok() {
        stream.write_all(&buffer)?;
    }
    Ok(())
}

/// The median round trip to an [`echo`], in microseconds.
///
/// # Errors
/// It does not answer.
pub fn round_trip(addr: &str) -> Result<f64> {
    let mut stream = TcpStream::connect(addr)?;
    stream.set_nodelay(true)?;
    let mut buffer = [7; ROUND_TRIP_BYTES];
    let mut times = Vec::with_capacity(ROUND_TRIPS);
    for _ in 0..ROUND_TRIPS {
        let start = Instant::now();
        stream.write_all(&buffer)?;
        stream.read_exact(&mut buffer)?;
        times.push(start.elapsed().as_secs_f64() * 1e6);
    }
    times.sort_by(f64::total_cmp);
    Ok(times[times.len() / 2])
}
