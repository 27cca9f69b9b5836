//! The CA: gives out the root, and certificates to those who may have one.
//!
//! Runs on every manager: the root's key is in the replicated cluster object, so
//! any of them signs. Reads are linearizable, a new node is proposed through
//! [`Consensus`]; starts no loops. A certificate's subject, names and life are
//! chosen here, never by the applicant.

mod found;

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use swarm_identity::{
    Caller, Check, JoinToken, PeerIdentity, RootCa, RootDigest, remote_addr, same_token,
};
use swarm_proto::defaults::NODE_CERT_LIFE;
use swarm_proto::v1::ca_server::Ca;
use swarm_proto::v1::{
    Cluster, GetRootCaRequest, GetRootCaResponse, IssueCertificateRequest,
    IssueCertificateResponse, JoinTokens, Node, NodeDescription, NodeRole, NodeSpec, NodeStatus,
    Object, StoreAction, Transaction, object, store_action,
};
use swarm_proto::{ClusterId, NodeId};
use swarm_store::{Consensus, ProposeError, ReadError, Store};
use tonic::{Request, Response, Status};

pub use found::{Founding, InitParams, initial_transaction};

use crate::clock::{Clock, span, timestamp};

/// Longest hostname that is taken from an applicant.
const HOSTNAME_MAX: usize = 253;

/// The `Ca` service.
pub struct CaService {
    consensus: Arc<dyn Consensus>,
    node_id: NodeId,
    clock: Clock,
}

impl CaService {
    /// The service on the manager `node_id`.
    #[must_use]
    pub fn new(consensus: Arc<dyn Consensus>, node_id: NodeId, clock: Clock) -> Self {
        Self {
            consensus,
            node_id,
            clock,
        }
    }

    /// The role that a token stands for.
    fn role_of(cluster: &Cluster, token: &str) -> Option<NodeRole> {
        let tokens = cluster.root_ca.as_ref()?.join_tokens.as_ref()?;
        // Both are compared, always: the time tells nothing.
        let worker = same_token(token, &tokens.worker);
        let manager = same_token(token, &tokens.manager);
        match (worker, manager) {
            (true, _) => Some(NodeRole::Worker),
            (_, true) => Some(NodeRole::Manager),
            _ => None,
        }
    }

    /// Makes the node that a token's holder becomes.
    async fn admit(
        &self,
        cluster: &Cluster,
        request: &IssueCertificateRequest,
        from: &str,
    ) -> Result<(NodeId, NodeRole), Status> {
        let Some(role) = Self::role_of(cluster, &request.token) else {
            tracing::warn!(from, hostname = %request.hostname, "join refused: invalid join token");
            return Err(Status::permission_denied("invalid join token"));
        };
        let id = NodeId::random();
        let node = Node {
            id: id.to_string(),
            spec: Some(NodeSpec {
                desired_role: role.into(),
                availability: request.availability,
                ..NodeSpec::default()
            }),
            description: Some(NodeDescription {
                hostname: request.hostname.clone(),
                ..NodeDescription::default()
            }),
            status: Some(NodeStatus::default()),
            role: role.into(),
            ..Node::default()
        };
        let transaction = Transaction {
            actions: vec![StoreAction {
                action: Some(store_action::Action::Create(Object {
                    object: Some(object::Object::Node(node)),
                })),
            }],
            proposed_at: Some(timestamp((self.clock)())),
            proposer: self.node_id.to_string(),
            ..Transaction::default()
        };
        self.consensus
            .propose(transaction)
            .await
            .map_err(propose_status)?;
        Ok((id, role))
    }
}

/// Whether the certificate holder is shut out.
fn blacklisted(cluster: &Cluster, node_id: &str) -> bool {
    cluster.blacklisted_nodes.contains_key(node_id)
}

/// What [`swarm_identity::AuthorizeLayer`] asks at each request of a peer: removed
/// nodes are refused, and a manager that was demoted has a worker's rights from
/// the moment the cluster says so, whatever its certificate says. A node that this
/// replica does not know (yet) has its certificate's role.
#[must_use]
pub fn admission(store: Arc<Store>) -> Check {
    Arc::new(move |peer: &PeerIdentity| {
        let state = store.state();
        if let Some(cluster) = state.cluster()
            && blacklisted(cluster, &peer.node_id)
        {
            return Err(format!(
                "node {} was removed from the cluster",
                peer.node_id
            ));
        }
        let granted = state.node(&peer.node_id).map(|node| node.role());
        Ok(granted.unwrap_or(peer.role))
    })
}

/// New tokens for both roles.
#[must_use]
pub fn new_tokens(root: &RootDigest) -> JoinTokens {
    JoinTokens {
        worker: JoinToken::generate(root).as_str().to_owned(),
        manager: JoinToken::generate(root).as_str().to_owned(),
    }
}

fn propose_status(error: ProposeError) -> Status {
    match error {
        ProposeError::NoLeader(_)
        | ProposeError::Unknown(_)
        | ProposeError::Denied(_)
        | ProposeError::Stopping => Status::unavailable(error.to_string()),
        ProposeError::Rejected(_) | ProposeError::TooLarge { .. } => {
            Status::internal(error.to_string())
        }
    }
}

fn read_status(error: ReadError) -> Status {
    Status::unavailable(error.to_string())
}

fn no_cluster() -> Status {
    Status::unavailable("this manager has no cluster yet")
}

#[tonic::async_trait]
impl Ca for CaService {
    async fn get_root_ca(
        &self,
        _: Request<GetRootCaRequest>,
    ) -> Result<Response<GetRootCaResponse>, Status> {
        // From the replica as it is: the root must be had without a leader too.
        let state = self.consensus.store().state();
        let root = state.cluster().and_then(|cluster| cluster.root_ca.as_ref());
        let cert_pem = root.ok_or_else(no_cluster)?.cert_pem.clone();
        Ok(Response::new(GetRootCaResponse { cert_pem }))
    }

    async fn issue_certificate(
        &self,
        request: Request<IssueCertificateRequest>,
    ) -> Result<Response<IssueCertificateResponse>, Status> {
        let caller = Caller::of(&request);
        let from = remote_addr(&request).map_or_else(|| "?".to_owned(), |addr| addr.to_string());
        let request = request.into_inner();
        if request.hostname.len() > HOSTNAME_MAX {
            return Err(Status::invalid_argument(format!(
                "the hostname has more than {HOSTNAME_MAX} characters"
            )));
        }
        let state = self.consensus.read().await.map_err(read_status)?;
        let cluster = state.cluster().ok_or_else(no_cluster)?;
        let root = root_of(cluster)?;
        let now = SystemTime::UNIX_EPOCH + (self.clock)();
        let life = cert_life(cluster);
        let subject = |node_id: NodeId, role| PeerIdentity {
            node_id,
            role,
            cluster_id: ClusterId::from(&cluster.id),
        };
        let sign = |subject: &PeerIdentity| {
            root.sign(&request.csr_pem, subject, life, now)
                .map_err(|error| {
                    tracing::warn!(from, %subject, %error, "certificate refused");
                    Status::invalid_argument(error.to_string())
                })
        };

        let (subject, chain) = match caller {
            Caller::Peer(peer) => {
                let known = state
                    .node(&peer.node_id)
                    .filter(|_| !blacklisted(cluster, &peer.node_id));
                let Some(node) = known else {
                    tracing::warn!(from, node = %peer.node_id, "renewal refused: not a member");
                    return Err(Status::permission_denied(format!(
                        "node {} is not in the cluster any more",
                        peer.node_id
                    )));
                };
                let subject = subject(peer.node_id, node.role());
                let chain = sign(&subject)?;
                (subject, chain)
            }
            Caller::Local | Caller::Anonymous => {
                // Tried before the node is made: a bad request leaves no node behind.
                sign(&subject(NodeId::from("applicant"), NodeRole::Worker))?;
                let (id, role) = self.admit(cluster, &request, &from).await?;
                let subject = subject(id, role);
                let chain = sign(&subject)?;
                (subject, chain)
            }
        };
        tracing::info!(from, node = %subject.node_id, role = subject.role.as_str_name(), "certificate issued");
        Ok(Response::new(IssueCertificateResponse {
            cert_chain_pem: chain.into(),
            node_id: subject.node_id.into(),
            role: subject.role.into(),
        }))
    }
}

fn root_of(cluster: &Cluster) -> Result<RootCa, Status> {
    let broken = |reason: &str| {
        tracing::error!(reason, "the cluster's root cannot be used");
        Status::internal("the cluster's root cannot be used")
    };
    let root = cluster.root_ca.as_ref().ok_or_else(|| broken("none"))?;
    let text = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).map_err(|_| broken("not PEM"));
    RootCa::from_pem(&text(&root.cert_pem)?, &text(&root.key_pem)?)
        .map_err(|error| broken(&error.to_string()))
}

fn cert_life(cluster: &Cluster) -> Duration {
    let spec = cluster.spec.as_ref();
    span(
        spec.and_then(|spec| spec.node_cert_expiry.as_ref()),
        NODE_CERT_LIFE,
    )
}

#[cfg(test)]
mod tests {
    use prost_types::Timestamp;
    use swarm_identity::{Identity, KeyMaterial, Leaf, NewKey};
    use swarm_proto::v1::{NodeAvailability, NodeState};
    use swarm_store::testing::LocalConsensus;

    use super::*;
    use crate::clock::system_clock;

    fn params() -> InitParams {
        InitParams {
            cluster_id: ClusterId::random(),
            node_id: NodeId::random(),
            hostname: "h1".to_owned(),
            advertise_addr: "10.0.0.1:2377".to_owned(),
            availability: NodeAvailability::Active,
            default_addr_pool: vec!["10.0.0.0/8".to_owned()],
            subnet_size: 24,
            data_path_port: 4789,
            node_cert_expiry: None,
            heartbeat_period: None,
        }
    }

    async fn service() -> (Arc<LocalConsensus>, CaService, Founding) {
        let consensus = LocalConsensus::new();
        let clock = system_clock();
        let founding = initial_transaction(&params(), clock()).unwrap();
        consensus
            .propose(founding.transaction.clone())
            .await
            .unwrap();
        let service = CaService::new(consensus.clone(), NodeId::from("m1"), clock);
        (consensus, service, founding)
    }

    fn request(token: &str) -> IssueCertificateRequest {
        IssueCertificateRequest {
            csr_pem: NewKey::generate().unwrap().csr_pem.into(),
            token: token.to_owned(),
            availability: NodeAvailability::Drain.into(),
            hostname: "h2".to_owned(),
        }
    }

    fn from_peer(node_id: &str, role: NodeRole) -> Request<IssueCertificateRequest> {
        let mut request = Request::new(request(""));
        request.extensions_mut().insert(Caller::Peer(PeerIdentity {
            node_id: node_id.into(),
            role,
            cluster_id: "any".into(),
        }));
        request
    }

    fn cluster_of(consensus: &LocalConsensus) -> Cluster {
        (**consensus.store().state().cluster().unwrap()).clone()
    }

    async fn update(consensus: &LocalConsensus, object: object::Object) {
        let transaction = Transaction {
            actions: vec![StoreAction {
                action: Some(store_action::Action::Update(Object {
                    object: Some(object),
                })),
            }],
            ..Transaction::default()
        };
        consensus.propose(transaction).await.unwrap();
    }

    #[tokio::test]
    async fn init_makes_a_cluster_with_its_first_manager() {
        let (consensus, _, founding) = service().await;
        let state = consensus.store().state();
        let node = state.node(&founding.node_id).unwrap();
        assert_eq!(node.role(), NodeRole::Manager);
        assert_eq!(
            node.spec.as_ref().unwrap().desired_role(),
            NodeRole::Manager
        );
        let status = node.manager_status.as_ref().unwrap();
        assert_eq!(status.raft_id, 1);
        assert_eq!(status.addr, "10.0.0.1:2377");
        assert_eq!(state.cluster().unwrap().next_raft_id, 2);
        let identity = Identity::new(founding.material).unwrap();
        assert_eq!(identity.node_id(), founding.node_id);
        assert_eq!(identity.role(), NodeRole::Manager);
        assert_eq!(identity.cluster_id().as_str(), state.cluster().unwrap().id);
        assert_eq!(
            state.cluster().unwrap().root_ca.as_ref().unwrap().digest,
            identity.root_digest().to_string()
        );
    }

    #[tokio::test]
    async fn a_token_makes_a_node_of_its_role() {
        let (consensus, service, founding) = service().await;
        for (token, role) in [
            (&founding.tokens.worker, NodeRole::Worker),
            (&founding.tokens.manager, NodeRole::Manager),
        ] {
            let answer = service
                .issue_certificate(Request::new(request(token)))
                .await
                .unwrap()
                .into_inner();
            assert_eq!(answer.role(), role);
            let leaf = Leaf::from_chain_pem(&answer.cert_chain_pem).unwrap();
            assert_eq!(leaf.identity.role, role);
            assert_eq!(leaf.identity.node_id.as_str(), answer.node_id);
            let state = consensus.store().state();
            let node = state.node(&answer.node_id).unwrap();
            assert_eq!(node.role(), role);
            assert_eq!(
                node.spec.as_ref().unwrap().availability(),
                NodeAvailability::Drain
            );
            assert_eq!(node.description.as_ref().unwrap().hostname, "h2");
            assert_eq!(node.status.as_ref().unwrap().state(), NodeState::Unknown);
        }
    }

    #[tokio::test]
    async fn a_wrong_token_is_refused_and_makes_no_node() {
        let (consensus, service, founding) = service().await;
        let other = new_tokens(&RootDigest::of_der(b"x"));
        let cut = &founding.tokens.worker[..60];
        for token in ["", "SWMTKN-1-", cut, other.worker.as_str()] {
            let refusal = service
                .issue_certificate(Request::new(request(token)))
                .await
                .unwrap_err();
            assert_eq!(refusal.code(), tonic::Code::PermissionDenied);
            assert_eq!(refusal.message(), "invalid join token");
        }
        assert_eq!(consensus.store().state().nodes().count(), 1);
    }

    #[tokio::test]
    async fn a_rotated_token_is_worth_nothing() {
        let (consensus, service, founding) = service().await;
        let mut cluster = cluster_of(&consensus);
        let root = cluster.root_ca.as_mut().unwrap();
        let fresh = new_tokens(&RootDigest::of_pem(&root.cert_pem).unwrap());
        root.join_tokens.as_mut().unwrap().worker = fresh.worker.clone();
        update(&consensus, object::Object::Cluster(cluster)).await;
        let refusal = service
            .issue_certificate(Request::new(request(&founding.tokens.worker)))
            .await
            .unwrap_err();
        assert_eq!(refusal.message(), "invalid join token");
        for token in [fresh.worker, founding.tokens.manager] {
            service
                .issue_certificate(Request::new(request(&token)))
                .await
                .unwrap();
        }
    }

    #[tokio::test]
    async fn a_bad_request_makes_no_node() {
        let (consensus, service, founding) = service().await;
        let bad = IssueCertificateRequest {
            csr_pem: "nonsense".into(),
            ..request(&founding.tokens.worker)
        };
        let long = IssueCertificateRequest {
            hostname: "h".repeat(HOSTNAME_MAX + 1),
            ..request(&founding.tokens.worker)
        };
        for wrong in [bad, long] {
            let refusal = service
                .issue_certificate(Request::new(wrong))
                .await
                .unwrap_err();
            assert_eq!(refusal.code(), tonic::Code::InvalidArgument);
        }
        assert_eq!(consensus.store().state().nodes().count(), 1);
    }

    #[tokio::test]
    async fn a_renewal_is_for_the_role_that_the_cluster_says() {
        let (consensus, service, founding) = service().await;
        let answer = service
            .issue_certificate(Request::new(request(&founding.tokens.worker)))
            .await
            .unwrap()
            .into_inner();
        let mut node = (**consensus.store().state().node(&answer.node_id).unwrap()).clone();
        node.role = NodeRole::Manager.into();
        update(&consensus, object::Object::Node(node)).await;
        let renewed = service
            .issue_certificate(from_peer(&answer.node_id, NodeRole::Worker))
            .await
            .unwrap()
            .into_inner();
        assert_eq!(renewed.node_id, answer.node_id);
        assert_eq!(renewed.role(), NodeRole::Manager);
        assert_eq!(consensus.store().state().nodes().count(), 2);
    }

    #[tokio::test]
    async fn a_node_that_is_gone_or_blacklisted_gets_no_renewal() {
        let (consensus, service, founding) = service().await;
        let refusal = service
            .issue_certificate(from_peer("gone", NodeRole::Manager))
            .await
            .unwrap_err();
        assert_eq!(refusal.code(), tonic::Code::PermissionDenied);

        let check = admission(consensus.store().clone());
        let peer = PeerIdentity {
            node_id: founding.node_id.clone(),
            role: NodeRole::Manager,
            cluster_id: "any".into(),
        };
        assert_eq!(check(&peer), Ok(NodeRole::Manager));
        let mut cluster = cluster_of(&consensus);
        cluster
            .blacklisted_nodes
            .insert(founding.node_id.to_string(), Timestamp::default());
        update(&consensus, object::Object::Cluster(cluster)).await;
        let refusal = service
            .issue_certificate(from_peer(&founding.node_id, NodeRole::Manager))
            .await
            .unwrap_err();
        assert_eq!(refusal.code(), tonic::Code::PermissionDenied);
        assert!(check(&peer).is_err());
    }

    #[tokio::test]
    async fn a_demoted_manager_is_granted_a_worker_s_role_and_an_unknown_node_its_own() {
        let (consensus, _, founding) = service().await;
        let check = admission(consensus.store().clone());
        let mut node = (**consensus.store().state().node(&founding.node_id).unwrap()).clone();
        node.role = NodeRole::Worker.into();
        update(&consensus, object::Object::Node(node)).await;
        let mut peer = PeerIdentity {
            node_id: founding.node_id,
            role: NodeRole::Manager,
            cluster_id: "any".into(),
        };
        assert_eq!(check(&peer), Ok(NodeRole::Worker));
        peer.node_id = "new".into();
        assert_eq!(check(&peer), Ok(NodeRole::Manager));
    }

    #[tokio::test]
    async fn without_a_leader_the_root_is_given_and_no_certificate() {
        let (consensus, service, founding) = service().await;
        consensus.set_leadership(swarm_store::Leadership::default());
        service
            .get_root_ca(Request::new(GetRootCaRequest {}))
            .await
            .unwrap();
        let refusal = service
            .issue_certificate(Request::new(request(&founding.tokens.worker)))
            .await
            .unwrap_err();
        assert_eq!(refusal.code(), tonic::Code::Unavailable);
    }

    #[test]
    fn secrets_are_not_in_the_debug_form_of_what_init_makes() {
        let founding = initial_transaction(&params(), system_clock()()).unwrap();
        let text = format!("{founding:?}");
        assert!(!text.contains("PRIVATE"));
        assert!(!text.contains(&founding.tokens.worker));
        let _: KeyMaterial = founding.material;
    }
}
