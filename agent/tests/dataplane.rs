//! The real dataplane in the real kernel. Each "host" is a network namespace; needs root.

use std::fs::File;
use std::io::{Read, Write};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use nix::sched::{CloneFlags, setns};
use swarm_agent::network::kernel::{DataplaneConfig, KernelDataplane};
use swarm_agent::network::{
    Dataplane, NetworkError, NetworkView, Sandbox, SandboxAttachment, SandboxSpec,
};
use swarm_proto::v1::{
    Annotations, EndpointEntry, IpamPool, Network, NetworkSpec, PortConfig, PublishMode,
    ServiceEntry, SubnetState,
};
use swarm_proto::{NetworkId, ServiceId, TaskId};

fn run(command: &str) -> String {
    let output = Command::new("sh").args(["-c", command]).output().unwrap();
    assert!(
        output.status.success(),
        "{command}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8(output.stdout).unwrap()
}

/// Runs `inside` on a thread in that namespace.
fn within<T: Send>(netns: &Path, inside: impl FnOnce() -> T + Send) -> T {
    let file = File::open(netns).unwrap();
    std::thread::scope(|scope| {
        scope
            .spawn(|| {
                setns(&file, CloneFlags::CLONE_NEWNET).unwrap();
                inside()
            })
            .join()
            .unwrap()
    })
}

/// What a program prints that is run in that namespace, and whether it succeeded.
fn command(netns: &Path, command: &str) -> (bool, String) {
    within(netns, || {
        let output = Command::new("sh").args(["-c", command]).output().unwrap();
        let text = [output.stdout, output.stderr].concat();
        (
            output.status.success(),
            String::from_utf8_lossy(&text).into_owned(),
        )
    })
}

static NUMBER: AtomicU32 = AtomicU32::new(0);

/// Some hosts on one switch, 192.0.2.1, .2 …; the switch is 192.0.2.254, and is the outside.
struct Lab {
    name: String,
    dir: tempfile::TempDir,
    hosts: Vec<Arc<KernelDataplane>>,
}

impl Lab {
    async fn new(count: usize) -> Self {
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let name = format!("swt{}n{number}", std::process::id());
        let dir = tempfile::tempdir().unwrap();
        run(&format!(
            "ip netns add {name}s; ip -n {name}s link set lo up;
             ip -n {name}s link add sw type bridge; ip -n {name}s addr add 192.0.2.254/24 dev sw; ip -n {name}s link set sw up"
        ));
        for n in 1..=count {
            run(&format!(
                "ip netns add {name}h{n}; ip -n {name}h{n} link set lo up;
                 ip -n {name}s link add p{n} type veth peer name up0 netns {name}h{n};
                 ip -n {name}s link set p{n} master sw up;
                 ip -n {name}h{n} addr add 192.0.2.{n}/24 dev up0; ip -n {name}h{n} link set up0 up"
            ));
        }
        let mut lab = Self {
            name,
            dir,
            hosts: Vec::new(),
        };
        for n in 1..=count {
            let host = lab.start(n).await;
            host.reconcile(vec![]).await.unwrap();
            lab.hosts.push(host);
        }
        lab
    }

    fn netns(&self, host: usize) -> PathBuf {
        format!("/run/netns/{}h{host}", self.name).into()
    }

    fn switch(&self) -> PathBuf {
        format!("/run/netns/{}s", self.name).into()
    }

    fn run_dir(&self, host: usize) -> PathBuf {
        self.dir.path().join(format!("h{host}"))
    }

    /// A new agent on that host.
    async fn start(&self, host: usize) -> Arc<KernelDataplane> {
        let resolv_conf = self.dir.path().join("resolv.conf");
        std::fs::write(&resolv_conf, "nameserver 192.0.2.254\n").unwrap();
        let dataplane = KernelDataplane::new(DataplaneConfig {
            host_netns: Some(self.netns(host)),
            resolv_conf,
            ..DataplaneConfig::new(self.run_dir(host), env!("CARGO_BIN_EXE_swarm-names").into())
        })
        .unwrap();
        let addr = Ipv4Addr::new(192, 0, 2, host as u8);
        dataplane
            .set_underlay(IpAddr::V4(addr), 4789)
            .await
            .unwrap();
        Arc::new(dataplane)
    }

    async fn set_network(&self, view: &NetworkView) {
        for host in &self.hosts {
            host.set_network(view.clone()).await.unwrap();
        }
    }

    async fn end(self) {
        for host in &self.hosts {
            host.teardown().await.unwrap();
            host.close().await;
        }
        for n in 1..=self.hosts.len() {
            let left = std::fs::read_dir(self.run_dir(n).join("netns"))
                .unwrap()
                .count();
            assert_eq!(left, 0, "namespaces left on host {n}");
            let (_, links) = command(&self.netns(n), "ip -o link");
            let links: Vec<_> = links
                .lines()
                .filter(|line| line.starts_with(|c: char| c.is_ascii_digit()))
                .collect();
            assert_eq!(links.len(), 2, "links left: {links:?}");
            let (_, rules) = command(&self.netns(n), "nft list ruleset");
            assert_eq!(rules.trim(), "", "rules left");
        }
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        // After a failed test, too: mounts and helpers must not stay.
        let dir = self.dir.path().display();
        let _ = Command::new("sh")
            .args([
                "-c",
                &format!(
                    "for m in $(grep -o '{dir}[^ ]*' /proc/mounts); do umount -l $m; done;
                     for p in $(grep -al -- '{dir}' /proc/[0-9]*/cmdline | cut -d/ -f3); do
                       [ \"$(cat /proc/$p/comm)\" = swarm-names ] && kill -9 $p; done;
                     for n in $(ip netns list | grep -o '^{}[sh][0-9]*'); do ip netns del $n; done",
                    self.name
                ),
            ])
            .output();
    }
}

fn network(id: &str, subnet: &str, vni: u32, internal: bool) -> NetworkView {
    NetworkView {
        network: Network {
            id: id.repeat(25),
            spec: Some(NetworkSpec {
                annotations: Some(Annotations {
                    name: format!("net{id}"),
                    ..Default::default()
                }),
                driver: "overlay".into(),
                internal,
                ..Default::default()
            }),
            subnets: vec![SubnetState {
                pool: Some(IpamPool {
                    subnet: subnet.into(),
                    ..Default::default()
                }),
                vni,
            }],
            ..Default::default()
        },
        ..Default::default()
    }
}

fn task_id(n: u8) -> TaskId {
    format!("{n:02}{}", "t".repeat(23)).into()
}

/// Task n of service "web" with address 10.77.0.n on that host.
fn add_task(view: &mut NetworkView, n: u8, host: u8) {
    let task = task_id(n);
    let vni = view.network.subnets[0].vni;
    let prefix = &view.network.subnets[0].pool.as_ref().unwrap().subnet;
    let base: Ipv4Addr = prefix.split('/').next().unwrap().parse().unwrap();
    let [a, b, c, _] = base.octets();
    view.endpoints.insert(
        task.clone(),
        Arc::new(EndpointEntry {
            network_id: view.network.id.clone(),
            task_id: task.to_string(),
            service_id: "web".into(),
            slot: u64::from(n),
            addr: format!("{a}.{b}.{c}.{n}/24"),
            vtep: format!("192.0.2.{host}"),
            vni,
            ready: true,
            ..Default::default()
        }),
    );
    view.services.insert(
        ServiceId::from("web"),
        Arc::new(ServiceEntry {
            network_id: view.network.id.clone(),
            service_id: "web".into(),
            name: "web".into(),
            vip: format!("{a}.{b}.{c}.200"),
            aliases: vec!["www".into()],
        }),
    );
}

fn spec(views: &[&NetworkView], n: u8) -> SandboxSpec {
    SandboxSpec {
        task_id: task_id(n),
        name: format!("web.{n}.{}", task_id(n)),
        attachments: views
            .iter()
            .map(|view| SandboxAttachment {
                network_id: NetworkId::from(&view.network.id),
                addr: view.endpoints[&task_id(n)].addr.clone(),
            })
            .collect(),
        host_ports: vec![],
        nameservers: vec![],
    }
}

/// Serves `text` to everyone who connects, until the process ends.
fn serve(netns: &Path, port: u16, text: &'static str) {
    let listener = within(netns, || TcpListener::bind(("0.0.0.0", port)).unwrap());
    std::thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            let mut stream = stream;
            let _ = stream.write_all(text.as_bytes());
        }
    });
}

fn fetch(netns: &Path, addr: &str) -> std::io::Result<String> {
    let addr: SocketAddr = addr.parse().unwrap();
    within(netns, || {
        let mut stream = TcpStream::connect_timeout(&addr, Duration::from_secs(3))?;
        let mut text = String::new();
        stream.read_to_string(&mut text)?;
        Ok(text)
    })
}

async fn two_hosts() -> (Lab, NetworkView, Sandbox, Sandbox) {
    let lab = Lab::new(2).await;
    let mut view = network("a", "10.77.0.0/24", 5000, false);
    add_task(&mut view, 11, 1);
    add_task(&mut view, 12, 2);
    lab.set_network(&view).await;
    let one = lab.hosts[0]
        .ensure_sandbox(&spec(&[&view], 11))
        .await
        .unwrap();
    let two = lab.hosts[1]
        .ensure_sandbox(&spec(&[&view], 12))
        .await
        .unwrap();
    (lab, view, one, two)
}

#[tokio::test(flavor = "multi_thread")]
async fn containers_on_two_hosts_reach_each_other() {
    let (lab, _, one, two) = two_hosts().await;
    let (reached, text) = command(&one.netns, "ping -c3 -i0.05 -W2 -M do -s 1400 10.77.0.12");
    assert!(reached, "{text}");
    let (_, links) = command(&two.netns, "ip -o addr; ip -o link; ip route");
    for fact in [
        "eth0    inet 10.77.0.12/24",
        "mtu 1450",
        "02:42:0a:4d:00:0c",
        "eth1    inet 172.18.0.2/16",
        "default via 172.18.0.1 dev eth1",
    ] {
        assert!(links.contains(fact), "{fact:?} is not in {links}");
    }
    lab.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_virtual_address_spreads_evenly_over_all_replicas() {
    let (lab, mut view, one, two) = two_hosts().await;
    add_task(&mut view, 13, 2);
    lab.set_network(&view).await;
    let three = lab.hosts[1]
        .ensure_sandbox(&spec(&[&view], 13))
        .await
        .unwrap();
    serve(&one.netns, 80, "one");
    serve(&two.netns, 80, "two");
    serve(&three.netns, 80, "three");
    let mut counts = std::collections::BTreeMap::new();
    for _ in 0..60 {
        *counts
            .entry(fetch(&one.netns, "10.77.0.200:80").unwrap())
            .or_insert(0) += 1;
    }
    assert_eq!(
        counts.into_iter().collect::<Vec<_>>(),
        [("one".into(), 20), ("three".into(), 20), ("two".into(), 20)]
    );
    let (reached, text) = command(&one.netns, "ping -c3 -i0.05 -W2 10.77.0.200");
    assert!(reached, "{text}");
    lab.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_connection_keeps_its_backend_when_the_backends_change() {
    let (lab, mut view, one, two) = two_hosts().await;
    // Echoes on the second host only.
    let echo = within(&two.netns, || TcpListener::bind("0.0.0.0:80").unwrap());
    std::thread::spawn(move || {
        let (mut stream, _) = echo.accept().unwrap();
        let mut byte = [0];
        while stream.read_exact(&mut byte).is_ok() {
            stream.write_all(&byte).unwrap();
        }
    });
    edit(&mut view, 11, |endpoint| endpoint.ready = false);
    lab.set_network(&view).await;
    let mut stream = within(&one.netns, || {
        TcpStream::connect_timeout(&"10.77.0.200:80".parse().unwrap(), Duration::from_secs(3))
            .unwrap()
    });
    let mut works = || {
        let mut byte = [7];
        stream.write_all(&byte).is_ok() && stream.read_exact(&mut byte).is_ok()
    };
    assert!(works());
    serve(&one.netns, 80, "one");
    edit(&mut view, 11, |endpoint| endpoint.ready = true);
    edit(&mut view, 12, |endpoint| endpoint.draining = true);
    lab.set_network(&view).await;
    for _ in 0..5 {
        assert_eq!(fetch(&one.netns, "10.77.0.200:80").unwrap(), "one");
        assert!(works());
    }
    lab.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_service_without_a_backend_refuses_at_once() {
    let (lab, mut view, one, _) = two_hosts().await;
    for n in [11, 12] {
        edit(&mut view, n, |endpoint| endpoint.ready = false);
    }
    lab.set_network(&view).await;
    let begin = Instant::now();
    let error = fetch(&one.netns, "10.77.0.200:80").unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::ConnectionRefused);
    let refused = begin.elapsed();
    let (reached, _) = command(&one.netns, "ping -c1 -W3 10.77.0.200");
    assert!(!reached);
    // (ping itself waits a second for more answers.)
    assert!(refused < Duration::from_millis(500), "{refused:?}");
    edit(&mut view, 11, |endpoint| endpoint.ready = true);
    lab.set_network(&view).await;
    serve(&one.netns, 80, "back");
    assert_eq!(fetch(&one.netns, "10.77.0.200:80").unwrap(), "back");
    lab.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn datagrams_leave_a_withdrawn_backend_at_once() {
    let (lab, mut view, one, two) = two_hosts().await;
    let client = within(&one.netns, || UdpSocket::bind("0.0.0.0:0").unwrap());
    let timeout = Some(Duration::from_secs(3));
    client.set_read_timeout(timeout).unwrap();
    client.connect("10.77.0.200:9").unwrap();
    for (netns, text) in [(&one.netns, "one"), (&two.netns, "two")] {
        let socket = within(netns, || UdpSocket::bind("0.0.0.0:9").unwrap());
        std::thread::spawn(move || {
            let mut buffer = [0; 10];
            while let Ok((_, from)) = socket.recv_from(&mut buffer) {
                let _ = socket.send_to(text.as_bytes(), from);
            }
        });
    }
    let ask = || {
        let mut buffer = [0; 10];
        client.send(b"?").unwrap();
        let length = client.recv(&mut buffer).unwrap();
        String::from_utf8(buffer[..length].to_vec()).unwrap()
    };
    let first = ask();
    assert_eq!(ask(), first);
    let withdrawn = if first == "one" { 11 } else { 12 };
    edit(&mut view, withdrawn, |endpoint| endpoint.draining = true);
    lab.set_network(&view).await;
    assert_ne!(ask(), first);
    lab.end().await;
}

fn edit(view: &mut NetworkView, n: u8, change: impl FnOnce(&mut EndpointEntry)) {
    let entry = view.endpoints.get_mut(&task_id(n)).unwrap();
    change(Arc::make_mut(entry));
}

/// Addresses and response code for a name, asked as a container asks.
fn resolve(netns: &Path, name: &str) -> Option<(Vec<IpAddr>, String)> {
    use hickory_proto::op::{Message, Query};
    use hickory_proto::rr::{Name, RecordType};
    let socket = within(netns, || UdpSocket::bind("0.0.0.0:0").unwrap());
    socket
        .set_read_timeout(Some(Duration::from_secs(3)))
        .unwrap();
    let mut query = Message::query();
    query.metadata.recursion_desired = true;
    query.add_query(Query::query(Name::from_ascii(name).unwrap(), RecordType::A));
    socket
        .send_to(&query.to_vec().unwrap(), "127.0.0.11:53")
        .ok()?;
    let mut buffer = [0; 4096];
    let length = socket.recv(&mut buffer).ok()?;
    let answer = Message::from_vec(&buffer[..length]).unwrap();
    let mut addrs: Vec<IpAddr> = answer
        .answers
        .iter()
        .filter_map(|record| record.data.ip_addr())
        .collect();
    addrs.sort();
    Some((addrs, format!("{:?}", answer.metadata.response_code)))
}

fn addrs(texts: &[&str]) -> Vec<IpAddr> {
    texts.iter().map(|text| text.parse().unwrap()).collect()
}

/// Waits for the helper of a run directory and returns its number.
fn helper(run_dir: &Path) -> Option<i32> {
    let dir = run_dir.to_str().unwrap();
    std::fs::read_dir("/proc")
        .unwrap()
        .flatten()
        .find_map(|entry| {
            let pid: i32 = entry.file_name().to_str()?.parse().ok()?;
            let line = std::fs::read(entry.path().join("cmdline")).ok()?;
            let line = String::from_utf8_lossy(&line).into_owned();
            let mut words = line.split('\0');
            (words.next()?.ends_with("swarm-names") && words.any(|word| word == dir)).then_some(pid)
        })
}

#[tokio::test(flavor = "multi_thread")]
async fn names_are_answered_and_port_53_is_the_containers() {
    let (lab, view, one, _) = two_hosts().await;
    // The container's own server.
    let _own = within(&one.netns, || {
        (
            UdpSocket::bind("0.0.0.0:53").unwrap(),
            TcpListener::bind("0.0.0.0:53").unwrap(),
        )
    });
    for (name, expected) in [
        ("web", vec!["10.77.0.200"]),
        ("web.neta", vec!["10.77.0.200"]),
        ("www", vec!["10.77.0.200"]),
        ("tasks.web", vec!["10.77.0.11", "10.77.0.12"]),
        ("11ttttttttttt"[..12].as_ref(), vec!["10.77.0.11"]),
    ] {
        let (found, _) = resolve(&one.netns, name).unwrap();
        assert_eq!(found, addrs(&expected), "{name}");
    }
    // A change is there when `set_network` returns.
    let mut view = view;
    add_task(&mut view, 13, 2);
    lab.set_network(&view).await;
    let (found, _) = resolve(&one.netns, "tasks.web").unwrap();
    assert_eq!(found, addrs(&["10.77.0.11", "10.77.0.12", "10.77.0.13"]));
    lab.end().await;
}

/// Answers every question with 198.51.100.7, at port 53 of the switch.
fn outside_server(lab: &Lab) {
    use hickory_proto::op::Message;
    use hickory_proto::rr::rdata::A;
    use hickory_proto::rr::{RData, Record};
    let socket = within(&lab.switch(), || UdpSocket::bind("192.0.2.254:53").unwrap());
    std::thread::spawn(move || {
        let mut buffer = [0; 4096];
        while let Ok((length, from)) = socket.recv_from(&mut buffer) {
            let query = Message::from_vec(&buffer[..length]).unwrap();
            let name = query.queries[0].name().clone();
            let mut answer = query.into_response();
            answer.add_answer(Record::from_rdata(
                name,
                60,
                RData::A(A(Ipv4Addr::new(198, 51, 100, 7))),
            ));
            socket.send_to(&answer.to_vec().unwrap(), from).unwrap();
        }
    });
}

#[tokio::test(flavor = "multi_thread")]
async fn other_names_are_asked_outside_except_from_internal_networks() {
    let lab = Lab::new(1).await;
    outside_server(&lab);
    let mut open = network("a", "10.77.0.0/24", 5000, false);
    let mut closed = network("b", "10.78.0.0/24", 5001, true);
    add_task(&mut open, 11, 1);
    add_task(&mut closed, 12, 1);
    lab.set_network(&open).await;
    lab.set_network(&closed).await;
    let one = lab.hosts[0]
        .ensure_sandbox(&spec(&[&open], 11))
        .await
        .unwrap();
    let two = lab.hosts[0]
        .ensure_sandbox(&spec(&[&closed], 12))
        .await
        .unwrap();
    let (found, code) = resolve(&one.netns, "example.com").unwrap();
    assert_eq!(
        (found, code.as_str()),
        (addrs(&["198.51.100.7"]), "NoError")
    );
    let begin = Instant::now();
    let (found, code) = resolve(&two.netns, "example.com").unwrap();
    assert_eq!((found, code.as_str()), (vec![], "NXDomain"));
    assert!(begin.elapsed() < Duration::from_secs(1));
    lab.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn internal_networks_have_no_way_out_and_others_are_masqueraded() {
    let lab = Lab::new(1).await;
    let mut open = network("a", "10.77.0.0/24", 5000, false);
    let mut closed = network("b", "10.78.0.0/24", 5001, true);
    add_task(&mut open, 11, 1);
    add_task(&mut closed, 11, 1);
    add_task(&mut closed, 12, 1);
    lab.set_network(&open).await;
    lab.set_network(&closed).await;
    let both = lab.hosts[0]
        .ensure_sandbox(&spec(&[&closed, &open], 11))
        .await
        .unwrap();
    let shut = lab.hosts[0]
        .ensure_sandbox(&spec(&[&closed], 12))
        .await
        .unwrap();
    assert_eq!(shut.gateway_addr, None);
    let (_, links) = command(&shut.netns, "ip -o link; ip route");
    assert!(
        !links.contains("eth1") && !links.contains("default via"),
        "{links}"
    );
    assert!(fetch(&shut.netns, "192.0.2.254:7000").is_err());
    // Its peer on both networks has the gateway's link last.
    let (_, links) = command(&both.netns, "ip -o addr");
    for fact in [
        "eth0    inet 10.78.0.11",
        "eth1    inet 10.77.0.11",
        "eth2    inet 172.18.0.",
    ] {
        assert!(links.contains(fact), "{fact:?} is not in {links}");
    }
    let outside = within(&lab.switch(), || {
        TcpListener::bind("192.0.2.254:7000").unwrap()
    });
    let caller = std::thread::spawn(move || {
        let (mut stream, from) = outside.accept().unwrap();
        stream.write_all(b"out").unwrap();
        from.ip()
    });
    assert_eq!(fetch(&both.netns, "192.0.2.254:7000").unwrap(), "out");
    assert_eq!(caller.join().unwrap(), addrs(&["192.0.2.1"])[0]);
    lab.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_name_server_is_replaced_and_answers_again() {
    let (lab, _, one, _) = two_hosts().await;
    let first = helper(&lab.run_dir(1)).unwrap();
    nix::sys::signal::kill(
        nix::unistd::Pid::from_raw(first),
        nix::sys::signal::Signal::SIGKILL,
    )
    .unwrap();
    let begin = Instant::now();
    let found = loop {
        match resolve(&one.netns, "web") {
            Some((found, _)) => break found,
            None => assert!(begin.elapsed() < Duration::from_secs(5), "nobody answers"),
        }
    };
    assert_eq!(found, addrs(&["10.77.0.200"]));
    assert_ne!(helper(&lab.run_dir(1)), Some(first));
    lab.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_restart_of_the_agent_interrupts_neither_packets_nor_names() {
    let (mut lab, mut view, one, two) = two_hosts().await;
    serve(&two.netns, 80, "two");
    edit(&mut view, 11, |endpoint| endpoint.ready = false);
    lab.set_network(&view).await;
    let netns = one.netns.clone();
    let stop = Arc::new(std::sync::atomic::AtomicBool::new(false));
    let stopped = Arc::clone(&stop);
    // Connections by the virtual address, questions, and an even stream of pings, all without a single failure.
    let traffic = std::thread::spawn(move || {
        let mut done = 0;
        while !stopped.load(Ordering::Relaxed) {
            assert_eq!(fetch(&netns, "10.77.0.200:80").unwrap(), "two");
            let (found, _) = resolve(&netns, "web").expect("an answer");
            assert_eq!(found, addrs(&["10.77.0.200"]));
            done += 1;
        }
        done
    });
    let netns = one.netns.clone();
    let pings =
        std::thread::spawn(move || command(&netns, "ping -q -i 0.002 -c 500 -W1 10.77.0.12").1);
    let before = helper(&lab.run_dir(1));
    for _ in 0..3 {
        for host in [1, 2] {
            let old = lab.hosts.remove(host - 1);
            old.close().await;
            drop(old);
            let new = lab.start(host).await;
            let n = 10 + host as u8;
            let adopted = spec(&[&view], n);
            new.reconcile(vec![adopted.clone()]).await.unwrap();
            new.set_network(view.clone()).await.unwrap();
            let again = new.ensure_sandbox(&adopted).await.unwrap();
            let same = if host == 1 { &one } else { &two };
            assert_eq!(&again, same);
            lab.hosts.insert(host - 1, new);
        }
    }
    let pings = pings.join().unwrap();
    stop.store(true, Ordering::Relaxed);
    let done: usize = traffic.join().unwrap();
    assert!(done > 10, "{done}");
    assert!(pings.contains("500 received"), "{pings}");
    assert_eq!(helper(&lab.run_dir(1)), before);
    lab.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_restarted_agent_removes_what_belongs_to_nobody() {
    let (mut lab, view, one, _) = two_hosts().await;
    let old = lab.hosts.remove(0);
    old.close().await;
    drop(old);
    let new = lab.start(1).await;
    new.reconcile(vec![]).await.unwrap();
    assert!(!one.netns.exists());
    assert_eq!(new.held_networks().await.len(), 0);
    let (_, sockets) = command(&lab.netns(1), "ss -uan; ip -o link");
    assert!(
        !sockets.contains("4789") && !sockets.contains("swg"),
        "{sockets}"
    );
    new.set_network(view.clone()).await.unwrap();
    lab.hosts.insert(0, new);
    lab.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_last_sandbox_takes_its_network_with_it() {
    let (lab, view, _, two) = two_hosts().await;
    assert_eq!(lab.hosts[0].held_networks().await.len(), 1);
    lab.hosts[0].remove_sandbox(&task_id(11)).await.unwrap();
    lab.hosts[0].remove_sandbox(&task_id(11)).await.unwrap();
    assert_eq!(lab.hosts[0].held_networks().await.len(), 0);
    let left = std::fs::read_dir(lab.run_dir(1).join("netns"))
        .unwrap()
        .count();
    assert_eq!(left, 0);
    let (_, found) = command(&lab.netns(1), "ss -uan; ip -o link; bridge fdb");
    for trace in ["4789", "vx", "swg", "02:42:0a"] {
        assert!(!found.contains(trace), "{trace} is left: {found}");
    }
    // The other node's entries go with the table.
    let mut view = view;
    view.endpoints.remove(&task_id(11));
    lab.hosts[1].set_network(view).await.unwrap();
    let (reached, _) = command(&two.netns, "ping -c1 -W1 10.77.0.11");
    assert!(!reached);
    lab.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_sandbox_that_fails_leaves_nothing() {
    let lab = Lab::new(1).await;
    let mut view = network("a", "10.77.0.0/24", 5000, false);
    add_task(&mut view, 11, 1);
    lab.set_network(&view).await;
    let _taken = within(&lab.netns(1), || TcpListener::bind("0.0.0.0:8080").unwrap());
    let wanted = SandboxSpec {
        host_ports: vec![port(8080, 80)],
        ..spec(&[&view], 11)
    };
    let error = lab.hosts[0].ensure_sandbox(&wanted).await.unwrap_err();
    assert!(
        matches!(error, NetworkError::PortTaken { port: 8080 }),
        "{error}"
    );
    let left = std::fs::read_dir(lab.run_dir(1).join("netns"))
        .unwrap()
        .count();
    assert_eq!(left, 0);
    assert_eq!(lab.hosts[0].held_networks().await.len(), 0);
    let (_, links) = command(&lab.netns(1), "ip -o link");
    assert!(
        !links.contains("swg0") && !links.contains("swg1"),
        "{links}"
    );
    drop(_taken);
    lab.hosts[0].ensure_sandbox(&wanted).await.unwrap();
    lab.end().await;
}

fn port(published: u32, target: u32) -> PortConfig {
    PortConfig {
        target_port: target,
        published_port: published,
        publish_mode: PublishMode::Host.into(),
        ..Default::default()
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_host_port_leads_to_the_task_from_everywhere() {
    host_ports("0").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_host_port_leads_to_the_task_from_everywhere_with_br_netfilter() {
    host_ports("1").await;
}

async fn host_ports(bridged_packets_are_filtered: &str) {
    let mut lab = Lab::new(1).await;
    within(&lab.netns(1), || {
        let setting = Path::new("/proc/sys/net/bridge/bridge-nf-call-iptables");
        if setting.exists() {
            std::fs::write(setting, bridged_packets_are_filtered).unwrap();
        }
    });
    let mut view = network("a", "10.77.0.0/24", 5000, false);
    add_task(&mut view, 11, 1);
    add_task(&mut view, 12, 1);
    lab.set_network(&view).await;
    let wanted = SandboxSpec {
        host_ports: vec![port(8080, 80), port(0, 80)],
        ..spec(&[&view], 11)
    };
    let one = lab.hosts[0].ensure_sandbox(&wanted).await.unwrap();
    let two = lab.hosts[0]
        .ensure_sandbox(&spec(&[&view], 12))
        .await
        .unwrap();
    serve(&one.netns, 80, "one");
    let dynamic = one.host_ports[1].published_port;
    assert_ne!(dynamic, 0);
    let everywhere = || {
        for netns in [
            lab.switch(),
            lab.netns(1),
            one.netns.clone(),
            two.netns.clone(),
        ] {
            for port in [8080, dynamic] {
                let text = fetch(&netns, &format!("192.0.2.1:{port}"));
                assert_eq!(
                    text.ok().as_deref(),
                    Some("one"),
                    "from {}",
                    netns.display()
                );
            }
        }
        assert_eq!(fetch(&lab.netns(1), "127.0.0.1:8080").unwrap(), "one");
    };
    everywhere();
    // Containers do not see each other on the gateway bridge.
    let addr = one.gateway_addr.unwrap();
    assert!(fetch(&two.netns, &format!("{addr}:80")).is_err());
    let other = SandboxSpec {
        host_ports: vec![port(8080, 80)],
        ..spec(&[&view], 12)
    };
    lab.hosts[0].remove_sandbox(&task_id(12)).await.unwrap();
    let error = lab.hosts[0].ensure_sandbox(&other).await.unwrap_err();
    assert!(matches!(error, NetworkError::PortTaken { port: 8080 }));
    let two = lab.hosts[0]
        .ensure_sandbox(&spec(&[&view], 12))
        .await
        .unwrap();
    // The ports are found again.
    let old = lab.hosts.remove(0);
    old.close().await;
    drop(old);
    let new = lab.start(1).await;
    new.reconcile(vec![wanted.clone(), spec(&[&view], 12)])
        .await
        .unwrap();
    new.set_network(view.clone()).await.unwrap();
    assert_eq!(new.ensure_sandbox(&wanted).await.unwrap(), one);
    lab.hosts.push(new);
    assert_eq!(fetch(&lab.switch(), "192.0.2.1:8080").unwrap(), "one");
    assert_eq!(fetch(&two.netns, "192.0.2.1:8080").unwrap(), "one");
    assert_eq!(
        lab.hosts[0].gateway_subnet().as_deref(),
        Some("172.18.0.0/16")
    );
    lab.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_of_the_overlay_is_flooded_onto_the_underlay() {
    let (lab, _, one, two) = two_hosts().await;
    // Every frame on the switch.
    let capture = within(&lab.switch(), || {
        // SAFETY: plain system call; the result is checked.
        let fd = unsafe {
            libc::socket(
                libc::AF_PACKET,
                libc::SOCK_RAW | libc::SOCK_NONBLOCK,
                i32::from((libc::ETH_P_ALL as u16).to_be()),
            )
        };
        assert!(fd >= 0);
        // SAFETY: the descriptor has just been opened and belongs to nobody else.
        unsafe { <File as std::os::fd::FromRawFd>::from_raw_fd(fd) }
    });
    assert!(command(&one.netns, "ping -c3 -i0.05 -W2 10.77.0.12").0);
    assert!(command(&two.netns, "ping -c3 -i0.05 -W2 10.77.0.11").0);
    // Nobody has this address, and nobody is asked for it; broadcasts stay where they are.
    assert!(!command(&one.netns, "ping -c1 -W1 10.77.0.99").0);
    let _ = command(&one.netns, "ping -b -c1 -W1 10.77.0.255");
    let (mut carried, mut frame) = (0, [0; 2000]);
    while let Ok(length) = (&capture).read(&mut frame) {
        let frame = &frame[..length];
        if frame[12..14] == [8, 6] {
            assert!(
                frame[28..30] != [10, 77] && frame[38..40] != [10, 77],
                "ARP of the overlay"
            );
        }
        // UDP to 4789: Ethernet 14, IP 20, UDP 8, VXLAN 8, then the inner frame.
        if frame[12..14] == [8, 0] && frame[23] == 17 && frame[36..38] == 4789u16.to_be_bytes() {
            carried += 1;
            let inner = &frame[50..];
            assert_eq!(inner[0] & 1, 0, "a flooded frame");
            assert_eq!(inner[..3], [2, 0x42, 10], "a frame to somebody unknown");
            assert_eq!(inner[12..14], [8, 0], "only IP is carried");
        }
    }
    assert!(carried >= 12, "{carried}");
    lab.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn one_replica_more_costs_little() {
    let (lab, mut view, one, _) = two_hosts().await;
    let mut times = Vec::new();
    for n in 20..40 {
        add_task(&mut view, n, 2);
        let begin = Instant::now();
        lab.hosts[0].set_network(view.clone()).await.unwrap();
        times.push(begin.elapsed());
    }
    times.sort();
    println!("set_network with one replica more: median {:?}", times[10]);
    let (found, _) = resolve(&one.netns, "tasks.web").unwrap();
    assert_eq!(found.len(), 22);
    for n in 50..60 {
        add_task(&mut view, n, 1);
    }
    lab.hosts[0].set_network(view.clone()).await.unwrap();
    let (mut made, mut removed) = (Vec::new(), Vec::new());
    for n in 50..60 {
        let begin = Instant::now();
        let spec = spec(&[&view], n);
        lab.hosts[0].ensure_sandbox(&spec).await.unwrap();
        made.push(begin.elapsed());
    }
    for n in 50..60 {
        let begin = Instant::now();
        lab.hosts[0].remove_sandbox(&task_id(n)).await.unwrap();
        removed.push(begin.elapsed());
    }
    made.sort();
    removed.sort();
    println!(
        "sandbox made: median {:?}, removed: {:?}",
        made[5], removed[5]
    );
    for n in 50..60 {
        let spec = spec(&[&view], n);
        lab.hosts[0].ensure_sandbox(&spec).await.unwrap();
    }
    let begin = Instant::now();
    let removals = (50..60).map(|n| {
        let host = Arc::clone(&lab.hosts[0]);
        tokio::spawn(async move { host.remove_sandbox(&task_id(n)).await })
    });
    for removal in removals.collect::<Vec<_>>() {
        removal.await.unwrap().unwrap();
    }
    println!("ten removed side by side: {:?}", begin.elapsed());
    let status = format!("/proc/{}/smaps_rollup", helper(&lab.run_dir(1)).unwrap());
    println!("{}", std::fs::read_to_string(status).unwrap());
    lab.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn names_come_back_when_agent_and_name_server_died_together() {
    let (mut lab, view, one, _) = two_hosts().await;
    let old = lab.hosts.remove(0);
    old.close().await;
    drop(old);
    let pid = nix::unistd::Pid::from_raw(helper(&lab.run_dir(1)).unwrap());
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL).unwrap();
    let new = lab.start(1).await;
    new.reconcile(vec![spec(&[&view], 11)]).await.unwrap();
    // Without the tables nobody is told that there is no such name.
    let (_, code) = resolve(&one.netns, "web").unwrap();
    assert_eq!(code, "ServFail");
    new.set_network(view.clone()).await.unwrap();
    let (found, _) = resolve(&one.netns, "web").unwrap();
    assert_eq!(found, addrs(&["10.77.0.200"]));
    lab.hosts.insert(0, new);
    lab.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_name_server_that_talks_otherwise_is_replaced() {
    let lab = Lab::new(1).await;
    // Answers the greeting with nonsense: an empty frame.
    let path = lab.run_dir(1).join("names.sock");
    let stranger = std::process::Command::new("python3")
        .args([
            "-c",
            "import socket,sys\n\
             s=socket.socket(socket.AF_UNIX); s.bind(sys.argv[1]); s.listen()\n\
             print('ready', flush=True)\n\
             while True:\n c,_=s.accept(); c.recv(100); c.send(bytes(4))",
        ])
        .arg(&path)
        .stdout(std::process::Stdio::piped())
        .spawn();
    let mut stranger = stranger.unwrap();
    let mut ready = [0; 5];
    stranger
        .stdout
        .as_mut()
        .unwrap()
        .read_exact(&mut ready)
        .unwrap();
    let mut view = network("a", "10.77.0.0/24", 5000, false);
    add_task(&mut view, 11, 1);
    lab.set_network(&view).await;
    let one = lab.hosts[0]
        .ensure_sandbox(&spec(&[&view], 11))
        .await
        .unwrap();
    let (found, _) = resolve(&one.netns, "web").unwrap();
    assert_eq!(found, addrs(&["10.77.0.200"]));
    stranger.wait().unwrap();
    lab.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_network_of_several_subnets_and_its_own_packet_size_is_one() {
    let lab = Lab::new(2).await;
    let mut view = network("a", "10.77.0.0/24", 5000, false);
    let mut other = network("a", "10.79.0.0/24", 5001, false);
    add_task(&mut view, 11, 1);
    add_task(&mut view, 12, 2);
    add_task(&mut other, 13, 2);
    view.network.subnets.extend(other.network.subnets);
    view.endpoints.extend(other.endpoints);
    view.network.mtu = 1300;
    lab.set_network(&view).await;
    let one = lab.hosts[0]
        .ensure_sandbox(&spec(&[&view], 11))
        .await
        .unwrap();
    lab.hosts[1]
        .ensure_sandbox(&spec(&[&view], 12))
        .await
        .unwrap();
    lab.hosts[1]
        .ensure_sandbox(&spec(&[&view], 13))
        .await
        .unwrap();
    for addr in ["10.77.0.12", "10.79.0.13"] {
        let (reached, text) = command(
            &one.netns,
            &format!("ping -c2 -i0.05 -W2 -M do -s 1272 {addr}"),
        );
        assert!(reached, "{text}");
        assert!(!command(&one.netns, &format!("ping -c1 -W1 -M do -s 1273 {addr}")).0);
    }
    lab.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_address_that_moves_to_another_node_is_followed() {
    let (lab, mut view, one, _) = two_hosts().await;
    add_task(&mut view, 13, 2);
    lab.set_network(&view).await;
    lab.hosts[1]
        .ensure_sandbox(&spec(&[&view], 13))
        .await
        .unwrap();
    assert!(command(&one.netns, "ping -c1 -W2 10.77.0.13").0);
    lab.hosts[1].remove_sandbox(&task_id(13)).await.unwrap();
    add_task(&mut view, 13, 1);
    lab.set_network(&view).await;
    lab.hosts[0]
        .ensure_sandbox(&spec(&[&view], 13))
        .await
        .unwrap();
    let (reached, text) = command(&one.netns, "ping -c2 -i0.2 -W2 10.77.0.13");
    assert!(reached, "{text}");
    lab.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn many_tasks_answer_over_tcp_and_are_cut_over_udp() {
    use hickory_proto::op::{Message, Query};
    use hickory_proto::rr::{Name, RecordType};
    let (lab, mut view, one, _) = two_hosts().await;
    for n in 13..99 {
        add_task(&mut view, n, 2);
    }
    lab.set_network(&view).await;
    let (found, _) = resolve(&one.netns, "tasks.web").unwrap();
    assert!((20..60).contains(&found.len()), "{}", found.len());
    let mut query = Message::query();
    let name = Name::from_ascii("tasks.web").unwrap();
    query.add_query(Query::query(name, RecordType::A));
    let query = query.to_vec().unwrap();
    let answer = within(&one.netns, || {
        let mut stream = TcpStream::connect("127.0.0.11:53").unwrap();
        let mut length = [0; 2];
        stream
            .write_all(&[&(query.len() as u16).to_be_bytes()[..], &query].concat())
            .unwrap();
        stream.read_exact(&mut length).unwrap();
        let mut answer = vec![0; usize::from(u16::from_be_bytes(length))];
        stream.read_exact(&mut answer).unwrap();
        answer
    });
    assert_eq!(Message::from_vec(&answer).unwrap().answers.len(), 88);
    lab.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn tables_and_specs_that_make_no_sense_change_nothing() {
    let lab = Lab::new(1).await;
    let host = &lab.hosts[0];
    let mut view = network("a", "10.77.0.0/24", 5000, false);
    add_task(&mut view, 11, 1);
    for (subnet, vni) in [("nonsense", 5000), ("fd00::/64", 5000), ("10.77.0.0/24", 0)] {
        let bad = network("b", subnet, vni, false);
        assert!(host.set_network(bad).await.is_err(), "{subnet} {vni}");
    }
    let unknown = spec(&[&view], 11);
    assert!(host.ensure_sandbox(&unknown).await.is_err());
    host.set_network(view.clone()).await.unwrap();
    for (id, addr) in [
        ("../../etc", "10.77.0.11/24"),
        ("x", "10.77.0.11"),
        ("", "10.77.0.11/24"),
    ] {
        let mut bad = spec(&[&view], 11);
        bad.task_id = id.into();
        bad.attachments[0].addr = addr.into();
        assert!(host.ensure_sandbox(&bad).await.is_err(), "{id} {addr}");
    }
    assert_eq!(host.held_networks().await.len(), 0);
    assert!(
        host.set_underlay("192.0.2.77".parse().unwrap(), 4789)
            .await
            .is_err()
    );
    lab.end().await;
}
