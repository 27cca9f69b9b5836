//! Every target on any toolchain: its seeds, its corpus (each crash that was ever found is in it),
//! and random changes of both: `SWARM_FUZZ_CASES` of them, or few.

use std::path::PathBuf;

use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};
use swarm_fuzz::target;

/// Inputs made up for each target: some seconds in a debug build.
const CASES: u32 = 200;

fn corpus(name: &str) -> Vec<(String, Vec<u8>)> {
    let mut inputs: Vec<(String, Vec<u8>)> = (target(name).expect("listed").seeds)()
        .into_iter()
        .enumerate()
        .map(|(number, seed)| (format!("seed {number}"), seed))
        .collect();
    let dir = PathBuf::from(env!("CARGO_MANIFEST_DIR"))
        .join("corpus")
        .join(name);
    // A target for which nothing was kept has no directory.
    if let Ok(files) = std::fs::read_dir(dir) {
        for file in files {
            let path = file.expect("the corpus can be listed").path();
            let input = std::fs::read(&path).expect("the corpus can be read");
            inputs.push((path.display().to_string(), input));
        }
    }
    inputs
}

/// One change of an input: bytes overwritten, taken out, put in, or the end cut off.
fn change() -> impl Strategy<Value = (u8, prop::sample::Index, Vec<u8>)> {
    let bytes = prop::collection::vec(any::<u8>(), 1..6);
    (0..5u8, any::<prop::sample::Index>(), bytes)
}

fn changed(mut input: Vec<u8>, changes: &[(u8, prop::sample::Index, Vec<u8>)]) -> Vec<u8> {
    for (kind, at, bytes) in changes {
        let at = at.index(input.len() + 1);
        match kind {
            0 => input.truncate(at),
            1 => {
                input.drain(at..(at + bytes.len()).min(input.len()));
            }
            2 => {
                input.splice(at..at, bytes.iter().copied());
            }
            3 => {
                if let Some(byte) = input.get_mut(at) {
                    *byte ^= 1 << (bytes[0] % 8);
                }
            }
            _ => {
                for (to, from) in input[at..].iter_mut().zip(bytes) {
                    *to = *from;
                }
            }
        }
    }
    input
}

/// Names the input when a target panics on it.
struct Named<'a>(&'a str);

impl Drop for Named<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("on {}", self.0);
        }
    }
}

fn check(name: &str) {
    let run = target(name).expect("listed").run;
    let inputs = corpus(name);
    for (label, input) in &inputs {
        let _named = Named(label);
        run(input);
    }
    let inputs: Vec<Vec<u8>> = inputs.into_iter().map(|(_, input)| input).collect();
    let known = (
        prop::sample::select(inputs),
        prop::collection::vec(change(), 1..5),
    );
    let strategy = prop_oneof![
        6 => known.prop_map(|(input, changes)| changed(input, &changes)),
        1 => prop::collection::vec(any::<u8>(), 0..64),
    ];
    let asked = std::env::var("SWARM_FUZZ_CASES");
    let config = Config {
        cases: asked.map_or(CASES, |asked| asked.parse().expect("a number")),
        failure_persistence: None,
        ..Config::default()
    };
    let tested = TestRunner::new(config).run(&strategy, |input| {
        run(&input);
        Ok(())
    });
    if let Err(error) = tested {
        panic!("{error}");
    }
}

macro_rules! replay {
    ($($name:ident)*) => {
        $(#[test] fn $name() { check(stringify!($name)); })*

        #[test]
        fn every_target_is_replayed_here_and_has_a_program_and_seeds() {
            let here: Vec<&str> = vec![$(stringify!($name)),*];
            let all: Vec<&str> = swarm_fuzz::TARGETS.iter().map(|target| target.name).collect();
            assert_eq!(here, all);
            let programs = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("libfuzzer/fuzz_targets");
            let manifest = std::fs::read_to_string(programs.join("../Cargo.toml")).unwrap();
            for target in swarm_fuzz::TARGETS {
                assert!(programs.join(format!("{}.rs", target.name)).is_file(), "{}", target.name);
                assert!(manifest.contains(&format!("name = \"{}\"\n", target.name)), "{}", target.name);
                assert!(!(target.seeds)().is_empty(), "{}", target.name);
            }
        }
    };
}

replay! {
    assignments
    certificate
    certificate_request
    constraint
    control_requests
    daemon_config
    dns_answer
    dns_query
    docker_config
    flag_value
    image_reference
    join_token
    layer
    local_store
    log_and_exec
    log_record
    names_frame
    netlink_reply
    network_create
    raft_message
    registry_answer
    sealed
    service_create
    snapshot_file
    snapshot_state
    template
    transactions
    users
}
