//! Reading messages of assignments, part of which may have been encoded before.

use prost::{DecodeError, Message as _};

use crate::v1::{AssignmentChange, AssignmentChanges, Assignments};

impl Assignments {
    /// All changes of the message, in their order.
    ///
    /// # Errors
    /// A part cannot be decoded.
    pub fn into_changes(self) -> Result<Vec<AssignmentChange>, DecodeError> {
        let mut changes = Vec::new();
        for part in self.shared {
            changes.append(&mut AssignmentChanges::decode(part)?.changes);
        }
        changes.extend(self.changes);
        Ok(changes)
    }
}
