//! The lab's command line. See `deploy/lab`.

use std::os::unix::process::CommandExt as _;
use std::process::ExitCode;

use anyhow::Result;
use clap::{Parser, Subcommand};
use swarm_tests::faults::{parse_percent, parse_span};
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
        /// Only the packets that the first one sends to the second
        #[arg(long)]
        one_way: bool,
    },
    /// Lose some of the packets that a host sends and is sent, at random
    Loss {
        /// h1, h2…
        host: String,
        /// How many: 5%
        share: String,
    },
    /// Let each fsync of a host's swarmd take longer
    SlowDisk {
        /// h1, h2…
        host: String,
        /// By how much: 200ms
        delay: String,
    },
    /// Let a host's state directory have no space left
    FullDisk {
        /// h1, h2…
        host: String,
    },
    /// Let the wall clock of a host's swarmd be wrong
    Skew {
        /// h1, h2…
        host: String,
        /// By how much: +90s is ahead, -90s behind
        #[arg(allow_hyphen_values = true)]
        by: String,
    },
    /// Undo all cuts, losses, and faults of disks and clocks
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
        Verb::Cut {
            a,
            b,
            one_way: false,
        } => Lab::open()?.cut(&a, &b)?,
        Verb::Cut {
            a,
            b,
            one_way: true,
        } => Lab::open()?.cut_one_way(&a, &b)?,
        Verb::Loss { host, share } => Lab::open()?.lose(&host, parse_percent(&share)?)?,
        Verb::SlowDisk { host, delay } => Lab::open()?.slow_disk(&host, parse_span(&delay)?)?,
        Verb::FullDisk { host } => Lab::open()?.full_disk(&host)?,
        Verb::Skew { host, by } => Lab::open()?.skew(&host, by.parse()?)?,
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
