//! Makes, starts and enters containers: by libcontainer, or by a program like `runc`.
//!
//! libcontainer forks and clones, so everything here runs in single-threaded
//! processes only (the shims). Adds to libcontainer: seccomp filters that are
//! compiled once, also for processes that enter a container, exit codes 126 and
//! 127, and a small init.

use std::ffi::CString;
use std::fs::{self, File};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use libcontainer::capabilities;
use libcontainer::container::Container;
use libcontainer::container::builder::ContainerBuilder;
use libcontainer::oci_spec::runtime::{LinuxCapabilities, Spec};
use libcontainer::syscall::syscall::{SyscallType, create_syscall};
use libcontainer::workload::{Executor, ExecutorError, ExecutorValidationError};
use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, SigmaskHow, Signal, sigaction};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::{ForkResult, Gid, Pid, Uid, fork};
use serde::Deserialize as _;
use serde_json::{Value, json};

use super::bundle::Identity;
use super::pull::chain;
use super::seccomp::{self, Filter};
use super::shim::{ShimConfig, names};

/// The three streams of a process without terminal, or the socket that gets the terminal.
pub(super) enum Stdio3 {
    Pipes {
        stdin: OwnedFd,
        stdout: OwnedFd,
        stderr: OwnedFd,
    },
    Console(PathBuf),
}

/// Makes the container up to its first instruction; its PID is in `pid_file`.
pub(super) fn create(
    config: &ShimConfig,
    dir: &Path,
    pid_file: &Path,
    stdio: Stdio3,
) -> Result<(), String> {
    if let Some(program) = &config.engine {
        let mut command = engine_command(program, config);
        command
            .args(["create", "--bundle"])
            .arg(dir)
            .arg("--pid-file")
            .arg(pid_file);
        attach(&mut command, stdio);
        return run(command.arg(&config.id), config);
    }
    let builder = builder(config)?
        .with_pid_file(Some(pid_file))
        .map_err(|err| chain(&err))?
        .with_executor(Launcher {
            small_init: config.init,
            confinement: Confinement::of(config, dir)?,
            enter: None,
        });
    attach_builder(builder, stdio)
        .as_init(dir)
        .with_systemd(false)
        .with_detach(true)
        .build()
        .map(drop)
        .map_err(|err| chain(&err))
}

/// Lets the first instruction run.
pub(super) fn start(config: &ShimConfig) -> Result<(), String> {
    if let Some(program) = &config.engine {
        let mut command = engine_command(program, config);
        command
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        return run(command.arg("start").arg(&config.id), config);
    }
    let mut container =
        Container::load(config.engine_root.join(&config.id)).map_err(|err| chain(&err))?;
    container.start().map_err(|err| chain(&err))
}

/// Starts a process inside a running container. `process` is an OCI process for `identity`, made
/// from that in the runtime configuration in `dir`. `scratch` is a name for a short-lived file.
pub(super) fn enter(
    config: &ShimConfig,
    dir: &Path,
    mut process: Value,
    identity: &Identity,
    scratch: &Path,
    stdio: Stdio3,
) -> Result<i32, String> {
    let pid_file = scratch.with_extension("pid");
    let result = if let Some(program) = &config.engine {
        process["user"] = json!({
            "uid": identity.uid, "gid": identity.gid, "additionalGids": identity.groups,
        });
        write_json(scratch, &process)?;
        let mut command = engine_command(program, config);
        command.args(["exec", "--detach", "--process"]).arg(scratch);
        command.arg("--pid-file").arg(&pid_file);
        attach(&mut command, stdio);
        run(command.arg(&config.id), config).and_then(|()| read_pid(&pid_file))
    } else {
        process["user"] = json!({ "uid": 0, "gid": 0 });
        widen(&mut process["capabilities"], &["CAP_SETUID", "CAP_SETGID"])?;
        write_json(scratch, &process)?;
        let builder = builder(config)?.with_executor(Launcher {
            small_init: false,
            confinement: Confinement::of(config, dir)?,
            enter: Some(identity.clone()),
        });
        attach_builder(builder, stdio)
            .as_tenant()
            .with_process(Some(scratch))
            .with_detach(true)
            .build()
            .map(|pid| pid.as_raw())
            .map_err(|err| chain(&err))
    };
    let _ = fs::remove_file(scratch);
    let _ = fs::remove_file(&pid_file);
    result
}

pub(super) fn read_pid(file: &Path) -> Result<i32, String> {
    let text = fs::read_to_string(file).map_err(|err| format!("read PID: {err}"))?;
    text.trim().parse().map_err(|_| format!("bad PID {text:?}"))
}

fn write_json(path: &Path, value: &Value) -> Result<(), String> {
    fs::write(path, value.to_string()).map_err(|err| format!("write {}: {err}", path.display()))
}

fn builder(config: &ShimConfig) -> Result<ContainerBuilder, String> {
    ContainerBuilder::new(config.id.clone(), SyscallType::default())
        .with_root_path(&config.engine_root)
        .map_err(|err| chain(&err))
}

fn attach_builder(builder: ContainerBuilder, stdio: Stdio3) -> ContainerBuilder {
    match stdio {
        Stdio3::Pipes {
            stdin,
            stdout,
            stderr,
        } => builder
            .with_stdin(stdin)
            .with_stdout(stdout)
            .with_stderr(stderr),
        Stdio3::Console(path) => builder.with_console_socket(Some(path)),
    }
}

fn engine_command(program: &Path, config: &ShimConfig) -> Command {
    use std::os::unix::process::CommandExt;
    let mut command = Command::new(program);
    command.arg("--root").arg(&config.engine_root);
    command.arg("--log").arg(engine_log(config));
    // SAFETY: only async-signal-safe calls, in a single-threaded process.
    unsafe {
        command.pre_exec(|| {
            reset_signals();
            Ok(())
        });
    }
    command
}

/// Hides the unified cgroup hierarchy from an engine, on a host that has it beside the old ones: crun refuses
/// to work there ("cgroups in hybrid mode not supported"), and containers are in the old ones then. For the
/// mount namespace of a shim.
pub(super) fn hide_hybrid_cgroups() -> Result<(), String> {
    use nix::mount::{MntFlags, umount2};
    use nix::sys::statfs::{CGROUP2_SUPER_MAGIC, statfs};
    let unified = "/sys/fs/cgroup/unified";
    let is_unified =
        |path: &str| statfs(path).is_ok_and(|fs| fs.filesystem_type() == CGROUP2_SUPER_MAGIC);
    if is_unified("/sys/fs/cgroup") || !is_unified(unified) {
        return Ok(());
    }
    umount2(unified, MntFlags::MNT_DETACH).map_err(|err| format!("hide {unified}: {err}"))
}

fn engine_log(config: &ShimConfig) -> PathBuf {
    config
        .run_dir
        .join(format!("engine-{}.log", std::process::id()))
}

fn attach(command: &mut Command, stdio: Stdio3) {
    match stdio {
        Stdio3::Pipes {
            stdin,
            stdout,
            stderr,
        } => {
            command.stdin(stdin).stdout(stdout).stderr(stderr);
        }
        Stdio3::Console(path) => {
            command
                .stdin(Stdio::null())
                .stdout(Stdio::null())
                .stderr(Stdio::null());
            command.arg("--console-socket").arg(path);
        }
    }
}

fn run(command: &mut Command, config: &ShimConfig) -> Result<(), String> {
    let status = command
        .status()
        .map_err(|err| format!("{:?}: {err}", command.get_program()))?;
    let log = engine_log(config);
    let said = fs::read_to_string(&log).unwrap_or_default();
    let _ = fs::remove_file(&log);
    if status.success() {
        return Ok(());
    }
    let last = said
        .lines()
        .rfind(|line| !line.trim().is_empty())
        .unwrap_or("no reason given");
    Err(format!(
        "{:?} failed ({status}): {last}",
        command.get_program()
    ))
}

/// Runs `work` in a forked child, so that its memory is gone afterwards.
pub(super) fn in_child(work: impl FnOnce() -> Result<(), String>) -> Result<(), String> {
    use std::io::{Read, Write};
    let failed = |what: &str, err: nix::Error| format!("{what}: {err}");
    let (read, write) =
        nix::unistd::pipe2(nix::fcntl::OFlag::O_CLOEXEC | nix::fcntl::OFlag::O_NONBLOCK)
            .map_err(|err| failed("make pipe", err))?;
    // SAFETY: the caller is single-threaded.
    match unsafe { fork() }.map_err(|err| failed("fork", err))? {
        ForkResult::Child => {
            drop(read);
            let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(work))
                .unwrap_or_else(|_| Err("internal error".to_owned()));
            let failed = result.is_err();
            if let Err(reason) = result {
                let end = reason.len().min(4096);
                let _ = File::from(write).write_all(&reason.as_bytes()[..end]);
            }
            exit_now(i32::from(failed))
        }
        ForkResult::Parent { child } => {
            drop(write);
            let status = loop {
                match waitpid(child, None) {
                    Err(nix::Error::EINTR) => {}
                    other => break other.map_err(|err| failed("wait", err))?,
                }
            };
            if status == WaitStatus::Exited(child, 0) {
                return Ok(());
            }
            let mut reason = Vec::new();
            // The container's first process may still hold the other end: read what is there.
            let _ = File::from(read).read_to_end(&mut reason);
            match reason.is_empty() {
                true => Err(format!("{status:?}")),
                false => Err(String::from_utf8_lossy(&reason).into_owned()),
            }
        }
    }
}

/// Ends the process without running anything that belongs to the parent it was forked from.
pub(super) fn exit_now(code: i32) -> ! {
    // SAFETY: always sound.
    unsafe { libc::_exit(code) }
}

/// Programs expect no blocked and no ignored signals.
fn reset_signals() {
    let default = SigAction::new(SigHandler::SigDfl, SaFlags::empty(), SigSet::empty());
    for signal in Signal::iterator() {
        // SAFETY: the default action runs no code of ours. KILL and STOP refuse; fine.
        let _ = unsafe { sigaction(signal, &default) };
    }
    let _ = nix::sys::signal::sigprocmask(SigmaskHow::SIG_SETMASK, Some(&SigSet::empty()), None);
}

/// Takes the seccomp filter out of a runtime configuration for libcontainer, which would compile it
/// for each process anew: [`Confinement`] has the compiled one loaded, and that needs capabilities
/// that the container may not have. Returns the filter, and the capabilities that it keeps.
pub(super) fn set_aside(spec: &mut Value) -> Result<(Filter, LinuxCapabilities), String> {
    let bad = |err: serde_json::Error| format!("runtime configuration: {err}");
    let filter = serde_json::from_value(spec["linux"]["seccomp"].take()).map_err(bad)?;
    let capabilities = &mut spec["process"]["capabilities"];
    let kept = LinuxCapabilities::deserialize(&*capabilities).map_err(bad)?;
    widen(capabilities, &[])?;
    Ok((filter, kept))
}

/// Adds what a process needs to confine itself, and more.
fn widen(capabilities: &mut Value, more: &[&str]) -> Result<(), String> {
    for set in ["bounding", "effective", "permitted"] {
        let names = capabilities[set].as_array_mut().ok_or("no capabilities")?;
        for name in ["CAP_SYS_ADMIN", "CAP_SETPCAP"].iter().chain(more) {
            if !names.iter().any(|known| known == name) {
                names.push(json!(name));
            }
        }
    }
    Ok(())
}

/// What a process of a container gives up, at the last: system calls and capabilities.
#[derive(Clone)]
struct Confinement {
    /// A compiled seccomp filter.
    filter: Vec<u8>,
    /// Those that it keeps.
    capabilities: LinuxCapabilities,
}

impl Confinement {
    fn of(config: &ShimConfig, dir: &Path) -> Result<Self, String> {
        let capabilities = config.capabilities.clone();
        let capabilities = capabilities.ok_or("an earlier version of swarmd has made it")?;
        let filter = fs::read(dir.join(names::FILTER));
        Ok(Self {
            filter: filter.map_err(|err| format!("read {}: {err}", names::FILTER))?,
            capabilities,
        })
    }

    fn load_filter(&self) -> Result<(), String> {
        seccomp::load(&self.filter)
    }

    fn drop_capabilities(&self) -> Result<(), String> {
        let syscall = create_syscall();
        capabilities::reset_effective(syscall.as_ref())
            .and_then(|()| capabilities::drop_privileges(&self.capabilities, syscall.as_ref()))
            .map_err(|err| format!("drop capabilities: {err}"))
    }
}

/// Becomes this user, with the capabilities that the process has.
fn become_user(identity: &Identity) -> Result<(), String> {
    let step = |what: &str, err: nix::Error| format!("{what}: {err}");
    let groups = identity.groups.iter().copied().map(Gid::from_raw);
    let groups: Vec<Gid> = groups.collect();
    let (uid, gid) = (Uid::from_raw(identity.uid), Gid::from_raw(identity.gid));
    nix::sys::prctl::set_keepcaps(true).map_err(|err| step("keep capabilities", err))?;
    nix::unistd::setgroups(&groups).map_err(|err| step("set groups", err))?;
    nix::unistd::setresgid(gid, gid, gid).map_err(|err| step("set group", err))?;
    nix::unistd::setresuid(uid, uid, uid).map_err(|err| step("set user", err))?;
    nix::sys::prctl::set_keepcaps(false).map_err(|err| step("keep capabilities", err))
}

/// The last step of libcontainer's processes: becomes the container's program.
#[derive(Clone)]
struct Launcher {
    /// Stay as process 1 and run the program as a child.
    small_init: bool,
    confinement: Confinement,
    /// Enters a running container, as this user. libcontainer itself makes it none but root.
    enter: Option<Identity>,
}

impl Launcher {
    fn enter_as(&self, identity: &Identity) -> Result<(), String> {
        self.confinement.load_filter()?;
        become_user(identity)?;
        self.confinement.drop_capabilities()
    }
}

impl Executor for Launcher {
    fn validate(&self, spec: &Spec) -> Result<(), ExecutorValidationError> {
        if self.enter.is_some() {
            // The client gets exit code 126 or 127, as from a shell.
            return Ok(());
        }
        let process = spec.process().as_ref();
        let name = process
            .and_then(|process| process.args().as_ref())
            .and_then(|args| args.first())
            .ok_or_else(|| ExecutorValidationError::ArgValidationError("no command".into()))?;
        let path = process
            .and_then(|process| process.env().as_ref())
            .and_then(|env| env.iter().find_map(|entry| entry.strip_prefix("PATH=")))
            .unwrap_or_default();
        let is_program = |path: &Path| {
            use std::os::unix::fs::PermissionsExt;
            path.metadata()
                .is_ok_and(|meta| meta.is_file() && meta.permissions().mode() & 0o111 != 0)
        };
        let found = if name.contains('/') {
            is_program(Path::new(name))
        } else {
            path.split(':')
                .any(|dir| is_program(&Path::new(dir).join(name)))
        };
        if !found {
            return Err(ExecutorValidationError::ArgValidationError(format!(
                "{name:?}: executable file not found in the image"
            )));
        }
        // Here, where a failure still is one to make the container.
        let confinement = &self.confinement;
        let confined = confinement.load_filter();
        confined
            .and_then(|()| confinement.drop_capabilities())
            .map_err(ExecutorValidationError::ArgValidationError)
    }

    fn exec(&self, spec: &Spec) -> Result<(), ExecutorError> {
        let args = spec
            .process()
            .as_ref()
            .and_then(|process| process.args().clone());
        let args: Vec<CString> = args
            .unwrap_or_default()
            .into_iter()
            .filter_map(|arg| CString::new(arg).ok())
            .collect();
        if args.is_empty() {
            return Err(ExecutorError::InvalidArg);
        }
        // What the shim holds open is not for the container.
        // SAFETY: descriptors above 2 are not used by this process any more.
        unsafe { libc::close_range(3, u32::MAX, 0) };
        if let Some(identity) = &self.enter
            && let Err(reason) = self.enter_as(identity)
        {
            eprintln!("cannot enter the container: {reason}");
            exit_now(126);
        }
        if self.small_init {
            run_init(&args)
        }
        run_program(&args)
    }
}

fn run_program(args: &[CString]) -> ! {
    reset_signals();
    let err = match nix::unistd::execvp(&args[0], args) {
        Err(err) => err,
        Ok(never) => match never {},
    };
    eprintln!("cannot run {:?}: {}", args[0], err.desc());
    exit_now(if err == nix::Error::ENOENT { 127 } else { 126 })
}

/// Process 1: passes signals on, reaps orphans, ends as its one child ends.
fn run_init(args: &[CString]) -> ! {
    reset_signals();
    let all = SigSet::all();
    let _ = all.thread_block();
    // SAFETY: this process has one thread.
    let child = match unsafe { fork() } {
        Ok(ForkResult::Child) => run_program(args),
        Ok(ForkResult::Parent { child }) => child,
        Err(err) => {
            eprintln!("init cannot fork: {}", err.desc());
            exit_now(126)
        }
    };
    loop {
        let mut number = 0;
        // SAFETY: both pointers are to live values.
        if unsafe { libc::sigwait(std::ptr::from_ref(all.as_ref()), &raw mut number) } != 0 {
            continue;
        }
        if number != libc::SIGCHLD {
            // SAFETY: sends a signal to our own child, which is not reaped yet.
            unsafe { libc::kill(child.as_raw(), number) };
            continue;
        }
        while let Ok(status) = waitpid(None, Some(WaitPidFlag::WNOHANG)) {
            match exit_code(status) {
                Some((pid, code)) if pid == child => exit_now(code),
                Some(_) => {}
                None => break,
            }
        }
    }
}

/// Who ended and how, if the status is of an end.
pub(super) fn exit_code(status: WaitStatus) -> Option<(Pid, i32)> {
    match status {
        WaitStatus::Exited(pid, code) => Some((pid, code)),
        WaitStatus::Signaled(pid, signal, _) => Some((pid, 128 + signal as i32)),
        _ => None,
    }
}
