//! Encryption at rest: every record and snapshot is sealed with the data key.
//!
//! XChaCha20-Poly1305 with a random nonce; the associated data names the place
//! (file and key), so that a record that is damaged, or was moved, does not
//! open. Pure but for the random numbers.

use chacha20poly1305::aead::{Aead, Payload};
use chacha20poly1305::{KeyInit, XChaCha20Poly1305, XNonce};
use swarm_identity::DataKey;

/// Format of a sealed record: this byte, nonce, ciphertext with tag.
const VERSION: u8 = 1;
const NONCE: usize = 24;
const TAG: usize = 16;

/// Bytes by which a sealed record is longer than what is in it.
pub(crate) const OVERHEAD: usize = 1 + NONCE + TAG;

/// Why a sealed record does not open.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum OpenError {
    #[error("record format {0} is newer than this build knows; upgrade this manager")]
    Newer(u8),
    #[error("damaged, or written with another data key")]
    Damaged,
}

/// Seals and opens with one key.
#[derive(Clone)]
pub(crate) struct Sealer(XChaCha20Poly1305);

impl Sealer {
    pub(crate) fn new(key: &DataKey) -> Self {
        Self(XChaCha20Poly1305::new(key.as_bytes().into()))
    }

    pub(crate) fn seal(&self, place: &[u8], plain: &[u8]) -> Vec<u8> {
        let nonce: [u8; NONCE] = rand::random();
        let payload = Payload {
            msg: plain,
            aad: place,
        };
        let sealed = self
            .0
            .encrypt(XNonce::from_slice(&nonce), payload)
            .expect("fails only above 256 GiB, and nothing here is that large");
        let mut record = Vec::with_capacity(OVERHEAD + plain.len());
        record.push(VERSION);
        record.extend_from_slice(&nonce);
        record.extend_from_slice(&sealed);
        record
    }

    pub(crate) fn open(&self, place: &[u8], record: &[u8]) -> Result<Vec<u8>, OpenError> {
        match record.first() {
            None => return Err(OpenError::Damaged),
            Some(&VERSION) => {}
            Some(&version) => return Err(OpenError::Newer(version)),
        }
        let (nonce, sealed) = record
            .get(1..)
            .and_then(|rest| rest.split_at_checked(NONCE))
            .ok_or(OpenError::Damaged)?;
        let payload = Payload {
            msg: sealed,
            aad: place,
        };
        self.0
            .decrypt(XNonce::from_slice(nonce), payload)
            .map_err(|_| OpenError::Damaged)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_opens_only_unchanged_in_its_place_and_with_its_key() {
        let sealer = Sealer::new(&DataKey::random());
        let record = sealer.seal(b"here", b"text");
        assert_eq!(record.len(), OVERHEAD + 4);
        assert_eq!(sealer.open(b"here", &record).unwrap(), b"text");
        assert_eq!(sealer.open(b"there", &record), Err(OpenError::Damaged));
        let other = Sealer::new(&DataKey::random());
        assert_eq!(other.open(b"here", &record), Err(OpenError::Damaged));
        for place in 1..record.len() {
            let mut damaged = record.clone();
            damaged[place] ^= 1;
            assert_eq!(sealer.open(b"here", &damaged), Err(OpenError::Damaged));
        }
        for length in 0..record.len() {
            assert!(sealer.open(b"here", &record[..length]).is_err());
        }
    }
}
