//! What a disk holds of what was written to it, and what it holds after a power cut.
//!
//! Pure but for [`Disk::load`] and [`store`]. Every file and directory has two
//! contents: what programs see, and what is durable. Writes and changes of size
//! become durable by fsync or fdatasync of the file; names by fsync of their
//! directory; nothing else makes anything durable (LazyFS and ALICE model it the same way,
//! which is stricter than what ext4 or xfs do on a good day).
//!
//! At a cut each block of a file holds any one of the versions it had since the last sync,
//! chosen for each block alone, so writes are lost, kept, reordered and torn; its size is any
//! that it had, whether or not the data arrived. Of the changes of names any subset remains;
//! a rename is never half.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::{OsStr, OsString};
use std::io;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;

use nix::errno::Errno;
use rand::rngs::StdRng;
use rand::seq::IndexedRandom as _;
use rand::{Rng as _, SeedableRng as _};

/// Inode of the directory that everything is in.
pub const ROOT: u64 = 1;
/// No file is longer: a runaway write is an error, not a full machine.
const FILE_MAX: usize = 256 << 20;

type Result<T> = std::result::Result<T, Errno>;

/// A disk, its write cache and the dice that decide at a cut.
#[derive(Debug)]
pub struct Disk {
    nodes: BTreeMap<u64, Node>,
    next: u64,
    /// Changes of names that are not durable, oldest first.
    changes: Vec<Change>,
    dice: StdRng,
    lying: bool,
}

#[derive(Clone, Debug)]
struct Node {
    mode: u32,
    kind: Kind,
}

#[derive(Clone, Debug)]
enum Kind {
    File(File),
    Dir(Dir),
}

#[derive(Clone, Debug, Default)]
struct File {
    now: Vec<u8>,
    durable: Vec<u8>,
    pending: Vec<Op>,
}

#[derive(Clone, Debug)]
enum Op {
    Write { at: usize, data: Vec<u8> },
    Resize(usize),
}

type Names = BTreeMap<OsString, u64>;

#[derive(Clone, Debug, Default)]
struct Dir {
    now: Names,
    durable: Names,
}

/// One change of names: all of its edits are kept, or none.
#[derive(Clone, Debug)]
struct Change(Vec<(u64, OsString, Option<u64>)>);

/// What a file or directory looks like from outside.
#[derive(Clone, Copy, Debug)]
pub struct Attributes {
    /// Inode.
    pub inode: u64,
    /// Length in bytes.
    pub size: u64,
    /// Permission bits.
    pub mode: u32,
    /// A directory?
    pub directory: bool,
}

/// What is found on a disk: a file's bytes or a directory's entries, with the permission bits.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Tree {
    /// A file.
    File(u32, Vec<u8>),
    /// A directory.
    Dir(u32, BTreeMap<OsString, Tree>),
}

/// What becomes of the unsynced part of one file, or of the unsynced names, at a cut.
#[derive(Clone, Copy, Debug)]
enum Fate {
    Lost,
    Kept,
    /// The first so many changes.
    Prefix,
    /// Each block, or each change of names, for itself.
    Scattered,
}

const FATES: [Fate; 5] = [
    Fate::Lost,
    Fate::Kept,
    Fate::Prefix,
    Fate::Scattered,
    Fate::Scattered,
];

impl Disk {
    /// What is in `dir`, all of it durable. A `lying` disk answers syncs and does nothing.
    ///
    /// # Errors
    /// The directory cannot be read.
    pub fn load(dir: &Path, seed: u64, lying: bool) -> io::Result<Self> {
        let mut disk = Self {
            nodes: BTreeMap::new(),
            next: ROOT,
            changes: Vec::new(),
            dice: StdRng::seed_from_u64(seed),
            lying,
        };
        disk.adopt(load(dir)?);
        Ok(disk)
    }

    fn adopt(&mut self, tree: Tree) -> u64 {
        let inode = self.next;
        self.next += 1;
        let node = match tree {
            Tree::File(mode, data) => Node {
                mode,
                kind: Kind::File(File {
                    now: data.clone(),
                    durable: data,
                    pending: Vec::new(),
                }),
            },
            Tree::Dir(mode, entries) => {
                let names: Names = entries
                    .into_iter()
                    .map(|(name, tree)| (name, self.adopt(tree)))
                    .collect();
                Node {
                    mode,
                    kind: Kind::Dir(Dir {
                        now: names.clone(),
                        durable: names,
                    }),
                }
            }
        };
        self.nodes.insert(inode, node);
        inode
    }

    /// How many writes and changes of names a cut would put at stake.
    #[must_use]
    pub fn unsynced(&self) -> usize {
        let files = self.nodes.values().map(|node| match &node.kind {
            Kind::File(file) => file.pending.len(),
            Kind::Dir(_) => 0,
        });
        files.sum::<usize>() + self.changes.len()
    }

    fn node(&self, inode: u64) -> Result<&Node> {
        self.nodes.get(&inode).ok_or(Errno::ENOENT)
    }

    fn file(&mut self, inode: u64) -> Result<&mut File> {
        match &mut self.nodes.get_mut(&inode).ok_or(Errno::ENOENT)?.kind {
            Kind::File(file) => Ok(file),
            Kind::Dir(_) => Err(Errno::EISDIR),
        }
    }

    fn dir(&self, inode: u64) -> Result<&Dir> {
        match &self.node(inode)?.kind {
            Kind::Dir(dir) => Ok(dir),
            Kind::File(_) => Err(Errno::ENOTDIR),
        }
    }

    fn dir_mut(&mut self, inode: u64) -> Result<&mut Dir> {
        match &mut self.nodes.get_mut(&inode).ok_or(Errno::ENOENT)?.kind {
            Kind::Dir(dir) => Ok(dir),
            Kind::File(_) => Err(Errno::ENOTDIR),
        }
    }

    /// Looks at an inode.
    ///
    /// # Errors
    /// There is none of that number.
    pub fn attributes(&self, inode: u64) -> Result<Attributes> {
        let node = self.node(inode)?;
        let (size, directory) = match &node.kind {
            Kind::File(file) => (file.now.len() as u64, false),
            Kind::Dir(_) => (0, true),
        };
        Ok(Attributes {
            inode,
            size,
            mode: node.mode,
            directory,
        })
    }

    /// The inode of a name.
    ///
    /// # Errors
    /// There is no such name, or no such directory.
    pub fn lookup(&self, parent: u64, name: &OsStr) -> Result<u64> {
        let entry = self.dir(parent)?.now.get(name);
        entry.copied().ok_or(Errno::ENOENT)
    }

    /// The entries of a directory.
    ///
    /// # Errors
    /// It is none.
    pub fn list(&self, inode: u64) -> Result<Vec<(OsString, Attributes)>> {
        let names = self.dir(inode)?.now.iter();
        names
            .map(|(name, inode)| Ok((name.clone(), self.attributes(*inode)?)))
            .collect()
    }

    /// Makes a file or a directory.
    ///
    /// # Errors
    /// The name is taken, or the parent is no directory.
    pub fn make(&mut self, parent: u64, name: &OsStr, mode: u32, directory: bool) -> Result<u64> {
        if self.dir(parent)?.now.contains_key(name) {
            return Err(Errno::EEXIST);
        }
        let inode = self.next;
        self.next += 1;
        let kind = if directory {
            Kind::Dir(Dir::default())
        } else {
            Kind::File(File::default())
        };
        let node = Node {
            mode: mode & 0o7777,
            kind,
        };
        self.nodes.insert(inode, node);
        self.change(vec![(parent, name.to_owned(), Some(inode))])?;
        Ok(inode)
    }

    /// Removes a name. What it meant stays for those who have it open.
    ///
    /// # Errors
    /// There is no such name, it is of the other kind, or a directory that is not empty.
    pub fn remove(&mut self, parent: u64, name: &OsStr, directory: bool) -> Result<()> {
        let inode = self.lookup(parent, name)?;
        match (&self.node(inode)?.kind, directory) {
            (Kind::Dir(dir), true) if !dir.now.is_empty() => return Err(Errno::ENOTEMPTY),
            (Kind::Dir(_), true) | (Kind::File(_), false) => {}
            (Kind::Dir(_), false) => return Err(Errno::EISDIR),
            (Kind::File(_), true) => return Err(Errno::ENOTDIR),
        }
        self.change(vec![(parent, name.to_owned(), None)])
    }

    /// Gives an inode another name; what had that name loses it.
    ///
    /// # Errors
    /// There is nothing of the old name.
    pub fn rename(&mut self, from: (u64, &OsStr), to: (u64, &OsStr)) -> Result<()> {
        let inode = self.lookup(from.0, from.1)?;
        if from == to {
            return Ok(());
        }
        if let Ok(target) = self.lookup(to.0, to.1)
            && let Kind::Dir(dir) = &self.node(target)?.kind
            && !dir.now.is_empty()
        {
            return Err(Errno::ENOTEMPTY);
        }
        self.change(vec![
            (from.0, from.1.to_owned(), None),
            (to.0, to.1.to_owned(), Some(inode)),
        ])
    }

    fn change(&mut self, edits: Vec<(u64, OsString, Option<u64>)>) -> Result<()> {
        for (dir, name, inode) in &edits {
            edit(&mut self.dir_mut(*dir)?.now, name, *inode);
        }
        self.changes.push(Change(edits));
        Ok(())
    }

    /// Sets permission bits. They are durable at once: nothing here depends on them.
    ///
    /// # Errors
    /// There is no such inode.
    pub fn set_mode(&mut self, inode: u64, mode: u32) -> Result<()> {
        let node = self.nodes.get_mut(&inode).ok_or(Errno::ENOENT)?;
        node.mode = mode & 0o7777;
        Ok(())
    }

    /// Reads from a file, less at its end.
    ///
    /// # Errors
    /// It is none.
    pub fn read(&mut self, inode: u64, at: u64, size: usize) -> Result<&[u8]> {
        let data = &self.file(inode)?.now;
        let from = usize::try_from(at).unwrap_or(usize::MAX).min(data.len());
        Ok(&data[from..data.len().min(from + size)])
    }

    /// Writes to a file, and extends it if need be.
    ///
    /// # Errors
    /// It is none, or would be too long.
    pub fn write(&mut self, inode: u64, at: u64, data: &[u8]) -> Result<()> {
        let at = length(at + data.len() as u64)? - data.len();
        self.pending(
            inode,
            Op::Write {
                at,
                data: data.to_vec(),
            },
        )
    }

    /// Cuts a file off, or extends it with zeros.
    ///
    /// # Errors
    /// It is none, or would be too long.
    pub fn resize(&mut self, inode: u64, size: u64) -> Result<()> {
        self.pending(inode, Op::Resize(length(size)?))
    }

    fn pending(&mut self, inode: u64, op: Op) -> Result<()> {
        let file = self.file(inode)?;
        op.apply(&mut file.now);
        file.pending.push(op);
        Ok(())
    }

    /// Makes a file's data and size durable, or a directory's names.
    ///
    /// # Errors
    /// There is no such inode.
    pub fn sync(&mut self, inode: u64) -> Result<()> {
        let lying = self.lying;
        if let Kind::File(_) = self.node(inode)?.kind {
            let file = self.file(inode)?;
            if !lying {
                for op in std::mem::take(&mut file.pending) {
                    op.apply(&mut file.durable);
                }
            }
        } else if !lying {
            self.sync_names(inode);
        }
        Ok(())
    }

    /// A change that touches several directories is durable as a whole, and so is
    /// everything that was done before to the directories it touches.
    fn sync_names(&mut self, inode: u64) {
        let mut touched = BTreeSet::from([inode]);
        loop {
            let before = touched.len();
            for Change(edits) in &self.changes {
                if edits.iter().any(|(dir, ..)| touched.contains(dir)) {
                    touched.extend(edits.iter().map(|(dir, ..)| *dir));
                }
            }
            if touched.len() == before {
                break;
            }
        }
        let (durable, rest): (Vec<Change>, Vec<Change>) = std::mem::take(&mut self.changes)
            .into_iter()
            .partition(|Change(edits)| edits.iter().any(|(dir, ..)| touched.contains(dir)));
        self.changes = rest;
        durable.into_iter().for_each(|change| self.keep(change));
    }

    fn keep(&mut self, Change(edits): Change) {
        for (dir, name, inode) in edits {
            if let Ok(dir) = self.dir_mut(dir) {
                edit(&mut dir.durable, &name, inode);
            }
        }
    }

    /// The power is cut: what the disk holds now.
    #[must_use]
    pub fn cut(mut self) -> Tree {
        let fate = *FATES.choose(&mut self.dice).expect("there are some");
        let changes = std::mem::take(&mut self.changes);
        let first = self.dice.random_range(0..=changes.len());
        let keep = self.dice.random_range(0.1..0.9);
        for (number, change) in changes.into_iter().enumerate() {
            let kept = match fate {
                Fate::Lost => false,
                Fate::Kept => true,
                Fate::Prefix => number < first,
                Fate::Scattered => self.dice.random_bool(keep),
            };
            if kept {
                self.keep(change);
            }
        }
        // Mostly one fate for the whole disk, so that files that depend on each other differ.
        let fate = *FATES.choose(&mut self.dice).expect("there are some");
        let mixed = self.dice.random_bool(0.3);
        let mut dice = self.dice.clone();
        for node in self.nodes.values_mut() {
            if let Kind::File(file) = &mut node.kind {
                let own = *FATES.choose(&mut dice).expect("there are some");
                file.durable = file.settle(if mixed { own } else { fate }, &mut dice);
            }
        }
        self.tree(ROOT)
    }

    fn tree(&self, inode: u64) -> Tree {
        let node = &self.nodes[&inode];
        match &node.kind {
            Kind::File(file) => Tree::File(node.mode, file.durable.clone()),
            Kind::Dir(dir) => {
                let entries = dir.durable.iter();
                let entries = entries.map(|(name, inode)| (name.clone(), self.tree(*inode)));
                Tree::Dir(node.mode, entries.collect())
            }
        }
    }
}

fn length(bytes: u64) -> Result<usize> {
    let length = usize::try_from(bytes).map_err(|_| Errno::EFBIG)?;
    if length > FILE_MAX {
        return Err(Errno::ENOSPC);
    }
    Ok(length)
}

fn edit(names: &mut Names, name: &OsStr, inode: Option<u64>) {
    match inode {
        Some(inode) => names.insert(name.to_owned(), inode),
        None => names.remove(name),
    };
}

impl Op {
    fn apply(&self, content: &mut Vec<u8>) {
        match self {
            Op::Write { at, data } => {
                if content.len() < at + data.len() {
                    content.resize(at + data.len(), 0);
                }
                content[*at..at + data.len()].copy_from_slice(data);
            }
            Op::Resize(size) => content.resize(*size, 0),
        }
    }
}

impl File {
    /// What remains of a file.
    fn settle(&self, fate: Fate, dice: &mut StdRng) -> Vec<u8> {
        let take = match fate {
            Fate::Lost => 0,
            Fate::Kept => self.pending.len(),
            Fate::Prefix => dice.random_range(0..=self.pending.len()),
            Fate::Scattered => return self.scatter(dice),
        };
        let mut content = self.durable.clone();
        for op in &self.pending[..take] {
            op.apply(&mut content);
        }
        content
    }

    /// Each block for itself. Cutting a file off is one step of a journal: what was written
    /// after it is not there without it.
    fn scatter(&self, dice: &mut StdRng) -> Vec<u8> {
        let block = *[512, 4096].choose(dice).expect("there are some");
        let newest = dice.random_range(0.0..1.0);
        let mut sizes = vec![self.durable.len()];
        let mut cuts = vec![0];
        for (number, op) in self.pending.iter().enumerate() {
            let size = sizes[number];
            sizes.push(match op {
                Op::Write { at, data } => size.max(at + data.len()),
                Op::Resize(to) => {
                    if *to < size {
                        cuts.push(number + 1);
                    }
                    *to
                }
            });
        }
        let epoch = dice.random_range(0..cuts.len());
        let floor = cuts[epoch];
        let end = cuts
            .get(epoch + 1)
            .map_or(self.pending.len(), |cut| cut - 1);
        let mut content = self.durable.clone();
        for op in &self.pending[..floor] {
            op.apply(&mut content);
        }
        let versions = &self.pending[floor..end];
        let mut touching: BTreeMap<usize, Vec<usize>> = BTreeMap::new();
        for (number, op) in versions.iter().enumerate() {
            if let Op::Write { at, data } = op
                && !data.is_empty()
            {
                for touched in at / block..=(at + data.len() - 1) / block {
                    touching.entry(touched).or_default().push(number);
                }
            }
        }
        for (touched, writes) in touching {
            let kept = if dice.random_bool(newest) {
                writes.len()
            } else {
                dice.random_range(0..=writes.len())
            };
            let (from, to) = (touched * block, (touched + 1) * block);
            for number in &writes[..kept] {
                let Op::Write { at, data } = &versions[*number] else {
                    continue;
                };
                let (start, stop) = (from.max(*at), to.min(at + data.len()));
                if content.len() < stop {
                    content.resize(stop, 0);
                }
                content[start..stop].copy_from_slice(&data[start - at..stop - at]);
            }
        }
        let size = *sizes[floor..=end].choose(dice).expect("there is one");
        content.resize(size, 0);
        content
    }
}

fn load(path: &Path) -> io::Result<Tree> {
    let metadata = std::fs::symlink_metadata(path)?;
    let mode = metadata.permissions().mode() & 0o7777;
    if metadata.is_file() {
        return Ok(Tree::File(mode, std::fs::read(path)?));
    }
    let mut entries = BTreeMap::new();
    for entry in std::fs::read_dir(path)? {
        let entry = entry?;
        entries.insert(entry.file_name(), load(&entry.path())?);
    }
    Ok(Tree::Dir(mode, entries))
}

/// Makes `path` hold exactly what is in `tree`.
///
/// # Errors
/// It cannot be written.
pub fn store(tree: &Tree, path: &Path) -> io::Result<()> {
    match tree {
        Tree::File(mode, data) => {
            std::fs::write(path, data)?;
            std::fs::set_permissions(path, std::fs::Permissions::from_mode(*mode))
        }
        Tree::Dir(mode, entries) => {
            if path.exists() {
                std::fs::remove_dir_all(path)?;
            }
            std::fs::create_dir(path)?;
            for (name, tree) in entries {
                store(tree, &path.join(name))?;
            }
            std::fs::set_permissions(path, std::fs::Permissions::from_mode(*mode))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn disk(seed: u64, lying: bool) -> Disk {
        let dir = tempfile::tempdir().unwrap();
        Disk::load(dir.path(), seed, lying).unwrap()
    }

    fn content(tree: &Tree, name: &str) -> Option<Vec<u8>> {
        let Tree::Dir(_, entries) = tree else {
            panic!("the root is a directory")
        };
        entries.get(OsStr::new(name)).map(|tree| match tree {
            Tree::File(_, data) => data.clone(),
            Tree::Dir(..) => panic!("a file was expected"),
        })
    }

    fn name(name: &str) -> &OsStr {
        OsStr::new(name)
    }

    /// What a file holds after each of many cuts.
    fn outcomes(write: impl Fn(&mut Disk), file: &str) -> BTreeSet<Option<Vec<u8>>> {
        (0..400)
            .map(|seed| {
                let mut disk = disk(seed, false);
                write(&mut disk);
                content(&disk.cut(), file)
            })
            .collect()
    }

    #[test]
    fn what_was_synced_with_its_name_is_there_after_every_cut() {
        let found = outcomes(
            |disk| {
                let inode = disk.make(ROOT, name("a"), 0o600, false).unwrap();
                disk.write(inode, 0, b"hello").unwrap();
                disk.sync(inode).unwrap();
                disk.sync(ROOT).unwrap();
            },
            "a",
        );
        assert_eq!(found, BTreeSet::from([Some(b"hello".to_vec())]));
    }

    #[test]
    fn a_name_without_a_sync_of_its_directory_may_be_lost_and_so_may_the_data_of_a_synced_name() {
        let synced_file = |disk: &mut Disk| {
            let inode = disk.make(ROOT, name("a"), 0o600, false).unwrap();
            disk.write(inode, 0, b"hello").unwrap();
            disk.sync(inode).unwrap();
        };
        let found = outcomes(synced_file, "a");
        assert_eq!(found, BTreeSet::from([None, Some(b"hello".to_vec())]));
        let synced_name = |disk: &mut Disk| {
            let inode = disk.make(ROOT, name("a"), 0o600, false).unwrap();
            disk.write(inode, 0, b"hello").unwrap();
            disk.sync(ROOT).unwrap();
        };
        let found = outcomes(synced_name, "a");
        // Nothing, all of it, and the size without the data.
        let expected = [Vec::new(), b"hello".to_vec(), vec![0; 5]].map(Some);
        assert_eq!(found, BTreeSet::from(expected));
    }

    #[test]
    fn a_rename_is_lost_or_kept_but_never_half() {
        let found: BTreeSet<_> = (0..400)
            .map(|seed| {
                let mut disk = disk(seed, false);
                for (file, text) in [("old", b"old"), ("new", b"new")] {
                    let inode = disk.make(ROOT, name(file), 0o600, false).unwrap();
                    disk.write(inode, 0, text).unwrap();
                    disk.sync(inode).unwrap();
                }
                disk.sync(ROOT).unwrap();
                let (from, to) = ((ROOT, name("new")), (ROOT, name("old")));
                disk.rename(from, to).unwrap();
                let tree = disk.cut();
                (content(&tree, "old"), content(&tree, "new"))
            })
            .collect();
        let (old, new) = (Some(b"old".to_vec()), Some(b"new".to_vec()));
        let expected = [(old, new.clone()), (new, None)];
        assert_eq!(found, BTreeSet::from(expected));
    }

    #[test]
    fn blocks_are_reordered_and_torn_and_hold_a_version_each() {
        let found = outcomes(
            |disk| {
                let inode = disk.make(ROOT, name("a"), 0o600, false).unwrap();
                disk.write(inode, 0, &[1; 1024]).unwrap();
                disk.sync(inode).unwrap();
                disk.sync(ROOT).unwrap();
                disk.write(inode, 0, &[2; 1024]).unwrap();
                disk.write(inode, 100, &[3; 600]).unwrap();
            },
            "a",
        );
        let first_only = [vec![2; 512], vec![1; 512]].concat();
        let second_only = [vec![1; 512], vec![2; 512]].concat();
        for expected in [first_only, second_only] {
            assert!(found.contains(&Some(expected)));
        }
        for found in found.into_iter().flatten() {
            // The third write is over the second: never seen without it.
            let mixed = |block: &[u8]| block.contains(&3) && block.contains(&1);
            assert!(!found.chunks(512).any(mixed));
        }
    }

    #[test]
    fn a_lying_disk_keeps_nothing_for_sure() {
        let lost = (0..50).any(|seed| {
            let mut disk = disk(seed, true);
            let inode = disk.make(ROOT, name("a"), 0o600, false).unwrap();
            disk.write(inode, 0, b"hello").unwrap();
            disk.sync(inode).unwrap();
            disk.sync(ROOT).unwrap();
            content(&disk.cut(), "a").is_none()
        });
        assert!(lost);
    }

    #[test]
    fn a_directory_is_stored_as_it_is_loaded() {
        let dir = tempfile::tempdir().unwrap();
        let tree = Tree::Dir(
            0o755,
            BTreeMap::from([
                ("f".into(), Tree::File(0o600, b"text".to_vec())),
                ("d".into(), Tree::Dir(0o700, BTreeMap::new())),
            ]),
        );
        let path = dir.path().join("disk");
        store(&tree, &path).unwrap();
        assert_eq!(load(&path).unwrap(), tree);
    }
}
