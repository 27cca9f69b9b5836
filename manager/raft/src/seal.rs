//! Encryption at rest: every record and snapshot is sealed with the data key.
//!
//! XChaCha20-Poly1305 with a random nonce; the associated data names the place
//! (file and key), so that a record that is damaged, or was moved, does not
//! open. Pure but for the random numbers.

use chacha20::cipher::consts::U10;
use chacha20::cipher::generic_array::GenericArray;
use chacha20::hchacha;
use ring::aead::{Aad, CHACHA20_POLY1305, LessSafeKey, Nonce, UnboundKey};
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
///
/// ring has no XChaCha: its key and nonce are derived here as the construction
/// says, and ring does the work. In a debug build that is many times faster than
/// a cipher compiled with it.
#[derive(Clone)]
pub(crate) struct Sealer(DataKey);

impl Sealer {
    pub(crate) fn new(key: &DataKey) -> Self {
        Self(key.clone())
    }

    fn cipher(&self, nonce: &[u8; NONCE]) -> (LessSafeKey, Nonce) {
        let key = GenericArray::from_slice(self.0.as_bytes());
        let derived = hchacha::<U10>(key, GenericArray::from_slice(&nonce[..16]));
        let key = UnboundKey::new(&CHACHA20_POLY1305, &derived).expect("the key has 32 bytes");
        let mut short = [0; 12];
        short[4..].copy_from_slice(&nonce[16..]);
        (LessSafeKey::new(key), Nonce::assume_unique_for_key(short))
    }

    pub(crate) fn seal(&self, place: &[u8], plain: &[u8]) -> Vec<u8> {
        let mut record = Vec::with_capacity(OVERHEAD + plain.len());
        self.seal_to(place, plain, &mut record);
        record
    }

    /// Appends the sealed record.
    pub(crate) fn seal_to(&self, place: &[u8], plain: &[u8], record: &mut Vec<u8>) {
        let nonce: [u8; NONCE] = rand::random();
        let (key, short) = self.cipher(&nonce);
        record.push(VERSION);
        record.extend_from_slice(&nonce);
        let begin = record.len();
        record.extend_from_slice(plain);
        let tag = key
            .seal_in_place_separate_tag(short, Aad::from(place), &mut record[begin..])
            .expect("fails only above 256 GiB, and nothing here is that large");
        record.extend_from_slice(tag.as_ref());
    }

    pub(crate) fn open(&self, place: &[u8], record: &[u8]) -> Result<Vec<u8>, OpenError> {
        match record.first() {
            None => return Err(OpenError::Damaged),
            Some(&VERSION) => {}
            Some(&version) => return Err(OpenError::Newer(version)),
        }
        let (nonce, sealed) = record
            .get(1..)
            .and_then(|rest| rest.split_first_chunk::<NONCE>())
            .ok_or(OpenError::Damaged)?;
        let (key, short) = self.cipher(nonce);
        let mut plain = sealed.to_vec();
        let length = key
            .open_in_place(short, Aad::from(place), &mut plain)
            .map_err(|_| OpenError::Damaged)?
            .len();
        plain.truncate(length);
        Ok(plain)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use chacha20poly1305::aead::{Aead, KeyInit, Payload};
    use chacha20poly1305::{XChaCha20Poly1305, XNonce};

    #[test]
    fn the_cipher_is_xchacha20_poly1305() {
        let key = DataKey::random();
        let record = Sealer::new(&key).seal(b"here", b"text");
        let payload = Payload {
            msg: &record[1 + NONCE..],
            aad: b"here",
        };
        let opened = XChaCha20Poly1305::new(key.as_bytes().into())
            .decrypt(XNonce::from_slice(&record[1..=NONCE]), payload);
        assert_eq!(opened.unwrap(), b"text");
    }

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
