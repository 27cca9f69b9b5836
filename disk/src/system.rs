//! The machine's own disk: plain files, and sled for the databases.
//!
//! sled calls what it has written "stable" after `sync_file_range`, which makes
//! nothing durable, and from then on may write over what it has moved elsewhere:
//! an fdatasync later would not bring it back. So [`sync_file_range`] is ours
//! here, and syncs; so is [`rename`], which keeps the name of sled's own index. What
//! sled leaves when it is cut short while it is made or opened is dealt with before it
//! sees it. A sled page over 128 KiB becomes a file in `blobs/` that nothing syncs;
//! keeping values far below that is the caller's affair. sled reports some damage by a
//! panic, which is caught here.

use std::ffi::{CStr, OsStr};
use std::fs;
use std::io;
use std::ops::Bound;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::{DirBuilderExt as _, FileExt as _};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
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
        match fs::DirBuilder::new().mode(0o700).create(dir) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                self.create_dir(parent(dir)?)?;
                return self.create_dir(dir);
            }
            Err(_) if dir.is_dir() => {}
            result => result?,
        }
        // Also of one that was there: whoever made it may have been killed before this.
        sync_dir(parent(dir)?)
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
        sled_syncs()?;
        let path = dir.join("db");
        if !path.exists() {
            make_sled(self, dir)?;
        }
        let db = open_sled(dir, cache_bytes)?;
        // sled has renamed and deleted.
        sync_dir(dir)?;
        Ok(Arc::new(Sled { db, path }))
    }
}

fn parent(path: &Path) -> io::Result<&Path> {
    match path.parent() {
        // A relative path of one part.
        Some(parent) if parent.as_os_str().is_empty() => Ok(Path::new(".")),
        Some(parent) => Ok(parent),
        None => Err(io::ErrorKind::InvalidInput.into()),
    }
}

fn sync_dir(dir: &Path) -> io::Result<()> {
    if syncs_are_left_out() {
        return Ok(());
    }
    fs::File::open(dir).and_then(|handle| handle.sync_all())
}

/// How often sled has called them.
static SLED_SYNCED: AtomicU64 = AtomicU64::new(0);

/// In the place of libc's, for sled, which takes it for a sync of the range: here it is one, of the
/// whole file, with its length. Nothing else of a node calls it. The linker takes what a program
/// defines before what libc does.
// SAFETY: the signature is libc's, and so is all that a caller may rely on: what was written is on
// its way to the disk, or there is an error.
#[unsafe(no_mangle)]
pub extern "C" fn sync_file_range(
    file: libc::c_int,
    _offset: libc::off64_t,
    _length: libc::off64_t,
    _flags: libc::c_uint,
) -> libc::c_int {
    SLED_SYNCED.fetch_add(1, Ordering::Relaxed);
    if syncs_are_left_out() {
        return 0;
    }
    // SAFETY: takes any number, and fails for one that is no open file.
    unsafe { libc::fdatasync(file) }
}

/// In the place of libc's, for sled: a new index of its own must have its name for good before sled
/// wipes segments that it no longer needs by that index, or the old index finds a hole where the log
/// goes on, and sled drops everything behind it. All other files are renamed as ever.
///
/// # Safety
/// As libc's: both are strings that end with a zero.
// SAFETY: does what libc's does, by another of its functions; then at most fails where libc's would
// not, as it may.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn rename(from: *const libc::c_char, to: *const libc::c_char) -> libc::c_int {
    SLED_SYNCED.fetch_add(1, Ordering::Relaxed);
    // SAFETY: the caller's strings, for the same use.
    let renamed = unsafe { libc::renameat(libc::AT_FDCWD, from, libc::AT_FDCWD, to) };
    if renamed != 0 {
        return renamed;
    }
    // SAFETY: it was good enough for renameat.
    let to = unsafe { CStr::from_ptr(to) };
    let to = Path::new(OsStr::from_bytes(to.to_bytes()));
    let index = |name: &OsStr| name.as_bytes().starts_with(b"snap.");
    if !to.file_name().is_some_and(index) {
        return 0;
    }
    match parent(to).and_then(sync_dir) {
        Ok(()) => 0,
        Err(error) => {
            // SAFETY: this thread's own.
            unsafe { *libc::__errno_location() = error.raw_os_error().unwrap_or(libc::EIO) };
            -1
        }
    }
}

/// Makes sure that what sled calls are the functions above.
fn sled_syncs() -> io::Result<()> {
    let before = SLED_SYNCED.load(Ordering::Relaxed);
    // SAFETY: takes any number, and fails for one that is no open file.
    unsafe { libc::sync_file_range(-1, 0, 0, 0) };
    let between = SLED_SYNCED.load(Ordering::Relaxed);
    // Fails: there is no such name.
    let _ = fs::rename("", "");
    if between == before || SLED_SYNCED.load(Ordering::Relaxed) == between {
        return Err(io::Error::other(
            "this build writes databases that a power cut would destroy: it calls libc's functions",
        ));
    }
    Ok(())
}

/// Makes an empty database, all of it or nothing: sled does not sync what it makes, and refuses
/// a half of it.
fn make_sled(disk: &SystemDisk, dir: &Path) -> Result<(), DatabaseError> {
    disk.create_dir(parent(dir)?)?;
    let aside = dir.with_extension("making");
    if aside.exists() {
        fs::remove_dir_all(&aside)?;
    }
    disk.create_dir(&aside)?;
    let db = open_sled(&aside, 1 << 20)?;
    guarded(|| db.flush())?;
    drop(db);
    for file in disk.list(&aside)? {
        if file.is_file() {
            fs::File::open(&file)?.sync_all()?;
        }
    }
    sync_dir(&aside)?;
    match fs::rename(&aside, dir) {
        // What is there is none of ours, or has lost its file: sled makes do with it, and whoever
        // keeps things in it finds out that they are gone.
        Err(error)
            if matches!(
                error.kind(),
                io::ErrorKind::DirectoryNotEmpty | io::ErrorKind::AlreadyExists
            ) =>
        {
            fs::remove_dir_all(&aside)?;
        }
        result => result?,
    }
    Ok(sync_dir(parent(dir)?)?)
}

#[cfg(not(feature = "testing"))]
const fn syncs_are_left_out() -> bool {
    false
}

#[cfg(feature = "testing")]
fn syncs_are_left_out() -> bool {
    LEFT_OUT.load(Ordering::Relaxed)
}

#[cfg(feature = "testing")]
static LEFT_OUT: std::sync::atomic::AtomicBool = std::sync::atomic::AtomicBool::new(false);

/// From now on nothing in this process is synced: what tests of power cuts must find out.
#[cfg(feature = "testing")]
pub fn leave_out_syncs() {
    LEFT_OUT.store(true, Ordering::Relaxed);
}

#[async_trait::async_trait]
impl File for fs::File {
    fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        self.write_all_at(bytes, offset)
    }

    async fn sync(&self) -> io::Result<()> {
        if syncs_are_left_out() {
            return Ok(());
        }
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
        // Waits until all is written, by calls that sync; see above.
        guarded(|| self.db.flush()).map(drop)
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
