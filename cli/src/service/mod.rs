//! `swarm service …`

pub(crate) mod create;
pub(crate) mod flags;
mod image;
mod inspect;
mod ls;
mod progress;
mod ps;
mod rm;
pub(crate) mod scale;
pub(crate) mod spec;
mod update;

use swarm_proto::v1::{GetServiceRequest, Service, ServiceSpec, UpdateServiceRequest};
use tonic::Code;

use crate::daemon::Daemon;
use crate::failure::Result;

/// Manage services
#[derive(clap::Subcommand, Debug)]
pub enum Command {
    Create(Box<create::Create>),
    Inspect(inspect::Inspect),
    #[command(alias = "list")]
    Ls(ls::Ls),
    Ps(ps::Ps),
    #[command(alias = "remove")]
    Rm(rm::Rm),
    Scale(scale::Scale),
    Update(Box<update::Update>),
}

/// Runs the verb.
pub async fn run(command: Command, daemon: &Daemon) -> Result {
    match command {
        Command::Create(flags) => create::run(*flags, daemon).await,
        Command::Inspect(flags) => inspect::run(flags, daemon).await,
        Command::Ls(flags) => ls::run(flags, daemon).await,
        Command::Ps(flags) => ps::run(flags, daemon).await,
        Command::Rm(flags) => rm::run(flags, daemon).await,
        Command::Scale(flags) => scale::run(flags, daemon).await,
        Command::Update(flags) => update::run(*flags, daemon).await,
    }
}

/// Others may change the service between our read and our write.
const ATTEMPTS: u32 = 5;

async fn get(daemon: &Daemon, reference: &str) -> Result<Service> {
    let request = GetServiceRequest {
        r#ref: reference.to_owned(),
    };
    Ok(daemon.control().get_service(request).await?.into_inner())
}

/// Reads a service, makes its new spec, writes it; again when somebody else was faster.
async fn change(
    daemon: &Daemon,
    reference: &str,
    new: impl Fn(&Service) -> std::result::Result<ServiceSpec, String>,
) -> Result<Service> {
    let mut attempt = 1;
    loop {
        let service = get(daemon, reference).await?;
        let request = UpdateServiceRequest {
            service_id: service.id.clone(),
            version: version(&service),
            spec: Some(new(&service)?),
        };
        match daemon.control().update_service(request).await {
            Ok(updated) => return Ok(updated.into_inner()),
            Err(status) if status.code() == Code::Aborted && attempt < ATTEMPTS => attempt += 1,
            Err(status) => return Err(status.into()),
        }
    }
}

fn version(service: &Service) -> u64 {
    let meta = service.meta.as_ref();
    meta.and_then(|meta| meta.version)
        .map_or(0, |version| version.index)
}

fn name(service: &Service) -> String {
    let annotations = service
        .spec
        .as_ref()
        .and_then(|spec| spec.annotations.as_ref());
    annotations
        .map(|annotations| annotations.name.clone())
        .unwrap_or_default()
}
