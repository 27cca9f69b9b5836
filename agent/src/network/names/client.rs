//! The agent's side of the name server: starts it, feeds it, notices its end and starts another.
//!
//! One loop owns the connection. What the server should know is kept here, so that any connection, old or new, can
//! be brought up to date. The server's death closes the connection, which wakes the loop at once.

use std::collections::BTreeMap;
use std::io;
use std::net::Ipv4Addr;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::Path;
use std::process::Stdio;
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use swarm_proto::{NetworkId, TaskId};
use tokio::net::UnixStream;
use tokio::process::Command;
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinHandle;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

use super::super::config::DataplaneConfig;
use super::super::overlay::{endpoint_addr, short};
use super::super::sandbox::Plan;
use super::super::{NetworkError, NetworkView};
use super::wire::{
    self, NetworkNames, Reply, Request, SandboxNames, ServiceNames, TaskNames, VERSION,
};

/// Callers wait for their own request: more in the queue would only wait as well.
const QUEUE: usize = 64;
/// For one answer of the server.
const PATIENCE: Duration = Duration::from_secs(5);
const BACKOFF_MIN: Duration = Duration::from_millis(20);
const BACKOFF_MAX: Duration = Duration::from_secs(2);

/// What one request is about; its contents are read when it is sent, so that the newest wins.
#[derive(Clone, Debug)]
enum About {
    Everything,
    Sandbox(String),
    Network(String),
    End,
}

struct Job {
    about: About,
    done: oneshot::Sender<Result<(), String>>,
}

#[derive(Debug, Default)]
struct Desired {
    sandboxes: BTreeMap<String, Option<SandboxNames>>,
    /// `None`: adopted, keep what the server has.
    networks: BTreeMap<String, Option<NetworkNames>>,
}

/// Feeds the name server.
#[derive(Debug)]
pub struct Names {
    desired: Arc<Mutex<Desired>>,
    queue: mpsc::Sender<Job>,
    cancel: CancellationToken,
    feeder: Mutex<Option<JoinHandle<()>>>,
}

impl Names {
    /// Starts the loop; the server itself is started with the first sandbox.
    pub fn new(config: &DataplaneConfig) -> Self {
        let (queue, jobs) = mpsc::channel(QUEUE);
        let desired = Arc::new(Mutex::new(Desired::default()));
        let cancel = CancellationToken::new();
        let feeder = Feeder {
            config: config.clone(),
            desired: Arc::clone(&desired),
            jobs,
            cancel: cancel.clone(),
        };
        Self {
            desired,
            queue,
            cancel,
            feeder: Mutex::new(Some(tokio::spawn(feeder.run()))),
        }
    }

    async fn tell(&self, about: About) -> Result<(), NetworkError> {
        let failed = |reason: String| NetworkError::Kernel {
            step: "feed the name server".to_owned(),
            reason,
        };
        let (done, answer) = oneshot::channel();
        self.queue
            .send(Job { about, done })
            .await
            .map_err(|_| failed("it has been closed".to_owned()))?;
        answer
            .await
            .map_err(|_| failed("it has been closed".to_owned()))?
            .map_err(failed)
    }

    /// Keeps what a running server knows of these sandboxes and their networks; the rest goes.
    pub async fn retain(&self, plans: &[Plan]) -> Result<(), NetworkError> {
        {
            let mut desired = self.desired.lock();
            let listed: BTreeMap<String, Option<SandboxNames>> = plans
                .iter()
                .map(|plan| {
                    let task = plan.spec.task_id.to_string();
                    let known = desired.sandboxes.remove(&task).flatten();
                    (task, known)
                })
                .collect();
            desired.sandboxes = listed;
            for (network, _) in plans.iter().flat_map(|plan| &plan.attachments) {
                desired.networks.entry(network.to_string()).or_default();
            }
        }
        self.tell(About::Everything).await
    }

    /// Opens a sandbox's name server.
    pub async fn set_sandbox(
        &self,
        plan: &Plan,
        netns: &Path,
        external: bool,
    ) -> Result<(), NetworkError> {
        let task = plan.spec.task_id.to_string();
        let names = SandboxNames {
            task: task.clone(),
            netns: netns.to_owned(),
            networks: plan
                .attachments
                .iter()
                .map(|(network, _)| network.to_string())
                .collect(),
            own: vec![short(&task).to_owned(), plan.spec.name.clone()],
            addrs: plan
                .attachments
                .iter()
                .map(|(_, addr)| addr.addr())
                .collect(),
            external,
            nameservers: plan.spec.nameservers.clone(),
        };
        self.desired
            .lock()
            .sandboxes
            .insert(task.clone(), Some(names));
        self.tell(About::Sandbox(task)).await
    }

    /// Closes a sandbox's name server.
    pub async fn remove_sandbox(&self, task: &TaskId) -> Result<(), NetworkError> {
        let known = self.desired.lock().sandboxes.remove(task.as_str());
        match known {
            Some(_) => self.tell(About::Sandbox(task.to_string())).await,
            None => Ok(()),
        }
    }

    /// The newest names of a network.
    pub async fn set_network(&self, view: &NetworkView) -> Result<(), NetworkError> {
        let names = names_of(view);
        let id = names.id.clone();
        {
            let mut desired = self.desired.lock();
            let entry = desired.networks.entry(id.clone()).or_default();
            if entry.as_ref() == Some(&names) {
                return Ok(());
            }
            *entry = Some(names);
        }
        self.tell(About::Network(id)).await
    }

    /// Forgets a network's names.
    pub async fn remove_network(&self, network: &NetworkId) -> Result<(), NetworkError> {
        let known = self.desired.lock().networks.remove(network.as_str());
        match known {
            Some(_) => self.tell(About::Network(network.to_string())).await,
            None => Ok(()),
        }
    }

    /// Ends the server.
    pub async fn end(&self) {
        *self.desired.lock() = Desired::default();
        if let Err(error) = self.tell(About::End).await {
            tracing::warn!(%error, "end the name server");
        }
    }

    /// Ends the loop; the server works on.
    pub async fn close(&self) {
        self.cancel.cancel();
        let feeder = self.feeder.lock().take();
        if let Some(feeder) = feeder
            && let Err(error) = feeder.await
        {
            tracing::error!(%error, "the name server's feeder");
        }
    }
}

impl Drop for Names {
    fn drop(&mut self) {
        self.cancel.cancel();
    }
}

/// What a network's table means for names.
pub fn names_of(view: &NetworkView) -> NetworkNames {
    let services = view.services.values().map(|service| ServiceNames {
        id: service.service_id.clone(),
        names: std::iter::once(&service.name)
            .chain(&service.aliases)
            .cloned()
            .collect(),
        vip: service.vip.parse::<Ipv4Addr>().ok(),
    });
    let tasks = view.endpoints.values().filter_map(|endpoint| {
        Some(TaskNames {
            id: endpoint.task_id.clone(),
            service: endpoint.service_id.clone(),
            place: match endpoint.slot {
                0 => endpoint.node_id.clone(),
                slot => slot.to_string(),
            },
            addr: endpoint_addr(endpoint)?,
            aliases: endpoint.aliases.clone(),
            ready: endpoint.ready && !endpoint.draining,
        })
    });
    let name = view
        .network
        .spec
        .as_ref()
        .and_then(|spec| spec.annotations.as_ref())
        .map(|annotations| annotations.name.clone());
    NetworkNames {
        id: view.network.id.clone(),
        name: name.unwrap_or_default(),
        services: services.collect(),
        tasks: tasks.collect(),
    }
}

struct Feeder {
    config: DataplaneConfig,
    desired: Arc<Mutex<Desired>>,
    jobs: mpsc::Receiver<Job>,
    cancel: CancellationToken,
}

struct Connection {
    stream: UnixStream,
    pid: Option<i32>,
}

impl Feeder {
    async fn run(mut self) {
        let mut pending: Option<Job> = None;
        let mut backoff = Duration::ZERO;
        let mut wanted = false;
        loop {
            if pending.is_none() {
                // A server that has died is replaced after a moment, or at once when someone waits for it.
                tokio::select! {
                    () = self.cancel.cancelled() => return,
                    job = self.jobs.recv() => match job {
                        Some(job) => pending = Some(job),
                        None => return,
                    },
                    () = tokio::time::sleep(backoff), if wanted => {}
                }
            }
            let connected = tokio::select! {
                () = self.cancel.cancelled() => return,
                connected = self.connect() => connected,
            };
            wanted = !self.desired.lock().sandboxes.is_empty();
            match connected {
                Ok(Some(connection)) => {
                    let since = Instant::now();
                    match self.feed(connection, &mut pending).await {
                        Fed::Closed => return,
                        Fed::Lost => {
                            wanted = !self.desired.lock().sandboxes.is_empty();
                            // Replaced at once, since the containers have nobody to ask; one that
                            // dies again and again is not.
                            backoff = if since.elapsed() > BACKOFF_MAX {
                                Duration::ZERO
                            } else {
                                (backoff * 2).clamp(BACKOFF_MIN, BACKOFF_MAX)
                            };
                            if wanted {
                                tracing::warn!("the name server has ended");
                            }
                        }
                    }
                }
                Ok(None) => {
                    if let Some(job) = pending.take() {
                        let _ = job.done.send(Ok(()));
                    }
                }
                Err(error) => {
                    backoff = (backoff * 2).clamp(BACKOFF_MIN, BACKOFF_MAX);
                    tracing::warn!(%error, "the name server cannot be reached");
                    if let Some(job) = pending.take() {
                        let _ = job.done.send(Err(error.to_string()));
                    }
                }
            }
        }
    }

    /// Serves jobs until the connection ends.
    async fn feed(&mut self, mut connection: Connection, pending: &mut Option<Job>) -> Fed {
        loop {
            let job = match pending.take() {
                Some(job) => job,
                None => tokio::select! {
                    () = self.cancel.cancelled() => return Fed::Closed,
                    // It speaks only when asked: what comes now is its end.
                    () = ended(&connection.stream) => return Fed::Lost,
                    job = self.jobs.recv() => match job {
                        Some(job) => job,
                        None => return Fed::Closed,
                    },
                },
            };
            let mut result = Ok(());
            for request in self.requests(&job.about) {
                match exchange(&mut connection.stream, &request).await {
                    Ok(Reply::Failed(reason)) => result = Err(reason),
                    Ok(_) => {}
                    Err(error) => {
                        if matches!(job.about, About::End) {
                            let _ = job.done.send(Ok(()));
                        } else {
                            tracing::warn!(%error, "the name server does not answer");
                            end_process(connection.pid);
                            *pending = Some(job);
                        }
                        return Fed::Lost;
                    }
                }
            }
            if matches!(job.about, About::End) {
                // Until it has gone, it holds the socket's file.
                let _ = timeout(PATIENCE, wire::receive::<Reply>(&mut connection.stream)).await;
                let _ = job.done.send(result);
                return Fed::Lost;
            }
            let _ = job.done.send(result);
        }
    }

    fn requests(&self, about: &About) -> Vec<Request> {
        let desired = self.desired.lock();
        match about {
            About::Everything => desired.requests(),
            About::Sandbox(task) => match desired.sandboxes.get(task) {
                Some(Some(names)) => vec![Request::Sandbox(names.clone())],
                Some(None) => Vec::new(),
                None => vec![Request::RemoveSandbox(task.clone())],
            },
            About::Network(id) => match desired.networks.get(id) {
                Some(Some(names)) => vec![Request::Network(names.clone())],
                Some(None) => Vec::new(),
                None => vec![Request::RemoveNetwork(id.clone())],
            },
            About::End => vec![Request::End],
        }
    }

    /// Finds the running server, or starts one if a sandbox needs it, and tells it everything.
    async fn connect(&self) -> io::Result<Option<Connection>> {
        let mut connection = match self.find().await {
            Some(connection) => connection,
            None if self.desired.lock().sandboxes.is_empty() => return Ok(None),
            None => self.start().await?,
        };
        let requests = self.desired.lock().requests();
        for request in requests {
            if let Reply::Failed(reason) = exchange(&mut connection.stream, &request).await? {
                // One sandbox that has gone must not keep the others from being served.
                tracing::warn!(reason, "the name server refuses");
            }
        }
        Ok(Some(connection))
    }

    /// The one that is running, unless it is of another version or does not answer: then it is ended.
    async fn find(&self) -> Option<Connection> {
        let mut stream = UnixStream::connect(self.config.run_dir.join("names.sock"))
            .await
            .ok()?;
        let pid = stream.peer_cred().ok().and_then(|cred| cred.pid());
        match exchange(&mut stream, &Request::Hello(VERSION)).await {
            Ok(Reply::Hello(VERSION)) => Some(Connection { stream, pid }),
            other => {
                tracing::info!(?other, "replacing the name server");
                end_process(pid);
                // Closed by its end.
                let _ = timeout(PATIENCE, wire::receive::<Reply>(&mut stream)).await;
                None
            }
        }
    }

    async fn start(&self) -> io::Result<Connection> {
        let (ours, theirs) = std::os::unix::net::UnixStream::pair()?;
        let log = std::fs::File::create(self.config.run_dir.join("names.log"))?;
        let mut command = Command::new(&self.config.names_exe);
        command
            .arg("names")
            .arg("--run-dir")
            .arg(&self.config.run_dir)
            .arg("--resolv-conf")
            .arg(&self.config.resolv_conf)
            .current_dir("/")
            .stdin(Stdio::from(OwnedFd::from(theirs)))
            .stdout(Stdio::null())
            .stderr(log)
            .kill_on_drop(false);
        let netns = match &self.config.host_netns {
            Some(path) => Some(std::fs::File::open(path)?),
            None => None,
        };
        // SAFETY: between fork and exec only the system calls setns and setsid are made; they allocate nothing.
        unsafe {
            command.pre_exec(move || {
                if let Some(netns) = &netns
                    && libc::setns(netns.as_raw_fd(), libc::CLONE_NEWNET) != 0
                {
                    return Err(io::Error::last_os_error());
                }
                libc::setsid();
                Ok(())
            });
        }
        let child = command.spawn().map_err(|error| {
            io::Error::new(
                error.kind(),
                format!("start {}: {error}", self.config.names_exe.display()),
            )
        })?;
        let pid = child.id().and_then(|pid| i32::try_from(pid).ok());
        // Our copy of its end must go, or its death would not be seen.
        drop(command);
        ours.set_nonblocking(true)?;
        let mut stream = UnixStream::from_std(ours)?;
        match exchange(&mut stream, &Request::Hello(VERSION)).await {
            Ok(Reply::Hello(VERSION)) => Ok(Connection { stream, pid }),
            Ok(other) => Err(io::Error::other(format!("it says {other:?}"))),
            Err(error) => {
                end_process(pid);
                Err(error)
            }
        }
    }
}

impl Desired {
    fn requests(&self) -> Vec<Request> {
        let retain = Request::Retain {
            sandboxes: self.sandboxes.keys().cloned().collect(),
            networks: self.networks.keys().cloned().collect(),
        };
        let networks = self
            .networks
            .values()
            .flatten()
            .cloned()
            .map(Request::Network);
        let sandboxes = self
            .sandboxes
            .values()
            .flatten()
            .cloned()
            .map(Request::Sandbox);
        std::iter::once(retain)
            .chain(networks)
            .chain(sandboxes)
            .collect()
    }
}

enum Fed {
    Closed,
    Lost,
}

/// Returns when the other side has closed its end, or speaks unasked.
async fn ended(stream: &UnixStream) {
    loop {
        // Readiness may be left over from an answer that was read to its last byte: only
        // reading tells.
        if stream.readable().await.is_err() {
            return;
        }
        match stream.try_read(&mut [0]) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            _ => return,
        }
    }
}

async fn exchange(stream: &mut UnixStream, request: &Request) -> io::Result<Reply> {
    timeout(PATIENCE, async {
        wire::send(stream, request).await?;
        wire::receive(stream)
            .await?
            .ok_or_else(|| io::Error::from(io::ErrorKind::UnexpectedEof))
    })
    .await?
}

/// One that does not answer is of no use to the containers.
fn end_process(pid: Option<i32>) {
    if let Some(pid) = pid.filter(|pid| *pid > 1) {
        let _ = nix::sys::signal::kill(
            nix::unistd::Pid::from_raw(pid),
            nix::sys::signal::Signal::SIGKILL,
        );
    }
}

#[cfg(test)]
mod tests {
    use futures::FutureExt as _;
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

    use super::*;

    #[tokio::test]
    async fn an_answer_that_was_read_to_its_last_byte_is_not_the_end() {
        let (mut ours, mut theirs) = UnixStream::pair().unwrap();
        theirs.write_all(&[0, 0, 0, 1, 1]).await.unwrap();
        ours.read_exact(&mut [0; 4]).await.unwrap();
        ours.read_exact(&mut [0; 1]).await.unwrap();
        assert!(ended(&ours).now_or_never().is_none());
        drop(theirs);
        ended(&ours).await;
    }
}
