//! Known bugs of the field, each of which a simulation can put back to see that it is caught.
//!
//! Only in builds with the feature `museum`, which no default build has. A process has at most
//! one bug, chosen before anything starts. Each stands where a bug of its kind would: beside the
//! line that keeps it away, behind `#[cfg(feature = "museum")]`.

use std::sync::atomic::{AtomicUsize, Ordering};

/// Found in every binary that asks for a bug, and in no other.
pub const MARK: &str = "swarm-museum: known bugs can be put back";

/// One bug: what it is, where it is known from, and which invariant catches it.
#[derive(Clone, Copy, Debug)]
pub struct Exhibit {
    /// The switch.
    pub bug: Bug,
    /// Its name on the command line.
    pub name: &'static str,
    /// What is wrong while it is on.
    pub what: &'static str,
    /// Where it, or its like, is known from.
    pub known_from: &'static str,
    /// What must be seen to be broken.
    pub caught_by: &'static str,
}

macro_rules! museum {
    ($($bug:ident, $name:literal, $what:literal, $known:literal, $caught:literal;)*) => {
        /// The switches.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        #[allow(missing_docs)] // see `what` of each in ALL
        pub enum Bug { $($bug,)* }

        /// All exhibits.
        pub const ALL: &[Exhibit] = &[$(Exhibit {
            bug: Bug::$bug,
            name: $name,
            what: $what,
            known_from: $known,
            caught_by: $caught,
        },)*];
    };
}

museum! {
    AckedBeforeSync, "acked-before-sync",
        "entries are acknowledged before they are synced",
        "etcd-io/etcd#14370",
        "no acknowledged write is lost";
    VoteNotSynced, "vote-not-synced",
        "a vote is answered before it is synced",
        "datatechnology/cornerstone#65, camunda/camunda#5356",
        "one leader per term; committed state is one";
    AnsweredUntaken, "answered-untaken",
        "a follower answers an append as taken that it has not taken: commits without a quorum",
        "databendlabs/openraft#1802",
        "no acknowledged write is lost; no manager ends by itself";
    OldRaftId, "old-raft-id",
        "a manager that was wiped comes back under the raft ID it had",
        "databendlabs/openraft#2002, moby/swarmkit#1815",
        "one leader per term; no acknowledged write is lost; the cluster is well again in time";
    OwnReplicaRead, "own-replica-read",
        "a read is answered from the own replica, whoever leads",
        "etcd-io/etcd#741",
        "reads are linearizable";
    RetriedUnknown, "retried-unknown",
        "a proposal whose outcome is unknown is proposed again",
        "etcd-io/etcd#18424, etcd-io/jetcd#1444",
        "a write that was refused has changed nothing";
    VoterBeforeCaughtUp, "voter-before-caught-up",
        "a joining manager votes before it has the log",
        "the Raft thesis, 4.2.1 (catching up new servers)",
        "a member that becomes a voter has what was committed when it joined";
    CutToCommitted, "cut-to-committed",
        "at its start a manager forgets entries that it does not know to be committed",
        "databendlabs/openraft#511, lerna-stack/akka-entity-replication#152",
        "no acknowledged write is lost; no manager ends by itself";
    SnapshotNotSynced, "snapshot-not-synced",
        "a snapshot is renamed into place before it is synced",
        "etcd-io/etcd#6368",
        "what a manager has on disk it can start from";
    StateGoesBack, "state-goes-back",
        "a late report of an agent takes a task's state back",
        "moby/swarmkit#1499",
        "the state of a task only rises";
    ReleasedEarly, "released-early",
        "a task's address is free as soon as the task is to end",
        "moby/swarmkit#2407",
        "no address is held twice among live endpoints";
    AllocatedInMemory, "allocated-in-memory",
        "a new leader's allocator begins without what the old one's has given out",
        "moby/moby#33402",
        "no address is held twice";
    RestoreForgets, "restore-forgets",
        "a snapshot is read without taking the virtual addresses in it",
        "moby/swarmkit#2468",
        "committed state is one; no address is held twice";
    VersionUnchecked, "version-unchecked",
        "an update is taken whatever version it was made from",
        "the lost update; moby/swarmkit's OutOfSequence check",
        "of two updates from one version one is refused";
    WatchRepeats, "watch-repeats",
        "a watch that is resumed tells the last event again",
        "etcd-io/etcd#17247",
        "a watch tells each event once, in order";
    LoopsGoOn, "loops-go-on",
        "the loops of a leader go on after it, and no term fences them",
        "moby/moby#53632",
        "a slot has one task that is meant to run";
    SessionLostEndpoints, "session-lost-endpoints",
        "when a session is lost, its node's endpoints are deleted on the others",
        "moby/moby#53141",
        "endpoint tables become what the state says";
    StatusAckedEarly, "status-acked-early",
        "an agent's report is acknowledged before it is committed",
        "moby/swarmkit#930",
        "what has ended on its node is seen to end";
    LeaseByWallClock, "lease-by-wall-clock",
        "whether a node is silent is told by the wall clock",
        "etcd-io/etcd#12291",
        "a node that is heard is not down; one that is not heard is";
    RemovedNodeServed, "removed-node-served",
        "the session of a node that was removed goes on",
        "moby/swarmkit#388",
        "a node that was removed has no session";
    SlotTwice, "slot-twice",
        "a task of a lost node gets a successor without being told to end",
        "moby/swarmkit#2650",
        "a slot has one task that is meant to run";
    PlacedTwice, "placed-twice",
        "the scheduler places a task that is placed already",
        "moby/moby#31694",
        "a task never moves, and runs on one node only";
    StaleAssignments, "stale-assignments",
        "an agent takes assignments that are older than what it holds, or do not follow it",
        "kubernetes/kubernetes#59848",
        "an agent never gives assignments back for older ones";
    StartForgotten, "start-forgotten",
        "an agent does not keep that it has started a task",
        "moby/swarmkit#2582",
        "a task is started once";
    AgentNotSynced, "agent-not-synced",
        "an agent goes on before what it holds is synced",
        "etcd-io/etcd#14370, at the agent",
        "an agent never gives assignments back for older ones; a task is started once";
    NetworkKept, "network-kept",
        "an agent keeps a network after its last task",
        "moby/moby#39225",
        "no node holds a network without a task on it";
}

/// 0: none; otherwise the place of the bug in [`ALL`], from 1.
static PUT_BACK: AtomicUsize = AtomicUsize::new(0);

/// Puts a bug back, for as long as this process lives. Before anything starts.
pub fn put_back(bug: Bug) {
    PUT_BACK.store(bug as usize + 1, Ordering::Relaxed);
}

/// Where `swarmd` with the museum finds the name of the bug that it has.
pub const VARIABLE: &str = "SWARM_MUSEUM";

/// Puts the bug of this name back.
///
/// # Errors
/// There is none of this name; a sentence with those that there are.
pub fn put_back_named(name: &str) -> Result<(), String> {
    let exhibit = by_name(name).ok_or_else(|| {
        let names: Vec<&str> = ALL.iter().map(|exhibit| exhibit.name).collect();
        format!("no bug {name}; there are: {}", names.join(", "))
    })?;
    put_back(exhibit.bug);
    Ok(())
}

/// Whether this bug is put back.
#[must_use]
pub fn on(bug: Bug) -> bool {
    // Keeps the mark in the binary.
    std::hint::black_box(MARK);
    PUT_BACK.load(Ordering::Relaxed) == bug as usize + 1
}

/// The exhibit of this name.
#[must_use]
pub fn by_name(name: &str) -> Option<&'static Exhibit> {
    ALL.iter().find(|exhibit| exhibit.name == name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_bug_at_a_time_under_a_name_of_its_own() {
        assert!(ALL.len() >= 18);
        for exhibit in ALL {
            assert_eq!(
                by_name(exhibit.name).map(|found| found.bug),
                Some(exhibit.bug)
            );
            put_back(exhibit.bug);
            assert_eq!(ALL.iter().filter(|other| on(other.bug)).count(), 1);
        }
    }

    #[test]
    fn the_catalogue_has_every_exhibit_as_it_is() {
        let catalogue = include_str!("../../docs/museum.md");
        for exhibit in ALL {
            let row = format!(
                "| `{}` | {} | {} | {} |",
                exhibit.name, exhibit.what, exhibit.known_from, exhibit.caught_by
            );
            assert!(catalogue.contains(&row), "not in docs/museum.md: {row}");
        }
    }
}
