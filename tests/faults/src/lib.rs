//! Faults inside one process: preloaded by the lab into each host's `swarmd`, and by nothing else.
//!
//! Stands before libc's functions of the same names: the wall clock may be wrong,
//! syncing may take long, and writes below `/var/lib/swarm` may find no space. What
//! is wrong is read at each call from the host's control file, mapped into memory,
//! so that the lab changes it while the process runs. Takes itself out of the
//! environment first, so that whatever the process starts is not concerned.
//! Without a control file it passes everything on.

use std::ffi::{CStr, c_char, c_int, c_void};
use std::ptr;
use std::sync::atomic::{AtomicI64, AtomicPtr, AtomicU64, Ordering};

mod control;

/// Where a host's state is, as `swarmd` in its namespaces sees it.
const STATE_DIR: &[u8] = b"/var/lib/swarm/";
const NANOS: i64 = 1_000_000_000;

/// The mapped control file; null when there is none.
static CONTROL: AtomicPtr<u8> = AtomicPtr::new(ptr::null_mut());

// Runs before main, after libc's own initialisation.
#[used]
#[unsafe(link_section = ".init_array")]
static INIT: extern "C" fn() = init;

extern "C" fn init() {
    let mut variable = [0_u8; 64];
    variable[..control::VARIABLE.len()].copy_from_slice(control::VARIABLE.as_bytes());
    let variable = variable.as_ptr().cast::<c_char>();
    // SAFETY: before main there is one thread, so nobody reads the environment meanwhile; the
    // strings end with a zero; the mapping is of a whole page of a file that is not made shorter.
    unsafe {
        let path = libc::getenv(variable);
        if path.is_null() {
            return;
        }
        let file = libc::open(path, libc::O_RDONLY | libc::O_CLOEXEC);
        libc::unsetenv(variable);
        libc::unsetenv(c"LD_PRELOAD".as_ptr());
        if file < 0 {
            return;
        }
        let mapped = libc::mmap(
            ptr::null_mut(),
            control::SIZE,
            libc::PROT_READ,
            libc::MAP_SHARED,
            file,
            0,
        );
        libc::close(file);
        if mapped != libc::MAP_FAILED {
            CONTROL.store(mapped.cast(), Ordering::Release);
        }
    }
}

fn word(offset: usize) -> u64 {
    let control = CONTROL.load(Ordering::Acquire);
    if control.is_null() {
        return 0;
    }
    // SAFETY: the mapping is never undone, the offset is aligned and inside, and the file
    // is only written in whole words.
    unsafe { (*control.add(offset).cast::<AtomicU64>()).load(Ordering::Relaxed) }
}

fn skew() -> i64 {
    let control = CONTROL.load(Ordering::Acquire);
    if control.is_null() {
        return 0;
    }
    // SAFETY: as in `word`.
    unsafe { (*control.add(control::SKEW).cast::<AtomicI64>()).load(Ordering::Relaxed) }
}

/// The function of this name that would have been called without this library.
fn next(cache: &AtomicPtr<c_void>, name: &CStr) -> *mut c_void {
    let known = cache.load(Ordering::Relaxed);
    if !known.is_null() {
        return known;
    }
    // SAFETY: the name ends with a zero.
    let found = unsafe { libc::dlsym(libc::RTLD_NEXT, name.as_ptr()) };
    if found.is_null() {
        // SAFETY: takes no arguments; without the real function nothing can go on.
        unsafe { libc::abort() }
    }
    cache.store(found, Ordering::Relaxed);
    found
}

/// Calls the next function of a name with a signature.
macro_rules! next {
    ($name:literal, fn($($arg:ty),*) -> $result:ty) => {{
        static CACHE: AtomicPtr<c_void> = AtomicPtr::new(ptr::null_mut());
        let found = next(&CACHE, $name);
        // SAFETY: libc's function of that name has this signature.
        unsafe { std::mem::transmute::<*mut c_void, unsafe extern "C" fn($($arg),*) -> $result>(found) }
    }};
}

// --- The wall clock ---------------------------------------------------------

/// As in clock_gettime(2), with the host's skew on the wall clock.
///
/// # Safety
/// As libc's.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn clock_gettime(clock: libc::clockid_t, time: *mut libc::timespec) -> c_int {
    let real = next!(
        c"clock_gettime",
        fn(libc::clockid_t, *mut libc::timespec) -> c_int
    );
    // SAFETY: the caller's promise.
    let result = unsafe { real(clock, time) };
    let skew = skew();
    let wall = matches!(clock, libc::CLOCK_REALTIME | libc::CLOCK_REALTIME_COARSE);
    if skew != 0 && wall && result == 0 {
        // SAFETY: the real function has just written there.
        unsafe {
            let nanos = (*time).tv_nsec + skew.rem_euclid(NANOS);
            (*time).tv_sec += skew.div_euclid(NANOS) + nanos.div_euclid(NANOS);
            (*time).tv_nsec = nanos.rem_euclid(NANOS);
        }
    }
    result
}

/// As in gettimeofday(2), with the host's skew.
///
/// # Safety
/// As libc's.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn gettimeofday(time: *mut libc::timeval, zone: *mut c_void) -> c_int {
    let real = next!(
        c"gettimeofday",
        fn(*mut libc::timeval, *mut c_void) -> c_int
    );
    // SAFETY: the caller's promise.
    let result = unsafe { real(time, zone) };
    let skew = skew();
    if skew != 0 && result == 0 && !time.is_null() {
        // SAFETY: the real function has just written there.
        unsafe {
            let micros = (*time).tv_usec + skew.rem_euclid(NANOS) / 1000;
            (*time).tv_sec += skew.div_euclid(NANOS) + micros.div_euclid(1_000_000);
            (*time).tv_usec = micros.rem_euclid(1_000_000);
        }
    }
    result
}

/// As in time(2), with the host's skew.
///
/// # Safety
/// As libc's.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn time(out: *mut libc::time_t) -> libc::time_t {
    let mut now = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: `now` is ours; `out` is null or the caller's to be written.
    unsafe {
        clock_gettime(libc::CLOCK_REALTIME, &raw mut now);
        if !out.is_null() {
            *out = now.tv_sec;
        }
    }
    now.tv_sec
}

// --- The disk ---------------------------------------------------------------

fn delay() {
    let nanos = word(control::SYNC_DELAY);
    if nanos > 0 {
        std::thread::sleep(std::time::Duration::from_nanos(nanos));
    }
}

/// As in fsync(2), after the host's delay.
///
/// # Safety
/// As libc's.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn fsync(file: c_int) -> c_int {
    delay();
    let real = next!(c"fsync", fn(c_int) -> c_int);
    // SAFETY: the caller's promise.
    unsafe { real(file) }
}

/// As in fdatasync(2), after the host's delay.
///
/// # Safety
/// As libc's.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn fdatasync(file: c_int) -> c_int {
    delay();
    let real = next!(c"fdatasync", fn(c_int) -> c_int);
    // SAFETY: the caller's promise.
    unsafe { real(file) }
}

/// Whether a write to this file finds no space: the disk is full, and the file is on it.
fn full(file: c_int) -> bool {
    if word(control::FULL) == 0 {
        return false;
    }
    let mut link = [0_u8; 32];
    let written = {
        use std::io::Write as _;
        let mut rest = &mut link[..31];
        write!(rest, "/proc/self/fd/{file}").is_ok()
    };
    let mut target = [0_u8; STATE_DIR.len()];
    // SAFETY: the link's name ends with a zero; the target's length is given.
    let length = unsafe {
        libc::readlink(
            link.as_ptr().cast(),
            target.as_mut_ptr().cast(),
            target.len(),
        )
    };
    let below = written && usize::try_from(length) == Ok(STATE_DIR.len()) && target == STATE_DIR;
    if below {
        // SAFETY: returns the place of this thread's errno.
        unsafe { *libc::__errno_location() = libc::ENOSPC };
    }
    below
}

/// As in write(2); without space on a full disk.
///
/// # Safety
/// As libc's.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn write(file: c_int, from: *const c_void, count: usize) -> isize {
    if full(file) {
        return -1;
    }
    let real = next!(c"write", fn(c_int, *const c_void, usize) -> isize);
    // SAFETY: the caller's promise.
    unsafe { real(file, from, count) }
}

/// As in writev(2); without space on a full disk.
///
/// # Safety
/// As libc's.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn writev(file: c_int, from: *const libc::iovec, count: c_int) -> isize {
    if full(file) {
        return -1;
    }
    let real = next!(c"writev", fn(c_int, *const libc::iovec, c_int) -> isize);
    // SAFETY: the caller's promise.
    unsafe { real(file, from, count) }
}

/// As in pwrite(2); without space on a full disk.
///
/// # Safety
/// As libc's.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pwrite64(
    file: c_int,
    from: *const c_void,
    count: usize,
    offset: libc::off64_t,
) -> isize {
    if full(file) {
        return -1;
    }
    let real = next!(
        c"pwrite64",
        fn(c_int, *const c_void, usize, libc::off64_t) -> isize
    );
    // SAFETY: the caller's promise.
    unsafe { real(file, from, count, offset) }
}

/// As in pwrite(2); without space on a full disk.
///
/// # Safety
/// As libc's.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pwrite(
    file: c_int,
    from: *const c_void,
    count: usize,
    offset: libc::off_t,
) -> isize {
    // SAFETY: the caller's promise; offsets have 64 bits on the platforms the lab runs on.
    unsafe { pwrite64(file, from, count, offset) }
}
