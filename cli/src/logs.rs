//! `swarm logs`: the output of one task of this node.

use std::io::Write as _;

use swarm_proto::v1::LogsRequest;

use crate::daemon::Daemon;
use crate::failure::{Failure, Result};
use crate::output::human::{now, parse_since, rfc3339};

/// Fetch the logs of a task that runs on this node
#[derive(clap::Args, Debug)]
pub struct Logs {
    /// Follow log output
    #[arg(short, long)]
    follow: bool,
    /// Show logs since timestamp (e.g. "2026-01-02T13:23:37Z") or relative (e.g. "42m" for 42 minutes)
    #[arg(long)]
    since: Option<String>,
    /// Number of lines to show from the end of the logs, or "all"
    #[arg(short = 'n', long, default_value = "all")]
    tail: String,
    /// Show timestamps
    #[arg(short, long)]
    timestamps: bool,
    /// The task: its ID, a prefix of it, or its name ("web.1")
    task: String,
}

/// Prints what the container wrote, to the same streams.
pub async fn run(flags: Logs, daemon: &Daemon) -> Result {
    let tail = match flags.tail.as_str() {
        "all" => None,
        number => Some(number.parse().map_err(|_| {
            format!("invalid value {number:?} for --tail: it must be a number or \"all\"")
        })?),
    };
    let since = flags
        .since
        .as_deref()
        .map(|text| parse_since(text, now()))
        .transpose()?;
    let request = LogsRequest {
        task: flags.task,
        follow: flags.follow,
        tail,
        since,
    };
    let mut stream = daemon.local().logs(request).await?.into_inner();
    while let Some(piece) = stream.message().await? {
        let mut line = Vec::with_capacity(piece.data.len() + 40);
        if flags.timestamps {
            line.extend_from_slice(rfc3339(piece.timestamp.as_ref()).as_bytes());
            line.push(b' ');
        }
        line.extend_from_slice(&piece.data);
        if piece.stderr {
            let _ = std::io::stderr().lock().write_all(&line);
        } else {
            write(&line)?;
        }
    }
    Ok(())
}

/// Writes bytes to standard output at once.
pub fn write(bytes: &[u8]) -> Result {
    let mut out = std::io::stdout().lock();
    out.write_all(bytes)
        .and_then(|()| out.flush())
        .map_err(|error| {
            if error.kind() == std::io::ErrorKind::BrokenPipe {
                Failure::Exit(0)
            } else {
                Failure::Plain(format!("cannot write the output: {error}"))
            }
        })
}
