//! Whether the first process of a container would take notice of a signal now.
//!
//! Reads `/proc` and nothing else. A signal is sent once and cannot be taken back, so
//! whoever sends it to a process that is still starting must know two things:
//!
//! - The kernel drops a signal for process 1 of a namespace that is neither caught nor held back.
//! - A handler often only sets a flag, which nothing looks at before the main loop runs: what arrives
//!   between the two is caught and has no effect until the next signal. (nginx: it catches QUIT before
//!   it writes its PID file, and then waits in `sigsuspend` before it looks at the flag.)
//!   A program that sleeps has got beyond that.

use std::fs;
use std::time::Duration;

/// Beyond this much time on the CPU, a program has started. A busy one is not kept waiting for.
const STARTED_AFTER: Duration = Duration::from_secs(1);

/// What a signal would do if it was sent now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Reception {
    /// The kernel drops it.
    Dropped,
    /// It is caught by a program that may not be able to act on it yet.
    Early,
    /// It arrives. Also when nothing is known of the process.
    Heard,
}

/// Looks at the process. Nobody can refuse KILL and STOP.
pub(super) fn reception(pid: i32, signal: i32) -> Reception {
    let read = |file: &str| fs::read_to_string(format!("/proc/{pid}/{file}")).unwrap_or_default();
    match signal {
        libc::SIGKILL | libc::SIGSTOP => Reception::Heard,
        _ => judge(&read("status"), &read("syscall"), &read("stat"), signal),
    }
}

/// From the texts of those files; an empty one stands for one that cannot be read.
fn judge(status: &str, syscall: &str, stat: &str, signal: i32) -> Reception {
    let Some(bit) = u32::try_from(signal - 1).ok().filter(|&bit| bit < 64) else {
        return Reception::Heard;
    };
    let has = |key: &str| {
        status
            .lines()
            .find_map(|line| line.strip_prefix(key))
            .and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok())
            .is_none_or(|mask| mask & (1 << bit) != 0)
    };
    if has("SigBlk:") || waits_for_signals(syscall) {
        Reception::Heard
    } else if !has("SigCgt:") {
        Reception::Dropped
    } else if is_starting(stat) {
        Reception::Early
    } else {
        Reception::Heard
    }
}

/// In `sigwait` and the like: while it waits there, the kernel shows what it waits for neither as
/// caught nor as held back.
fn waits_for_signals(syscall: &str) -> bool {
    // The second and third are those of 32-bit programs; no call that waits has their numbers elsewhere.
    let waiting = [libc::SYS_rt_sigtimedwait, 177, 421];
    let number = syscall.split(' ').next().and_then(|n| n.parse().ok());
    number.is_some_and(|number: i64| waiting.contains(&number))
}

/// On the CPU or waiting for a disk, and not for long enough to have started.
fn is_starting(stat: &str) -> bool {
    // The name in parentheses may hold anything; fields are counted after it.
    let Some((_, rest)) = stat.rsplit_once(") ") else {
        return false;
    };
    let mut fields = rest.split(' ');
    let busy = matches!(fields.next(), Some("R" | "D"));
    let ticks: u64 = fields.skip(10).take(2).flat_map(str::parse::<u64>).sum();
    // The kernel counts in hundredths of a second here, whatever its own ticks are.
    busy && Duration::from_millis(ticks * 10) < STARTED_AFTER
}

#[cfg(test)]
mod tests {
    use super::*;

    const TERM: u64 = 1 << (libc::SIGTERM - 1);

    fn status(blocked: u64, caught: u64) -> String {
        format!("Name:\tx\nSigBlk:\t{blocked:016x}\nSigIgn:\t{TERM:016x}\nSigCgt:\t{caught:016x}\n")
    }

    fn stat(state: &str, user: u64, system: u64) -> String {
        format!("7 (a) (b) {state} 1 1 1 0 -1 4194560 10 0 0 0 {user} {system} 90 90 20 0 1 0 5")
    }

    fn heard(blocked: u64, caught: u64, syscall: &str, stat: &str) -> Reception {
        judge(&status(blocked, caught), syscall, stat, libc::SIGTERM)
    }

    #[test]
    fn what_is_neither_caught_nor_held_back_is_dropped() {
        let asleep = stat("S", 1, 1);
        assert_eq!(heard(0, 0, "", &asleep), Reception::Dropped);
        assert_eq!(heard(1, 1, "", &asleep), Reception::Dropped);
        assert_eq!(heard(0, TERM, "", &asleep), Reception::Heard);
        assert_eq!(heard(TERM, 0, "", &stat("R", 1, 1)), Reception::Heard);
    }

    #[test]
    fn who_waits_for_signals_hears_them() {
        let call = format!("{} 0x7ffd 0x0 0x0 0x8 0x0 0x0", libc::SYS_rt_sigtimedwait);
        assert_eq!(heard(0, 0, &call, &stat("S", 1, 1)), Reception::Heard);
        for call in ["running\n", "61 0x1 0x2", "-1 0x7ffd 0x0", ""] {
            assert_eq!(
                heard(0, 0, call, &stat("S", 1, 1)),
                Reception::Dropped,
                "{call}"
            );
        }
    }

    #[test]
    fn a_handler_is_trusted_once_its_program_has_slept_or_worked_for_a_while() {
        assert_eq!(heard(0, TERM, "", &stat("R", 3, 2)), Reception::Early);
        assert_eq!(heard(0, TERM, "", &stat("D", 60, 39)), Reception::Early);
        assert_eq!(heard(0, TERM, "", &stat("R", 60, 40)), Reception::Heard);
        assert_eq!(heard(0, TERM, "", &stat("T", 3, 2)), Reception::Heard);
    }

    #[test]
    fn what_cannot_be_known_holds_up_nothing() {
        assert_eq!(judge("", "", "", libc::SIGTERM), Reception::Heard);
        for odd in [-1, 0, 65] {
            assert_eq!(
                judge(&status(0, 0), "", &stat("R", 0, 0), odd),
                Reception::Heard
            );
        }
        assert_eq!(heard(0, TERM, "", ""), Reception::Heard);
        assert_eq!(reception(i32::MAX, libc::SIGTERM), Reception::Heard);
        // This test's main thread has no handler for it, unlike for what the runtime of Rust catches.
        let own = i32::try_from(std::process::id()).unwrap();
        assert_eq!(reception(own, libc::SIGUSR2), Reception::Dropped);
        assert_eq!(reception(own, libc::SIGKILL), Reception::Heard);
    }
}
