//! Join tokens: `SWMTKN-1-<digest of the root, base 36, 50>-<secret, base 36, 25>`.
//!
//! The first part lets a node check the cluster's root before it sends the second.

use std::fmt;
use std::str::FromStr;

use subtle::ConstantTimeEq as _;
use swarm_proto::id;

use crate::ca::RootDigest;

const PREFIX: &str = "SWMTKN-1-";
/// Characters of the root's digest in a token.
const DIGEST_LEN: usize = 50;

/// A well-formed join token.
#[derive(Clone)]
pub struct JoinToken {
    text: String,
}

/// Text that is no join token.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TokenError {
    /// Another word, or another version.
    #[error("invalid join token: it must start with \"SWMTKN-1-\"")]
    Prefix,
    /// Not two parts of the right length.
    #[error(
        "invalid join token: after \"SWMTKN-1-\" come 50 characters, a dash and 25 characters; was it cut off?"
    )]
    Shape,
    /// A character that is not a lower-case letter or a digit.
    #[error("invalid join token: character {0:?} is not a lower-case letter or a digit")]
    Character(char),
}

impl JoinToken {
    /// A token with a new secret for the cluster of `root`.
    #[must_use]
    pub fn generate(root: &RootDigest) -> Self {
        Self {
            text: format!("{PREFIX}{}-{}", root.base36(), id::random_id()),
        }
    }

    /// The token as people pass it around.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.text
    }

    /// Whether the token belongs to the cluster of this root.
    #[must_use]
    pub fn matches_root(&self, root: &RootDigest) -> bool {
        self.digest() == root.base36()
    }

    /// The root's digest as written in the token (base 36).
    #[must_use]
    pub fn digest(&self) -> &str {
        &self.text[PREFIX.len()..PREFIX.len() + DIGEST_LEN]
    }
}

/// Whether two tokens are the same, in a time that does not tell where they differ.
#[must_use]
pub fn same_token(a: &str, b: &str) -> bool {
    !a.is_empty() && bool::from(a.as_bytes().ct_eq(b.as_bytes()))
}

impl FromStr for JoinToken {
    type Err = TokenError;

    fn from_str(text: &str) -> Result<Self, TokenError> {
        let rest = text.strip_prefix(PREFIX).ok_or(TokenError::Prefix)?;
        let (digest, secret) = rest.split_once('-').ok_or(TokenError::Shape)?;
        if let Some(wrong) = digest
            .chars()
            .chain(secret.chars())
            .find(|c| !c.is_ascii_digit() && !c.is_ascii_lowercase())
        {
            return Err(TokenError::Character(wrong));
        }
        if digest.len() != DIGEST_LEN || secret.len() != id::ID_LEN {
            return Err(TokenError::Shape);
        }
        Ok(Self {
            text: text.to_owned(),
        })
    }
}

impl fmt::Debug for JoinToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{PREFIX}{}-…", self.digest())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn digest() -> RootDigest {
        RootDigest::of_der(b"some certificate")
    }

    #[test]
    fn a_token_is_read_back_as_it_was_made() {
        let token = JoinToken::generate(&digest());
        assert_eq!(token.as_str().len(), 9 + 50 + 1 + 25);
        let read: JoinToken = token.as_str().parse().unwrap();
        assert_eq!(read.as_str(), token.as_str());
        assert!(read.matches_root(&digest()));
        assert!(!read.matches_root(&RootDigest::of_der(b"another")));
    }

    #[test]
    fn what_is_wrong_with_a_token_is_said() {
        let good = JoinToken::generate(&digest()).as_str().to_owned();
        assert_eq!("x".parse::<JoinToken>().unwrap_err(), TokenError::Prefix);
        assert_eq!(
            good[..80].parse::<JoinToken>().unwrap_err(),
            TokenError::Shape
        );
        assert_eq!(
            good.replacen(|c: char| c.is_ascii_lowercase(), "Ä", 1)
                .parse::<JoinToken>()
                .unwrap_err(),
            TokenError::Character('Ä')
        );
    }

    #[test]
    fn a_token_s_secret_is_not_in_its_debug_form() {
        let token = JoinToken::generate(&digest());
        let secret = token.as_str().rsplit('-').next().unwrap().to_owned();
        assert!(!format!("{token:?}").contains(&secret));
    }

    #[test]
    fn an_empty_token_equals_nothing() {
        assert!(!same_token("", ""));
        assert!(!same_token("a", "b"));
        assert!(same_token("a", "a"));
    }

    proptest! {
        #[test]
        fn parsing_never_panics(text in ".{0,120}") {
            let _ = text.parse::<JoinToken>();
            let _ = format!("SWMTKN-1-{text}").parse::<JoinToken>();
        }
    }
}
