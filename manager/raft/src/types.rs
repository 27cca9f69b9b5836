//! What openraft is made of here: command, outcome, member, message codec.
//!
//! Pure. openraft's own messages go over the wire and to disk as postcard with
//! a format version in front; postcard is positional, so a change of openraft's
//! types is a new version.

use std::fmt;
use std::io;

use bytes::Bytes;
use prost::Message as _;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use swarm_proto::v1::{Rejection, Transaction};

use crate::snapshot::Records;

openraft::declare_raft_types!(
    /// The types this raft group is made of. One leader per term, so that a
    /// term is enough to fence a leader's loops.
    pub TypeConfig:
        D = Command,
        R = Outcome,
        NodeId = u64,
        Node = Peer,
        LeaderId = openraft::impls::leader_id_std::LeaderId<u64, u64>,
);

pub(crate) type LogId = openraft::alias::LogIdOf<TypeConfig>;
pub(crate) type Entry = openraft::alias::EntryOf<TypeConfig>;
pub(crate) type Vote = openraft::alias::VoteOf<TypeConfig>;
pub(crate) type StoredMembership = openraft::alias::StoredMembershipOf<TypeConfig>;
pub(crate) type SnapshotMeta = openraft::alias::SnapshotMetaOf<TypeConfig>;
pub(crate) type Snapshot = openraft::alias::SnapshotOf<TypeConfig, Records>;

/// A member's node and where it is reached.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Peer {
    /// Its node ID.
    pub node_id: String,
    /// host:port of its API.
    pub addr: String,
}

/// A transaction, encoded once by the proposer: log, wire and apply share the bytes.
#[derive(Clone, PartialEq, Eq)]
pub struct Command(Bytes);

impl Command {
    /// Encodes a transaction.
    #[must_use]
    pub fn new(transaction: &Transaction) -> Self {
        Self(transaction.encode_to_vec().into())
    }

    /// Encoded size in bytes.
    #[must_use]
    pub fn size(&self) -> usize {
        self.0.len()
    }

    /// The transaction.
    ///
    /// # Errors
    /// The bytes are none: a damaged entry, or one of a newer build.
    pub fn transaction(&self) -> Result<Transaction, prost::DecodeError> {
        Transaction::decode(self.0.clone())
    }
}

impl fmt::Display for Command {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "transaction of {} bytes", self.0.len())
    }
}

// Never the content: it may hold keys and secrets.
impl fmt::Debug for Command {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl Serialize for Command {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_bytes(&self.0)
    }
}

impl<'de> Deserialize<'de> for Command {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        Ok(Self(deserializer.deserialize_byte_buf(BytesVisitor)?))
    }
}

/// What apply said of a transaction; of an entry without one, that it is applied.
#[derive(Clone, Debug, PartialEq)]
pub struct Outcome(pub Result<(), Rejection>);

impl Serialize for Outcome {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let bytes = self.0.as_ref().err().map(prost::Message::encode_to_vec);
        bytes.serialize(serializer)
    }
}

impl<'de> Deserialize<'de> for Outcome {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        match Option::<Vec<u8>>::deserialize(deserializer)? {
            None => Ok(Self(Ok(()))),
            Some(bytes) => Rejection::decode(bytes.as_slice())
                .map(|rejection| Self(Err(rejection)))
                .map_err(serde::de::Error::custom),
        }
    }
}

struct BytesVisitor;

impl serde::de::Visitor<'_> for BytesVisitor {
    type Value = Bytes;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("bytes")
    }

    fn visit_bytes<E: serde::de::Error>(self, bytes: &[u8]) -> Result<Bytes, E> {
        Ok(Bytes::copy_from_slice(bytes))
    }

    fn visit_byte_buf<E: serde::de::Error>(self, bytes: Vec<u8>) -> Result<Bytes, E> {
        Ok(bytes.into())
    }
}

/// Version of the encoding of openraft's types, on the wire and inside records.
const FORMAT: u8 = 1;

/// Why bytes are not a value of the expected type.
#[derive(Debug, thiserror::Error)]
pub(crate) enum CodecError {
    #[error("format {0} is newer than this build knows; upgrade this manager")]
    Newer(u8),
    #[error("empty")]
    Empty,
    #[error("not decodable: {0}")]
    Invalid(#[from] postcard::Error),
}

impl From<CodecError> for io::Error {
    fn from(error: CodecError) -> Self {
        Self::new(io::ErrorKind::InvalidData, error)
    }
}

/// Format version, then postcard.
pub(crate) fn encode<T: Serialize>(value: &T) -> Result<Vec<u8>, CodecError> {
    Ok(postcard::to_extend(value, vec![FORMAT])?)
}

/// The inverse of [`encode`].
pub(crate) fn decode<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, CodecError> {
    match bytes.split_first() {
        None => Err(CodecError::Empty),
        Some((&FORMAT, body)) => Ok(postcard::from_bytes(body)?),
        Some((&version, _)) => Err(CodecError::Newer(version)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use swarm_proto::v1::rejection::Code;

    #[test]
    fn commands_and_outcomes_survive_the_codec() {
        let transaction = Transaction {
            proposer: "node".into(),
            ..Default::default()
        };
        let command = Command::new(&transaction);
        let back: Command = decode(&encode(&command).unwrap()).unwrap();
        assert_eq!(back.transaction().unwrap(), transaction);

        let refused = Outcome(Err(Rejection {
            code: Code::NameTaken.into(),
            message: "taken".into(),
            action: 1,
        }));
        for outcome in [Outcome(Ok(())), refused] {
            let back: Outcome = decode(&encode(&outcome).unwrap()).unwrap();
            assert_eq!(back, outcome);
        }
    }

    #[test]
    fn a_newer_format_is_refused_with_a_sentence() {
        let error = decode::<u64>(&[9, 1]).unwrap_err();
        assert!(error.to_string().contains("newer"), "{error}");
        assert!(matches!(decode::<u64>(&[]), Err(CodecError::Empty)));
    }
}
