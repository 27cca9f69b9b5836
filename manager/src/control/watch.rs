//! Watch: a snapshot, then every later change, in the order of the log.
//!
//! No loop of its own: the connection asks for the next message, and a reader
//! that does not ask makes the store forget for it, which ends its watch. So a
//! watch holds at most one message and one set of pointers.

use std::collections::{HashSet, VecDeque};
use std::pin::Pin;
use std::sync::Arc;

use futures::Stream;
use prost::Message as _;
use swarm_proto::v1::{
    Cluster, Network, Node, Object, ObjectKind, Service, Task, WatchAction, WatchEvent,
    WatchMessage, WatchRequest, object,
};
use swarm_store::{Event, State, Watch, WatchError};
use tokio::sync::OwnedSemaphorePermit;
use tokio_util::sync::CancellationToken;
use tonic::Status;

use super::{Control, redact};

/// Messages are cut before they grow larger than this (one object may be larger).
const CHUNK: usize = 256 << 10;
/// Most values of one filter.
const VALUES_MAX: usize = 10_000;

/// What the stream of a watch is.
pub type MessageStream = Pin<Box<dyn Stream<Item = Result<WatchMessage, Status>> + Send>>;

impl Control {
    pub(super) async fn watch(&self, request: WatchRequest) -> Result<MessageStream, Status> {
        let filter = Filter::new(&request)?;
        let permit = self.watches.clone().try_acquire_owned().map_err(|_| {
            Status::resource_exhausted("this manager serves as many watches as it can; try another")
        })?;
        // The snapshot has everything that was committed before the call.
        let read = self.state().await?;
        let store = self.consensus.store();
        let (watch, pending, index, done) = if request.resume_from == 0 {
            let (state, watch) = store.watch();
            let pending = filter.snapshot(&state);
            (watch, pending, state.index(), false)
        } else {
            if request.resume_from > read.index() {
                return Err(Status::out_of_range(format!(
                    "index {} is not reached yet: the newest is {}; start again from a snapshot",
                    request.resume_from,
                    read.index()
                )));
            }
            let watch = store
                .watch_from(request.resume_from)
                .map_err(|error| Status::out_of_range(error.to_string()))?;
            (watch, VecDeque::new(), request.resume_from, true)
        };
        let watcher = Watcher {
            filter,
            watch,
            snapshot: pending,
            snapshot_index: index,
            snapshot_done: done,
            outgoing: VecDeque::new(),
            stopping: self.stopping.clone(),
            _permit: permit,
        };
        Ok(Box::pin(futures::stream::unfold(
            Some(watcher),
            |watcher| async move {
                let mut watcher = watcher?;
                match watcher.next().await {
                    Ok(message) => Some((Ok(message), Some(watcher))),
                    // The last item: after an error the stream ends.
                    Err(status) => Some((Err(status), None)),
                }
            },
        )))
    }
}

/// One caller's watch.
struct Watcher {
    filter: Filter,
    watch: Watch,
    /// Objects of the snapshot that are still to be sent.
    snapshot: VecDeque<Stored>,
    snapshot_index: u64,
    snapshot_done: bool,
    /// The pieces of one large log entry.
    outgoing: VecDeque<WatchMessage>,
    stopping: CancellationToken,
    _permit: OwnedSemaphorePermit,
}

impl Watcher {
    async fn next(&mut self) -> Result<WatchMessage, Status> {
        if !self.snapshot_done {
            return Ok(self.next_of_snapshot());
        }
        loop {
            if let Some(message) = self.outgoing.pop_front() {
                return Ok(message);
            }
            let change = tokio::select! {
                () = self.stopping.cancelled() => {
                    return Err(Status::unavailable("the manager is stopping"));
                }
                change = self.watch.next() => change.map_err(ended)?,
            };
            let before = change.index.saturating_sub(1);
            let events = change
                .events
                .iter()
                .filter_map(|event| self.filter.event(event));
            self.outgoing = cut(events, before, change.index);
        }
    }

    /// The next piece of the snapshot; the one after the last says that it is complete.
    fn next_of_snapshot(&mut self) -> WatchMessage {
        // The index is that of a resume, and the snapshot can only be resumed when it is complete.
        let mut message = WatchMessage::default();
        let mut size = 0;
        while let Some(stored) = self.snapshot.front() {
            let event = WatchEvent {
                action: WatchAction::Snapshot.into(),
                object: Some(stored.shown()),
            };
            size += event.encoded_len() + 8;
            if size > CHUNK && !message.events.is_empty() {
                break;
            }
            message.events.push(event);
            self.snapshot.pop_front();
        }
        if message.events.is_empty() {
            self.snapshot_done = true;
            message.snapshot_done = true;
            message.index = self.snapshot_index;
        }
        message
    }
}

/// The events of one log entry, in pieces. Only the last brings the watcher to the entry's index.
fn cut(
    events: impl Iterator<Item = WatchEvent>,
    before: u64,
    index: u64,
) -> VecDeque<WatchMessage> {
    let mut messages: VecDeque<WatchMessage> = VecDeque::new();
    let mut size = 0;
    for event in events {
        let event_size = event.encoded_len() + 8;
        match messages.back_mut() {
            Some(last) if size + event_size <= CHUNK => {
                last.events.push(event);
                size += event_size;
            }
            _ => {
                messages.push_back(WatchMessage {
                    events: vec![event],
                    index: before,
                    snapshot_done: false,
                });
                size = event_size;
            }
        }
    }
    if let Some(last) = messages.back_mut() {
        last.index = index;
    }
    messages
}

fn ended(error: WatchError) -> Status {
    match error {
        WatchError::Lagged { after } => Status::aborted(format!(
            "the watch was too slow: changes after {after} are no longer remembered; \
             start again from a snapshot"
        )),
        WatchError::Closed => Status::unavailable("the manager is stopping"),
    }
}

/// An object of a snapshot, not copied before it is sent.
enum Stored {
    Cluster(Arc<Cluster>),
    Node(Arc<Node>),
    Service(Arc<Service>),
    Task(Arc<Task>),
    Network(Arc<Network>),
}

impl Stored {
    fn shown(&self) -> Object {
        let object = match self {
            Self::Cluster(found) => object::Object::Cluster((**found).clone()),
            Self::Node(found) => object::Object::Node((**found).clone()),
            Self::Service(found) => object::Object::Service((**found).clone()),
            Self::Task(found) => object::Object::Task((**found).clone()),
            Self::Network(found) => object::Object::Network((**found).clone()),
        };
        let mut object = Object {
            object: Some(object),
        };
        redact::object(&mut object);
        object
    }
}

/// Which objects a watch is about.
struct Filter {
    kinds: HashSet<i32>,
    ids: HashSet<String>,
    service_ids: HashSet<String>,
}

impl Filter {
    fn new(request: &WatchRequest) -> Result<Self, Status> {
        for (what, number) in [
            ("kinds", request.kinds.len()),
            ("ids", request.ids.len()),
            ("service_ids", request.service_ids.len()),
        ] {
            if number > VALUES_MAX {
                return Err(Status::invalid_argument(format!(
                    "{number} values of {what} are more than {VALUES_MAX}"
                )));
            }
        }
        for kind in &request.kinds {
            if ObjectKind::try_from(*kind).is_err() {
                return Err(Status::invalid_argument(format!(
                    "unknown kind of object {kind}"
                )));
            }
        }
        Ok(Self {
            kinds: request.kinds.iter().copied().collect(),
            ids: request.ids.iter().cloned().collect(),
            service_ids: request.service_ids.iter().cloned().collect(),
        })
    }

    fn kind(&self, kind: ObjectKind) -> bool {
        self.kinds.is_empty() || self.kinds.contains(&i32::from(kind))
    }

    fn id(&self, id: &str) -> bool {
        self.ids.is_empty() || self.ids.contains(id)
    }

    fn service(&self, id: &str) -> bool {
        self.service_ids.is_empty() || self.service_ids.contains(id)
    }

    /// What of the state the watch is about: kinds in the order in which objects refer to each other.
    fn snapshot(&self, state: &State) -> VecDeque<Stored> {
        let mut found = VecDeque::new();
        if self.kind(ObjectKind::Cluster) {
            let cluster = state.cluster().filter(|cluster| self.id(&cluster.id));
            found.extend(cluster.cloned().map(Stored::Cluster));
        }
        if self.kind(ObjectKind::Node) {
            let nodes = state.nodes().filter(|node| self.id(&node.id));
            found.extend(nodes.cloned().map(Stored::Node));
        }
        if self.kind(ObjectKind::Network) {
            let networks = state.networks().filter(|network| self.id(&network.id));
            found.extend(networks.cloned().map(Stored::Network));
        }
        if self.kind(ObjectKind::Service) {
            let services = state.services().filter(|service| self.id(&service.id));
            found.extend(services.cloned().map(Stored::Service));
        }
        if self.kind(ObjectKind::Task) {
            if self.service_ids.is_empty() {
                let tasks = state.tasks().filter(|task| self.id(&task.id));
                found.extend(tasks.cloned().map(Stored::Task));
            } else {
                let of_services = self
                    .service_ids
                    .iter()
                    .flat_map(|id| state.tasks_of_service(id))
                    .filter(|task| self.id(&task.id));
                found.extend(of_services.cloned().map(Stored::Task));
            }
        }
        found
    }

    /// The event as the watcher sees it; `None` when it is not about it.
    fn event(&self, event: &Event) -> Option<WatchEvent> {
        if !self.kind(event.kind()) || !self.id(event.id()) {
            return None;
        }
        if let Event::Task { old, new } = event {
            let task = new.as_ref().or(old.as_ref())?;
            if !self.service(&task.service_id) {
                return None;
            }
        }
        let old = event.old_object();
        let (action, mut object) = match (old, event.new_object()) {
            (None, Some(new)) => (WatchAction::Create, new),
            (Some(_), Some(new)) => (WatchAction::Update, new),
            (Some(old), None) => (WatchAction::Remove, old),
            (None, None) => return None,
        };
        redact::object(&mut object);
        Some(WatchEvent {
            action: action.into(),
            object: Some(object),
        })
    }
}

#[cfg(test)]
mod tests {
    use futures::{FutureExt as _, StreamExt as _};
    use swarm_proto::v1::{RegistryAuth, TaskState};
    use swarm_store::Consensus as _;
    use swarm_store::testing::{create, network, node, remove, report, task};
    use tonic::Code;

    use super::super::testing::{Bench, service_spec};
    use super::*;

    fn names(message: &WatchMessage) -> Vec<(WatchAction, String)> {
        message
            .events
            .iter()
            .map(|event| {
                let id = match event.object.clone().unwrap().object.unwrap() {
                    object::Object::Cluster(found) => found.id,
                    object::Object::Node(found) => found.id,
                    object::Object::Service(found) => found.id,
                    object::Object::Task(found) => found.id,
                    object::Object::Network(found) => found.id,
                };
                (event.action(), id)
            })
            .collect()
    }

    /// Everything up to and with the message that says the snapshot is complete.
    async fn snapshot(stream: &mut MessageStream) -> Vec<WatchMessage> {
        let mut messages = Vec::new();
        loop {
            let message = stream.next().await.unwrap().unwrap();
            let done = message.snapshot_done;
            messages.push(message);
            if done {
                return messages;
            }
        }
    }

    async fn next(stream: &mut MessageStream) -> WatchMessage {
        stream.next().await.unwrap().unwrap()
    }

    #[tokio::test]
    async fn a_watch_is_a_snapshot_then_every_change_in_order() {
        let bench = Bench::new();
        bench.write([create(node("w1", "10.9.0.1"))]);
        let request = WatchRequest {
            kinds: vec![ObjectKind::Node.into()],
            ..Default::default()
        };
        let mut stream = bench.control.watch(request).await.unwrap();
        let snapshot = snapshot(&mut stream).await;
        assert_eq!(
            names(&snapshot[0]),
            [(WatchAction::Snapshot, "w1".to_owned())]
        );
        let start = snapshot.last().unwrap().index;
        assert_eq!(start, bench.consensus.store().state().index());

        bench.write([
            create(node("w2", "10.9.0.2")),
            create(network("n1", "net", "")),
        ]);
        bench.write([remove(ObjectKind::Node, "w1")]);
        let first = next(&mut stream).await;
        assert_eq!(names(&first), [(WatchAction::Create, "w2".to_owned())]);
        assert_eq!(first.index, start + 1);
        let second = next(&mut stream).await;
        assert_eq!(names(&second), [(WatchAction::Remove, "w1".to_owned())]);
        assert!(stream.next().now_or_never().is_none());

        // Resumed after the first change, the second comes again and nothing else.
        let request = WatchRequest {
            kinds: vec![ObjectKind::Node.into()],
            resume_from: first.index,
            ..Default::default()
        };
        let mut resumed = bench.control.watch(request).await.unwrap();
        assert_eq!(next(&mut resumed).await, second);
        assert!(resumed.next().now_or_never().is_none());
    }

    #[tokio::test]
    async fn a_large_snapshot_comes_in_pieces() {
        let bench = Bench::new();
        for at in 0..10 {
            let mut spec = service_spec(&format!("s{at}"));
            let container = spec.task.as_mut().unwrap().container.as_mut().unwrap();
            container.args = vec!["x".repeat(100 << 10)];
            bench.create_service(spec).await.unwrap();
        }
        let mut stream = bench.control.watch(WatchRequest::default()).await.unwrap();
        let pieces = snapshot(&mut stream).await;
        assert!(pieces.len() > 5);
        assert!(pieces.iter().all(|piece| piece.encoded_len() <= CHUNK + 64));
        let total: usize = pieces.iter().map(|piece| piece.events.len()).sum();
        assert_eq!(total, 11);
    }

    #[tokio::test]
    async fn tasks_of_other_services_are_left_out() {
        let bench = Bench::new();
        let web = bench.create_service(service_spec("web")).await.unwrap();
        let api = bench.create_service(service_spec("api")).await.unwrap();
        bench.write([
            create(task("t1", &web.id, &[])),
            create(task("t2", &api.id, &[])),
        ]);
        let request = WatchRequest {
            kinds: vec![ObjectKind::Task.into()],
            service_ids: vec![web.id.clone()],
            ..Default::default()
        };
        let mut stream = bench.control.watch(request).await.unwrap();
        let found = snapshot(&mut stream).await;
        assert_eq!(names(&found[0]), [(WatchAction::Snapshot, "t1".to_owned())]);
        bench.write([report("t2", TaskState::Running, 1)]);
        bench.write([report("t1", TaskState::Running, 1)]);
        assert_eq!(
            names(&next(&mut stream).await),
            [(WatchAction::Update, "t1".to_owned())]
        );
    }

    #[tokio::test]
    async fn no_secret_is_in_any_message() {
        let bench = Bench::new();
        let mut spec = service_spec("web");
        let container = spec.task.as_mut().unwrap().container.as_mut().unwrap();
        container.pull_auth = Some(RegistryAuth {
            password: "hunter2".to_owned(),
            ..Default::default()
        });
        let mut stream = bench.control.watch(WatchRequest::default()).await.unwrap();
        let mut messages = snapshot(&mut stream).await;
        let web = bench.create_service(spec.clone()).await.unwrap();
        let mut made = task("t1", &web.id, &[]);
        made.spec = spec.task;
        bench.write([create(made)]);
        bench.write([remove(ObjectKind::Service, &web.id)]);
        for _ in 0..3 {
            messages.push(next(&mut stream).await);
        }
        messages.extend(
            snapshot(&mut bench.control.watch(WatchRequest::default()).await.unwrap()).await,
        );
        let text = format!("{messages:?}");
        assert!(!text.contains("hunter2") && !text.contains("PRIVATE KEY"));
        assert!(!text.contains("SWMTKN"));
    }

    #[tokio::test]
    async fn an_index_that_is_not_known_is_out_of_range() {
        let bench = Bench::new();
        let error = bench
            .control
            .watch(WatchRequest {
                resume_from: 1 << 40,
                ..Default::default()
            })
            .await
            .err()
            .unwrap();
        assert_eq!(error.code(), Code::OutOfRange);
    }

    #[tokio::test]
    async fn a_watcher_that_missed_changes_is_told_to_start_again() {
        let bench = Bench::new();
        let mut stream = bench.control.watch(WatchRequest::default()).await.unwrap();
        snapshot(&mut stream).await;
        let state = bench.consensus.store().state();
        // As when a snapshot of the leader is installed.
        bench
            .consensus
            .store()
            .replace(state.at_index(state.index() + 10));
        let error = stream.next().await.unwrap().unwrap_err();
        assert_eq!(error.code(), Code::Aborted);
        assert!(error.message().contains("start again from a snapshot"));
        assert!(stream.next().await.is_none());
    }

    #[tokio::test]
    async fn watches_end_when_the_manager_stops_and_are_bounded() {
        let bench = Bench::new();
        let mut stream = bench.control.watch(WatchRequest::default()).await.unwrap();
        snapshot(&mut stream).await;
        let others: Vec<_> = futures::future::join_all(
            (1..super::super::WATCHES_MAX).map(|_| bench.control.watch(WatchRequest::default())),
        )
        .await;
        assert!(others.iter().all(Result::is_ok));
        let refused = bench.control.watch(WatchRequest::default()).await;
        assert_eq!(refused.err().unwrap().code(), Code::ResourceExhausted);
        bench.control.stopping.cancel();
        let error = stream.next().await.unwrap().unwrap_err();
        assert_eq!(error.code(), Code::Unavailable);
    }
}
