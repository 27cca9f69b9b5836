//! What connections between hosts are made on: bytes in order, from one address to another.
//!
//! [`Tcp`] in production; a simulation puts its own network here. Mutual TLS and
//! everything above it is the same over both. Knows nothing of certificates.

use std::any::Any;
use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::os::fd::AsFd as _;
use std::sync::Arc;

use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream};

/// One connection, either end.
pub trait Stream: AsyncRead + AsyncWrite + fmt::Debug + Send + Unpin + Any {}

impl<T: AsyncRead + AsyncWrite + fmt::Debug + Send + Unpin + Any> Stream for T {}

/// A connection of any network.
pub type BoxStream = Box<dyn Stream>;

/// Has the runtime of the caller tell when there is something to read or write, instead of the one
/// that the connection was made on: there it waits behind whatever that one is busy with. A
/// connection that is not the machine's own stays as it is.
pub(crate) fn move_here(stream: &mut BoxStream) -> io::Result<()> {
    let stream: &mut dyn Any = &mut **stream;
    if let Some(tcp) = stream.downcast_mut::<TcpStream>() {
        let copy = tcp.as_fd().try_clone_to_owned()?;
        *tcp = TcpStream::from_std(copy.into())?;
    }
    Ok(())
}

/// Makes connections to other hosts, and takes theirs.
#[async_trait::async_trait]
pub trait Net: fmt::Debug + Send + Sync + 'static {
    /// A connection to `target` (host:port). Nothing is said on it yet.
    ///
    /// # Errors
    /// Nobody listens there, or nobody has answered for as long as this network waits.
    async fn connect(&self, target: &str) -> io::Result<BoxStream>;

    /// Listens at `addr` (ip:port; port 0 for any).
    ///
    /// # Errors
    /// The address cannot be bound.
    async fn listen(&self, addr: &str) -> io::Result<Box<dyn Acceptor>>;
}

/// One address that is listened on, until it is dropped.
#[async_trait::async_trait]
pub trait Acceptor: fmt::Debug + Send + Sync + 'static {
    /// The address, with the port that was chosen for port 0.
    ///
    /// # Errors
    /// It cannot be asked for.
    fn local_addr(&self) -> io::Result<SocketAddr>;

    /// The next connection, with the address it comes from. Dropping the future loses none.
    ///
    /// # Errors
    /// None can be taken now; perhaps later.
    async fn accept(&self) -> io::Result<(BoxStream, SocketAddr)>;
}

/// The machine's network.
#[derive(Clone, Copy, Debug, Default)]
pub struct Tcp;

impl Tcp {
    /// To give away.
    #[must_use]
    pub fn shared() -> Arc<dyn Net> {
        Arc::new(Self)
    }
}

#[async_trait::async_trait]
impl Net for Tcp {
    async fn connect(&self, target: &str) -> io::Result<BoxStream> {
        let stream = TcpStream::connect(target).await?;
        stream.set_nodelay(true)?;
        Ok(Box::new(stream))
    }

    async fn listen(&self, addr: &str) -> io::Result<Box<dyn Acceptor>> {
        Ok(Box::new(TcpListener::bind(addr).await?))
    }
}

#[async_trait::async_trait]
impl Acceptor for TcpListener {
    fn local_addr(&self) -> io::Result<SocketAddr> {
        Self::local_addr(self)
    }

    async fn accept(&self) -> io::Result<(BoxStream, SocketAddr)> {
        loop {
            let (stream, peer) = Self::accept(self).await?;
            match stream.set_nodelay(true) {
                Ok(()) => return Ok((Box::new(stream), peer)),
                // This one connection is broken; the next need not be.
                Err(error) => tracing::warn!(%peer, %error, "connection refused"),
            }
        }
    }
}
