//! Everything a manager decides.
//!
//! [`Manager`] puts the parts together: the services that every manager
//! answers from its own replica, and the loops that run on the leader. It knows the raft
//! group as a [`Consensus`] only, and touches neither disk nor kernel.

pub mod ca;
pub mod clock;
pub mod control;
pub mod dispatcher;
#[cfg(feature = "fuzzing")]
pub mod fuzzing;
pub mod leader;
pub mod orchestrator;
pub mod scheduler;
#[cfg(test)]
mod world;

use std::sync::Arc;

use swarm_identity::Identity;
use swarm_proto::NodeId;
use swarm_proto::v1::ca_server::CaServer;
use swarm_proto::v1::liveness_server::LivenessServer;
use swarm_store::Consensus;
use tokio_util::sync::CancellationToken;
use tonic::service::Routes;

use crate::ca::CaService;
use crate::clock::{Clock, system_clock};
use crate::control::Control;
use crate::dispatcher::{Connect, Dispatcher, Liveness};
use crate::leader::{Leader, deciding_loops};

pub use crate::dispatcher::Hearing;

/// A request for a certificate is small; whoever sends more has no certificate yet.
const CA_MESSAGE_MAX: usize = 64 << 10;

/// What a manager is made of.
#[derive(Clone)]
pub struct ManagerConfig {
    /// The raft group.
    pub consensus: Arc<dyn Consensus>,
    /// This manager's node.
    pub node_id: NodeId,
    /// Where it reads the time.
    pub clock: Clock,
    /// How it tells the leader whom it hears: what waits there would be taken for silence.
    pub connect: Connect,
}

impl std::fmt::Debug for ManagerConfig {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ManagerConfig")
            .field("node_id", &self.node_id)
            .finish_non_exhaustive()
    }
}

impl ManagerConfig {
    /// A manager with this identity, by the machine's clock.
    #[must_use]
    pub fn new(consensus: Arc<dyn Consensus>, identity: Arc<Identity>) -> Self {
        Self {
            consensus,
            node_id: identity.node_id(),
            clock: system_clock(),
            connect: Arc::new(move |addr| {
                let channel = identity.urgent_channel(addr);
                channel.map_err(|error| error.to_string())
            }),
        }
    }
}

/// A manager that runs.
#[derive(Debug)]
pub struct Manager {
    routes: Routes,
    leader: Leader,
    dispatcher: Dispatcher,
    stopping: CancellationToken,
}

impl Manager {
    /// Starts the loops. Whether this manager leads is up to the raft group.
    #[must_use]
    pub fn start(config: ManagerConfig) -> Self {
        let ManagerConfig {
            consensus,
            node_id,
            clock,
            connect,
        } = config;
        let stopping = CancellationToken::new();
        let control = Control::new(
            consensus.clone(),
            node_id.clone(),
            clock.clone(),
            stopping.clone(),
        );
        let ca = CaService::new(consensus.clone(), node_id.clone(), clock.clone());
        let dispatcher =
            Dispatcher::start(consensus.clone(), node_id.clone(), clock.clone(), connect);
        let routes = Routes::new(control.into_server())
            .add_service(CaServer::new(ca).max_decoding_message_size(CA_MESSAGE_MAX))
            .add_service(dispatcher.service())
            .add_service(dispatcher.liveness_service());
        let mut loops = deciding_loops();
        loops.extend(dispatcher.leader_loops());
        let leader = Leader::start(consensus, node_id, clock, loops);
        Self {
            routes,
            leader,
            dispatcher,
            stopping,
        }
    }

    /// The services of this crate. Who may call what is decided in a layer around them
    /// ([`swarm_identity::AuthorizeLayer`] with [`ca::admission`]).
    #[must_use]
    pub fn routes(&self) -> Routes {
        self.routes.clone()
    }

    /// What takes in the reports of live nodes, to be served also where nothing waits for other work.
    #[must_use]
    pub fn liveness_service(&self) -> LivenessServer<Liveness> {
        self.dispatcher.liveness_service()
    }

    /// Whether a leader hears this manager; if not, agents are better off with another.
    #[must_use]
    pub fn hearing(&self) -> tokio::sync::watch::Receiver<Hearing> {
        self.dispatcher.liveness().hearing()
    }

    /// Ends watches, sessions and loops; returns once the loops have ended.
    pub async fn stop(self) {
        self.stopping.cancel();
        // Agents first: they look for another manager while the loops end.
        self.dispatcher.stop().await;
        self.leader.stop().await;
    }
}
