//! Images on disk: blobs, unpacked layers, and which reference means which image.
//!
//! ```text
//! blobs/sha256/HEX      manifests and configurations, as the registry sent them
//! layers/ID/            one unpacked layer: `fs` (its files), `diff-id` (its full digest)
//! images/HEX.json       one per reference: a [`Record`]; its time is when it was pulled or last used
//! downloads/HEX.part    what has arrived of a layer; resumed, or dropped by garbage collection
//! tmp/                  things being made; emptied at start
//! ```
//!
//! Whatever has its final name is complete: it is made under `tmp`, synced and
//! renamed. Layers are known by the digest of their contents, not of the chain
//! below them: overlayfs does not care what lies below a layer.
//! Blocking; never speaks to a network.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::RuntimeError;
use super::bundle::ImageConfig;

/// Letters of a layer's directory name. All lower directories of a container must
/// fit in one page of mount options; the full digest is in the layer and compared.
const LAYER_NAME: usize = 26;

/// What a reference means on this node.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Record {
    /// Complete: registry, repository, tag and digest.
    pub reference: String,
    /// Digests the image is known by: its own manifest's, and the index it was found in.
    pub digests: Vec<String>,
    /// Of the image's manifest.
    pub manifest: String,
    /// Of the image's configuration.
    pub config: String,
    /// Digests of the unpacked layers, lowest first.
    pub layers: Vec<String>,
}

/// The image directories of one runtime.
#[derive(Clone, Debug)]
pub(super) struct Store {
    root: PathBuf,
}

/// What one garbage collection removed.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Swept {
    pub images: usize,
    pub layers: usize,
    pub blobs: usize,
    pub downloads: usize,
    /// When the next unused image is old enough to go.
    pub next: Option<Duration>,
}

impl Store {
    /// Makes the directories and removes what an earlier process left half-made.
    pub fn open(root: &Path) -> io::Result<Self> {
        let store = Self {
            root: root.to_owned(),
        };
        remove_tree(&store.root.join("tmp"))?;
        for dir in [
            "blobs/sha256",
            "layers",
            "images",
            "downloads",
            "tmp",
            "containers",
        ] {
            fs::create_dir_all(root.join(dir))?;
        }
        // The files inside belong to users of containers, not to those of the host.
        set_mode(root, 0o711)?;
        Ok(store)
    }

    pub fn layers_dir(&self) -> PathBuf {
        self.root.join("layers")
    }

    /// Name under [`Self::layers_dir`].
    pub fn layer_name(diff_id: &str) -> &str {
        let hex = diff_id.strip_prefix("sha256:").unwrap_or(diff_id);
        &hex[..hex.len().min(LAYER_NAME)]
    }

    pub fn has_layer(&self, diff_id: &str) -> bool {
        let dir = self.layers_dir().join(Self::layer_name(diff_id));
        fs::read_to_string(dir.join("diff-id")).is_ok_and(|full| full == diff_id)
    }

    /// A new empty directory for a layer; [`Self::keep_layer`] gives it its name.
    pub fn new_layer(&self) -> io::Result<PathBuf> {
        let dir = self.temporary();
        fs::create_dir(&dir)?;
        fs::create_dir(dir.join("fs"))?;
        set_mode(&dir.join("fs"), 0o755)?;
        Ok(dir)
    }

    /// Syncs a finished layer and gives it its name.
    pub fn keep_layer(&self, dir: &Path, diff_id: &str) -> io::Result<()> {
        fs::write(dir.join("diff-id"), diff_id)?;
        let handle = File::open(dir)?;
        // A layer is thousands of small files: one sync for all of them.
        nix::unistd::syncfs(&handle)?;
        let target = self.layers_dir().join(Self::layer_name(diff_id));
        if target.exists() {
            // Of an interrupted removal, or (as likely as a broken SHA-256) of another layer.
            remove_tree(&target)?;
        }
        fs::rename(dir, &target)?;
        sync_dir(&self.layers_dir())
    }

    /// A name in `tmp` that nobody else has.
    pub fn temporary(&self) -> PathBuf {
        self.root
            .join("tmp")
            .join(format!("{:032x}", rand::random::<u128>()))
    }

    /// Where a layer is downloaded to. The two digests tell apart two images that
    /// claim different contents for the same bytes.
    pub fn download(&self, digest: &str, diff_id: &str) -> PathBuf {
        let hex = |digest: &str| digest.strip_prefix("sha256:").unwrap_or(digest).to_owned();
        let contents = hex(diff_id);
        self.root
            .join("downloads")
            .join(format!("{}-{}.part", hex(digest), &contents[..16]))
    }

    pub fn blob(&self, digest: &str) -> Option<Vec<u8>> {
        let bytes = fs::read(self.blob_path(digest)?).ok()?;
        (digest_of(&bytes) == digest).then_some(bytes)
    }

    pub fn put_blob(&self, digest: &str, bytes: &[u8]) -> io::Result<()> {
        let path = self.blob_path(digest).ok_or(io::ErrorKind::InvalidInput)?;
        self.put(&path, bytes)
    }

    fn blob_path(&self, digest: &str) -> Option<PathBuf> {
        let hex = parse_digest(digest)?;
        Some(self.root.join("blobs/sha256").join(hex))
    }

    fn put(&self, path: &Path, bytes: &[u8]) -> io::Result<()> {
        let temporary = self.temporary();
        let mut file = File::create(&temporary)?;
        file.write_all(bytes)?;
        file.sync_all()?;
        fs::rename(&temporary, path)?;
        sync_dir(path.parent().unwrap_or(path))
    }

    pub fn put_record(&self, record: &Record) -> io::Result<()> {
        let bytes = serde_json::to_vec_pretty(record).map_err(io::Error::other)?;
        self.put(&self.record_path(&record.reference), &bytes)
    }

    fn record_path(&self, reference: &str) -> PathBuf {
        self.root
            .join("images")
            .join(format!("{}.json", hex::encode(Sha256::digest(reference))))
    }

    /// The image that a complete reference means here, if all of it is here.
    pub fn find(&self, reference: &str) -> Option<Record> {
        let record = read_record(&self.record_path(reference))?;
        self.is_complete(&record).then_some(record)
    }

    /// An image known by this digest under whatever name, if all of it is here.
    pub fn find_digest(&self, digest: &str) -> Option<Record> {
        self.records().ok()?.into_values().find(|record| {
            record.digests.iter().any(|known| known == digest) && self.is_complete(record)
        })
    }

    fn is_complete(&self, record: &Record) -> bool {
        record.layers.iter().all(|layer| self.has_layer(layer))
            && self.blob(&record.config).is_some()
    }

    fn records(&self) -> io::Result<BTreeMap<PathBuf, Record>> {
        let mut records = BTreeMap::new();
        for entry in fs::read_dir(self.root.join("images"))? {
            let path = entry?.path();
            if let Some(record) = read_record(&path) {
                records.insert(path, record);
            }
        }
        Ok(records)
    }

    /// The image's configuration.
    pub fn config(&self, record: &Record) -> Result<ImageConfig, RuntimeError> {
        let bytes = self
            .blob(&record.config)
            .ok_or_else(|| RuntimeError::Failed {
                step: "read image configuration",
                reason: format!("{} is missing or damaged", record.config),
            })?;
        serde_json::from_slice(&bytes).map_err(|err| RuntimeError::Failed {
            step: "read image configuration",
            reason: err.to_string(),
        })
    }

    /// A container of the image with this configuration has ended being: until now it was in use.
    pub fn used_until_now(&self, config: &str) -> io::Result<()> {
        for (path, record) in self.records()? {
            if record.config == config {
                File::open(path)?.set_modified(SystemTime::now())?;
            }
        }
        Ok(())
    }

    /// Drops every image that neither a reference in `keep` nor one of `used` (digests of
    /// configurations) names and that nobody has used for so long, then all layers and blobs
    /// that no image and no container needs.
    pub fn sweep(
        &self,
        keep: &BTreeSet<String>,
        used_configs: &BTreeSet<String>,
        used_layers: &BTreeSet<String>,
        unused_for: Duration,
    ) -> io::Result<Swept> {
        let mut swept = Swept::default();
        let mut blobs: BTreeSet<String> = used_configs.clone();
        let mut layers: BTreeSet<String> = used_layers
            .iter()
            .map(|layer| Self::layer_name(layer).to_owned())
            .collect();
        for (path, record) in self.records()? {
            let used = keep.contains(&record.reference) || used_configs.contains(&record.config);
            // A time in the future (the clock was set back) counts as now.
            let age = fs::metadata(&path)?.modified()?.elapsed();
            let left = unused_for.saturating_sub(age.unwrap_or_default());
            if !used && !left.is_zero() {
                swept.next = Some(swept.next.map_or(left, |next| next.min(left)));
            }
            if used || !left.is_zero() {
                blobs.extend([record.manifest, record.config]);
                layers.extend(
                    record
                        .layers
                        .iter()
                        .map(|id| Self::layer_name(id).to_owned()),
                );
            } else {
                fs::remove_file(path)?;
                swept.images += 1;
            }
        }
        sync_dir(&self.root.join("images"))?;
        for entry in fs::read_dir(self.layers_dir())? {
            let entry = entry?;
            if !layers.contains(entry.file_name().to_string_lossy().as_ref()) {
                // Renamed first: a half-removed layer must not look like a whole one.
                let doomed = self.temporary();
                fs::rename(entry.path(), &doomed)?;
                remove_tree(&doomed)?;
                swept.layers += 1;
            }
        }
        for entry in fs::read_dir(self.root.join("blobs/sha256"))? {
            let entry = entry?;
            if !blobs.contains(&format!("sha256:{}", entry.file_name().to_string_lossy())) {
                fs::remove_file(entry.path())?;
                swept.blobs += 1;
            }
        }
        for entry in fs::read_dir(self.root.join("downloads"))? {
            fs::remove_file(entry?.path())?;
            swept.downloads += 1;
        }
        Ok(swept)
    }
}

fn read_record(path: &Path) -> Option<Record> {
    serde_json::from_slice(&fs::read(path).ok()?).ok()
}

/// The hexadecimal part of "sha256:…"; `None` for every other text.
pub(super) fn parse_digest(digest: &str) -> Option<&str> {
    let hex = digest.strip_prefix("sha256:")?;
    let plain = |byte: u8| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte);
    (hex.len() == 64 && hex.bytes().all(plain)).then_some(hex)
}

pub(super) fn digest_of(bytes: &[u8]) -> String {
    format!("sha256:{}", hex::encode(Sha256::digest(bytes)))
}

/// Removes a file or a directory with all in it; gone already is fine.
pub(super) fn remove_tree(path: &Path) -> io::Result<()> {
    let result = match fs::symlink_metadata(path) {
        Ok(meta) if meta.is_dir() => fs::remove_dir_all(path),
        Ok(_) => fs::remove_file(path),
        Err(err) => Err(err),
    };
    match result {
        Err(err) if err.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}

pub(super) fn sync_dir(path: &Path) -> io::Result<()> {
    File::open(path)?.sync_all()
}

fn set_mode(path: &Path, mode: u32) -> io::Result<()> {
    use std::os::unix::fs::PermissionsExt;
    fs::set_permissions(path, fs::Permissions::from_mode(mode))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(reference: &str, layer: &str, config: &[u8]) -> Record {
        Record {
            reference: reference.into(),
            digests: vec![digest_of(reference.as_bytes())],
            manifest: digest_of(b"manifest"),
            config: digest_of(config),
            layers: vec![digest_of(layer.as_bytes())],
        }
    }

    fn store_with(records: &[(&str, &str, &[u8])]) -> (tempfile::TempDir, Store) {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path()).unwrap();
        for (reference, layer, config) in records {
            let record = record(reference, layer, config);
            if !store.has_layer(&record.layers[0]) {
                let layer = store.new_layer().unwrap();
                store.keep_layer(&layer, &record.layers[0]).unwrap();
            }
            store.put_blob(&record.config, config).unwrap();
            store.put_record(&record).unwrap();
        }
        (dir, store)
    }

    #[test]
    fn an_image_is_found_by_reference_and_by_digest_only_while_whole() {
        let (_dir, store) = store_with(&[("r/a:1", "layer", b"config")]);
        let found = store.find("r/a:1").unwrap();
        assert_eq!(store.find_digest(&digest_of(b"r/a:1")).unwrap(), found);
        assert_eq!(store.find("r/a:2"), None);
        remove_tree(&store.layers_dir().join(Store::layer_name(&found.layers[0]))).unwrap();
        assert_eq!(store.find("r/a:1"), None);
        assert_eq!(store.find_digest(&digest_of(b"r/a:1")), None);
    }

    #[test]
    fn a_damaged_configuration_is_not_used() {
        let (dir, store) = store_with(&[("r/a:1", "layer", b"config")]);
        let hex = digest_of(b"config");
        fs::write(dir.path().join("blobs/sha256").join(&hex[7..]), b"other").unwrap();
        assert_eq!(store.find("r/a:1"), None);
    }

    #[test]
    fn a_layer_whose_name_collides_is_not_mistaken_for_another() {
        let (_dir, store) = store_with(&[("r/a:1", "layer", b"config")]);
        let real = digest_of(b"layer");
        let mut other = real.clone();
        other.replace_range(70..71, if &real[70..71] == "0" { "1" } else { "0" });
        assert!(store.has_layer(&real));
        assert!(!store.has_layer(&other));
    }

    #[test]
    fn sweep_keeps_what_is_named_or_used_and_layers_that_are_shared() {
        let (dir, store) = store_with(&[
            ("r/kept:1", "base", b"one"),
            ("r/gone:1", "base", b"two"),
            ("r/gone:2", "own", b"three"),
            ("r/used:1", "used", b"four"),
        ]);
        fs::write(dir.path().join("downloads/x.part"), b"half").unwrap();
        let keep = BTreeSet::from(["r/kept:1".to_owned()]);
        let configs = BTreeSet::from([digest_of(b"four")]);
        let none = BTreeSet::new();
        let sweep = || store.sweep(&keep, &configs, &none, Duration::ZERO).unwrap();
        let swept = sweep();
        assert_eq!(
            swept,
            Swept {
                images: 2,
                layers: 1,
                blobs: 2,
                downloads: 1,
                next: None,
            }
        );
        assert!(store.find("r/kept:1").is_some());
        assert!(store.find("r/used:1").is_some());
        assert!(store.find("r/gone:1").is_none());
        assert_eq!(sweep(), Swept::default());
    }

    #[test]
    fn an_image_stays_until_it_was_not_used_for_a_while() {
        let (dir, store) = store_with(&[("r/a:1", "layer", b"config")]);
        let none = BTreeSet::new();
        let hour = Duration::from_secs(3600);
        let sweep = || {
            let swept = store.sweep(&none, &none, &none, hour).unwrap();
            (swept.images, swept.next)
        };
        let (images, next) = sweep();
        assert_eq!(images, 0);
        assert!(next.unwrap() <= hour);
        // Pulled long ago, and in use until now.
        let path = store.record_path("r/a:1");
        let aged = |ago: Duration| {
            let then = SystemTime::now() - ago;
            File::open(&path).unwrap().set_modified(then).unwrap();
        };
        aged(3 * hour);
        store.used_until_now(&digest_of(b"config")).unwrap();
        assert_eq!(sweep().0, 0);
        aged(3 * hour);
        store.used_until_now(&digest_of(b"another")).unwrap();
        assert_eq!(sweep(), (1, None));
        assert_eq!(fs::read_dir(dir.path().join("layers")).unwrap().count(), 0);
    }

    #[test]
    fn half_made_things_are_gone_after_a_restart() {
        let (dir, store) = store_with(&[]);
        store.new_layer().unwrap();
        Store::open(dir.path()).unwrap();
        assert_eq!(fs::read_dir(dir.path().join("tmp")).unwrap().count(), 0);
    }

    #[test]
    fn only_lower_case_sha256_digests_name_files() {
        assert!(parse_digest(&digest_of(b"x")).is_some());
        assert_eq!(parse_digest("sha256:../../etc/passwd"), None);
        assert_eq!(parse_digest(&digest_of(b"x").to_uppercase()), None);
        assert_eq!(parse_digest("sha512:00"), None);
    }
}
