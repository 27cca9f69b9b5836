//! `sim`: the deterministic simulation. See `docs/simulation.md`.

mod check;
mod dice;
mod engine;
mod fakes;
mod goal;
mod libc_seam;
mod log;
mod machine;
mod museum;
mod net;
mod plan;
mod runner;
mod seams;
mod workload;
mod world;

use std::os::unix::process::CommandExt as _;
use std::process::{Command, ExitCode};

use clap::Parser;

use crate::engine::Sim;
use crate::world::SECOND;

/// Runs seeds of the simulation: a whole cluster each, with everything that can go wrong.
#[derive(Clone, Debug, Parser)]
struct Args {
    /// "museum": put back each known bug and see whether it is caught.
    what: Option<What>,
    /// Put back this bug (docs/museum.md).
    #[arg(long)]
    bug: Option<String>,
    /// Of the museum, this bug only.
    #[arg(long)]
    only: Option<String>,
    /// Run this seed alone, and say more of it.
    #[arg(long)]
    seed: Option<u64>,
    /// Run so many seeds (20; 1 with --twice; 1000 at most for each bug of the museum).
    #[arg(long)]
    seeds: Option<u64>,
    /// The first of them.
    #[arg(long, default_value_t = 1)]
    first: u64,
    /// Begin no seed after so many minutes.
    #[arg(long)]
    minutes: Option<u64>,
    /// Processes at once.
    #[arg(long, default_value_t = 2)]
    jobs: usize,
    /// Run the seed, or the first ones, twice, and compare.
    #[arg(long)]
    twice: bool,
    /// Name each seed that passed.
    #[arg(long)]
    verbose: bool,
    /// Run this seed in this process.
    #[arg(long, hide = true)]
    one: Option<u64>,
    /// Managers (0: by the seed).
    #[arg(long, default_value_t = 0)]
    managers: usize,
    /// Machines besides (by the seed if not given).
    #[arg(long)]
    agents: Option<usize>,
    /// Simulated seconds with faults.
    #[arg(long, default_value_t = TROUBLE)]
    trouble: u64,
    /// What to log, as in RUST_LOG; "info" if nothing is said.
    #[arg(long, num_args = 0..=1, default_missing_value = "info")]
    log: Option<String>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum What {
    /// Each known bug in turn.
    Museum,
}

/// Simulated seconds with faults in one seed.
const TROUBLE: u64 = 60;

impl Args {
    /// What makes a seed what it is.
    fn passed_on(&self) -> Vec<String> {
        let mut words = Vec::new();
        if self.managers != 0 {
            words.extend(["--managers".to_owned(), self.managers.to_string()]);
        }
        if let Some(agents) = self.agents {
            words.extend(["--agents".to_owned(), agents.to_string()]);
        }
        if self.trouble != TROUBLE {
            words.extend(["--trouble".to_owned(), self.trouble.to_string()]);
        }
        if let Some(bug) = &self.bug {
            words.extend(["--bug".to_owned(), bug.clone()]);
        }
        words
    }
}

/// Set in a process whose address space is laid out as always.
const PLAIN: &str = "SWARM_SIM_PLAIN";

/// Starts this program again with nothing in its surroundings that differs from run to run.
fn make_plain() -> Option<ExitCode> {
    if std::env::var_os(PLAIN).is_some() {
        return None;
    }
    // SAFETY: changes nothing but a flag of this process.
    unsafe { libc::personality(libc::ADDR_NO_RANDOMIZE as libc::c_ulong) };
    let error = Command::new("/proc/self/exe")
        .arg0("sim")
        .args(std::env::args_os().skip(1))
        .env_clear()
        .env(PLAIN, "1")
        .exec();
    eprintln!("sim: starting again: {error}");
    Some(ExitCode::FAILURE)
}

fn main() -> ExitCode {
    let args = Args::parse();
    if let Some(seed) = args.one.or(if args.twice { None } else { args.seed }) {
        return make_plain().unwrap_or_else(|| one(&args, seed));
    }
    if args.what == Some(What::Museum) {
        return museum::run(&args);
    }
    if args.twice {
        let first = args.seed.unwrap_or(args.first);
        return runner::all_twice(&args, first..first + args.seeds.unwrap_or(1));
    }
    runner::many(&args, args.first, args.seeds.unwrap_or(20))
}

fn one(args: &Args, seed: u64) -> ExitCode {
    rustls_provider();
    let directory = format!("/dev/shm/swarm-sim.{}", std::process::id());
    if let Err(error) =
        std::fs::create_dir_all(&directory).and_then(|()| std::env::set_current_dir(&directory))
    {
        eprintln!("sim: {directory}: {error}");
        return ExitCode::FAILURE;
    }
    log::start(args.log.as_deref());
    if let Some(bug) = &args.bug
        && let Err(reason) = museum::put_back(bug)
    {
        eprintln!("sim: {reason}");
        return ExitCode::FAILURE;
    }
    // On a thread of its own, whose hash seeds nobody has drawn from yet, logging or not.
    let failed = std::thread::scope(|scope| {
        let thread = std::thread::Builder::new().stack_size(STACK);
        let running = thread.spawn_scoped(scope, || {
            let failed = simulate(args, seed);
            let _ = std::fs::remove_dir_all(&directory);
            // Hosts are not ended one by one, nor is this thread: the process is.
            // SAFETY: ends the process; what was printed is written.
            unsafe { libc::_exit(i32::from(failed)) }
        });
        running.map(std::thread::ScopedJoinHandle::join)
    });
    eprintln!("sim: no thread: {:?}", failed.is_err());
    ExitCode::FAILURE
}

/// Bytes; tasks are polled deeply nested.
const STACK: usize = 64 << 20;

/// Whether the seed has failed.
fn simulate(args: &Args, seed: u64) -> bool {
    let began = libc_seam::real_nanos();
    let mut sim = Sim::new(seed);
    let size = plan::Size {
        managers: args.managers,
        agents: args.agents.unwrap_or(usize::MAX),
        trouble: args.trouble * SECOND,
    };
    plan::make(&mut sim, seed, size);
    sim.run_until(args.trouble * SECOND + 600 * SECOND);
    if !sim.is_done() && sim.failure().is_none() {
        sim.fail("the plan did not come to its end".to_owned());
    }
    let simulated = world::now();
    let (hash, traced) = world::with(|world| world.trace_hash());
    let real = (libc_seam::real_nanos() - began).max(1);
    let network = world::with(|world| world.fabric.counts);
    eprintln!(
        "seed {seed}: trace {hash:016x} of {traced}; {:.1} s simulated in {:.2} s ({:.0} times); {} steps, {} faults",
        simulated as f64 / SECOND as f64,
        real as f64 / SECOND as f64,
        simulated as f64 / real as f64,
        sim.steps(),
        plan::faults(),
    );
    eprintln!(
        "  {network:?}\n  {:?}\n  {:?}",
        workload::counts(),
        check::with(|c| c.counts)
    );
    let failure = sim.failure();
    match failure {
        None => println!("verdict ok {hash:016x} {simulated}"),
        Some(reason) => println!("verdict failed {hash:016x} {simulated} {reason}"),
    }
    failure.is_some()
}

fn rustls_provider() {
    let _ = rustls::crypto::ring::default_provider().install_default();
}
