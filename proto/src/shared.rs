//! A message that many objects hold, in memory once.

use std::fmt;
use std::ops::{Deref, DerefMut};
use std::sync::Arc;

use prost::bytes::{Buf, BufMut};
use prost::encoding::{DecodeContext, WireType};
use prost::{DecodeError, Message};

/// A message that all its clones share until one of them is changed, which then has its own.
///
/// On the wire it is the message itself. What was decoded is shared with nothing yet: see [`Shared::share`].
#[derive(Default)]
pub struct Shared<M>(Arc<M>);

impl<M> Shared<M> {
    /// Whether both are one in memory, and so equal without a look at them.
    #[must_use]
    pub fn is(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }
}

impl<M: PartialEq> Shared<M> {
    /// Makes `mine` one with `theirs` where both are equal. Returns whether they are.
    pub fn share(mine: &mut Option<Self>, theirs: Option<&Self>) -> bool {
        let equal = mine.as_ref() == theirs;
        if equal {
            *mine = theirs.cloned();
        }
        equal
    }
}

impl<M> Clone for Shared<M> {
    fn clone(&self) -> Self {
        Self(self.0.clone())
    }
}

impl<M> From<M> for Shared<M> {
    fn from(message: M) -> Self {
        Self(Arc::new(message))
    }
}

impl<M> Deref for Shared<M> {
    type Target = M;

    fn deref(&self) -> &M {
        &self.0
    }
}

impl<M: Clone> DerefMut for Shared<M> {
    fn deref_mut(&mut self) -> &mut M {
        Arc::make_mut(&mut self.0)
    }
}

// Only messages that equal themselves are shared (see the test of `Eq` in lib.rs).
impl<M: PartialEq> PartialEq for Shared<M> {
    fn eq(&self, other: &Self) -> bool {
        self.is(other) || self.0 == other.0
    }
}

impl<M: fmt::Debug> fmt::Debug for Shared<M> {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(formatter)
    }
}

impl<M: Message + Clone + Default> Message for Shared<M> {
    fn encode_raw(&self, buf: &mut impl BufMut) {
        self.0.encode_raw(buf);
    }

    fn merge_field(
        &mut self,
        tag: u32,
        wire_type: WireType,
        buf: &mut impl Buf,
        ctx: DecodeContext,
    ) -> Result<(), DecodeError> {
        (**self).merge_field(tag, wire_type, buf, ctx)
    }

    fn encoded_len(&self) -> usize {
        self.0.encoded_len()
    }

    fn clear(&mut self) {
        self.0 = Arc::default();
    }
}

#[cfg(test)]
mod tests {
    use prost::Message as _;

    use super::Shared;
    use crate::v1::{ContainerSpec, Task, TaskSpec};

    fn spec(image: &str) -> TaskSpec {
        TaskSpec {
            container: Some(ContainerSpec {
                image: image.to_owned(),
                ..ContainerSpec::default()
            }),
            ..TaskSpec::default()
        }
    }

    #[test]
    fn a_change_to_one_clone_is_not_seen_in_the_others() {
        let first = Shared::from(spec("web:1"));
        let mut second = first.clone();
        assert!(first.is(&second));
        second.force_update += 1;
        assert!(!first.is(&second));
        assert_eq!((first.force_update, second.force_update), (0, 1));
        assert_ne!(first, second);
    }

    #[test]
    fn on_the_wire_it_is_the_message() {
        let task = Task {
            id: "t".into(),
            spec: Some(spec("web:1").into()),
            ..Task::default()
        };
        let bytes = task.encode_to_vec();
        let plain = spec("web:1").encode_to_vec();
        assert!(bytes.windows(plain.len()).any(|part| part == plain));
        assert_eq!(Task::decode(&*bytes).expect("ours"), task);
        // Again for the same field: merged, as it is in a plain message.
        let twice = [&*bytes, &*bytes].concat();
        assert_eq!(Task::decode(&*twice).expect("ours"), task);
    }

    #[test]
    fn only_equals_are_shared() {
        let theirs = Shared::from(spec("web:1"));
        let mut mine = Some(Shared::from(spec("web:1")));
        assert!(Shared::share(&mut mine, Some(&theirs)));
        assert!(mine.is_some_and(|mine| mine.is(&theirs)));
        let mut other = Some(Shared::from(spec("web:2")));
        assert!(!Shared::share(&mut other, Some(&theirs)));
        assert_eq!(other, Some(spec("web:2").into()));
        assert!(!Shared::share(&mut None, Some(&theirs)));
        assert!(Shared::<TaskSpec>::share(&mut None, None));
    }
}
