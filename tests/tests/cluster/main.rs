//! Whole clusters in namespaces. One program: linking one for each file costs more than running some.

mod api;
mod baddays;
mod clocks;
mod containers;
mod durability;
mod faults;
mod fire;
mod flags;
mod membership;
mod museum;
mod refusals;
mod verbs;
mod walkthrough;
