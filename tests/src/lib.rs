//! Whole clusters on one machine: hosts in network namespaces, faults on purpose.
//!
//! [`lab`] makes and removes the hosts; `deploy/lab` is its command line, and
//! the cluster tests and benches use it as a library, through [`cluster`].

pub mod bench;
pub mod cluster;
pub mod faults;
pub mod fire;
pub mod lab;
pub mod linearize;
pub mod museum;
