//! Nodes: roles, availability, labels, removal.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use swarm_proto::defaults::NODE_CERT_LIFE;
use swarm_proto::v1::{
    Cluster, GetNodeRequest, ListNodesRequest, ListNodesResponse, Node, NodeRole, NodeSpec,
    NodeState, ObjectKind, Reachability, RemoveNodeRequest, RemoveNodeResponse, UpdateNodeRequest,
    object,
};
use swarm_store::{Member, State};
use tonic::Status;

use super::filter::{NameMatch, any_of, check, has_labels, passes};
use super::page::Page;
use super::{
    Control, bounded, cluster, error, expecting, found, remove, update, validate, version_of,
    written,
};
use crate::clock::{since_epoch, span, timestamp};

/// Added to a certificate's life in the list of refused nodes: clocks may differ.
const CLOCK_SLACK: Duration = Duration::from_secs(24 * 3600);
/// How often a removal is tried again when the cluster object changes at the same time.
const REMOVE_TRIES: usize = 5;

impl Control {
    pub(super) async fn get_node(&self, request: GetNodeRequest) -> Result<Node, Status> {
        let state = self.state().await?;
        let id = node_id(&state, &request.r#ref)?;
        let mut node = found(state.node(&id), "node", &id)?;
        self.observe(std::slice::from_mut(&mut node)).await?;
        Ok(node)
    }

    pub(super) async fn list_nodes(
        &self,
        request: ListNodesRequest,
    ) -> Result<ListNodesResponse, Status> {
        check(
            request.filters.as_ref(),
            &[
                ("role", request.roles.len()),
                ("node.label", request.node_labels.len()),
            ],
        )?;
        let page = Page::of(request.page_size, &request.page_token)?;
        let state = self.state().await?;
        let found = state.nodes_after(page.after());
        let found = found.filter(|node| listed(node, &request));
        let (mut nodes, next_page_token) =
            page.take(found.map(|node| Node::clone(node)), |node| &node.id);
        nodes.sort_by(|a, b| (hostname(a), &a.id).cmp(&(hostname(b), &b.id)));
        self.observe(&mut nodes).await?;
        bounded(ListNodesResponse {
            nodes,
            next_page_token,
        })
    }

    pub(super) async fn update_node(&self, request: UpdateNodeRequest) -> Result<Node, Status> {
        let spec = request
            .spec
            .ok_or_else(|| Status::invalid_argument("the node's spec is missing"))?;
        validate::node_spec(&spec).map_err(error::invalid)?;
        let state = self.state().await?;
        let id = node_id(&state, &request.node_id)?;
        let old = found(state.node(&id), "node", &id)?;
        if version_of(old.meta.as_ref()) != request.version {
            return Err(error::out_of_sequence());
        }
        let mut actions = Vec::new();
        if desired_role(old.spec.as_ref()) == NodeRole::Manager
            && spec.desired_role() == NodeRole::Worker
        {
            let members = self.consensus.members_heard().await.map_err(error::read)?;
            may_demote(&state, &members, &id).map_err(Status::failed_precondition)?;
            // Two demotions at the same time could each be the last but one:
            // both write the cluster object, so apply refuses the second.
            let fence = Cluster::clone(cluster::of(&state)?);
            actions.push(update(object::Object::Cluster(fence)));
        }
        actions.push(update(object::Object::Node(Node {
            spec: Some(spec),
            meta: expecting(request.version),
            ..old
        })));
        let state = self.write(actions).await?;
        let mut node = written(state.node(&id), "node", &id)?;
        // It is written, whether or not the leader can still be asked whom it hears.
        let _ = self.observe(std::slice::from_mut(&mut node)).await;
        Ok(node)
    }

    pub(super) async fn remove_node(
        &self,
        request: RemoveNodeRequest,
    ) -> Result<RemoveNodeResponse, Status> {
        let mut tries = 0;
        loop {
            tries += 1;
            match self.try_remove_node(&request).await {
                Err(status) if status.code() == tonic::Code::Aborted && tries < REMOVE_TRIES => {}
                outcome => return outcome,
            }
        }
    }

    async fn try_remove_node(
        &self,
        request: &RemoveNodeRequest,
    ) -> Result<RemoveNodeResponse, Status> {
        let state = self.state().await?;
        let id = node_id(&state, &request.r#ref)?;
        let node = found(state.node(&id), "node", &id)?;
        may_remove(&node, &request.r#ref, request.force).map_err(Status::failed_precondition)?;
        let refused = self.with_refused(cluster::of(&state)?, &id);
        let expected = version_of(node.meta.as_ref());
        self.write(vec![
            update(object::Object::Cluster(refused)),
            remove(ObjectKind::Node, &id, expected),
        ])
        .await?;
        Ok(RemoveNodeResponse { id })
    }

    /// The cluster with the node's certificate refused for as long as it can
    /// be valid, and without entries that have had their time.
    fn with_refused(&self, cluster: &Arc<Cluster>, node_id: &str) -> Cluster {
        let now = (self.clock)();
        let given = cluster
            .spec
            .as_ref()
            .and_then(|spec| spec.node_cert_expiry.as_ref());
        // The life may have been set shorter after the certificate was made.
        let life = span(given, NODE_CERT_LIFE).max(NODE_CERT_LIFE);
        let mut changed = Cluster::clone(cluster);
        changed
            .blacklisted_nodes
            .retain(|_, until| since_epoch(until) > now);
        changed
            .blacklisted_nodes
            .insert(node_id.to_owned(), timestamp(now + life + CLOCK_SLACK));
        changed
    }

    /// Fills in who leads, and whom the leader hears.
    async fn observe(&self, nodes: &mut [Node]) -> Result<(), Status> {
        if nodes.iter().all(|node| node.manager_status.is_none()) {
            return Ok(());
        }
        let members = self.consensus.members_heard().await.map_err(error::read)?;
        let leader = self.consensus.leadership().borrow().leader.clone();
        let leader = leader.map(|leader| leader.raft_id);
        for status in nodes.iter_mut().filter_map(|n| n.manager_status.as_mut()) {
            status.leader = leader == Some(status.raft_id);
            let reachable = members
                .iter()
                .find(|member| member.raft_id == status.raft_id)
                .map(|member| member.reachable);
            status.reachability = match reachable {
                Some(true) => Reachability::Reachable,
                Some(false) => Reachability::Unreachable,
                None => Reachability::Unknown,
            }
            .into();
        }
        Ok(())
    }
}

fn node_id(state: &State, reference: &str) -> Result<String, Status> {
    state
        .resolve(ObjectKind::Node, reference)
        .map_err(error::resolve)
}

fn desired_role(spec: Option<&NodeSpec>) -> NodeRole {
    spec.map_or(NodeRole::Worker, NodeSpec::desired_role)
}

fn hostname(node: &Node) -> &str {
    node.description
        .as_ref()
        .map_or("", |description| description.hostname.as_str())
}

/// As Docker's: names are hostnames, labels the engine's; the cluster's own labels have a field apart.
fn listed(node: &Node, request: &ListNodesRequest) -> bool {
    let engine: Option<&BTreeMap<String, String>> =
        node.description.as_ref().map(|d| &d.engine_labels);
    let own = node
        .spec
        .as_ref()
        .and_then(|spec| spec.annotations.as_ref())
        .map(|annotations| &annotations.labels);
    passes(
        request.filters.as_ref(),
        NameMatch::Prefix,
        &node.id,
        hostname(node),
        engine,
    ) && any_of(&request.roles, |role| *role == node.role)
        && has_labels(&request.node_labels, own)
}

/// Whether the cluster keeps a manager, and can still commit, without this one.
fn may_demote(state: &State, members: &[Member], id: &str) -> Result<(), String> {
    let other_managers = state
        .nodes()
        .filter(|node| node.id != id && desired_role(node.spec.as_ref()) == NodeRole::Manager)
        .count();
    if other_managers == 0 {
        return Err("attempting to demote the last manager of the swarm".to_owned());
    }
    if !members
        .iter()
        .any(|member| member.voter && member.node_id.as_str() == id)
    {
        return Ok(());
    }
    let remaining = members
        .iter()
        .filter(|member| member.voter && member.node_id.as_str() != id);
    let (mut total, mut silent) = (0, Vec::new());
    for member in remaining {
        total += 1;
        if !member.reachable {
            silent.push(member.node_id.as_str());
        }
    }
    let needed = total / 2 + 1;
    if total - silent.len() >= needed {
        return Ok(());
    }
    let why = if silent.is_empty() {
        "no other manager votes yet".to_owned()
    } else {
        format!(
            "of the {total} managers that would remain {needed} are needed, but cannot be reached: {}",
            silent.join(", ")
        )
    };
    Err(format!(
        "can't remove member from the raft: this would result in a loss of quorum ({why})"
    ))
}

fn may_remove(node: &Node, reference: &str, force: bool) -> Result<(), String> {
    if node.manager_status.is_some()
        || node.role() == NodeRole::Manager
        || desired_role(node.spec.as_ref()) == NodeRole::Manager
    {
        return Err(format!(
            "node {reference} is a cluster manager and is a member of the raft cluster. \
             It must be demoted to worker before removal"
        ));
    }
    let state = node
        .status
        .as_ref()
        .map_or(NodeState::Unknown, |status| status.state());
    let gone = matches!(state, NodeState::Down | NodeState::Disconnected);
    if !gone && !force {
        return Err(format!("node {reference} is not down and can't be removed"));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use swarm_proto::NodeId;
    use swarm_proto::v1::{ManagerStatus, NodeAvailability, NodeStatus};
    use swarm_store::Consensus as _;
    use swarm_store::testing::{self, create};
    use tonic::Code;

    use super::super::testing::Bench;
    use super::*;

    fn node(id: &str, role: NodeRole, state: NodeState) -> Node {
        Node {
            spec: Some(NodeSpec {
                desired_role: role.into(),
                ..Default::default()
            }),
            role: role.into(),
            status: Some(NodeStatus {
                state: state.into(),
                ..Default::default()
            }),
            ..testing::node(id, "10.9.0.1")
        }
    }

    fn manager(id: &str, raft_id: u64) -> Node {
        Node {
            manager_status: Some(ManagerStatus {
                raft_id,
                addr: format!("{id}:2377"),
                ..Default::default()
            }),
            ..node(id, NodeRole::Manager, NodeState::Ready)
        }
    }

    fn member(id: &str, raft_id: u64, reachable: bool) -> Member {
        Member {
            raft_id,
            node_id: NodeId::from(id),
            addr: format!("{id}:2377"),
            voter: true,
            reachable,
        }
    }

    async fn set(
        bench: &Bench,
        id: &str,
        change: impl FnOnce(&mut NodeSpec),
    ) -> Result<Node, Status> {
        let node = bench
            .control
            .get_node(GetNodeRequest {
                r#ref: id.to_owned(),
            })
            .await?;
        let mut spec = node.spec.clone().unwrap();
        change(&mut spec);
        bench
            .control
            .update_node(UpdateNodeRequest {
                node_id: node.id.clone(),
                version: version_of(node.meta.as_ref()),
                spec: Some(spec),
            })
            .await
    }

    async fn removal(bench: &Bench, id: &str, force: bool) -> Result<RemoveNodeResponse, Status> {
        bench
            .control
            .remove_node(RemoveNodeRequest {
                r#ref: id.to_owned(),
                force,
            })
            .await
    }

    #[tokio::test]
    async fn availability_is_set_with_the_version_that_was_read() {
        let bench = Bench::new();
        bench.write([create(node("w1", NodeRole::Worker, NodeState::Ready))]);
        let drained = set(&bench, "w1", |spec| {
            spec.availability = NodeAvailability::Drain.into();
        })
        .await
        .unwrap();
        assert_eq!(
            drained.spec.unwrap().availability(),
            NodeAvailability::Drain
        );
        let before = bench.objects();
        let stale = bench
            .control
            .update_node(UpdateNodeRequest {
                node_id: "w1".to_owned(),
                version: 1,
                spec: Some(NodeSpec::default()),
            })
            .await
            .unwrap_err();
        assert_eq!(
            (stale.code(), stale.message()),
            (Code::Aborted, "update out of sequence")
        );
        assert_eq!(bench.objects(), before);
    }

    #[tokio::test]
    async fn the_last_manager_is_not_demoted() {
        let bench = Bench::new();
        bench.write([create(node("m1", NodeRole::Manager, NodeState::Ready))]);
        let before = bench.objects();
        let refused = set(&bench, "m1", |spec| {
            spec.desired_role = NodeRole::Worker.into();
        })
        .await
        .unwrap_err();
        assert_eq!(
            (refused.code(), refused.message()),
            (
                Code::FailedPrecondition,
                "attempting to demote the last manager of the swarm"
            )
        );
        assert_eq!(bench.objects(), before);
    }

    #[tokio::test]
    async fn a_demotion_that_would_lose_quorum_is_refused_with_the_reason() {
        let bench = Bench::new();
        for (id, raft_id) in [("m1", 1), ("m2", 2), ("m3", 3)] {
            bench.write([create(manager(id, raft_id))]);
        }
        bench.consensus.set_members(vec![
            member("m1", 1, true),
            member("m2", 2, true),
            member("m3", 3, false),
        ]);
        let refused = set(&bench, "m2", |spec| {
            spec.desired_role = NodeRole::Worker.into();
        })
        .await
        .unwrap_err();
        assert_eq!(refused.code(), Code::FailedPrecondition);
        assert!(refused.message().starts_with(
            "can't remove member from the raft: this would result in a loss of quorum"
        ));
        assert!(refused.message().contains("m3"), "{}", refused.message());
        // The one that is silent may go.
        let demoted = set(&bench, "m3", |spec| {
            spec.desired_role = NodeRole::Worker.into();
        })
        .await
        .unwrap();
        assert_eq!(demoted.spec.unwrap().desired_role(), NodeRole::Worker);
    }

    #[tokio::test]
    async fn of_two_demotions_at_once_the_second_is_refused() {
        let bench = Bench::new();
        bench.write([create(manager("m1", 1)), create(manager("m2", 2))]);
        let state = bench.consensus.store().state();
        let demote = |id: &str| {
            let mut changed = Node::clone(state.node(id).unwrap());
            changed.spec.as_mut().unwrap().desired_role = NodeRole::Worker.into();
            vec![
                update(object::Object::Cluster(Cluster::clone(
                    state.cluster().unwrap(),
                ))),
                update(object::Object::Node(changed)),
            ]
        };
        bench.control.write(demote("m1")).await.unwrap();
        let refused = bench.control.write(demote("m2")).await.unwrap_err();
        assert_eq!(refused.code(), Code::Aborted);
    }

    #[tokio::test]
    async fn only_what_is_down_or_forced_is_removed() {
        let bench = Bench::new();
        bench.write([
            create(node("w1", NodeRole::Worker, NodeState::Ready)),
            create(node("w2", NodeRole::Worker, NodeState::Down)),
            create(node("m1", NodeRole::Manager, NodeState::Down)),
        ]);
        let before = bench.objects();
        let refused = removal(&bench, "w1", false).await.unwrap_err();
        assert_eq!(
            (refused.code(), refused.message()),
            (
                Code::FailedPrecondition,
                "node w1 is not down and can't be removed"
            )
        );
        let refused = removal(&bench, "m1", true).await.unwrap_err();
        assert_eq!(
            refused.message(),
            "node m1 is a cluster manager and is a member of the raft cluster. It must be demoted to worker before removal"
        );
        assert_eq!(bench.objects(), before);
        for (id, force) in [("w1", true), ("w2", false)] {
            assert_eq!(removal(&bench, id, force).await.unwrap().id, id);
            let state = bench.consensus.store().state();
            assert!(state.node(id).is_none());
            let until = state.cluster().unwrap().blacklisted_nodes[id];
            assert!(since_epoch(&until) > (bench.control.clock)() + NODE_CERT_LIFE);
        }
    }

    #[tokio::test]
    async fn lists_are_sorted_by_hostname_and_mark_the_leader() {
        let bench = Bench::new();
        bench.write([
            create(node("zeta", NodeRole::Worker, NodeState::Ready)),
            create(manager("beta", 1)),
            create(manager("alpha", 2)),
        ]);
        bench
            .consensus
            .set_members(vec![member("beta", 1, true), member("alpha", 2, false)]);
        let list = |request| bench.control.list_nodes(request);
        let nodes = list(ListNodesRequest::default()).await.unwrap().nodes;
        let names: Vec<&str> = nodes.iter().map(|node| node.id.as_str()).collect();
        assert_eq!(names, ["alpha", "beta", "zeta"]);
        let status = |at: usize| nodes[at].manager_status.clone().unwrap();
        assert!(status(1).leader && !status(0).leader);
        assert_eq!(status(1).reachability(), Reachability::Reachable);
        assert_eq!(status(0).reachability(), Reachability::Unreachable);
        let workers = list(ListNodesRequest {
            roles: vec![NodeRole::Worker.into()],
            ..Default::default()
        })
        .await
        .unwrap();
        assert_eq!(workers.nodes.len(), 1);
    }
}
