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
            assert_eq!(links.lines().count(), 2, "links left: {links}");
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
