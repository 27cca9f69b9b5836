//! Runs seeds, each in a process of its own, and says how they went.

#[cfg(feature = "museum")]
use std::collections::BTreeMap;
use std::io::Write as _;
use std::process::{Command, ExitCode, Stdio};
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use crate::Args;

/// What one seed's process has said.
pub struct Verdict {
    /// Its trace's hash, and what was simulated.
    pub trace: String,
    /// Simulated time.
    pub simulated: Duration,
    /// Why it failed.
    pub failure: Option<String>,
}

/// Runs one seed in a process of its own.
pub fn child(args: &Args, seed: u64) -> Verdict {
    let failed = |reason: String| Verdict {
        trace: String::new(),
        simulated: Duration::ZERO,
        failure: Some(reason),
    };
    let mut command = Command::new("/proc/self/exe");
    command
        .arg("--one")
        .arg(seed.to_string())
        .args(args.passed_on())
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    let output = match command.output() {
        Ok(output) => output,
        Err(error) => return failed(format!("its process cannot be started: {error}")),
    };
    let said = String::from_utf8_lossy(&output.stdout);
    let Some(at) = said.find("verdict ") else {
        let last = String::from_utf8_lossy(&output.stderr);
        let last: Vec<&str> = last.lines().rev().take(40).collect();
        let last: Vec<&str> = last.into_iter().rev().collect();
        return failed(format!("{}: {}", output.status, last.join("\n")));
    };
    let mut words = said[at..].splitn(5, ' ').skip(1);
    let mut word = || words.next().unwrap_or_default().trim().to_owned();
    let (outcome, trace, simulated) = (word(), word(), word());
    let rest = word();
    Verdict {
        trace,
        simulated: Duration::from_nanos(simulated.parse().unwrap_or(0)),
        failure: (outcome != "ok").then_some(rest),
    }
}

/// How to run a seed again.
pub fn replay(args: &Args, seed: u64) -> String {
    let mut line = format!("tests/sim --seed {seed}");
    for word in args.passed_on() {
        line.push(' ');
        line.push_str(&word);
    }
    line
}

/// Runs seed after seed; true if none failed.
pub fn many(args: &Args, first: u64, count: u64) -> ExitCode {
    let began = Instant::now();
    let next = AtomicU64::new(0);
    let all = Mutex::new((0u64, Duration::ZERO, Vec::new()));
    std::thread::scope(|scope| {
        for _ in 0..args.jobs.max(1) {
            scope.spawn(|| {
                loop {
                    let at = next.fetch_add(1, Relaxed);
                    let late = args
                        .minutes
                        .is_some_and(|minutes| began.elapsed() > Duration::from_secs(60 * minutes));
                    if at >= count || late {
                        break;
                    }
                    let seed = first + at;
                    let verdict = child(args, seed);
                    let mut all = all.lock().unwrap_or_else(PoisonError::into_inner);
                    all.0 += 1;
                    all.1 += verdict.simulated;
                    if let Some(reason) = verdict.failure {
                        println!(
                            "seed {seed} FAILED: {reason}\n  again: {}",
                            replay(args, seed)
                        );
                        all.2.push(seed);
                    } else if args.verbose {
                        println!("seed {seed} ok {}", verdict.trace);
                    }
                    let _ = std::io::stdout().flush();
                }
            });
        }
    });
    let (ran, simulated, failed) = all.into_inner().unwrap_or_else(PoisonError::into_inner);
    let took = began.elapsed().as_secs_f64().max(0.001);
    println!(
        "{ran} seeds in {took:.0} s: {:.0} seeds per hour, {:.0} simulated hours per hour",
        ran as f64 * 3600.0 / took,
        simulated.as_secs_f64() / took,
    );
    println!(
        "{} passed, {} failed",
        ran - failed.len() as u64,
        failed.len()
    );
    if failed.is_empty() {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}

/// Runs seed after seed until one fails with the bug of `args` and passes without it: which, and
/// why. The earliest of those that were begun. `sound` remembers how seeds go without a bug.
#[cfg(feature = "museum")]
pub fn until_caught(
    args: &Args,
    first: u64,
    count: u64,
    sound: &Mutex<BTreeMap<u64, bool>>,
) -> Option<(u64, String)> {
    let without = Args {
        bug: None,
        ..args.clone()
    };
    let passes = |seed: u64| {
        let known = |sound: &Mutex<BTreeMap<u64, bool>>| {
            let sound = sound.lock().unwrap_or_else(PoisonError::into_inner);
            sound.get(&seed).copied()
        };
        known(sound).unwrap_or_else(|| {
            let passes = child(&without, seed).failure.is_none();
            let mut sound = sound.lock().unwrap_or_else(PoisonError::into_inner);
            sound.insert(seed, passes);
            passes
        })
    };
    let next = AtomicU64::new(0);
    let found: Mutex<Option<(u64, String)>> = Mutex::new(None);
    std::thread::scope(|scope| {
        for _ in 0..args.jobs.max(1) {
            scope.spawn(|| {
                loop {
                    let at = next.fetch_add(1, Relaxed);
                    let lock = || found.lock().unwrap_or_else(PoisonError::into_inner);
                    if at >= count || lock().is_some() {
                        break;
                    }
                    let seed = first + at;
                    if let Some(reason) = child(args, seed).failure
                        && passes(seed)
                    {
                        let mut found = lock();
                        if found.as_ref().is_none_or(|(known, _)| *known > seed) {
                            *found = Some((seed, reason));
                        }
                    }
                }
            });
        }
    });
    found.into_inner().unwrap_or_else(PoisonError::into_inner)
}

/// Runs each of these seeds twice.
pub fn all_twice(args: &Args, seeds: std::ops::Range<u64>) -> ExitCode {
    for seed in seeds {
        let same = twice(args, seed);
        if same != ExitCode::SUCCESS {
            return same;
        }
    }
    ExitCode::SUCCESS
}

/// Runs a seed twice: it must do the same both times.
fn twice(args: &Args, seed: u64) -> ExitCode {
    let (one, two) = std::thread::scope(|scope| {
        let one = scope.spawn(|| child(args, seed));
        let two = child(args, seed);
        (one.join(), two)
    });
    let Ok(one) = one else {
        return ExitCode::FAILURE;
    };
    for verdict in [&one, &two] {
        if let Some(reason) = &verdict.failure {
            println!(
                "seed {seed} FAILED: {reason}\n  again: {}",
                replay(args, seed)
            );
            return ExitCode::FAILURE;
        }
    }
    if one.trace != two.trace {
        println!(
            "seed {seed} is not the same twice: {} and {}",
            one.trace, two.trace
        );
        return ExitCode::FAILURE;
    }
    println!("seed {seed} twice: trace {} both times", one.trace);
    ExitCode::SUCCESS
}
