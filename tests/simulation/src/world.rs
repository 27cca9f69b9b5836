//! What all hosts share: simulated time, what is to happen when, the network, the trace.
//!
//! Lives in one thread-local place, because the hosts' code reaches it from inside its own
//! futures. Borrowed for moments only, and never while code of a host runs.

use std::cell::RefCell;
use std::cmp::Ordering;
use std::collections::BinaryHeap;
use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll, Waker};

use crate::engine::Sim;
use crate::net::{Fabric, NetEvent};

/// Nanoseconds.
pub const MICRO: u64 = 1_000;
/// Nanoseconds.
pub const MILLI: u64 = 1_000_000;
/// Nanoseconds.
pub const SECOND: u64 = 1_000_000_000;

/// A host's place in the list of hosts.
pub type HostId = usize;

/// Something that happens at a point in time.
pub enum Event {
    /// The host's next timer.
    Timer { host: HostId, version: u64 },
    /// Somebody on the host waits for this moment.
    Wake {
        host: HostId,
        boot: u64,
        waker: Waker,
    },
    /// On the network.
    Net(NetEvent),
    /// The driver does something: a fault, a step of the plan.
    Call(Box<dyn FnOnce(&mut Sim)>),
}

struct Scheduled {
    at: u64,
    order: u64,
    event: Event,
}

impl PartialEq for Scheduled {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other) == Ordering::Equal
    }
}

impl Eq for Scheduled {}

impl PartialOrd for Scheduled {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Scheduled {
    fn cmp(&self, other: &Self) -> Ordering {
        (other.at, other.order).cmp(&(self.at, self.order))
    }
}

/// What the world knows of a host.
#[derive(Debug, Default)]
pub struct HostState {
    /// Counts its starts. Whatever belongs to an earlier one is void.
    pub boot: u64,
    /// Its process runs.
    pub up: bool,
    /// Its kernel runs (answers, with a refusal, where no process listens).
    pub powered: bool,
    /// Wakers to be woken when it is stepped next.
    pub wakes: Vec<Waker>,
}

/// The shared part.
pub struct World {
    now: u64,
    orders: u64,
    queue: BinaryHeap<Scheduled>,
    /// Hosts.
    pub hosts: Vec<HostState>,
    /// The host that runs now.
    pub running: Option<HostId>,
    /// Hosts that have something to do.
    pub runnable: Vec<HostId>,
    /// The network.
    pub fabric: Fabric,
    trace: u64,
    traced: u64,
}

thread_local! {
    static WORLD: RefCell<Option<World>> = const { RefCell::new(None) };
}

/// Looks at or changes the world. Must not run code of a host.
pub fn with<T>(change: impl FnOnce(&mut World) -> T) -> T {
    WORLD.with(|world| change(world.borrow_mut().as_mut().expect("the world is made")))
}

/// Whether there is one (not so when the process ends).
pub fn exists() -> bool {
    WORLD.try_with(|world| world.try_borrow().is_ok_and(|world| world.is_some())) == Ok(true)
}

/// Makes the world.
pub fn make(seed: u64) {
    let world = World {
        now: 0,
        orders: 0,
        queue: BinaryHeap::new(),
        hosts: Vec::new(),
        running: None,
        runnable: Vec::new(),
        fabric: Fabric::new(seed),
        trace: seed,
        traced: 0,
    };
    WORLD.with(|place| *place.borrow_mut() = Some(world));
}

/// Simulated nanoseconds since the start.
pub fn now() -> u64 {
    with(|world| world.now)
}

impl World {
    /// Simulated nanoseconds since the start.
    pub fn now(&self) -> u64 {
        self.now
    }

    /// Lets something happen.
    pub fn schedule(&mut self, at: u64, event: Event) {
        self.orders += 1;
        self.queue.push(Scheduled {
            at: at.max(self.now),
            order: self.orders,
            event,
        });
    }

    /// The next thing that happens until `until`; time moves to it.
    pub fn pop(&mut self, until: u64) -> Option<Event> {
        if self.queue.peek()?.at > until {
            return None;
        }
        let next = self.queue.pop()?;
        self.now = next.at;
        Some(next.event)
    }

    /// Time moves, nothing happens.
    pub fn advance(&mut self, to: u64) {
        self.now = self.now.max(to);
    }

    /// Things that are still to happen.
    pub fn pending(&self) -> usize {
        self.queue.len()
    }

    /// Wakes somebody when the host is stepped next, which is soon.
    pub fn wake(&mut self, host: HostId, waker: Waker) {
        self.hosts[host].wakes.push(waker);
        self.make_runnable(host);
    }

    /// The host has something to do.
    pub fn make_runnable(&mut self, host: HostId) {
        if self.hosts[host].up && !self.runnable.contains(&host) {
            self.runnable.push(host);
        }
    }

    /// Adds to the trace: the same seed must give the same words in the same order.
    pub fn trace(&mut self, kind: u64, a: u64, b: u64) {
        for word in [self.now, kind, a, b] {
            self.trace = (self.trace ^ word)
                .wrapping_mul(0x9e37_79b9_7f4a_7c15)
                .rotate_left(29);
        }
        self.traced += 1;
    }

    /// The trace so far, and how many things are in it.
    pub fn trace_hash(&self) -> (u64, u64) {
        (self.trace, self.traced)
    }
}

/// Adds to the trace.
pub fn trace(kind: u64, a: u64, b: u64) {
    with(|world| world.trace(kind, a, b));
}

/// A hash of bytes for the trace. Fast; says nothing about intent.
pub fn digest(bytes: &[u8]) -> u64 {
    let mut hash = bytes.len() as u64;
    let mut chunks = bytes.chunks_exact(8);
    for chunk in &mut chunks {
        let word = u64::from_le_bytes(chunk.try_into().expect("eight bytes"));
        hash = (hash ^ word)
            .wrapping_mul(0x9e37_79b9_7f4a_7c15)
            .rotate_left(31);
    }
    for byte in chunks.remainder() {
        hash = (hash ^ u64::from(*byte)).wrapping_mul(0x100_0000_01b3);
    }
    hash ^ (hash >> 32)
}

/// Something for the driver to do.
pub fn call_at(at: u64, call: impl FnOnce(&mut Sim) + 'static) {
    with(|world| world.schedule(at, Event::Call(Box::new(call))));
}

/// Returns on the running host after so many simulated nanoseconds (tokio's timers have milliseconds).
pub fn sleep(nanos: u64) -> Sleep {
    Sleep {
        until: with(|world| world.now + nanos),
    }
}

/// See [`sleep`].
pub struct Sleep {
    until: u64,
}

impl Future for Sleep {
    type Output = ();

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        with(|world| {
            if world.now >= self.until {
                return Poll::Ready(());
            }
            let host = world.running.expect("polled on a host");
            let boot = world.hosts[host].boot;
            let waker = cx.waker().clone();
            world.schedule(self.until, Event::Wake { host, boot, waker });
            Poll::Pending
        })
    }
}
