//! Power cuts against the files that a node keeps: a disk that forgets what was not synced.
//!
//! [`disk`] is the model and decides, by dice, what a cut leaves; [`mount`] shows it to
//! the kernel as a file system; [`member`] is the process on top of it that the power is
//! taken from; [`run`] cuts, starts again and compares. Test code: nothing of it is shipped.

pub mod disk;
pub mod member;
pub mod mount;
pub mod run;
