//! What an absent field means. Applied where a value is read; never written back into a spec.

use std::time::Duration;

/// Port of the managers' API, all of it.
pub const API_PORT: u16 = 2377;
/// UDP port of the VXLAN traffic (IANA's, and Swarm's).
pub const DATA_PATH_PORT: u16 = 4789;
/// Agents send a heartbeat at least this often. Three missed ones make a node Down,
/// so that a silent node is Down well within 5 s.
pub const HEARTBEAT: Duration = Duration::from_secs(1);
/// Heartbeats that may be missed before a node is Down.
pub const HEARTBEATS_MISSED: u32 = 3;
/// Reports of an agent that may be on their way: what happens meanwhile goes together into the next
/// one. A manager reads no more of an agent that has more of them waiting.
pub const REPORTS_AHEAD: usize = 4;
/// An agent asks the manager of its session for a sign of life after so long without a word,
pub const SESSION_PROBE_INTERVAL: Duration = Duration::from_secs(2);
/// and looks for another one when there is none for so long. That is for a process that hangs; a dead
/// host is told sooner by the kernel. The leader gives nodes that much longer whose manager has gone silent.
pub const SESSION_PROBE_TIMEOUT: Duration = Duration::from_secs(2);
/// An agent without a session tries managers at least this often. A leader that comes after a time
/// without one waits for that before it takes silence for death.
pub const SESSION_BACKOFF_MAX: Duration = Duration::from_secs(8);
/// Wait before the first restart of a task in a row. (Swarm: 5 s, constant.)
pub const RESTART_DELAY: Duration = Duration::from_secs(5);
/// The back-off between restarts grows up to this multiple of the delay.
pub const RESTART_BACKOFF_MAX: u32 = 16;
/// From the stop signal to SIGKILL.
pub const STOP_GRACE: Duration = Duration::from_secs(10);
/// Tasks kept per slot for people to read.
pub const TASK_HISTORY: u64 = 5;
/// Life of a node's certificate.
pub const NODE_CERT_LIFE: Duration = Duration::from_secs(90 * 24 * 3600);
/// Log entries between two snapshots.
pub const SNAPSHOT_INTERVAL: u64 = 10_000;
/// Subnets of overlay networks are cut from here.
pub const ADDRESS_POOL: &str = "10.0.0.0/8";
/// Prefix length of such a subnet.
pub const SUBNET_PREFIX: u8 = 24;
/// VNIs that are given out: below are those that people number by hand.
pub const VNI_MIN: u32 = 4096;
/// The last VNI (24 bits).
pub const VNI_MAX: u32 = (1 << 24) - 1;
/// No gRPC message is larger, either way.
pub const MESSAGE_MAX: usize = 4 << 20;
/// No transaction is larger once encoded: one object of 1 MiB and some.
pub const TRANSACTION_MAX: usize = 3 << 19;
/// After this long a Down node's tasks are ORPHANED and their addresses given back.
pub const ORPHAN_AFTER: Duration = Duration::from_secs(24 * 3600);
/// OU of a manager's certificate, and the name in its SAN.
pub const ROLE_MANAGER: &str = "swarm-manager";
/// OU of a worker's certificate, and the name in its SAN.
pub const ROLE_WORKER: &str = "swarm-worker";
/// Label on objects that names the stack they belong to.
pub const STACK_LABEL: &str = "com.docker.stack.namespace";
