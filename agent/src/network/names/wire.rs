//! What the agent tells the name server, over a unix socket.
//!
//! Frames of a length (4 bytes, big-endian) and a postcard record. The agent speaks first ([`Request::Hello`]); each
//! request is answered by one [`Reply`], in order. Requests carry complete states, so
//! each may be sent again. A peer of another [`VERSION`] is not talked to but replaced.

use std::io;
use std::net::{IpAddr, Ipv4Addr};
use std::path::PathBuf;

use serde::{Deserialize, Serialize, de::DeserializeOwned};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

/// Of the messages below.
pub const VERSION: u32 = 1;
/// No frame is larger: some hundred thousand endpoints.
const FRAME_MAX: u32 = 32 << 20;

/// From the agent.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Request {
    /// First of all. Its shape never changes.
    Hello(u32),
    /// Forget everything but these.
    Retain {
        /// Tasks.
        sandboxes: Vec<String>,
        /// Networks.
        networks: Vec<String>,
    },
    /// Add or replace a sandbox.
    Sandbox(SandboxNames),
    /// Forget a sandbox; its sockets are closed before the answer.
    RemoveSandbox(String),
    /// Add or replace a network's table.
    Network(NetworkNames),
    /// Forget a network.
    RemoveNetwork(String),
    /// End the process.
    End,
}

/// From the name server.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Reply {
    /// The version it speaks. Its shape never changes.
    Hello(u32),
    /// Done.
    Done,
    /// Why not.
    Failed(String),
}

/// One sandbox, for names.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SandboxNames {
    /// The task.
    pub task: String,
    /// Namespace file.
    pub netns: PathBuf,
    /// The networks whose names it sees, in order.
    pub networks: Vec<String>,
    /// Names of its own, with its first address.
    pub own: Vec<String>,
    /// Its addresses.
    pub addrs: Vec<Ipv4Addr>,
    /// Whether it may ask for names of the outside.
    pub external: bool,
    /// Who is asked for them; empty = the host's name servers.
    pub nameservers: Vec<IpAddr>,
}

/// One network's names.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetworkNames {
    /// The network.
    pub id: String,
    /// May follow each of its names.
    pub name: String,
    /// Services.
    pub services: Vec<ServiceNames>,
    /// Tasks.
    pub tasks: Vec<TaskNames>,
}

/// A service in a network.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ServiceNames {
    /// The service.
    pub id: String,
    /// Name and aliases.
    pub names: Vec<String>,
    /// Its virtual address; `None`: its tasks answer (dnsrr).
    pub vip: Option<Ipv4Addr>,
}

/// A task in a network.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TaskNames {
    /// The task.
    pub id: String,
    /// Its service; may be empty.
    pub service: String,
    /// Slot, or the node's ID for global services.
    pub place: String,
    /// Its address.
    pub addr: Ipv4Addr,
    /// Names of its own.
    pub aliases: Vec<String>,
    /// In the answers for its service.
    pub ready: bool,
}

/// Writes one frame.
pub async fn send<T: Serialize>(to: &mut (impl AsyncWrite + Unpin), message: &T) -> io::Result<()> {
    let body = postcard::to_stdvec(message).map_err(io::Error::other)?;
    let length = u32::try_from(body.len())
        .ok()
        .filter(|length| *length <= FRAME_MAX)
        .ok_or_else(|| io::Error::other("a message for the name server is too large"))?;
    let mut frame = length.to_be_bytes().to_vec();
    frame.extend(body);
    to.write_all(&frame).await?;
    to.flush().await
}

/// Reads one frame; `None` at the end of the stream.
pub async fn receive<T: DeserializeOwned>(
    from: &mut (impl AsyncRead + Unpin),
) -> io::Result<Option<T>> {
    let mut length = [0; 4];
    match from.read_exact(&mut length).await {
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(None),
        other => other?,
    };
    let length = u32::from_be_bytes(length);
    if length > FRAME_MAX {
        return Err(io::Error::other(format!(
            "a frame of {length} bytes is too large"
        )));
    }
    // Grows with what really comes, not with what is announced.
    let mut body = Vec::new();
    from.take(u64::from(length)).read_to_end(&mut body).await?;
    postcard::from_bytes(&body)
        .map(Some)
        .map_err(io::Error::other)
}
