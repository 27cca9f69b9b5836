//! The process that stands between the agent and one process entering a container.
//!
//! Speaks frames on its standard streams: one letter, a length (4 bytes, big
//! endian), that many bytes. In: `s` what to run (first, JSON), `i` input, `c` no
//! more input, `r` terminal size (rows and columns, 2 bytes each). Out: `p` which process
//! it is (first, JSON), `o` and `e` output, `x` exit code (4 bytes), `f` why it could not be
//! started. When the agent goes away (end of input, broken output) the process is killed;
//! when this process goes away, the agent kills it.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use nix::fcntl::OFlag;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::wait::{WaitPidFlag, waitpid};
use nix::unistd::pipe2;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::bundle::{UserSpec, merge_env};
use super::engine::{self, Stdio3};
use super::shim::{self, Process, names};
use super::{rootfs, store};

/// Longest frame in either direction.
pub(super) const MAX_FRAME: usize = 1 << 20;

/// What to run.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct ExecRequest {
    pub command: Vec<String>,
    pub env: Vec<String>,
    pub user: String,
    pub dir: String,
    pub tty: Option<(u16, u16)>,
}

/// One frame, ready to be sent.
pub(super) fn frame(kind: u8, data: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(5 + data.len());
    bytes.push(kind);
    bytes.extend_from_slice(&u32::try_from(data.len()).unwrap_or(u32::MAX).to_be_bytes());
    bytes.extend_from_slice(data);
    bytes
}

/// Takes the first whole frame out of `bytes`. An error if it is longer than allowed.
pub(super) fn take_frame(bytes: &mut Vec<u8>) -> Result<Option<(u8, Vec<u8>)>, &'static str> {
    let Some(header) = bytes.get(..5) else {
        return Ok(None);
    };
    let kind = header[0];
    let length = u32::from_be_bytes([header[1], header[2], header[3], header[4]]) as usize;
    if length > MAX_FRAME {
        return Err("a frame is too long");
    }
    if bytes.len() < 5 + length {
        return Ok(None);
    }
    let data = bytes[5..5 + length].to_vec();
    bytes.drain(..5 + length);
    Ok(Some((kind, data)))
}

pub(super) fn run(dir: &Path) -> ExitCode {
    let channels = || -> io::Result<(File, File)> {
        let input = io::stdin().as_fd().try_clone_to_owned()?;
        let output = io::stdout().as_fd().try_clone_to_owned()?;
        shim::null_stdio()?;
        Ok((File::from(input), File::from(output)))
    };
    let Ok((mut input, mut output)) = channels() else {
        return ExitCode::FAILURE;
    };
    match Session::start(dir, &mut input) {
        Ok(session) => {
            // None if it has ended already.
            if let Some(process) = Process::find(session.pid) {
                let process = serde_json::to_vec(&process).expect("plain data");
                // The agent may be gone: that is seen when it is served.
                let _ = output.write_all(&frame(b'p', &process));
            }
            let code = session.serve(input, &mut output);
            if let Some(code) = code {
                let _ = output.write_all(&frame(b'x', &code.to_be_bytes()));
            }
            ExitCode::SUCCESS
        }
        Err(reason) => {
            let end = (0..=reason.len().min(4096))
                .rev()
                .find(|end| reason.is_char_boundary(*end));
            let _ = output.write_all(&frame(b'f', &reason.as_bytes()[..end.unwrap_or(0)]));
            ExitCode::FAILURE
        }
    }
}

/// Kills an entered process and its process group, which it leads. The caller knows that the number is still its own.
pub(super) fn kill(pid: i32) {
    // SAFETY: sends signals.
    unsafe {
        libc::kill(-pid, libc::SIGKILL);
        libc::kill(pid, libc::SIGKILL);
    }
}

struct Session {
    pid: i32,
    signals: nix::sys::signalfd::SignalFd,
    /// The process's input; `None` once closed.
    stdin: Option<File>,
    /// A terminal is never closed: end of input is a character there.
    terminal: bool,
    outputs: Vec<(u8, File)>,
    /// Frames not yet taken apart.
    received: Vec<u8>,
    /// Input that the process has not taken yet.
    pending: Vec<u8>,
    closing: bool,
}

impl Session {
    fn start(dir: &Path, input: &mut File) -> Result<Self, String> {
        let step = |what: &'static str| move |err: io::Error| format!("{what}: {err}");
        nix::unistd::setsid().map_err(|err| format!("start session: {err}"))?;
        let signals = shim::become_reaper()?;
        let mut received = Vec::new();
        let request = loop {
            if let Some((kind, data)) = take_frame(&mut received)? {
                if kind != b's' {
                    return Err("no request".into());
                }
                break serde_json::from_slice::<ExecRequest>(&data)
                    .map_err(|err| format!("bad request: {err}"))?;
            }
            let mut buffer = [0; 4096];
            match input.read(&mut buffer).map_err(step("read request"))? {
                0 => return Err("no request".into()),
                n => received.extend_from_slice(&buffer[..n]),
            }
        };
        let config = shim::load(dir)?;
        if config.engine.is_some() {
            engine::hide_hybrid_cgroups()?;
        }
        let spec_path = dir.join("config.json");
        let text = fs::read(&spec_path).map_err(step("read config.json"))?;
        let raw: Value = serde_json::from_slice(&text).map_err(|err| err.to_string())?;
        let init: Process = fs::read(config.run_dir.join(names::INIT))
            .ok()
            .and_then(|bytes| serde_json::from_slice(&bytes).ok())
            .filter(Process::is_alive)
            .ok_or("the container is not running")?;

        let mut user = config.user.clone();
        if !request.user.is_empty() {
            user = UserSpec {
                user: request.user.clone(),
                groups: Vec::new(),
            };
        }
        let root = PathBuf::from(format!("/proc/{}/root", init.pid));
        let identity = rootfs::resolve_user(&root, &user)?;
        let mut process = raw["process"].clone();
        let mut env: Vec<String> =
            serde_json::from_value(process["env"].take()).map_err(|err| err.to_string())?;
        if !request.user.is_empty() {
            merge_env(&mut env, &format!("HOME={}", identity.home))
                .map_err(|err| err.to_string())?;
        }
        if request.tty.is_some() && !env.iter().any(|entry| entry.starts_with("TERM=")) {
            env.push("TERM=xterm".to_owned());
        }
        for entry in &request.env {
            merge_env(&mut env, entry).map_err(|err| err.to_string())?;
        }
        process["env"] = env.into();
        process["args"] = request.command.into();
        process["terminal"] = request.tty.is_some().into();
        if !request.dir.is_empty() {
            process["cwd"] = request.dir.into();
        }

        let own = std::process::id();
        let scratch = config.run_dir.join(format!("exec-{own}.json"));
        let console_path = config.run_dir.join(format!("exec-{own}.sock"));
        if request.tty.is_some() {
            let console = shim::listen(&console_path).map_err(step("make console socket"))?;
            let stdio = Stdio3::Console(console_path.clone());
            let pid = engine::enter(&config, dir, process, &identity, &scratch, stdio);
            let _ = store::remove_tree(&console_path);
            let pid = pid?;
            let terminal = shim::receive_terminal(&console).map_err(step("get terminal"))?;
            shim::set_nonblocking(&terminal).map_err(step("set up terminal"))?;
            let session = Self {
                pid,
                signals,
                stdin: Some(terminal.try_clone().map_err(step("set up terminal"))?),
                terminal: true,
                outputs: vec![(b'o', terminal)],
                received,
                pending: Vec::new(),
                closing: false,
            };
            if let Some((rows, columns)) = request.tty {
                session.resize(rows, columns);
            }
            return Ok(session);
        }
        let pipe = || -> io::Result<(OwnedFd, OwnedFd)> { Ok(pipe2(OFlag::O_CLOEXEC)?) };
        let (stdin_end, stdin) = pipe().map_err(step("make pipe"))?;
        let (stdout, stdout_end) = pipe().map_err(step("make pipe"))?;
        let (stderr, stderr_end) = pipe().map_err(step("make pipe"))?;
        for end in [&stdin, &stdout, &stderr] {
            shim::set_nonblocking(end).map_err(step("set up pipe"))?;
        }
        let stdio = Stdio3::Pipes {
            stdin: stdin_end,
            stdout: stdout_end,
            stderr: stderr_end,
        };
        let pid = engine::enter(&config, dir, process, &identity, &scratch, stdio)?;
        Ok(Self {
            pid,
            signals,
            stdin: Some(File::from(stdin)),
            terminal: false,
            outputs: vec![(b'o', File::from(stdout)), (b'e', File::from(stderr))],
            received,
            pending: Vec::new(),
            closing: false,
        })
    }

    /// Returns the exit code, or `None` if the agent has gone.
    fn serve(mut self, mut input: File, output: &mut File) -> Option<i32> {
        let mut buffer = vec![0; 32 << 10];
        loop {
            if self.take_input().is_err() {
                return self.abandon();
            }
            let ready = self.wait(&input);
            if ready.input {
                match input.read(&mut buffer) {
                    Ok(n) if n > 0 => self.received.extend_from_slice(&buffer[..n]),
                    Err(err) if err.kind() == io::ErrorKind::Interrupted => {}
                    _ => return self.abandon(),
                }
            }
            if ready.output_gone {
                return self.abandon();
            }
            for index in (0..self.outputs.len()).rev() {
                if ready.outputs[index] && !self.pump(index, &mut buffer, output, 1).ok()? {
                    self.outputs.remove(index);
                }
            }
            if ready.signal
                && let Some(code) = self.reap()
            {
                for index in 0..self.outputs.len() {
                    self.pump(index, &mut buffer, output, usize::MAX).ok()?;
                }
                return Some(code);
            }
        }
    }

    fn wait(&self, input: &File) -> Ready {
        // Input is read only when the last was taken: a full pipe holds up the sender.
        let want_input = if self.pending.is_empty() {
            PollFlags::POLLIN
        } else {
            PollFlags::empty()
        };
        let mut fds = vec![
            PollFd::new(self.signals.as_fd(), PollFlags::POLLIN),
            PollFd::new(input.as_fd(), want_input),
        ];
        fds.extend(
            self.outputs
                .iter()
                .map(|(_, o)| PollFd::new(o.as_fd(), PollFlags::POLLIN)),
        );
        if let Some(stdin) = &self.stdin
            && !self.pending.is_empty()
        {
            fds.push(PollFd::new(stdin.as_fd(), PollFlags::POLLOUT));
        }
        if poll(&mut fds, PollTimeout::NONE).is_err() {
            return Ready {
                outputs: vec![false; self.outputs.len()],
                ..Ready::default()
            };
        }
        let events = |index: usize| fds[index].revents().unwrap_or(PollFlags::empty());
        Ready {
            signal: !events(0).is_empty(),
            input: events(1).contains(PollFlags::POLLIN)
                || (self.pending.is_empty() && !events(1).is_empty()),
            output_gone: !self.pending.is_empty() && events(1).contains(PollFlags::POLLHUP),
            outputs: (0..self.outputs.len())
                .map(|index| !events(2 + index).is_empty())
                .collect(),
        }
    }

    /// Handles whole frames until input is held up.
    fn take_input(&mut self) -> Result<(), &'static str> {
        loop {
            self.write_pending();
            if !self.pending.is_empty() {
                return Ok(());
            }
            let Some((kind, data)) = take_frame(&mut self.received)? else {
                return Ok(());
            };
            match (kind, data.as_slice()) {
                (b'i', _) if !self.closing => self.pending = data,
                (b'i', _) => {}
                (b'c', _) => self.closing = true,
                (b'r', &[a, b, c, d]) => {
                    self.resize(u16::from_be_bytes([a, b]), u16::from_be_bytes([c, d]));
                }
                _ => return Err("unknown frame"),
            }
        }
    }

    fn write_pending(&mut self) {
        while let Some(stdin) = &mut self.stdin
            && !self.pending.is_empty()
        {
            match stdin.write(&self.pending) {
                Ok(n) => drop(self.pending.drain(..n)),
                Err(err) if err.kind() == io::ErrorKind::WouldBlock => return,
                Err(err) if err.kind() == io::ErrorKind::Interrupted => {}
                // The process has closed its input.
                Err(_) => self.stdin = None,
            }
        }
        if self.stdin.is_none() {
            self.pending.clear();
        }
        if self.closing && self.pending.is_empty() && !self.terminal {
            self.stdin = None;
        }
    }

    fn resize(&self, rows: u16, columns: u16) {
        if let Some(terminal) = self.stdin.as_ref().filter(|_| self.terminal) {
            let size = libc::winsize {
                ws_row: rows,
                ws_col: columns,
                ws_xpixel: 0,
                ws_ypixel: 0,
            };
            // SAFETY: the descriptor is a terminal's and the size lives through the call.
            unsafe { libc::ioctl(terminal.as_raw_fd(), libc::TIOCSWINSZ, &raw const size) };
        }
    }

    /// `Ok(false)` when the stream has ended; an error when the agent has gone.
    fn pump(
        &mut self,
        index: usize,
        buffer: &mut [u8],
        output: &mut File,
        rounds: usize,
    ) -> io::Result<bool> {
        let kind = self.outputs[index].0;
        for _ in 0..rounds {
            match self.outputs[index].1.read(buffer) {
                Ok(n) if n > 0 => {
                    if let Err(err) = output.write_all(&frame(kind, &buffer[..n])) {
                        self.abandon();
                        return Err(err);
                    }
                }
                Err(err) if err.kind() == io::ErrorKind::WouldBlock => return Ok(true),
                Err(err) if err.kind() == io::ErrorKind::Interrupted => {}
                _ => return Ok(false),
            }
        }
        Ok(true)
    }

    fn reap(&mut self) -> Option<i32> {
        while let Ok(Some(_)) = self.signals.read_signal() {}
        let mut code = None;
        while let Ok(status) = waitpid(None, Some(WaitPidFlag::WNOHANG)) {
            match engine::exit_code(status) {
                Some((pid, ended)) if pid.as_raw() == self.pid => code = Some(ended),
                Some(_) => {}
                None => break,
            }
        }
        code
    }

    /// Nobody listens any more: kills the process and those it started in its session.
    fn abandon(&mut self) -> Option<i32> {
        // Our unreaped child.
        kill(self.pid);
        while let Ok(status) = waitpid(None, None) {
            if engine::exit_code(status).is_some_and(|(pid, _)| pid.as_raw() == self.pid) {
                break;
            }
        }
        None
    }
}

#[derive(Default)]
struct Ready {
    signal: bool,
    input: bool,
    output_gone: bool,
    outputs: Vec<bool>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_are_taken_whole_and_in_order() {
        let mut bytes = [frame(b'i', b"abc"), frame(b'c', b""), frame(b'i', b"x")].concat();
        bytes.pop();
        assert_eq!(take_frame(&mut bytes), Ok(Some((b'i', b"abc".to_vec()))));
        assert_eq!(take_frame(&mut bytes), Ok(Some((b'c', Vec::new()))));
        assert_eq!(take_frame(&mut bytes), Ok(None));
        bytes.push(b'x');
        assert_eq!(take_frame(&mut bytes), Ok(Some((b'i', b"x".to_vec()))));
    }

    #[test]
    fn an_endless_frame_is_refused() {
        assert!(take_frame(&mut vec![b'i', 0xff, 0, 0, 0]).is_err());
    }
}
