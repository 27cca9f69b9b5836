//! The whole state as bytes, and back.
//!
//! Only objects and what cannot be derived from them is written; indexes and
//! free addresses are rebuilt on reading, which also checks that nothing is
//! held twice. The encoder works on its own O(1) copy of the state.

use std::io::Read;
use std::ops::Bound;
use std::sync::Arc;

use bytes::{Bytes, BytesMut};
use prost::Message;
use prost::encoding::{WireType, encode_key, encode_varint, encoded_len_varint, key_len, message};
use swarm_proto::v1::{
    Network, Object, ObjectKind, ObjectRef, SnapshotCursors, SnapshotEnd, SnapshotHeader,
    SnapshotRecord, SnapshotWaiter, object, snapshot_record,
};
use swarm_proto::{NetworkId, NodeId, ServiceId, TaskId};

use crate::allocator::Waiter;
use crate::apply::holds_addresses;
use crate::state::State;

/// Version of the records that this build writes, and the highest that it reads.
const FORMAT: u32 = 1;
/// A chunk is given out once it has this many bytes (it may have one record more).
const CHUNK: usize = 256 << 10;
/// No record is larger: an object has at most about 1 MiB.
const RECORD_MAX: u64 = 16 << 20;

/// Numbers of fields in store.proto: that of an object in a record,
const RECORD_OBJECT: u32 = 2;
/// and those of its kinds in an object. A million objects are encoded where they are, not copied first.
mod fields {
    pub(super) const CLUSTER: u32 = 1;
    pub(super) const NODE: u32 = 2;
    pub(super) const SERVICE: u32 = 3;
    pub(super) const TASK: u32 = 4;
    pub(super) const NETWORK: u32 = 5;
}

/// Why a snapshot cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum DecodeError {
    /// The reader failed.
    #[error("the snapshot could not be read")]
    Io(#[from] std::io::Error),
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

/// The bytes of a state in chunks of some 256 KiB.
#[derive(Debug)]
pub struct Encoder {
    state: State,
    step: Step,
    records: u64,
}

/// What is written next; with the last ID that was.
#[derive(Debug)]
enum Step {
    Header,
    Nodes(Option<NodeId>),
    Networks(Option<NetworkId>),
    Services(Option<ServiceId>),
    Tasks(Option<TaskId>),
    Rest,
    Done,
}

impl State {
    /// The state as bytes, in chunks. Equal states give equal bytes.
    #[must_use]
    pub fn encode(&self) -> Encoder {
        Encoder {
            state: self.clone(),
            step: Step::Header,
            records: 0,
        }
    }

    /// Reads what [`State::encode`] has written, up to its end.
    ///
    /// # Errors
    /// See [`DecodeError`].
    pub fn decode(mut from: impl Read) -> Result<Self, DecodeError> {
        let mut state = Self::default();
        let mut buffer = Vec::new();
        let header = match read_record(&mut from, &mut buffer)? {
            snapshot_record::Record::Header(header) => header,
            _ => return Err(damaged("it does not begin with a header")),
        };
        if header.format > FORMAT {
            return Err(DecodeError::Newer {
                found: header.format,
                known: FORMAT,
            });
        }
        state.index = header.index;
        state.term = header.term;
        state.ipam.restore_next_turn(header.turns);
        for records in 0u64.. {
            match read_record(&mut from, &mut buffer)? {
                snapshot_record::Record::Header(_) => return Err(damaged("two headers")),
                snapshot_record::Record::Object(object) => state.restore(object)?,
                snapshot_record::Record::Cursors(cursors) => {
                    state
                        .ipam
                        .restore_cursors(&cursors.network_id, &cursors.next);
                }
                snapshot_record::Record::Waiter(waiter) => {
                    let wanted = waiter.r#ref.unwrap_or_default();
                    let who = match wanted.kind() {
                        ObjectKind::Task => Waiter::Task(TaskId::from(wanted.id)),
                        ObjectKind::Service => Waiter::Service(ServiceId::from(wanted.id)),
                        _ => return Err(damaged("a waiter of an unknown kind")),
                    };
                    let network = NetworkId::from(waiter.network_id);
                    state.ipam.restore_waiting(who, network, waiter.turn);
                }
                snapshot_record::Record::End(end) if end.records == records => break,
                snapshot_record::Record::End(_) => return Err(damaged("records are missing")),
            }
        }
        Ok(state)
    }

    fn restore(&mut self, object: Object) -> Result<(), DecodeError> {
        match object.object {
            Some(object::Object::Cluster(cluster)) => self.cluster = Some(Arc::new(cluster)),
            Some(object::Object::Node(node)) => {
                let id = NodeId::from(&node.id);
                self.ipam.note_routes(&id, None, Some(&node));
                self.nodes.insert(id, Arc::new(node));
            }
            Some(object::Object::Network(network)) => self.restore_network(network)?,
            Some(object::Object::Service(service)) => {
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
                self.services
                    .insert(ServiceId::from(&service.id), Arc::new(service));
            }
            Some(object::Object::Task(task)) => {
                if holds_addresses(&task) {
                    for attachment in &task.networks {
                        for address in &attachment.addresses {
                            if !self.ipam.restore_address(&attachment.network_id, address) {
                                return Err(damaged_address("task", &task.id, address));
                            }
                        }
                    }
                }
                let id = TaskId::from(&task.id);
                self.index_task(&id, &task, None);
                self.tasks.insert(id, Arc::new(task));
            }
            None => return Err(damaged("an object of an unknown kind")),
        }
        Ok(())
    }

    fn restore_network(&mut self, network: Network) -> Result<(), DecodeError> {
        let restored = self.ipam.restore_network(&network);
        restored.map_err(|rejection| DecodeError::Damaged(rejection.message))?;
        self.index_network(&network);
        self.networks
            .insert(NetworkId::from(&network.id), Arc::new(network));
        Ok(())
    }
}

fn damaged(what: &str) -> DecodeError {
    DecodeError::Damaged(what.into())
}

fn damaged_address(kind: &str, id: &str, address: &str) -> DecodeError {
    DecodeError::Damaged(format!("{address} of {kind} {id} is not free"))
}

fn read_record(
    from: &mut impl Read,
    buffer: &mut Vec<u8>,
) -> Result<snapshot_record::Record, DecodeError> {
    let length = read_length(from)?;
    buffer.clear();
    from.by_ref().take(length).read_to_end(buffer)?;
    if buffer.len() as u64 != length {
        return Err(damaged("it is cut off"));
    }
    let record = SnapshotRecord::decode(&buffer[..]);
    let record = record.map_err(|error| DecodeError::Damaged(error.to_string()))?;
    let record = record.record;
    record.ok_or_else(|| damaged("a record of an unknown kind"))
}

fn read_length(from: &mut impl Read) -> Result<u64, DecodeError> {
    let mut length = 0u64;
    for shift in (0..=28).step_by(7) {
        let mut byte = [0];
        from.read_exact(&mut byte)
            .map_err(|error| match error.kind() {
                std::io::ErrorKind::UnexpectedEof => damaged("it is cut off"),
                _ => DecodeError::Io(error),
            })?;
        length |= u64::from(byte[0] & 0x7f) << shift;
        if byte[0] & 0x80 == 0 {
            return match length <= RECORD_MAX {
                true => Ok(length),
                false => Err(damaged("a record is too long")),
            };
        }
    }
    Err(damaged("a record is too long"))
}

impl Encoder {
    fn put(&mut self, chunk: &mut BytesMut, record: snapshot_record::Record) {
        if !matches!(
            record,
            snapshot_record::Record::Header(_) | snapshot_record::Record::End(_)
        ) {
            self.records += 1;
        }
        let record = SnapshotRecord {
            record: Some(record),
        };
        record
            .encode_length_delimited(chunk)
            .expect("the buffer grows as needed");
    }

    /// As `put` does with a record that holds a copy of the object.
    fn put_object(&mut self, chunk: &mut BytesMut, field: u32, object: &impl Message) {
        self.records += 1;
        let object_len = message::encoded_len(field, object);
        let record_len =
            key_len(RECORD_OBJECT) + encoded_len_varint(object_len as u64) + object_len;
        encode_varint(record_len as u64, chunk);
        encode_key(RECORD_OBJECT, WireType::LengthDelimited, chunk);
        encode_varint(object_len as u64, chunk);
        message::encode(field, object, chunk);
    }

    /// Writes until the chunk is full or the step is done.
    fn advance(&mut self, chunk: &mut BytesMut) {
        macro_rules! objects {
            ($map:ident, $after:expr, $field:expr, $this:path, $next:expr) => {{
                let all = self.state.$map.clone();
                let from = $after.map_or(Bound::Unbounded, Bound::Excluded);
                let rest = all.range((from, Bound::Unbounded));
                for (id, object) in rest {
                    self.put_object(chunk, $field, &**object);
                    if chunk.len() >= CHUNK {
                        self.step = $this(Some(id.clone()));
                        return;
                    }
                }
                self.step = $next;
            }};
        }
        match std::mem::replace(&mut self.step, Step::Done) {
            Step::Header => {
                let header = SnapshotHeader {
                    format: FORMAT,
                    index: self.state.index,
                    term: self.state.term,
                    turns: self.state.ipam.next_turn(),
                };
                self.put(chunk, snapshot_record::Record::Header(header));
                if let Some(cluster) = self.state.cluster.clone() {
                    self.put_object(chunk, fields::CLUSTER, &*cluster);
                }
                self.step = Step::Nodes(None);
            }
            Step::Nodes(after) => {
                objects!(
                    nodes,
                    after,
                    fields::NODE,
                    Step::Nodes,
                    Step::Networks(None)
                );
            }
            Step::Networks(after) => objects!(
                networks,
                after,
                fields::NETWORK,
                Step::Networks,
                Step::Services(None)
            ),
            Step::Services(after) => objects!(
                services,
                after,
                fields::SERVICE,
                Step::Services,
                Step::Tasks(None)
            ),
            Step::Tasks(after) => {
                objects!(tasks, after, fields::TASK, Step::Tasks, Step::Rest);
            }
            Step::Rest => {
                let ipam = self.state.ipam.clone();
                for (network, next) in ipam.cursors() {
                    let cursors = SnapshotCursors {
                        network_id: network.to_string(),
                        next,
                    };
                    self.put(chunk, snapshot_record::Record::Cursors(cursors));
                }
                for (who, network, turn) in ipam.waiting() {
                    let (kind, id) = match who {
                        Waiter::Task(id) => (ObjectKind::Task, id.to_string()),
                        Waiter::Service(id) => (ObjectKind::Service, id.to_string()),
                    };
                    let waiter = SnapshotWaiter {
                        turn,
                        network_id: network.to_string(),
                        r#ref: Some(ObjectRef {
                            kind: kind.into(),
                            id,
                        }),
                    };
                    self.put(chunk, snapshot_record::Record::Waiter(waiter));
                }
                let end = SnapshotEnd {
                    records: self.records,
                };
                self.put(chunk, snapshot_record::Record::End(end));
            }
            Step::Done => {}
        }
    }
}

impl Iterator for Encoder {
    type Item = Bytes;

    fn next(&mut self) -> Option<Bytes> {
        let mut chunk = BytesMut::with_capacity(CHUNK + (CHUNK >> 2));
        while chunk.len() < CHUNK && !matches!(self.step, Step::Done) {
            self.advance(&mut chunk);
        }
        (!chunk.is_empty()).then(|| chunk.freeze())
    }
}
