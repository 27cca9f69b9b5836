//! How a command ends badly: one sentence on standard error, and an exit status.

use tonic::Status;

/// Why a command did not do what it was asked.
#[derive(Debug)]
pub enum Failure {
    /// The daemon refused, or could not.
    Daemon(Box<Status>),
    /// What the command line itself found, whole.
    Plain(String),
    /// Everything has been said; only the exit status is left.
    Exit(u8),
}

/// What commands return.
pub type Result<T = ()> = std::result::Result<T, Failure>;

impl From<Status> for Failure {
    fn from(status: Status) -> Self {
        Self::Daemon(Box::new(status))
    }
}

impl From<String> for Failure {
    fn from(text: String) -> Self {
        Self::Plain(text)
    }
}

impl From<&str> for Failure {
    fn from(text: &str) -> Self {
        Self::Plain(text.to_owned())
    }
}

impl Failure {
    /// The sentence, without an end of line; `None` when there is nothing left to say.
    pub fn text(&self) -> Option<String> {
        match self {
            Self::Daemon(status) => {
                Some(format!("Error response from daemon: {}", status.message()))
            }
            Self::Plain(text) => Some(text.clone()),
            Self::Exit(_) => None,
        }
    }

    /// The exit status.
    pub fn code(&self) -> u8 {
        match self {
            Self::Daemon(_) | Self::Plain(_) => 1,
            Self::Exit(code) => *code,
        }
    }
}
