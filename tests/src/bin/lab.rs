//! The lab's command line. See `deploy/lab`.

use std::os::unix::process::CommandExt as _;
use std::process::ExitCode;

use anyhow::Result;
use clap::{Parser, Subcommand};
use swarm_tests::lab::{Lab, LabConfig, images};

/// A cluster on one machine: hosts in network namespaces, joined by a switch.
#[derive(Parser)]
#[command(name = "deploy/lab")]
struct Args {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Subcommand)]
enum Verb {
    /// Make hosts h1…hN, start swarmd on each, form the cluster; returns when all are Ready
    Up {
        /// How many hosts
        #[arg(long, default_value_t = 3)]
        hosts: usize,
        /// How many of them are managers
        #[arg(long, default_value_t = 1)]
        managers: usize,
        /// Do not form the cluster: only start swarmd on each host
        #[arg(long)]
        no_cluster: bool,
    },
    /// Run a command on a host; its exit status is passed on
    Exec {
        /// h1, h2…
        host: String,
        /// The command, after `--`
        #[arg(last = true, required = true)]
        command: Vec<String>,
    },
    /// SIGKILL to a host's swarmd
    Kill {
        /// h1, h2…
        host: String,
    },
    /// Graceful stop of a host's swarmd
    Stop {
        /// h1, h2…
        host: String,
    },
    /// Start a host's swarmd again
    Start {
        /// h1, h2…
        host: String,
    },
    /// SIGSTOP to a host's swarmd
    Pause {
        /// h1, h2…
        host: String,
    },
    /// SIGCONT to a host's swarmd
    Resume {
        /// h1, h2…
        host: String,
    },
    /// Drop every packet between two hosts, both ways
    Cut {
        /// One
        a: String,
        /// The other
        b: String,
    },
    /// Undo all cuts
    Heal,
    /// What the registry serves
    Image {
        #[command(subcommand)]
        verb: ImageVerb,
    },
    /// What runs
    Status,
    /// Remove everything the lab made, and only that
    Down,
}

#[derive(Subcommand)]
enum ImageVerb {
    /// The names to use in `swarm service create`
    Ls,
}

fn main() -> ExitCode {
    match run(Args::parse().verb) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("lab: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(verb: Verb) -> Result<()> {
    match verb {
        Verb::Up {
            hosts,
            managers,
            no_cluster,
        } => {
            let mut config = LabConfig::new(hosts, managers)?;
            config.form = !no_cluster;
            print!("{}", Lab::up(&config)?.status()?);
        }
        Verb::Exec { host, command } => {
            return Err(Lab::open()?
                .command(&host, &command[0])?
                .args(&command[1..])
                .exec()
                .into());
        }
        Verb::Kill { host } => Lab::open()?.kill(&host)?,
        Verb::Stop { host } => Lab::open()?.stop(&host)?,
        Verb::Start { host } => Lab::open()?.start(&host)?,
        Verb::Pause { host } => Lab::open()?.pause(&host)?,
        Verb::Resume { host } => Lab::open()?.resume(&host)?,
        Verb::Cut { a, b } => Lab::open()?.cut(&a, &b)?,
        Verb::Heal => Lab::open()?.heal()?,
        Verb::Image {
            verb: ImageVerb::Ls,
        } => {
            for image in images()? {
                println!("{image}");
            }
        }
        Verb::Status => print!("{}", Lab::open()?.status()?),
        Verb::Down => Lab::open()?.down()?,
    }
    Ok(())
}
