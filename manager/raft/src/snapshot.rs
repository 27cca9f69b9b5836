//! Snapshots as plain files: written aside, synced, renamed, directory synced.
//!
//! A file holds a magic number, then one sealed record: the snapshot's place in
//! the log and the encoded state. One that does not open is refused with its
//! name, never skipped: the log before it is gone. Everything here waits for the disk.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use bytes::Bytes;
use parking_lot::Mutex;
use swarm_disk::Disk;
use tokio::sync::Semaphore;

use crate::error::DiskError;
use crate::seal::Sealer;
use crate::types::{CodecError, LogId, Snapshot, SnapshotMeta, decode, encode};

/// The first bytes of a snapshot file, with the version of what follows.
const MAGIC: &[u8; 8] = b"SWSNAP\0\x01";
const SUFFIX: &str = ".snapshot";

/// The snapshots of one member: one that counts, and perhaps one being written.
#[derive(Clone)]
pub(crate) struct Snapshots {
    disk: Arc<dyn Disk>,
    dir: PathBuf,
    sealer: Sealer,
    current: Arc<Mutex<Option<Current>>>,
    /// Held while one is written. Closed when the member has stopped.
    writing: Arc<Semaphore>,
}

#[derive(Clone)]
struct Current {
    meta: SnapshotMeta,
    path: PathBuf,
}

impl Snapshots {
    /// Opens the directory and checks the newest snapshot, which is returned.
    pub(crate) fn open(
        disk: Arc<dyn Disk>,
        dir: &Path,
        sealer: Sealer,
    ) -> Result<(Self, Option<Snapshot>), DiskError> {
        disk.create_dir(dir)
            .map_err(|e| DiskError::io("create", dir, e))?;
        let mut files: Vec<PathBuf> = Vec::new();
        let listing = disk.list(dir).map_err(|e| DiskError::io("list", dir, e))?;
        for path in listing {
            let name = path.file_name().and_then(|name| name.to_str());
            if name.is_some_and(|name| name.ends_with(SUFFIX)) {
                files.push(path);
            } else {
                // Cut short by a crash, before the rename that makes it count.
                remove(&*disk, &path)?;
            }
        }
        // Names are padded, so their order is the order in the log.
        files.sort();
        let snapshots = Self {
            disk,
            dir: dir.to_owned(),
            sealer,
            current: Arc::default(),
            writing: Arc::new(Semaphore::new(1)),
        };
        let Some(newest) = files.pop() else {
            return Ok((snapshots, None));
        };
        let found = snapshots.load(&newest)?;
        *snapshots.current.lock() = Some(Current {
            meta: found.meta.clone(),
            path: newest,
        });
        files
            .iter()
            .try_for_each(|path| remove(&*snapshots.disk, path))?;
        Ok((snapshots, Some(found)))
    }

    /// Where the snapshots are.
    pub(crate) fn dir(&self) -> &Path {
        &self.dir
    }

    /// The newest snapshot, read from its file.
    pub(crate) fn newest(&self) -> Result<Option<Snapshot>, DiskError> {
        loop {
            let Some(current) = self.current.lock().clone() else {
                return Ok(None);
            };
            match self.load(&current.path) {
                Ok(snapshot) => return Ok(Some(snapshot)),
                // A newer one has taken its place meanwhile.
                Err(_) if !self.is_current(&current.path) => {}
                Err(error) => return Err(error),
            }
        }
    }

    fn is_current(&self, path: &Path) -> bool {
        let current = self.current.lock();
        current.as_ref().is_some_and(|current| current.path == path)
    }

    /// Writes a snapshot, packed with its place in the log, and deletes the one before it. One that is not
    /// newer is not written, and none after [`Snapshots::close`], when nobody asks for it any more.
    pub(crate) async fn save(&self, meta: &SnapshotMeta, plain: &[u8]) -> Result<(), DiskError> {
        let Ok(_writing) = self.writing.acquire().await else {
            return Ok(());
        };
        if self.is_behind(meta) {
            return Ok(());
        }
        let (term, index) = meta
            .last_log_id
            .map_or((0, 0), |id| (id.leader_id.term, id.index));
        let path = self.dir.join(format!("{index:020}-{term:020}{SUFFIX}"));
        let aside = path.with_extension("writing");
        let sealed = self.sealer.seal(MAGIC, plain);
        #[cfg(feature = "museum")]
        if swarm_proto::museum::on(swarm_proto::museum::Bug::SnapshotNotSynced) {
            let write = || {
                let file = self.disk.open(&aside)?;
                file.write_at(MAGIC, 0)?;
                file.write_at(&sealed, MAGIC.len() as u64)?;
                self.disk.rename(&aside, &path)
            };
            write().map_err(|e| DiskError::io("write", &path, e))?;
            *self.current.lock() = Some(Current {
                meta: meta.clone(),
                path,
            });
            return Ok(());
        }
        swarm_disk::replace(&*self.disk, &path, &aside, &[MAGIC, &sealed])
            .await
            .map_err(|e| DiskError::io("write", &path, e))?;
        let superseded = {
            let mut current = self.current.lock();
            let newer = current
                .as_ref()
                .is_none_or(|current| current.meta.last_log_id <= meta.last_log_id);
            let written = Current {
                meta: meta.clone(),
                path: path.clone(),
            };
            if newer {
                current.replace(written)
            } else {
                Some(written)
            }
        };
        match superseded {
            Some(old) if old.path != path || !self.is_current(&path) => {
                remove(&*self.disk, &old.path)
            }
            _ => Ok(()),
        }
    }

    /// Waits for the one that is being written, and has no more written: the directory may be opened again by
    /// a member that is started in its place, and what that one has found must not be deleted.
    pub(crate) async fn close(&self) {
        let last = self.writing.acquire().await;
        self.writing.close();
        drop(last);
    }

    fn is_behind(&self, meta: &SnapshotMeta) -> bool {
        let current = self.current.lock();
        current
            .as_ref()
            .is_some_and(|current| current.meta.last_log_id >= meta.last_log_id)
    }

    /// The last entry in the newest snapshot.
    pub(crate) fn last(&self) -> Option<LogId> {
        let current = self.current.lock();
        current
            .as_ref()
            .and_then(|current| current.meta.last_log_id)
    }

    fn load(&self, path: &Path) -> Result<Snapshot, DiskError> {
        let bytes = self
            .disk
            .read(path)
            .map_err(|e| DiskError::io("read", path, e))?;
        unseal(&self.sealer, &bytes)
            .and_then(unpack)
            .map_err(|reason| DiskError::damaged(path, "the snapshot", reason))
    }
}

/// What is sealed in a snapshot file.
pub(crate) fn unseal(sealer: &Sealer, file: &[u8]) -> Result<Vec<u8>, String> {
    let sealed = file
        .strip_prefix(MAGIC)
        .ok_or("not a snapshot, or one of a newer build")?;
    sealer.open(MAGIC, sealed).map_err(|e| e.to_string())
}

/// What a snapshot begins with; the encoded state follows. There is `room` for a state: one of a million tasks
/// has hundreds of megabytes, which are not to be copied once more.
pub(crate) fn begin(meta: &SnapshotMeta, room: usize) -> Result<Vec<u8>, CodecError> {
    let meta = encode(meta)?;
    let length = u32::try_from(meta.len()).unwrap_or(u32::MAX).to_le_bytes();
    let mut plain = Vec::with_capacity(length.len() + meta.len() + room);
    plain.extend_from_slice(&length);
    plain.extend_from_slice(&meta);
    Ok(plain)
}

/// What is sealed in the file of a snapshot. The inverse of [`unpack`].
pub(crate) fn pack(meta: &SnapshotMeta, state: &[u8]) -> Result<Vec<u8>, CodecError> {
    let mut plain = begin(meta, state.len())?;
    plain.extend_from_slice(state);
    Ok(plain)
}

/// The snapshot's place in the log and the encoded state.
pub(crate) fn unpack(plain: Vec<u8>) -> Result<Snapshot, String> {
    let (length, _) = plain.split_first_chunk::<4>().ok_or("cut short")?;
    let meta_end = 4 + u32::from_le_bytes(*length) as usize;
    let meta = plain.get(4..meta_end).ok_or("cut short")?;
    Ok(Snapshot {
        meta: decode(meta).map_err(|e| e.to_string())?,
        snapshot: Bytes::from(plain).slice(meta_end..),
    })
}

fn remove(disk: &dyn Disk, path: &Path) -> Result<(), DiskError> {
    match disk.remove(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(DiskError::io("delete", path, error))
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures::FutureExt as _;
    use openraft::vote::RaftLeaderIdExt as _;
    use swarm_disk::SystemDisk;
    use swarm_identity::DataKey;

    fn meta(index: u64) -> SnapshotMeta {
        let term = openraft::impls::leader_id_std::LeaderId::<u64, u64>::new_committed(1, 1);
        SnapshotMeta {
            last_log_id: Some(LogId {
                leader_id: term,
                index,
            }),
            ..SnapshotMeta::default()
        }
    }

    #[tokio::test]
    async fn the_newest_snapshot_survives_and_older_ones_are_deleted() {
        let dir = tempfile::tempdir().unwrap();
        let sealer = Sealer::new(&DataKey::random());
        let (snapshots, found) =
            Snapshots::open(SystemDisk::shared(), dir.path(), sealer.clone()).unwrap();
        assert!(found.is_none());
        for (index, state) in [(10, &b"ten"[..]), (20, b"twenty"), (15, b"fifteen")] {
            let plain = pack(&meta(index), state).unwrap();
            snapshots.save(&meta(index), &plain).await.unwrap();
        }
        std::fs::write(dir.path().join("00000000000000000030.writing"), b"half").unwrap();

        let (snapshots, found) = Snapshots::open(SystemDisk::shared(), dir.path(), sealer).unwrap();
        let found = found.unwrap();
        assert_eq!(found.meta, meta(20));
        assert_eq!(found.snapshot.as_ref(), b"twenty");
        assert_eq!(snapshots.last(), meta(20).last_log_id);
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
    }

    #[tokio::test]
    async fn who_has_stopped_deletes_nothing_that_another_one_has_found() {
        let dir = tempfile::tempdir().unwrap();
        let sealer = Sealer::new(&DataKey::random());
        let (snapshots, _) =
            Snapshots::open(SystemDisk::shared(), dir.path(), sealer.clone()).unwrap();
        let plain = pack(&meta(10), b"ten").unwrap();
        snapshots.save(&meta(10), &plain).await.unwrap();
        let writing = snapshots.writing.clone().acquire_owned().await.unwrap();
        let mut close = Box::pin(snapshots.close());
        assert!(
            close.as_mut().now_or_never().is_none(),
            "one is being written"
        );
        drop(writing);
        close.await;
        let (next, _) = Snapshots::open(SystemDisk::shared(), dir.path(), sealer).unwrap();
        let plain = pack(&meta(20), b"twenty").unwrap();
        snapshots.save(&meta(20), &plain).await.unwrap();
        let found = next.newest().unwrap().unwrap();
        assert_eq!(found.meta, meta(10));
    }

    #[tokio::test]
    async fn a_damaged_snapshot_is_refused_with_its_name() {
        let dir = tempfile::tempdir().unwrap();
        let sealer = Sealer::new(&DataKey::random());
        let (snapshots, _) =
            Snapshots::open(SystemDisk::shared(), dir.path(), sealer.clone()).unwrap();
        let plain = pack(&meta(10), &[7; 4096]).unwrap();
        snapshots.save(&meta(10), &plain).await.unwrap();
        let file = std::fs::read_dir(dir.path()).unwrap().next().unwrap();
        let path = file.unwrap().path();
        let whole = std::fs::read(&path).unwrap();
        for place in [0, 8, 40, 2000, whole.len() - 1] {
            let mut damaged = whole.clone();
            damaged[place] ^= 1;
            std::fs::write(&path, damaged).unwrap();
            let error = Snapshots::open(SystemDisk::shared(), dir.path(), sealer.clone())
                .err()
                .unwrap();
            let name = path.file_name().unwrap().to_str().unwrap();
            assert!(error.to_string().contains(name), "{error}");
        }
    }
}
