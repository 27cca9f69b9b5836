//! What can go wrong with the disk, and with starting a manager's raft.

use std::io;
use std::path::PathBuf;

use swarm_store::{MembershipError, ProposeError};
use tokio::sync::watch;

/// Why the log or a snapshot cannot be read or written.
#[derive(Debug, thiserror::Error)]
pub enum DiskError {
    /// What is stored is not what was written. Nothing is guessed and nothing thrown away.
    #[error(
        "{path}: {key} is damaged: {reason}; if other managers run, move the raft directory away and start again: this manager then joins anew and gets everything from them. A sole manager needs the directory from a backup"
    )]
    Damaged {
        /// The file.
        path: PathBuf,
        /// The record inside it.
        key: String,
        /// What does not fit.
        reason: String,
    },
    /// The operating system refused.
    #[error("{path}: cannot {what}")]
    Io {
        /// What was tried.
        what: &'static str,
        /// On which file.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
}

impl DiskError {
    pub(crate) fn io(
        what: &'static str,
        path: impl Into<PathBuf>,
        source: impl Into<io::Error>,
    ) -> Self {
        Self::Io {
            what,
            path: path.into(),
            source: source.into(),
        }
    }

    pub(crate) fn damaged(
        path: impl Into<PathBuf>,
        key: impl Into<String>,
        reason: impl ToString,
    ) -> Self {
        Self::Damaged {
            path: path.into(),
            key: key.into(),
            reason: reason.to_string(),
        }
    }
}

impl From<DiskError> for io::Error {
    fn from(error: DiskError) -> Self {
        let kind = match &error {
            DiskError::Damaged { .. } => io::ErrorKind::InvalidData,
            DiskError::Io { source, .. } => source.kind(),
        };
        Self::new(kind, error)
    }
}

/// Why a manager's raft did not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The log, a snapshot or the member file.
    #[error(transparent)]
    Disk(#[from] DiskError),
    /// The directory belongs to another cluster or node.
    #[error("{path} belongs to {found}, not to {expected}; use another data directory")]
    Foreign {
        /// The member file.
        path: PathBuf,
        /// Whose it is.
        found: String,
        /// Who is starting.
        expected: String,
    },
    /// `bootstrap` or `join` where there is already a member.
    #[error("{0} already holds a member of a raft group; start it, or empty the directory")]
    NotEmpty(PathBuf),
    /// `start` where there is none.
    #[error("{0} holds no member of a raft group; bootstrap or join first")]
    Empty(PathBuf),
    /// Timing or limits that cannot work.
    #[error("the raft configuration is invalid: {0}")]
    Config(String),
    /// The first transaction of the cluster was not committed.
    #[error("the first transaction was not committed")]
    Bootstrap(#[source] ProposeError),
    /// No manager let this one in.
    #[error("no manager took this one in: {0}")]
    Join(String),
    /// The raft core stopped at once.
    #[error("the raft core did not start: {0}")]
    Core(String),
}

/// Why a manager could not be taken out of the group.
pub(crate) fn failed(error: impl ToString) -> MembershipError {
    MembershipError::Failed(error.to_string())
}

/// A failed write or fsync, or damage found while running: nothing is
/// acknowledged after it, and the process has to end.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{path}: {what} failed: {reason}")]
pub struct RaftFatal {
    /// What was tried.
    pub what: String,
    /// On which file or directory.
    pub path: PathBuf,
    /// Why it failed.
    pub reason: String,
}

/// Where the first fatal failure is put; later ones follow from it.
#[derive(Clone, Debug)]
pub(crate) struct FatalReporter(watch::Sender<Option<RaftFatal>>);

impl FatalReporter {
    pub(crate) fn new() -> Self {
        Self(watch::Sender::new(None))
    }

    pub(crate) fn subscribe(&self) -> watch::Receiver<Option<RaftFatal>> {
        self.0.subscribe()
    }

    pub(crate) fn report(&self, what: &str, path: impl Into<PathBuf>, reason: impl ToString) {
        let fatal = RaftFatal {
            what: what.to_owned(),
            path: path.into(),
            reason: reason.to_string(),
        };
        tracing::error!(%fatal, "raft cannot go on");
        self.0.send_if_modified(|first| {
            let is_first = first.is_none();
            if is_first {
                *first = Some(fatal);
            }
            is_first
        });
    }
}

/// The whole chain of an error in one line.
pub(crate) fn chain(error: &(dyn std::error::Error + 'static)) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text.push_str(": ");
        text.push_str(&cause.to_string());
        source = cause.source();
    }
    text
}
