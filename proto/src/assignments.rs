//! Changes of assignments that many nodes get: made once, and read by each of them.

use bytes::Bytes;
use prost::{DecodeError, Message as _};

use crate::defaults::MESSAGE_MAX;
use crate::v1::{AssignmentChange, AssignmentChanges, Assignments};

/// Encoded bytes from which on it is worth compressing. A row of a table has some 150 bytes, most of them identifiers of
/// 25 letters that stand for 16 bytes, and several of them the same in each row of a service: of a hundred rows a quarter
/// is left, of four 0.42 (measured).
const PACKED_MIN: usize = 512;
/// zstd's fastest level, once for all nodes.
const LEVEL: i32 = 1;
/// What a zstd frame begins with (RFC 8878, 3.1.1). No encoded message does: it would be a field 5 of [`AssignmentChanges`].
const FRAME: [u8; 4] = [0x28, 0xb5, 0x2f, 0xfd];

/// Why changes cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum ChangesError {
    /// Not a zstd frame, or one of more bytes than a message may have.
    #[error("a part that was compressed cannot be read: {0}")]
    Packed(#[from] std::io::Error),
    /// Not the message that it should be.
    #[error(transparent)]
    Message(#[from] DecodeError),
    /// They have more bytes than there is room for.
    #[error("the changes are too large")]
    TooLarge,
}

/// An encoded [`AssignmentChanges`] as a part of [`Assignments::shared`].
#[must_use]
pub fn pack(part: Bytes) -> Bytes {
    if part.len() < PACKED_MIN {
        return part;
    }
    match zstd::bulk::compress(&part, LEVEL) {
        Ok(packed) if packed.len() < part.len() => packed.into(),
        _ => part,
    }
}

/// The message that was made a part.
fn unpack(part: Bytes) -> Result<Bytes, ChangesError> {
    match part.starts_with(&FRAME) {
        true => Ok(zstd::bulk::decompress(&part, MESSAGE_MAX)?.into()),
        false => Ok(part),
    }
}

impl Assignments {
    /// All changes of the message, in their order. Takes the bytes of those that other nodes get, too, from `room`.
    ///
    /// # Errors
    /// A part cannot be read, or they have more bytes than there is room for.
    pub fn into_changes(self, room: &mut usize) -> Result<Vec<AssignmentChange>, ChangesError> {
        let mut changes = Vec::new();
        for part in self.shared {
            let part = unpack(part)?;
            *room = room.checked_sub(part.len()).ok_or(ChangesError::TooLarge)?;
            changes.append(&mut AssignmentChanges::decode(part)?.changes);
        }
        changes.extend(self.changes);
        Ok(changes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::v1::EndpointEntry;
    use crate::v1::assignment_change::Change;
    use crate::{NodeId, TaskId};

    fn rows(count: usize) -> AssignmentChanges {
        let row = |_| {
            Change::Endpoint(EndpointEntry {
                network_id: "x".repeat(25),
                service_id: "y".repeat(25),
                task_id: TaskId::random().to_string(),
                node_id: NodeId::random().to_string(),
                addr: "10.0.0.2/24".into(),
                vtep: "192.0.2.1".into(),
                ..EndpointEntry::default()
            })
        };
        let change = |kind| AssignmentChange { change: Some(kind) };
        AssignmentChanges {
            changes: (0..count).map(row).map(change).collect(),
        }
    }

    fn of(shared: Vec<Bytes>) -> Assignments {
        Assignments {
            shared,
            ..Assignments::default()
        }
    }

    #[test]
    fn what_was_packed_is_read_and_a_table_is_much_smaller() {
        for count in [0, 1, 3, 4, 100] {
            let made = rows(count);
            let plain = Bytes::from(made.encode_to_vec());
            let part = pack(plain.clone());
            assert_eq!(part.starts_with(&FRAME), plain.len() >= PACKED_MIN);
            if count == 100 {
                assert!(
                    part.len() * 2 < plain.len(),
                    "{} of {}",
                    part.len(),
                    plain.len()
                );
            }
            let mut room = plain.len();
            let read = of(vec![part]).into_changes(&mut room);
            assert_eq!((read.expect("our own"), room), (made.changes, 0));
        }
    }

    #[test]
    fn what_is_too_large_or_no_frame_is_refused() {
        let part = pack(rows(100).encode_to_vec().into());
        let refused = of(vec![part.clone(), part]).into_changes(&mut 20_000);
        assert!(matches!(refused, Err(ChangesError::TooLarge)));
        let bomb = zstd::bulk::compress(&vec![0; MESSAGE_MAX + 1], LEVEL).expect("memory takes it");
        let refused = of(vec![bomb.into()]).into_changes(&mut usize::MAX.clone());
        assert!(matches!(refused, Err(ChangesError::Packed(_))));
        let torn = [FRAME.as_slice(), &[1, 2, 3]].concat();
        let refused = of(vec![torn.into()]).into_changes(&mut usize::MAX.clone());
        assert!(matches!(refused, Err(ChangesError::Packed(_))));
    }
}
