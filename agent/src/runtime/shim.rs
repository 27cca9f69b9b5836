//! The process that stands between the agent and one container.
//!
//! The agent's program started again, single-threaded and small. It mounts the
//! root file system in a mount namespace of its own (nothing to unmount when it
//! is gone), makes the container, starts it when told to, writes its output to
//! log files and its end to a file. It outlives the agent and needs nothing from
//! it. Never speaks to a network.
//!
//! On its socket a client may send `start`, `signal N` or nothing; each command is
//! answered by one line, `ok [PID]` or `error REASON`. The end of the stream means
//! that the shim has ended, and so has the container.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::SystemTime;

use libcontainer::oci_spec::runtime::LinuxCapabilities;
use nix::fcntl::OFlag;
use nix::mount::{MsFlags, mount};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sched::{CloneFlags, unshare};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::sys::wait::{WaitPidFlag, waitpid};
use nix::unistd::{ForkResult, Pid, fork, pipe2};
use serde::{Deserialize, Serialize};

use super::bundle::UserSpec;
use super::engine::{self, Stdio3, in_child};
use super::logfile::{LogWriter, Splitter};
use super::oci::LogLimits;
use super::store::remove_tree;
use super::{Exit, cgroup, execshim, rootfs};

/// What the agent tells the shim, in `shim.json` of the container's directory.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct ShimConfig {
    pub id: String,
    /// Sockets and PIDs of this container.
    pub run_dir: PathBuf,
    /// Holds the lower directories.
    pub layers_dir: PathBuf,
    /// Names under `layers_dir`, lowest first.
    pub layers: Vec<String>,
    /// A program like `runc`, or none for libcontainer.
    pub engine: Option<PathBuf>,
    /// The engine's own state.
    pub engine_root: PathBuf,
    pub cgroup: String,
    pub tty: bool,
    pub init: bool,
    pub user: UserSpec,
    /// What the container's processes keep, by libcontainer; the runtime configuration has more.
    pub capabilities: Option<LinuxCapabilities>,
    pub stop_signal: i32,
    pub log_max_bytes: u64,
    pub log_max_files: u32,
    /// Of the image's configuration: garbage collection keeps it.
    pub image_config: String,
    /// Full digests of the layers: garbage collection keeps them.
    pub diff_ids: Vec<String>,
}

/// A process, told apart from a later one with the same number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Process {
    pub pid: i32,
    /// Clock ticks since boot.
    pub start: u64,
}

impl Process {
    /// `None` if there is no such process.
    pub fn find(pid: i32) -> Option<Self> {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        // The name in parentheses may hold anything; fields are counted after it.
        let (_, rest) = stat.rsplit_once(") ")?;
        let mut fields = rest.split(' ');
        let state = fields.next()?;
        if state == "Z" || state == "X" {
            return None;
        }
        Some(Self {
            pid,
            start: fields.nth(18)?.parse().ok()?,
        })
    }

    pub fn is_alive(&self) -> bool {
        Self::find(self.pid) == Some(*self)
    }
}

/// File names in a container's directory and its run directory.
pub(super) mod names {
    pub const CONFIG: &str = "shim.json";
    pub const FILTER: &str = "seccomp.bpf";
    pub const EXIT: &str = "exit";
    pub const READY: &str = "ready";
    pub const LOG: &str = "log";
    pub const ROOTFS: &str = "rootfs";
    pub const SOCKET: &str = "shim.sock";
    pub const SHIM: &str = "shim.pid";
    pub const INIT: &str = "init.json";
    pub const INIT_PID: &str = "init.pid";
    pub const STARTED: &str = "started";
    pub const EXE: &str = "exe";
}

/// Runs this process as a container's shim if it was started as one.
///
/// The first statement of `main` of every program that holds an `OciRuntime`,
/// before any thread is started: `if let Some(code) = reexec() { return code; }`.
/// Answers to the words `shim`, `shim-sealed`, `exec-shim` and `exec-shim-sealed` as
/// first argument; returns `None` for all others.
#[must_use]
pub fn reexec() -> Option<ExitCode> {
    let mut args = std::env::args_os().skip(1);
    let word = args.next()?;
    let word = word.to_str()?;
    if !matches!(
        word,
        "shim" | "shim-sealed" | "exec-shim" | "exec-shim-sealed"
    ) {
        return None;
    }
    let (Some(dir), Some(run_dir), None) = (args.next(), args.next(), args.next()) else {
        eprintln!("{word} is started by the agent, not by hand");
        return Some(ExitCode::from(2));
    };
    let (dir, run_dir) = (PathBuf::from(dir), PathBuf::from(run_dir));
    Some(match word {
        "shim-sealed" => run(&dir),
        "exec-shim-sealed" => execshim::run(&dir),
        _ => {
            // Returns only if it fails.
            let reason = seal(&format!("{word}-sealed"), &dir, &run_dir);
            eprintln!("cannot start {word}: {reason}");
            ExitCode::FAILURE
        }
    })
}

/// Starts this program once more from a read-only mount that only it sees. A container can
/// reach the program of a process that enters it (`/proc/PID/exe`): writing there must fail.
fn seal(word: &str, dir: &Path, run_dir: &Path) -> String {
    use std::os::unix::process::CommandExt;
    let private = || -> io::Result<PathBuf> {
        unshare(CloneFlags::CLONE_NEWNS)?;
        let none = None::<&str>;
        mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_SLAVE, none)?;
        Ok(run_dir.join(names::EXE))
    };
    let read_only = |target: &Path| -> io::Result<()> {
        use std::os::unix::fs::MetadataExt;
        // By its path: the running file itself is on a mount of the old namespace, which
        // cannot be bound into the new one.
        let path = fs::read_link("/proc/self/exe")?;
        let (own, there) = (fs::metadata("/proc/self/exe")?, fs::metadata(&path)?);
        if (own.dev(), own.ino()) != (there.dev(), there.ino()) {
            return Err(io::Error::other("another file has the program's name"));
        }
        File::create(target)?;
        let none = None::<&str>;
        mount(Some(&path), target, none, MsFlags::MS_BIND, none)?;
        let flags = MsFlags::MS_BIND | MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY;
        Ok(mount(none, target, none, flags, none)?)
    };
    let target = match private() {
        Ok(target) => target,
        Err(err) => return format!("make mount namespace: {err}"),
    };
    let (program, _keep) = match read_only(&target) {
        Ok(()) => (target, None),
        // A replaced program file has no name any more and cannot be mounted.
        Err(_) => match sealed_copy() {
            Ok(file) => (
                PathBuf::from(format!("/proc/self/fd/{}", file.as_raw_fd())),
                Some(file),
            ),
            Err(err) => return format!("copy program: {err}"),
        },
    };
    let err = std::process::Command::new(program)
        .arg(word)
        .arg(dir)
        .arg(run_dir)
        .exec();
    format!("execute: {err}")
}

/// The program in memory that nobody can change.
fn sealed_copy() -> io::Result<File> {
    use nix::fcntl::{FcntlArg, SealFlag, fcntl};
    use nix::sys::memfd::{MFdFlags, memfd_create};
    let memory = memfd_create(c"shim", MFdFlags::MFD_ALLOW_SEALING | MFdFlags::MFD_CLOEXEC)?;
    let mut memory = File::from(memory);
    io::copy(&mut File::open("/proc/self/exe")?, &mut memory)?;
    let seals = SealFlag::F_SEAL_WRITE
        | SealFlag::F_SEAL_GROW
        | SealFlag::F_SEAL_SHRINK
        | SealFlag::F_SEAL_SEAL;
    fcntl(&memory, FcntlArg::F_ADD_SEALS(seals))?;
    Ok(memory)
}

pub(super) fn load(dir: &Path) -> Result<ShimConfig, String> {
    let bytes =
        fs::read(dir.join(names::CONFIG)).map_err(|err| format!("read shim.json: {err}"))?;
    serde_json::from_slice(&bytes).map_err(|err| format!("read shim.json: {err}"))
}

fn run(dir: &Path) -> ExitCode {
    // The agent waits for this process only until the real shim is on its own.
    // SAFETY: the process has one thread.
    match unsafe { fork() } {
        Ok(ForkResult::Parent { .. }) => return ExitCode::SUCCESS,
        Ok(ForkResult::Child) => {}
        Err(err) => {
            eprintln!("fork: {err}");
            return ExitCode::FAILURE;
        }
    }
    let config = match load(dir) {
        Ok(config) => config,
        Err(reason) => {
            println!("error {reason}");
            return ExitCode::FAILURE;
        }
    };
    match Shim::prepare(&config, dir) {
        Ok(mut shim) => {
            println!("ok {}", shim.init.pid);
            let _ = io::stdout().flush();
            let _ = null_stdio();
            shim.serve();
            ExitCode::SUCCESS
        }
        Err(reason) => {
            println!("error {}", reason.replace('\n', " "));
            ExitCode::FAILURE
        }
    }
}

/// The agent's pipes must not stay open.
pub(super) fn null_stdio() -> io::Result<()> {
    let null = File::options().read(true).write(true).open("/dev/null")?;
    for target in 0..3 {
        // SAFETY: replaces standard streams, which nobody owns as descriptors.
        if unsafe { libc::dup2(null.as_raw_fd(), target) } < 0 {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(())
}

/// Orphans come to us, SIGCHLD comes as an event, other signals do not end us.
pub(super) fn become_reaper() -> Result<SignalFd, String> {
    let failed = |err: nix::Error| format!("set up signals: {err}");
    nix::sys::prctl::set_child_subreaper(true).map_err(failed)?;
    let mut ignored = SigSet::empty();
    for signal in [
        Signal::SIGHUP,
        Signal::SIGINT,
        Signal::SIGTERM,
        Signal::SIGCHLD,
    ] {
        ignored.add(signal);
    }
    ignored.thread_block().map_err(failed)?;
    let mut children = SigSet::empty();
    children.add(Signal::SIGCHLD);
    SignalFd::with_flags(&children, SfdFlags::SFD_NONBLOCK | SfdFlags::SFD_CLOEXEC).map_err(failed)
}

/// One stream of the container's output.
struct Output {
    file: File,
    stderr: bool,
    splitter: Splitter,
}

struct Client {
    stream: UnixStream,
    pending: Vec<u8>,
}

struct Shim<'a> {
    config: &'a ShimConfig,
    dir: &'a Path,
    init: Process,
    started: bool,
    exit: Option<i32>,
    signals: SignalFd,
    listener: UnixListener,
    clients: Vec<Client>,
    outputs: Vec<Output>,
    log: LogWriter,
}

/// Waiting agents and one that gives orders; more are turned away.
const MAX_CLIENTS: usize = 64;
const MAX_COMMAND: usize = 64;

impl<'a> Shim<'a> {
    fn prepare(config: &'a ShimConfig, dir: &'a Path) -> Result<Self, String> {
        let step = |what: &'static str| move |err: io::Error| format!("{what}: {err}");
        nix::unistd::setsid().map_err(|err| format!("start session: {err}"))?;
        let signals = become_reaper()?;
        let own = Process::find(nix::unistd::getpid().as_raw()).ok_or("no /proc")?;
        write_json(&config.run_dir.join(names::SHIM), &own).map_err(step("write PID"))?;
        if config.engine.is_some() {
            engine::hide_hybrid_cgroups()?;
        }
        mount_root(config, dir).map_err(step("mount overlay"))?;
        let limits = LogLimits {
            max_bytes: config.log_max_bytes,
            max_files: config.log_max_files,
        };
        let log = LogWriter::open(&dir.join(names::LOG), limits).map_err(step("open log"))?;

        let console_path = config.run_dir.join("console.sock");
        let console = config
            .tty
            .then(|| listen(&console_path))
            .transpose()
            .map_err(step("make console socket"))?;
        let pid_file = config.run_dir.join(names::INIT_PID);
        let mut outputs = Vec::new();
        let stdio = if config.tty {
            Stdio3::Console(console_path.clone())
        } else {
            let (stdout, stdout_end) = pipe().map_err(step("make pipe"))?;
            let (stderr, stderr_end) = pipe().map_err(step("make pipe"))?;
            outputs.push(Output {
                file: stdout,
                stderr: false,
                splitter: Splitter::default(),
            });
            outputs.push(Output {
                file: stderr,
                stderr: true,
                splitter: Splitter::default(),
            });
            let stdin = File::open("/dev/null")
                .map_err(step("open /dev/null"))?
                .into();
            Stdio3::Pipes {
                stdin,
                stdout: stdout_end,
                stderr: stderr_end,
            }
        };
        let made = in_child(|| {
            // Process 1 inherits what is held back here, and what arrives before its program runs would be
            // dropped all the same: whoever looks must not take it for a program that listens.
            let none = SigSet::empty();
            none.thread_set_mask()
                .map_err(|err| format!("set up signals: {err}"))?;
            complete_spec(config, dir)?;
            engine::create(config, dir, &pid_file, stdio)
        });
        if let Err(reason) = made {
            let _ = cgroup::kill(&config.cgroup);
            while waitpid(None, None).is_ok() {}
            let _ = cgroup::remove(&config.cgroup);
            let _ = remove_tree(&config.engine_root.join(&config.id));
            return Err(reason);
        }
        let init = Process::find(engine::read_pid(&pid_file)?)
            .ok_or("the container ended before it was started")?;
        if let Some(console) = console {
            let file = receive_terminal(&console).map_err(step("get terminal"))?;
            outputs.push(Output {
                file,
                stderr: false,
                splitter: Splitter::default(),
            });
            let _ = fs::remove_file(&console_path);
        }
        for output in &outputs {
            set_nonblocking(&output.file).map_err(step("set up output"))?;
        }
        write_json(&config.run_dir.join(names::INIT), &init).map_err(step("write PID"))?;
        let listener = listen(&config.run_dir.join(names::SOCKET)).map_err(step("make socket"))?;
        listener
            .set_nonblocking(true)
            .map_err(step("make socket"))?;
        File::create(dir.join(names::READY)).map_err(step("mark ready"))?;
        Ok(Self {
            config,
            dir,
            init,
            started: false,
            exit: None,
            signals,
            listener,
            clients: Vec::new(),
            outputs,
            log,
        })
    }

    /// Until the container has ended and that is written down.
    fn serve(&mut self) {
        let mut buffer = vec![0; 32 << 10];
        while self.exit.is_none() {
            let (readable, outputs, clients) = self.wait();
            if readable[0] {
                self.reap();
            }
            // From the back: what has ended is taken out.
            for index in outputs.into_iter().rev() {
                if !self.pump(index, &mut buffer, 1) {
                    self.outputs.remove(index);
                }
            }
            for index in clients.into_iter().rev() {
                if !self.command(index) {
                    self.clients.remove(index);
                }
            }
            if readable[1]
                && let Ok((stream, _)) = self.listener.accept()
                && self.clients.len() < MAX_CLIENTS
                && stream.set_nonblocking(true).is_ok()
            {
                self.clients.push(Client {
                    stream,
                    pending: Vec::new(),
                });
            }
        }
        // All writers died with the container's PID namespace; what they wrote is in the pipes.
        while !self.outputs.is_empty() {
            self.pump(0, &mut buffer, usize::MAX);
            let mut output = self.outputs.remove(0);
            let mut records = Vec::new();
            output
                .splitter
                .finish(output.stderr, now_nanos(), &mut records);
            self.log.write(&records);
        }
        let exit = Exit {
            code: self.exit.unwrap_or(255),
            oom_killed: cgroup::oom_killed(&self.config.cgroup),
        };
        let _ = write_exit(self.dir, exit);
    }

    /// Which of signals and listener, which outputs, which clients have something.
    fn wait(&self) -> ([bool; 2], Vec<usize>, Vec<usize>) {
        let mut fds = vec![
            PollFd::new(self.signals.as_fd(), PollFlags::POLLIN),
            PollFd::new(self.listener.as_fd(), PollFlags::POLLIN),
        ];
        fds.extend(
            self.outputs
                .iter()
                .map(|o| PollFd::new(o.file.as_fd(), PollFlags::POLLIN)),
        );
        fds.extend(
            self.clients
                .iter()
                .map(|c| PollFd::new(c.stream.as_fd(), PollFlags::POLLIN)),
        );
        if poll(&mut fds, PollTimeout::NONE).is_err() {
            return ([false; 2], Vec::new(), Vec::new());
        }
        let ready: Vec<bool> = fds
            .iter()
            .map(|fd| fd.revents().is_none_or(|events| !events.is_empty()))
            .collect();
        let (outputs, clients) = ready[2..].split_at(self.outputs.len());
        let indexes = |ready: &[bool]| {
            ready
                .iter()
                .enumerate()
                .filter(|(_, ready)| **ready)
                .map(|(index, _)| index)
                .collect()
        };
        ([ready[0], ready[1]], indexes(outputs), indexes(clients))
    }

    fn reap(&mut self) {
        while let Ok(Some(_)) = self.signals.read_signal() {}
        while let Ok(status) = waitpid(None, Some(WaitPidFlag::WNOHANG)) {
            match engine::exit_code(status) {
                Some((pid, code)) if pid.as_raw() == self.init.pid => self.exit = Some(code),
                Some(_) => {}
                None => break,
            }
        }
    }

    /// Copies at most `rounds` buffers of output to the log. `false` when the stream has ended.
    fn pump(&mut self, index: usize, buffer: &mut [u8], rounds: usize) -> bool {
        for _ in 0..rounds {
            let output = &mut self.outputs[index];
            let mut records = Vec::new();
            let result = output.file.read(buffer);
            let open = match result {
                Ok(n) if n > 0 => {
                    output
                        .splitter
                        .push(output.stderr, now_nanos(), &buffer[..n], &mut records);
                    true
                }
                Err(err) if err.kind() == io::ErrorKind::Interrupted => true,
                Err(err) if err.kind() == io::ErrorKind::WouldBlock => return true,
                // A terminal whose other side is closed says EIO.
                _ => {
                    output
                        .splitter
                        .finish(output.stderr, now_nanos(), &mut records);
                    false
                }
            };
            self.log.write(&records);
            if !open {
                return false;
            }
        }
        true
    }

    /// `false` when the client has gone or talks nonsense.
    fn command(&mut self, index: usize) -> bool {
        let mut buffer = [0; MAX_COMMAND];
        match self.clients[index].stream.read(&mut buffer) {
            Ok(0) => return false,
            Ok(n) => self.clients[index].pending.extend_from_slice(&buffer[..n]),
            Err(err) => return err.kind() == io::ErrorKind::WouldBlock,
        }
        while let Some(end) = self.clients[index]
            .pending
            .iter()
            .position(|byte| *byte == b'\n')
        {
            let line: Vec<u8> = self.clients[index].pending.drain(..=end).collect();
            let line = String::from_utf8_lossy(&line).into_owned();
            let answer = match self.obey(line.trim_end()) {
                Ok(said) => format!("ok {said}\n"),
                Err(reason) => format!("error {}\n", reason.replace('\n', " ")),
            };
            if self.clients[index]
                .stream
                .write_all(answer.as_bytes())
                .is_err()
            {
                return false;
            }
        }
        self.clients[index].pending.len() <= MAX_COMMAND
    }

    fn obey(&mut self, line: &str) -> Result<String, String> {
        match line.split_once(' ') {
            None if line == "start" => {
                if !self.started {
                    // Written first: whoever finds it knows that the program may have run.
                    File::create(self.config.run_dir.join(names::STARTED))
                        .map_err(|err| format!("mark started: {err}"))?;
                    in_child(|| engine::start(self.config))?;
                    self.started = true;
                }
                Ok(self.init.pid.to_string())
            }
            Some(("signal", number)) => {
                let number: i32 = number.parse().map_err(|_| "bad signal".to_owned())?;
                // Our unreaped child: the number cannot belong to anybody else.
                // SAFETY: sends a signal; invalid numbers are refused by the kernel.
                match unsafe { libc::kill(self.init.pid, number) } {
                    0 => Ok(String::new()),
                    _ => Err(io::Error::last_os_error().to_string()),
                }
            }
            _ => Err("unknown command".to_owned()),
        }
    }
}

fn now_nanos() -> i128 {
    let since = SystemTime::now()
        .duration_since(SystemTime::UNIX_EPOCH)
        .unwrap_or_default();
    i128::try_from(since.as_nanos()).unwrap_or(i128::MAX)
}

fn pipe() -> io::Result<(File, OwnedFd)> {
    let (read, write) = pipe2(OFlag::O_CLOEXEC)?;
    Ok((File::from(read), write))
}

pub(super) fn set_nonblocking(file: &impl AsFd) -> io::Result<()> {
    use nix::fcntl::{FcntlArg, fcntl};
    let flags = OFlag::from_bits_retain(fcntl(file, FcntlArg::F_GETFL)?);
    fcntl(file, FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK))?;
    Ok(())
}

pub(super) fn listen(path: &Path) -> io::Result<UnixListener> {
    remove_tree(path)?;
    UnixListener::bind(path)
}

/// The terminal's master side, as an OCI runtime sends it.
pub(super) fn receive_terminal(listener: &UnixListener) -> io::Result<File> {
    use nix::sys::socket::{ControlMessageOwned, MsgFlags, recvmsg};
    let (stream, _) = listener.accept()?;
    let mut name = [0; 4096];
    let mut data = [io::IoSliceMut::new(&mut name)];
    let mut space = nix::cmsg_space!([i32; 1]);
    let flags = MsgFlags::MSG_CMSG_CLOEXEC;
    let message = recvmsg::<()>(stream.as_raw_fd(), &mut data, Some(&mut space), flags)?;
    for control in message.cmsgs()? {
        if let ControlMessageOwned::ScmRights(fds) = control
            && let Some(fd) = fds.first()
        {
            // SAFETY: just received, owned by nobody else.
            return Ok(unsafe { File::from_raw_fd(*fd) });
        }
    }
    Err(io::Error::other("no terminal was sent"))
}

fn mount_root(config: &ShimConfig, dir: &Path) -> io::Result<()> {
    let rootfs = dir.join(names::ROOTFS);
    // Short names, relative to the layers: all of them must fit in one page.
    let lower: Vec<String> = config
        .layers
        .iter()
        .rev()
        .map(|layer| format!("{layer}/fs"))
        .collect();
    let options = format!(
        "lowerdir={},upperdir={},workdir={}",
        lower.join(":"),
        dir.join("upper").display(),
        dir.join("work").display()
    );
    std::env::set_current_dir(&config.layers_dir)?;
    let none = None::<&str>;
    mount(
        Some("overlay"),
        &rootfs,
        Some("overlay"),
        MsFlags::empty(),
        Some(options.as_str()),
    )?;
    std::env::set_current_dir("/")?;
    Ok(mount(none, &rootfs, none, MsFlags::MS_PRIVATE, none)?)
}

/// Fills in what only the mounted root can tell.
fn complete_spec(config: &ShimConfig, dir: &Path) -> Result<(), String> {
    let path = dir.join("config.json");
    let text = fs::read(&path).map_err(|err| format!("read config.json: {err}"))?;
    let mut spec: serde_json::Value =
        serde_json::from_slice(&text).map_err(|err| format!("read config.json: {err}"))?;
    let root = dir.join(names::ROOTFS);
    let identity = rootfs::resolve_user(&root, &config.user)?;
    let process = &mut spec["process"];
    process["user"] = serde_json::json!({
        "uid": identity.uid, "gid": identity.gid, "additionalGids": identity.groups,
    });
    if let Some(env) = process["env"].as_array_mut() {
        let is_home = |entry: &serde_json::Value| {
            entry
                .as_str()
                .is_some_and(|entry| entry.starts_with("HOME="))
        };
        if !env.iter().any(is_home) {
            env.push(format!("HOME={}", identity.home).into());
        }
    }
    let cwd = process["cwd"].as_str().unwrap_or("/").to_owned();
    rootfs::ensure_dir(&root, Path::new(&cwd))
        .map_err(|err| format!("make working directory {cwd}: {err}"))?;
    fs::write(&path, spec.to_string()).map_err(|err| format!("write config.json: {err}"))
}

fn write_json(path: &Path, value: &impl Serialize) -> io::Result<()> {
    let temporary = path.with_extension("tmp");
    fs::write(
        &temporary,
        serde_json::to_vec(value).map_err(io::Error::other)?,
    )?;
    fs::rename(temporary, path)
}

/// Puts the end of a container on record, whole or not at all.
pub(super) fn write_exit(dir: &Path, exit: Exit) -> io::Result<()> {
    let temporary = dir.join(format!("exit.{}.tmp", std::process::id()));
    let mut file = File::create(&temporary)?;
    writeln!(file, "{} {}", exit.code, u8::from(exit.oom_killed))?;
    drop(file);
    fs::rename(temporary, dir.join(names::EXIT))
}

pub(super) fn read_exit(dir: &Path) -> Option<Exit> {
    let text = fs::read_to_string(dir.join(names::EXIT)).ok()?;
    let (code, oom) = text.trim().split_once(' ')?;
    Some(Exit {
        code: code.parse().ok()?,
        oom_killed: oom == "1",
    })
}

/// For whoever waits for a process that is not its child.
pub(super) fn pidfd(pid: i32) -> io::Result<OwnedFd> {
    // SAFETY: the result is a new descriptor or an error.
    let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, Pid::from_raw(pid).as_raw(), 0) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: just opened; descriptors fit in an i32.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
}
