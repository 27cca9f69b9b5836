//! The node's key file: its key, certificate, root and the data key of its raft log.
//!
//! All in one file, so that a crash at any time leaves either the old set or
//! the new one, never a key without its certificate.

use std::fmt;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read as _, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use sha2::{Digest as _, Sha256};
use zeroize::{Zeroize as _, Zeroizing};

use crate::cert::CertError;
use crate::identity::{IdentityError, KeyMaterial};
use crate::{cert, identity};

const FILE: &str = "swarm-node.pem";
/// The set has some 3 KiB.
const FILE_MAX: u64 = 256 << 10;
const TAG_DATA_KEY: &str = "SWARM DATA KEY";
const TAG_ROOT: &str = "SWARM ROOT CERTIFICATE";
const TAG_CERTIFICATE: &str = "CERTIFICATE";
const TAG_KEY: &str = "PRIVATE KEY";
/// The last block: SHA-256 of everything before it. A flipped bit in a data key would otherwise
/// only show as a log that does not open.
const TAG_CHECKSUM: &str = "SWARM CHECKSUM";

/// The key that the raft log and its snapshots are encrypted with on disk.
#[derive(Clone, PartialEq, Eq)]
pub struct DataKey(Zeroizing<[u8; 32]>);

impl DataKey {
    /// A new one.
    #[must_use]
    pub fn random() -> Self {
        Self(Zeroizing::new(rand::random()))
    }

    /// From its bytes.
    #[must_use]
    pub fn from_bytes(bytes: [u8; 32]) -> Self {
        Self(Zeroizing::new(bytes))
    }

    /// Its bytes: a secret.
    #[must_use]
    pub fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }
}

impl fmt::Debug for DataKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("DataKey")
    }
}

/// What a node keeps of its membership.
#[derive(Clone, Debug)]
pub struct Stored {
    /// Key, certificate and root.
    pub material: KeyMaterial,
    /// For the raft log; made when the node joined, kept when the certificate is renewed.
    pub data_key: DataKey,
}

/// A key file that cannot be read or written.
#[derive(Debug, thiserror::Error)]
pub enum KeyStoreError {
    /// The file system refused.
    #[error("cannot {what} {}", path.display())]
    Io {
        /// "read", "write", "remove".
        what: &'static str,
        /// Which file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The file is not as it was written.
    #[error("{} is damaged: {reason}; restore it, or leave the cluster with --force and join again", path.display())]
    Damaged {
        /// Which file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
}

/// The directory of the key file, `/var/lib/swarm/certificates`.
#[derive(Clone, Debug)]
pub struct KeyStore {
    directory: PathBuf,
}

impl KeyStore {
    /// A key store in `directory`, which is made when something is saved.
    #[must_use]
    pub fn new(directory: impl Into<PathBuf>) -> Self {
        Self {
            directory: directory.into(),
        }
    }

    /// The key file.
    #[must_use]
    pub fn path(&self) -> PathBuf {
        self.directory.join(FILE)
    }

    /// What is stored; `None` when the node is in no cluster.
    ///
    /// # Errors
    /// The file cannot be read or is damaged; the error names it.
    pub fn load(&self) -> Result<Option<Stored>, KeyStoreError> {
        let path = self.path();
        let failed = |source| KeyStoreError::Io {
            what: "read",
            path: path.clone(),
            source,
        };
        let file = match File::open(&path) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(failed(error)),
        };
        let mut text = Zeroizing::new(Vec::new());
        file.take(FILE_MAX).read_to_end(&mut text).map_err(failed)?;
        decode(&text)
            .map(Some)
            .map_err(|error| KeyStoreError::Damaged {
                path,
                reason: error.to_string(),
            })
    }

    /// Replaces what is stored, atomically and durably; mode 0600.
    ///
    /// # Errors
    /// The file system refused; what was stored before is still there.
    pub fn save(&self, stored: &Stored) -> Result<(), KeyStoreError> {
        let path = self.path();
        let failed = |source| KeyStoreError::Io {
            what: "write",
            path: path.clone(),
            source,
        };
        let text = encode(stored).map_err(|error| KeyStoreError::Damaged {
            path: path.clone(),
            reason: error.to_string(),
        })?;
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&self.directory)
            .map_err(failed)?;
        // Its own name, and that of its parent if both are new.
        let above = self.directory.ancestors().skip(1).take(2);
        for directory in above.filter(|above| !above.as_os_str().is_empty()) {
            sync_directory(directory).map_err(failed)?;
        }
        replace(&path, &text).map_err(failed)
    }

    /// Forgets everything: the node has left its cluster.
    ///
    /// # Errors
    /// The file system refused.
    pub fn wipe(&self) -> Result<(), KeyStoreError> {
        let path = self.path();
        match fs::remove_file(&path).and_then(|()| sync_directory(&self.directory)) {
            Err(source) if source.kind() != io::ErrorKind::NotFound => Err(KeyStoreError::Io {
                what: "remove",
                path,
                source,
            }),
            _ => Ok(()),
        }
    }
}

fn replace(path: &Path, content: &[u8]) -> io::Result<()> {
    let temporary = path.with_extension("new");
    match fs::remove_file(&temporary) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let mut file = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(&temporary)?;
    file.write_all(content)?;
    file.sync_all()?;
    fs::rename(&temporary, path)?;
    sync_directory(path.parent().unwrap_or(Path::new(".")))
}

fn sync_directory(directory: &Path) -> io::Result<()> {
    File::open(directory)?.sync_all()
}

pub(crate) fn encode(stored: &Stored) -> Result<Zeroizing<Vec<u8>>, CertError> {
    let material = &stored.material;
    let mut text = Zeroizing::new(Vec::new());
    let mut put = |tag: &str, mut der: Vec<u8>| {
        let block = Zeroizing::new(cert::to_pem(tag, &der));
        text.extend_from_slice(block.as_bytes());
        der.zeroize();
    };
    put(
        TAG_KEY,
        cert::key_from_pem(material.key_pem.as_bytes())?
            .secret_der()
            .to_vec(),
    );
    put(TAG_DATA_KEY, stored.data_key.as_bytes().to_vec());
    for der in cert::chain_from_pem(material.chain_pem.as_bytes())? {
        put(TAG_CERTIFICATE, der.to_vec());
    }
    for der in cert::chain_from_pem(material.root_pem.as_bytes())? {
        put(TAG_ROOT, der.to_vec());
    }
    let sum = cert::to_pem(TAG_CHECKSUM, &Sha256::digest(&*text));
    text.extend_from_slice(sum.as_bytes());
    Ok(text)
}

pub(crate) fn decode(text: &[u8]) -> Result<Stored, IdentityError> {
    let damaged = |reason: &str| CertError::Malformed {
        what: "key file",
        reason: reason.to_owned(),
    };
    let begin = format!("-----BEGIN {TAG_CHECKSUM}-----");
    let end = text
        .windows(begin.len())
        .rposition(|here| here == begin.as_bytes())
        .ok_or_else(|| damaged("its end is missing"))?;
    let (text, sum) = text.split_at(end);
    let sum = pem::parse(sum).map_err(|error| damaged(&error.to_string()))?;
    if sum.contents() != Sha256::digest(text).as_slice() {
        return Err(damaged("it is not as it was written").into());
    }
    let blocks = pem::parse_many(text).map_err(|error| damaged(&error.to_string()))?;
    let joined = |tag: &str, as_tag: &str| {
        blocks
            .iter()
            .filter(|block| block.tag() == tag)
            .map(|block| cert::to_pem(as_tag, block.contents()))
            .collect::<String>()
    };
    let data_key = blocks
        .iter()
        .find(|block| block.tag() == TAG_DATA_KEY)
        .and_then(|block| <[u8; 32]>::try_from(block.contents()).ok())
        .ok_or_else(|| damaged("it has no data key"))?;
    let stored = Stored {
        material: KeyMaterial {
            chain_pem: joined(TAG_CERTIFICATE, TAG_CERTIFICATE),
            key_pem: Zeroizing::new(joined(TAG_KEY, TAG_KEY)),
            root_pem: joined(TAG_ROOT, TAG_CERTIFICATE),
        },
        data_key: DataKey::from_bytes(data_key),
    };
    identity::check(&stored.material)?;
    Ok(stored)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;
    use std::time::SystemTime;

    use proptest::prelude::*;

    use super::*;
    use crate::testing;

    fn stored() -> Stored {
        let root = crate::RootCa::create(SystemTime::now()).unwrap();
        Stored {
            material: testing::material(&root, "n1", swarm_proto::v1::NodeRole::Worker),
            data_key: DataKey::random(),
        }
    }

    #[test]
    fn what_is_saved_is_loaded_and_only_root_can_read_it() {
        let directory = tempfile::tempdir().unwrap();
        let store = KeyStore::new(directory.path().join("certificates"));
        assert!(store.load().unwrap().is_none());
        let (first, second) = (stored(), stored());
        for set in [first, second] {
            store.save(&set).unwrap();
            let loaded = store.load().unwrap().unwrap();
            assert_eq!(loaded.data_key, set.data_key);
            assert_eq!(loaded.material.chain_pem, set.material.chain_pem);
            assert_eq!(loaded.material.root_pem, set.material.root_pem);
            identity::Identity::new(loaded.material).unwrap();
        }
        let mode = fs::metadata(store.path()).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        store.wipe().unwrap();
        store.wipe().unwrap();
        assert!(store.load().unwrap().is_none());
    }

    #[test]
    fn a_damaged_file_is_named() {
        let directory = tempfile::tempdir().unwrap();
        let store = KeyStore::new(directory.path());
        store.save(&stored()).unwrap();
        let whole = fs::read(store.path()).unwrap();
        for length in [0, 10, whole.len() / 2, whole.len() - 40] {
            fs::write(store.path(), &whole[..length]).unwrap();
            let error = store.load().unwrap_err().to_string();
            assert!(error.contains("swarm-node.pem is damaged"), "{error}");
        }
    }

    #[test]
    fn a_flipped_bit_anywhere_is_found_or_does_no_harm() {
        let directory = tempfile::tempdir().unwrap();
        let store = KeyStore::new(directory.path());
        let before = stored();
        store.save(&before).unwrap();
        let whole = fs::read(store.path()).unwrap();
        let mut found = 0;
        for place in 0..whole.len() {
            let mut damaged = whole.clone();
            damaged[place] ^= 1 << (place % 8);
            match decode(&damaged) {
                Err(_) => found += 1,
                // In the white space around the checksum.
                Ok(after) => {
                    assert_eq!(after.data_key, before.data_key);
                    assert_eq!(after.material.chain_pem, before.material.chain_pem);
                    assert_eq!(*after.material.key_pem, *before.material.key_pem);
                    assert_eq!(after.material.root_pem, before.material.root_pem);
                }
            }
        }
        assert!(found > whole.len() - 20, "{found} of {}", whole.len());
    }

    #[test]
    fn a_key_that_is_not_the_certificate_s_is_found() {
        let directory = tempfile::tempdir().unwrap();
        let store = KeyStore::new(directory.path());
        let mut mixed = stored();
        mixed.material.key_pem = stored().material.key_pem;
        store.save(&mixed).unwrap();
        let error = store.load().unwrap_err().to_string();
        assert!(error.contains("do not fit together"), "{error}");
    }

    proptest! {
        #[test]
        fn reading_never_panics(text in proptest::collection::vec(any::<u8>(), 0..300)) {
            let _ = decode(&text);
        }
    }
}
