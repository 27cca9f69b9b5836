//! Network namespaces kept alive by a file, and what is done inside them.
//!
//! A namespace is entered only by a thread of its own, which runs one synchronous
//! closure and ends: nothing awaits in a foreign namespace, and no worker of the async
//! runtime ever changes its own. Starts no process.

use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::{Path, PathBuf};

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, setns, unshare};

use super::nft::Nft;
use super::route::Route;

/// Runs `inside` on a thread of its own in that namespace (`None` = where this process is).
pub fn run_in<T: Send>(
    netns: Option<BorrowedFd<'_>>,
    inside: impl FnOnce() -> io::Result<T> + Send,
) -> io::Result<T> {
    std::thread::scope(|scope| {
        scope
            .spawn(move || {
                if let Some(netns) = netns {
                    setns(netns, CloneFlags::CLONE_NEWNET)?;
                }
                inside()
            })
            .join()
            .unwrap_or_else(|_| Err(io::Error::other("a thread in a namespace panicked")))
    })
}

/// Writes a kernel setting of the calling thread's network namespace.
pub fn sysctl(path: &str, value: &str) -> io::Result<()> {
    fs::write(Path::new("/proc/sys/net").join(path), value)
}

/// A namespace with its file and sockets.
#[derive(Debug)]
pub struct Netns {
    path: PathBuf,
    file: File,
    /// Links and routes inside.
    pub route: Route,
    /// Packet rules inside.
    pub nft: Nft,
}

impl Netns {
    /// Makes a namespace, runs `prepare` in it, and keeps it by binding it to `path`.
    pub fn create(
        path: &Path,
        prepare: impl FnOnce(&Route) -> io::Result<()> + Send,
    ) -> io::Result<Self> {
        if let Some(parent) = path.parent() {
            fs::create_dir_all(parent)?;
        }
        // A file without a namespace behind it is what a crash leaves.
        remove(path)?;
        File::create_new(path)?;
        let made = run_in(None, || {
            unshare(CloneFlags::CLONE_NEWNET)?;
            let route = Route::open()?;
            let nft = Nft::open()?;
            if let Some(loopback) = route.link("lo")? {
                route.set_up(loopback.index)?;
            }
            prepare(&route)?;
            mount(
                Some("/proc/thread-self/ns/net"),
                path,
                None::<&str>,
                MsFlags::MS_BIND,
                None::<&str>,
            )?;
            Ok((route, nft))
        });
        let opened = made.and_then(|(route, nft)| {
            Ok(Self {
                path: path.to_owned(),
                file: File::open(path)?,
                route,
                nft,
            })
        });
        if opened.is_err() {
            let _ = remove(path);
        }
        opened
    }

    /// Opens one that is there; `None` if the file is missing or no namespace.
    pub fn open(path: &Path) -> io::Result<Option<Self>> {
        let file = match File::open(path) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error),
        };
        match run_in(Some(file.as_fd()), || Ok((Route::open()?, Nft::open()?))) {
            Ok((route, nft)) => Ok(Some(Self {
                path: path.to_owned(),
                file,
                route,
                nft,
            })),
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// For placing links in it.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }

    /// Its file.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

/// Lets a namespace go. Already gone is success.
pub fn remove(path: &Path) -> io::Result<()> {
    match umount2(path, MntFlags::MNT_DETACH) {
        Ok(()) | Err(nix::errno::Errno::EINVAL | nix::errno::Errno::ENOENT) => {}
        Err(error) => return Err(error.into()),
    }
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}
