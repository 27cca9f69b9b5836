//! Who sent a request: read from the connection, never from the request.
//!
//! Every connection that [`crate::Listener`] or [`crate::LocalListener`] yields carries a
//! [`ConnectionInfo`], which tonic puts into the extensions of each of its requests.

use std::fmt;
use std::net::SocketAddr;
use std::sync::Arc;

use swarm_proto::v1::NodeRole;
use swarm_proto::{ClusterId, NodeId};

/// What a verified certificate says of its holder.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PeerIdentity {
    /// The subject's common name.
    pub node_id: NodeId,
    /// The subject's organisational unit.
    pub role: NodeRole,
    /// The subject's organisation.
    pub cluster_id: ClusterId,
}

impl fmt::Display for PeerIdentity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let role = match self.role {
            NodeRole::Manager => "manager",
            NodeRole::Worker => "worker",
        };
        write!(f, "{role} {}", self.node_id)
    }
}

/// Who is at the other end of a connection.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Caller {
    /// A node with a certificate of the cluster's root.
    Peer(PeerIdentity),
    /// Somebody on this machine whom the local socket's permissions let through: root.
    Local,
    /// A TLS connection without a client certificate.
    Anonymous,
}

impl Caller {
    /// Who sent this request; [`Caller::Anonymous`] when nothing is known.
    #[must_use]
    pub fn of<T>(request: &tonic::Request<T>) -> Self {
        let extensions = request.extensions();
        if let Some(caller) = extensions.get::<Self>() {
            return caller.clone();
        }
        extensions
            .get::<ConnectionInfo>()
            .map_or(Self::Anonymous, |info| info.caller.clone())
    }

    /// The peer behind the certificate, if there is one.
    #[must_use]
    pub fn peer(&self) -> Option<&PeerIdentity> {
        match self {
            Self::Peer(peer) => Some(peer),
            Self::Local | Self::Anonymous => None,
        }
    }
}

impl fmt::Display for Caller {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Peer(peer) => peer.fmt(f),
            Self::Local => f.write_str("the local socket"),
            Self::Anonymous => f.write_str("a caller without a certificate"),
        }
    }
}

/// What a connection brings to each of its requests.
#[derive(Clone, Debug)]
pub struct ConnectionInfo {
    /// Who is at the other end.
    pub caller: Caller,
    /// Where the connection comes from; `None` on the local socket.
    pub remote_addr: Option<SocketAddr>,
    // Keeps the connection's place among those of its node, or without a certificate, until
    // the last request of it is gone.
    pub(crate) _place: Option<Arc<tokio::sync::OwnedSemaphorePermit>>,
}

/// The address a request came from; `None` on the local socket.
#[must_use]
pub fn remote_addr<T>(request: &tonic::Request<T>) -> Option<SocketAddr> {
    request.extensions().get::<ConnectionInfo>()?.remote_addr
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_that_came_over_no_connection_is_anonymous() {
        assert_eq!(Caller::of(&tonic::Request::new(())), Caller::Anonymous);
    }

    #[test]
    fn a_request_has_the_caller_of_its_connection() {
        let mut request = tonic::Request::new(());
        request.extensions_mut().insert(ConnectionInfo {
            caller: Caller::Local,
            remote_addr: None,
            _place: None,
        });
        assert_eq!(Caller::of(&request), Caller::Local);
    }
}
