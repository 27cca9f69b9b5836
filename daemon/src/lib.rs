//! The life of a node, as a library: what `swarmd` runs on a machine, and a simulation on none.
//!
//! [`Node`] owns everything; [`Environment`] is what it stands on. Starts nothing by itself.

pub mod address;
pub mod config;
pub mod environment;
mod found;
#[cfg(feature = "fuzzing")]
pub mod fuzzing;
mod local;
pub mod manager;
pub mod member;
pub mod node;
pub mod settings;
pub mod switch;

use std::sync::Arc;

use anyhow::Result;
use swarm_proto::defaults::MESSAGE_MAX;
use swarm_proto::v1::node_local_server::NodeLocalServer;
use tonic::service::Routes;
use tonic_health::pb::health_server::HealthServer;
use tonic_health::server::{HealthReporter, HealthService};

pub use crate::environment::{Environment, Host, ThisHost, Tune};
use crate::local::LocalService;
pub use crate::node::Node;
pub use crate::switch::{ManagerSlot, Switch};

/// Services that every node has on its local socket.
const OWN_SERVICES: &[&str] = &[
    "/swarm.v1.NodeLocal/",
    "/grpc.health.v1.Health/",
    "/grpc.reflection.v1.ServerReflection/",
    "/grpc.reflection.v1alpha.ServerReflection/",
];

/// What a node's local socket serves: its own services, and the managers' while it is one.
///
/// # Errors
/// The built-in descriptions of the services cannot be read.
pub fn local_services(node: Arc<Node>, slot: ManagerSlot) -> Result<Switch> {
    Ok(Switch::new(local_routes(node)?, OWN_SERVICES, slot))
}

fn local_routes(node: Arc<Node>) -> Result<Routes> {
    let local =
        NodeLocalServer::new(LocalService::new(node)).max_decoding_message_size(MESSAGE_MAX);
    // A listener serves as long as it is there: the empty name is the server itself.
    with_reflection(Routes::new(local), HealthReporter::new())
}

/// Adds what every listener has: reflection, so that clients need no .proto files, and health.
pub(crate) fn with_reflection(routes: Routes, health: HealthReporter) -> Result<Routes> {
    let reflection = || {
        tonic_reflection::server::Builder::configure()
            .register_encoded_file_descriptor_set(swarm_proto::FILE_DESCRIPTOR_SET)
    };
    Ok(routes
        .add_service(reflection().build_v1()?)
        .add_service(reflection().build_v1alpha()?)
        .add_service(HealthServer::new(HealthService::from_health_reporter(
            health,
        ))))
}
