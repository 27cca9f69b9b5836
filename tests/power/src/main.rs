//! Cuts the power as often as it is told, and says what it saw: `tests/powercut --help`.

use std::process::ExitCode;
use std::time::Instant;

use anyhow::{Result, bail};
use clap::{Parser, Subcommand, ValueEnum};
use swarm_powercut::run::{Control, Kind, Run, Seen};

/// Power cuts against a manager's log and snapshots, the agent's store and the key file.
#[derive(Debug, Parser)]
#[command(name = "tests/powercut")]
struct Args {
    /// How often the power is cut.
    #[arg(long, default_value_t = 200)]
    cuts: u32,
    /// What to replay; another one each time if it is not given.
    #[arg(long)]
    seed: Option<u64>,
    /// Only this.
    #[arg(long)]
    only: Option<Only>,
    /// The disk answers syncs and does nothing. The run must fail; it passes when it does.
    #[arg(long)]
    lying_disk: bool,
    /// The code leaves out its syncs. The run must fail; it passes when it does.
    #[arg(long, conflicts_with = "lying_disk")]
    unsynced: bool,
    /// Keep the directory of a failure.
    #[arg(long)]
    keep: bool,
    #[command(subcommand)]
    role: Option<Role>,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Only {
    One,
    Three,
    Agent,
    Keys,
    Database,
}

#[derive(Debug, Subcommand)]
enum Role {
    /// The process that the power is taken from.
    #[command(hide = true)]
    Child,
}

/// Of a hundred cuts.
const SHARES: [(Kind, u32); 5] = [
    (Kind::One, 40),
    (Kind::Three, 25),
    (Kind::Agent, 15),
    (Kind::Keys, 10),
    (Kind::Database, 10),
];

fn main() -> ExitCode {
    match cut(&Args::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("powercut: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn cut(args: &Args) -> Result<()> {
    if args.role.is_some() {
        return swarm_powercut::member::run();
    }
    let seed = args.seed.unwrap_or_else(rand::random);
    println!("seed {seed}");
    let control = match (args.lying_disk, args.unsynced) {
        (true, _) => Some(Control::LyingDisk),
        (_, true) => Some(Control::UnsyncedCode),
        _ => None,
    };
    let run = Run {
        seed,
        cuts: args.cuts,
        control,
        binary: std::env::current_exe()?,
        keep: args.keep,
    };
    let parts: Vec<(Kind, u32)> = match args.only {
        None => SHARES
            .map(|(kind, share)| (kind, (args.cuts * share).div_ceil(100)))
            .to_vec(),
        Some(Only::One) => vec![(Kind::One, args.cuts)],
        Some(Only::Three) => vec![(Kind::Three, args.cuts)],
        Some(Only::Agent) => vec![(Kind::Agent, args.cuts)],
        Some(Only::Keys) => vec![(Kind::Keys, args.cuts)],
        Some(Only::Database) => vec![(Kind::Database, args.cuts)],
    };
    let begun = Instant::now();
    let mut all = Seen::default();
    for (kind, cuts) in parts {
        if kind == Kind::Keys && control == Some(Control::UnsyncedCode) {
            // The switch is not in its code.
            continue;
        }
        let part = Run {
            cuts,
            ..run.clone()
        };
        let begun = Instant::now();
        match part.of(kind) {
            Ok(seen) if control.is_some() => {
                bail!(
                    "{kind:?}: nothing is synced, and nothing was lost, in {} cuts",
                    seen.cuts
                )
            }
            Err(error) if control.is_some() => println!("{kind:?}: found out: {error:#}"),
            Err(error) => return Err(error),
            Ok(seen) => {
                println!("{kind:?}: {} in {:.1?}", describe(seen), begun.elapsed());
                all = all.and(seen);
            }
        }
    }
    if control.is_none() {
        let rate = f64::from(all.cuts) / begun.elapsed().as_secs_f64();
        println!("all: {}, {rate:.1} cuts/s", describe(all));
    }
    Ok(())
}

fn describe(seen: Seen) -> String {
    format!(
        "{} cuts ({} while starting), {} unsynced writes at stake, {} acknowledgements kept",
        seen.cuts, seen.while_starting, seen.unsynced, seen.acknowledged
    )
}
