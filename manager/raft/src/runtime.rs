//! A runtime of raft's own: its timers and messages never wait behind the rest of the process.
//! Where there are to be no threads but the caller's, his runtime.

use std::io;

use swarm_disk::Threads;
use tokio::runtime::Handle;

/// Niceness of raft's threads: above everything the process does besides.
const NICE: i32 = -10;
/// Two, so that a long apply on one leaves the other for heartbeats and votes.
const THREADS: usize = 2;

/// A tokio runtime that may be dropped anywhere, because it waits for nobody then.
#[derive(Debug)]
pub(crate) struct RaftRuntime {
    handle: Handle,
    own: Option<tokio::runtime::Runtime>,
}

impl RaftRuntime {
    pub(crate) fn start(threads: Threads) -> io::Result<Self> {
        if threads == Threads::Callers {
            return Ok(Self {
                handle: Handle::current(),
                own: None,
            });
        }
        let own = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(THREADS)
            // Blocking work goes to the main runtime, without the priority.
            .max_blocking_threads(1)
            .thread_name("raft")
            .on_thread_start(raise_priority)
            .enable_all()
            .build()?;
        Ok(Self {
            handle: own.handle().clone(),
            own: Some(own),
        })
    }

    pub(crate) fn handle(&self) -> &Handle {
        &self.handle
    }
}

impl Drop for RaftRuntime {
    fn drop(&mut self) {
        if let Some(runtime) = self.own.take() {
            runtime.shutdown_background();
        }
    }
}

/// Lets the calling thread go before others. Without the right to do so it just stays as it is.
pub(crate) fn raise_priority() {
    if let Err(error) = rustix::process::setpriority_process(None, NICE) {
        tracing::debug!(%error, "raft runs without raised priority");
    }
}
