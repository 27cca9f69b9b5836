//! Who may call what: one table, and the layer that enforces it before any service sees a request.
//!
//! A method that is not in the table is refused.

use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use swarm_proto::v1::NodeRole;
use tonic::Status;
use tonic::metadata::MetadataValue;
use tower::{Layer, Service};

use crate::caller::{Caller, ConnectionInfo, PeerIdentity};

/// Who may call a method.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Allowed {
    /// Whoever reaches the port, also without a certificate.
    Anyone,
    /// Any node.
    Node,
    /// Managers.
    Manager,
    /// Members of the raft group: managers by their certificate. A replica that is catching
    /// up sees a past in which its leader was no manager yet, so its state is not asked;
    /// who is a member, raft itself knows.
    Member,
    /// Managers, and root on this machine.
    ManagerOrLocal,
    /// Any node, and root on this machine.
    NodeOrLocal,
    /// Root on this machine.
    Local,
}

/// Every method that is served, with who may call it.
pub const TABLE: &[(&str, Allowed)] = &[
    ("/swarm.v1.Ca/GetRootCa", Allowed::Anyone),
    ("/swarm.v1.Ca/IssueCertificate", Allowed::Anyone),
    ("/swarm.v1.Dispatcher/Session", Allowed::Node),
    ("/swarm.v1.Liveness/Report", Allowed::Manager),
    ("/swarm.v1.Raft/AppendEntries", Allowed::Member),
    ("/swarm.v1.Raft/Vote", Allowed::Member),
    ("/swarm.v1.Raft/PreVote", Allowed::Member),
    ("/swarm.v1.Raft/TransferLeader", Allowed::Member),
    ("/swarm.v1.Raft/InstallSnapshot", Allowed::Member),
    ("/swarm.v1.Raft/Join", Allowed::Member),
    ("/swarm.v1.Raft/Leave", Allowed::Manager),
    ("/swarm.v1.Raft/Propose", Allowed::Manager),
    ("/swarm.v1.Raft/ReadIndex", Allowed::Manager),
    ("/swarm.v1.Raft/Members", Allowed::Manager),
    ("/swarm.v1.Control/GetCluster", Allowed::ManagerOrLocal),
    ("/swarm.v1.Control/UpdateCluster", Allowed::ManagerOrLocal),
    ("/swarm.v1.Control/GetJoinTokens", Allowed::ManagerOrLocal),
    ("/swarm.v1.Control/RotateJoinToken", Allowed::ManagerOrLocal),
    ("/swarm.v1.Control/GetNode", Allowed::ManagerOrLocal),
    ("/swarm.v1.Control/ListNodes", Allowed::ManagerOrLocal),
    ("/swarm.v1.Control/UpdateNode", Allowed::ManagerOrLocal),
    ("/swarm.v1.Control/RemoveNode", Allowed::ManagerOrLocal),
    ("/swarm.v1.Control/GetService", Allowed::ManagerOrLocal),
    ("/swarm.v1.Control/ListServices", Allowed::ManagerOrLocal),
    ("/swarm.v1.Control/CreateService", Allowed::ManagerOrLocal),
    ("/swarm.v1.Control/UpdateService", Allowed::ManagerOrLocal),
    ("/swarm.v1.Control/RemoveService", Allowed::ManagerOrLocal),
    ("/swarm.v1.Control/GetTask", Allowed::ManagerOrLocal),
    ("/swarm.v1.Control/ListTasks", Allowed::ManagerOrLocal),
    ("/swarm.v1.Control/GetNetwork", Allowed::ManagerOrLocal),
    ("/swarm.v1.Control/ListNetworks", Allowed::ManagerOrLocal),
    ("/swarm.v1.Control/CreateNetwork", Allowed::ManagerOrLocal),
    ("/swarm.v1.Control/RemoveNetwork", Allowed::ManagerOrLocal),
    ("/swarm.v1.Control/Watch", Allowed::ManagerOrLocal),
    ("/swarm.v1.NodeLocal/Init", Allowed::Local),
    ("/swarm.v1.NodeLocal/Join", Allowed::Local),
    ("/swarm.v1.NodeLocal/Leave", Allowed::Local),
    ("/swarm.v1.NodeLocal/Info", Allowed::Local),
    ("/swarm.v1.NodeLocal/ListLocalNetworks", Allowed::Local),
    ("/swarm.v1.NodeLocal/ResolveImage", Allowed::Local),
    ("/swarm.v1.NodeLocal/Exec", Allowed::Local),
    ("/swarm.v1.NodeLocal/Logs", Allowed::Local),
    ("/grpc.health.v1.Health/Check", Allowed::NodeOrLocal),
    ("/grpc.health.v1.Health/Watch", Allowed::NodeOrLocal),
    ("/grpc.health.v1.Health/List", Allowed::NodeOrLocal),
    (
        "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo",
        Allowed::NodeOrLocal,
    ),
    (
        "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
        Allowed::NodeOrLocal,
    ),
];

/// Why a request is refused.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// A certificate is needed.
    Unauthenticated(String),
    /// The caller is known, and may not.
    Denied(String),
    /// The caller's node was removed from the cluster, for good.
    Removed(String),
}

/// Metadata of a refusal that holds for good, since the node was removed from the cluster.
const REMOVED: &str = "swarm-node-removed";

/// Tells a node that it was removed from the cluster, which is nothing to try again about.
#[must_use]
pub fn removed(text: impl Into<String>) -> Status {
    let mut status = Status::permission_denied(text);
    let said = MetadataValue::from_static("true");
    status.metadata_mut().insert(REMOVED, said);
    status
}

/// Whether a manager has said [`removed`].
#[must_use]
pub fn is_removed(status: &Status) -> bool {
    status.metadata().contains_key(REMOVED)
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unauthenticated(text) | Self::Denied(text) | Self::Removed(text) => {
                f.write_str(text)
            }
        }
    }
}

impl From<Refusal> for Status {
    fn from(refusal: Refusal) -> Self {
        match refusal {
            Refusal::Unauthenticated(text) => Self::unauthenticated(text),
            Refusal::Denied(text) => Self::permission_denied(text),
            Refusal::Removed(text) => removed(text),
        }
    }
}

fn allowed(path: &str) -> Option<Allowed> {
    let (_, allowed) = TABLE.iter().find(|(method, _)| *method == path)?;
    Some(*allowed)
}

/// Whether `caller` may call the method at `path` ("/swarm.v1.Control/ListNodes").
///
/// # Errors
/// It may not; the sentence names the method and the role.
pub fn authorize(path: &str, caller: &Caller) -> Result<(), Refusal> {
    let Some(allowed) = allowed(path) else {
        let text = format!("{path} is not a method that {caller} may call");
        return Err(match caller {
            Caller::Anonymous => Refusal::Unauthenticated(text),
            Caller::Peer(_) | Caller::Local => Refusal::Denied(text),
        });
    };
    let manager = |peer: &PeerIdentity| peer.role == NodeRole::Manager;
    let ok = match (allowed, caller) {
        (Allowed::Anyone, _) => true,
        (_, Caller::Anonymous) => {
            return Err(Refusal::Unauthenticated(format!(
                "{path} needs a client certificate of this cluster"
            )));
        }
        (Allowed::Node | Allowed::NodeOrLocal, Caller::Peer(_)) => true,
        (Allowed::Manager | Allowed::Member | Allowed::ManagerOrLocal, Caller::Peer(peer)) => {
            manager(peer)
        }
        (Allowed::ManagerOrLocal | Allowed::NodeOrLocal | Allowed::Local, Caller::Local) => true,
        (Allowed::Local, Caller::Peer(_))
        | (Allowed::Node | Allowed::Manager | Allowed::Member, Caller::Local) => false,
    };
    if ok {
        return Ok(());
    }
    let who = match allowed {
        Allowed::Anyone => "anyone",
        Allowed::Node => "nodes",
        Allowed::Manager | Allowed::Member => "managers",
        Allowed::ManagerOrLocal => "managers and the local socket",
        Allowed::NodeOrLocal => "nodes and the local socket",
        Allowed::Local => "the local socket",
    };
    Err(Refusal::Denied(format!(
        "{path} is only for {who}, not for {caller}"
    )))
}

/// Looks at a peer at each of its requests: which role the cluster grants it
/// now (never more than its certificate's), or the sentence that it was removed from the cluster.
pub type Check = Arc<dyn Fn(&PeerIdentity) -> Result<NodeRole, String> + Send + Sync>;

/// A tower layer for tonic's server: refuses what the table or the check does not allow.
#[derive(Clone)]
pub struct AuthorizeLayer {
    check: Option<Check>,
}

impl AuthorizeLayer {
    /// With the table alone.
    #[must_use]
    pub fn new() -> Self {
        Self { check: None }
    }

    /// With the table and a look at every peer.
    #[must_use]
    pub fn with_check(check: Check) -> Self {
        Self { check: Some(check) }
    }
}

impl Default for AuthorizeLayer {
    fn default() -> Self {
        Self::new()
    }
}

impl fmt::Debug for AuthorizeLayer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("AuthorizeLayer")
    }
}

impl<S> Layer<S> for AuthorizeLayer {
    type Service = Authorize<S>;

    fn layer(&self, inner: S) -> Authorize<S> {
        Authorize {
            inner,
            check: self.check.clone(),
        }
    }
}

/// See [`AuthorizeLayer`].
#[derive(Clone)]
pub struct Authorize<S> {
    inner: S,
    check: Option<Check>,
}

impl<S> fmt::Debug for Authorize<S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Authorize")
    }
}

impl<S> Authorize<S> {
    /// The caller with the role it has now, if it may call `path`.
    fn admit(&self, path: &str, info: Option<&ConnectionInfo>) -> Result<Caller, Refusal> {
        let mut caller = info.map_or(Caller::Anonymous, |info| info.caller.clone());
        if let (Caller::Peer(peer), Some(check)) = (&mut caller, &self.check) {
            let granted = check(peer)
                .map_err(|reason| Refusal::Removed(format!("{path} is refused: {reason}")))?;
            if granted == NodeRole::Worker && allowed(path) != Some(Allowed::Member) {
                peer.role = NodeRole::Worker;
            }
        }
        authorize(path, &caller).map(|()| caller)
    }
}

impl<S, B, R> Service<http::Request<B>> for Authorize<S>
where
    S: Service<http::Request<B>, Response = http::Response<R>>,
    S::Future: Send + 'static,
    R: Default + Send + 'static,
    S::Error: Send + 'static,
{
    type Response = http::Response<R>;
    type Error = S::Error;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, S::Error>> + Send>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, mut request: http::Request<B>) -> Self::Future {
        let info = request.extensions().get::<ConnectionInfo>();
        match self.admit(request.uri().path(), info) {
            Ok(caller) => {
                request.extensions_mut().insert(caller);
                Box::pin(self.inner.call(request))
            }
            Err(refusal) => {
                let from = info.and_then(|info| info.remote_addr);
                let from = from.map_or_else(|| "local".to_owned(), |addr| addr.to_string());
                tracing::warn!(from, reason = %refusal, "request refused");
                let response = Status::from(refusal).into_http();
                Box::pin(std::future::ready(Ok(response)))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use prost::Message as _;

    use super::*;

    fn peer(role: NodeRole) -> Caller {
        Caller::Peer(PeerIdentity {
            node_id: "n1".into(),
            role,
            cluster_id: "c1".into(),
        })
    }

    fn served() -> Vec<String> {
        let set = prost_types::FileDescriptorSet::decode(swarm_proto::FILE_DESCRIPTOR_SET).unwrap();
        let mut methods = Vec::new();
        for file in &set.file {
            for service in &file.service {
                for method in &service.method {
                    methods.push(format!(
                        "/{}.{}/{}",
                        file.package(),
                        service.name(),
                        method.name()
                    ));
                }
            }
        }
        methods
    }

    #[test]
    fn every_method_is_in_the_table_once_and_nothing_else_of_ours_is() {
        let served = served();
        assert!(served.len() > 30);
        for method in &served {
            let entries = TABLE.iter().filter(|(path, _)| path == method).count();
            assert_eq!(entries, 1, "{method} is {entries} times in the table");
        }
        for (path, _) in TABLE.iter().filter(|(path, _)| path.starts_with("/swarm.")) {
            assert!(served.iter().any(|method| method == path), "{path} is gone");
        }
    }

    #[test]
    fn without_a_certificate_there_is_only_the_ca() {
        for (path, _) in TABLE {
            let allowed = authorize(path, &Caller::Anonymous).is_ok();
            assert_eq!(allowed, path.starts_with("/swarm.v1.Ca/"), "{path}");
        }
    }

    #[test]
    fn a_worker_may_call_neither_control_nor_raft_nor_the_local_node() {
        for (path, _) in TABLE {
            let expected = ["/swarm.v1.Ca/", "/swarm.v1.Dispatcher/", "/grpc."]
                .iter()
                .any(|prefix| path.starts_with(prefix));
            let allowed = authorize(path, &peer(NodeRole::Worker));
            assert_eq!(allowed.is_ok(), expected, "{path}");
        }
        let refusal = authorize("/swarm.v1.Control/ListNodes", &peer(NodeRole::Worker));
        assert_eq!(
            refusal,
            Err(Refusal::Denied(
                "/swarm.v1.Control/ListNodes is only for managers and the local socket, not for worker n1"
                    .to_owned()
            ))
        );
    }

    #[test]
    fn a_manager_may_call_everything_but_the_local_node() {
        for (path, _) in TABLE {
            let allowed = authorize(path, &peer(NodeRole::Manager)).is_ok();
            assert_eq!(allowed, !path.starts_with("/swarm.v1.NodeLocal/"), "{path}");
        }
    }

    #[test]
    fn the_local_socket_neither_votes_nor_registers() {
        for (path, _) in TABLE {
            let expected = ![
                "/swarm.v1.Raft/",
                "/swarm.v1.Liveness/",
                "/swarm.v1.Dispatcher/",
            ]
            .iter()
            .any(|prefix| path.starts_with(prefix));
            assert_eq!(authorize(path, &Caller::Local).is_ok(), expected, "{path}");
        }
    }

    #[test]
    fn what_is_not_in_the_table_is_refused() {
        for path in ["/swarm.v1.Control/Format", "/", "", "/swarm.v1.Ca/"] {
            assert!(authorize(path, &peer(NodeRole::Manager)).is_err());
            assert!(authorize(path, &Caller::Local).is_err());
            assert!(authorize(path, &Caller::Anonymous).is_err());
        }
    }

    #[test]
    fn a_replica_that_lags_hears_its_leader_and_grants_nothing_else_to_a_demoted_manager() {
        let layer = AuthorizeLayer::with_check(Arc::new(|_| Ok(NodeRole::Worker)));
        let authorize = layer.layer(());
        let info = ConnectionInfo {
            caller: peer(NodeRole::Manager),
            remote_addr: None,
            _place: None,
        };
        let admits = |path| authorize.admit(path, Some(&info)).is_ok();
        assert!(admits("/swarm.v1.Raft/AppendEntries"));
        assert!(admits("/swarm.v1.Dispatcher/Session"));
        assert!(!admits("/swarm.v1.Raft/Propose"));
        assert!(!admits("/swarm.v1.Control/ListNodes"));
    }
}
