//! Hands out what is scarce: subnets, VNIs, virtual addresses, task addresses.
//!
//! Called by apply only, so what it decides is as replicated as the log. It
//! works on persistent structures: cloning is O(1), every step costs the
//! logarithm of what is stored. An address that was given back is not given
//! out again before all others of its range have been.

mod ipam;
mod ranges;

pub(crate) use ipam::{Exhausted, Ipam, Names, Waiter, address_pools};
