//! This node's live identity: its certificate, key and roots, exchanged while everything runs.
//!
//! Every new connection, either way, takes the newest certificate and roots;
//! connections that exist keep what they were made with. Opens connections;
//! starts no loops.

use std::fmt;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use arc_swap::ArcSwap;
use hyper_util::rt::TokioIo;
use rustls::client::danger::ServerCertVerifier;
use rustls::client::{Resumption, WantsClientCert};
use rustls::server::NoServerSessionStorage;
use rustls::{ClientConfig, RootCertStore, ServerConfig};
use rustls_pki_types::ServerName;
use swarm_proto::defaults::{ROLE_MANAGER, SESSION_PROBE_INTERVAL, SESSION_PROBE_TIMEOUT};
use swarm_proto::v1::NodeRole;
use swarm_proto::{ClusterId, NodeId};
use tokio::sync::watch;
use tokio_rustls::TlsConnector;
use tonic::transport::{Channel, Endpoint};
use zeroize::Zeroizing;

use crate::PeerIdentity;
use crate::ca::RootDigest;
use crate::cert::{self, CertError, Leaf, Renewal, Validity};
use crate::net::{Net, Tcp};
use crate::verify;

/// Until the other host has answered; and together with TLS where somebody waits for an answer.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// With TLS, on a connection for a session: whoever opens it knows how long to wait. Longer is in vain.
pub const SESSION_CONNECT_MAX: Duration = Duration::from_secs(60);
/// How long to wait for a connection, and how one on which nothing is heard is probed.
#[derive(Clone, Copy)]
pub(crate) struct Probes {
    /// After so long without a word,
    interval: Duration,
    /// and given up without an answer after so long.
    timeout: Duration,
    /// Connection and TLS together.
    connect: Duration,
}

/// Somebody waits for an answer.
pub(crate) const CALLS: Probes = Probes {
    interval: Duration::from_secs(2),
    timeout: Duration::from_secs(2),
    connect: CONNECT_TIMEOUT,
};
/// An agent's session, whose manager may hang.
const SESSIONS: Probes = Probes {
    interval: SESSION_PROBE_INTERVAL,
    timeout: SESSION_PROBE_TIMEOUT,
    connect: SESSION_CONNECT_MAX,
};
/// Room for a snapshot's pieces on a long line.
const STREAM_WINDOW: u32 = 2 << 20;
const CONNECTION_WINDOW: u32 = 8 << 20;
/// A certificate is renewed at a point of its life between these, chosen at
/// random, so that nodes that joined together do not all renew together.
const RENEW_FROM: f64 = 0.5;
const RENEW_UNTIL: f64 = 0.8;

/// Certificate, key and root, as PEM.
#[derive(Clone)]
pub struct KeyMaterial {
    /// The leaf, then the root.
    pub chain_pem: String,
    /// The leaf's key, PKCS#8.
    pub key_pem: Zeroizing<String>,
    /// The roots that others' certificates are verified with.
    pub root_pem: String,
}

impl fmt::Debug for KeyMaterial {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("KeyMaterial")
    }
}

/// Key material that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum IdentityError {
    /// A part cannot be read.
    #[error(transparent)]
    Certificate(#[from] CertError),
    /// The parts do not fit together.
    #[error("certificate, key and root do not fit together: {0}")]
    Tls(#[source] rustls::Error),
    /// The verifier for callers cannot be made.
    #[error("cannot verify with this root: {0}")]
    Verifier(#[source] rustls::server::VerifierBuilderError),
    /// A certificate of another node or cluster.
    #[error("the new certificate is for {new}, this node is {old}")]
    Stranger {
        /// Node and cluster of the new one.
        new: String,
        /// Node and cluster of this one.
        old: String,
    },
}

struct Live {
    material: KeyMaterial,
    leaf: Leaf,
    renew_at: f64,
    server: Arc<ServerConfig>,
    client: Arc<ClientConfig>,
    /// The same, for urgent connections.
    urgent: Arc<ClientConfig>,
}

impl Live {
    fn new(material: KeyMaterial) -> Result<Self, IdentityError> {
        let leaf = Leaf::from_chain_pem(material.chain_pem.as_bytes())?;
        let server = server_config(&material)?;
        let client = client_config(&material)?;
        let mut urgent = client.clone();
        urgent.alpn_protocols.insert(0, URGENT.to_vec());
        Ok(Self {
            leaf,
            renew_at: rand::random_range(RENEW_FROM..RENEW_UNTIL),
            server: Arc::new(server),
            client: Arc::new(client),
            urgent: Arc::new(urgent),
            material,
        })
    }
}

/// This node's identity, for as long as the process runs.
pub struct Identity {
    live: ArcSwap<Live>,
    generation: watch::Sender<u64>,
    net: Arc<dyn Net>,
}

impl Identity {
    /// An identity from what the key store holds or the CA has issued, on the machine's network.
    ///
    /// # Errors
    /// The parts are unreadable or do not fit together.
    pub fn new(material: KeyMaterial) -> Result<Arc<Self>, IdentityError> {
        Self::on(material, Tcp::shared())
    }

    /// The same, on this network.
    ///
    /// # Errors
    /// Those of [`Identity::new`].
    pub fn on(material: KeyMaterial, net: Arc<dyn Net>) -> Result<Arc<Self>, IdentityError> {
        Ok(Arc::new(Self {
            live: ArcSwap::from_pointee(Live::new(material)?),
            generation: watch::Sender::new(0),
            net,
        }))
    }

    /// What its connections are made on.
    pub(crate) fn net(&self) -> &Arc<dyn Net> {
        &self.net
    }

    /// Who this node is.
    #[must_use]
    pub fn peer(&self) -> PeerIdentity {
        self.live.load().leaf.identity.clone()
    }

    /// This node's ID. Never changes.
    #[must_use]
    pub fn node_id(&self) -> NodeId {
        self.live.load().leaf.identity.node_id.clone()
    }

    /// The role of the present certificate.
    #[must_use]
    pub fn role(&self) -> NodeRole {
        self.live.load().leaf.identity.role
    }

    /// The cluster's ID. Never changes.
    #[must_use]
    pub fn cluster_id(&self) -> ClusterId {
        self.live.load().leaf.identity.cluster_id.clone()
    }

    /// The trusted roots, PEM.
    #[must_use]
    pub fn root_pem(&self) -> String {
        self.live.load().material.root_pem.clone()
    }

    /// Digest of the (first) trusted root.
    #[must_use]
    pub fn root_digest(&self) -> RootDigest {
        RootDigest::of_pem(self.live.load().material.root_pem.as_bytes())
            .expect("the root was parsed when it was taken in")
    }

    /// From when until when the present certificate is valid.
    #[must_use]
    pub fn validity(&self) -> Validity {
        self.live.load().leaf.validity
    }

    /// Whether the present certificate is to be renewed, by the clock of the caller.
    #[must_use]
    pub fn renewal(&self, now: SystemTime) -> Renewal {
        let live = self.live.load();
        live.leaf.validity.renewal(live.renew_at, now)
    }

    /// Certificate, key and root.
    #[must_use]
    pub fn material(&self) -> KeyMaterial {
        self.live.load().material.clone()
    }

    /// Takes a renewed certificate (another role is fine) or another root:
    /// connections from now on use it.
    ///
    /// # Errors
    /// It does not fit together, or belongs to another node or cluster; nothing is changed then.
    pub fn replace(&self, material: KeyMaterial) -> Result<(), IdentityError> {
        self.check_successor(&material)?;
        self.live.store(Arc::new(Live::new(material)?));
        self.generation.send_modify(|generation| *generation += 1);
        Ok(())
    }

    /// Whether [`Identity::replace`] would take this.
    ///
    /// # Errors
    /// Those of `replace`.
    pub fn check_successor(&self, material: &KeyMaterial) -> Result<(), IdentityError> {
        let (is, was) = (check(material)?.identity, self.peer());
        if is.node_id != was.node_id || is.cluster_id != was.cluster_id {
            let name =
                |peer: &PeerIdentity| format!("node {} of {}", peer.node_id, peer.cluster_id);
            return Err(IdentityError::Stranger {
                new: name(&is),
                old: name(&was),
            });
        }
        Ok(())
    }

    /// Changes with every [`Identity::replace`]. Whoever holds long connections
    /// makes new ones when the role changes.
    #[must_use]
    pub fn changed(&self) -> watch::Receiver<u64> {
        self.generation.subscribe()
    }

    /// A connection to the manager at `addr` (host:port), made when it is first
    /// used and made again when it is lost, each time with the newest
    /// certificate. The other side must hold a manager's certificate of this cluster.
    ///
    /// # Errors
    /// `addr` is not host:port.
    pub fn channel(self: &Arc<Self>, addr: &str) -> Result<Channel, AddrError> {
        self.connect(addr, CALLS, |live| &live.client)
    }

    /// The same, for an agent's session: it must send something every few seconds. A host that has answered is
    /// waited for as long as [`SESSION_CONNECT_MAX`].
    ///
    /// # Errors
    /// `addr` is not host:port.
    pub fn session_channel(self: &Arc<Self>, addr: &str) -> Result<Channel, AddrError> {
        self.connect(addr, SESSIONS, |live| &live.client)
    }

    /// The same, for what must not wait behind other work at the other side: see
    /// [`crate::Listener::incoming_with_urgent`].
    ///
    /// # Errors
    /// `addr` is not host:port.
    pub fn urgent_channel(self: &Arc<Self>, addr: &str) -> Result<Channel, AddrError> {
        self.connect(addr, CALLS, |live| &live.urgent)
    }

    /// With the configuration that is in use whenever a connection is made.
    fn connect(
        self: &Arc<Self>,
        addr: &str,
        probes: Probes,
        config: fn(&Live) -> &Arc<ClientConfig>,
    ) -> Result<Channel, AddrError> {
        let identity = Arc::clone(self);
        connect_lazy(Arc::clone(&self.net), addr, probes, move || {
            Arc::clone(config(&identity.live.load()))
        })
    }

    /// TLS for the next connection that is accepted.
    pub(crate) fn server_config(&self) -> Arc<ServerConfig> {
        Arc::clone(&self.live.load().server)
    }
}

impl fmt::Debug for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Identity({})", self.peer())
    }
}

/// An address that is not host:port.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("invalid address {addr:?}: it must be host:port")]
pub struct AddrError {
    /// As given.
    pub addr: String,
}

/// A channel over TLS whose configuration is asked for at each connection.
pub(crate) fn connect_lazy(
    net: Arc<dyn Net>,
    addr: &str,
    probes: Probes,
    config: impl Fn() -> Arc<ClientConfig> + Clone + Send + Sync + 'static,
) -> Result<Channel, AddrError> {
    let wrong = || AddrError {
        addr: addr.to_owned(),
    };
    let (host, port) = addr.rsplit_once(':').ok_or_else(wrong)?;
    if host.is_empty() || port.parse::<u16>().map_or(true, |port| port == 0) {
        return Err(wrong());
    }
    // The scheme is http because TLS is done by the connector.
    let endpoint = Endpoint::from_shared(format!("http://{addr}"))
        .map_err(|_| wrong())?
        .http2_keep_alive_interval(probes.interval)
        .keep_alive_timeout(probes.timeout)
        .keep_alive_while_idle(true)
        .initial_stream_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW)
        .connect_timeout(probes.connect);
    let target: Arc<str> = addr.into();
    let connector = tower::service_fn(move |_: http::Uri| {
        let (net, target, config) = (Arc::clone(&net), Arc::clone(&target), config());
        async move {
            let connect = async {
                let answered = tokio::time::timeout(CONNECT_TIMEOUT, net.connect(&target));
                let stream = answered
                    .await
                    .map_err(|_| too_late(&target, CONNECT_TIMEOUT))??;
                let name = ServerName::try_from(ROLE_MANAGER).expect("a constant DNS name");
                TlsConnector::from(config).connect(name, stream).await
            };
            let stream = tokio::time::timeout(probes.connect, connect)
                .await
                .map_err(|_| too_late(&target, probes.connect))??;
            Ok::<_, std::io::Error>(TokioIo::new(stream))
        }
    });
    Ok(endpoint.connect_with_connector_lazy(connector))
}

fn too_late(target: &str, waited: Duration) -> std::io::Error {
    let message = format!("no connection to {target} within {waited:?}");
    std::io::Error::new(std::io::ErrorKind::TimedOut, message)
}

pub(crate) fn provider() -> Arc<rustls::crypto::CryptoProvider> {
    Arc::new(rustls::crypto::ring::default_provider())
}

pub(crate) fn root_store(root_pem: &str) -> Result<RootCertStore, IdentityError> {
    let mut roots = RootCertStore::empty();
    for root in cert::chain_from_pem(root_pem.as_bytes())? {
        roots.add(root).map_err(IdentityError::Tls)?;
    }
    Ok(roots)
}

/// Whether certificate, key and root fit together, and whose they are.
pub(crate) fn check(material: &KeyMaterial) -> Result<Leaf, IdentityError> {
    let live = Live::new(material.clone())?;
    let chain = cert::chain_from_pem(material.chain_pem.as_bytes())?;
    let leaf =
        rustls::server::ParsedCertificate::try_from(&chain[0]).map_err(IdentityError::Tls)?;
    rustls::client::verify_server_cert_signed_by_trust_anchor(
        &leaf,
        &root_store(&material.root_pem)?,
        &chain[1..],
        // Whether it has expired is another question.
        rustls_pki_types::UnixTime::since_unix_epoch(
            live.leaf
                .validity
                .not_before
                .duration_since(std::time::UNIX_EPOCH)
                .unwrap_or_default(),
        ),
        provider().signature_verification_algorithms.all,
    )
    .map_err(IdentityError::Tls)?;
    Ok(live.leaf)
}

const ALPN: &[u8] = b"h2";
/// What a connection speaks that must not wait: the same.
pub(crate) const URGENT: &[u8] = b"swarm-urgent";

fn server_config(material: &KeyMaterial) -> Result<ServerConfig, IdentityError> {
    let verifier = verify::callers(root_store(&material.root_pem)?)?;
    let mut config = ServerConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS13])
        .map_err(IdentityError::Tls)?
        .with_client_cert_verifier(verifier)
        .with_single_cert(
            cert::chain_from_pem(material.chain_pem.as_bytes())?,
            cert::key_from_pem(material.key_pem.as_bytes())?,
        )
        .map_err(IdentityError::Tls)?;
    config.alpn_protocols = vec![URGENT.to_vec(), ALPN.to_vec()];
    // A resumed session would go on with a certificate that has expired or was replaced.
    config.session_storage = Arc::new(NoServerSessionStorage {});
    config.send_tls13_tickets = 0;
    Ok(config)
}

fn client_config(material: &KeyMaterial) -> Result<ClientConfig, IdentityError> {
    let config = client_builder(verify::managers(root_store(&material.root_pem)?)?)?
        .with_client_auth_cert(
            cert::chain_from_pem(material.chain_pem.as_bytes())?,
            cert::key_from_pem(material.key_pem.as_bytes())?,
        )
        .map_err(IdentityError::Tls)?;
    Ok(finish_client(config))
}

pub(crate) fn client_builder(
    verifier: Arc<dyn ServerCertVerifier>,
) -> Result<rustls::ConfigBuilder<ClientConfig, WantsClientCert>, IdentityError> {
    Ok(ClientConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS13])
        .map_err(IdentityError::Tls)?
        .dangerous()
        .with_custom_certificate_verifier(verifier))
}

pub(crate) fn finish_client(mut config: ClientConfig) -> ClientConfig {
    config.alpn_protocols = vec![ALPN.to_vec()];
    config.resumption = Resumption::disabled();
    config
}
