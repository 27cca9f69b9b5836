//! `swarm exec`: a process in the container of one of this node's tasks.
//!
//! With a terminal on both sides the local one is put into raw mode, and back
//! into its own when the command ends, however it ends.

use std::io::{IsTerminal as _, Read as _, Write as _};
use std::os::fd::AsFd as _;

use nix::sys::termios::{self, SetArg, Termios};
use swarm_proto::v1::{ExecRequest, ExecResize, ExecStart, exec_request, exec_response};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;

use crate::daemon::Daemon;
use crate::failure::{Failure, Result};
use crate::logs;

/// Pieces of input on their way; the terminal waits when the other side does.
const QUEUE: usize = 16;
const PIECE: usize = 16 << 10;

/// Execute a command in a running task of this node
#[derive(clap::Args, Debug)]
pub struct Exec {
    /// Keep STDIN open
    #[arg(short, long)]
    interactive: bool,
    /// Allocate a pseudo-TTY
    #[arg(short, long)]
    tty: bool,
    /// Set environment variables
    #[arg(short, long)]
    env: Vec<String>,
    /// Username or UID (format: "<name|uid>[:<group|gid>]")
    #[arg(short, long, default_value = "")]
    user: String,
    /// Working directory inside the container
    #[arg(short, long, default_value = "")]
    workdir: String,
    /// The task (its ID, a prefix of it, or its name "web.1"), then the command and its arguments
    #[arg(
        required = true,
        num_args = 2..,
        trailing_var_arg = true,
        value_names = ["TASK", "COMMAND"]
    )]
    task_and_command: Vec<String>,
}

/// A terminal in raw mode, until dropped.
struct Raw(Termios);

impl Raw {
    fn enter() -> Option<Self> {
        let stdin = std::io::stdin();
        let before = termios::tcgetattr(stdin.as_fd()).ok()?;
        let mut raw = before.clone();
        termios::cfmakeraw(&mut raw);
        termios::tcsetattr(stdin.as_fd(), SetArg::TCSANOW, &raw).ok()?;
        Some(Self(before))
    }
}

impl Drop for Raw {
    fn drop(&mut self) {
        let _ = termios::tcsetattr(std::io::stdin().as_fd(), SetArg::TCSANOW, &self.0);
    }
}

fn size() -> Option<ExecResize> {
    let (width, height) = terminal_size::terminal_size()?;
    Some(ExecResize {
        rows: height.0.into(),
        columns: width.0.into(),
    })
}

fn message(message: exec_request::Message) -> ExecRequest {
    ExecRequest {
        message: Some(message),
    }
}

/// Runs the command and ends with its exit status.
pub async fn run(flags: Exec, daemon: &Daemon) -> Result {
    let terminal = std::io::stdin().is_terminal();
    if flags.tty && flags.interactive && !terminal {
        return Err("the input device is not a TTY".into());
    }
    let (task, command) = flags
        .task_and_command
        .split_first()
        .ok_or("a task and a command are needed")?;
    let start = ExecStart {
        task: task.clone(),
        command: command.to_vec(),
        tty: flags.tty,
        env: flags.env.clone(),
        user: flags.user.clone(),
        dir: flags.workdir.clone(),
        size: if flags.tty { size() } else { None },
    };
    let (input, requests) = mpsc::channel(QUEUE);
    // The queue is empty: there is room.
    let _ = input.try_send(message(exec_request::Message::Start(start)));
    let raw = (flags.tty && terminal && flags.interactive)
        .then(Raw::enter)
        .flatten();
    if flags.interactive {
        let input = input.clone();
        // A thread of its own: reading a terminal cannot be called off. It ends with the process.
        std::thread::spawn(move || read_input(&input));
    } else {
        let _ = input.try_send(message(exec_request::Message::StdinClosed(true)));
    }
    // Input flows from the start: the other side may want some before it answers.
    let answer = daemon.local().exec(ReceiverStream::new(requests)).await?;
    let mut output = answer.into_inner();
    let mut resized = signal(SignalKind::window_change())
        .map_err(|error| format!("cannot watch the terminal's size: {error}"))?;
    let code = loop {
        let piece = tokio::select! {
            piece = output.message() => piece?,
            Some(()) = resized.recv(), if flags.tty => {
                if let Some(size) = size() {
                    // When the queue is full the next change will tell.
                    let _ = input.try_send(message(exec_request::Message::Resize(size)));
                }
                continue;
            }
        };
        match piece.and_then(|piece| piece.message) {
            Some(exec_response::Message::Stdout(bytes)) => logs::write(&bytes)?,
            Some(exec_response::Message::Stderr(bytes)) => {
                let _ = std::io::stderr().lock().write_all(&bytes);
            }
            Some(exec_response::Message::ExitCode(code)) => break code,
            None => return Err("the connection to the container was lost".into()),
        }
    };
    drop(raw);
    match u8::try_from(code) {
        Ok(0) => Ok(()),
        Ok(code) => Err(Failure::Exit(code)),
        Err(_) => Err(Failure::Exit(1)),
    }
}

fn read_input(input: &mpsc::Sender<ExecRequest>) {
    let mut stdin = std::io::stdin().lock();
    let mut buffer = vec![0; PIECE];
    loop {
        let next = match stdin.read(&mut buffer) {
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => continue,
            Ok(0) | Err(_) => exec_request::Message::StdinClosed(true),
            Ok(length) => exec_request::Message::Stdin(buffer[..length].to_vec().into()),
        };
        let last = matches!(next, exec_request::Message::StdinClosed(_));
        if input.blocking_send(message(next)).is_err() || last {
            return;
        }
    }
}
