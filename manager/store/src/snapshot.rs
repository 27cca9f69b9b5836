//! The whole state as bytes, and back.
//!
//! Only objects and what cannot be derived from them is written; indexes and
//! free addresses are rebuilt on reading, which also checks that nothing is
//! held twice.

use std::sync::Arc;
use std::sync::mpsc::sync_channel;

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
/// Bytes that a thread decodes in one go (and the record that has the last of them).
const PART: usize = 256 << 10;
/// Threads that decode, at most: one puts together what a few decode.
const THREADS_MAX: usize = 4;
/// Parts that each of them may be ahead.
const AHEAD: usize = 4;
/// No record is larger: an object has at most about 1 MiB.
const RECORD_MAX: u64 = 16 << 20;

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
        let mut bytes = Vec::new();
        self.encode_to(&mut bytes);
        bytes
    }

    /// Appends the state as bytes. Takes a microsecond or two for each object.
    pub fn encode_to(&self, bytes: &mut Vec<u8>) {
        use snapshot_record::Record;
        let mut encoder = Encoder { bytes, records: 0 };
        encoder.put(Record::Header(SnapshotHeader {
            format: FORMAT,
            index: self.index,
            term: self.term,
            turns: self.ipam.next_turn(),
        }));
        if let Some(cluster) = &self.cluster {
            encoder.put_object(fields::CLUSTER, &**cluster);
        }
        for node in self.nodes.values() {
            encoder.put_object(fields::NODE, &**node);
        }
        for network in self.networks.values() {
            encoder.put_object(fields::NETWORK, &**network);
        }
        for service in self.services.values() {
            encoder.put_object(fields::SERVICE, &**service);
        }
        for task in self.tasks.values() {
            encoder.put_task(task, self.spec_of(task));
        }
        for (network, next) in self.ipam.cursors() {
            encoder.put(Record::Cursors(SnapshotCursors {
                network_id: network.to_string(),
                next,
            }));
        }
        for (who, network, turn) in self.ipam.waiting() {
            let (kind, id) = match who {
                Waiter::Task(id) => (ObjectKind::Task, id.to_string()),
                Waiter::Service(id) => (ObjectKind::Service, id.to_string()),
            };
            encoder.put(Record::Waiter(SnapshotWaiter {
                turn,
                network_id: network.to_string(),
                r#ref: Some(ObjectRef {
                    kind: kind.into(),
                    id,
                }),
            }));
        }
        let records = encoder.records;
        encoder.put(Record::End(SnapshotEnd { records }));
    }

    /// Reads what [`State::encode`] has written.
    ///
    /// Records are decoded by as many threads as the machine has cores, a part each in turn; the state is put
    /// together from them in order.
    ///
    /// # Errors
    /// See [`DecodeError`].
    pub fn decode(bytes: &[u8]) -> Result<Self, DecodeError> {
        let (header, rest) = split_record(bytes)?;
        let mut restoring = Restoring::new(read_record(header)?)?;
        let parts = parts(rest)?;
        let threads = std::thread::available_parallelism().map_or(1, usize::from);
        let threads = threads.min(THREADS_MAX).min(parts.len());
        if threads < 2 {
            for part in parts {
                restoring.take(records(part)?)?;
            }
            return restoring.finish();
        }
        std::thread::scope(|scope| {
            let workers = (0..threads).map(|worker| {
                let (decoded, taken) = sync_channel(AHEAD);
                let mut mine = parts.iter().skip(worker).step_by(threads);
                // Once one is damaged nobody takes the others.
                scope.spawn(move || mine.try_for_each(|part| decoded.send(records(part))));
                taken
            });
            let workers: Vec<_> = workers.collect();
            for part in 0..parts.len() {
                let decoded = workers[part % threads].recv();
                restoring.take(decoded.map_err(|_| damaged("it cannot be decoded"))??)?;
            }
            restoring.finish()
        })
    }

    /// Where to find a task's spec: most have their service's.
    fn spec_of(&self, task: &Task) -> SnapshotSpec {
        let service = self.services.get(task.service_id.as_str());
        let wanted = |found: SnapshotSpec| {
            task.spec.is_some()
                && service.and_then(|service| spec_in(service, found)) == task.spec.as_ref()
        };
        [SnapshotSpec::Services, SnapshotSpec::Previous]
            .into_iter()
            .find(|found| wanted(*found))
            .unwrap_or(SnapshotSpec::Own)
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
            Restored::Task(id, mut task, spec) => {
                if spec != SnapshotSpec::Own {
                    let service = self.services.get(task.service_id.as_str());
                    let spec = service.and_then(|service| spec_in(service, spec));
                    let spec = spec.ok_or_else(|| damaged("a task has the spec of no service"))?;
                    Arc::make_mut(&mut task).spec = Some(spec.clone());
                }
                if holds_addresses(&task) {
                    for attachment in &task.networks {
                        for address in &attachment.addresses {
                            if !self.ipam.restore_address(&attachment.network_id, address) {
                                return Err(damaged_address("task", &task.id, address));
                            }
                        }
                    }
                }
                self.index_task(&id, &task, None);
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

/// A state that is being put together.
struct Restoring {
    state: State,
    /// Of the last task: neighbours, which were made together, share them in memory.
    annotations: Option<Shared<Annotations>>,
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
            annotations: None,
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
                if let Restored::Task(_, task, _) = &mut object {
                    let annotations = &mut Arc::make_mut(task).service_annotations;
                    if !Shared::share(annotations, self.annotations.as_ref()) {
                        self.annotations.clone_from(annotations);
                    }
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

    fn finish(self) -> Result<State, DecodeError> {
        if !self.ended {
            return Err(damaged("it is cut off"));
        }
        let state = self.state;
        let names = (state.service_names.len(), state.network_names.len());
        match names == (state.services.len(), state.networks.len()) {
            true => Ok(state),
            false => Err(damaged("two objects have one name")),
        }
    }
}

/// Whole records, in parts that are decoded in one go.
fn parts(bytes: &[u8]) -> Result<Vec<&[u8]>, DecodeError> {
    let mut parts = Vec::new();
    let mut rest = bytes;
    while !rest.is_empty() {
        let part = rest;
        let mut length = 0;
        while length < PART && !rest.is_empty() {
            let (_, after) = split_record(rest)?;
            length += rest.len() - after.len();
            rest = after;
        }
        parts.push(&part[..length]);
    }
    Ok(parts)
}

/// All records of a part.
fn records(mut part: &[u8]) -> Result<Vec<Record>, DecodeError> {
    let mut records = Vec::new();
    while !part.is_empty() {
        let (record, rest) = split_record(part)?;
        records.push(read_record(record)?);
        part = rest;
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

/// Writes records, each behind its length.
struct Encoder<'a> {
    bytes: &'a mut Vec<u8>,
    /// But header and end.
    records: u64,
}

impl Encoder<'_> {
    fn put(&mut self, record: snapshot_record::Record) {
        if !matches!(
            record,
            snapshot_record::Record::Header(_) | snapshot_record::Record::End(_)
        ) {
            self.records += 1;
        }
        let record = SnapshotRecord {
            record: Some(record),
            spec: SnapshotSpec::Own.into(),
        };
        record
            .encode_length_delimited(self.bytes)
            .expect("the buffer grows as needed");
    }

    /// As `put` does with a record that holds a copy of the object.
    fn put_object(&mut self, field: u32, object: &impl Message) {
        self.records += 1;
        let object_len = message::encoded_len(field, object);
        let record_len =
            key_len(RECORD_OBJECT) + encoded_len_varint(object_len as u64) + object_len;
        encode_varint(record_len as u64, self.bytes);
        encode_key(RECORD_OBJECT, WireType::LengthDelimited, self.bytes);
        encode_varint(object_len as u64, self.bytes);
        message::encode(field, object, self.bytes);
    }

    /// As `put_object`, but without a spec that is found elsewhere.
    fn put_task(&mut self, task: &Task, found: SnapshotSpec) {
        let (Some(spec), true) = (&task.spec, found != SnapshotSpec::Own) else {
            return self.put_object(fields::TASK, task);
        };
        self.records += 1;
        let spec_len = message::encoded_len(task_fields::SPEC, spec);
        let task_len = task.encoded_len() - spec_len;
        let object_len = key_len(fields::TASK) + encoded_len_varint(task_len as u64) + task_len;
        let found_len = key_len(RECORD_SPEC) + 1;
        let record_len =
            key_len(RECORD_OBJECT) + encoded_len_varint(object_len as u64) + object_len + found_len;
        encode_varint(record_len as u64, self.bytes);
        encode_key(RECORD_OBJECT, WireType::LengthDelimited, self.bytes);
        encode_varint(object_len as u64, self.bytes);
        encode_key(fields::TASK, WireType::LengthDelimited, self.bytes);
        encode_varint(task_len as u64, self.bytes);
        // Fields are written in the order of their numbers.
        let mut spec_at = self.bytes.len();
        if !task.id.is_empty() {
            spec_at += string::encoded_len(task_fields::ID, &task.id);
        }
        if let Some(meta) = &task.meta {
            spec_at += message::encoded_len(task_fields::META, meta);
        }
        task.encode_raw(self.bytes);
        self.bytes.drain(spec_at..spec_at + spec_len);
        encode_key(RECORD_SPEC, WireType::Varint, self.bytes);
        encode_varint(found as u64, self.bytes);
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
        let mut bytes = Vec::new();
        let mut encoder = Encoder {
            bytes: &mut bytes,
            records: 0,
        };
        encoder.put(snapshot_record::Record::Header(header));
        encoder.put_object(fields::CLUSTER, &**state.cluster.as_ref().expect("made"));
        encoder.put_object(fields::NETWORK, &**state.network("n").expect("made"));
        encoder.put_object(fields::SERVICE, &**state.service("s").expect("made"));
        encoder.put_object(fields::TASK, &**state.task("t").expect("made"));
        for (network, next) in state.ipam.cursors() {
            encoder.put(snapshot_record::Record::Cursors(SnapshotCursors {
                network_id: network.to_string(),
                next,
            }));
        }
        let records = encoder.records;
        encoder.put(snapshot_record::Record::End(SnapshotEnd { records }));
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
