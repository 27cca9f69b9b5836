//! What the product's seams are plugged into: the simulated network, and the disk's moods.

use std::io;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};

use parking_lot::Mutex;
use swarm_disk::memory::Weather;
use swarm_identity::net::{Acceptor, BoxStream, Net};

use crate::dice::Dice;
use crate::net::{SimListener, SimStream};
use crate::world::{self, MICRO};

/// The simulated network, as the product knows it.
#[derive(Clone, Copy, Debug)]
pub struct SimNet;

impl SimNet {
    /// To give away.
    pub fn shared() -> Arc<dyn Net> {
        Arc::new(Self)
    }
}

fn parse(addr: &str) -> io::Result<SocketAddr> {
    addr.parse()
        .map_err(|_| io::Error::new(io::ErrorKind::InvalidInput, format!("not ip:port: {addr}")))
}

#[async_trait::async_trait]
impl Net for SimNet {
    async fn connect(&self, target: &str) -> io::Result<BoxStream> {
        Ok(Box::new(SimStream::connect(parse(target)?).await?))
    }

    async fn listen(&self, addr: &str) -> io::Result<Box<dyn Acceptor>> {
        Ok(Box::new(SimListener::listen(parse(addr)?)?))
    }
}

#[async_trait::async_trait]
impl Acceptor for SimListener {
    fn local_addr(&self) -> io::Result<SocketAddr> {
        Ok(Self::local_addr(self))
    }

    async fn accept(&self) -> io::Result<(BoxStream, SocketAddr)> {
        let (stream, peer) = Self::accept(self).await;
        Ok((Box::new(stream), peer))
    }
}

/// How a host's disk is at the moment.
#[derive(Debug)]
pub struct DiskMood {
    dice: Mutex<Dice>,
    /// Mean time of a sync, nanoseconds.
    sync_mean: AtomicU64,
    /// Until then no sync is completed, simulated nanoseconds.
    stalled_until: AtomicU64,
    /// Syncs and writes fail.
    failing: AtomicBool,
}

/// A sync takes about so long on a good disk.
const SYNC: u64 = 150 * MICRO;

impl DiskMood {
    /// A good one.
    pub fn new(dice: Dice) -> Arc<Self> {
        Arc::new(Self {
            dice: Mutex::new(dice),
            sync_mean: AtomicU64::new(SYNC),
            stalled_until: AtomicU64::new(0),
            failing: AtomicBool::new(false),
        })
    }

    /// Sets how long syncs take from now on; `None`: as a good disk's.
    pub fn set_slow(&self, mean: Option<u64>) {
        self.sync_mean.store(mean.unwrap_or(SYNC), Relaxed);
    }

    /// No sync is completed before that time.
    pub fn stall(&self, until: u64) {
        self.stalled_until.fetch_max(until, Relaxed);
    }

    /// Whether everything fails from now on.
    pub fn set_failing(&self, failing: bool) {
        self.failing.store(failing, Relaxed);
    }

    fn check(&self) -> io::Result<()> {
        if self.failing.load(Relaxed) {
            return Err(io::Error::from_raw_os_error(libc::ENOSPC));
        }
        Ok(())
    }
}

#[async_trait::async_trait]
impl Weather for DiskMood {
    async fn sync(&self, _: &Path) -> io::Result<()> {
        let mean = self.sync_mean.load(Relaxed);
        let takes = mean / 2 + self.dice.lock().around(mean / 2);
        world::sleep(takes).await;
        let stalled = self.stalled_until.load(Relaxed);
        let now = world::now();
        if stalled > now {
            world::sleep(stalled - now).await;
        }
        self.check()
    }

    fn write(&self, _: &Path) -> io::Result<()> {
        self.check()
    }
}
