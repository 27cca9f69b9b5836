//! The whole state as bytes, and back.
//!
//! Only objects and what cannot be derived from them is written; indexes and
//! free addresses are rebuilt on reading, which also checks that nothing is
//! held twice.

use std::sync::Arc;
use std::sync::mpsc::sync_channel;

use imbl::OrdSet;
use prost::Message;
use prost::encoding::{
    WireType, encode_key, encode_varint, encoded_len_varint, key_len, message, string,
};
use swarm_proto::v1::{
    Annotations, Cluster, Network, Node, Object, ObjectKind, ObjectRef, Service, SnapshotCursors,
    SnapshotEnd, SnapshotHeader, SnapshotRecord, SnapshotSpec, SnapshotWaiter, Task, TaskSpec,
    object, snapshot_record,
};
use swarm_proto::{NetworkId, NodeId, ServiceId, Shared, TaskId};

use crate::allocator::Waiter;
use crate::apply::holds_addresses;
use crate::state::State;

/// Version of the records that this build writes, and the highest that it reads. In 1 each task has its own spec.
const FORMAT: u32 = 2;
/// Bytes that are encoded or decoded in one go (and the record that has the last of them).
const PIECE: usize = 256 << 10;
/// Threads that decode, at most: one puts together what a few decode.
const THREADS_MAX: usize = 4;
/// Pieces that each of them may be ahead.
const AHEAD: usize = 4;
/// No record is larger: an object has at most about 1 MiB.
const RECORD_MAX: u64 = 16 << 20;
/// No piece of [`State::pieces`] has more bytes: a record, with its length, behind almost enough others.
pub const PIECE_MAX: usize = PIECE + RECORD_MAX as usize + 5;

/// Numbers of fields in store.proto: those of an object in a record and of whose spec it has,
const RECORD_OBJECT: u32 = 2;
const RECORD_SPEC: u32 = 6;
/// and those of its kinds in an object. A million objects are encoded where they are, not copied first.
mod fields {
    pub(super) const CLUSTER: u32 = 1;
    pub(super) const NODE: u32 = 2;
    pub(super) const SERVICE: u32 = 3;
    pub(super) const TASK: u32 = 4;
    pub(super) const NETWORK: u32 = 5;
}
/// The first fields of a task: its spec is cut out from behind the others.
mod task_fields {
    pub(super) const ID: u32 = 1;
    pub(super) const META: u32 = 2;
    pub(super) const SPEC: u32 = 3;
}

/// Why a snapshot cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum DecodeError {
    /// A later version of swarm has written it.
    #[error(
        "the snapshot has format {found}, this version of swarm reads up to {known}: upgrade this manager"
    )]
    Newer {
        /// As written.
        found: u32,
        /// The highest that can be read.
        known: u32,
    },
    /// It is cut off, damaged, or contradicts itself.
    #[error("the snapshot is damaged: {0}")]
    Damaged(String),
}

impl State {
    /// The state as bytes. Equal states give equal bytes.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        self.pieces().collect::<Vec<_>>().concat()
    }

    /// The same bytes, one piece of whole records after the other: a state of a million tasks has hundreds of
    /// megabytes, which are never in memory at once. Takes a microsecond or two for each object.
    pub fn pieces(&self) -> impl Iterator<Item = Vec<u8>> + Send + '_ {
        let mut encoder = Encoder::default();
        let mut items = self.items();
        let mut ended = false;
        std::iter::from_fn(move || {
            while encoder.bytes.len() < PIECE && !ended {
                match items.next() {
                    Some(item) => encoder.put(item),
                    None => {
                        ended = true;
                        encoder.put(Item::End);
                    }
                }
            }
            encoder.take()
        })
    }

    /// All that is written, in order, but the end.
    fn items(&self) -> impl Iterator<Item = Item<'_>> + Send {
        let header = SnapshotHeader {
            format: FORMAT,
            index: self.index,
            term: self.term,
            turns: self.ipam.next_turn(),
        };
        // Neighbours are of one service, most of them.
        let mut last: Option<&Service> = None;
        let tasks = self.tasks.values().map(move |task| {
            if last.is_none_or(|service| service.id != task.service_id) {
                last = self.service(&task.service_id).map(|service| &**service);
            }
            Item::Task(task, place_of_spec(task, last))
        });
        let cursors = self.ipam.cursors().map(|(network, next)| SnapshotCursors {
            network_id: network.to_string(),
            next,
        });
        let waiting = self.ipam.waiting().map(|(who, network, turn)| {
            let (kind, id) = match who {
                Waiter::Task(id) => (ObjectKind::Task, id.to_string()),
                Waiter::Service(id) => (ObjectKind::Service, id.to_string()),
            };
            SnapshotWaiter {
                turn,
                network_id: network.to_string(),
                r#ref: Some(ObjectRef {
                    kind: kind.into(),
                    id,
                }),
            }
        });
        std::iter::once(Item::Header(header))
            .chain(self.cluster.iter().map(|cluster| Item::Cluster(cluster)))
            .chain(self.nodes.values().map(|node| Item::Node(node)))
            .chain(self.networks.values().map(|network| Item::Network(network)))
            .chain(self.services.values().map(|service| Item::Service(service)))
            .chain(tasks)
            .chain(cursors.map(Item::Cursors))
            .chain(waiting.map(Item::Waiter))
    }

    /// Reads what [`State::encode`] has written.
    ///
    /// # Errors
    /// See [`DecodeError`].
    pub fn decode(bytes: &[u8]) -> Result<Self, DecodeError> {
        Self::decode_pieces(&split(bytes)?, |piece| Ok(*piece))
    }

    /// Reads what [`State::pieces`] has given. `open` gets at the bytes of a piece.
    ///
    /// Pieces are opened and decoded by as many threads as the machine has cores, each in turn; the state is put
    /// together from them in order.
    ///
    /// # Errors
    /// See [`DecodeError`]; what `open` says is [`DecodeError::Damaged`].
    pub fn decode_pieces<P: Sync, B: AsRef<[u8]>>(
        pieces: &[P],
        open: impl Fn(&P) -> Result<B, String> + Sync,
    ) -> Result<Self, DecodeError> {
        let open = |piece: &P| open(piece).map_err(DecodeError::Damaged);
        let (first, pieces) = pieces.split_first().ok_or_else(|| damaged("it is empty"))?;
        let first = open(first)?;
        // Whether this build can read it comes before anything else.
        let (header, rest) = split_record(first.as_ref())?;
        let mut restoring = Restoring::new(read_record(header)?)?;
        restoring.take(records(rest)?)?;
        let threads = std::thread::available_parallelism().map_or(1, usize::from);
        let threads = threads.min(THREADS_MAX).min(pieces.len());
        if threads < 2 {
            for piece in pieces {
                restoring.take(records(open(piece)?.as_ref())?)?;
            }
            return restoring.finish();
        }
        std::thread::scope(|scope| {
            let workers = (0..threads).map(|worker| {
                let (decoded, taken) = sync_channel(AHEAD);
                let mut mine = pieces.iter().skip(worker).step_by(threads);
                let read = |piece| records(open(piece)?.as_ref());
                // Once one is damaged nobody takes the others.
                scope.spawn(move || mine.try_for_each(|piece| decoded.send(read(piece))));
                taken
            });
            let workers: Vec<_> = workers.collect();
            for piece in 0..pieces.len() {
                let decoded = workers[piece % threads].recv();
                restoring.take(decoded.map_err(|_| damaged("it cannot be decoded"))??)?;
            }
            restoring.finish()
        })
    }

    fn restore(&mut self, object: Restored) -> Result<(), DecodeError> {
        match object {
            Restored::Cluster(cluster) => once(self.cluster.replace(cluster))?,
            Restored::Node(id, node) => {
                self.ipam.note_routes(&id, None, Some(&node));
                once(self.nodes.insert(id, node))?;
            }
            Restored::Network(id, network) => self.restore_network(id, network)?,
            Restored::Service(id, service) => {
                let vips = service
                    .endpoint
                    .iter()
                    .flat_map(|endpoint| &endpoint.virtual_ips);
                #[cfg(feature = "museum")]
                let vips = vips
                    .filter(|_| !swarm_proto::museum::on(swarm_proto::museum::Bug::RestoreForgets));
                for vip in vips {
                    if !self.ipam.restore_address(&vip.network_id, &vip.addr) {
                        return Err(damaged_address("service", &service.id, &vip.addr));
                    }
                }
                self.index_service(&service);
                once(self.services.insert(id, service))?;
            }
            Restored::Task(id, task, _) => {
                if holds_addresses(&task) {
                    for attachment in &task.networks {
                        for address in &attachment.addresses {
                            if !self.ipam.restore_address(&attachment.network_id, address) {
                                return Err(damaged_address("task", &task.id, address));
                            }
                        }
                    }
                }
                self.index_place(&id, &task, None);
                once(self.tasks.insert(id, task))?;
            }
        }
        Ok(())
    }

    fn restore_network(&mut self, id: NetworkId, network: Arc<Network>) -> Result<(), DecodeError> {
        let restored = self.ipam.restore_network(&network);
        restored.map_err(|rejection| DecodeError::Damaged(rejection.message))?;
        self.index_network(&network);
        once(self.networks.insert(id, network))
    }
}

/// Where to find a task's spec: most have that of `service`, if that is theirs.
fn place_of_spec(task: &Task, service: Option<&Service>) -> SnapshotSpec {
    let service = service.filter(|service| service.id == task.service_id);
    let wanted = |found: SnapshotSpec| {
        task.spec.is_some()
            && service.and_then(|service| spec_in(service, found)) == task.spec.as_ref()
    };
    [SnapshotSpec::Services, SnapshotSpec::Previous]
        .into_iter()
        .find(|found| wanted(*found))
        .unwrap_or(SnapshotSpec::Own)
}

/// Nothing was there before.
fn once<T>(before: Option<T>) -> Result<(), DecodeError> {
    match before {
        None => Ok(()),
        Some(_) => Err(damaged("an object is in it twice")),
    }
}

fn spec_in(service: &Service, wanted: SnapshotSpec) -> Option<&Shared<TaskSpec>> {
    let spec = match wanted {
        SnapshotSpec::Own => None,
        SnapshotSpec::Services => service.spec.as_ref(),
        SnapshotSpec::Previous => service.previous_spec.as_ref(),
    };
    spec?.task.as_ref()
}

fn damaged(what: &str) -> DecodeError {
    DecodeError::Damaged(what.into())
}

fn damaged_address(kind: &str, id: &str, address: &str) -> DecodeError {
    DecodeError::Damaged(format!("{address} of {kind} {id} is not free"))
}

/// An object as the state holds it.
enum Restored {
    Cluster(Arc<Cluster>),
    Node(NodeId, Arc<Node>),
    Network(NetworkId, Arc<Network>),
    Service(ServiceId, Arc<Service>),
    Task(TaskId, Arc<Task>, SnapshotSpec),
}

/// A record as it is put into the state.
enum Record {
    Header(SnapshotHeader),
    Object(Restored),
    Cursors(SnapshotCursors),
    Waiter(SnapshotWaiter),
    End(SnapshotEnd),
}

/// A service of which some tasks come one after the other, as most do: what was made together has neighbouring
/// identifiers.
struct Family {
    id: ServiceId,
    service: Option<Arc<Service>>,
    /// Those so far. They are missing in the state meanwhile.
    tasks: OrdSet<TaskId>,
    /// Of the last one. They share them in memory.
    annotations: Option<Shared<Annotations>>,
}

/// A state that is being put together.
struct Restoring {
    state: State,
    /// Of the last task.
    family: Option<Family>,
    /// Between header and end.
    records: u64,
    ended: bool,
}

impl Restoring {
    /// Begins with the header.
    fn new(first: Record) -> Result<Self, DecodeError> {
        let Record::Header(header) = first else {
            return Err(damaged("it does not begin with a header"));
        };
        if header.format > FORMAT {
            return Err(DecodeError::Newer {
                found: header.format,
                known: FORMAT,
            });
        }
        let mut state = State {
            index: header.index,
            term: header.term,
            ..State::default()
        };
        state.ipam.restore_next_turn(header.turns);
        Ok(Self {
            state,
            family: None,
            records: 0,
            ended: false,
        })
    }

    fn take(&mut self, records: Vec<Record>) -> Result<(), DecodeError> {
        let mut records = records.into_iter();
        records.try_for_each(|record| self.take_one(record))
    }

    fn take_one(&mut self, record: Record) -> Result<(), DecodeError> {
        if self.ended {
            return Err(damaged("something follows its end"));
        }
        match record {
            Record::Header(_) => return Err(damaged("two headers")),
            Record::Object(mut object) => {
                if let Restored::Task(id, task, spec) = &mut object {
                    self.join_family(id, Arc::make_mut(task), *spec)?;
                }
                self.state.restore(object)?;
            }
            Record::Cursors(cursors) => {
                let ipam = &mut self.state.ipam;
                ipam.restore_cursors(&cursors.network_id, &cursors.next);
            }
            Record::Waiter(waiter) => {
                let wanted = waiter.r#ref.unwrap_or_default();
                let who = match wanted.kind() {
                    ObjectKind::Task => Waiter::Task(TaskId::from(wanted.id)),
                    ObjectKind::Service => Waiter::Service(ServiceId::from(wanted.id)),
                    _ => return Err(damaged("a waiter of an unknown kind")),
                };
                let network = NetworkId::from(waiter.network_id);
                let ipam = &mut self.state.ipam;
                if !ipam.restore_waiting(who, network, waiter.turn) {
                    return Err(damaged("one waits twice for an address"));
                }
            }
            Record::End(end) if end.records == self.records => self.ended = true,
            Record::End(_) => return Err(damaged("records are missing")),
        }
        self.records += 1;
        Ok(())
    }

    /// Gives the task what it has of its service, and notes it there.
    fn join_family(
        &mut self,
        id: &TaskId,
        task: &mut Task,
        spec: SnapshotSpec,
    ) -> Result<(), DecodeError> {
        if self
            .family
            .as_ref()
            .is_none_or(|family| family.id.as_str() != task.service_id)
        {
            self.leave_family();
            let state = &mut self.state;
            self.family = Some(Family {
                id: ServiceId::from(&task.service_id),
                service: state.services.get(task.service_id.as_str()).cloned(),
                tasks: state
                    .tasks_by_service
                    .remove(task.service_id.as_str())
                    .unwrap_or_default(),
                annotations: None,
            });
        }
        let Some(family) = &mut self.family else {
            return Ok(());
        };
        if spec != SnapshotSpec::Own {
            let service = family.service.as_ref();
            let spec = service.and_then(|service| spec_in(service, spec));
            let spec = spec.ok_or_else(|| damaged("a task has the spec of no service"))?;
            task.spec = Some(spec.clone());
        }
        let annotations = &mut task.service_annotations;
        if !Shared::share(annotations, family.annotations.as_ref()) {
            family.annotations.clone_from(annotations);
        }
        family.tasks.insert(id.clone());
        Ok(())
    }

    /// The next task is of another service.
    fn leave_family(&mut self) {
        if let Some(family) = self.family.take()
            && !family.id.is_empty()
        {
            let tasks_by_service = &mut self.state.tasks_by_service;
            tasks_by_service.insert(family.id, family.tasks);
        }
    }

    fn finish(mut self) -> Result<State, DecodeError> {
        if !self.ended {
            return Err(damaged("it is cut off"));
        }
        self.leave_family();
        let state = self.state;
        let names = (state.service_names.len(), state.network_names.len());
        match names == (state.services.len(), state.networks.len()) {
            true => Ok(state),
            false => Err(damaged("two objects have one name")),
        }
    }
}

/// Pieces of whole records, of the bytes of a state.
///
/// # Errors
/// They are not whole records.
pub fn split(bytes: &[u8]) -> Result<Vec<&[u8]>, DecodeError> {
    let mut pieces = Vec::new();
    let mut rest = bytes;
    while !rest.is_empty() {
        let piece = rest;
        let mut length = 0;
        while length < PIECE && !rest.is_empty() {
            let (_, after) = split_record(rest)?;
            length += rest.len() - after.len();
            rest = after;
        }
        pieces.push(&piece[..length]);
    }
    Ok(pieces)
}

/// All records of a piece.
fn records(mut piece: &[u8]) -> Result<Vec<Record>, DecodeError> {
    let mut records = Vec::new();
    while !piece.is_empty() {
        let (record, rest) = split_record(piece)?;
        records.push(read_record(record)?);
        piece = rest;
    }
    Ok(records)
}

fn read_record(record: &[u8]) -> Result<Record, DecodeError> {
    use snapshot_record::Record as Read;
    let record = SnapshotRecord::decode(record);
    let record = record.map_err(|error| DecodeError::Damaged(error.to_string()))?;
    let spec = SnapshotSpec::try_from(record.spec);
    let spec = spec.map_err(|_| damaged("a task has a spec of an unknown kind"))?;
    Ok(match record.record {
        Some(Read::Header(header)) => Record::Header(header),
        Some(Read::Object(object)) => Record::Object(read_object(object, spec)?),
        Some(Read::Cursors(cursors)) => Record::Cursors(cursors),
        Some(Read::Waiter(waiter)) => Record::Waiter(waiter),
        Some(Read::End(end)) => Record::End(end),
        None => return Err(damaged("a record of an unknown kind")),
    })
}

fn read_object(object: Object, spec: SnapshotSpec) -> Result<Restored, DecodeError> {
    use object::Object as Read;
    Ok(match object.object {
        Some(Read::Cluster(cluster)) => Restored::Cluster(Arc::new(cluster)),
        Some(Read::Node(node)) => Restored::Node(NodeId::from(&node.id), Arc::new(node)),
        Some(Read::Network(network)) => {
            Restored::Network(NetworkId::from(&network.id), Arc::new(network))
        }
        Some(Read::Service(service)) => {
            Restored::Service(ServiceId::from(&service.id), Arc::new(service))
        }
        Some(Read::Task(task)) => Restored::Task(TaskId::from(&task.id), Arc::new(task), spec),
        None => return Err(damaged("an object of an unknown kind")),
    })
}

/// The first record, without its length, and what follows it.
fn split_record(bytes: &[u8]) -> Result<(&[u8], &[u8]), DecodeError> {
    let mut length = 0u64;
    for place in 0..5 {
        let byte = *bytes.get(place).ok_or_else(|| damaged("it is cut off"))?;
        length |= u64::from(byte & 0x7f) << (7 * place);
        if byte & 0x80 == 0 {
            if length > RECORD_MAX {
                break;
            }
            let rest = &bytes[place + 1..];
            let length = usize::try_from(length).unwrap_or(usize::MAX);
            let split = rest.split_at_checked(length);
            return split.ok_or_else(|| damaged("it is cut off"));
        }
    }
    Err(damaged("a record is too long"))
}

/// What is written, where it is.
enum Item<'a> {
    Header(SnapshotHeader),
    Cluster(&'a Cluster),
    Node(&'a Node),
    Network(&'a Network),
    Service(&'a Service),
    Task(&'a Task, SnapshotSpec),
    Cursors(SnapshotCursors),
    Waiter(SnapshotWaiter),
    End,
}

/// Writes records, each behind its length.
#[derive(Default)]
struct Encoder {
    /// The piece that is being written.
    bytes: Vec<u8>,
    /// But header and end.
    records: u64,
}

impl Encoder {
    /// The piece, if there is anything in it.
    fn take(&mut self) -> Option<Vec<u8>> {
        let next = Vec::with_capacity(self.bytes.len());
        Some(std::mem::replace(&mut self.bytes, next)).filter(|piece| !piece.is_empty())
    }

    fn put(&mut self, item: Item<'_>) {
        use snapshot_record::Record;
        if !matches!(item, Item::Header(_) | Item::End) {
            self.records += 1;
        }
        match item {
            Item::Header(header) => self.put_record(Record::Header(header)),
            Item::Cluster(cluster) => self.put_object(fields::CLUSTER, cluster),
            Item::Node(node) => self.put_object(fields::NODE, node),
            Item::Network(network) => self.put_object(fields::NETWORK, network),
            Item::Service(service) => self.put_object(fields::SERVICE, service),
            Item::Task(task, found) => self.put_task(task, found),
            Item::Cursors(cursors) => self.put_record(Record::Cursors(cursors)),
            Item::Waiter(waiter) => self.put_record(Record::Waiter(waiter)),
            Item::End => self.put_record(Record::End(SnapshotEnd {
                records: self.records,
            })),
        }
    }

    fn put_record(&mut self, record: snapshot_record::Record) {
        let record = SnapshotRecord {
            record: Some(record),
            spec: SnapshotSpec::Own.into(),
        };
        record
            .encode_length_delimited(&mut self.bytes)
            .expect("the buffer grows as needed");
    }

    /// As `put_record` does with a record that holds a copy of the object.
    fn put_object(&mut self, field: u32, object: &impl Message) {
        let bytes = &mut self.bytes;
        let object_len = message::encoded_len(field, object);
        let record_len =
            key_len(RECORD_OBJECT) + encoded_len_varint(object_len as u64) + object_len;
        encode_varint(record_len as u64, bytes);
        encode_key(RECORD_OBJECT, WireType::LengthDelimited, bytes);
        encode_varint(object_len as u64, bytes);
        message::encode(field, object, bytes);
    }

    /// As `put_object`, but without a spec that is found elsewhere.
    fn put_task(&mut self, task: &Task, found: SnapshotSpec) {
        let (Some(spec), true) = (&task.spec, found != SnapshotSpec::Own) else {
            return self.put_object(fields::TASK, task);
        };
        let bytes = &mut self.bytes;
        let spec_len = message::encoded_len(task_fields::SPEC, spec);
        let task_len = task.encoded_len() - spec_len;
        let object_len = key_len(fields::TASK) + encoded_len_varint(task_len as u64) + task_len;
        let found_len = key_len(RECORD_SPEC) + 1;
        let record_len =
            key_len(RECORD_OBJECT) + encoded_len_varint(object_len as u64) + object_len + found_len;
        encode_varint(record_len as u64, bytes);
        encode_key(RECORD_OBJECT, WireType::LengthDelimited, bytes);
        encode_varint(object_len as u64, bytes);
        encode_key(fields::TASK, WireType::LengthDelimited, bytes);
        encode_varint(task_len as u64, bytes);
        // Fields are written in the order of their numbers.
        let mut spec_at = bytes.len();
        if !task.id.is_empty() {
            spec_at += string::encoded_len(task_fields::ID, &task.id);
        }
        if let Some(meta) = &task.meta {
            spec_at += message::encoded_len(task_fields::META, meta);
        }
        task.encode_raw(bytes);
        bytes.drain(spec_at..spec_at + spec_len);
        encode_key(RECORD_SPEC, WireType::Varint, bytes);
        encode_varint(found as u64, bytes);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{cluster, create, network, node, service, task, transaction};

    #[test]
    fn what_the_version_before_has_written_is_read() {
        let made = [
            create(cluster("c")),
            create(network("n", "net", "")),
            create(service("s", "web", &["n"])),
            create(task("t", "s", &["n"])),
        ];
        let state = State::default().apply(1, &transaction(made));
        let state = state.expect("taken").state;
        let header = SnapshotHeader {
            format: 1,
            index: state.index,
            term: state.term,
            turns: state.ipam.next_turn(),
        };
        let mut encoder = Encoder::default();
        for item in state.items() {
            encoder.put(match item {
                Item::Header(_) => Item::Header(header),
                Item::Task(task, _) => Item::Task(task, SnapshotSpec::Own),
                item => item,
            });
        }
        encoder.put(Item::End);
        let bytes = encoder.bytes;
        assert_eq!(State::decode(&bytes).expect("read"), state);
    }

    #[test]
    fn an_object_that_is_there_twice_is_damage() {
        let empty = State::default().encode();
        let (_, end) = split_record(&empty).expect("a header");
        let header = &empty[..empty.len() - end.len()];
        let network = network("n", "net", "10.0.0.0/24");
        for object in [
            object::Object::Cluster(cluster("c")),
            object::Object::Node(node("w1", "10.0.0.1")),
            object::Object::Network(network),
            object::Object::Service(service("s", "web", &[])),
            object::Object::Task(task("t", "s", &[])),
        ] {
            let record = SnapshotRecord {
                record: Some(snapshot_record::Record::Object(Object {
                    object: Some(object),
                })),
                spec: SnapshotSpec::Own.into(),
            };
            let mut bytes = header.to_vec();
            for _ in 0..2 {
                let more = record.encode_length_delimited(&mut bytes);
                more.expect("grows");
            }
            let error = State::decode(&bytes).expect_err("damaged").to_string();
            assert!(error.starts_with("the snapshot is damaged: "), "{error}");
            assert!(!error.contains("cut off"), "{error}");
        }
    }

    #[test]
    fn two_objects_of_one_name_are_damage() {
        let mut state = State::default();
        for id in ["s1", "s2"] {
            let made = Arc::new(service(id, "web", &[]));
            state.index_service(&made);
            state.services.insert(ServiceId::from(id), made);
        }
        let error = State::decode(&state.encode()).expect_err("damaged");
        let sentence = "the snapshot is damaged: two objects have one name";
        assert_eq!(error.to_string(), sentence);
    }

    #[test]
    fn a_spec_of_a_service_that_is_not_there_is_damage() {
        let task = SnapshotRecord {
            record: Some(snapshot_record::Record::Object(Object {
                object: Some(object::Object::Task(task("t", "s", &[]))),
            })),
            spec: SnapshotSpec::Services.into(),
        };
        let empty = State::default().encode();
        let (_, end) = split_record(&empty).expect("a header");
        let mut bytes = empty[..empty.len() - end.len()].to_vec();
        task.encode_length_delimited(&mut bytes).expect("grows");
        let error = State::decode(&bytes).expect_err("damaged").to_string();
        assert_eq!(
            error,
            "the snapshot is damaged: a task has the spec of no service"
        );
    }
}
