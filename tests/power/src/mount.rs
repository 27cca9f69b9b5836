//! The disk as a file system of the kernel's, through /dev/fuse, and the switch of its power.
//!
//! fuser speaks the kernel's protocol and mounts by itself: as root neither libfuse nor
//! fusermount is needed. The power goes at a set number of writes, syncs and changes of names,
//! before or after that one; from then on everything fails, and the directory below holds what
//! the disk held.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use anyhow::{Context as _, Result, ensure};
use fuser::{
    BackgroundSession, Config, Errno, FileAttr, FileHandle, FileType, Filesystem, FopenFlags,
    Generation, INodeNo, LockOwner, MountOption, OpenFlags, RenameFlags, ReplyAttr, ReplyCreate,
    ReplyData, ReplyDirectory, ReplyEmpty, ReplyEntry, ReplyOpen, ReplyWrite, Request, TimeOrNow,
    WriteFlags,
};

use crate::disk::{Attributes, Disk, ROOT, Tree, store};

/// The kernel may remember names and attributes: nobody changes them but through it.
const REMEMBERED: Duration = Duration::from_secs(3600);

/// A mounted disk.
#[derive(Debug)]
pub struct Mounted {
    below: PathBuf,
    at: PathBuf,
    power: Arc<Power>,
    session: Option<BackgroundSession>,
}

#[derive(Debug)]
struct Power {
    state: Mutex<State>,
    gone: Condvar,
}

#[derive(Debug)]
enum State {
    On {
        disk: Box<Disk>,
        /// Steps until the power goes by itself.
        left: Option<u64>,
        /// It goes after the last step, not before.
        after: bool,
    },
    Off {
        left: Tree,
        /// Writes that were at stake.
        unsynced: usize,
    },
    /// Only while it is being switched off.
    Switching,
}

impl Power {
    fn lock(&self) -> MutexGuard<'_, State> {
        // A panic on a FUSE thread has failed the run already.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn off(&self, state: &mut State) {
        *state = match std::mem::replace(state, State::Switching) {
            State::On { disk, .. } => State::Off {
                unsynced: disk.unsynced(),
                left: disk.cut(),
            },
            off => off,
        };
        self.gone.notify_all();
    }

    /// Looks at the disk.
    fn look<T>(&self, what: impl FnOnce(&mut Disk) -> nix::Result<T>) -> Result<T, Errno> {
        match &mut *self.lock() {
            State::On { disk, .. } => what(disk).map_err(errno),
            _ => Err(Errno::EIO),
        }
    }

    /// Does something to the disk: one step.
    fn step<T>(&self, what: impl FnOnce(&mut Disk) -> nix::Result<T>) -> Result<T, Errno> {
        let mut state = self.lock();
        let State::On { disk, left, after } = &mut *state else {
            return Err(Errno::EIO);
        };
        let last = match left {
            Some(0 | 1) => true,
            Some(left) => {
                *left -= 1;
                false
            }
            None => false,
        };
        if !last {
            return what(disk).map_err(errno);
        }
        if *after {
            // Whoever asked never hears of it.
            let _ = what(disk);
        }
        self.off(&mut state);
        Err(Errno::EIO)
    }
}

impl Mounted {
    /// Mounts what is in `below` at `at`; `seed` decides what a cut leaves.
    ///
    /// # Errors
    /// There is no /dev/fuse, no right to mount, or no such directory.
    pub fn new(below: &Path, at: &Path, seed: u64, lying: bool) -> Result<Self> {
        ensure!(
            Path::new("/dev/fuse").exists(),
            "power cuts need FUSE: there is no /dev/fuse (load the module fuse)"
        );
        let disk = Disk::load(below, seed, lying)
            .with_context(|| format!("reading {}", below.display()))?;
        let power = Arc::new(Power {
            state: Mutex::new(State::On {
                disk: Box::new(disk),
                left: None,
                after: false,
            }),
            gone: Condvar::new(),
        });
        let mut config = Config::default();
        config.mount_options = vec![
            MountOption::FSName("swarm-powercut".to_owned()),
            MountOption::DefaultPermissions,
        ];
        let session = fuser::spawn_mount(Shown(power.clone()), at, &config)
            .with_context(|| format!("mounting at {} (root only)", at.display()))?;
        Ok(Self {
            below: below.to_owned(),
            at: at.to_owned(),
            power,
            session: Some(session),
        })
    }

    /// Where it is mounted.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.at
    }

    /// The power goes at the `steps`-th write, sync or change of names from now on:
    /// `after` it is done (and never answered), or instead of it.
    pub fn cut_at(&self, steps: u64, after: bool) {
        if let State::On {
            left, after: when, ..
        } = &mut *self.power.lock()
        {
            (*left, *when) = (Some(steps), after);
        }
    }

    /// The power goes now, if it has not gone yet.
    pub fn cut(&self) {
        self.power.off(&mut self.power.lock());
    }

    /// Waits until the power has gone; false when it takes longer than `patience`.
    #[must_use]
    pub fn wait_cut(&self, patience: Duration) -> bool {
        let on = |state: &mut State| matches!(state, State::On { .. });
        let waited = self
            .power
            .gone
            .wait_timeout_while(self.power.lock(), patience, on);
        !waited.unwrap_or_else(PoisonError::into_inner).1.timed_out()
    }

    /// Unmounts after a cut, which is made if there was none: the directory below holds what
    /// the disk held. Returns how many writes were at stake. Whoever used it must be dead.
    ///
    /// # Errors
    /// Somebody still uses it, or the directory cannot be written.
    pub fn settle(mut self) -> Result<usize> {
        self.cut();
        if let Some(session) = self.session.take() {
            session
                .umount_and_join()
                .with_context(|| format!("unmounting {}", self.at.display()))?;
        }
        match std::mem::replace(&mut *self.power.lock(), State::Switching) {
            State::Off { left, unsynced } => {
                store(&left, &self.below)
                    .with_context(|| format!("writing {}", self.below.display()))?;
                Ok(unsynced)
            }
            State::On { .. } | State::Switching => unreachable!("it was cut above"),
        }
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        // Nobody waits for answers any more, so that unmounting cannot hang.
        self.cut();
        if self.session.take().is_some() {
            // Already gone is as good.
            let _ = nix::mount::umount2(&self.at, nix::mount::MntFlags::MNT_DETACH);
        }
    }
}

fn errno(error: nix::errno::Errno) -> Errno {
    Errno::from_i32(error as i32)
}

/// The file system that the kernel sees.
#[derive(Debug)]
struct Shown(Arc<Power>);

fn attr(attributes: &Attributes) -> FileAttr {
    let time = SystemTime::UNIX_EPOCH;
    FileAttr {
        ino: INodeNo(attributes.inode),
        size: attributes.size,
        blocks: attributes.size.div_ceil(512),
        atime: time,
        mtime: time,
        ctime: time,
        crtime: time,
        kind: kind(attributes),
        perm: u16::try_from(attributes.mode).unwrap_or(0o600),
        nlink: if attributes.directory { 2 } else { 1 },
        uid: 0,
        gid: 0,
        rdev: 0,
        blksize: 4096,
        flags: 0,
    }
}

fn kind(attributes: &Attributes) -> FileType {
    if attributes.directory {
        FileType::Directory
    } else {
        FileType::RegularFile
    }
}

fn empty(done: Result<(), Errno>, reply: ReplyEmpty) {
    match done {
        Ok(()) => reply.ok(),
        Err(error) => reply.error(error),
    }
}

fn entry(made: Result<Attributes, Errno>, reply: ReplyEntry) {
    match made {
        Ok(found) => reply.entry(&REMEMBERED, &attr(&found), Generation(0)),
        Err(error) => reply.error(error),
    }
}

impl Filesystem for Shown {
    fn lookup(&self, _: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        let found = self.0.look(|disk| {
            let inode = disk.lookup(parent.0, name)?;
            disk.attributes(inode)
        });
        entry(found, reply);
    }

    fn getattr(&self, _: &Request, ino: INodeNo, _: Option<FileHandle>, reply: ReplyAttr) {
        match self.0.look(|disk| disk.attributes(ino.0)) {
            Ok(found) => reply.attr(&REMEMBERED, &attr(&found)),
            Err(error) => reply.error(error),
        }
    }

    fn setattr(
        &self,
        _: &Request,
        ino: INodeNo,
        mode: Option<u32>,
        _uid: Option<u32>,
        _gid: Option<u32>,
        size: Option<u64>,
        _atime: Option<TimeOrNow>,
        _mtime: Option<TimeOrNow>,
        _ctime: Option<SystemTime>,
        _fh: Option<FileHandle>,
        _crtime: Option<SystemTime>,
        _chgtime: Option<SystemTime>,
        _bkuptime: Option<SystemTime>,
        _flags: Option<fuser::BsdFileFlags>,
        reply: ReplyAttr,
    ) {
        let done = self.0.step(|disk| {
            if let Some(mode) = mode {
                disk.set_mode(ino.0, mode)?;
            }
            if let Some(size) = size {
                disk.resize(ino.0, size)?;
            }
            disk.attributes(ino.0)
        });
        match done {
            Ok(now) => reply.attr(&REMEMBERED, &attr(&now)),
            Err(error) => reply.error(error),
        }
    }

    fn mkdir(
        &self,
        _: &Request,
        parent: INodeNo,
        name: &OsStr,
        mode: u32,
        umask: u32,
        reply: ReplyEntry,
    ) {
        let made = self.0.step(|disk| {
            let inode = disk.make(parent.0, name, mode & !umask, true)?;
            disk.attributes(inode)
        });
        entry(made, reply);
    }

    fn create(
        &self,
        _: &Request,
        parent: INodeNo,
        name: &OsStr,
        mode: u32,
        umask: u32,
        _flags: i32,
        reply: ReplyCreate,
    ) {
        let made = self.0.step(|disk| {
            let inode = disk.make(parent.0, name, mode & !umask, false)?;
            disk.attributes(inode)
        });
        match made {
            Ok(made) => reply.created(
                &REMEMBERED,
                &attr(&made),
                Generation(0),
                FileHandle(0),
                FopenFlags::empty(),
            ),
            Err(error) => reply.error(error),
        }
    }

    fn unlink(&self, _: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        let done = self.0.step(|disk| disk.remove(parent.0, name, false));
        empty(done, reply);
    }

    fn rmdir(&self, _: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        let done = self.0.step(|disk| disk.remove(parent.0, name, true));
        empty(done, reply);
    }

    fn rename(
        &self,
        _: &Request,
        parent: INodeNo,
        name: &OsStr,
        newparent: INodeNo,
        newname: &OsStr,
        flags: RenameFlags,
        reply: ReplyEmpty,
    ) {
        let noreplace = flags.contains(RenameFlags::RENAME_NOREPLACE);
        let done = self.0.step(|disk| {
            if noreplace && disk.lookup(newparent.0, newname).is_ok() {
                return Err(nix::errno::Errno::EEXIST);
            }
            disk.rename((parent.0, name), (newparent.0, newname))
        });
        empty(done, reply);
    }

    fn open(&self, _: &Request, ino: INodeNo, _: OpenFlags, reply: ReplyOpen) {
        match self.0.look(|disk| disk.attributes(ino.0)) {
            Ok(_) => reply.opened(FileHandle(0), FopenFlags::FOPEN_KEEP_CACHE),
            Err(error) => reply.error(error),
        }
    }

    fn read(
        &self,
        _: &Request,
        ino: INodeNo,
        _: FileHandle,
        offset: u64,
        size: u32,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyData,
    ) {
        let data = self.0.look(|disk| {
            let data = disk.read(ino.0, offset, size as usize)?;
            Ok(data.to_vec())
        });
        match data {
            Ok(data) => reply.data(&data),
            Err(error) => reply.error(error),
        }
    }

    fn write(
        &self,
        _: &Request,
        ino: INodeNo,
        _: FileHandle,
        offset: u64,
        data: &[u8],
        _: WriteFlags,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        match self.0.step(|disk| disk.write(ino.0, offset, data)) {
            Ok(()) => reply.written(u32::try_from(data.len()).unwrap_or(u32::MAX)),
            Err(error) => reply.error(error),
        }
    }

    fn flush(&self, _: &Request, _: INodeNo, _: FileHandle, _: LockOwner, reply: ReplyEmpty) {
        reply.ok();
    }

    fn fsync(&self, _: &Request, ino: INodeNo, _: FileHandle, _: bool, reply: ReplyEmpty) {
        empty(self.0.step(|disk| disk.sync(ino.0)), reply);
    }

    fn fsyncdir(&self, _: &Request, ino: INodeNo, _: FileHandle, _: bool, reply: ReplyEmpty) {
        empty(self.0.step(|disk| disk.sync(ino.0)), reply);
    }

    fn fallocate(
        &self,
        _: &Request,
        ino: INodeNo,
        _: FileHandle,
        offset: u64,
        length: u64,
        mode: i32,
        reply: ReplyEmpty,
    ) {
        // Only plain extension; punching holes and the like is answered as "not supported".
        if mode != 0 {
            reply.error(Errno::EOPNOTSUPP);
            return;
        }
        let done = self.0.step(|disk| {
            let size = disk.attributes(ino.0)?.size;
            if offset + length > size {
                disk.resize(ino.0, offset + length)?;
            }
            Ok(())
        });
        empty(done, reply);
    }

    fn readdir(
        &self,
        _: &Request,
        ino: INodeNo,
        _: FileHandle,
        offset: u64,
        mut reply: ReplyDirectory,
    ) {
        let entries = match self.0.look(|disk| disk.list(ino.0)) {
            Ok(entries) => entries,
            Err(error) => {
                reply.error(error);
                return;
            }
        };
        let skipped = usize::try_from(offset).unwrap_or(usize::MAX);
        for (number, (name, found)) in (1u64..).zip(&entries).skip(skipped) {
            if reply.add(INodeNo(found.inode), number, kind(found), name) {
                break;
            }
        }
        reply.ok();
    }
}

/// The root has the number that FUSE gives it.
const _: () = assert!(ROOT == 1);
