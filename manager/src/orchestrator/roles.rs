//! Makes nodes managers and workers, as their specs ask.
//!
//! A promotion changes the role at once: the node renews its certificate and
//! joins the raft group by itself. A demotion takes the member out of the group
//! first; only then does the node lose the role. [`decide`] is pure; [`run`] is the leader's loop.

use std::collections::BTreeMap;
use std::time::Duration;

use swarm_proto::NodeId;
use swarm_proto::v1::{Node, NodeRole, object};
use swarm_store::{Event, Member, MembershipError, State};
use tokio::time::Instant;

use super::view::update;
use crate::leader::{Feed, Group, LoopContext, sleep_until};

/// A membership change that failed is tried again after this long, or when a role or a member changes.
const RETRY_AFTER: Duration = Duration::from_secs(5);

/// What one node's role needs next.
#[derive(Clone, Debug, PartialEq)]
pub enum Step {
    /// Write its new role.
    Write(Group),
    /// Take its member out of the raft group, then look again.
    RemoveMember {
        /// The node.
        node: NodeId,
        /// Its member.
        raft_id: u64,
    },
}

/// The next step for each node whose role is not the one that is wanted.
#[must_use]
pub fn decide(state: &State, members: &[Member]) -> Vec<Step> {
    let nodes = state.nodes();
    nodes.filter_map(|node| step(node, members)).collect()
}

fn step(node: &Node, members: &[Member]) -> Option<Step> {
    let desired = node
        .spec
        .as_ref()
        .map_or(node.role(), |spec| spec.desired_role());
    if desired == NodeRole::Manager {
        let promoted = || Node {
            role: NodeRole::Manager.into(),
            ..node.clone()
        };
        return (node.role() != NodeRole::Manager)
            .then(|| Step::Write(vec![update(object::Object::Node(promoted()))]));
    }
    match members.iter().find(|member| *member.node_id == *node.id) {
        Some(member) => Some(Step::RemoveMember {
            node: member.node_id.clone(),
            raft_id: member.raft_id,
        }),
        None if node.role() == NodeRole::Worker && node.manager_status.is_none() => None,
        None => Some(Step::Write(vec![update(object::Object::Node(Node {
            role: NodeRole::Worker.into(),
            manager_status: None,
            ..node.clone()
        }))])),
    }
}

/// Follows desired roles until the term ends.
pub(crate) async fn run(context: LoopContext) {
    let mut feed = Feed::new(&context);
    // Why a demotion waits, by node: said once, not at every try.
    let mut reasons: BTreeMap<NodeId, String> = BTreeMap::new();
    loop {
        let members = context.consensus.members();
        let done = tokio::select! {
            () = context.cancel.cancelled() => return,
            done = pass(&context, &mut reasons) => done,
        };
        let retry_at = (!done).then(|| Instant::now() + RETRY_AFTER);
        loop {
            let fed = tokio::select! {
                () = context.cancel.cancelled() => return,
                () = sleep_until(retry_at) => break,
                fed = feed.next(&context) => fed,
            };
            let Some(changes) = fed else { return };
            // Of thousands of nodes that change, hardly one changes its role.
            let now = context.consensus.members();
            let mut events = changes.iter().flat_map(|change| change.events.iter());
            let to_do = |event: &Event| match event {
                Event::Node { new, .. } => {
                    new.as_ref().is_some_and(|node| step(node, &now).is_some())
                }
                _ => false,
            };
            if now != members || events.any(to_do) {
                break;
            }
        }
    }
}

/// Takes all steps that can be taken now. `false` when something is to be tried again.
async fn pass(context: &LoopContext, reasons: &mut BTreeMap<NodeId, String>) -> bool {
    let mut done = true;
    let mut removed = true;
    // A member that was removed lets its node's role follow at once.
    while std::mem::take(&mut removed) {
        done = true;
        let state = context.consensus.store().state();
        for step in decide(&state, &context.consensus.members()) {
            match step {
                Step::Write(group) => {
                    if let Err(error) = context.propose(group).await {
                        tracing::debug!(%error, "a role could not be written; trying again");
                        done = false;
                    }
                }
                Step::RemoveMember { node, raft_id } => {
                    match context.consensus.remove_member(raft_id).await {
                        Ok(()) => {
                            tracing::info!(%node, raft_id, "no longer a member of the raft group");
                            reasons.remove(&node);
                            removed = true;
                        }
                        Err(MembershipError::NotLeader) => return false,
                        Err(error) => {
                            done = false;
                            let reason = error.to_string();
                            if reasons.get(&node) != Some(&reason) {
                                tracing::warn!(%node, raft_id, %reason, "cannot be demoted now");
                                reasons.insert(node, reason);
                            }
                        }
                    }
                }
            }
        }
    }
    done
}

#[cfg(test)]
mod tests {
    use swarm_proto::v1::{ManagerStatus, NodeSpec};
    use swarm_store::testing::{LocalConsensus, create, node};

    use super::*;

    fn member(node: &str, raft_id: u64) -> Member {
        Member {
            raft_id,
            node_id: NodeId::from(node),
            addr: String::new(),
            voter: true,
            reachable: true,
        }
    }

    fn state(desired: NodeRole, role: NodeRole, raft_id: Option<u64>) -> std::sync::Arc<State> {
        use swarm_store::Consensus as _;
        let consensus = LocalConsensus::new();
        let node = Node {
            role: role.into(),
            spec: Some(NodeSpec {
                desired_role: desired.into(),
                ..NodeSpec::default()
            }),
            manager_status: raft_id.map(|raft_id| ManagerStatus {
                raft_id,
                ..ManagerStatus::default()
            }),
            ..node("n1", "10.0.0.1")
        };
        consensus.write([create(node)]).unwrap();
        consensus.store().state()
    }

    fn written(step: &Step) -> Node {
        let Step::Write(group) = step else {
            panic!("{step:?}");
        };
        match group[0].action.clone() {
            Some(swarm_proto::v1::store_action::Action::Update(object)) => match object.object {
                Some(object::Object::Node(node)) => node,
                other => panic!("{other:?}"),
            },
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_promotion_changes_the_role() {
        let state = state(NodeRole::Manager, NodeRole::Worker, None);
        let steps = decide(&state, &[]);
        assert_eq!(written(&steps[0]).role(), NodeRole::Manager);
    }

    #[test]
    fn a_demotion_removes_the_member_before_the_role() {
        let state = state(NodeRole::Worker, NodeRole::Manager, Some(7));
        let steps = decide(&state, &[member("n1", 7), member("n2", 8)]);
        assert_eq!(
            steps,
            [Step::RemoveMember {
                node: NodeId::from("n1"),
                raft_id: 7
            }]
        );
        let steps = decide(&state, &[member("n2", 8)]);
        let node = written(&steps[0]);
        assert_eq!((node.role(), node.manager_status), (NodeRole::Worker, None));
    }

    #[test]
    fn a_member_that_came_back_while_its_node_was_demoted_is_removed_again() {
        let state = state(NodeRole::Worker, NodeRole::Worker, None);
        let steps = decide(&state, &[member("n1", 7), member("n2", 8)]);
        assert!(
            matches!(steps[..], [Step::RemoveMember { raft_id: 7, .. }]),
            "{steps:?}"
        );
    }

    #[test]
    fn nodes_with_the_role_they_want_are_left_alone() {
        let manager = state(NodeRole::Manager, NodeRole::Manager, Some(1));
        let worker = state(NodeRole::Worker, NodeRole::Worker, None);
        assert!(decide(&manager, &[member("n1", 1)]).is_empty());
        assert!(decide(&worker, &[member("n2", 2)]).is_empty());
    }
}
