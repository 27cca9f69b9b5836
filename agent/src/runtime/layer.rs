//! Unpacks one layer of an image into a directory for overlayfs.
//!
//! Everything in an archive is hostile: paths are resolved by the kernel inside
//! the directory (`openat2` with `RESOLVE_IN_ROOT`), final components are never
//! followed, `..` and device nodes end the unpacking with an error, sizes and
//! counts are bounded. Blocking; touches only the given directory.

use std::cell::Cell;
use std::collections::BTreeMap;
use std::ffi::{CString, OsStr};
use std::fs::File;
use std::io::{self, BufReader, Read};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Component, Path, PathBuf};
use std::rc::Rc;

use nix::fcntl::{AtFlags, OFlag, OpenHow, ResolveFlag, openat, openat2, readlinkat};
use nix::sys::stat::{Mode, SFlag, UtimensatFlags, fstatat, mkdirat, mknodat, utimensat};
use nix::sys::time::TimeSpec;
use nix::unistd::{Gid, Uid, UnlinkatFlags, fchownat, linkat, symlinkat, unlinkat};
use sha2::{Digest, Sha256};
use tar::{Archive, Entry, EntryType};

/// Files and directories in one layer.
const MAX_ENTRIES: usize = 2_000_000;
/// One extended attribute; the kernel's own limit.
const MAX_XATTR: usize = 64 << 10;
/// Names, links and attributes before one entry, which the archive reader keeps in memory.
const MAX_HEADERS: u64 = 4 << 20;
/// Bytes of the paths of one layer's directories, which are kept in memory until its end.
const MAX_PATHS: usize = 64 << 20;
const WHITEOUT: &[u8] = b".wh.";
const OPAQUE: &[u8] = b".wh..wh..opq";

/// Why a layer was not unpacked.
#[derive(Debug, thiserror::Error)]
pub(super) enum LayerError {
    #[error("refused {path:?}: {why}")]
    Refused { path: PathBuf, why: &'static str },
    #[error("more than {limit} bytes unpacked")]
    TooLarge { limit: u64 },
    #[error("contents are {found}, the image says {expected}")]
    WrongContents { expected: String, found: String },
    #[error("cannot write {path:?}: {source}")]
    Write { path: PathBuf, source: io::Error },
    #[error("damaged archive: {0}")]
    Damaged(io::Error),
    #[error(transparent)]
    Io(#[from] io::Error),
}

/// Unpacks `archive` (tar, plain or compressed by gzip or zstd) into the empty directory
/// `target`. Fails unless the uncompressed archive's digest is `diff_id`; the directory
/// then holds remains that the caller removes.
pub(super) fn unpack(
    archive: File,
    target: &Path,
    diff_id: &str,
    max_bytes: u64,
) -> Result<(), LayerError> {
    let root: OwnedFd = File::open(target)?.into();
    let stream = decompress(archive)?;
    let allowance = Rc::new(Cell::new(u64::MAX));
    let mut reader = Measured {
        inner: stream,
        hash: Sha256::new(),
        left: max_bytes,
        allowance: allowance.clone(),
        over: false,
    };
    let result = unpack_entries(&mut reader, root.as_fd(), &allowance, max_bytes);
    if reader.over {
        return Err(LayerError::TooLarge { limit: max_bytes });
    }
    result?;
    // The archive may go on after its end mark; its digest covers that too.
    let drained = io::copy(&mut reader, &mut io::sink());
    if reader.over {
        return Err(LayerError::TooLarge { limit: max_bytes });
    }
    drained.map_err(LayerError::Damaged)?;
    let found = format!("sha256:{}", hex::encode(reader.hash.finalize()));
    if found != diff_id {
        return Err(LayerError::WrongContents {
            expected: diff_id.to_owned(),
            found,
        });
    }
    Ok(())
}

/// By the first bytes: media types lie more often than magic numbers.
fn decompress(mut file: File) -> io::Result<Box<dyn Read>> {
    use std::io::Seek;
    let mut magic = [0; 4];
    let mut filled = 0;
    while filled < magic.len() {
        match file.read(&mut magic[filled..])? {
            0 => break,
            n => filled += n,
        }
    }
    file.rewind()?;
    let file = BufReader::with_capacity(128 << 10, file);
    Ok(match magic {
        [0x1f, 0x8b, ..] => Box::new(flate2::bufread::MultiGzDecoder::new(file)),
        [0x28, 0xb5, 0x2f, 0xfd] => Box::new(zstd::Decoder::with_buffer(file)?),
        _ => Box::new(file),
    })
}

/// Hashes what is read and stops at a limit.
struct Measured<R> {
    inner: R,
    hash: Sha256,
    left: u64,
    /// What may be read until somebody raises it again.
    allowance: Rc<Cell<u64>>,
    over: bool,
}

impl<R: Read> Read for Measured<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let n = self.inner.read(buffer)?;
        self.hash.update(&buffer[..n]);
        match self.allowance.get().checked_sub(n as u64) {
            Some(rest) => self.allowance.set(rest),
            None => return Err(io::Error::other("a header is too large")),
        }
        match self.left.checked_sub(n as u64) {
            Some(left) => self.left = left,
            None => {
                self.over = true;
                return Err(io::Error::other("too large"));
            }
        }
        Ok(n)
    }
}

fn unpack_entries<R: Read>(
    reader: &mut R,
    root: BorrowedFd<'_>,
    allowance: &Cell<u64>,
    max_bytes: u64,
) -> Result<(), LayerError> {
    let mut archive = Archive::new(reader);
    // Directories get their times last: making files inside would change them again.
    let mut directory_times = DirectoryTimes::new(MAX_PATHS);
    // Sparse files are larger than what is read for them.
    let mut left = max_bytes;
    let mut entries = archive.entries().map_err(LayerError::Damaged)?;
    for count in 0.. {
        allowance.set(MAX_HEADERS);
        let Some(entry) = entries.next() else { break };
        allowance.set(u64::MAX);
        let mut entry = entry.map_err(LayerError::Damaged)?;
        let path = relative(&entry.path().map_err(LayerError::Damaged)?)?;
        if count >= MAX_ENTRIES {
            return Err(LayerError::Refused {
                path,
                why: "too many files in one layer",
            });
        }
        let mtime = unpack_entry(&mut entry, &path, root, &mut left).map_err(|err| match err {
            LayerError::TooLarge { .. } => LayerError::TooLarge { limit: max_bytes },
            other => other,
        })?;
        if let Some(mtime) = mtime {
            directory_times.insert(path, mtime)?;
        }
        // Data that its kind of entry has no use for.
        io::copy(&mut entry, &mut io::sink()).map_err(LayerError::Damaged)?;
    }
    allowance.set(u64::MAX);
    for (path, mtime) in directory_times.times.iter().rev() {
        if let Ok((parent, name)) = parent_of(root, path) {
            let name = if path.as_os_str().is_empty() {
                OsStr::new(".")
            } else {
                name
            };
            let _ = utimensat(&parent, name, mtime, mtime, UtimensatFlags::NoFollowSymlink);
        }
    }
    Ok(())
}

/// The times that directories get in the end.
struct DirectoryTimes {
    times: BTreeMap<PathBuf, TimeSpec>,
    /// Bytes of paths that may still be added.
    left: usize,
}

impl DirectoryTimes {
    fn new(left: usize) -> Self {
        let times = BTreeMap::new();
        Self { times, left }
    }

    fn insert(&mut self, path: PathBuf, mtime: TimeSpec) -> Result<(), LayerError> {
        // What the map itself takes for an entry counts too.
        let size = path.as_os_str().len() + 64;
        match self.left.checked_sub(size) {
            Some(left) => self.left = left,
            None => {
                return Err(LayerError::Refused {
                    path,
                    why: "too many directories in one layer",
                });
            }
        }
        self.times.insert(path, mtime);
        Ok(())
    }
}

/// Without leading `/` and `.` parts; `..` is refused.
fn relative(path: &Path) -> Result<PathBuf, LayerError> {
    let mut result = PathBuf::new();
    for part in path.components() {
        match part {
            Component::Normal(part) => result.push(part),
            Component::RootDir | Component::CurDir => {}
            Component::ParentDir | Component::Prefix(_) => {
                return Err(LayerError::Refused {
                    path: path.into(),
                    why: "has a .. component",
                });
            }
        }
    }
    Ok(result)
}

/// Opens the directory that holds `path`, inside the root, making what is missing.
fn parent_of<'a>(root: BorrowedFd<'_>, path: &'a Path) -> Result<(OwnedFd, &'a OsStr), LayerError> {
    let parent = path.parent().unwrap_or(Path::new(""));
    let name = path.file_name().unwrap_or(OsStr::new("."));
    let failed = |source: nix::Error| LayerError::Write {
        path: path.into(),
        source: source.into(),
    };
    match open_dir(root, parent) {
        Err(nix::Error::ENOENT) => {}
        other => return Ok((other.map_err(failed)?, name)),
    }
    let mut made = PathBuf::new();
    for part in parent.components() {
        let above = open_dir(root, &made).map_err(failed)?;
        match mkdirat(&above, part.as_os_str(), Mode::from_bits_truncate(0o755)) {
            Ok(()) | Err(nix::Error::EEXIST) => {}
            Err(err) => return Err(failed(err)),
        }
        made.push(part);
    }
    Ok((open_dir(root, parent).map_err(failed)?, name))
}

fn open_dir(root: BorrowedFd<'_>, path: &Path) -> nix::Result<OwnedFd> {
    let path = if path.as_os_str().is_empty() {
        Path::new(".")
    } else {
        path
    };
    let how = OpenHow::new()
        .flags(OFlag::O_DIRECTORY | OFlag::O_RDONLY | OFlag::O_CLOEXEC)
        .resolve(ResolveFlag::RESOLVE_IN_ROOT | ResolveFlag::RESOLVE_NO_MAGICLINKS);
    openat2(root, path, how)
}

/// Returns the time to set later if it is a directory.
fn unpack_entry<R: Read>(
    entry: &mut Entry<'_, R>,
    path: &Path,
    root: BorrowedFd<'_>,
    left: &mut u64,
) -> Result<Option<TimeSpec>, LayerError> {
    let kind = entry.header().entry_type();
    if matches!(kind, EntryType::XGlobalHeader) {
        return Ok(None);
    }
    let refused = |why| LayerError::Refused {
        path: path.to_owned(),
        why,
    };
    let failed = |source: io::Error| LayerError::Write {
        path: path.to_owned(),
        source,
    };
    let sys = |source: nix::Error| failed(source.into());
    let header = entry.header();
    let mode = header.mode().map_err(LayerError::Damaged)? & 0o7777;
    let uid = u32::try_from(header.uid().map_err(LayerError::Damaged)?);
    let gid = u32::try_from(header.gid().map_err(LayerError::Damaged)?);
    let (Ok(uid), Ok(gid)) = (uid, gid) else {
        return Err(refused("its owner is out of range"));
    };
    let mtime = i64::try_from(header.mtime().unwrap_or(0)).unwrap_or(0);
    let mtime = TimeSpec::new(mtime, 0);

    if path.as_os_str().is_empty() {
        if kind != EntryType::Directory {
            return Err(refused("the root is not a directory"));
        }
        let dir = open_dir(root, path).map_err(sys)?;
        set_owner_and_mode(dir.as_fd(), OsStr::new("."), uid, gid, Some(mode)).map_err(sys)?;
        return Ok(Some(mtime));
    }
    let (parent, name) = parent_of(root, path)?;
    let parent = parent.as_fd();

    if name.as_bytes() == OPAQUE {
        xattr_set(parent, b"trusted.overlay.opaque", b"y").map_err(failed)?;
        return Ok(None);
    }
    if let Some(hidden) = name.as_bytes().strip_prefix(WHITEOUT) {
        if hidden.is_empty() || hidden == b"." || hidden == b".." || hidden.starts_with(WHITEOUT) {
            // aufs kept notes of its own under such names; they mean nothing here.
            return Ok(None);
        }
        let hidden = OsStr::from_bytes(hidden);
        clear(parent, hidden, false).map_err(sys)?;
        mknodat(parent, hidden, SFlag::S_IFCHR, Mode::empty(), 0).map_err(sys)?;
        return Ok(None);
    }

    clear(parent, name, kind == EntryType::Directory).map_err(sys)?;
    let attributes = extended_attributes(entry)?;
    match kind {
        EntryType::Directory => {
            match mkdirat(parent, name, Mode::from_bits_truncate(0o700)) {
                Ok(()) | Err(nix::Error::EEXIST) => {}
                Err(err) => return Err(sys(err)),
            }
            set_owner_and_mode(parent, name, uid, gid, Some(mode)).map_err(sys)?;
            let flags = OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
            let dir = openat(parent, name, flags, Mode::empty()).map_err(sys)?;
            for (key, value) in attributes {
                xattr_set(dir.as_fd(), &key, &value).map_err(failed)?;
            }
            return Ok(Some(mtime));
        }
        EntryType::Regular | EntryType::Continuous | EntryType::GNUSparse => {
            let flags = OFlag::O_CREAT
                | OFlag::O_EXCL
                | OFlag::O_WRONLY
                | OFlag::O_NOFOLLOW
                | OFlag::O_CLOEXEC;
            let file = openat(parent, name, flags, Mode::from_bits_truncate(0o600)).map_err(sys)?;
            let mut file = File::from(file);
            copy(entry, &mut file, path, left)?;
            // Owner first: changing it clears set-user-ID and capabilities.
            set_owner_and_mode(parent, name, uid, gid, Some(mode)).map_err(sys)?;
            for (key, value) in attributes {
                xattr_set(file.as_fd(), &key, &value).map_err(failed)?;
            }
        }
        EntryType::Link => {
            let link = entry.link_name().map_err(LayerError::Damaged)?;
            let link = relative(&link.ok_or_else(|| refused("a hard link to nothing"))?)?;
            let (from, from_name) = parent_of(root, &link)?;
            let meta = fstatat(&from, from_name, AtFlags::AT_SYMLINK_NOFOLLOW)
                .map_err(|_| refused("a hard link to a file that is not in the layer"))?;
            if meta.st_mode & libc::S_IFMT == libc::S_IFDIR {
                return Err(refused("a hard link to a directory"));
            }
            linkat(&from, from_name, parent, name, AtFlags::empty()).map_err(sys)?;
            return Ok(None);
        }
        EntryType::Symlink => {
            // Stored as it is: it means something only inside the container's root.
            let link = entry.link_name().map_err(LayerError::Damaged)?;
            let link = link.ok_or_else(|| refused("a symbolic link to nothing"))?;
            symlinkat(link.as_ref(), parent, name).map_err(sys)?;
            set_owner_and_mode(parent, name, uid, gid, None).map_err(sys)?;
        }
        EntryType::Fifo => {
            mknodat(
                parent,
                name,
                SFlag::S_IFIFO,
                Mode::from_bits_truncate(0o600),
                0,
            )
            .map_err(sys)?;
            set_owner_and_mode(parent, name, uid, gid, Some(mode)).map_err(sys)?;
        }
        EntryType::Char | EntryType::Block => {
            return Err(refused("device nodes do not belong into an image"));
        }
        _ => return Err(refused("an unknown kind of entry")),
    }
    utimensat(
        parent,
        name,
        &mtime,
        &mtime,
        UtimensatFlags::NoFollowSymlink,
    )
    .map_err(sys)?;
    Ok(None)
}

/// Tells a damaged archive from a full disk.
fn copy(
    from: &mut impl Read,
    to: &mut File,
    path: &Path,
    left: &mut u64,
) -> Result<(), LayerError> {
    use std::io::Write;
    let mut buffer = vec![0; 128 << 10];
    loop {
        let n = match from.read(&mut buffer) {
            Ok(0) => return Ok(()),
            Ok(n) => n,
            Err(err) if err.kind() == io::ErrorKind::Interrupted => continue,
            Err(err) => return Err(LayerError::Damaged(err)),
        };
        *left = left
            .checked_sub(n as u64)
            .ok_or(LayerError::TooLarge { limit: *left })?;
        to.write_all(&buffer[..n])
            .map_err(|source| LayerError::Write {
                path: path.to_owned(),
                source,
            })?;
    }
}

/// A later entry replaces an earlier one of the same name, except a directory by a directory.
fn clear(parent: BorrowedFd<'_>, name: &OsStr, keep_directory: bool) -> nix::Result<()> {
    let meta = match fstatat(parent, name, AtFlags::AT_SYMLINK_NOFOLLOW) {
        Ok(meta) => meta,
        Err(nix::Error::ENOENT) => return Ok(()),
        Err(err) => return Err(err),
    };
    if meta.st_mode & libc::S_IFMT != libc::S_IFDIR {
        return unlinkat(parent, name, UnlinkatFlags::NoRemoveDir);
    }
    if keep_directory {
        return Ok(());
    }
    // Through the descriptor: the directory that is removed is the one that was looked at.
    let flags = OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_PATH | OFlag::O_CLOEXEC;
    let dir = openat(parent, name, flags, Mode::empty())?;
    let path = readlinkat(
        nix::fcntl::AT_FDCWD,
        format!("/proc/self/fd/{}", dir.as_raw_fd()).as_str(),
    )?;
    std::fs::remove_dir_all(path)
        .map_err(|err| nix::Error::from_raw(err.raw_os_error().unwrap_or(libc::EIO)))
}

fn set_owner_and_mode(
    parent: BorrowedFd<'_>,
    name: &OsStr,
    uid: u32,
    gid: u32,
    mode: Option<u32>,
) -> nix::Result<()> {
    let (uid, gid) = (Uid::from_raw(uid), Gid::from_raw(gid));
    fchownat(
        parent,
        name,
        Some(uid),
        Some(gid),
        AtFlags::AT_SYMLINK_NOFOLLOW,
    )?;
    if let Some(mode) = mode {
        // What is changed was just made here and is no symbolic link.
        let follow = nix::sys::stat::FchmodatFlags::FollowSymlink;
        nix::sys::stat::fchmodat(parent, name, Mode::from_bits_truncate(mode), follow)?;
    }
    Ok(())
}

/// Name and value of an extended attribute.
type Attribute = (Vec<u8>, Vec<u8>);

/// Those an image may carry. `trusted.*` would forge overlayfs' own marks.
fn extended_attributes<R: Read>(entry: &mut Entry<'_, R>) -> Result<Vec<Attribute>, LayerError> {
    let mut attributes = Vec::new();
    if let Some(extensions) = entry.pax_extensions().map_err(LayerError::Damaged)? {
        for extension in extensions {
            let extension = extension.map_err(LayerError::Damaged)?;
            let Some(key) = extension.key_bytes().strip_prefix(b"SCHILY.xattr.") else {
                continue;
            };
            let wanted = key == b"security.capability" || key.starts_with(b"user.");
            if wanted && extension.value_bytes().len() <= MAX_XATTR {
                attributes.push((key.to_vec(), extension.value_bytes().to_vec()));
            }
        }
    }
    Ok(attributes)
}

fn xattr_set(file: BorrowedFd<'_>, key: &[u8], value: &[u8]) -> io::Result<()> {
    let key = CString::new(key)?;
    // SAFETY: the descriptor is open, the name is NUL-terminated, the value has the given length.
    let result = unsafe {
        libc::fsetxattr(
            file.as_raw_fd(),
            key.as_ptr(),
            value.as_ptr().cast(),
            value.len(),
            0,
        )
    };
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    fn unpack_bytes(archive: &[u8], max_bytes: u64) -> Result<tempfile::TempDir, LayerError> {
        let dir = tempfile::tempdir().unwrap();
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(archive).unwrap();
        std::io::Seek::rewind(&mut file).unwrap();
        let diff_id = format!("sha256:{}", hex::encode(Sha256::digest(archive)));
        unpack(file, dir.path(), &diff_id, max_bytes).map(|()| dir)
    }

    fn header(kind: EntryType, size: u64) -> tar::Header {
        let mut header = tar::Header::new_gnu();
        header.set_entry_type(kind);
        header.set_mode(0o644);
        header.set_uid(nix::unistd::getuid().as_raw().into());
        header.set_gid(nix::unistd::getgid().as_raw().into());
        header.set_size(size);
        header
    }

    #[test]
    fn a_name_without_end_does_not_fill_the_memory() {
        let mut builder = tar::Builder::new(Vec::new());
        let name = vec![b'n'; 8 << 20];
        let mut long = header(EntryType::GNULongName, name.len() as u64);
        long.set_path("././@LongLink").unwrap();
        long.set_cksum();
        builder.append(&long, name.as_slice()).unwrap();
        let mut file = header(EntryType::Regular, 0);
        file.set_path("x").unwrap();
        file.set_cksum();
        builder.append(&file, &[][..]).unwrap();
        let err = unpack_bytes(&builder.into_inner().unwrap(), 1 << 30).unwrap_err();
        assert!(err.to_string().contains("header is too large"), "{err}");
    }

    #[test]
    fn directories_without_end_do_not_fill_the_memory() {
        let mut times = DirectoryTimes::new(1000);
        let mut insert = |n: u32| {
            let path = PathBuf::from(format!("{n:0>100}"));
            times.insert(path, TimeSpec::new(0, 0))
        };
        for n in 0..6 {
            insert(n).unwrap();
        }
        let err = insert(6).unwrap_err();
        assert!(err.to_string().contains("too many directories"), "{err}");
    }

    #[test]
    fn a_path_that_no_kernel_takes_is_refused() {
        for name in ["d/".repeat(3000), "n".repeat(300)] {
            let mut builder = tar::Builder::new(Vec::new());
            let mut long = header(EntryType::GNULongName, name.len() as u64);
            long.set_path("././@LongLink").unwrap();
            long.set_cksum();
            builder.append(&long, name.as_bytes()).unwrap();
            let mut file = header(EntryType::Regular, 0);
            file.set_path("x").unwrap();
            file.set_cksum();
            builder.append(&file, &[][..]).unwrap();
            let err = unpack_bytes(&builder.into_inner().unwrap(), 1 << 20).unwrap_err();
            assert!(matches!(err, LayerError::Write { .. }), "{err}");
        }
    }

    #[test]
    fn a_sparse_file_counts_as_large_as_it_becomes() {
        let mut sparse = header(EntryType::GNUSparse, 0);
        sparse.set_path("hole").unwrap();
        let gnu = sparse.as_gnu_mut().unwrap();
        gnu.set_real_size(1 << 30);
        gnu.sparse[0].set_offset(1 << 30);
        gnu.sparse[0].set_length(0);
        sparse.set_cksum();
        let mut archive = sparse.as_bytes().to_vec();
        archive.extend([0; 1024]);
        let err = unpack_bytes(&archive, 1 << 20).unwrap_err();
        assert!(
            matches!(err, LayerError::TooLarge { limit: 1_048_576 }),
            "{err}"
        );
    }

    #[test]
    fn marks_of_overlayfs_cannot_be_forged() {
        let mut builder = tar::Builder::new(Vec::new());
        let pairs = [
            ("SCHILY.xattr.trusted.overlay.redirect", &b"/etc"[..]),
            ("SCHILY.xattr.user.note", &b"hello"[..]),
        ];
        builder.append_pax_extensions(pairs).unwrap();
        let mut file = header(EntryType::Regular, 0);
        file.set_path("x").unwrap();
        file.set_cksum();
        builder.append(&file, &[][..]).unwrap();
        let dir = unpack_bytes(&builder.into_inner().unwrap(), 1 << 20).unwrap();
        let names: Vec<_> = xattr::list(dir.path().join("x")).unwrap().collect();
        assert_eq!(names, ["user.note"]);
    }

    #[test]
    fn noise_is_an_error_and_not_a_panic() {
        let mut seed = 1u64;
        for length in [0usize, 1, 511, 512, 513, 2048, 10_000] {
            let noise: Vec<u8> = (0..length)
                .map(|_| {
                    seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                    (seed >> 33) as u8
                })
                .collect();
            let _ = unpack_bytes(&noise, 1 << 20);
        }
    }

    #[test]
    fn a_later_entry_replaces_an_earlier_one() {
        let mut builder = tar::Builder::new(Vec::new());
        for (kind, path) in [
            (EntryType::Directory, "a"),
            (EntryType::Regular, "a/inner"),
            (EntryType::Regular, "a"),
            (EntryType::Directory, "a"),
            (EntryType::Directory, "a"),
        ] {
            let mut entry = header(kind, 0);
            entry.set_path(path).unwrap();
            entry.set_cksum();
            builder.append(&entry, &[][..]).unwrap();
        }
        let dir = unpack_bytes(&builder.into_inner().unwrap(), 1 << 20).unwrap();
        assert_eq!(std::fs::read_dir(dir.path().join("a")).unwrap().count(), 0);
    }
}
