//! Some two hundred power cuts in every run of the tests; ten thousand by `tests/powercut`.
//!
//! Each prints its seed, which `tests/powercut --seed` replays.

use std::path::PathBuf;

use swarm_powercut::run::{Control, Kind, Run};

fn run(cuts: u32, control: Option<Control>) -> Run {
    let seed = rand::random();
    println!("seed {seed}");
    Run {
        seed,
        cuts,
        control,
        binary: PathBuf::from(env!("CARGO_BIN_EXE_powercut")),
        keep: false,
    }
}

fn survives(kind: Kind, cuts: u32) {
    let seen = run(cuts, None)
        .of(kind)
        .unwrap_or_else(|error| panic!("{error:#}"));
    println!("{seen:?}");
    assert!(seen.cuts >= cuts && seen.acknowledged > 0, "{seen:?}");
    assert!(seen.unsynced > 0, "nothing was at stake: {seen:?}");
}

fn is_found_out(kind: Kind, control: Control) {
    let found = run(200, Some(control)).of(kind);
    println!(
        "{:#}",
        found.expect_err("nothing is synced, and nothing was lost")
    );
}

#[test]
fn a_manager_alone_keeps_what_it_acknowledged_over_power_cuts() {
    survives(Kind::One, 60);
}

#[test]
fn three_managers_keep_what_they_acknowledged_and_agree_after_power_cuts() {
    survives(Kind::Three, 40);
}

#[test]
fn an_agent_s_store_is_what_it_was_after_one_of_its_last_commits() {
    survives(Kind::Agent, 50);
}

#[test]
fn the_key_file_is_the_old_one_or_the_new_one() {
    survives(Kind::Keys, 40);
}

#[test]
fn a_database_loses_nothing_that_was_synced_however_much_is_written_between_syncs() {
    survives(Kind::Database, 30);
}

#[test]
fn a_disk_that_lies_is_found_out() {
    for kind in [Kind::One, Kind::Agent, Kind::Keys] {
        is_found_out(kind, Control::LyingDisk);
    }
}

#[test]
fn code_that_does_not_sync_is_found_out() {
    for kind in [Kind::One, Kind::Agent] {
        is_found_out(kind, Control::UnsyncedCode);
    }
}
