//! `swarm service ps`

use std::collections::BTreeMap;

use swarm_proto::v1::ListTasksRequest;
use tonic::Code;

use crate::daemon::Daemon;
use crate::failure::{Failure, Result};
use crate::filter::Given;
use crate::output::list;
use crate::tasks::{self, TaskList};

/// List the tasks of one or more services
#[derive(clap::Args, Debug)]
pub struct Ps {
    #[command(flatten)]
    list: TaskList,
    /// The services
    #[arg(required = true)]
    services: Vec<String>,
}

/// Prints the list, then the services that there are not.
pub async fn run(flags: Ps, daemon: &Daemon) -> Result {
    let given = Given::parse(&flags.list.filter, tasks::FILTERS)?;
    let mut services = BTreeMap::new();
    let mut errors = Vec::new();
    for reference in &flags.services {
        match super::get(daemon, reference).await {
            Ok(service) => {
                services.insert(service.id.clone(), service);
            }
            Err(Failure::Daemon(status)) if status.code() == Code::NotFound => {
                errors.push(format!("no such service: {reference}"));
            }
            Err(failure) => return Err(failure),
        }
    }
    if !services.is_empty() {
        let request = ListTasksRequest {
            services: services.keys().cloned().collect(),
            ..tasks::request(&given)?
        };
        tasks::show(daemon, request, &given, &flags.list, &services).await?;
    }
    list::finish(&errors)
}
