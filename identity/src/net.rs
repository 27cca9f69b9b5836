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
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::sockopt;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream};

/// How long what was sent may wait until the other host's kernel has it. Then the connection is broken:
/// the host is dead, or nothing reaches it. A process that is only slow is not concerned, since its kernel
/// answers for it. With a heartbeat a second that is within the three seconds after which a node is Down, so
/// agents of a dead manager are heard elsewhere in time.
pub const UNACKNOWLEDGED_MAX: Duration = Duration::from_secs(2);

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
        prepare(&stream)?;
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
            // When thousands come at once, those that have waited for too long have gone already. What is
            // spent on them is missing for the next ones, until all have waited for too long.
            if is_closed(&stream) {
                tracing::debug!(%peer, "the caller has gone before it was its turn");
                continue;
            }
            match prepare(&stream) {
                Ok(()) => return Ok((Box::new(stream), peer)),
                // This one connection is broken; the next need not be.
                Err(error) => tracing::warn!(%peer, %error, "connection refused"),
            }
        }
    }
}

fn prepare(stream: &TcpStream) -> io::Result<()> {
    stream.set_nodelay(true)?;
    let patience = u32::try_from(UNACKNOWLEDGED_MAX.as_millis()).unwrap_or(u32::MAX);
    Ok(sockopt::set_tcp_user_timeout(stream, patience)?)
}

/// Whether the other end has closed the connection.
fn is_closed(stream: &TcpStream) -> bool {
    let closed = PollFlags::RDHUP | PollFlags::HUP | PollFlags::ERR;
    let mut asked = [PollFd::new(stream, closed)];
    let answered = poll(&mut asked, Some(&Timespec::default()));
    answered.is_ok_and(|count| count > 0) && asked[0].revents().intersects(closed)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_caller_that_has_gone_before_its_turn_costs_nothing() {
        let listener = Tcp.listen("127.0.0.1:0").await.expect("a free port");
        let addr = listener.local_addr().expect("bound").to_string();
        for _ in 0..3 {
            drop(Tcp.connect(&addr).await.expect("it listens"));
        }
        let stays = TcpStream::connect(&addr).await.expect("it listens");
        let (_, peer) = listener.accept().await.expect("one stays");
        assert_eq!(peer, stays.local_addr().expect("connected"));
    }

    #[tokio::test]
    async fn both_ends_give_up_a_host_that_is_silent() {
        let listener = Tcp.listen("127.0.0.1:0").await.expect("a free port");
        let addr = listener.local_addr().expect("bound").to_string();
        let near = Tcp.connect(&addr).await.expect("it listens");
        let (far, _) = listener.accept().await.expect("it has asked");
        for end in [near, far] {
            let end: Box<dyn Any> = end;
            let tcp = end.downcast::<TcpStream>().expect("the machine's own");
            let patience = sockopt::tcp_user_timeout(&*tcp).expect("a TCP socket");
            assert_eq!(u128::from(patience), UNACKNOWLEDGED_MAX.as_millis());
        }
    }
}
