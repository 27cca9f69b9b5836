//! What a node keeps, and how it is made durable: databases of ordered keys, and
//! files that are replaced whole.
//!
//! [`SystemDisk`] in production: sled, and the machine's files. A simulation puts
//! a disk here that loses what was not synced. Nothing here knows what is stored.
//!
//! Whatever waits for a disk is an `async` function that on the system's disk
//! blocks its thread and never yields: such work runs where [`Threads`] says.

#[cfg(any(test, feature = "testing"))]
pub mod memory;
mod system;
mod threads;

use std::fmt;
use std::io;
use std::ops::Bound;
use std::path::{Path, PathBuf};
use std::sync::Arc;

pub use system::SystemDisk;
#[cfg(feature = "testing")]
pub use system::leave_out_syncs;
pub use threads::{Blocking, Threads, Worker};

/// The files and databases of one host.
///
/// What is written is visible at once and durable after a sync; names, after a sync of their directory.
#[async_trait::async_trait]
pub trait Disk: fmt::Debug + Send + Sync + 'static {
    /// Makes a directory with its parents, for this user only, durably; one that is there is fine.
    ///
    /// # Errors
    /// The system's.
    fn create_dir(&self, dir: &Path) -> io::Result<()>;

    /// Removes a directory with all that is in it.
    ///
    /// # Errors
    /// The system's; [`io::ErrorKind::NotFound`] when there is none.
    fn remove_dir(&self, dir: &Path) -> io::Result<()>;

    /// Makes the names in a directory durable.
    ///
    /// # Errors
    /// The system's.
    async fn sync_dir(&self, dir: &Path) -> io::Result<()>;

    /// What is in a directory.
    ///
    /// # Errors
    /// The system's.
    fn list(&self, dir: &Path) -> io::Result<Vec<PathBuf>>;

    /// Whether there is a file or directory.
    fn exists(&self, path: &Path) -> bool;

    /// The whole of a file.
    ///
    /// # Errors
    /// The system's.
    fn read(&self, path: &Path) -> io::Result<Vec<u8>>;

    /// A file to write to: what is there, or a new empty one.
    ///
    /// # Errors
    /// The system's.
    fn open(&self, path: &Path) -> io::Result<Box<dyn File>>;

    /// Removes a file.
    ///
    /// # Errors
    /// The system's; [`io::ErrorKind::NotFound`] when there is none.
    fn remove(&self, path: &Path) -> io::Result<()>;

    /// Gives a file another name, in place of a file that may have it.
    ///
    /// # Errors
    /// The system's.
    fn rename(&self, from: &Path, to: &Path) -> io::Result<()>;

    /// Opens or makes the database in `dir`, with its directory's and the directory's own name durable.
    /// Waits for a predecessor in this process that is still being closed.
    ///
    /// # Errors
    /// It cannot be opened, or what is there cannot be read.
    async fn database(
        &self,
        dir: &Path,
        cache_bytes: u64,
    ) -> Result<Arc<dyn Database>, DatabaseError>;
}

/// An open file.
#[async_trait::async_trait]
pub trait File: fmt::Debug + Send + Sync + 'static {
    /// Writes all of this there.
    ///
    /// # Errors
    /// The system's.
    fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<()>;

    /// Returns when everything written is durable, with the length.
    ///
    /// # Errors
    /// The system's; what is durable is not known then.
    async fn sync(&self) -> io::Result<()>;
}

/// Why a database does not do what it is asked.
#[derive(Debug, thiserror::Error)]
pub enum DatabaseError {
    /// What is stored is not what was written.
    #[error("{0}")]
    Corrupt(String),
    /// The system's.
    #[error(transparent)]
    Io(#[from] io::Error),
}

/// Trees of ordered keys. Clones of its trees share it; it is closed with the last of them.
#[async_trait::async_trait]
pub trait Database: fmt::Debug + Send + Sync + 'static {
    /// The tree of this name, made if it is not there; `None` is the one that is always there.
    ///
    /// # Errors
    /// It cannot be read or made.
    fn tree(&self, name: Option<&str>) -> Result<Box<dyn Tree>, DatabaseError>;

    /// Returns when everything written before is durable.
    ///
    /// # Errors
    /// What is durable is not known then: nothing more must be written.
    async fn sync(&self) -> Result<(), DatabaseError>;

    /// The file that errors are about.
    fn path(&self) -> &Path;
}

/// Keys and values, one pair after the other.
pub type Pairs =
    Box<dyn DoubleEndedIterator<Item = Result<(Vec<u8>, Vec<u8>), DatabaseError>> + Send>;

/// What is to become of each key: its new value, or none.
pub type Changes = Vec<(Vec<u8>, Option<Vec<u8>>)>;

/// Keys in order.
pub trait Tree: fmt::Debug + Send + Sync + 'static {
    /// A value.
    ///
    /// # Errors
    /// It cannot be read.
    fn get(&self, key: &[u8]) -> Result<Option<Vec<u8>>, DatabaseError>;

    /// Writes a value.
    ///
    /// # Errors
    /// It is not known whether it is there.
    fn put(&self, key: &[u8], value: Vec<u8>) -> Result<(), DatabaseError>;

    /// Removes a key; one that is not there is fine.
    ///
    /// # Errors
    /// It is not known whether it is there.
    fn remove(&self, key: &[u8]) -> Result<(), DatabaseError>;

    /// Makes all of these changes, or none if a crash comes between.
    ///
    /// # Errors
    /// It is not known whether they are made.
    fn apply(&self, changes: Changes) -> Result<(), DatabaseError>;

    /// The pairs between these keys, in order. Changes made meanwhile may be seen or not.
    fn range(&self, from: Bound<&[u8]>, to: Bound<&[u8]>) -> Pairs;
}

/// Bytes of a [`Replacement`] that are not durable yet, at most. Who else waits for this disk waits for
/// these, too, and not for hundreds of megabytes.
const UNSYNCED_MAX: u64 = 4 << 20;

/// A file that is being written, and takes the place of the one that is there when it is whole.
#[derive(Debug)]
pub struct Replacement<'a> {
    disk: &'a dyn Disk,
    path: &'a Path,
    aside: &'a Path,
    file: Box<dyn File>,
    offset: u64,
    synced: u64,
}

impl<'a> Replacement<'a> {
    /// Begins an empty one. `aside` is the name it has until it is whole.
    ///
    /// # Errors
    /// The system's.
    pub fn begin(disk: &'a dyn Disk, path: &'a Path, aside: &'a Path) -> io::Result<Self> {
        match disk.remove(aside) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        Ok(Self {
            disk,
            path,
            aside,
            file: disk.open(aside)?,
            offset: 0,
            synced: 0,
        })
    }

    /// Writes all of this behind what was written before.
    ///
    /// # Errors
    /// The system's.
    pub async fn append(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.file.write_at(bytes, self.offset)?;
        self.offset += bytes.len() as u64;
        if self.offset - self.synced >= UNSYNCED_MAX {
            self.file.sync().await?;
            self.synced = self.offset;
        }
        Ok(())
    }

    /// Puts it in its place, durably: a crash leaves the old file or this one.
    ///
    /// # Errors
    /// The system's; the old file is there then, or this one.
    pub async fn finish(self) -> io::Result<()> {
        self.file.sync().await?;
        self.disk.rename(self.aside, self.path)?;
        match self.path.parent() {
            Some(dir) => self.disk.sync_dir(dir).await,
            None => Ok(()),
        }
    }
}

/// Puts a file with this content in the place of the one that is there, as a [`Replacement`] does.
///
/// # Errors
/// The system's; the old one is there then, or the new one.
pub async fn replace(
    disk: &dyn Disk,
    path: &Path,
    aside: &Path,
    content: &[&[u8]],
) -> io::Result<()> {
    let mut file = Replacement::begin(disk, path, aside)?;
    for part in content {
        file.append(part).await?;
    }
    file.finish().await
}
