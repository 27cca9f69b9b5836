//! Looks into a container's root file system without leaving it.
//!
//! Symbolic links inside mean what they mean to the container (`RESOLVE_IN_ROOT`),
//! so a hostile image or container cannot make us open a file of the host.

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Component, Path, PathBuf};

use nix::fcntl::{OFlag, OpenHow, ResolveFlag, openat2};
use nix::sys::stat::{Mode, mkdirat};

use super::bundle::{self, Identity, UserSpec};

/// /etc/passwd and /etc/group are read up to here.
const MAX_TABLE: u64 = 4 << 20;

fn open(root: impl AsFd, path: &Path, flags: OFlag) -> nix::Result<OwnedFd> {
    let path = path.strip_prefix("/").unwrap_or(path);
    let path = if path.as_os_str().is_empty() {
        Path::new(".")
    } else {
        path
    };
    let how = OpenHow::new()
        .flags(flags | OFlag::O_CLOEXEC | OFlag::O_NOCTTY)
        .resolve(ResolveFlag::RESOLVE_IN_ROOT | ResolveFlag::RESOLVE_NO_MAGICLINKS);
    openat2(root, path, how)
}

/// Finds the numbers for a user and groups in the root's tables.
pub(super) fn resolve_user(root: &Path, wanted: &UserSpec) -> Result<Identity, String> {
    let root = File::open(root).map_err(|err| format!("open {}: {err}", root.display()))?;
    let table = |path: &str| match open(&root, Path::new(path), OFlag::O_RDONLY | OFlag::O_NONBLOCK)
    {
        Ok(file) => {
            let file = File::from(file);
            let mut bytes = Vec::new();
            if file.metadata().is_ok_and(|meta| meta.is_file()) {
                let read = file.take(MAX_TABLE).read_to_end(&mut bytes);
                read.map_err(|err| format!("read {path}: {err}"))?;
            }
            Ok(String::from_utf8_lossy(&bytes).into_owned())
        }
        Err(nix::Error::ENOENT | nix::Error::ENOTDIR) => Ok(String::new()),
        Err(err) => Err(format!("open {path}: {err}")),
    };
    bundle::resolve_user(wanted, &table("etc/passwd")?, &table("etc/group")?)
}

/// Makes a directory and those above it, as Docker does for a working directory.
pub(super) fn ensure_dir(root: &Path, path: &Path) -> io::Result<()> {
    let root = File::open(root)?;
    let mut made = PathBuf::new();
    for part in path.components() {
        let Component::Normal(part) = part else {
            continue;
        };
        let above = open(&root, &made, OFlag::O_RDONLY | OFlag::O_DIRECTORY)?;
        match mkdirat(&above, part, Mode::from_bits_truncate(0o755)) {
            Ok(()) | Err(nix::Error::EEXIST) => {}
            Err(err) => return Err(err.into()),
        }
        made.push(part);
    }
    Ok(())
}
