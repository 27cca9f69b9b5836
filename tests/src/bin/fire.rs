//! Runs a cluster under fire, or only busy, and prints what came of it. See `docs/faults.md`.

use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use clap::{Parser, Subcommand};
use swarm_tests::cluster::Cluster;
use swarm_tests::fire::{alarms, nemesis, run};
use swarm_tests::museum;

/// Breaks a cluster on purpose while clients use it, and checks what they were answered.
#[derive(Parser)]
#[command(name = "tests/fire")]
struct Args {
    /// At least so many operations
    #[arg(long, default_value_t = 100_000)]
    ops: u64,
    /// How many managers
    #[arg(long, default_value_t = 3)]
    managers: u16,
    /// How many clients
    #[arg(long, default_value_t = 36)]
    clients: u16,
    /// Decides what the clients do, and which faults come after the first round
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Milliseconds that each fault holds
    #[arg(long, default_value_t = 2000)]
    hold: u64,
    /// Only faults whose name contains this; may be given more than once. "nothing" is none at all
    #[arg(long)]
    only: Vec<String>,
    /// Have the managers be wrong on purpose, by this bug of docs/museum.md, and pass when that is found out
    #[arg(long)]
    bug: Option<String>,
    #[command(subcommand)]
    part: Option<Part>,
}

#[derive(Subcommand)]
enum Part {
    /// Keep the machine busy, stall disks, silence nodes: no false alarm, and no missed one
    Alarms {
        /// Minutes with all cores busy
        #[arg(long, default_value_t = 10)]
        minutes: u64,
        /// Seconds with each stalling disk
        #[arg(long, default_value_t = 30)]
        stalled: u64,
    },
}

fn main() -> ExitCode {
    match fire(Args::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("fire: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn fire(args: Args) -> Result<()> {
    match args.part {
        None => {
            ensure!(
                (3..=9).contains(&args.managers) && (1..=1000).contains(&args.clients),
                "3 to 9 managers and 1 to 1000 clients"
            );
            let managers = usize::from(args.managers);
            let bug = args.bug.as_deref();
            if let Some(bug) = bug {
                museum::put_back(bug)?;
            }
            let mut cluster = Cluster::up(managers, managers)?;
            let options = run::Options {
                ops: args.ops,
                clients: args.clients,
                hold: Duration::from_millis(args.hold),
                seed: args.seed,
                faults: if args.only.is_empty() {
                    nemesis::ALL.to_vec()
                } else {
                    let named = |fault: &&nemesis::Fault| {
                        let name = fault.to_string();
                        args.only.iter().any(|only| name.contains(only))
                    };
                    nemesis::ALL.iter().filter(named).copied().collect()
                },
            };
            let summary = run::run(&mut cluster, &options)?;
            match bug {
                None => println!("{}", summary.verdict()?),
                Some(bug) => {
                    let caught = summary.caught();
                    println!("{}\n{bug}: caught", caught.context("not caught")?);
                }
            }
        }
        Some(Part::Alarms { minutes, stalled }) => {
            let mut cluster = Cluster::up(5, 3)?;
            let options = alarms::Options {
                busy: Duration::from_secs(60 * minutes),
                stalled: Duration::from_secs(stalled),
                ..alarms::Options::default()
            };
            println!("{}", alarms::run(&mut cluster, &options)?.verdict()?);
        }
    }
    Ok(())
}
