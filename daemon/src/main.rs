//! `swarmd`: one process per host. Agent always, manager when the node has that role.

use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;

use anyhow::{Context as _, Result};
use clap::Parser as _;
use swarm_agent::network::config::DataplaneConfig;
use swarm_agent::network::kernel::KernelDataplane;
use swarm_agent::runtime::{OciEngine, OciRuntime, RuntimeConfig};
use swarm_daemon::config::{Args, File};
use swarm_daemon::{Environment, ManagerSlot, Node, ThisHost, local_services};
use swarm_disk::{SystemDisk, Threads};
use swarm_identity::{AuthorizeLayer, LocalListener, Tcp, grpc_server};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

/// How long a stop may take before the process ends all the same.
const STOP_LIMIT: std::time::Duration = std::time::Duration::from_secs(20);
/// What is logged unless `RUST_LOG` says otherwise. The raft core tells of every vote, and a member
/// that is cut off asks for votes all the time; who leads is told by us.
const LOGGED: &str = "info,openraft=warn";

fn main() -> ExitCode {
    // Containers' shims and the name server are this binary too, started again; they
    // must be single-threaded, so they come before everything else.
    if let Some(code) = reexecuted() {
        return code;
    }
    let args = Args::parse();
    start_log(&args);
    #[cfg(feature = "museum")]
    if let Ok(bug) = std::env::var(swarm_proto::museum::VARIABLE)
        && let Err(reason) = swarm_proto::museum::put_back_named(&bug)
    {
        eprintln!("swarmd: {reason}");
        return ExitCode::FAILURE;
    }
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
        .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new(LOGGED));
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
    let environment = Environment {
        hostname,
        data_dir: args.data_dir,
        engine_labels: file.engine_labels.into_iter().collect(),
        host: Arc::new(ThisHost),
        net: Tcp::shared(),
        disk: SystemDisk::shared(),
        threads: Threads::Own,
        tune: Arc::new(|_| ()),
        runtime,
        dataplane,
    };
    let node = Node::new(environment, slot.clone(), fatal);

    let stop = CancellationToken::new();
    let held = node.hold().await;
    let server = tokio::spawn({
        let services = local_services(Arc::clone(&node), slot)?;
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
