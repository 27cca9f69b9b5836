//! The built-in runtime: images from registries, overlayfs, one shim per container.
//!
//! Holds no state of its own about containers: all of it is in files and in the
//! shims, so an agent that starts again knows what the last one knew. Under `root`
//! each container has `containers/TASK/` (configuration, writable layer, log, how it
//! ended), under `run` it has `TASK/` (sockets, process IDs; gone after a reboot).

use std::collections::{BTreeSet, HashMap};
use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::{Arc, Weak};
use std::time::Duration;

use parking_lot::Mutex;
use swarm_proto::TaskId;
use swarm_proto::v1::{MountType, Platform, RegistryAuth};
use tokio::io::unix::AsyncFd;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::process::Command;

use super::bundle::{self, NodeFacts};
use super::engine;
use super::listens::{Reception, reception};
use super::pull::{Puller, blocking, parse};
use super::seccomp::Compiled;
use super::shim::{Process, ShimConfig, names, pidfd, read_exit, write_exit};
use super::store::{Store, remove_tree};
use super::{
    Container, ContainerConfig, ContainerState, ExecConfig, ExecSession, Exit, LogOptions,
    LogStream, Runtime, RuntimeError, cgroup, exec, follow,
};

/// Exit code of a container whose shim was killed: nobody saw how it ended.
const UNKNOWN_EXIT: Exit = Exit {
    code: 255,
    oom_killed: false,
};
/// With less than this share of the disk left, unused images go at once.
const ROOM: f64 = 0.15;
/// Waits between two looks at a process that does not listen to a signal yet: first, longest.
const LISTENS_AGAIN: (Duration, Duration) = (Duration::from_millis(5), Duration::from_millis(100));
/// How long a program that catches the signal may take to be ready for it.
const READY_WITHIN: Duration = Duration::from_secs(1);
/// A shim answers at once; one that does not is stopped or ill.
const SHIM_TIMEOUT: Duration = Duration::from_secs(30);

/// Who sets up namespaces, cgroups and the root file system.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum OciEngine {
    /// libcontainer, linked in.
    Builtin,
    /// A program with the command line of `runc`: `/usr/bin/crun`, `/usr/bin/runc`.
    Path(PathBuf),
}

/// How much of each container's output is kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LogLimits {
    /// Bytes of one file before it is rotated; at least 64 KiB.
    pub max_bytes: u64,
    /// Files kept, the current one included; at least 1.
    pub max_files: u32,
}

/// What an image may take.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ImageLimits {
    /// Bytes of one layer as the registry sends it.
    pub layer_bytes: u64,
    /// Bytes of one layer unpacked.
    pub unpacked_bytes: u64,
    /// How long one that nothing uses is kept, while the disk has room: the next start of it
    /// needs neither its registry nor unpacking.
    pub unused_for: Duration,
    /// How long a registry may take for a small answer, or go on sending less than 16 KiB a second.
    pub patience: Duration,
}

/// Where the runtime keeps its things, and its limits.
#[derive(Clone, Debug)]
pub struct RuntimeConfig {
    /// Images and containers; outlives a reboot. Neither on overlayfs nor on a network.
    pub root: PathBuf,
    /// Sockets and process IDs; gone after a reboot. At most 60 bytes long (sockets have short names).
    pub run: PathBuf,
    /// "host:port" of registries that are spoken to without TLS.
    pub insecure_registries: Vec<String>,
    /// Who runs containers.
    pub oci_runtime: OciEngine,
    /// The program that answers to `shim` and `exec-shim` by calling [`super::reexec`].
    pub shim_exe: PathBuf,
    /// Of each container's output.
    pub log: LogLimits,
    /// Of each image.
    pub images: ImageLimits,
    /// Cgroup that containers are put under, from the hierarchy's root: "swarm".
    pub cgroup_parent: String,
}

impl RuntimeConfig {
    /// The defaults, for two directories of the caller's choice.
    #[must_use]
    pub fn new(root: PathBuf, run: PathBuf) -> Self {
        Self {
            root,
            run,
            insecure_registries: Vec::new(),
            oci_runtime: OciEngine::Builtin,
            shim_exe: PathBuf::from("/proc/self/exe"),
            log: LogLimits {
                max_bytes: 10 << 20,
                max_files: 5,
            },
            images: ImageLimits {
                layer_bytes: 16 << 30,
                unpacked_bytes: 64 << 30,
                unused_for: Duration::from_secs(3600),
                patience: Duration::from_secs(60),
            },
            cgroup_parent: "swarm".to_owned(),
        }
    }
}

/// Pulls images and runs containers on this host. Cheap to share in an `Arc`.
pub struct OciRuntime {
    config: RuntimeConfig,
    store: Store,
    puller: Puller,
    /// Writers drop images; readers pull them or make containers of them.
    images: tokio::sync::RwLock<()>,
    /// One step at a time per container.
    steps: Mutex<HashMap<TaskId, Weak<tokio::sync::Mutex<()>>>>,
    max_open_files: u64,
    /// Those of this process.
    capabilities: u64,
    filters: Arc<Compiled>,
}

impl OciRuntime {
    /// Opens the directories (made if missing) and adopts what is in them.
    pub fn new(config: RuntimeConfig) -> Result<Self, RuntimeError> {
        let failed = |path: &Path, err: &dyn std::fmt::Display| RuntimeError::Failed {
            step: "open runtime",
            reason: format!("{}: {err}", path.display()),
        };
        for path in [&config.root, &config.run] {
            if !path.is_absolute() {
                return Err(failed(path, &"must be an absolute path"));
            }
            // Both end up in a list of mount options.
            if path.to_string_lossy().contains([',', ':', '\\']) {
                return Err(failed(
                    path,
                    &"must not contain a comma, colon or backslash",
                ));
            }
        }
        if config.run.as_os_str().len() > 60 {
            return Err(failed(&config.run, &"is too long for sockets (60 bytes)"));
        }
        // The process may have installed its own already, which is then used.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let store = Store::open(&config.root).map_err(|err| failed(&config.root, &err))?;
        fs::create_dir_all(config.run.join("engine")).map_err(|err| failed(&config.run, &err))?;
        let (_, hard) = nix::sys::resource::getrlimit(nix::sys::resource::Resource::RLIMIT_NOFILE)
            .map_err(|err| failed(&config.root, &err))?;
        Ok(Self {
            puller: Puller::new(
                store.clone(),
                config.insecure_registries.clone(),
                config.images,
            )?,
            store,
            config,
            images: tokio::sync::RwLock::default(),
            steps: Mutex::default(),
            max_open_files: hard,
            capabilities: capabilities()?,
            filters: Arc::default(),
        })
    }

    fn dir(&self, task: &TaskId) -> PathBuf {
        self.config.root.join("containers").join(task.as_str())
    }

    fn run_dir(&self, task: &TaskId) -> PathBuf {
        self.config.run.join(task.as_str())
    }

    fn cgroup(&self, task: &TaskId) -> String {
        format!("/{}/{task}", self.config.cgroup_parent.trim_matches('/'))
    }

    fn step_lock(&self, task: &TaskId) -> Arc<tokio::sync::Mutex<()>> {
        let mut steps = self.steps.lock();
        steps.retain(|_, lock| lock.strong_count() > 0);
        let found = steps.get(task).and_then(Weak::upgrade);
        found.unwrap_or_else(|| {
            let lock = Arc::new(tokio::sync::Mutex::new(()));
            steps.insert(task.clone(), Arc::downgrade(&lock));
            lock
        })
    }

    /// The container's directory, if it has been made completely.
    fn existing(&self, task: &TaskId) -> Result<PathBuf, RuntimeError> {
        let dir = self.dir(task);
        match swarm_proto::id::is_id(task.as_str()) && dir.join(names::READY).exists() {
            true => Ok(dir),
            false => Err(RuntimeError::NotFound(task.clone())),
        }
    }

    /// The container's first process while it is alive.
    fn init(&self, task: &TaskId) -> Option<Process> {
        self.process(task, names::INIT)
    }

    fn process(&self, task: &TaskId, file: &str) -> Option<Process> {
        let bytes = fs::read(self.run_dir(task).join(file)).ok()?;
        serde_json::from_slice::<Process>(&bytes)
            .ok()
            .filter(Process::is_alive)
    }

    async fn connect(&self, task: &TaskId) -> io::Result<UnixStream> {
        UnixStream::connect(self.run_dir(task).join(names::SOCKET)).await
    }

    /// Sends one command to the shim. `Ok(None)` if there is no shim any more.
    async fn command(&self, task: &TaskId, line: &str) -> Result<Option<String>, RuntimeError> {
        let failed = |reason: String| RuntimeError::Failed {
            step: "talk to shim",
            reason,
        };
        let Ok(mut stream) = self.connect(task).await else {
            return Ok(None);
        };
        let exchange = async {
            stream.write_all(format!("{line}\n").as_bytes()).await?;
            let mut answer = Vec::new();
            let mut byte = [0; 256];
            while !answer.ends_with(b"\n") {
                match stream.read(&mut byte).await? {
                    0 => break,
                    n => answer.extend_from_slice(&byte[..n]),
                }
                if answer.len() > 64 << 10 {
                    break;
                }
            }
            io::Result::Ok(answer)
        };
        let answer = match tokio::time::timeout(SHIM_TIMEOUT, exchange).await {
            Ok(Ok(answer)) if answer.is_empty() => return Ok(None),
            Ok(Ok(answer)) => String::from_utf8_lossy(&answer).trim().to_owned(),
            Ok(Err(_)) => return Ok(None),
            Err(_) => return Err(failed("no answer; is it stopped?".into())),
        };
        match answer.split_once(' ').unwrap_or((&answer, "")) {
            ("ok", rest) => Ok(Some(rest.to_owned())),
            (_, reason) => Err(failed(reason.to_owned())),
        }
    }

    /// Sends a signal to the container's first process; gone already is fine.
    async fn signal(&self, task: &TaskId, signal: i32) -> Result<(), RuntimeError> {
        match self.command(task, &format!("signal {signal}")).await {
            Ok(Some(_)) => return Ok(()),
            // Not even answering: KILL must work all the same.
            Err(err) if signal != libc::SIGKILL => return Err(err),
            Ok(None) | Err(_) => {}
        }
        if let Some(init) = self.init(task)
            && let Ok(fd) = pidfd(init.pid)
            && init.is_alive()
        {
            use std::os::fd::AsRawFd;
            // SAFETY: the descriptor refers to the process that was just looked at.
            unsafe {
                let none = std::ptr::null::<libc::siginfo_t>();
                libc::syscall(libc::SYS_pidfd_send_signal, fd.as_raw_fd(), signal, none, 0);
            }
        }
        Ok(())
    }

    /// Returns when a signal to the container's first process would have its effect: one that is told to
    /// stop while it is still starting would never hear of it. Returns at once if there is no such process.
    async fn until_it_listens(&self, task: &TaskId, signal: i32) {
        let (mut wait, mut early) = (LISTENS_AGAIN.0, None);
        // None of this can be watched for.
        while let Some(init) = self.init(task) {
            match reception(init.pid, signal) {
                Reception::Heard => return,
                Reception::Dropped => {}
                Reception::Early => {
                    let since = early.get_or_insert_with(tokio::time::Instant::now);
                    if since.elapsed() >= READY_WITHIN {
                        return;
                    }
                }
            }
            tokio::time::sleep(wait).await;
            wait = (wait * 2).min(LISTENS_AGAIN.1);
        }
    }

    /// Returns when the container has ended and that is on record.
    async fn ended(&self, task: &TaskId, dir: &Path) -> Result<Exit, RuntimeError> {
        let failed = |err: io::Error| RuntimeError::Failed {
            step: "wait for container",
            reason: err.to_string(),
        };
        if let Some(exit) = read_exit(dir) {
            return Ok(exit);
        }
        // The stream ends with the shim, after it has written down how the container ended.
        if let Ok(mut stream) = self.connect(task).await {
            let mut buffer = [0; 64];
            while stream.read(&mut buffer).await.is_ok_and(|n| n > 0) {}
        }
        // A shim that turned us away (too many wait already), or one that was killed.
        for file in [names::SHIM, names::INIT] {
            if let Some(process) = self.process(task, file) {
                wait_for_process(process).await.map_err(failed)?;
            }
        }
        if !dir.exists() {
            return Err(RuntimeError::NotFound(task.clone()));
        }
        if read_exit(dir).is_none() {
            write_exit(dir, UNKNOWN_EXIT).map_err(failed)?;
        }
        Ok(read_exit(dir).unwrap_or(UNKNOWN_EXIT))
    }

    /// Kills what is left of a container and removes every trace of it.
    async fn erase(&self, task: &TaskId) -> Result<(), RuntimeError> {
        let (dir, run_dir) = (self.dir(task), self.run_dir(task));
        if !dir.exists() && !run_dir.exists() {
            return Ok(());
        }
        self.signal(task, libc::SIGKILL).await?;
        let group = self.cgroup(task);
        let kill = group.clone();
        blocking(move || cgroup::kill(&kill)).await?;
        let failed = |err: io::Error| RuntimeError::Failed {
            step: "wait for container",
            reason: err.to_string(),
        };
        let gone = async {
            if let Some(init) = self.init(task) {
                wait_for_process(init).await?;
            }
            if let Some(shim) = self.process(task, names::SHIM) {
                // Of a container that was never complete: nothing tells the shim to end.
                if !dir.join(names::READY).exists() {
                    let _ = nix::sys::signal::kill(
                        nix::unistd::Pid::from_raw(shim.pid),
                        nix::sys::signal::Signal::SIGKILL,
                    );
                }
                wait_for_process(shim).await?;
            }
            io::Result::Ok(())
        };
        match tokio::time::timeout(SHIM_TIMEOUT, gone).await {
            Ok(result) => result.map_err(failed)?,
            Err(_) => {
                // A stopped shim; the container itself is dead.
                if let Some(shim) = self.process(task, names::SHIM) {
                    let _ = nix::sys::signal::kill(
                        nix::unistd::Pid::from_raw(shim.pid),
                        nix::sys::signal::Signal::SIGKILL,
                    );
                    wait_for_process(shim).await.map_err(failed)?;
                }
            }
        }
        if let OciEngine::Path(program) = &self.config.oci_runtime {
            let root = self.config.run.join("engine");
            let delete = Command::new(program)
                .arg("--root")
                .arg(root)
                .args(["delete", "--force", task.as_str()])
                .stdin(Stdio::null())
                .output()
                .await;
            match delete {
                Ok(_) => {}
                // Uninstalled meanwhile: its container is dead, and its files go with ours.
                Err(err) if err.kind() == io::ErrorKind::NotFound => {}
                Err(err) => {
                    return Err(RuntimeError::Failed {
                        step: "delete container",
                        reason: format!("{}: {err}", program.display()),
                    });
                }
            }
        }
        let engine = self.config.run.join("engine").join(task.as_str());
        let doomed = self.store.temporary();
        let store = self.store.clone();
        tokio::task::spawn_blocking(move || {
            if let Ok(shim) = super::shim::load(&dir)
                && let Err(err) = store.used_until_now(&shim.image_config)
            {
                tracing::warn!(%err, "an image may be dropped early");
            }
            cgroup::remove(&group)?;
            let remove = || {
                remove_tree(&engine)?;
                remove_tree(&run_dir)?;
                // Gone at once under its name, whatever happens during the removal.
                match fs::rename(&dir, &doomed) {
                    Err(err) if err.kind() == io::ErrorKind::NotFound => Ok(()),
                    Err(err) => Err(err),
                    Ok(()) => remove_tree(&doomed),
                }
            };
            remove().map_err(|err: io::Error| RuntimeError::Failed {
                step: "remove container's files",
                reason: err.to_string(),
            })
        })
        .await
        .expect("removing files does not panic")
    }

    /// Writes a container's directories and starts its shim.
    async fn make(&self, config: &ContainerConfig) -> Result<(), RuntimeError> {
        let task = &config.task_id;
        let (dir, run_dir) = (self.dir(task), self.run_dir(task));
        let reference = parse(&config.spec.image)?;
        let store = self.store.clone();
        let (whole, digest) = (reference.whole(), reference.digest().map(str::to_owned));
        let record = blocking(move || {
            let by_name = store.find(&whole);
            Ok(by_name.or_else(|| digest.and_then(|digest| store.find_digest(&digest))))
        })
        .await?
        .ok_or_else(|| RuntimeError::Failed {
            step: "create container",
            reason: format!("image {} is not on this node", config.spec.image),
        })?;
        let image = self.store.config(&record)?;
        let rootfs = dir.join(names::ROOTFS);
        let group = self.cgroup(task);
        let node = NodeFacts {
            rootfs: &rootfs,
            dir: &dir,
            cgroup: &group,
            max_open_files: self.max_open_files,
            capabilities: self.capabilities,
            architecture: std::env::consts::ARCH,
        };
        let mut bundle = bundle::build(&image.config, config, &node)?;
        for mount in &config.spec.mounts {
            if mount.r#type() == MountType::Bind && !Path::new(&mount.source).exists() {
                return Err(RuntimeError::InvalidConfig(format!(
                    "bind source path does not exist: {}",
                    mount.source
                )));
            }
        }
        let engine = match &self.config.oci_runtime {
            OciEngine::Builtin => None,
            OciEngine::Path(_) if config.spec.init => {
                return Err(RuntimeError::InvalidConfig(
                    "--init needs the built-in OCI runtime on this node".into(),
                ));
            }
            OciEngine::Path(path) => Some(path.clone()),
        };
        let aside = match engine {
            None => Some(engine::set_aside(&mut bundle.spec).map_err(failed_to_create)?),
            Some(_) => None,
        };
        let (filter, capabilities) = aside.unzip();
        let shim = ShimConfig {
            id: task.to_string(),
            run_dir: run_dir.clone(),
            layers_dir: self.store.layers_dir(),
            layers: record
                .layers
                .iter()
                .map(|id| Store::layer_name(id).to_owned())
                .collect(),
            engine,
            engine_root: self.config.run.join("engine"),
            cgroup: group,
            tty: config.spec.tty,
            init: config.spec.init,
            user: bundle.user,
            capabilities,
            stop_signal: bundle.stop_signal,
            log_max_bytes: self.config.log.max_bytes.max(64 << 10),
            log_max_files: self.config.log.max_files.max(1),
            image_config: record.config,
            diff_ids: record.layers,
        };
        let hostname = match config.spec.hostname.as_str() {
            "" => config.hostname.clone(),
            name => name.to_owned(),
        };
        let files = [
            ("config.json", bundle.spec.to_string()),
            ("hosts", config.etc_hosts.clone()),
            ("resolv.conf", config.resolv_conf.clone()),
            ("hostname", format!("{hostname}\n")),
            (
                names::CONFIG,
                serde_json::to_string(&shim).expect("plain data"),
            ),
        ];
        let (to, run) = (dir.clone(), run_dir.clone());
        let filters = self.filters.clone();
        blocking(move || {
            use std::os::unix::fs::PermissionsExt;
            fs::create_dir_all(&to)?;
            for part in ["upper", "work", names::ROOTFS, names::LOG] {
                fs::create_dir_all(to.join(part))?;
            }
            fs::set_permissions(to.join("upper"), fs::Permissions::from_mode(0o755))?;
            fs::set_permissions(to.join(names::LOG), fs::Permissions::from_mode(0o700))?;
            for (name, text) in files {
                fs::write(to.join(name), text)?;
            }
            if let Some(filter) = filter {
                let program = filters.program(&filter).map_err(io::Error::other)?;
                fs::write(to.join(names::FILTER), program)?;
            }
            fs::create_dir_all(&run)?;
            fs::set_permissions(&run, fs::Permissions::from_mode(0o700))
        })
        .await?;
        self.spawn_shim(&dir, &run_dir).await
    }

    async fn spawn_shim(&self, dir: &Path, run_dir: &Path) -> Result<(), RuntimeError> {
        let failed = failed_to_create;
        let mut child = Command::new(&self.config.shim_exe)
            .arg("shim")
            .args([dir, run_dir])
            .env_clear()
            .current_dir("/")
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .map_err(|err| failed(format!("{}: {err}", self.config.shim_exe.display())))?;
        let mut stdout = child.stdout.take().expect("piped");
        let stderr = child.stderr.take().expect("piped");
        let mut said = Vec::new();
        let answer = async {
            let mut buffer = [0; 1024];
            while !said.ends_with(b"\n") && said.len() < 64 << 10 {
                match stdout.read(&mut buffer).await? {
                    0 => break,
                    n => said.extend_from_slice(&buffer[..n]),
                }
            }
            child.wait().await.map(drop)
        };
        answer.await.map_err(|err| failed(err.to_string()))?;
        let said = String::from_utf8_lossy(&said);
        match said.trim().split_once(' ') {
            Some(("ok", _)) => Ok(()),
            Some((_, reason)) => Err(failed(reason.to_owned())),
            None => {
                let mut reason = Vec::new();
                let _ = stderr.take(4096).read_to_end(&mut reason).await;
                Err(failed(format!(
                    "shim: {}",
                    String::from_utf8_lossy(&reason).trim()
                )))
            }
        }
    }

    fn state(&self, task: &TaskId, dir: &Path) -> ContainerState {
        if let Some(exit) = read_exit(dir) {
            return ContainerState::Exited(exit);
        }
        let started = self.run_dir(task).join(names::STARTED).exists();
        let pid = engine_pid(&self.run_dir(task));
        if self.process(task, names::SHIM).is_some() {
            // It writes down the end; until then there is none.
            return match pid {
                Some(pid) if started => ContainerState::Running { pid },
                _ => ContainerState::Created,
            };
        }
        match self.init(task) {
            Some(init) if started => ContainerState::Running { pid: init.pid },
            // Without its shim it can never be started. Or the shim ended just now.
            _ => ContainerState::Exited(read_exit(dir).unwrap_or(UNKNOWN_EXIT)),
        }
    }
}

/// The capabilities of this process, a bit for each.
fn capabilities() -> Result<u64, RuntimeError> {
    let path = "/proc/self/status";
    let status = fs::read_to_string(path);
    let status = status.as_deref().unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("CapEff:"));
    let bits = line.and_then(|bits| u64::from_str_radix(bits.trim(), 16).ok());
    bits.ok_or_else(|| RuntimeError::Failed {
        step: "open runtime",
        reason: format!("{path} does not say which capabilities this process has"),
    })
}

fn failed_to_create(reason: String) -> RuntimeError {
    RuntimeError::Failed {
        step: "create container",
        reason,
    }
}

/// The first process of a container, alive or not.
fn engine_pid(run_dir: &Path) -> Option<i32> {
    fs::read_to_string(run_dir.join(names::INIT_PID))
        .ok()?
        .trim()
        .parse()
        .ok()
}

/// Returns when the process has ended.
async fn wait_for_process(process: Process) -> io::Result<()> {
    let fd: OwnedFd = match pidfd(process.pid) {
        Err(err) if err.raw_os_error() == Some(libc::ESRCH) => return Ok(()),
        other => other?,
    };
    if !process.is_alive() {
        return Ok(());
    }
    // SAFETY: an OwnedFd is the same open descriptor for as long as it lives.
    let fd = unsafe { AsyncFd::register_with_interest(fd, tokio::io::Interest::READABLE) }?;
    fd.readable().await.map(drop)
}

#[async_trait::async_trait]
impl Runtime for OciRuntime {
    async fn resolve(
        &self,
        image: &str,
        auth: Option<&RegistryAuth>,
    ) -> Result<(String, Vec<Platform>), RuntimeError> {
        self.puller.resolve(image, auth).await
    }

    async fn pull(&self, image: &str, auth: Option<&RegistryAuth>) -> Result<String, RuntimeError> {
        let _images = self.images.read().await;
        Ok(self.puller.pull(image, auth).await?.config)
    }

    async fn create(&self, config: &ContainerConfig) -> Result<(), RuntimeError> {
        let task = &config.task_id;
        if !swarm_proto::id::is_id(task.as_str()) {
            return Err(RuntimeError::InvalidConfig(format!("bad task ID {task:?}")));
        }
        let lock = self.step_lock(task);
        let _step = lock.lock().await;
        if self.existing(task).is_ok() {
            return Ok(());
        }
        let _images = self.images.read().await;
        // What an interrupted attempt left behind.
        self.erase(task).await?;
        let made = self.make(config).await;
        if made.is_err()
            && let Err(err) = self.erase(task).await
        {
            tracing::warn!(%task, %err, "remains of a container that could not be made");
        }
        made
    }

    async fn start(&self, task: &TaskId) -> Result<i32, RuntimeError> {
        let lock = self.step_lock(task);
        let _step = lock.lock().await;
        let dir = self.existing(task)?;
        match self.command(task, "start").await? {
            Some(pid) => pid.parse().map_err(|_| RuntimeError::Failed {
                step: "start container",
                reason: format!("the shim says {pid:?}"),
            }),
            // Ended so soon that its shim has gone: it was started all the same.
            None if self.run_dir(task).join(names::STARTED).exists() => {
                let bytes = fs::read_to_string(self.run_dir(task).join(names::INIT_PID));
                Ok(bytes
                    .ok()
                    .and_then(|pid| pid.trim().parse().ok())
                    .unwrap_or(0))
            }
            None => Err(RuntimeError::Failed {
                step: "start container",
                reason: format!("its shim has ended ({})", dir.display()),
            }),
        }
    }

    async fn wait(&self, task: &TaskId) -> Result<Exit, RuntimeError> {
        let dir = self.existing(task)?;
        self.ended(task, &dir).await
    }

    async fn stop(&self, task: &TaskId, grace: Duration) -> Result<Exit, RuntimeError> {
        let dir = self.existing(task)?;
        if let Some(exit) = read_exit(&dir) {
            return Ok(exit);
        }
        // Before its start, process 1 ignores every signal but KILL.
        if self.run_dir(task).join(names::STARTED).exists() {
            let deadline = tokio::time::Instant::now() + grace;
            let signal = super::shim::load(&dir).map_or(libc::SIGTERM, |shim| shim.stop_signal);
            // Sent once: a second one makes some programs give up at once.
            let listens = self.until_it_listens(task, signal);
            let _ = tokio::time::timeout_at(deadline, listens).await;
            if let Err(err) = self.signal(task, signal).await {
                tracing::warn!(%task, %err, "stop signal not delivered");
            }
            if let Ok(exit) = tokio::time::timeout_at(deadline, self.ended(task, &dir)).await {
                return exit;
            }
        }
        self.signal(task, libc::SIGKILL).await?;
        self.ended(task, &dir).await
    }

    async fn remove(&self, task: &TaskId) -> Result<(), RuntimeError> {
        if !swarm_proto::id::is_id(task.as_str()) {
            return Ok(());
        }
        let lock = self.step_lock(task);
        let _step = lock.lock().await;
        self.erase(task).await
    }

    async fn list(&self) -> Result<Vec<Container>, RuntimeError> {
        let dir = self.config.root.join("containers");
        let tasks = blocking(move || {
            let mut tasks = Vec::new();
            for entry in fs::read_dir(dir)? {
                let name = entry?.file_name();
                tasks.extend(
                    name.to_str()
                        .filter(|id| swarm_proto::id::is_id(id))
                        .map(TaskId::from),
                );
            }
            Ok(tasks)
        })
        .await?;
        let mut containers = Vec::new();
        for task_id in tasks {
            if let Ok(dir) = self.existing(&task_id) {
                let state = self.state(&task_id, &dir);
                containers.push(Container { task_id, state });
                continue;
            }
            // Half-made by an agent that was killed, unless another call makes it right now.
            let lock = self.step_lock(&task_id);
            if let Ok(_step) = lock.try_lock()
                && self.existing(&task_id).is_err()
                && let Err(err) = self.erase(&task_id).await
            {
                tracing::warn!(task = %task_id, %err, "remains of a half-made container");
            }
        }
        Ok(containers)
    }

    async fn exec(&self, task: &TaskId, config: ExecConfig) -> Result<ExecSession, RuntimeError> {
        let dir = self.existing(task)?;
        if !matches!(self.state(task, &dir), ContainerState::Running { .. }) {
            return Err(RuntimeError::Failed {
                step: "exec",
                reason: format!("the container of task {task} is not running"),
            });
        }
        exec::start(&self.config.shim_exe, &dir, &self.run_dir(task), config).await
    }

    async fn logs(&self, task: &TaskId, options: LogOptions) -> Result<LogStream, RuntimeError> {
        follow::stream(self.existing(task)?, options).await
    }

    async fn collect_garbage(&self, keep: &[String]) -> Result<Option<Duration>, RuntimeError> {
        let mut references = BTreeSet::new();
        for image in keep {
            references.insert(parse(image)?.whole());
        }
        let _images = self.images.write().await;
        let (store, dir) = (self.store.clone(), self.config.root.join("containers"));
        let (root, unused_for) = (self.config.root.clone(), self.config.images.unused_for);
        let swept = blocking(move || {
            let (mut configs, mut layers) = (BTreeSet::new(), BTreeSet::new());
            for entry in fs::read_dir(dir)? {
                if let Ok(shim) = super::shim::load(&entry?.path()) {
                    configs.insert(shim.image_config);
                    layers.extend(shim.diff_ids);
                }
            }
            let disk = nix::sys::statvfs::statvfs(&root)?;
            // As df counts: without what the file system keeps for itself.
            let left = disk.blocks_available() as f64;
            let used = disk.blocks().saturating_sub(disk.blocks_free()) as f64;
            let unused_for = match left < ROOM * (used + left) {
                true => Duration::ZERO,
                false => unused_for,
            };
            store.sweep(&references, &configs, &layers, unused_for)
        })
        .await?;
        tracing::debug!(?swept, "images collected");
        Ok(swept.next)
    }
}
