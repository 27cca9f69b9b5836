//! Accepting connections: over mutual TLS, and on the local socket.
//!
//! A listener is turned into a stream for tonic's `serve_with_incoming`; the
//! stream owns its handshakes, and dropping it drops them. A handshake never
//! holds up the next one, has a time limit, and there is a limit to how many go on at once.

use std::collections::HashMap;
use std::io;
use std::net::SocketAddr;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::sync::{Arc, Weak};
use std::task::{Context, Poll};
use std::time::Duration;

use futures::stream::{self, Stream};
use parking_lot::Mutex;
use swarm_proto::v1::NodeRole;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio::task::JoinSet;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;
use tonic::transport::Server;
use tonic::transport::server::Connected;

use crate::caller::{Caller, ConnectionInfo};
use crate::cert::Leaf;
use crate::identity::{Identity, URGENT};
use crate::net::{Acceptor, BoxStream, move_here};

/// Wait after a failed accept (out of file descriptors): it would fail again at once.
const ACCEPT_BACKOFF: Duration = Duration::from_millis(100);

/// Bounds of a TLS listener.
#[derive(Clone, Debug)]
pub struct Limits {
    /// From the connection to the end of the TLS handshake.
    pub handshake_timeout: Duration,
    /// Handshakes at once; more wait in the network's backlog. If it is more than a busy manager ends within its
    /// callers' patience, they all give up, and none is ever done.
    pub handshakes: usize,
    /// Connections at once without a client certificate; more are refused.
    pub anonymous: usize,
    /// Connections at once with the certificates of one node; more are refused. A node has one to a manager,
    /// a manager some to each other one.
    pub per_node: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            handshake_timeout: Duration::from_secs(10),
            handshakes: 128,
            anonymous: 512,
            per_node: 128,
        }
    }
}

/// A connection on which a caller says nothing for so long is probed,
const PROBE_INTERVAL: Duration = Duration::from_secs(10);
/// and closed when there is no answer for so long. Only what it holds here is at stake: who is alive is told by
/// heartbeats, and a dead host by the kernel. A server that is busy for seconds sees the answers late, and must
/// not take that for their absence.
const PROBE_TIMEOUT: Duration = Duration::from_secs(20);

/// A gRPC server with the bounds that all of ours have: probes of silent
/// connections, header size, streams per connection.
#[must_use]
pub fn grpc_server() -> Server {
    Server::builder()
        .http2_keepalive_interval(Some(PROBE_INTERVAL))
        .http2_keepalive_timeout(Some(PROBE_TIMEOUT))
        .http2_max_header_list_size(64 << 10)
        .max_concurrent_streams(1024)
        .initial_stream_window_size(2 << 20)
        .initial_connection_window_size(8 << 20)
}

/// Accepts mutual TLS.
#[derive(Debug)]
pub struct Listener {
    acceptor: Box<dyn Acceptor>,
    identity: Arc<Identity>,
    limits: Limits,
}

impl Listener {
    /// Listens on `addr` of the identity's network.
    ///
    /// # Errors
    /// The address cannot be bound.
    pub async fn bind(addr: &str, identity: Arc<Identity>) -> io::Result<Self> {
        let acceptor = identity.net().listen(addr).await.map_err(|error| {
            io::Error::new(error.kind(), format!("cannot listen on {addr}: {error}"))
        })?;
        Ok(Self {
            acceptor,
            identity,
            limits: Limits::default(),
        })
    }

    /// With other bounds than the default ones.
    #[must_use]
    pub fn with_limits(mut self, limits: Limits) -> Self {
        self.limits = limits;
        self
    }

    /// The address it listens on (with the port that was chosen for port 0).
    ///
    /// # Errors
    /// The network does not say.
    pub fn local_addr(&self) -> io::Result<SocketAddr> {
        self.acceptor.local_addr()
    }

    /// Connections whose handshake is done. Never ends by itself; refused
    /// ones are logged with the peer's address and the reason.
    pub fn incoming(self) -> impl Stream<Item = io::Result<Connection>> + Send + 'static {
        self.accepting(None)
    }

    /// The same without those that managers have made for what must not wait behind other work;
    /// these go to `urgent`, to be served elsewhere.
    pub fn incoming_with_urgent(
        self,
        urgent: mpsc::Sender<Connection>,
    ) -> impl Stream<Item = io::Result<Connection>> + Send + 'static {
        self.accepting(Some(urgent))
    }

    fn accepting(
        self,
        urgent: Option<mpsc::Sender<Connection>>,
    ) -> impl Stream<Item = io::Result<Connection>> + Send + 'static {
        let state = Accepting {
            places: Arc::new(Places {
                anonymous: Arc::new(Semaphore::new(self.limits.anonymous)),
                per_node: self.limits.per_node,
                nodes: Mutex::default(),
            }),
            listener: self,
            handshakes: JoinSet::new(),
            urgent,
        };
        stream::unfold(state, |mut state| async move {
            let connection = state.next().await;
            Some((Ok(connection), state))
        })
    }
}

struct Accepting {
    listener: Listener,
    handshakes: JoinSet<Option<Connection>>,
    places: Arc<Places>,
    urgent: Option<mpsc::Sender<Connection>>,
}

/// Who may have how many connections.
struct Places {
    anonymous: Arc<Semaphore>,
    per_node: usize,
    nodes: Mutex<HashMap<String, Weak<Semaphore>>>,
}

impl Places {
    /// A place for one more connection, kept until it is gone.
    fn take(&self, node: Option<&str>) -> Result<OwnedSemaphorePermit, String> {
        let Some(node) = node else {
            let place = Arc::clone(&self.anonymous).try_acquire_owned();
            return place.map_err(|_| "too many connections without a certificate".to_owned());
        };
        let mut nodes = self.nodes.lock();
        let known = nodes.get(node).and_then(Weak::upgrade);
        let places = known.unwrap_or_else(|| {
            if nodes.len() == nodes.capacity() {
                // Before it grows: nodes without a connection are forgotten.
                nodes.retain(|_, places| places.strong_count() > 0);
            }
            let places = Arc::new(Semaphore::new(self.per_node));
            nodes.insert(node.to_owned(), Arc::downgrade(&places));
            places
        });
        places
            .try_acquire_owned()
            .map_err(|_| format!("node {node} has too many connections"))
    }
}

impl Accepting {
    async fn next(&mut self) -> Connection {
        loop {
            tokio::select! {
                Some(done) = self.handshakes.join_next() => match done {
                    Ok(Some(connection)) => match &self.urgent {
                        Some(urgent) if connection.is_urgent() => {
                            if urgent.try_send(connection).is_err() {
                                tracing::warn!("connection refused: nobody takes urgent ones");
                            }
                        }
                        _ => return connection,
                    },
                    Ok(None) => {}
                    Err(error) => tracing::error!(%error, "a TLS handshake ended abnormally"),
                },
                accepted = self.listener.acceptor.accept(),
                    if self.handshakes.len() < self.listener.limits.handshakes =>
                {
                    match accepted {
                        Ok((stream, peer)) => self.start(stream, peer),
                        Err(error) => {
                            tracing::warn!(%error, "cannot accept a connection");
                            tokio::time::sleep(ACCEPT_BACKOFF).await;
                        }
                    }
                }
            }
        }
    }

    fn start(&mut self, stream: BoxStream, peer: SocketAddr) {
        // Asked for each connection: certificate and roots may have been replaced.
        let acceptor = TlsAcceptor::from(self.listener.identity.server_config());
        let identity = Arc::clone(&self.listener.identity);
        let places = Arc::clone(&self.places);
        let timeout = self.listener.limits.handshake_timeout;
        self.handshakes.spawn(async move {
            let handshake = handshake(stream, peer, acceptor, &identity, &places);
            let refusal = match tokio::time::timeout(timeout, handshake).await {
                Ok(Ok(connection)) => return Some(connection),
                Ok(Err(refusal)) => refusal,
                Err(_) => format!("no TLS handshake within {timeout:?}"),
            };
            tracing::warn!(%peer, reason = refusal, "connection refused");
            None
        });
    }
}

async fn handshake(
    stream: BoxStream,
    peer: SocketAddr,
    acceptor: TlsAcceptor,
    identity: &Identity,
    places: &Places,
) -> Result<Connection, String> {
    let stream = acceptor
        .accept(stream)
        .await
        .map_err(|error| error.to_string())?;
    let certificate = stream
        .get_ref()
        .1
        .peer_certificates()
        .and_then(<[_]>::first);
    let caller = match certificate {
        Some(der) => {
            let leaf = Leaf::from_der(der).map_err(|error| error.to_string())?;
            let cluster = identity.cluster_id();
            if leaf.identity.cluster_id != cluster {
                return Err(format!(
                    "its certificate is for cluster {}, this is {cluster}",
                    leaf.identity.cluster_id
                ));
            }
            Caller::Peer(leaf.identity)
        }
        None => Caller::Anonymous,
    };
    let place = places.take(caller.peer().map(|peer| peer.node_id.as_str()))?;
    Ok(Connection {
        stream: Either::Tls(Box::new(stream)),
        info: ConnectionInfo {
            caller,
            remote_addr: Some(peer),
            _place: Some(Arc::new(place)),
        },
    })
}

/// Accepts on a unix socket, for root on this machine.
#[derive(Debug)]
pub struct LocalListener {
    unix: UnixListener,
    path: PathBuf,
}

impl LocalListener {
    /// Listens at `path` with mode 0660. A socket that nobody listens on any more is replaced.
    ///
    /// # Errors
    /// Somebody listens there, or the socket cannot be made.
    pub async fn bind(path: &Path) -> io::Result<Self> {
        let named = |error: io::Error| {
            io::Error::new(
                error.kind(),
                format!("cannot listen on {}: {error}", path.display()),
            )
        };
        if UnixStream::connect(path).await.is_ok() {
            return Err(named(io::Error::new(
                io::ErrorKind::AddrInUse,
                "another process listens there",
            )));
        }
        if let Some(directory) = path.parent() {
            std::fs::create_dir_all(directory).map_err(named)?;
        }
        // Made under another name, so that it has its mode before anybody can find it.
        let mut making = path.as_os_str().to_owned();
        making.push(format!(".{}", std::process::id()));
        let making = PathBuf::from(making);
        match std::fs::remove_file(&making) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(named(error)),
            _ => {}
        }
        let unix = UnixListener::bind(&making).map_err(named)?;
        std::fs::set_permissions(&making, std::fs::Permissions::from_mode(0o660))
            .and_then(|()| std::fs::rename(&making, path))
            .map_err(|error| {
                let _ = std::fs::remove_file(&making);
                named(error)
            })?;
        Ok(Self {
            unix,
            path: path.to_owned(),
        })
    }

    /// Where it listens.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Connections. Never ends by itself.
    pub fn incoming(self) -> impl Stream<Item = io::Result<Connection>> + Send + 'static {
        stream::unfold(self.unix, |unix| async move {
            loop {
                match unix.accept().await {
                    Ok((stream, _)) => {
                        let connection = Connection {
                            stream: Either::Unix(stream),
                            info: ConnectionInfo {
                                caller: Caller::Local,
                                remote_addr: None,
                                _place: None,
                            },
                        };
                        return Some((Ok(connection), unix));
                    }
                    Err(error) => {
                        tracing::warn!(%error, "cannot accept a local connection");
                        tokio::time::sleep(ACCEPT_BACKOFF).await;
                    }
                }
            }
        })
    }
}

/// A connection with its caller.
#[derive(Debug)]
pub struct Connection {
    stream: Either,
    info: ConnectionInfo,
}

#[derive(Debug)]
enum Either {
    Tls(Box<TlsStream<BoxStream>>),
    Unix(UnixStream),
}

impl Connection {
    /// Who is at the other end, and where.
    #[must_use]
    pub fn info(&self) -> &ConnectionInfo {
        &self.info
    }

    /// A manager has made it for what must not wait behind other work.
    fn is_urgent(&self) -> bool {
        let Either::Tls(stream) = &self.stream else {
            return false;
        };
        let peer = self.info.caller.peer();
        peer.is_some_and(|peer| peer.role == NodeRole::Manager)
            && stream.get_ref().1.alpn_protocol() == Some(URGENT)
    }

    /// Has the runtime of the caller wait for it from now on.
    ///
    /// # Errors
    /// That runtime has no room for it.
    pub fn move_here(mut self) -> io::Result<Self> {
        if let Either::Tls(stream) = &mut self.stream {
            move_here(stream.get_mut().0)?;
        }
        Ok(self)
    }
}

impl Connected for Connection {
    type ConnectInfo = ConnectionInfo;

    fn connect_info(&self) -> ConnectionInfo {
        self.info.clone()
    }
}

impl AsyncRead for Connection {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        match &mut self.stream {
            Either::Tls(stream) => Pin::new(stream).poll_read(cx, buf),
            Either::Unix(stream) => Pin::new(stream).poll_read(cx, buf),
        }
    }
}

impl AsyncWrite for Connection {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        match &mut self.stream {
            Either::Tls(stream) => Pin::new(stream).poll_write(cx, buf),
            Either::Unix(stream) => Pin::new(stream).poll_write(cx, buf),
        }
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match &mut self.stream {
            Either::Tls(stream) => Pin::new(stream).poll_flush(cx),
            Either::Unix(stream) => Pin::new(stream).poll_flush(cx),
        }
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match &mut self.stream {
            Either::Tls(stream) => Pin::new(stream).poll_shutdown(cx),
            Either::Unix(stream) => Pin::new(stream).poll_shutdown(cx),
        }
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        match &mut self.stream {
            Either::Tls(stream) => Pin::new(stream).poll_write_vectored(cx, bufs),
            Either::Unix(stream) => Pin::new(stream).poll_write_vectored(cx, bufs),
        }
    }

    fn is_write_vectored(&self) -> bool {
        match &self.stream {
            Either::Tls(stream) => stream.is_write_vectored(),
            Either::Unix(stream) => stream.is_write_vectored(),
        }
    }
}
