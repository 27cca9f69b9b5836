//! The agent's end of a process that enters a container; the other end is
//! [`super::execshim`].

use std::path::Path;
use std::process::Stdio;

use bytes::Bytes;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::process::{Child, ChildStdin, ChildStdout, Command};
use tokio::sync::mpsc;

use super::execshim::{self, ExecRequest, MAX_FRAME, frame};
use super::shim::Process;
use super::{ExecConfig, ExecInput, ExecOutput, ExecSession, RuntimeError};

/// Pieces in flight per direction: enough to keep a terminal fluent, and at most 0.5 MiB of output.
const QUEUE: usize = 16;

fn failed(reason: impl std::fmt::Display) -> RuntimeError {
    RuntimeError::Failed {
        step: "exec",
        reason: reason.to_string(),
    }
}

/// Starts the process. Fails only if there is nobody to start it; why it could not
/// run comes out of the session as exit code 126 or 127 with a sentence before.
pub(super) async fn start(
    shim_exe: &Path,
    dir: &Path,
    run_dir: &Path,
    config: ExecConfig,
) -> Result<ExecSession, RuntimeError> {
    if config.command.is_empty() || config.command[0].is_empty() {
        return Err(RuntimeError::InvalidConfig("no command to execute".into()));
    }
    if !config.dir.is_empty() && !config.dir.starts_with('/') {
        return Err(RuntimeError::InvalidConfig(format!(
            "the working directory {:?} is not an absolute path",
            config.dir
        )));
    }
    let request = ExecRequest {
        command: config.command,
        env: config.env,
        user: config.user,
        dir: config.dir,
        tty: config.tty,
    };
    let request = serde_json::to_vec(&request).map_err(failed)?;
    if request.len() > MAX_FRAME {
        return Err(RuntimeError::InvalidConfig(
            "the command is too long".into(),
        ));
    }
    let mut child = Command::new(shim_exe)
        .arg("exec-shim")
        .args([dir, run_dir])
        .env_clear()
        .current_dir("/")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .map_err(failed)?;
    let mut stdin = child.stdin.take().expect("piped");
    let stdout = child.stdout.take().expect("piped");
    stdin
        .write_all(&frame(b's', &request))
        .await
        .map_err(failed)?;
    let (input, input_receiver) = mpsc::channel(QUEUE);
    let (output_sender, output) = mpsc::channel(QUEUE);
    // Ends with the session: when its receiver is dropped or the process has ended.
    tokio::spawn(serve(child, stdin, stdout, input_receiver, output_sender));
    Ok(ExecSession { input, output })
}

async fn serve(
    mut child: Child,
    stdin: ChildStdin,
    stdout: ChildStdout,
    input: mpsc::Receiver<ExecInput>,
    output: mpsc::Sender<ExecOutput>,
) {
    let gone = output.clone();
    let mut entered = None;
    tokio::select! {
        () = gone.closed() => {}
        // Input alone never ends the session: the shim takes a closed pipe as "agent gone".
        () = send_input(stdin, input) => {}
        () = receive_output(stdout, &output, &mut entered) => {}
    }
    // Both pipes are closed now: the shim kills its process, if it still runs, and ends.
    if let Err(err) = child.wait().await {
        tracing::warn!(%err, "cannot wait for exec shim");
    }
    // Unless it was killed itself.
    if let Some(process) = entered.filter(Process::is_alive) {
        execshim::kill(process.pid);
    }
}

async fn send_input(mut stdin: ChildStdin, mut input: mpsc::Receiver<ExecInput>) {
    loop {
        let bytes = match input.recv().await {
            Some(ExecInput::Stdin(data)) => {
                let mut bytes = Vec::new();
                for piece in data.chunks(MAX_FRAME) {
                    bytes.extend(frame(b'i', piece));
                }
                bytes
            }
            Some(ExecInput::Close) => frame(b'c', &[]),
            Some(ExecInput::Resize(rows, columns)) => {
                frame(b'r', &[rows.to_be_bytes(), columns.to_be_bytes()].concat())
            }
            None => break,
        };
        if stdin.write_all(&bytes).await.is_err() {
            break;
        }
    }
    let _ = stdin.write_all(&frame(b'c', &[])).await;
    // Nothing more to send, but the pipe stays open as long as somebody listens.
    std::future::pending::<()>().await;
}

/// Until the process has ended, or its shim, which leaves it in `entered`.
async fn receive_output(
    mut stdout: ChildStdout,
    output: &mpsc::Sender<ExecOutput>,
    entered: &mut Option<Process>,
) {
    loop {
        let mut header = [0; 5];
        let mut data = Vec::new();
        let mut whole = stdout.read_exact(&mut header).await.is_ok();
        let length = u32::from_be_bytes([header[1], header[2], header[3], header[4]]) as usize;
        if whole && length <= MAX_FRAME {
            data.resize(length, 0);
            whole = stdout.read_exact(&mut data).await.is_ok();
        }
        if !whole || length > MAX_FRAME {
            let sentence = "exec ended: the process that looks after it is gone\n";
            let _ = output.send(ExecOutput::Stderr(sentence.into())).await;
            let _ = output.send(ExecOutput::Exit(255)).await;
            return;
        }
        let message = match (header[0], data.as_slice()) {
            (b'o', _) => ExecOutput::Stdout(Bytes::from(data)),
            (b'e', _) => ExecOutput::Stderr(Bytes::from(data)),
            (b'p', json) => {
                *entered = serde_json::from_slice(json).ok();
                continue;
            }
            (b'x', &[a, b, c, d]) => ExecOutput::Exit(i32::from_be_bytes([a, b, c, d])),
            _ => {
                data.push(b'\n');
                let _ = output.send(ExecOutput::Stderr(Bytes::from(data))).await;
                ExecOutput::Exit(126)
            }
        };
        let last = matches!(message, ExecOutput::Exit(_));
        if output.send(message).await.is_err() || last {
            return;
        }
    }
}
