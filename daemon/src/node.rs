//! The life of this node: in no swarm, a worker, a manager, and the ways between.
//!
//! One owner of what runs: [`Node`]. `init`, `join`, `leave` and changes of role take one lock, so
//! that only one of them happens at a time. A change of role (promotion,
//! demotion) arrives as a new certificate; the supervisor then starts or stops
//! the manager. Containers are not touched by any of it but `leave`.

use std::net::IpAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use swarm_agent::agent::{Agent, AgentConfig};
use swarm_agent::network::{DataplaneConfig, KernelDataplane};
use swarm_agent::runtime::{
    ExecConfig, ExecSession, LogLimits, LogOptions, LogStream, OciEngine, OciRuntime, RuntimeConfig,
    RuntimeError,
};
use swarm_identity::{
    AuthorizeLayer, DataKey, Identity, JoinToken, KeyStore, Listener, Stored, fetch_root,
    grpc_server, keep_renewed, request_certificate,
};
use swarm_manager::{Manager, ManagerConfig};
use swarm_proto::defaults;
use swarm_proto::v1::{
    InfoResponse, InitRequest, InitResponse, JoinClusterRequest, JoinClusterResponse,
    LeaveClusterResponse, LocalNetwork, LocalState, NodeRole, Platform, RegistryAuth, Transaction,
};
use swarm_raft::{RaftConfig, RaftNode};
use swarm_store::Consensus as _;
use tokio::sync::{Mutex, mpsc, watch};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use tonic::Status;

use crate::address;
use crate::config::{Args, File};
use crate::settings::Settings;
use crate::switch::{ManagerSlot, NOT_IN_A_SWARM, PREPARING, WORKER};
