//! The few libc calls through which time, randomness and waiting enter a process, answered by the
//! simulation while it runs, and by the kernel otherwise.
//!
//! A symbol of the executable wins over libc's, for std, tokio, ring and everybody else, so nothing
//! above needs to know. State is kept in atomics because these are called from anywhere, also
//! while the world is borrowed. Knows hosts only as "who runs now": the engine switches.

use std::cell::{Cell, RefCell};
use std::sync::atomic::{AtomicBool, AtomicI64, AtomicU64, Ordering::Relaxed};
use std::task::Waker;

use libc::{c_int, c_long, c_uint, c_void, size_t, ssize_t};

/// Whether the simulation answers.
static ACTIVE: AtomicBool = AtomicBool::new(false);
/// Simulated nanoseconds since the start, for the host that runs now.
static MONOTONIC: AtomicU64 = AtomicU64::new(0);
/// What its wall clock shows at simulated time 0, nanoseconds since 1970.
static WALL: AtomicI64 = AtomicI64::new(0);
/// The state of its random numbers.
static RANDOM: AtomicU64 = AtomicU64::new(0);
/// Random bytes handed out in all, for the trace.
static DRAWN: AtomicU64 = AtomicU64::new(0);
/// `eventfd`s made by runtimes, a bit each: writes to them wake nobody who is not awake anyway.
static EVENT_FDS: [AtomicU64; 64] = [const { AtomicU64::new(0) }; 64];

thread_local! {
    static PARK: Park = const { Park {
        stepping: Cell::new(false),
        idle: Cell::new(None),
        turns: Cell::new(0),
        root: RefCell::new(None),
    } };
}

/// How the running host's runtime waits.
struct Park {
    stepping: Cell<bool>,
    /// It would wait: for so many milliseconds, or for ever (-1).
    idle: Cell<Option<i32>>,
    turns: Cell<u64>,
    /// Wakes the future that the step waits for.
    root: RefCell<Option<Waker>>,
}

/// A host that looks for events this often within one step at one time never waits.
const TURNS_MAX: u64 = 100_000;

/// From now on the simulation answers, on this thread.
pub fn activate() {
    ACTIVE.store(true, Relaxed);
}

/// Who runs now: the time, and what the wall clock showed at time 0.
pub fn set_clock(now: u64, wall: i64) {
    MONOTONIC.store(now, Relaxed);
    WALL.store(wall, Relaxed);
}

/// Exchanges the state of the random numbers.
pub fn swap_random(state: u64) -> u64 {
    RANDOM.swap(state, Relaxed)
}

/// Random bytes handed out so far.
pub fn drawn() -> u64 {
    DRAWN.load(Relaxed)
}

/// A step begins.
pub fn begin_step() {
    PARK.with(|park| {
        park.stepping.set(true);
        park.idle.set(None);
        park.turns.set(0);
    });
}

/// A step has ended: how long its runtime would wait (milliseconds, -1 for ever).
pub fn end_step() -> Option<i32> {
    let (idle, waker) = PARK.with(|park| {
        park.stepping.set(false);
        (park.idle.take(), park.root.borrow_mut().take())
    });
    drop(waker);
    idle
}

/// Whether the running host has nothing to do now. If not, `waker` is woken when it is so.
pub fn idle_or_wake(waker: &Waker) -> bool {
    PARK.with(|park| {
        if park.idle.get().is_some() {
            return true;
        }
        let mut root = park.root.borrow_mut();
        if root.as_ref().is_none_or(|known| !known.will_wake(waker)) {
            *root = Some(waker.clone());
        }
        false
    })
}

/// The machine's own monotonic clock, in nanoseconds: for measuring the simulator.
pub fn real_nanos() -> u64 {
    let mut at = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    let at_ptr = &raw mut at;
    // SAFETY: the kernel writes one timespec there.
    unsafe {
        raw::syscall6(
            libc::SYS_clock_gettime,
            [
                c_long::from(libc::CLOCK_MONOTONIC),
                at_ptr as c_long,
                0,
                0,
                0,
                0,
            ],
        );
    }
    at.tv_sec.unsigned_abs() * 1_000_000_000 + at.tv_nsec.unsigned_abs()
}

/// The next of a stream of numbers (SplitMix64).
pub fn next_random(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mut word = *state;
    word = (word ^ (word >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    word = (word ^ (word >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    word ^ (word >> 31)
}

fn fill(buf: *mut c_void, len: size_t) -> ssize_t {
    let mut state = RANDOM.load(Relaxed);
    let mut at = buf.cast::<u8>();
    let mut left = len;
    while left > 0 {
        let word = next_random(&mut state).to_le_bytes();
        let part = left.min(word.len());
        // SAFETY: the caller gives `len` writable bytes, and `part` of them are left.
        unsafe {
            std::ptr::copy_nonoverlapping(word.as_ptr(), at, part);
            at = at.add(part);
        }
        left -= part;
    }
    RANDOM.store(state, Relaxed);
    DRAWN.fetch_add(len as u64, Relaxed);
    len.cast_signed()
}

fn abort(message: &str) -> ! {
    eprintln!(
        "simulation: {message}\n{}",
        std::backtrace::Backtrace::force_capture()
    );
    std::process::abort()
}

fn result(value: c_long) -> c_long {
    if (-4095..0).contains(&value) {
        // SAFETY: errno's place is this thread's own.
        unsafe { *libc::__errno_location() = (-value) as c_int };
        return -1;
    }
    value
}

mod raw {
    use libc::c_long;

    #[cfg(target_arch = "x86_64")]
    pub unsafe fn syscall6(number: c_long, args: [c_long; 6]) -> c_long {
        let answer: c_long;
        // SAFETY: the kernel's calling convention; what the call does is the caller's matter.
        unsafe {
            std::arch::asm!(
                "syscall",
                inlateout("rax") number => answer,
                in("rdi") args[0], in("rsi") args[1], in("rdx") args[2],
                in("r10") args[3], in("r8") args[4], in("r9") args[5],
                lateout("rcx") _, lateout("r11") _,
                options(nostack),
            );
        }
        answer
    }

    #[cfg(target_arch = "aarch64")]
    pub unsafe fn syscall6(number: c_long, args: [c_long; 6]) -> c_long {
        let answer: c_long;
        // SAFETY: the kernel's calling convention; what the call does is the caller's matter.
        unsafe {
            std::arch::asm!(
                "svc 0",
                in("x8") number, inlateout("x0") args[0] => answer,
                in("x1") args[1], in("x2") args[2], in("x3") args[3],
                in("x4") args[4], in("x5") args[5],
                options(nostack),
            );
        }
        answer
    }
}

// ---- What replaces libc's ----

/// # Safety
/// As libc's.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn clock_gettime(clock: libc::clockid_t, at: *mut libc::timespec) -> c_int {
    if ACTIVE.load(Relaxed) {
        let monotonic = MONOTONIC.load(Relaxed);
        let nanos = match clock {
            libc::CLOCK_REALTIME | libc::CLOCK_REALTIME_COARSE => (WALL.load(Relaxed)
                + monotonic.cast_signed())
            .max(0)
            .unsigned_abs(),
            // A machine that has been up for a while.
            _ => monotonic + 1_000_000_000_000,
        };
        // SAFETY: the caller gives a place for one timespec.
        unsafe {
            (*at).tv_sec = (nanos / 1_000_000_000).cast_signed();
            (*at).tv_nsec = (nanos % 1_000_000_000).cast_signed();
        }
        return 0;
    }
    // SAFETY: passed on as it came.
    let answer = unsafe {
        raw::syscall6(
            libc::SYS_clock_gettime,
            [c_long::from(clock), at as c_long, 0, 0, 0, 0],
        )
    };
    result(answer) as c_int
}

/// # Safety
/// As libc's.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn gettimeofday(at: *mut libc::timeval, _zone: *mut c_void) -> c_int {
    let mut now = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: `now` is ours, `at` is a place for one timeval.
    unsafe {
        clock_gettime(libc::CLOCK_REALTIME, &raw mut now);
        (*at).tv_sec = now.tv_sec;
        (*at).tv_usec = now.tv_nsec / 1000;
    }
    0
}

/// # Safety
/// As libc's.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn getrandom(buf: *mut c_void, len: size_t, flags: c_uint) -> ssize_t {
    if ACTIVE.load(Relaxed) {
        return fill(buf, len);
    }
    // SAFETY: passed on as it came.
    let answer = unsafe {
        raw::syscall6(
            libc::SYS_getrandom,
            [
                buf as c_long,
                len.cast_signed() as c_long,
                c_long::from(flags),
                0,
                0,
                0,
            ],
        )
    };
    result(answer) as ssize_t
}

/// libc's is variadic; in both calling conventions that are supported a caller cannot tell.
///
/// # Safety
/// As libc's.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn syscall(
    number: c_long,
    a: c_long,
    b: c_long,
    c: c_long,
    d: c_long,
    e: c_long,
    f: c_long,
) -> c_long {
    if number == libc::SYS_getrandom && ACTIVE.load(Relaxed) {
        return fill(a as *mut c_void, b.cast_unsigned() as size_t) as c_long;
    }
    // SAFETY: passed on as it came.
    result(unsafe { raw::syscall6(number, [a, b, c, d, e, f]) })
}

/// # Safety
/// As libc's.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn epoll_wait(
    fd: c_int,
    events: *mut libc::epoll_event,
    max: c_int,
    timeout: c_int,
) -> c_int {
    let simulated = ACTIVE.load(Relaxed)
        && PARK.with(|park| {
            if !park.stepping.get() {
                return false;
            }
            park.turns.set(park.turns.get() + 1);
            if park.turns.get() > TURNS_MAX {
                abort("a host is busy without end");
            }
            if timeout != 0 {
                park.idle.set(Some(timeout));
                if let Some(root) = &*park.root.borrow() {
                    root.wake_by_ref();
                }
            }
            true
        });
    if simulated {
        // No host has a real file to wait for.
        return 0;
    }
    // epoll_pwait with no mask is epoll_wait, on every architecture.
    // SAFETY: passed on as it came.
    let answer = unsafe {
        raw::syscall6(
            libc::SYS_epoll_pwait,
            [
                c_long::from(fd),
                events as c_long,
                c_long::from(max),
                c_long::from(timeout),
                0,
                8,
            ],
        )
    };
    result(answer) as c_int
}

/// # Safety
/// As libc's.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn eventfd(initial: c_uint, flags: c_int) -> c_int {
    // SAFETY: passed on as it came.
    let fd = result(unsafe {
        raw::syscall6(
            libc::SYS_eventfd2,
            [c_long::from(initial), c_long::from(flags), 0, 0, 0, 0],
        )
    }) as c_int;
    if ACTIVE.load(Relaxed)
        && let Some((word, bit)) = event_bit(fd)
    {
        word.fetch_or(bit, Relaxed);
    }
    fd
}

fn event_bit(fd: c_int) -> Option<(&'static AtomicU64, u64)> {
    let fd = usize::try_from(fd).ok()?;
    Some((EVENT_FDS.get(fd / 64)?, 1 << (fd % 64)))
}

/// # Safety
/// As libc's.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn write(fd: c_int, buf: *const c_void, len: size_t) -> ssize_t {
    if let Some((word, bit)) = event_bit(fd)
        && word.load(Relaxed) & bit != 0
    {
        return len.cast_signed();
    }
    // SAFETY: passed on as it came.
    let answer = unsafe {
        raw::syscall6(
            libc::SYS_write,
            [
                c_long::from(fd),
                buf as c_long,
                len.cast_signed() as c_long,
                0,
                0,
                0,
            ],
        )
    };
    result(answer) as ssize_t
}

/// # Safety
/// As libc's.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn close(fd: c_int) -> c_int {
    if let Some((word, bit)) = event_bit(fd) {
        word.fetch_and(!bit, Relaxed);
    }
    // SAFETY: passed on as it came.
    result(unsafe { raw::syscall6(libc::SYS_close, [c_long::from(fd), 0, 0, 0, 0, 0]) }) as c_int
}

/// # Safety
/// As libc's.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pthread_create(
    thread: *mut libc::pthread_t,
    attr: *const libc::pthread_attr_t,
    start: extern "C" fn(*mut c_void) -> *mut c_void,
    arg: *mut c_void,
) -> c_int {
    if ACTIVE.load(Relaxed) {
        // One thread is what makes a run repeatable, and nothing in it needs another.
        abort("somebody starts a thread");
    }
    type Real = unsafe extern "C" fn(
        *mut libc::pthread_t,
        *const libc::pthread_attr_t,
        extern "C" fn(*mut c_void) -> *mut c_void,
        *mut c_void,
    ) -> c_int;
    // SAFETY: libc's own has this signature, and is given what came.
    unsafe {
        let real = libc::dlsym(libc::RTLD_NEXT, c"pthread_create".as_ptr());
        std::mem::transmute::<*mut c_void, Real>(real)(thread, attr, start, arg)
    }
}
