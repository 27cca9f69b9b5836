//! The fuzz targets: for every parser of something from outside, a function that takes bytes and
//! panics when a rule is broken.
//!
//! What a target checks is written in the crate whose code it drives (`fuzzing.rs` there, behind the
//! feature `fuzzing`); here are those that compare two crates, and the list of all. The list is
//! driven by the tests beside this file (corpus and mutations of it, on any toolchain) and by
//! libFuzzer (`libfuzzer/`, `run`).

/// Something to be fed with bytes.
#[derive(Clone, Copy, Debug)]
pub struct Target {
    /// Also that of its program and its corpus' directory.
    pub name: &'static str,
    /// Panics when a rule is broken.
    pub run: fn(&[u8]),
    /// Valid inputs, made by the code itself: they never go stale.
    pub seeds: fn() -> Vec<Vec<u8>>,
}

macro_rules! targets {
    ($($name:ident: $($run:ident)::+, $($seeds:ident)::+;)*) => {
        /// All of them.
        pub const TARGETS: &[Target] = &[$(Target { name: stringify!($name), run: run::$name, seeds: seeds::$name },)*];

        /// Each by its name: a program that names one links no other.
        pub mod run {
            $(#[allow(missing_docs)] pub fn $name(data: &[u8]) { let _ = super::$($run)::+(data); })*
        }

        /// Valid inputs for each.
        pub mod seeds {
            $(#[allow(missing_docs)] #[must_use] pub fn $name() -> Vec<Vec<u8>> { super::$($seeds)::+() })*
        }
    };
}

use swarm_agent::fuzzing as agent;
use swarm_agent::network::fuzzing as network;
use swarm_agent::runtime::fuzzing as runtime;
use swarm_cli::fuzzing as cli;
use swarm_daemon::fuzzing as daemon;
use swarm_identity::fuzzing as identity;
use swarm_manager::fuzzing as manager;
use swarm_proto::image::ImageRef;
use swarm_raft::fuzzing as raft;
use swarm_store::fuzzing as store;

targets! {
    assignments: agent::assignments, agent::seeds::assignments;
    certificate: identity::certificate, identity::seeds::certificate;
    certificate_request: identity::certificate_request, identity::seeds::certificate_request;
    constraint: manager::constraint, manager::seeds::constraint;
    control_requests: control_requests, manager::seeds::control_requests;
    daemon_config: daemon::daemon_config, daemon::seeds::daemon_config;
    dns_answer: network::dns_answer, network::seeds::dns_answer;
    dns_query: network::dns_query, network::seeds::dns_query;
    docker_config: cli::docker_config, cli::seeds::docker_config;
    flag_value: cli::flag_value, cli::seeds::flag_value;
    image_reference: image_reference, image_references;
    join_token: identity::join_token, identity::seeds::join_token;
    layer: runtime::layer, runtime::seeds::layer;
    local_store: agent::local_store, agent::seeds::local_store;
    log_and_exec: runtime::log_and_exec, runtime::seeds::log_and_exec;
    log_record: raft::log_record, raft::seeds::log_record;
    names_frame: network::names_frame, network::seeds::names_frame;
    netlink_reply: network::netlink_reply, network::seeds::netlink_reply;
    network_create: network_create, cli::seeds::network_spec;
    raft_message: raft::raft_message, raft::seeds::raft_message;
    registry_answer: runtime::registry_answer, runtime::seeds::registry_answer;
    sealed: raft::sealed, raft::seeds::sealed;
    service_create: service_create, cli::seeds::service_spec;
    snapshot_file: raft::snapshot_file, raft::seeds::snapshot_file;
    snapshot_state: store::snapshot_state, store::seeds::snapshot_state;
    template: cli::template, cli::seeds::template;
    transactions: store::transactions, store::seeds::transactions;
    users: runtime::users, runtime::seeds::users;
}

/// The target of that name.
#[must_use]
pub fn target(name: &str) -> Option<&'static Target> {
    TARGETS.iter().find(|target| target.name == name)
}

/// Requests of the Control API; then the agent takes what the managers made of them.
pub fn control_requests(data: &[u8]) {
    let state = manager::control_requests(data);
    let messages = manager::assignments(&state, agent::NODE);
    if let Err(sentence) = agent::accept(messages) {
        panic!("the managers accepted what no agent can do: {sentence}");
    }
}

/// The arguments of `service create`: what the command line asks for, the border answers.
pub fn service_create(data: &[u8]) {
    if let Some(Ok(spec)) = cli::service_spec(data) {
        let _ = manager::check_service(&spec);
    }
}

/// The arguments of `network create`: what the border accepts can be allocated.
pub fn network_create(data: &[u8]) {
    if let Some(Ok(spec)) = cli::network_spec(data)
        && let Err(sentence) = manager::check_network(&spec)
    {
        assert!(!sentence.is_empty());
    }
}

/// An image reference: what it prints means the same, pinned or not, and the credentials are
/// those of its registry.
pub fn image_reference(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else {
        return;
    };
    let Ok(image) = ImageRef::parse(text) else {
        return;
    };
    assert_eq!(image.to_string(), text);
    assert!(!image.repository().is_empty() && text.len() < 600);
    let whole = ImageRef::parse(&image.whole()).expect("what it prints is one");
    assert_eq!(whole.whole(), image.whole());
    assert_eq!(whole.registry(), image.registry());
    let digest = format!("sha256:{}", "0".repeat(64));
    let pinned = image.pinned(&digest);
    let again = ImageRef::parse(&pinned.to_string()).expect("what it prints is one");
    assert_eq!(again, pinned);
    assert_eq!(again.repository(), image.repository());
    assert_eq!(pinned.pinned(&digest), pinned);
    runtime::image_urls(&image);
    let credentials = cli::registry(text);
    match image.registry() {
        "docker.io" => assert!(credentials.contains("docker.io")),
        registry => assert_eq!(credentials, registry),
    }
}

fn image_references() -> Vec<Vec<u8>> {
    [
        "nginx",
        "library/nginx:latest",
        "host:5000/a/b:tag",
        "localhost/a",
        "10.9.0.254:5000/nginx",
        "[fd00::1]:5000/nginx",
        "registry.example.com/a__b/c-d.e_f:V1",
        "nginx:1@sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855",
    ]
    .map(|text| text.as_bytes().to_vec())
    .to_vec()
}
