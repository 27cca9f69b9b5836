//! What happens in one seed: who is there, what goes wrong and when, and how it must end.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use swarm_proto::v1::{NodeRole, NodeState};
use swarm_store::{Consensus as _, State};

use crate::check;
use crate::dice::Dice;
use crate::engine::Sim;
use crate::machine::{self, Begin, Machine, REMOVED_AFTER, addr_of};
use crate::workload::{self, Client};
use crate::world::{self, HostId, MICRO, MILLI, SECOND};

/// How large a seed is.
#[derive(Clone, Copy, Debug)]
pub struct Size {
    /// Managers; 0: by the seed.
    pub managers: usize,
    /// Machines besides; `usize::MAX`: by the seed.
    pub agents: usize,
    /// Simulated time with faults, nanoseconds.
    pub trouble: u64,
}

/// How long the cluster may take to be well again once all faults are gone.
const HEAL_LIMIT: u64 = 120 * SECOND;
/// More than this is to come only if something piles up.
const EVENTS_MAX: usize = 100_000;
/// Bytes on their way at once, all connections together.
const BYTES_MAX: usize = 64 << 20;
/// One in so many votes is followed by a power cut.
const VOTES: u64 = 12;
/// One in so many entries is followed by the loss of all connections of who applied it first.
const COMMITS: u64 = 150;
/// Between two looks at whether it is.
const LOOK: u64 = 200 * MILLI;

/// A node that nobody hears is Down by then (`swarm_proto::defaults::HEARTBEAT`).
const DOWN_WITHIN: u64 = 5 * SECOND;

/// A session that has held for longer clears its agent's record of failures (`SESSION_BACKOFF_MAX`).
const RESTS_FOR: u64 = 9 * SECOND;
/// Nothing waits for a manager that hangs for so long.
const HANGS_FOR: u64 = 10 * SECOND;

/// What comes once the cluster is well again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Act {
    /// Nothing, for as long as an agent may still wait that was refused too often.
    Rest,
    /// A manager hangs.
    Hang,
    /// A worker dies in silence, while clocks jump.
    Silence,
    /// A worker that lives is removed.
    Dismissal,
    /// Nothing.
    End,
}

/// What can go wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fault {
    Kill,
    PowerCut,
    Cut,
    CutOff,
    Reset,
    Loss,
    SlowDisk,
    StalledDisk,
    FailingDisk,
    Pause,
    SlowNode,
    Skew,
    Replace,
    ContainerEnds,
    Leave,
    Dismiss,
    LoseLog,
}

/// How often each of them comes, at first.
const FAULTS: [(Fault, u64); 17] = [
    (Fault::Kill, 15),
    (Fault::PowerCut, 15),
    (Fault::Cut, 14),
    (Fault::CutOff, 9),
    (Fault::Reset, 8),
    (Fault::Loss, 6),
    (Fault::SlowDisk, 6),
    (Fault::StalledDisk, 4),
    (Fault::FailingDisk, 3),
    (Fault::Pause, 6),
    (Fault::SlowNode, 4),
    (Fault::Skew, 4),
    (Fault::Replace, 3),
    (Fault::ContainerEnds, 13),
    (Fault::Leave, 4),
    (Fault::Dismiss, 4),
    (Fault::LoseLog, 4),
];

struct Stage {
    machines: Vec<Arc<Machine>>,
    /// The first so many begin as managers.
    first_managers: usize,
    clients: Vec<HostId>,
    dice: Dice,
    healing: bool,
    heal_until: u64,
    next: Act,
    /// The node that the administrator is to remove, although it lives.
    dismissed: Option<String>,
    trouble: u64,
    client_pause: u64,
    /// How often each fault comes in this seed.
    weights: Vec<(Fault, u64)>,
    faults: u64,
}

thread_local! {
    static STAGE: RefCell<Option<Stage>> = const { RefCell::new(None) };
}

fn with<T>(look: impl FnOnce(&mut Stage) -> T) -> T {
    STAGE.with(|stage| look(stage.borrow_mut().as_mut().expect("the plan is made")))
}

/// Whether all faults are over and clients verify what they know.
pub fn healing() -> bool {
    with(|stage| stage.healing)
}

/// The mean pause of a client between two requests.
pub fn client_pause() -> u64 {
    with(|stage| stage.client_pause)
}

/// How many machines there are.
pub fn machines() -> u64 {
    with(|stage| stage.machines.len() as u64)
}

/// The hosts that are managers, as the newest state says.
pub fn managers() -> Vec<HostId> {
    let all = with(|stage| stage.machines.len());
    let known: Vec<HostId> = check::newest().map_or_else(Vec::new, |state| {
        let addrs = state.nodes().filter_map(|node| {
            let status = node.manager_status.as_ref()?;
            (node.role() == NodeRole::Manager).then_some(status.addr.clone())
        });
        let addrs: BTreeSet<String> = addrs.collect();
        (0..all)
            .filter(|host| addrs.contains(&addr_of(*host)))
            .collect()
    });
    if known.is_empty() { vec![0] } else { known }
}

/// Addresses of the managers but this one.
pub fn manager_addrs(but: HostId) -> Vec<String> {
    let others = managers().into_iter().filter(|host| *host != but);
    others.map(addr_of).collect()
}

/// Nodes that are in the state although their machine is another node by now.
pub fn stale(state: &State) -> Vec<Arc<swarm_proto::v1::Node>> {
    let all = with(|stage| stage.machines.len());
    let mut is: BTreeMap<String, String> = BTreeMap::new();
    for host in 0..all {
        let node = machine::node(host)
            .and_then(|node| node.look(|member| member.identity.node_id().to_string()));
        if let Some(node) = node {
            is.insert(format!("h{host}"), node);
        }
    }
    let known = |node: &swarm_proto::v1::Node| {
        let description = node.description.as_ref()?;
        Some(is.get(&description.hostname)? == &node.id)
    };
    let nodes = state.nodes().filter(|node| known(node) == Some(false));
    nodes.cloned().collect()
}

/// Makes everybody and schedules everything.
pub fn make(sim: &mut Sim, seed: u64, size: Size) {
    let mut dice = Dice::new(seed, "plan");
    let managers = match size.managers {
        0 => 3 + 2 * dice.below(2) as usize,
        given => given,
    };
    let agents = match size.agents {
        usize::MAX if dice.once_in(12) => dice.between(12, 47) as usize,
        usize::MAX => dice.between(1, 6) as usize,
        given => given,
    };
    let machines: Vec<_> = (0..managers + agents)
        .map(|_| Machine::new(seed, sim.add_host()))
        .collect();
    let clients: Vec<_> = (0..2).map(|_| sim.add_host()).collect();
    let client_pause = dice.between(200, 2500) * MILLI;
    let weights = dice.stress(&FAULTS);
    STAGE.with(|stage| {
        *stage.borrow_mut() = Some(Stage {
            first_managers: managers,
            clients: clients.clone(),
            machines,
            dice,
            healing: false,
            heal_until: 0,
            next: Act::Rest,
            dismissed: None,
            trouble: size.trouble,
            client_pause,
            weights,
            faults: 0,
        });
    });
    sim.after_step(check::after_step);
    start(sim, 0);
    world::call_at(SECOND / 2, form);
}

/// Once the first manager serves, the others join, and clients come.
fn form(sim: &mut Sim) {
    if !check::serving().contains(&0) {
        return again(LOOK, form);
    }
    let all = with(|stage| stage.machines.len());
    for host in 1..all {
        let at = world::now() + with(|stage| stage.dice.below(2 * SECOND));
        world::call_at(at, move |sim| start(sim, host));
    }
    let clients = with(|stage| stage.clients.clone());
    let seed = sim.seed();
    for (number, host) in clients.into_iter().enumerate() {
        let watcher = Client::new(seed, &format!("watch{number}"));
        let one = Client::new(seed, &format!("c{number}a"));
        let two = Client::new(seed, &format!("c{number}b"));
        let admin = (number == 0).then(|| Client::new(seed, "admin"));
        sim.boot(host, async move {
            tokio::spawn(watcher.watch());
            tokio::spawn(one.run());
            tokio::spawn(two.run());
            if let Some(admin) = admin {
                admin.administer().await;
            }
            std::future::pending::<()>().await;
        });
    }
    again(6 * SECOND, trouble);
    let end = with(|stage| stage.trouble);
    again(6 * SECOND + end, heal);
}

fn again(nanos: u64, call: impl FnOnce(&mut Sim) + 'static) {
    world::call_at(world::now() + nanos, call);
}

fn begin(host: HostId) -> Begin {
    let first_managers = with(|stage| stage.first_managers);
    match host {
        0 => Begin::Found,
        host if host < first_managers => Begin::Manager,
        _ => Begin::Worker,
    }
}

fn machine_of(host: HostId) -> Arc<Machine> {
    with(|stage| Arc::clone(&stage.machines[host]))
}

/// A process has ended by itself: whoever runs the machine starts it again.
pub fn process_ended(host: HostId) {
    check::gone(host);
    let pause = with(|stage| stage.dice.between(100 * MILLI, 3 * SECOND));
    start_later(host, pause);
}

/// Starts the host then, unless it has been started before.
fn start_later(host: HostId, pause: u64) {
    let boot = boots(host);
    again(pause, move |sim| {
        if boots(host) == boot {
            start(sim, host);
        }
    });
}

fn boots(host: HostId) -> u64 {
    world::with(|world| world.hosts[host].boot)
}

fn start(sim: &mut Sim, host: HostId) {
    if sim.is_up(host) {
        return;
    }
    let machine = machine_of(host);
    machine.mood.set_failing(false);
    sim.boot(host, machine.run(begin(host)));
}

fn stop(sim: &mut Sim, host: HostId, power: bool, pause: u64) {
    if !sim.is_up(host) {
        return;
    }
    sim.crash(host, power);
    check::gone(host);
    if power {
        machine_of(host).lose_power(&mut sim.dice);
    }
    start_later(host, pause);
}

/// Whether the raft log of this host may be lost. At most one manager's at a time, as no cluster
/// survives the loss of most: the one before must be replaced and vote.
fn may_lose(sim: &Sim, host: HostId) -> bool {
    if !sim.is_up(host) || machine::node(host).is_none() {
        return false;
    }
    let managers = managers();
    let Some(state) = check::newest() else {
        return false;
    };
    if managers.contains(&host) && (managers.len() < 3 || !stale(&state).is_empty()) {
        return false;
    }
    let raft_id = |host: &HostId| {
        machine::node(*host)?.look(|member| member.with_manager(|manager| manager.raft().raft_id()))
    };
    let serve: Option<BTreeSet<u64>> = managers.iter().map(|host| raft_id(host)?).collect();
    let voters = check::leader().and_then(machine::node).and_then(|node| {
        node.look(|member| member.with_manager(|manager| manager.raft().members()))
    });
    let voters = voters.flatten().map(|members| {
        let voters = members
            .iter()
            .filter(|member| member.voter && member.reachable);
        voters.map(|member| member.raft_id).collect()
    });
    serve.is_some() && serve == voters
}

/// A new machine takes the place of an old one, which is lost for ever.
fn replace(sim: &mut Sim, host: HostId, pause: u64) {
    if !may_lose(sim, host) {
        return;
    }
    sim.crash(host, true);
    check::gone(host);
    machine_of(host).wipe();
    start_later(host, pause);
}

/// A manager loses what it has of raft, and comes back at once.
fn lose_log(sim: &mut Sim, host: HostId, pause: u64) {
    if !managers().contains(&host) || !may_lose(sim, host) {
        return;
    }
    sim.crash(host, false);
    check::gone(host);
    if let Err(error) = machine_of(host).lose_log() {
        tracing::info!(%error, "the log stays");
    }
    start_later(host, pause / 8);
}

/// The node leaves the cluster, and comes again as another one.
fn leave(sim: &mut Sim, host: HostId) {
    if !may_lose(sim, host) {
        return;
    }
    let Some(node) = machine::node(host) else {
        return;
    };
    sim.spawn(host, async move {
        if let Err(status) = node.leave(true).await {
            tracing::info!(%status, "does not leave");
        }
    });
}

/// The worker's node, although it lives, is to be removed.
fn dismiss(host: HostId) {
    if managers().contains(&host) {
        return;
    }
    let id = machine::node(host)
        .and_then(|node| node.look(|member| member.identity.node_id().to_string()));
    if let Some(id) = id {
        with(|stage| stage.dismissed = Some(id));
    }
}

/// The node that the administrator is to remove, although it lives.
pub fn dismissed() -> Option<String> {
    with(|stage| stage.dismissed.clone())
}

/// The host's manager has just voted: a bad moment for the power to go.
pub fn voted(sim: &mut Sim, host: HostId) {
    if !healing() && with(|stage| stage.dice.once_in(VOTES)) {
        let pause = with(|stage| stage.dice.around(SECOND));
        stop(sim, host, true, pause);
    }
}

/// The host is the first to apply an entry, which its client does not know yet: a bad moment for
/// its connections to break.
pub fn committed(host: HostId) {
    if healing() || !with(|stage| stage.dice.once_in(COMMITS)) {
        return;
    }
    world::with(|world| {
        for conn in world.fabric.open() {
            if world.fabric.is_end(conn, host) {
                world.break_connection(conn);
            }
        }
    });
}

/// Some container of the host ends by itself.
fn end_container(sim: &mut Sim, host: HostId) {
    let machine = machine_of(host);
    let tasks: Vec<_> = machine
        .runtime
        .look(|state| state.containers.keys().cloned().collect());
    let code = sim.dice.below(2) as i32;
    if let Some(task) = sim.dice.pick(&tasks).cloned() {
        let runtime = Arc::clone(&machine.runtime);
        sim.spawn(host, async move { runtime.exit(&task, code) });
    }
}

/// One thing that goes wrong, and the next one some time later.
fn trouble(sim: &mut Sim) {
    if healing() {
        return;
    }
    let (fault, ways, mut host, other, length, pause) = with(|stage| {
        stage.faults += 1;
        let machines = stage.machines.len() as u64;
        let all = machines + stage.clients.len() as u64;
        let among = if stage.dice.once_in(2) {
            stage.first_managers as u64
        } else {
            machines
        };
        let host = stage.dice.below(among) as usize;
        let other = stage.dice.below(all) as usize;
        let length = stage.dice.around(3 * SECOND);
        let pause = stage.dice.around(1200 * MILLI);
        let fault = stage.dice.weighted(&stage.weights);
        let ways = stage.dice.below(3);
        (fault, ways, host, other, length, pause)
    });
    // Who leads is worth more trouble than others.
    if let Some(leader) = check::leader()
        && sim.dice.once_in(4)
    {
        host = leader;
    }
    let machine = machine_of(host);
    tracing::info!(?fault, host, other, length = length / MILLI, "trouble");
    match fault {
        Fault::Kill => stop(sim, host, false, length),
        Fault::PowerCut => stop(sim, host, true, length),
        Fault::Cut => cut(host, other, ways, length),
        Fault::CutOff => {
            let everybody = with(|stage| stage.machines.len() + stage.clients.len());
            for other in 0..everybody {
                cut(host, other, ways, length);
            }
        }
        Fault::Reset => world::with(|world| {
            let open = world.fabric.open();
            for _ in 0..3 {
                if let Some(conn) = sim.dice.pick(&open) {
                    world.break_connection(*conn);
                }
            }
        }),
        Fault::Loss => {
            let loss = sim.dice.between(10_000, 300_000);
            world::with(|world| world.fabric.line(host, other).loss = loss);
            again(length, move |_| {
                world::with(|world| world.fabric.line(host, other).loss = 0);
            });
        }
        Fault::SlowDisk => {
            machine
                .mood
                .set_slow(Some(sim.dice.between(MILLI, 200 * MILLI)));
            again(length, move |_| machine.mood.set_slow(None));
        }
        Fault::StalledDisk => machine.mood.stall(world::now() + length),
        Fault::FailingDisk => {
            machine.mood.set_failing(true);
            // Whoever does not write does not notice; the disk is mended then.
            again(10 * SECOND, move |_| machine.mood.set_failing(false));
        }
        Fault::Pause => sim.pause(host, length),
        Fault::SlowNode => {
            let cost = sim.dice.between(200 * MICRO, 3 * MILLI);
            sim.set_step_cost(host, cost);
            again(length, move |sim| sim.set_step_cost(host, 20 * MICRO));
        }
        Fault::Skew => {
            let ahead = sim.dice.between(0, 7200 * SECOND) as i64 - 3600 * SECOND as i64;
            sim.set_skew(host, ahead);
            again(length, move |sim| sim.set_skew(host, 0));
        }
        Fault::Replace => replace(sim, host, length),
        Fault::Leave => leave(sim, host),
        Fault::Dismiss => dismiss(host),
        Fault::LoseLog => lose_log(sim, host, length),
        Fault::ContainerEnds => end_container(sim, host),
    }
    let (events, bytes) = world::with(|world| (world.pending(), world.fabric.outstanding()));
    if events > EVENTS_MAX || bytes > BYTES_MAX {
        sim.fail(format!(
            "{events} events are to come, and {bytes} bytes are on their way"
        ));
    }
    again(pause, trouble);
}

fn cut(one: HostId, other: HostId, ways: u64, length: u64) {
    if one == other {
        return;
    }
    let set = move |cut| {
        world::with(|world| {
            if ways != 1 {
                world.set_cut(one, other, cut);
            }
            if ways != 2 {
                world.set_cut(other, one, cut);
            }
        });
    };
    set(true);
    again(length, move |_| set(false));
}

/// All faults end; from now on the cluster must become well.
fn heal(sim: &mut Sim) {
    tracing::info!("all faults end");
    with(|stage| {
        stage.healing = true;
        stage.heal_until = world::now() + HEAL_LIMIT;
    });
    let (machines, clients) = with(|stage| (stage.machines.clone(), stage.clients.clone()));
    let all = machines.len() + clients.len();
    world::with(|world| {
        for one in 0..all {
            for other in 0..all {
                world.set_cut(one, other, false);
                world.fabric.line(one, other).loss = 0;
            }
        }
    });
    for machine in machines {
        machine.mood.set_slow(None);
        machine.mood.set_failing(false);
        sim.set_skew(machine.host, 0);
        sim.set_step_cost(machine.host, 20 * MICRO);
        sim.resume(machine.host);
        start(sim, machine.host);
    }
    look(sim);
}

fn look(sim: &mut Sim) {
    match unwell(sim) {
        None => match with(|stage| stage.next) {
            Act::Rest => again(RESTS_FOR, |_| and_then(Act::Hang)),
            Act::Hang => hang(sim),
            Act::Silence => silence(sim),
            Act::Dismissal => dismissal(sim),
            Act::End => sim.done(),
        },
        Some(reason) if world::now() > with(|stage| stage.heal_until) => {
            sim.fail(format!(
                "{} s after all faults have ended: {reason}",
                HEAL_LIMIT / SECOND
            ));
        }
        Some(_) => again(LOOK, look),
    }
}

fn and_then(next: Act) {
    with(|stage| {
        stage.next = next;
        stage.heal_until = world::now() + HEAL_LIMIT;
    });
    again(LOOK, look);
}

/// Some worker that is in the cluster, and its node.
fn some_worker(sim: &mut Sim) -> Option<(HostId, String)> {
    let managers = managers();
    let all = with(|stage| stage.machines.len());
    let workers: Vec<HostId> = (0..all).filter(|host| !managers.contains(host)).collect();
    let host = *sim.dice.pick(&workers)?;
    let node = machine::node(host)?;
    let id = node.look(|member| member.identity.node_id().to_string())?;
    Some((host, id))
}

fn jump(sim: &mut Sim, host: HostId) {
    let ahead = sim.dice.between(0, 7200 * SECOND) as i64 - 3600 * SECOND as i64;
    tracing::info!(host, ahead = ahead / SECOND as i64, "a clock jumps");
    sim.set_skew(host, ahead);
}

/// A manager hangs on a host whose kernel goes on. Its agents are heard elsewhere in time.
fn hang(sim: &mut Sim) {
    check::calm();
    let leader = check::leader().filter(|_| sim.dice.once_in(2));
    let host = leader.or_else(|| sim.dice.pick(&managers()).copied());
    let node = host.and_then(machine::node);
    let id = node.and_then(|node| node.look(|member| member.identity.node_id().to_string()));
    if let (Some(host), Some(id)) = (host, id) {
        tracing::info!(host, "a manager hangs, and nothing else is wrong");
        check::may_be_down(&id);
        sim.pause(host, HANGS_FOR);
    }
    again(HANGS_FOR, |_| and_then(Act::Silence));
}

/// Clocks jump, which is to be no reason for anything, and a worker loses its power.
fn silence(sim: &mut Sim) {
    check::calm();
    let managers = managers();
    for _ in 0..4 {
        let leader = check::leader().filter(|_| sim.dice.once_in(2));
        let host = leader.or_else(|| sim.dice.pick(&managers).copied());
        if let Some(host) = host {
            again(sim.dice.below(8 * SECOND), move |sim| jump(sim, host));
        }
    }
    let Some((host, id)) = some_worker(sim) else {
        return and_then(Act::End);
    };
    again(2 * SECOND, move |sim| {
        tracing::info!(host, "the power goes, and nothing else is wrong");
        check::may_be_down(&id);
        sim.crash(host, true);
        machine_of(host).lose_power(&mut sim.dice);
        if let Some(leader) = check::leader() {
            jump(sim, leader);
        }
        again(DOWN_WITHIN, move |sim| {
            let node = check::newest().and_then(|state| state.node(&id).cloned());
            let status = node.and_then(|node| Some(node.status.as_ref()?.state()));
            if status != Some(NodeState::Down) {
                let seconds = DOWN_WITHIN / SECOND;
                sim.fail(format!(
                    "{seconds} s after h{host} has lost its power its node {id} is {status:?}"
                ));
            }
            start(sim, host);
            and_then(Act::Dismissal);
        });
    });
}

/// A worker that lives is removed: nobody serves it any more. It comes again as another node.
fn dismissal(sim: &mut Sim) {
    let Some((host, id)) = some_worker(sim) else {
        return and_then(Act::End);
    };
    check::may_be_down(&id);
    with(|stage| stage.dismissed = Some(id.clone()));
    await_dismissal(host, id, world::now() + HEAL_LIMIT);
}

fn await_dismissal(host: HostId, id: String, until: u64) {
    again(LOOK, move |sim| {
        if !check::removed(&id) {
            if world::now() > until {
                sim.fail(format!("node {id} was not removed"));
            }
            return await_dismissal(host, id, until);
        }
        again(REMOVED_AFTER, move |sim| {
            let session = machine::node(host).and_then(|node| {
                node.look(|member| {
                    let is_it = member.identity.node_id().to_string() == id;
                    let session = member.agent.session().borrow().manager.clone();
                    session.filter(|_| is_it)
                })
            });
            if let Some(Some(manager)) = session {
                sim.fail(format!(
                    "node {id} was removed, and h{host} still has a session with {manager}"
                ));
            }
            and_then(Act::End);
        });
    });
}

/// Why the cluster is not well.
fn unwell(sim: &Sim) -> Option<String> {
    let machines = with(|stage| stage.machines.clone());
    for machine in &machines {
        let host = machine.host;
        let member = machine::node(host).and_then(|node| node.look(|_| ()));
        if !sim.is_up(host) || member.is_none() {
            return Some(format!("h{host} is in no cluster"));
        }
    }
    for host in managers() {
        if !check::serving().contains(&host) {
            return Some(format!("h{host} is to be a manager and is none"));
        }
    }
    if check::leader().is_none() {
        return Some("nobody leads".to_owned());
    }
    if !workload::all_verified() {
        return Some(format!(
            "clients {:?} have not verified what they know",
            workload::unverified()
        ));
    }
    let managers = managers();
    let mut states = check::states();
    states.retain(|(host, _)| managers.contains(host));
    let newest = states.iter().map(|(_, state)| state.index()).max()?;
    for (host, state) in &states {
        if state.index() != newest {
            return Some(format!("h{host} is at {}, not at {newest}", state.index()));
        }
        if !check::same_objects(state, &states[0].1) {
            return Some(format!("h{host} holds another state than h{}", states[0].0));
        }
    }
    let state = &states.first()?.1;
    crate::goal::missing(state, &machines)
}

/// Faults so far.
pub fn faults() -> u64 {
    with(|stage| stage.faults)
}
