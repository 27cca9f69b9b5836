//! Identifiers: 128 random bits as 25 base-36 characters, as Swarm's are.
//!
//! People type unique prefixes of them, so they are not ordered by time. Only those of a crowd that is made
//! at once begin alike: see [`Siblings`].

use std::borrow::Borrow;
use std::cmp::Ordering;
use std::fmt;
use std::hash::{Hash, Hasher};
use std::sync::Arc;

/// Characters of an identifier.
pub const ID_LEN: usize = 25;

/// 128 random bits as 25 lower-case base-36 characters, zero-padded on the left.
#[must_use]
pub fn random_id() -> String {
    encode(rand::random::<u128>())
}

/// Identifiers that are made together.
///
/// The first sixteen are independent. Any more have their first 16 bits (about three characters) in common, and 112
/// random bits each. Objects are kept in trees ordered by their identifiers, and a transaction copies the
/// leaves that it touches: those of a thousand tasks that come and go together are few if they are neighbours.
#[derive(Debug)]
pub struct Siblings {
    independent: u32,
    family: u128,
}

/// Random bits of each of many siblings.
const OWN_BITS: u128 = (1 << 112) - 1;

impl Siblings {
    /// None yet.
    #[must_use]
    pub fn new() -> Self {
        Self {
            independent: 16,
            family: rand::random::<u128>() & !OWN_BITS,
        }
    }

    /// Another one.
    pub fn next_id(&mut self) -> String {
        if let Some(left) = self.independent.checked_sub(1) {
            self.independent = left;
            return random_id();
        }
        encode(self.family | (rand::random::<u128>() & OWN_BITS))
    }
}

impl Default for Siblings {
    fn default() -> Self {
        Self::new()
    }
}

/// Writes a number as 25 lower-case base-36 characters.
#[must_use]
pub fn encode(mut number: u128) -> String {
    const DIGITS: &[u8; 36] = b"0123456789abcdefghijklmnopqrstuvwxyz";
    // Twelve digits at a time: dividing 128 bits is slow.
    const TWELVE: u128 = 36_u128.pow(12);
    let mut text = [b'0'; ID_LEN];
    for places in text.rchunks_mut(12) {
        #[allow(clippy::cast_possible_truncation)] // below 36^12, which is below 2^63
        let mut low = (number % TWELVE) as u64;
        number /= TWELVE;
        for place in places.iter_mut().rev() {
            *place = DIGITS[(low % 36) as usize];
            low /= 36;
        }
    }
    text.iter().map(|&byte| byte as char).collect()
}

/// Whether `text` has the form of an identifier.
#[must_use]
pub fn is_id(text: &str) -> bool {
    text.len() == ID_LEN
        && text
            .bytes()
            .all(|b| b.is_ascii_digit() || b.is_ascii_lowercase())
}

/// Bytes that an identifier may have to be kept in place.
const SHORT: usize = 30;

/// The text of an identifier. Those that we make are kept in place: the state's maps hold
/// millions of them, and neither comparing nor copying them should touch other memory.
#[derive(Clone)]
enum Text {
    /// Filled up with zeros.
    Short(u8, [u8; SHORT]),
    /// Somebody else's idea of an identifier.
    Long(Arc<str>),
}

impl Text {
    #[inline]
    fn as_str(&self) -> &str {
        match self {
            // SAFETY: `from` has copied the bytes of a whole `str` of this length.
            Self::Short(length, bytes) => unsafe {
                std::str::from_utf8_unchecked(&bytes[..usize::from(*length)])
            },
            Self::Long(text) => text,
        }
    }
}

impl From<&str> for Text {
    fn from(text: &str) -> Self {
        let mut bytes = [0; SHORT];
        match (bytes.get_mut(..text.len()), u8::try_from(text.len())) {
            (Some(place), Ok(length)) => {
                place.copy_from_slice(text.as_bytes());
                Self::Short(length, bytes)
            }
            _ => Self::Long(text.into()),
        }
    }
}

// All as for the text itself: maps are searched with a `&str`.

impl PartialEq for Text {
    #[inline]
    fn eq(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Short(length, bytes), Self::Short(other_length, other)) => {
                length == other_length && bytes == other
            }
            _ => self.as_str() == other.as_str(),
        }
    }
}

impl Eq for Text {}

impl PartialOrd for Text {
    #[inline]
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Text {
    #[inline]
    fn cmp(&self, other: &Self) -> Ordering {
        match (self, other) {
            // A text that another begins with has zeros where that goes on.
            (Self::Short(length, bytes), Self::Short(other_length, other)) => {
                bytes.cmp(other).then_with(|| length.cmp(other_length))
            }
            _ => self.as_str().cmp(other.as_str()),
        }
    }
}

impl Hash for Text {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.as_str().hash(state);
    }
}

macro_rules! id_type {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name(Text);

        impl $name {
            /// A new random one. Not for use in `apply`: proposers make identifiers.
            #[must_use]
            pub fn random() -> Self {
                Self(random_id().as_str().into())
            }

            /// The identifier as text.
            #[must_use]
            #[inline]
            pub fn as_str(&self) -> &str {
                self.0.as_str()
            }
        }

        impl From<&str> for $name {
            fn from(text: &str) -> Self {
                Self(text.into())
            }
        }

        impl From<&String> for $name {
            fn from(text: &String) -> Self {
                Self(text.as_str().into())
            }
        }

        impl From<String> for $name {
            fn from(text: String) -> Self {
                Self(text.as_str().into())
            }
        }

        impl From<$name> for String {
            fn from(id: $name) -> Self {
                id.as_str().to_owned()
            }
        }

        impl Borrow<str> for $name {
            #[inline]
            fn borrow(&self) -> &str {
                self.as_str()
            }
        }

        impl AsRef<str> for $name {
            fn as_ref(&self) -> &str {
                self.as_str()
            }
        }

        impl std::ops::Deref for $name {
            type Target = str;
            #[inline]
            fn deref(&self) -> &str {
                self.as_str()
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(self.as_str())
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(self.as_str())
            }
        }
    };
}

id_type!(
    /// A cluster.
    ClusterId
);
id_type!(
    /// A member of the cluster. Given by the CA; never used again.
    NodeId
);
id_type!(
    /// A service.
    ServiceId
);
id_type!(
    /// One attempt at filling a slot.
    TaskId
);
id_type!(
    /// An overlay network.
    NetworkId
);
id_type!(
    /// One registered connection of an agent.
    SessionId
);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_have_the_form_of_swarms() {
        assert_eq!(encode(0), "0".repeat(25));
        assert_eq!(encode(u128::MAX), "f5lxx1zz5pnorynqglhzmsp33");
        for _ in 0..100 {
            assert!(is_id(&random_id()));
        }
        assert!(!is_id("web"));
    }

    #[test]
    fn of_many_siblings_all_but_the_first_begin_alike_and_all_are_different() {
        let mut siblings = Siblings::new();
        let ids: Vec<String> = (0..1000).map(|_| siblings.next_id()).collect();
        assert!(ids.iter().all(|id| is_id(id)));
        let distinct: std::collections::BTreeSet<&String> = ids.iter().collect();
        assert_eq!(distinct.len(), ids.len());
        let beginnings = |ids: &[String]| -> std::collections::BTreeSet<String> {
            ids.iter().map(|id| id[..2].to_owned()).collect()
        };
        // Sixteen times the same of 555 is not by chance, nor one in a thousand that is far off.
        assert!(beginnings(&ids[..16]).len() > 2);
        assert!(beginnings(&ids[16..]).len() <= 2);
    }

    proptest::proptest! {
        #[test]
        fn identifiers_compare_and_hash_as_their_texts(
            left in "[ab\\x00é]{0,34}", right in "[ab\\x00é]{0,34}",
        ) {
            let (a, b) = (TaskId::from(&left), TaskId::from(&right));
            proptest::prop_assert_eq!(a.as_str(), &left);
            proptest::prop_assert_eq!(a.cmp(&b), left.cmp(&right));
            proptest::prop_assert_eq!(a == b, left == right);
            let map = std::collections::HashMap::from([(a, 1)]);
            proptest::prop_assert_eq!(map.get(left.as_str()), Some(&1));
        }
    }
}
