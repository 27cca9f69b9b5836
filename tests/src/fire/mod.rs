//! Real processes under fire: concurrent requests at a cluster to which bad things happen.
//!
//! [`run`] lets many clients create, read, change and remove objects through all
//! managers while [`nemesis`] breaks one thing after another; everything that was
//! asked and answered is in a [`history`], which [`model`] checks for
//! linearizability. [`alarms`] is about the opposite: nothing is broken, but busy,
//! and nobody may be taken for dead. `tests/fire` is the command line of both.

pub mod alarms;
pub mod history;
pub mod model;
pub mod nemesis;
pub mod run;
pub mod workload;
