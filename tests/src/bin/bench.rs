//! Measures clusters on this machine and prints tables; `tests/bench` builds it and runs it.

use std::fs;
use std::path::PathBuf;

use anyhow::{Result, bail, ensure};
use clap::{Parser, Subcommand};
use swarm_tests::bench::load::LoadArgs;
use swarm_tests::bench::report::Report;
use swarm_tests::bench::{Bench, PARTS, Part, load, machine, overlay};

/// Measures clusters on this machine: everything, or the parts that are named
#[derive(Parser)]
#[command(args_conflicts_with_subcommands = true)]
struct Args {
    /// What to measure; nothing = all. `--list` says what there is
    parts: Vec<String>,
    /// Say what there is to measure, and end
    #[arg(long)]
    list: bool,
    /// How often each figure is measured
    #[arg(long, default_value_t = 3)]
    rounds: usize,
    /// How often the leader is killed
    #[arg(long)]
    kills: Option<usize>,
    /// Seconds of one load of writes, at least 2.5
    #[arg(long, default_value_t = 3.0)]
    seconds: f64,
    /// Measure Docker Swarm beside it, if dockerd is installed
    #[arg(long)]
    with_docker: bool,
    /// The commit that is measured, for the heading
    #[arg(long, default_value = "unknown")]
    commit: String,
    /// Write every sample to this file
    #[arg(long)]
    json: Option<PathBuf>,
    /// Write the tables to this file
    #[arg(long)]
    markdown: Option<PathBuf>,
    #[command(subcommand)]
    program: Option<Program>,
}

/// What measures in another way, and what the bench runs on hosts.
#[derive(Subcommand)]
enum Program {
    /// Write as fast as possible
    #[command(hide = true)]
    Load(LoadArgs),
    /// Whether a member of etcd leads
    #[command(hide = true)]
    EtcdLeads { addr: String, identity: String },
    /// Answer each message with itself
    #[command(hide = true)]
    Echo { addr: String },
    /// Print the median round trip in microseconds
    #[command(hide = true)]
    RoundTrip { addr: String },
}

fn main() -> Result<()> {
    let args = Args::parse();
    match args.program {
        None => measure(args),
        Some(Program::Load(load_args)) => on_two_threads(load::run(load_args)),
        Some(Program::EtcdLeads { addr, identity }) => {
            println!("{}", on_two_threads(load::etcd_leads(&addr, &identity))?);
            Ok(())
        }
        Some(Program::Echo { addr }) => overlay::echo(&addr),
        Some(Program::RoundTrip { addr }) => {
            println!("{}", overlay::round_trip(&addr)?);
            Ok(())
        }
    }
}

fn on_two_threads<T>(work: impl Future<Output = Result<T>>) -> Result<T> {
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()?
        .block_on(work)
}

fn measure(args: Args) -> Result<()> {
    if args.list {
        for part in PARTS {
            println!("{:10} {}", part.name, part.about);
        }
        return Ok(());
    }
    ensure!(args.rounds > 0, "at least one round");
    ensure!(
        args.seconds >= 2.5,
        "a load of writes takes at least 2.5 seconds"
    );
    let parts: Vec<&Part> = if args.parts.is_empty() {
        PARTS.iter().collect()
    } else {
        args.parts
            .iter()
            .map(|name| {
                let found = PARTS.iter().find(|part| part.name == name);
                found.ok_or_else(|| anyhow::anyhow!("there is no part {name:?}; see --list"))
            })
            .collect::<Result<_>>()?
    };
    let bench = Bench {
        rounds: args.rounds,
        kills: args.kills,
        seconds: args.seconds,
        with_docker: args.with_docker,
    };
    let mut report = Report::new(format!(
        "Measured by `tests/bench` at commit {} on {}; servers, agents, containers and clients share the cores.",
        args.commit,
        machine::describe()
    ));
    let mut failed = Vec::new();
    for part in parts {
        eprintln!("measuring {}: {}", part.name, part.about);
        // A part that fails does not take the others' figures with it.
        if let Err(error) = (part.run)(&bench, &mut report) {
            eprintln!("{}: {error:#}", part.name);
            failed.push(part.name);
        }
    }
    if let Some(path) = args.json {
        fs::write(&path, serde_json::to_vec_pretty(&report.json())?)?;
    }
    if let Some(path) = args.markdown {
        fs::write(&path, report.markdown())?;
    }
    if !failed.is_empty() {
        bail!("not measured: {}", failed.join(", "));
    }
    Ok(())
}
