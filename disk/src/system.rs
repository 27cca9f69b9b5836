//! The machine's own disk: plain files, and sled for the databases.
//!
//! sled's `flush` is no fsync on Linux: [`Database::sync`] adds an fdatasync of
//! sled's file through a handle of our own. A sled page over 128 KiB becomes a
//! file in `blobs/` that nothing syncs; keeping values far below that is the
//! caller's affair. sled reports some damage by a panic, which is caught here.
//! A crash or a full disk leaves an unfinished snapshot of sled's own tables, which
//! sled then takes for the newest one: it is removed before sled looks.

use std::fs;
use std::io;
use std::ops::Bound;
use std::os::unix::fs::{DirBuilderExt as _, FileExt as _};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::{Changes, Database, DatabaseError, Disk, File, Pairs, Tree};

/// How long a lock left by a predecessor that is still being dropped is waited for.
const LOCK_PATIENCE: Duration = Duration::from_secs(5);
/// Between two looks at the lock, which cannot be waited for.
const LOCK_LOOK: Duration = Duration::from_millis(20);

/// The machine's disk.
#[derive(Clone, Copy, Debug, Default)]
pub struct SystemDisk;

impl SystemDisk {
    /// To give away.
    #[must_use]
    pub fn shared() -> Arc<dyn Disk> {
        Arc::new(Self)
    }
}

#[async_trait::async_trait]
impl Disk for SystemDisk {
    fn create_dir(&self, dir: &Path) -> io::Result<()> {
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(dir)
    }

    fn remove_dir(&self, dir: &Path) -> io::Result<()> {
        fs::remove_dir_all(dir)
    }

    async fn sync_dir(&self, dir: &Path) -> io::Result<()> {
        sync_dir(dir)
    }

    fn list(&self, dir: &Path) -> io::Result<Vec<PathBuf>> {
        fs::read_dir(dir)?.map(|item| Ok(item?.path())).collect()
    }

    fn exists(&self, path: &Path) -> bool {
        path.exists()
    }

    fn read(&self, path: &Path) -> io::Result<Vec<u8>> {
        fs::read(path)
    }

    fn open(&self, path: &Path) -> io::Result<Box<dyn File>> {
        let file = fs::OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(path)?;
        Ok(Box::new(file))
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        fs::remove_file(path)
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        fs::rename(from, to)
    }

    async fn database(
        &self,
        dir: &Path,
        cache_bytes: u64,
    ) -> Result<Arc<dyn Database>, DatabaseError> {
        self.create_dir(dir)?;
        let db = open_sled(dir, cache_bytes)?;
        let path = dir.join("db");
        let file = fs::OpenOptions::new().read(true).write(true).open(&path)?;
        // The names of what was just created.
        sync_dir(dir)?;
        if let Some(parent) = dir.parent() {
            sync_dir(parent)?;
        }
        Ok(Arc::new(Sled { db, file, path }))
    }
}

fn sync_dir(dir: &Path) -> io::Result<()> {
    fs::File::open(dir).and_then(|handle| handle.sync_all())
}

#[async_trait::async_trait]
impl File for fs::File {
    fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        self.write_all_at(bytes, offset)
    }

    async fn sync(&self) -> io::Result<()> {
        self.sync_data()
    }
}

impl From<sled::Error> for DatabaseError {
    fn from(error: sled::Error) -> Self {
        match error {
            sled::Error::Io(error) if error.kind() != io::ErrorKind::InvalidData => Self::Io(error),
            other => Self::Corrupt(other.to_string()),
        }
    }
}

/// sled reports some damage by a panic.
fn guarded<T>(work: impl FnOnce() -> sled::Result<T>) -> Result<T, DatabaseError> {
    match catch_unwind(AssertUnwindSafe(work)) {
        Ok(result) => Ok(result?),
        Err(_) => Err(DatabaseError::Corrupt("sled gave up on it".to_owned())),
    }
}

fn open_sled(dir: &Path, cache_bytes: u64) -> Result<sled::Db, DatabaseError> {
    let config = sled::Config::new()
        .path(dir)
        .mode(sled::Mode::LowSpace)
        .cache_capacity(cache_bytes)
        .flush_every_ms(None);
    let give_up = Instant::now() + LOCK_PATIENCE;
    loop {
        forget_unfinished(dir)?;
        match guarded(|| config.open()) {
            Err(DatabaseError::Io(error))
                if error.kind() == io::ErrorKind::WouldBlock
                    || error.to_string().contains("lock") =>
            {
                if Instant::now() >= give_up {
                    return Err(DatabaseError::Io(error));
                }
                std::thread::sleep(LOCK_LOOK);
            }
            result => return result,
        }
    }
}

/// Removes what sled was writing when it ended, unless another handle still has the database.
fn forget_unfinished(dir: &Path) -> io::Result<()> {
    let lock = match fs::File::open(dir.join("db")) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(error),
    };
    // The same lock as sled's; it is given back before sled takes it.
    if lock.try_lock().is_err() {
        return Ok(());
    }
    for item in fs::read_dir(dir)? {
        let path = item?.path();
        if path.extension().is_some_and(|end| end == "generating") {
            fs::remove_file(path)?;
        }
    }
    lock.unlock()
}

struct Sled {
    db: sled::Db,
    /// sled's own file, to sync it.
    file: fs::File,
    path: PathBuf,
}

impl std::fmt::Debug for Sled {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Sled({})", self.path.display())
    }
}

#[async_trait::async_trait]
impl Database for Sled {
    fn tree(&self, name: Option<&str>) -> Result<Box<dyn Tree>, DatabaseError> {
        let tree = match name {
            Some(name) => guarded(|| self.db.open_tree(name))?,
            None => (*self.db).clone(),
        };
        Ok(Box::new(SledTree {
            tree,
            _db: self.db.clone(),
        }))
    }

    async fn sync(&self) -> Result<(), DatabaseError> {
        guarded(|| self.db.flush())?;
        Ok(self.file.sync_data()?)
    }

    fn path(&self) -> &Path {
        &self.path
    }
}

struct SledTree {
    tree: sled::Tree,
    /// The database is closed with the last handle of it.
    _db: sled::Db,
}

impl std::fmt::Debug for SledTree {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "SledTree({})",
            String::from_utf8_lossy(&self.tree.name())
        )
    }
}

impl Tree for SledTree {
    fn get(&self, key: &[u8]) -> Result<Option<Vec<u8>>, DatabaseError> {
        Ok(guarded(|| self.tree.get(key))?.map(|value| value.to_vec()))
    }

    fn put(&self, key: &[u8], value: Vec<u8>) -> Result<(), DatabaseError> {
        guarded(|| self.tree.insert(key, value)).map(drop)
    }

    fn remove(&self, key: &[u8]) -> Result<(), DatabaseError> {
        guarded(|| self.tree.remove(key)).map(drop)
    }

    fn apply(&self, changes: Changes) -> Result<(), DatabaseError> {
        let mut batch = sled::Batch::default();
        for (key, value) in changes {
            match value {
                Some(value) => batch.insert(key, value),
                None => batch.remove(key),
            }
        }
        guarded(|| self.tree.apply_batch(batch))
    }

    fn range(&self, from: Bound<&[u8]>, to: Bound<&[u8]>) -> Pairs {
        Box::new(SledPairs(self.tree.range::<&[u8], _>((from, to))))
    }
}

struct SledPairs(sled::Iter);

type Pair = Result<(Vec<u8>, Vec<u8>), DatabaseError>;

fn pair(next: impl FnOnce() -> Option<sled::Result<(sled::IVec, sled::IVec)>>) -> Option<Pair> {
    match guarded(|| next().transpose()) {
        Ok(pair) => pair.map(|(key, value)| Ok((key.to_vec(), value.to_vec()))),
        Err(error) => Some(Err(error)),
    }
}

impl Iterator for SledPairs {
    type Item = Pair;

    fn next(&mut self) -> Option<Pair> {
        pair(|| self.0.next())
    }
}

impl DoubleEndedIterator for SledPairs {
    fn next_back(&mut self) -> Option<Pair> {
        pair(|| self.0.next_back())
    }
}

#[cfg(test)]
mod tests {
    use futures::executor::block_on;

    use super::*;

    #[test]
    fn what_sled_did_not_finish_is_no_damage() {
        let dir = tempfile::tempdir().unwrap();
        let dir = dir.path().join("log");
        let open = || block_on(SystemDisk.database(&dir, 1 << 20)).unwrap();
        open()
            .tree(None)
            .unwrap()
            .put(b"key", b"value".to_vec())
            .unwrap();
        // What a crash, or a disk without space, leaves behind.
        let unfinished = dir.join("snap.FFFFFFFFFFFFFFF0.generating");
        fs::write(&unfinished, b"").unwrap();
        let database = open();
        let value = database.tree(None).unwrap().get(b"key").unwrap();
        assert_eq!(value.as_deref(), Some(&b"value"[..]));
        assert!(!unfinished.exists());
        // Not under the feet of one that is at work.
        fs::write(&unfinished, b"").unwrap();
        forget_unfinished(&dir).unwrap();
        assert!(unfinished.exists());
    }
}
