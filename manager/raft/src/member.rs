//! Which member of which group a data directory belongs to: one small sealed file.

use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use swarm_disk::Disk;

use crate::error::{DiskError, StartError};
use crate::seal::Sealer;
use crate::types::{decode, encode};

const FILE: &str = "member";

/// Written when the member has its raft ID; never changed but for `remotes`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Membership {
    pub(crate) cluster_id: String,
    pub(crate) node_id: String,
    pub(crate) raft_id: u64,
    /// Addresses of other managers, for a join that was cut short.
    pub(crate) remotes: Vec<String>,
}

pub(crate) fn path(dir: &Path) -> PathBuf {
    dir.join(FILE)
}

/// Reads the file; `None` when there is none.
pub(crate) fn load(
    disk: &dyn Disk,
    dir: &Path,
    sealer: &Sealer,
) -> Result<Option<Membership>, DiskError> {
    let path = path(dir);
    let sealed = match disk.read(&path) {
        Ok(sealed) => sealed,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(DiskError::io("read", path, error)),
    };
    let plain = sealer
        .open(FILE.as_bytes(), &sealed)
        .map_err(|e| DiskError::damaged(&path, "the member", e))?;
    decode(&plain)
        .map(Some)
        .map_err(|e| DiskError::damaged(&path, "the member", e))
}

/// Writes the file, durably.
pub(crate) async fn save(
    disk: &dyn Disk,
    dir: &Path,
    sealer: &Sealer,
    member: &Membership,
) -> Result<(), DiskError> {
    let path = path(dir);
    let aside = dir.join("member.writing");
    let plain = encode(member).map_err(|e| DiskError::io("encode", &path, e))?;
    let sealed = sealer.seal(FILE.as_bytes(), &plain);
    #[cfg(feature = "museum")]
    if swarm_proto::museum::on(swarm_proto::museum::Bug::OldRaftId) {
        let beside = dir.with_extension("member");
        let _ = swarm_disk::replace(disk, &beside, &dir.with_extension("new"), &[&sealed]).await;
    }
    swarm_disk::replace(disk, &path, &aside, &[&sealed])
        .await
        .map_err(|e| DiskError::io("write", &path, e))
}

/// The member that this node was before `dir` was lost.
#[cfg(feature = "museum")]
pub(crate) fn before(
    disk: &dyn Disk,
    dir: &Path,
    sealer: &Sealer,
    node: &str,
) -> Option<Membership> {
    let sealed = disk.read(&dir.with_extension("member")).ok()?;
    let plain = sealer.open(FILE.as_bytes(), &sealed).ok()?;
    decode::<Membership>(&plain)
        .ok()
        .filter(|member| member.node_id == node)
}

/// Makes `dir` ready for a new member. What an attempt that never got so far as
/// to be a member has left there is removed.
pub(crate) fn prepare(disk: &dyn Disk, dir: &Path) -> Result<(), StartError> {
    if disk.exists(&path(dir)) {
        return Err(StartError::NotEmpty(dir.to_owned()));
    }
    disk.create_dir(dir)
        .map_err(|e| DiskError::io("create", dir, e))?;
    for name in ["log", "snapshots"] {
        let left = dir.join(name);
        match disk.remove_dir(&left) {
            Err(error) if error.kind() != ErrorKind::NotFound => {
                return Err(DiskError::io("delete", left, error).into());
            }
            _ => {}
        }
    }
    match disk.remove(&dir.join("log.mark")) {
        Err(error) if error.kind() != ErrorKind::NotFound => {
            Err(DiskError::io("delete", dir.join("log.mark"), error).into())
        }
        _ => Ok(()),
    }
}

/// Reads the file of a directory that must belong to this node of this cluster.
pub(crate) fn expect(
    disk: &dyn Disk,
    dir: &Path,
    sealer: &Sealer,
    cluster_id: &str,
    node_id: &str,
) -> Result<Membership, StartError> {
    let member = load(disk, dir, sealer)?.ok_or_else(|| StartError::Empty(dir.to_owned()))?;
    if member.cluster_id == cluster_id && member.node_id == node_id {
        return Ok(member);
    }
    Err(StartError::Foreign {
        path: path(dir),
        found: format!("node {} of cluster {}", member.node_id, member.cluster_id),
        expected: format!("node {node_id} of cluster {cluster_id}"),
    })
}
