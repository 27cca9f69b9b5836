//! Three real managers: processes of their own, disks of their own, addresses of their own.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use hyper_util::rt::TokioIo;
use swarm_proto::v1::control_client::ControlClient;
use swarm_proto::v1::node_local_client::NodeLocalClient;
use swarm_proto::v1::{
    GetJoinTokensRequest, InfoRequest, InitRequest, JoinClusterRequest, JoinTokens,
    ListNodesRequest, NodeAvailability,
};
use tokio::net::UnixStream;
use tonic::transport::{Channel, Endpoint};

/// How many.
pub const MANAGERS: usize = 3;
/// No step of forming a cluster takes longer.
const PATIENCE: Duration = Duration::from_secs(120);

/// Network and mount namespaces of this process and its children alone, with the managers' addresses.
/// Call it before any thread is started.
pub fn own_network() -> Result<()> {
    use nix::mount::{MsFlags, mount};
    use nix::sched::CloneFlags;
    use nix::sys::resource::{Resource, getrlimit, setrlimit};
    nix::sched::unshare(CloneFlags::CLONE_NEWNET | CloneFlags::CLONE_NEWNS)
        .context("making a network namespace: this needs root")?;
    // What the managers mount goes with them.
    let none = None::<&str>;
    mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none)?;
    let mut script =
        "ip link set lo up && ip link add mgr type bridge && ip link set mgr up".to_owned();
    for number in 1..=MANAGERS {
        script += &format!(" && ip addr add {}/24 dev mgr", host(number));
    }
    // Each agent has a connection, at either end a file and a port.
    script += " && sysctl -qw net.ipv4.ip_local_port_range='1024 65000'";
    let made = Command::new("sh").args(["-c", &script]).status()?;
    ensure!(made.success(), "{script}: {made}");
    let files = Resource::RLIMIT_NOFILE;
    let (_, most) = getrlimit(files)?;
    setrlimit(files, most, most).context("raising the limit of open files")
}

fn host(number: usize) -> String {
    format!("192.0.2.{number}")
}

/// The address of a manager's API.
pub fn addr(number: usize) -> String {
    format!("{}:2377", host(number))
}

/// The cluster.
pub struct Managers {
    dir: PathBuf,
    bin: PathBuf,
    running: Vec<Option<Child>>,
}

impl Managers {
    /// Forms a cluster of three. They take no tasks themselves.
    pub async fn form(dir: &Path, bin: &Path) -> Result<Self> {
        let mut managers = Self {
            dir: dir.to_owned(),
            bin: bin.to_owned(),
            running: (0..MANAGERS).map(|_| None).collect(),
        };
        for number in 1..=MANAGERS {
            managers.start(number)?;
        }
        let mut first = managers.local(1).await?;
        first
            .init(InitRequest {
                advertise_addr: host(1),
                listen_addr: addr(1),
                availability: NodeAvailability::Drain.into(),
                // Room for an address on every node.
                default_addr_pool_mask_length: 16,
                ..InitRequest::default()
            })
            .await?;
        let tokens = managers.tokens().await?;
        for number in 2..=MANAGERS {
            let mut other = managers.local(number).await?;
            other
                .join(JoinClusterRequest {
                    token: tokens.manager.clone(),
                    remotes: vec![addr(1)],
                    advertise_addr: host(number),
                    listen_addr: addr(number),
                    availability: NodeAvailability::Drain.into(),
                    ..JoinClusterRequest::default()
                })
                .await?;
        }
        for number in 1..=MANAGERS {
            managers.serving(number).await?;
        }
        Ok(managers)
    }

    pub async fn tokens(&self) -> Result<JoinTokens> {
        let mut control = self.control(1);
        Ok(control
            .get_join_tokens(GetJoinTokensRequest {})
            .await?
            .into_inner())
    }

    fn dir_of(&self, number: usize) -> PathBuf {
        self.dir.join(format!("m{number}"))
    }

    fn socket(&self, number: usize) -> PathBuf {
        self.dir_of(number).join("run/swarm.sock")
    }

    /// Starts a manager's process.
    pub fn start(&mut self, number: usize) -> Result<()> {
        let dir = self.dir_of(number);
        fs::create_dir_all(&dir)?;
        let log = fs::OpenOptions::new()
            .create(true)
            .append(true)
            .open(dir.join("log"))?;
        let level = std::env::var("SWARM_LAB_LOG").unwrap_or_else(|_| "warn".into());
        let child = Command::new(self.bin.join("swarmd"))
            .arg("--data-dir")
            .arg(dir.join("data"))
            .arg("--run-dir")
            .arg(dir.join("run"))
            .arg("--config")
            .arg(dir.join("none.toml"))
            .env("RUST_LOG", level)
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()
            .context("starting swarmd")?;
        self.running[number - 1] = Some(child);
        Ok(())
    }

    /// Kills a manager's process.
    pub fn kill(&mut self, number: usize) -> Result<()> {
        if let Some(mut child) = self.running[number - 1].take() {
            child.kill()?;
            child.wait()?;
        }
        Ok(())
    }

    pub fn pids(&self) -> Vec<u32> {
        self.running.iter().flatten().map(Child::id).collect()
    }

    fn channel(&self, number: usize) -> Channel {
        let path = self.socket(number);
        let connector = tower::service_fn(move |_: tonic::codegen::http::Uri| {
            let path = path.clone();
            async move { UnixStream::connect(path).await.map(TokioIo::new) }
        });
        Endpoint::from_static("http://swarmd").connect_with_connector_lazy(connector)
    }

    /// The Control API of a manager, over its socket.
    pub fn control(&self, number: usize) -> ControlClient<Channel> {
        ControlClient::new(self.channel(number)).max_decoding_message_size(64 << 20)
    }

    async fn local(&mut self, number: usize) -> Result<NodeLocalClient<Channel>> {
        let begin = Instant::now();
        loop {
            let mut client = NodeLocalClient::new(self.channel(number));
            match client.info(InfoRequest {}).await {
                Ok(_) => return Ok(client),
                Err(error) if begin.elapsed() > PATIENCE => {
                    bail!("manager {number} does not answer: {error}")
                }
                Err(_) => self.still_runs(number).await?,
            }
        }
    }

    /// Returns once a manager answers a linearizable read.
    pub async fn serving(&mut self, number: usize) -> Result<()> {
        let begin = Instant::now();
        loop {
            // None has the name: the answer is short, but true of the newest state.
            let filters = swarm_proto::v1::Filters {
                names: vec!["nobody".to_owned()],
                ..Default::default()
            };
            let request = ListNodesRequest {
                filters: Some(filters),
                ..ListNodesRequest::default()
            };
            match self.control(number).list_nodes(request).await {
                Ok(_) => return Ok(()),
                Err(error) if begin.elapsed() > PATIENCE => {
                    bail!("manager {number} does not serve: {error}")
                }
                Err(_) => self.still_runs(number).await?,
            }
        }
    }

    async fn still_runs(&mut self, number: usize) -> Result<()> {
        let child = self.running[number - 1].as_mut().context("not started")?;
        if let Some(status) = child.try_wait()? {
            let log = fs::read_to_string(self.dir_of(number).join("log")).unwrap_or_default();
            let lines: Vec<&str> = log.lines().rev().take(10).collect();
            bail!("manager {number} has ended: {status}\n{}", lines.join("\n"));
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
        Ok(())
    }
}

impl Drop for Managers {
    fn drop(&mut self) {
        for child in self.running.iter_mut().flatten() {
            // It may have ended by itself.
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}
