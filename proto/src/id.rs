//! Identifiers: 128 random bits as 25 base-36 characters, as Swarm's are.
//!
//! People type unique prefixes of them, so they are not ordered by time.

use std::borrow::Borrow;
use std::fmt;
use std::sync::Arc;

/// Characters of an identifier.
pub const ID_LEN: usize = 25;

/// 128 random bits as 25 lower-case base-36 characters, zero-padded on the left.
#[must_use]
pub fn random_id() -> String {
    encode(rand::random::<u128>())
}

/// Writes a number as 25 lower-case base-36 characters.
#[must_use]
pub fn encode(mut number: u128) -> String {
    const DIGITS: &[u8; 36] = b"0123456789abcdefghijklmnopqrstuvwxyz";
    let mut text = [b'0'; ID_LEN];
    for place in text.iter_mut().rev() {
        *place = DIGITS[(number % 36) as usize];
        number /= 36;
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

macro_rules! id_type {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name(Arc<str>);

        impl $name {
            /// A new random one. Not for use in `apply`: proposers make identifiers.
            #[must_use]
            pub fn random() -> Self {
                Self(random_id().into())
            }

            /// The identifier as text.
            #[must_use]
            pub fn as_str(&self) -> &str {
                &self.0
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
                Self(text.into())
            }
        }

        impl From<$name> for String {
            fn from(id: $name) -> Self {
                id.as_str().to_owned()
            }
        }

        impl Borrow<str> for $name {
            fn borrow(&self) -> &str {
                &self.0
            }
        }

        impl AsRef<str> for $name {
            fn as_ref(&self) -> &str {
                &self.0
            }
        }

        impl std::ops::Deref for $name {
            type Target = str;
            fn deref(&self) -> &str {
                &self.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
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
}
