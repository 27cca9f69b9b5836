//! `swarmd`: one process per host. Agent always, manager when the node has that role.

mod address;
mod config;
mod found;
mod local;
mod manager;
mod member;
mod node;
mod settings;
mod switch;

use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;

use anyhow::{Context as _, Result};
use clap::Parser as _;
use swarm_agent::network::config::DataplaneConfig;
use swarm_agent::network::kernel::KernelDataplane;
use swarm_agent::runtime::{OciEngine, OciRuntime, RuntimeConfig};
use swarm_identity::{AuthorizeLayer, LocalListener, grpc_server};
use swarm_proto::defaults::MESSAGE_MAX;
use swarm_proto::v1::node_local_server::NodeLocalServer;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;
use tonic::service::Routes;

use crate::config::{Args, File};
use crate::local::LocalService;
use crate::node::Node;
use crate::switch::{ManagerSlot, Switch};

/// How long a stop may take before the process ends all the same.
const STOP_LIMIT: std::time::Duration = std::time::Duration::from_secs(20);
/// Services that every node has on its local socket.
const OWN_SERVICES: &[&str] = &[
    "/swarm.v1.NodeLocal/",
    "/grpc.health.v1.Health/",
    "/grpc.reflection.v1.ServerReflection/",
    "/grpc.reflection.v1alpha.ServerReflection/",
];

fn main() -> ExitCode {
    // Containers' shims and the name server are this binary too, started again; they
    // must be single-threaded, so they come before everything else.
    if let Some(code) = reexecuted() {
        return code;
    }
    let args = Args::parse();
    start_log(&args);
    match run(args) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!("swarmd ends: {error:#}");
            eprintln!("swarmd: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn start_log(args: &Args) {
    let filter = tracing_subscriber::EnvFilter::try_from_default_env()
        .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new("info"));
    let log = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr);
    if args.log_json {
        log.json().init();
    } else {
        log.with_ansi(false).init();
    }
}

fn run(args: Args) -> Result<()> {
    let file = File::load(&args.config)?;
    if !nix::unistd::geteuid().is_root() {
        anyhow::bail!("namespaces, mounts and links need root: run swarmd as root");
    }
    rustls::crypto::ring::default_provider()
        .install_default()
        .map_err(|_| anyhow::anyhow!("another TLS provider is installed already"))?;
    tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .context("starting the async runtime")?
        .block_on(serve(args, file))
}

async fn serve(args: Args, file: File) -> Result<()> {
    for dir in [&args.data_dir, &args.run_dir] {
        std::fs::create_dir_all(dir).with_context(|| format!("making {}", dir.display()))?;
    }
    let hostname = nix::unistd::gethostname()
        .context("reading the host's name")?
        .to_string_lossy()
        .into_owned();
    let listener = LocalListener::bind(&args.run_dir.join("swarm.sock")).await?;
    let slot = ManagerSlot::default();
    let (fatal, mut fatal_reason) = mpsc::channel(1);
    let runtime = Arc::new(OciRuntime::new(runtime_config(&args, &file))?);
    let dataplane = Arc::new(KernelDataplane::new(DataplaneConfig::new(
        args.run_dir.clone(),
        own_binary(),
    ))?);
    let node = Node::new(
        args,
        file,
        hostname,
        slot.clone(),
        runtime,
        dataplane,
        fatal,
    );

    let stop = CancellationToken::new();
    let held = node.hold().await;
    let server = tokio::spawn({
        let services = Switch::new(local_routes(Arc::clone(&node))?, OWN_SERVICES, slot);
        let stop = stop.clone();
        async move {
            grpc_server()
                .layer(AuthorizeLayer::new())
                .serve_with_incoming_shutdown(services, listener.incoming(), stop.cancelled())
                .await
        }
    });
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    node.resume(held).await?;

    let ended = tokio::select! {
        _ = terminate.recv() => Ok(()),
        _ = interrupt.recv() => Ok(()),
        Some(reason) = fatal_reason.recv() => Err(anyhow::anyhow!("{reason}")),
    };
    tracing::info!("stopping; containers go on");
    let stopping = async {
        node.stop().await;
        stop.cancel();
        // Streams of clients that stay connected end with the process.
        drop(server);
    };
    tokio::select! {
        () = stopping => {}
        () = tokio::time::sleep(STOP_LIMIT) => tracing::warn!("not everything stopped within {STOP_LIMIT:?}"),
        _ = terminate.recv() => tracing::warn!("told to stop twice: ending at once"),
    }
    ended
}

fn local_routes(node: Arc<Node>) -> Result<Routes> {
    let local =
        NodeLocalServer::new(LocalService::new(node)).max_decoding_message_size(MESSAGE_MAX);
    with_reflection(Routes::new(local))
}

/// Adds what every listener has: reflection, so that clients need no .proto files, and health.
fn with_reflection(routes: Routes) -> Result<Routes> {
    let reflection = || {
        tonic_reflection::server::Builder::configure()
            .register_encoded_file_descriptor_set(swarm_proto::FILE_DESCRIPTOR_SET)
    };
    // A listener serves as long as it is there: the empty name is the server itself.
    let (_, health) = tonic_health::server::health_reporter();
    Ok(routes
        .add_service(reflection().build_v1()?)
        .add_service(reflection().build_v1alpha()?)
        .add_service(health))
}

fn runtime_config(args: &Args, file: &File) -> RuntimeConfig {
    let mut config =
        RuntimeConfig::new(args.data_dir.join("runtime"), args.run_dir.join("runtime"));
    config
        .insecure_registries
        .clone_from(&file.insecure_registries);
    config.shim_exe = own_binary();
    if let Some(path) = file
        .oci_runtime
        .as_deref()
        .filter(|path| *path != "builtin")
    {
        config.oci_runtime = OciEngine::Path(PathBuf::from(path));
    }
    if let Some(parent) = &file.cgroup_parent {
        parent
            .trim_matches('/')
            .clone_into(&mut config.cgroup_parent);
    }
    if let Some(bytes) = file.log_max_size {
        config.log.max_bytes = bytes;
    }
    if let Some(files) = file.log_max_files {
        config.log.max_files = files;
    }
    config
}

/// This program, as long as it runs: also after the file was replaced by an upgrade.
fn own_binary() -> PathBuf {
    std::env::current_exe().unwrap_or_else(|_| PathBuf::from("/proc/self/exe"))
}

/// Does what a re-executed binary is for: `shim`, `exec-shim`, `names`.
fn reexecuted() -> Option<ExitCode> {
    if let Some(code) = swarm_agent::runtime::reexec() {
        return Some(code);
    }
    let mut args = std::env::args_os().skip(1);
    if args.next()? != "names" {
        return None;
    }
    Some(match swarm_agent::network::names::names_main(args) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("swarmd names: {error}");
            ExitCode::FAILURE
        }
    })
}
