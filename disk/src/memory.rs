//! A disk in memory that knows what was synced: for tests and simulations.
//!
//! [`MemoryDisk::crash`] leaves what a power cut would: everything synced, and of the rest, by
//! dice, a beginning of it in the order in which it was written (per database; per name), with
//! files torn between sectors. Databases apply a batch whole or not at all, as sled does.
//! Directories themselves are durable at once, and what [`Disk::remove_dir`] removes stays removed.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::fmt;
use std::io;
use std::ops::Bound;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use parking_lot::Mutex;

use crate::{Changes, Database, DatabaseError, Disk, File, Pairs, Tree};

/// Sectors are written whole.
const SECTOR: usize = 512;

/// How long a disk takes, and when it fails.
#[async_trait::async_trait]
pub trait Weather: Send + Sync + 'static {
    /// Before a sync of this file, directory or database counts; an error fails it.
    ///
    /// # Errors
    /// What the caller gets; nothing is durable by it then.
    async fn sync(&self, path: &Path) -> io::Result<()>;

    /// Before a write; an error fails it, and nothing is written.
    ///
    /// # Errors
    /// What the caller gets.
    fn write(&self, path: &Path) -> io::Result<()>;
}

/// Everything at once, and nothing fails.
#[derive(Clone, Copy, Debug, Default)]
pub struct Calm;

#[async_trait::async_trait]
impl Weather for Calm {
    async fn sync(&self, _: &Path) -> io::Result<()> {
        Ok(())
    }

    fn write(&self, _: &Path) -> io::Result<()> {
        Ok(())
    }
}

/// The disk. Clones share it.
#[derive(Clone)]
pub struct MemoryDisk {
    state: Arc<Mutex<State>>,
    weather: Arc<dyn Weather>,
}

impl fmt::Debug for MemoryDisk {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("MemoryDisk")
    }
}

#[derive(Default)]
struct State {
    dirs: BTreeSet<PathBuf>,
    names: BTreeMap<PathBuf, u64>,
    durable_names: BTreeMap<PathBuf, u64>,
    /// Changes of names that are not durable, in order.
    naming: Vec<Naming>,
    files: BTreeMap<u64, Content>,
    next_file: u64,
    databases: BTreeMap<PathBuf, Trees>,
    synced: u64,
}

#[derive(Clone)]
enum Naming {
    Link(PathBuf, u64),
    Unlink(PathBuf),
    Rename(PathBuf, PathBuf, u64),
}

impl Naming {
    fn is_in(&self, dir: &Path) -> bool {
        let (Self::Link(path, _) | Self::Unlink(path) | Self::Rename(_, path, _)) = self;
        path.parent() == Some(dir)
    }

    fn apply(&self, names: &mut BTreeMap<PathBuf, u64>) {
        match self {
            Self::Link(path, file) => {
                names.insert(path.clone(), *file);
            }
            Self::Unlink(path) => {
                names.remove(path);
            }
            Self::Rename(from, to, file) => {
                names.remove(from);
                names.insert(to.clone(), *file);
            }
        }
    }
}

#[derive(Clone, Default)]
struct Content {
    data: Vec<u8>,
    durable: Vec<u8>,
}

type Map = BTreeMap<Vec<u8>, Vec<u8>>;

#[derive(Default)]
struct Trees {
    now: BTreeMap<String, Map>,
    durable: BTreeMap<String, Map>,
    /// Changes that are not durable, oldest first, and the number of the first.
    pending: VecDeque<(String, Changes)>,
    first: u64,
}

fn apply(trees: &mut BTreeMap<String, Map>, name: &str, changes: &Changes) {
    let tree = trees.entry(name.to_owned()).or_default();
    for (key, value) in changes {
        match value {
            Some(value) => {
                tree.insert(key.clone(), value.clone());
            }
            None => {
                tree.remove(key);
            }
        }
    }
}

impl Trees {
    fn change(&mut self, name: &str, changes: Changes) {
        apply(&mut self.now, name, &changes);
        self.pending.push_back((name.to_owned(), changes));
    }

    /// The first `count` changes that are pending become durable.
    fn settle(&mut self, count: usize) {
        for (name, changes) in self.pending.drain(..count.min(self.pending.len())) {
            apply(&mut self.durable, &name, &changes);
            self.first += 1;
        }
    }
}

impl Default for MemoryDisk {
    fn default() -> Self {
        Self::new(Arc::new(Calm))
    }
}

impl MemoryDisk {
    /// An empty one.
    #[must_use]
    pub fn new(weather: Arc<dyn Weather>) -> Self {
        Self {
            state: Arc::default(),
            weather,
        }
    }

    /// How many syncs have been completed.
    #[must_use]
    pub fn syncs(&self) -> u64 {
        self.state.lock().synced
    }

    /// Everything is gone, as on a new machine.
    pub fn wipe(&self) {
        *self.state.lock() = State::default();
    }

    /// What a power cut leaves. `dice(n)` chooses a number from 0 to `n`, both included: always 0
    /// keeps only what was synced, always `n` loses nothing. Whoever used the disk must be gone.
    pub fn crash(&self, dice: &mut dyn FnMut(usize) -> usize) {
        let mut state = self.state.lock();
        let state = &mut *state;
        let survive = dice(state.naming.len());
        for change in state.naming.drain(..).take(survive) {
            change.apply(&mut state.durable_names);
        }
        state.names = state.durable_names.clone();
        let named: BTreeSet<u64> = state.names.values().copied().collect();
        state.files.retain(|file, _| named.contains(file));
        for content in state.files.values_mut() {
            if content.data != content.durable {
                // Sectors from the beginning are the new ones, the rest are the old ones.
                let sectors = content.data.len().div_ceil(SECTOR);
                let kept = match dice(sectors) {
                    all if all == sectors => content.data.len(),
                    some => some * SECTOR,
                };
                let mut left = content.data[..kept].to_vec();
                if kept < content.data.len() {
                    left.extend_from_slice(content.durable.get(kept..).unwrap_or_default());
                }
                content.data = left.clone();
                content.durable = left;
            }
        }
        for trees in state.databases.values_mut() {
            let survive = dice(trees.pending.len());
            trees.settle(survive);
            trees.first += trees.pending.len() as u64;
            trees.pending.clear();
            trees.now = trees.durable.clone();
        }
    }
}

fn not_found(path: &Path) -> io::Error {
    io::Error::new(io::ErrorKind::NotFound, path.display().to_string())
}

#[async_trait::async_trait]
impl Disk for MemoryDisk {
    fn create_dir(&self, dir: &Path) -> io::Result<()> {
        self.weather.write(dir)?;
        let mut state = self.state.lock();
        state.dirs.extend(dir.ancestors().map(Path::to_owned));
        Ok(())
    }

    fn remove_dir(&self, dir: &Path) -> io::Result<()> {
        self.weather.write(dir)?;
        let mut state = self.state.lock();
        if !state.dirs.contains(dir) {
            return Err(not_found(dir));
        }
        state.dirs.retain(|path| !path.starts_with(dir));
        state.names.retain(|path, _| !path.starts_with(dir));
        state.durable_names.retain(|path, _| !path.starts_with(dir));
        let inside = |naming: &Naming| {
            let (Naming::Link(path, _) | Naming::Unlink(path) | Naming::Rename(_, path, _)) =
                naming;
            path.starts_with(dir)
        };
        state.naming.retain(|naming| !inside(naming));
        state.databases.retain(|path, _| !path.starts_with(dir));
        Ok(())
    }

    async fn sync_dir(&self, dir: &Path) -> io::Result<()> {
        let count = self.state.lock().naming.len();
        self.weather.sync(dir).await?;
        let mut state = self.state.lock();
        let state = &mut *state;
        let mut left = Vec::new();
        for (number, change) in state.naming.drain(..).enumerate() {
            if number < count && change.is_in(dir) {
                change.apply(&mut state.durable_names);
            } else {
                left.push(change);
            }
        }
        state.naming = left;
        state.synced += 1;
        Ok(())
    }

    fn list(&self, dir: &Path) -> io::Result<Vec<PathBuf>> {
        let state = self.state.lock();
        if !state.dirs.contains(dir) {
            return Err(not_found(dir));
        }
        let inside = |path: &&PathBuf| path.parent() == Some(dir);
        let files = state.names.keys().filter(inside);
        Ok(files
            .chain(state.dirs.iter().filter(inside))
            .cloned()
            .collect())
    }

    fn exists(&self, path: &Path) -> bool {
        let state = self.state.lock();
        state.names.contains_key(path) || state.dirs.contains(path)
    }

    fn read(&self, path: &Path) -> io::Result<Vec<u8>> {
        let state = self.state.lock();
        let file = state.names.get(path).ok_or_else(|| not_found(path))?;
        Ok(state.files[file].data.clone())
    }

    fn open(&self, path: &Path) -> io::Result<Box<dyn File>> {
        self.weather.write(path)?;
        let mut state = self.state.lock();
        let file = match state.names.get(path) {
            Some(&file) => file,
            None => {
                let file = state.next_file;
                state.next_file += 1;
                state.files.insert(file, Content::default());
                state.names.insert(path.to_owned(), file);
                state.naming.push(Naming::Link(path.to_owned(), file));
                file
            }
        };
        Ok(Box::new(MemoryFile {
            disk: self.clone(),
            path: path.to_owned(),
            file,
        }))
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        self.weather.write(path)?;
        let mut state = self.state.lock();
        state.names.remove(path).ok_or_else(|| not_found(path))?;
        state.naming.push(Naming::Unlink(path.to_owned()));
        Ok(())
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        self.weather.write(to)?;
        let mut state = self.state.lock();
        let file = state.names.remove(from).ok_or_else(|| not_found(from))?;
        state.names.insert(to.to_owned(), file);
        let change = Naming::Rename(from.to_owned(), to.to_owned(), file);
        state.naming.push(change);
        Ok(())
    }

    async fn database(&self, dir: &Path, _: u64) -> Result<Arc<dyn Database>, DatabaseError> {
        self.create_dir(dir)?;
        let mut state = self.state.lock();
        state.databases.entry(dir.to_owned()).or_default();
        Ok(Arc::new(MemoryDatabase {
            disk: self.clone(),
            dir: dir.to_owned(),
            path: dir.join("db"),
        }))
    }
}

#[derive(Debug)]
struct MemoryFile {
    disk: MemoryDisk,
    path: PathBuf,
    file: u64,
}

#[async_trait::async_trait]
impl File for MemoryFile {
    fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        self.disk.weather.write(&self.path)?;
        let mut state = self.disk.state.lock();
        // Whatever is written to a file that has no name any more is nobody's.
        if let Some(content) = state.files.get_mut(&self.file) {
            let start = usize::try_from(offset).map_err(io::Error::other)?;
            let end = start + bytes.len();
            if content.data.len() < end {
                content.data.resize(end, 0);
            }
            content.data[start..end].copy_from_slice(bytes);
        }
        Ok(())
    }

    async fn sync(&self) -> io::Result<()> {
        let data = {
            let state = self.disk.state.lock();
            state
                .files
                .get(&self.file)
                .map(|content| content.data.clone())
        };
        self.disk.weather.sync(&self.path).await?;
        let mut state = self.disk.state.lock();
        state.synced += 1;
        if let (Some(content), Some(data)) = (state.files.get_mut(&self.file), data) {
            content.durable = data;
        }
        Ok(())
    }
}

#[derive(Debug)]
struct MemoryDatabase {
    disk: MemoryDisk,
    dir: PathBuf,
    path: PathBuf,
}

#[async_trait::async_trait]
impl Database for MemoryDatabase {
    fn tree(&self, name: Option<&str>) -> Result<Box<dyn Tree>, DatabaseError> {
        Ok(Box::new(MemoryTree {
            disk: self.disk.clone(),
            dir: self.dir.clone(),
            name: name.unwrap_or_default().to_owned(),
        }))
    }

    async fn sync(&self) -> Result<(), DatabaseError> {
        let upto = {
            let state = self.disk.state.lock();
            let trees = state.databases.get(&self.dir);
            trees.map_or(0, |trees| trees.first + trees.pending.len() as u64)
        };
        self.disk.weather.sync(&self.path).await?;
        let mut state = self.disk.state.lock();
        state.synced += 1;
        if let Some(trees) = state.databases.get_mut(&self.dir) {
            let count = upto.saturating_sub(trees.first);
            trees.settle(usize::try_from(count).unwrap_or(usize::MAX));
        }
        Ok(())
    }

    fn path(&self) -> &Path {
        &self.path
    }
}

#[derive(Debug)]
struct MemoryTree {
    disk: MemoryDisk,
    dir: PathBuf,
    name: String,
}

impl Tree for MemoryTree {
    fn get(&self, key: &[u8]) -> Result<Option<Vec<u8>>, DatabaseError> {
        let state = self.disk.state.lock();
        let trees = state.databases.get(&self.dir);
        let tree = trees.and_then(|trees| trees.now.get(&self.name));
        Ok(tree.and_then(|tree| tree.get(key)).cloned())
    }

    fn put(&self, key: &[u8], value: Vec<u8>) -> Result<(), DatabaseError> {
        self.apply(vec![(key.to_vec(), Some(value))])
    }

    fn remove(&self, key: &[u8]) -> Result<(), DatabaseError> {
        self.apply(vec![(key.to_vec(), None)])
    }

    fn apply(&self, changes: Changes) -> Result<(), DatabaseError> {
        self.disk.weather.write(&self.dir)?;
        let mut state = self.disk.state.lock();
        if let Some(trees) = state.databases.get_mut(&self.dir) {
            trees.change(&self.name, changes);
        }
        Ok(())
    }

    fn range(&self, from: Bound<&[u8]>, to: Bound<&[u8]>) -> Pairs {
        Box::new(MemoryPairs {
            disk: self.disk.clone(),
            dir: self.dir.clone(),
            name: self.name.clone(),
            from: from.map(<[u8]>::to_vec),
            to: to.map(<[u8]>::to_vec),
        })
    }
}

/// What is left of a range: each step looks at the tree as it is then.
struct MemoryPairs {
    disk: MemoryDisk,
    dir: PathBuf,
    name: String,
    from: Bound<Vec<u8>>,
    to: Bound<Vec<u8>>,
}

impl MemoryPairs {
    fn step(&self, back: bool) -> Option<(Vec<u8>, Vec<u8>)> {
        let (from, to) = (self.from.as_ref(), self.to.as_ref());
        // A range that ends before it begins would panic.
        if let (
            Bound::Included(from) | Bound::Excluded(from),
            Bound::Included(to) | Bound::Excluded(to),
        ) = (from, to)
            && (from > to
                || (from == to
                    && !matches!(
                        (&self.from, &self.to),
                        (Bound::Included(_), Bound::Included(_))
                    )))
        {
            return None;
        }
        let state = self.disk.state.lock();
        let tree = state.databases.get(&self.dir)?.now.get(&self.name)?;
        let mut range = tree.range::<Vec<u8>, _>((from, to));
        let found = if back {
            range.next_back()
        } else {
            range.next()
        };
        found.map(|(key, value)| (key.clone(), value.clone()))
    }
}

impl Iterator for MemoryPairs {
    type Item = Result<(Vec<u8>, Vec<u8>), DatabaseError>;

    fn next(&mut self) -> Option<Self::Item> {
        let found = self.step(false)?;
        self.from = Bound::Excluded(found.0.clone());
        Some(Ok(found))
    }
}

impl DoubleEndedIterator for MemoryPairs {
    fn next_back(&mut self) -> Option<Self::Item> {
        let found = self.step(true)?;
        self.to = Bound::Excluded(found.0.clone());
        Some(Ok(found))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{SystemDisk, replace};
    use futures::FutureExt as _;

    fn now<T>(work: impl Future<Output = T>) -> T {
        work.now_or_never().expect("this disk does not wait")
    }

    /// The same calls give the same answers on both disks.
    #[test]
    fn the_disk_in_memory_behaves_as_the_machine_s() {
        let temp = tempfile::tempdir().unwrap();
        let memory = MemoryDisk::default();
        memory.create_dir(temp.path()).unwrap();
        let disks: [&dyn Disk; 2] = [&SystemDisk, &memory];
        for disk in disks {
            let dir = temp.path().join("one/two");
            assert!(!disk.exists(&dir));
            disk.create_dir(&dir).unwrap();
            disk.create_dir(&dir).unwrap();
            let (file, aside) = (dir.join("file"), dir.join("file.new"));
            assert_eq!(
                disk.read(&file).unwrap_err().kind(),
                io::ErrorKind::NotFound
            );
            now(replace(disk, &file, &aside, &[b"long ", b"content"])).unwrap();
            now(replace(disk, &file, &aside, &[b"short"])).unwrap();
            assert_eq!(disk.read(&file).unwrap(), b"short");
            disk.open(&file).unwrap().write_at(b"f", 2).unwrap();
            assert_eq!(disk.read(&file).unwrap(), b"shfrt");
            assert_eq!(disk.list(&dir).unwrap(), std::slice::from_ref(&file));
            disk.remove(&file).unwrap();
            assert_eq!(
                disk.remove(&file).unwrap_err().kind(),
                io::ErrorKind::NotFound
            );

            let db = now(disk.database(&dir.join("db"), 1 << 20)).unwrap();
            let tree = db.tree(Some("a")).unwrap();
            for key in [1u8, 3, 2, 9] {
                tree.put(&[key], vec![key; 3]).unwrap();
            }
            tree.apply(vec![(vec![3], None), (vec![4], Some(vec![]))])
                .unwrap();
            tree.remove(&[200]).unwrap();
            now(db.sync()).unwrap();
            assert_eq!(tree.get(&[9]).unwrap(), Some(vec![9; 3]));
            let keys = |pairs: Pairs| -> Vec<u8> { pairs.map(|pair| pair.unwrap().0[0]).collect() };
            assert_eq!(
                keys(tree.range(Bound::Unbounded, Bound::Unbounded)),
                [1, 2, 4, 9]
            );
            assert_eq!(
                keys(tree.range(Bound::Excluded(&[1]), Bound::Included(&[4]))),
                [2, 4]
            );
            let mut below = tree.range(Bound::Unbounded, Bound::Included(&[8]));
            assert_eq!(below.next_back().unwrap().unwrap().0, [4]);
            assert!(db.tree(None).unwrap().get(&[1]).unwrap().is_none());
            drop((tree, db, below));
            let again = now(disk.database(&dir.join("db"), 1 << 20)).unwrap();
            assert_eq!(
                again.tree(Some("a")).unwrap().get(&[2]).unwrap(),
                Some(vec![2; 3])
            );
        }
    }

    #[test]
    fn a_crash_keeps_what_was_synced_and_at_most_a_beginning_of_the_rest() {
        for survive in 0..4 {
            let disk = MemoryDisk::default();
            let dir = Path::new("/d");
            let db = now(disk.database(dir, 0)).unwrap();
            let tree = db.tree(None).unwrap();
            tree.put(b"a", vec![1]).unwrap();
            now(db.sync()).unwrap();
            for key in [b"b", b"c", b"d"] {
                tree.put(key, vec![1]).unwrap();
            }
            disk.crash(&mut |most| survive.min(most));
            let left = tree.range(Bound::Unbounded, Bound::Unbounded).count();
            assert_eq!(left, 1 + survive);
            assert!(tree.get(b"a").unwrap().is_some());
        }
    }

    #[test]
    fn a_large_file_becomes_durable_while_it_is_written() {
        let disk = MemoryDisk::default();
        let (path, aside) = (Path::new("file"), Path::new("aside"));
        let mut file = crate::Replacement::begin(&disk, path, aside).unwrap();
        let part = vec![7; 1 << 20];
        for parts in 1..=9 {
            now(file.append(&part)).unwrap();
            assert_eq!(disk.syncs(), parts / 4, "after {parts} MiB");
        }
        now(file.finish()).unwrap();
        assert_eq!(disk.read(path).unwrap().len(), 9 << 20);
    }

    #[test]
    fn a_replaced_file_is_the_old_one_or_the_new_one_after_a_crash_anywhere() {
        #[derive(Default)]
        struct Cut(Mutex<usize>);
        #[async_trait::async_trait]
        impl Weather for Cut {
            async fn sync(&self, path: &Path) -> io::Result<()> {
                self.write(path)
            }
            fn write(&self, _: &Path) -> io::Result<()> {
                let mut left = self.0.lock();
                *left = left.checked_sub(1).ok_or(io::ErrorKind::Other)?;
                Ok(())
            }
        }
        let (old, new) = (vec![1u8; 3000], vec![2u8; 2000]);
        for cut in 0..20 {
            for survive in [0, 1, 2, usize::MAX] {
                let weather = Arc::new(Cut(Mutex::new(usize::MAX)));
                let disk = MemoryDisk::new(weather.clone());
                disk.create_dir(Path::new("/d")).unwrap();
                let (path, aside) = (Path::new("/d/file"), Path::new("/d/aside"));
                now(replace(&disk, path, aside, &[&old])).unwrap();
                *weather.0.lock() = cut;
                let done = now(replace(&disk, path, aside, &[&new])).is_ok();
                disk.crash(&mut |most| survive.min(most));
                *weather.0.lock() = usize::MAX;
                let found = disk.read(path).unwrap();
                assert!(found == new || (!done && found == old), "cut {cut}");
            }
        }
    }
}
