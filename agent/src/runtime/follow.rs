//! A container's log as a stream, which may go on until the container has ended.
//!
//! Watches the log's directory and the container's with inotify. Owns no loop: it
//! reads when the stream is polled, so a slow reader costs nothing.

use std::collections::VecDeque;
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::path::PathBuf;

use futures::stream;
use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use super::logfile::LogReader;
use super::shim::{names, read_exit};
use super::{LogLine, LogOptions, LogStream, RuntimeError};

/// Lines read at once on the blocking pool.
const BATCH: usize = 256;

struct Watch(Inotify);

impl AsRawFd for Watch {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_fd().as_raw_fd()
    }
}

struct Follower {
    dir: PathBuf,
    reader: Option<LogReader>,
    ready: VecDeque<LogLine>,
    watch: Option<AsyncFd<Watch>>,
    since: Option<i128>,
}

fn failed(err: impl std::fmt::Display) -> RuntimeError {
    RuntimeError::Failed {
        step: "read log",
        reason: err.to_string(),
    }
}

pub(super) async fn stream(dir: PathBuf, options: LogOptions) -> Result<LogStream, RuntimeError> {
    let log = dir.join(names::LOG);
    let watch = if options.follow {
        let watch =
            Inotify::init(InitFlags::IN_CLOEXEC | InitFlags::IN_NONBLOCK).map_err(failed)?;
        // Before the first read: what comes after it wakes us.
        let events = AddWatchFlags::IN_MODIFY
            | AddWatchFlags::IN_CREATE
            | AddWatchFlags::IN_MOVED_TO
            | AddWatchFlags::IN_DELETE_SELF
            | AddWatchFlags::IN_MOVE_SELF;
        watch.add_watch(&log, events).map_err(failed)?;
        watch.add_watch(&dir, events).map_err(failed)?;
        // SAFETY: the watch owns one open descriptor for as long as it lives.
        let watch = unsafe { AsyncFd::register_with_interest(Watch(watch), Interest::READABLE) };
        Some(watch.map_err(failed)?)
    } else {
        None
    };
    let tail = options.tail;
    let reader = tokio::task::spawn_blocking(move || LogReader::open(&log, tail))
        .await
        .expect("reading files does not panic")
        .map_err(failed)?;
    let follower = Follower {
        dir,
        reader: Some(reader),
        ready: VecDeque::new(),
        watch,
        since: options.since_nanos,
    };
    Ok(Box::pin(stream::try_unfold(
        follower,
        |mut follower| async move { Ok(follower.next().await?.map(|line| (line, follower))) },
    )))
}

impl Follower {
    async fn next(&mut self) -> Result<Option<LogLine>, RuntimeError> {
        loop {
            if let Some(line) = self.ready.pop_front() {
                if self.since.is_none_or(|since| line.time_nanos >= since) {
                    return Ok(Some(line));
                }
                continue;
            }
            // Looked at before reading: what was written before the end is read after it.
            let ended = read_exit(&self.dir).is_some() || !self.dir.exists();
            let mut reader = self
                .reader
                .take()
                .ok_or_else(|| failed("reading failed before"))?;
            let (reader, lines) = tokio::task::spawn_blocking(move || {
                let mut lines = VecDeque::new();
                while lines.len() < BATCH
                    && let Some(line) = reader.next()?
                {
                    lines.push_back(line);
                }
                std::io::Result::Ok((reader, lines))
            })
            .await
            .expect("reading files does not panic")
            .map_err(failed)?;
            self.reader = Some(reader);
            self.ready = lines;
            if !self.ready.is_empty() {
                continue;
            }
            match &mut self.watch {
                Some(watch) if !ended => {
                    let mut guard = watch.readable_mut().await.map_err(failed)?;
                    while guard.get_inner().0.read_events().is_ok() {}
                    guard.clear_ready();
                }
                _ => return Ok(None),
            }
        }
    }
}
