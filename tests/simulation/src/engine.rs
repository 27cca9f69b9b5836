//! The driver: hosts, their runtimes, and time that moves from event to event.
//!
//! Each host is a current-thread runtime of its own on the one thread there is. A step lets a
//! host run until its runtime would wait; when that wait is to end is its next timer. A crash drops
//! the runtime, so every task of the host dies at an await. Time stands still within a step.

use std::future::Future;
use std::panic::AssertUnwindSafe;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll};

use tokio::runtime::{Builder, Runtime};

use crate::dice::Dice;
use crate::libc_seam;
use crate::world::{self, Event, HostId, HostState, MICRO, MILLI};

/// The wall clocks' time at the start: 2026-01-01.
const WALL_START: i64 = 1_767_225_600_000_000_000;

/// One host, as its driver knows it.
struct Host {
    runtime: Option<Runtime>,
    /// Of its random numbers.
    random: u64,
    timer_version: u64,
    timer_at: Option<u64>,
    /// How far its wall clock is ahead, nanoseconds.
    skew: i64,
    /// It does nothing until then: busy or stopped.
    busy_until: u64,
    /// What a step costs it, nanoseconds.
    step_cost: u64,
}

/// What is done after each step of a host.
type AfterStep = Box<dyn FnMut(&mut Sim, HostId)>;

/// The whole simulation.
pub struct Sim {
    hosts: Vec<Host>,
    seed: u64,
    /// For faults and plans.
    pub dice: Dice,
    after_step: Option<AfterStep>,
    failure: Option<String>,
    done: bool,
    steps: u64,
}

static PANICKED: AtomicBool = AtomicBool::new(false);

thread_local! {
    static PANIC: std::cell::RefCell<Option<String>> = const { std::cell::RefCell::new(None) };
}

/// Remembers the first panic of anybody: one is a failure of the seed.
fn watch_panics() {
    std::panic::set_hook(Box::new(|info| {
        if PANICKED.swap(true, Ordering::Relaxed) {
            return;
        }
        let trace = std::backtrace::Backtrace::force_capture();
        PANIC.with(|place| *place.borrow_mut() = Some(format!("panic: {info}\n{trace}")));
    }));
}

impl Sim {
    /// A world without hosts. There is one in a process.
    pub fn new(seed: u64) -> Self {
        watch_panics();
        world::make(seed);
        libc_seam::set_clock(0, WALL_START);
        libc_seam::swap_random(Dice::new(seed, "driver").word());
        libc_seam::activate();
        Self {
            hosts: Vec::new(),
            seed,
            dice: Dice::new(seed, "faults"),
            after_step: None,
            failure: None,
            done: false,
            steps: 0,
        }
    }

    /// Adds a host that is switched off.
    pub fn add_host(&mut self) -> HostId {
        let id = self.hosts.len();
        self.hosts.push(Host {
            runtime: None,
            random: Dice::new(self.seed, &format!("host {id}")).word(),
            timer_version: 0,
            timer_at: None,
            skew: 0,
            busy_until: 0,
            step_cost: 20 * MICRO,
        });
        world::with(|world| world.hosts.push(HostState::default()));
        id
    }

    /// What is done after each step of a host.
    pub fn after_step(&mut self, check: impl FnMut(&mut Sim, HostId) + 'static) {
        self.after_step = Some(Box::new(check));
    }

    /// Starts a process on the host.
    pub fn boot(&mut self, host: HostId, main: impl Future<Output = ()> + Send + 'static) {
        assert!(self.hosts[host].runtime.is_none(), "the host runs");
        world::with(|world| {
            let state = &mut world.hosts[host];
            state.boot += 1;
            state.up = true;
            state.powered = true;
            state.wakes.clear();
            world.make_runnable(host);
            world.trace(4, host as u64, 1);
        });
        self.enter(host, |sim| {
            let runtime = Builder::new_current_thread()
                .enable_all()
                .max_blocking_threads(1)
                .build()
                .expect("a runtime");
            drop(runtime.spawn(main));
            sim.hosts[host].runtime = Some(runtime);
        });
    }

    /// Starts something in the process that runs on the host; nothing happens if none does.
    pub fn spawn(&mut self, host: HostId, task: impl Future<Output = ()> + Send + 'static) {
        self.enter(host, |sim| {
            if let Some(runtime) = &sim.hosts[host].runtime {
                drop(runtime.spawn(task));
            }
        });
        world::with(|world| world.make_runnable(host));
    }

    /// Ends the host's process as `kill -9` does or, with `power`, the whole machine.
    pub fn crash(&mut self, host: HostId, power: bool) {
        let Some(runtime) = self.hosts[host].runtime.take() else {
            if power {
                world::with(|world| world.hosts[host].powered = false);
            }
            return;
        };
        world::with(|world| {
            world.trace(4, host as u64, 2 + u64::from(power));
            world.hosts[host].powered = !power;
            world.host_ends(host);
            let state = &mut world.hosts[host];
            state.up = false;
        });
        self.enter(host, |_| {
            let guard = runtime.enter();
            crate::machine::forget(host);
            drop(guard);
            drop(runtime);
        });
        let wakes = world::with(|world| {
            world.runnable.retain(|other| *other != host);
            std::mem::take(&mut world.hosts[host].wakes)
        });
        drop(wakes);
        self.hosts[host].timer_version += 1;
        self.hosts[host].timer_at = None;
    }

    /// Whether a process runs on the host.
    pub fn is_up(&self, host: HostId) -> bool {
        self.hosts[host].runtime.is_some()
    }

    /// Sets how far the host's wall clock is ahead (nanoseconds): a jump, if it was otherwise.
    pub fn set_skew(&mut self, host: HostId, ahead: i64) {
        self.hosts[host].skew = ahead;
    }

    /// Sets what a step costs the host (nanoseconds): how slow its processor is.
    pub fn set_step_cost(&mut self, host: HostId, cost: u64) {
        self.hosts[host].step_cost = cost;
    }

    /// Stops the host for so long (nanoseconds); it goes on as if nothing had been.
    pub fn pause(&mut self, host: HostId, nanos: u64) {
        let until = world::now() + nanos;
        let busy = &mut self.hosts[host].busy_until;
        *busy = (*busy).max(until);
    }

    /// Ends a pause.
    pub fn resume(&mut self, host: HostId) {
        let now = world::now();
        if self.hosts[host].busy_until > now {
            self.hosts[host].busy_until = now;
            self.set_timer(host, now);
        }
    }

    /// The seed has failed; only the first reason counts.
    pub fn fail(&mut self, reason: String) {
        self.failure.get_or_insert(reason);
    }

    /// The seed is over.
    pub fn done(&mut self) {
        self.done = true;
    }

    /// Whether it has come to its end.
    pub fn is_done(&self) -> bool {
        self.done
    }

    /// The seed.
    pub fn seed(&self) -> u64 {
        self.seed
    }

    /// Why the seed has failed.
    pub fn failure(&self) -> Option<&str> {
        self.failure.as_deref()
    }

    /// Steps so far.
    pub fn steps(&self) -> u64 {
        self.steps
    }

    /// Runs as the host: its time, its random numbers.
    fn enter<T>(&mut self, host: HostId, run: impl FnOnce(&mut Self) -> T) -> T {
        let now = world::with(|world| {
            world.running = Some(host);
            world.now()
        });
        libc_seam::set_clock(now, WALL_START + self.hosts[host].skew);
        let outer = libc_seam::swap_random(self.hosts[host].random);
        let value = run(self);
        self.hosts[host].random = libc_seam::swap_random(outer);
        libc_seam::set_clock(now, WALL_START);
        world::with(|world| world.running = None);
        value
    }

    /// Runs until a time, or until the seed fails.
    pub fn run_until(&mut self, until: u64) {
        while self.failure.is_none() && !self.done {
            let runnable = world::with(|world| std::mem::take(&mut world.runnable));
            for host in runnable {
                self.step(host);
                self.note_panic();
            }
            if world::with(|world| !world.runnable.is_empty()) {
                continue;
            }
            let Some(event) = world::with(|world| world.pop(until)) else {
                world::with(|world| world.advance(until));
                return;
            };
            self.happen(event);
        }
    }

    fn happen(&mut self, event: Event) {
        match event {
            Event::Timer { host, version } => {
                if self.hosts[host].timer_version == version {
                    self.hosts[host].timer_at = None;
                    world::with(|world| world.make_runnable(host));
                }
            }
            Event::Wake { host, boot, waker } => world::with(|world| {
                if world.hosts[host].boot == boot && world.hosts[host].up {
                    world.wake(host, waker);
                }
            }),
            Event::Net(event) => world::with(|world| world.net(event)),
            Event::Call(call) => call(self),
        }
    }

    fn note_panic(&mut self) {
        if PANICKED.load(Ordering::Relaxed) && self.failure.is_none() {
            let reason = PANIC.with(|place| place.borrow_mut().take());
            self.fail(reason.unwrap_or_else(|| "a panic".to_owned()));
        }
    }

    fn step(&mut self, host: HostId) {
        let now = world::now();
        if self.hosts[host].runtime.is_none() {
            return;
        }
        if self.hosts[host].busy_until > now {
            let at = self.hosts[host].busy_until;
            return self.set_timer(host, at);
        }
        self.steps += 1;
        let before = libc_seam::drawn();
        let idle = self.enter(host, |sim| {
            let Some(runtime) = &sim.hosts[host].runtime else {
                return None;
            };
            libc_seam::begin_step();
            let caught = std::panic::catch_unwind(AssertUnwindSafe(|| {
                runtime.block_on(UntilIdle { host });
            }));
            let idle = libc_seam::end_step();
            if caught.is_err() {
                PANICKED.store(true, Ordering::Relaxed);
            }
            idle
        });
        world::trace(5, host as u64, libc_seam::drawn() - before);
        let cost = self.hosts[host].step_cost;
        self.hosts[host].busy_until = now + cost;
        if let Some(timeout) = idle
            && let Ok(timeout) = u64::try_from(timeout)
        {
            self.set_timer(host, (now + timeout * MILLI).max(now + cost));
        } else {
            self.hosts[host].timer_version += 1;
            self.hosts[host].timer_at = None;
        }
        if let Some(mut check) = self.after_step.take() {
            check(self, host);
            self.after_step.get_or_insert(check);
        }
    }

    fn set_timer(&mut self, host: HostId, at: u64) {
        let state = &mut self.hosts[host];
        if state.timer_at == Some(at) {
            return;
        }
        state.timer_at = Some(at);
        state.timer_version += 1;
        let version = state.timer_version;
        world::with(|world| world.schedule(at, Event::Timer { host, version }));
    }
}

/// Wakes whom the world wants woken, then waits until the runtime has nothing to do.
struct UntilIdle {
    host: HostId,
}

impl Future for UntilIdle {
    type Output = ();

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        let wakes = world::with(|world| std::mem::take(&mut world.hosts[self.host].wakes));
        for waker in wakes {
            waker.wake();
        }
        if libc_seam::idle_or_wake(cx.waker()) {
            Poll::Ready(())
        } else {
            Poll::Pending
        }
    }
}
