//! A container's control group, in whatever hierarchies the host has.
//!
//! The OCI runtime makes the groups; this module asks whether the kernel killed
//! for memory, kills what is left inside and removes them. Blocking.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use super::RuntimeError;

/// Mount points of all cgroup hierarchies of this process.
fn hierarchies() -> io::Result<Vec<PathBuf>> {
    Ok(parse_hierarchies(&fs::read_to_string(
        "/proc/self/mountinfo",
    )?))
}

/// 36 35 98:0 /root /mount/point options - cgroup source superoptions
fn parse_hierarchies(mountinfo: &str) -> Vec<PathBuf> {
    mountinfo
        .lines()
        .filter_map(|line| {
            let (left, right) = line.split_once(" - ")?;
            let kind = right.split(' ').next()?;
            let point = left.split(' ').nth(4)?;
            (kind == "cgroup" || kind == "cgroup2").then(|| PathBuf::from(point))
        })
        .collect()
}

/// The group's directories that exist.
fn directories(group: &str) -> io::Result<Vec<PathBuf>> {
    let group = group.trim_start_matches('/');
    let all = hierarchies()?.into_iter().map(|point| point.join(group));
    Ok(all.filter(|dir| dir.is_dir()).collect())
}

/// Whether the kernel killed a process of the group for its memory limit.
pub(super) fn oom_killed(group: &str) -> bool {
    let count = |dir: &Path, file: &str| {
        let text = fs::read_to_string(dir.join(file)).unwrap_or_default();
        let line = text.lines().find_map(|line| line.strip_prefix("oom_kill "));
        line.and_then(|count| count.trim().parse::<u64>().ok())
            .unwrap_or(0)
    };
    directories(group)
        .unwrap_or_default()
        .iter()
        .any(|dir| count(dir, "memory.oom_control") > 0 || count(dir, "memory.events") > 0)
}

/// Kills every process in the group.
pub(super) fn kill(group: &str) -> io::Result<()> {
    for dir in directories(group)? {
        if fs::write(dir.join("cgroup.kill"), "1").is_ok() {
            continue;
        }
        // A process may fork while its group is read: until nobody new turns up.
        let mut seen = Vec::new();
        loop {
            let text = match fs::read_to_string(dir.join("cgroup.procs")) {
                Err(err) if is_gone(&err) => break,
                other => other?,
            };
            let new: Vec<i32> = text
                .lines()
                .filter_map(|line| line.parse().ok())
                .filter(|pid| *pid > 0 && !seen.contains(pid))
                .collect();
            if new.is_empty() {
                break;
            }
            for pid in new {
                let _ = nix::sys::signal::kill(
                    nix::unistd::Pid::from_raw(pid),
                    nix::sys::signal::Signal::SIGKILL,
                );
                seen.push(pid);
            }
        }
    }
    Ok(())
}

/// Removes the group and those below it. Its processes have ended.
pub(super) fn remove(group: &str) -> Result<(), RuntimeError> {
    let failed = |dir: &Path, err: io::Error| RuntimeError::Failed {
        step: "remove cgroup",
        reason: format!("{}: {err}", dir.display()),
    };
    let all = directories(group).map_err(|err| failed(Path::new(group), err))?;
    for dir in all {
        remove_dir(&dir).map_err(|err| failed(&dir, err))?;
    }
    Ok(())
}

fn remove_dir(dir: &Path) -> io::Result<()> {
    let entries = match fs::read_dir(dir) {
        Err(err) if is_gone(&err) => return Ok(()),
        other => other?,
    };
    for entry in entries {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            remove_dir(&entry.path())?;
        }
    }
    match fs::remove_dir(dir) {
        Err(err) if is_gone(&err) => Ok(()),
        other => other,
    }
}

fn is_gone(err: &io::Error) -> bool {
    err.kind() == io::ErrorKind::NotFound || err.raw_os_error() == Some(libc::ENODEV)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hierarchies_of_both_versions_are_found() {
        let text = "30 24 0:26 / /sys/fs/cgroup ro - tmpfs tmpfs ro\n\
                    31 30 0:27 / /sys/fs/cgroup/memory rw shared:9 - cgroup cgroup rw,memory\n\
                    32 30 0:28 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n";
        let points = parse_hierarchies(text);
        assert_eq!(
            points,
            ["/sys/fs/cgroup/memory", "/sys/fs/cgroup/unified"].map(PathBuf::from)
        );
    }
}
