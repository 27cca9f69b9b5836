//! The control file of one host: written by the lab, mapped by the preloaded library.
//!
//! Native byte order, one word per fault, each read and written at once; 0 is no fault.

/// Names the control file to the library, which removes it from the environment.
pub const VARIABLE: &str = "SWARM_FAULTS_CONTROL";
/// Bytes of the file.
pub const SIZE: usize = 4096;
/// Offset of the time that each fsync and fdatasync takes longer: u64, nanoseconds.
pub const SYNC_DELAY: usize = 0;
/// Offset of what is added to the wall clock: i64, nanoseconds.
pub const SKEW: usize = 8;
/// Offset of whether the state directory has no space left: u64, 0 or 1.
pub const FULL: usize = 16;
