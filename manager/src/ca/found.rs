//! The first transaction of a cluster: what `swarm init` writes into an empty log.
//!
//! Pure but for the keys it makes.

use std::fmt;
use std::time::{Duration, SystemTime};

use swarm_identity::{CaError, KeyMaterial, NewKey, PeerIdentity, RootCa};
use swarm_proto::defaults::NODE_CERT_LIFE;
use swarm_proto::v1::{
    AllocateRaftId, Annotations, Cluster, ClusterSpec, JoinTokens, Node, NodeAvailability,
    NodeDescription, NodeRole, NodeSpec, NodeStatus, Object, StoreAction, Transaction, object,
    store_action::Action,
};
use swarm_proto::{ClusterId, NodeId};

use super::new_tokens;
use crate::clock::timestamp;

/// What `swarm init` decides. Addresses and pools have been checked.
#[derive(Clone, Debug)]
pub struct InitParams {
    /// A new one.
    pub cluster_id: ClusterId,
    /// A new one, of the node that becomes the first manager.
    pub node_id: NodeId,
    /// Its hostname.
    pub hostname: String,
    /// host:port of its API.
    pub advertise_addr: String,
    /// Its availability.
    pub availability: NodeAvailability,
    /// CIDRs that overlay subnets are cut from.
    pub default_addr_pool: Vec<String>,
    /// Prefix length of a subnet cut from the pool.
    pub subnet_size: u32,
    /// UDP port of the VXLAN traffic.
    pub data_path_port: u32,
    /// Life of nodes' certificates; `None` = the default.
    pub node_cert_expiry: Option<Duration>,
    /// Of the agents; `None` = the default.
    pub heartbeat_period: Option<Duration>,
}

/// What a new cluster starts from.
pub struct Founding {
    /// To be committed first. Makes the cluster and its first node, whose raft ID becomes 1.
    pub transaction: Transaction,
    /// The first node's key, certificate and root.
    pub material: KeyMaterial,
    /// For those who join.
    pub tokens: JoinTokens,
    /// The first node.
    pub node_id: NodeId,
}

impl fmt::Debug for Founding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Founding({})", self.node_id)
    }
}

/// A new root, tokens, cluster and first node; `now` is the time since the Unix epoch.
///
/// # Errors
/// No key can be made.
pub fn initial_transaction(params: &InitParams, now: Duration) -> Result<Founding, CaError> {
    let clock = SystemTime::UNIX_EPOCH + now;
    let root = RootCa::create(clock)?;
    let tokens = new_tokens(&root.digest());
    let key = NewKey::generate()?;
    let subject = PeerIdentity {
        node_id: params.node_id.clone(),
        role: NodeRole::Manager,
        cluster_id: params.cluster_id.clone(),
    };
    let life = params.node_cert_expiry.unwrap_or(NODE_CERT_LIFE);
    let chain_pem = root.sign(key.csr_pem.as_bytes(), &subject, life, clock)?;
    let create = |object| {
        Action::Create(Object {
            object: Some(object),
        })
    };
    let actions = [
        create(object::Object::Cluster(cluster(params, &root, &tokens))),
        create(object::Object::Node(first_node(params))),
        Action::AllocateRaftId(AllocateRaftId {
            node_id: params.node_id.to_string(),
            addr: params.advertise_addr.clone(),
        }),
    ];
    Ok(Founding {
        transaction: Transaction {
            actions: actions
                .into_iter()
                .map(|action| StoreAction {
                    action: Some(action),
                })
                .collect(),
            proposed_at: Some(timestamp(now)),
            proposer: params.node_id.to_string(),
            ..Transaction::default()
        },
        material: KeyMaterial {
            chain_pem,
            key_pem: key.key_pem.into(),
            root_pem: root.cert_pem().to_owned(),
        },
        tokens,
        node_id: params.node_id.clone(),
    })
}

fn cluster(params: &InitParams, root: &RootCa, tokens: &JoinTokens) -> Cluster {
    let span = |given: Option<Duration>| given.and_then(|span| span.try_into().ok());
    Cluster {
        id: params.cluster_id.to_string(),
        spec: Some(ClusterSpec {
            annotations: Some(Annotations {
                name: "default".to_owned(),
                ..Annotations::default()
            }),
            node_cert_expiry: span(params.node_cert_expiry),
            heartbeat_period: span(params.heartbeat_period),
            ..ClusterSpec::default()
        }),
        root_ca: Some(swarm_proto::v1::RootCa {
            cert_pem: root.cert_pem().to_owned().into(),
            key_pem: root.key_pem().to_owned().into(),
            digest: root.digest().to_string(),
            join_tokens: Some(tokens.clone()),
        }),
        default_addr_pool: params.default_addr_pool.clone(),
        subnet_size: params.subnet_size,
        data_path_port: params.data_path_port,
        next_raft_id: 1,
        ..Cluster::default()
    }
}

fn first_node(params: &InitParams) -> Node {
    Node {
        id: params.node_id.to_string(),
        spec: Some(NodeSpec {
            desired_role: NodeRole::Manager.into(),
            availability: params.availability.into(),
            ..NodeSpec::default()
        }),
        description: Some(NodeDescription {
            hostname: params.hostname.clone(),
            ..NodeDescription::default()
        }),
        status: Some(NodeStatus::default()),
        role: NodeRole::Manager.into(),
        ..Node::default()
    }
}
