//! From an image's configuration and a task's wishes to an OCI runtime configuration.
//!
//! Pure: no files, no clock, no environment. The shim completes the result
//! with what only the root file system can tell (numeric user and groups).
//! Never grants devices or namespaces of the host.

use std::collections::BTreeSet;
use std::path::Path;

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use swarm_proto::v1::{Mount, MountType};

use super::seccomp::Filter;
use super::{ContainerConfig, RuntimeError};

/// What Docker gives to a container that asks for nothing.
const DEFAULT_CAPABILITIES: [&str; 14] = [
    "CAP_AUDIT_WRITE",
    "CAP_CHOWN",
    "CAP_DAC_OVERRIDE",
    "CAP_FOWNER",
    "CAP_FSETID",
    "CAP_KILL",
    "CAP_MKNOD",
    "CAP_NET_BIND_SERVICE",
    "CAP_NET_RAW",
    "CAP_SETFCAP",
    "CAP_SETGID",
    "CAP_SETPCAP",
    "CAP_SETUID",
    "CAP_SYS_CHROOT",
];

/// Every capability there is, each at its number: what a name may be.
const ALL_CAPABILITIES: [&str; 41] = [
    "CAP_CHOWN",
    "CAP_DAC_OVERRIDE",
    "CAP_DAC_READ_SEARCH",
    "CAP_FOWNER",
    "CAP_FSETID",
    "CAP_KILL",
    "CAP_SETGID",
    "CAP_SETUID",
    "CAP_SETPCAP",
    "CAP_LINUX_IMMUTABLE",
    "CAP_NET_BIND_SERVICE",
    "CAP_NET_BROADCAST",
    "CAP_NET_ADMIN",
    "CAP_NET_RAW",
    "CAP_IPC_LOCK",
    "CAP_IPC_OWNER",
    "CAP_SYS_MODULE",
    "CAP_SYS_RAWIO",
    "CAP_SYS_CHROOT",
    "CAP_SYS_PTRACE",
    "CAP_SYS_PACCT",
    "CAP_SYS_ADMIN",
    "CAP_SYS_BOOT",
    "CAP_SYS_NICE",
    "CAP_SYS_RESOURCE",
    "CAP_SYS_TIME",
    "CAP_SYS_TTY_CONFIG",
    "CAP_MKNOD",
    "CAP_LEASE",
    "CAP_AUDIT_WRITE",
    "CAP_AUDIT_CONTROL",
    "CAP_SETFCAP",
    "CAP_MAC_OVERRIDE",
    "CAP_MAC_ADMIN",
    "CAP_SYSLOG",
    "CAP_WAKE_ALARM",
    "CAP_BLOCK_SUSPEND",
    "CAP_AUDIT_READ",
    "CAP_PERFMON",
    "CAP_BPF",
    "CAP_CHECKPOINT_RESTORE",
];

/// What is read by path and could reveal or change the host.
const MASKED_PATHS: [&str; 11] = [
    "/proc/acpi",
    "/proc/asound",
    "/proc/interrupts",
    "/proc/kcore",
    "/proc/keys",
    "/proc/latency_stats",
    "/proc/sched_debug",
    "/proc/scsi",
    "/proc/timer_list",
    "/proc/timer_stats",
    "/sys/firmware",
];
const READONLY_PATHS: [&str; 5] = [
    "/proc/bus",
    "/proc/fs",
    "/proc/irq",
    "/proc/sys",
    "/proc/sysrq-trigger",
];

const DEFAULT_PATH: &str = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
const CPU_PERIOD_MICROS: i64 = 100_000;

/// The parts of an image's configuration that matter for running it.
#[derive(Clone, Debug, Default, Deserialize, Serialize)]
pub(super) struct ImageConfig {
    #[serde(default)]
    pub os: String,
    #[serde(default)]
    pub architecture: String,
    #[serde(default)]
    pub variant: Option<String>,
    #[serde(default, deserialize_with = "null_is_default")]
    pub config: ImageProcess,
    pub rootfs: ImageRootfs,
}

/// How the image wants to be run.
#[derive(Clone, Debug, Default, Deserialize, Serialize)]
#[serde(rename_all = "PascalCase", default)]
pub(super) struct ImageProcess {
    #[serde(deserialize_with = "null_is_default")]
    pub user: String,
    #[serde(deserialize_with = "null_is_default")]
    pub env: Vec<String>,
    #[serde(deserialize_with = "null_is_default")]
    pub entrypoint: Vec<String>,
    #[serde(deserialize_with = "null_is_default")]
    pub cmd: Vec<String>,
    #[serde(deserialize_with = "null_is_default")]
    pub working_dir: String,
    #[serde(deserialize_with = "null_is_default")]
    pub stop_signal: String,
}

/// The layers' digests, unpacked.
#[derive(Clone, Debug, Default, Deserialize, Serialize)]
pub(super) struct ImageRootfs {
    #[serde(default)]
    pub diff_ids: Vec<String>,
}

/// Many builders write `null` for "nothing".
fn null_is_default<'de, D, T>(deserializer: D) -> Result<T, D::Error>
where
    D: serde::Deserializer<'de>,
    T: Default + Deserialize<'de>,
{
    Ok(Option::<T>::deserialize(deserializer)?.unwrap_or_default())
}

/// What the node adds to the two configurations.
pub(super) struct NodeFacts<'a> {
    /// Where the root file system will be mounted.
    pub rootfs: &'a Path,
    /// Holds `hosts`, `resolv.conf` and `hostname`.
    pub dir: &'a Path,
    /// From the root of the cgroup hierarchy.
    pub cgroup: &'a str,
    /// The most open files this process may grant.
    pub max_open_files: u64,
    /// Capabilities that this process has, a bit for each by its number.
    pub capabilities: u64,
    /// Rust's name of this machine's architecture: "x86_64".
    pub architecture: &'a str,
}

/// User and groups as named by the task or the image; resolved inside the root file system.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
pub(super) struct UserSpec {
    /// "", "name", "1000", "name:group", "1000:1000".
    pub user: String,
    /// Further groups, names or numbers.
    pub groups: Vec<String>,
}

/// A container ready to be made.
#[derive(Debug)]
pub(super) struct Bundle {
    /// The OCI runtime configuration; `process.user` is root until resolved.
    pub spec: Value,
    pub user: UserSpec,
    pub stop_signal: i32,
}

/// Builds the runtime configuration. Refuses what cannot work with a sentence for the user.
pub(super) fn build(
    image: &ImageProcess,
    config: &ContainerConfig,
    node: &NodeFacts<'_>,
) -> Result<Bundle, RuntimeError> {
    let spec = &config.spec;
    let capabilities = capabilities(
        &spec.capability_add,
        &spec.capability_drop,
        node.capabilities,
    )?;
    let hostname = if spec.hostname.is_empty() {
        &config.hostname
    } else {
        &spec.hostname
    };
    let args = args(image, &spec.command, &spec.args)?;
    let cwd = match (spec.dir.as_str(), image.working_dir.as_str()) {
        ("", "") => "/",
        ("", dir) | (dir, _) => dir,
    };
    if !cwd.starts_with('/') {
        return Err(invalid(format!(
            "the working directory {cwd:?} is not an absolute path"
        )));
    }
    let stop_signal = match (spec.stop_signal.as_str(), image.stop_signal.as_str()) {
        ("", "") => libc::SIGTERM,
        ("", signal) | (signal, _) => parse_signal(signal)
            .ok_or_else(|| invalid(format!("unknown stop signal {signal:?}")))?,
    };
    let user = UserSpec {
        user: if spec.user.is_empty() {
            image.user.clone()
        } else {
            spec.user.clone()
        },
        groups: spec.groups.clone(),
    };
    let caps: Vec<&str> = capabilities.iter().copied().collect();
    let max_open_files = node.max_open_files.min(524_288);
    let value = json!({
        "ociVersion": "1.0.2",
        "root": { "path": node.rootfs, "readonly": spec.read_only },
        "hostname": hostname,
        "process": {
            "terminal": spec.tty,
            "user": { "uid": 0, "gid": 0 },
            "args": args,
            "env": env(&image.env, &spec.env, hostname, spec.tty)?,
            "cwd": cwd,
            "capabilities": { "bounding": caps, "effective": caps, "permitted": caps },
            "rlimits": [{
                "type": "RLIMIT_NOFILE",
                "soft": max_open_files.min(1024),
                "hard": max_open_files,
            }],
        },
        "mounts": mounts(&spec.mounts, node.dir)?,
        "linux": {
            "cgroupsPath": node.cgroup,
            "namespaces": [
                { "type": "pid" },
                { "type": "ipc" },
                { "type": "uts" },
                { "type": "mount" },
                { "type": "cgroup" },
                { "type": "network", "path": config.netns },
            ],
            "resources": resources(config)?,
            "maskedPaths": MASKED_PATHS,
            "readonlyPaths": READONLY_PATHS,
            // As Docker: a namespace of one's own needs no privilege for low ports and ping.
            "sysctl": {
                "net.ipv4.ip_unprivileged_port_start": "0",
                "net.ipv4.ping_group_range": "0 2147483647",
            },
            "seccomp": Filter::new(&capabilities, node.architecture),
        },
    });
    Ok(Bundle {
        spec: value,
        user,
        stop_signal,
    })
}

fn invalid(sentence: String) -> RuntimeError {
    RuntimeError::InvalidConfig(sentence)
}

/// Docker's rule: an entrypoint of the task discards the image's entrypoint and arguments.
fn args(
    image: &ImageProcess,
    command: &[String],
    args: &[String],
) -> Result<Vec<String>, RuntimeError> {
    let (entrypoint, args) = if !command.is_empty() {
        (command, args)
    } else if !args.is_empty() {
        (image.entrypoint.as_slice(), args)
    } else {
        (image.entrypoint.as_slice(), image.cmd.as_slice())
    };
    let all: Vec<String> = entrypoint.iter().chain(args).cloned().collect();
    if all.first().is_none_or(String::is_empty) {
        return Err(invalid(
            "no command: neither the image nor the service names one".into(),
        ));
    }
    if all.iter().any(|arg| arg.contains('\0')) {
        return Err(invalid("an argument contains a NUL character".into()));
    }
    Ok(all)
}

/// Later entries win; a bare "KEY" takes a variable away.
fn env(
    image: &[String],
    task: &[String],
    hostname: &str,
    tty: bool,
) -> Result<Vec<String>, RuntimeError> {
    let mut result = vec![DEFAULT_PATH.to_owned(), format!("HOSTNAME={hostname}")];
    if tty {
        result.push("TERM=xterm".to_owned());
    }
    for entry in image.iter().chain(task) {
        merge_env(&mut result, entry)?;
    }
    Ok(result)
}

/// Adds, replaces or (without `=`) removes one variable.
pub(super) fn merge_env(env: &mut Vec<String>, entry: &str) -> Result<(), RuntimeError> {
    let (key, value) = match entry.split_once('=') {
        Some((key, _)) => (key, Some(entry)),
        None => (entry, None),
    };
    if key.is_empty() || entry.contains('\0') {
        return Err(invalid(format!("invalid environment variable {entry:?}")));
    }
    let same = |other: &String| other.split_once('=').is_some_and(|(name, _)| name == key);
    match (env.iter().position(same), value) {
        (Some(at), Some(value)) => env[at] = value.to_owned(),
        (Some(at), None) => {
            env.remove(at);
        }
        (None, Some(value)) => env.push(value.to_owned()),
        (None, None) => {}
    }
    Ok(())
}

/// Docker's defaults without `drop`, then with `add`; "ALL" stands for all.
/// `held` are those that the node can give: "ALL" means these, and of Docker's default those are given.
fn capabilities(
    add: &[String],
    drop: &[String],
    held: u64,
) -> Result<BTreeSet<&'static str>, RuntimeError> {
    let parse = |names: &[String]| -> Result<(bool, BTreeSet<&'static str>), RuntimeError> {
        let mut all = false;
        let mut set = BTreeSet::new();
        for name in names {
            let upper = name.to_ascii_uppercase();
            if upper == "ALL" || upper == "CAP_ALL" {
                all = true;
                continue;
            }
            let bare = upper.strip_prefix("CAP_").unwrap_or(&upper);
            let known = ALL_CAPABILITIES.iter().find(|known| &known[4..] == bare);
            set.insert(*known.ok_or_else(|| invalid(format!("unknown capability {name:?}")))?);
        }
        Ok((all, set))
    };
    let numbered = ALL_CAPABILITIES.into_iter().enumerate();
    let held = numbered.filter(|(number, _)| held >> number & 1 == 1);
    let held: BTreeSet<&'static str> = held.map(|(_, name)| name).collect();
    let (add_all, add) = parse(add)?;
    let (drop_all, drop) = parse(drop)?;
    if let Some(name) = add.difference(&held).next() {
        return Err(invalid(format!(
            "capability {name} cannot be given on this node: swarmd does not have it"
        )));
    }
    let mut set: BTreeSet<&'static str> = match (add_all, drop_all) {
        (true, _) => held,
        (false, true) => BTreeSet::new(),
        (false, false) => {
            let mut default = BTreeSet::from(DEFAULT_CAPABILITIES);
            default.retain(|name| held.contains(name));
            default
        }
    };
    set.retain(|name| !drop.contains(name));
    set.extend(add);
    Ok(set)
}

fn mounts(wanted: &[Mount], dir: &Path) -> Result<Vec<Value>, RuntimeError> {
    let mount = |target: &str, kind: &str, source: &str, options: &[&str]| json!({ "destination": target, "type": kind, "source": source, "options": options });
    let mut mounts = vec![
        mount("/proc", "proc", "proc", &["nosuid", "noexec", "nodev"]),
        mount(
            "/dev",
            "tmpfs",
            "tmpfs",
            &["nosuid", "strictatime", "mode=755", "size=65536k"],
        ),
        mount(
            "/dev/pts",
            "devpts",
            "devpts",
            &[
                "nosuid",
                "noexec",
                "newinstance",
                "ptmxmode=0666",
                "mode=0620",
                "gid=5",
            ],
        ),
        mount(
            "/sys",
            "sysfs",
            "sysfs",
            &["nosuid", "noexec", "nodev", "ro"],
        ),
        mount(
            "/sys/fs/cgroup",
            "cgroup",
            "cgroup",
            &["nosuid", "noexec", "nodev", "relatime", "ro"],
        ),
        mount(
            "/dev/mqueue",
            "mqueue",
            "mqueue",
            &["nosuid", "noexec", "nodev"],
        ),
        mount(
            "/dev/shm",
            "tmpfs",
            "shm",
            &["nosuid", "noexec", "nodev", "mode=1777", "size=65536k"],
        ),
    ];
    let own = |name: &str| dir.join(name).to_string_lossy().into_owned();
    for name in ["resolv.conf", "hostname", "hosts"] {
        mounts.push(mount(
            &format!("/etc/{name}"),
            "bind",
            &own(name),
            &["rbind", "rprivate"],
        ));
    }
    let mut wanted: Vec<&Mount> = wanted.iter().collect();
    // A mount inside another one comes after it.
    wanted.sort_by_key(|mount| Path::new(&mount.target).components().count());
    for wanted in wanted {
        let target = wanted.target.as_str();
        if !is_plain_absolute(target) || target == "/" {
            return Err(invalid(format!(
                "invalid mount target {target:?}: must be an absolute path other than / without .."
            )));
        }
        mounts.retain(|mount| mount["destination"] != target);
        mounts.push(match wanted.r#type() {
            MountType::Bind => {
                if !is_plain_absolute(&wanted.source) {
                    return Err(invalid(format!(
                        "invalid mount source {:?}: must be an absolute path",
                        wanted.source
                    )));
                }
                let propagation = match wanted.bind_propagation.as_str() {
                    "" => "rprivate",
                    one @ ("private" | "rprivate" | "slave" | "rslave") => one,
                    other => {
                        return Err(invalid(format!(
                            "bind propagation {other:?} is not supported: use rprivate or rslave"
                        )));
                    }
                };
                let access = if wanted.read_only { "ro" } else { "rw" };
                mount(
                    target,
                    "bind",
                    &wanted.source,
                    &["rbind", propagation, access],
                )
            }
            MountType::Tmpfs => {
                let mode = match wanted.tmpfs_mode {
                    0 => 0o1777,
                    mode => mode & 0o7777,
                };
                let mode = format!("mode={mode:o}");
                let mut options = vec!["nosuid", "nodev", "noexec", mode.as_str()];
                if wanted.read_only {
                    options.push("ro");
                }
                let size = format!("size={}", wanted.tmpfs_size_bytes);
                if wanted.tmpfs_size_bytes > 0 {
                    options.push(&size);
                }
                mount(target, "tmpfs", "tmpfs", &options)
            }
            other => {
                return Err(invalid(format!(
                    "mounts of type {} are not supported on this node",
                    other.as_str_name()
                )));
            }
        });
    }
    Ok(mounts)
}

/// Absolute, without `..` or NUL.
fn is_plain_absolute(path: &str) -> bool {
    path.starts_with('/')
        && !path.contains('\0')
        && Path::new(path)
            .components()
            .all(|part| part != std::path::Component::ParentDir)
}

fn resources(config: &ContainerConfig) -> Result<Value, RuntimeError> {
    let limits = config.resources.limits.unwrap_or_default();
    let mut resources = json!({ "devices": devices() });
    if limits.memory_bytes < 0 || limits.nano_cpus < 0 || config.resources.pids_limit < 0 {
        return Err(invalid("a resource limit is negative".into()));
    }
    if limits.memory_bytes > 0 {
        // Docker's least: with less a process cannot even start.
        if limits.memory_bytes < 6 << 20 {
            return Err(invalid(format!(
                "the memory limit of {} bytes is below the minimum of 6 MiB",
                limits.memory_bytes
            )));
        }
        resources["memory"] = json!({ "limit": limits.memory_bytes });
    }
    if limits.nano_cpus > 0 {
        let quota = i128::from(limits.nano_cpus) * i128::from(CPU_PERIOD_MICROS) / 1_000_000_000;
        // The kernel's least is a millisecond of CPU per period.
        let quota = i64::try_from(quota).unwrap_or(i64::MAX).max(1000);
        resources["cpu"] = json!({ "quota": quota, "period": CPU_PERIOD_MICROS });
    }
    if config.resources.pids_limit > 0 {
        resources["pids"] = json!({ "limit": config.resources.pids_limit });
    }
    Ok(resources)
}

/// The harmless ones every container has; making others is allowed, opening them is not.
fn devices() -> Vec<Value> {
    let mut devices = vec![
        json!({ "allow": false, "access": "rwm" }),
        json!({ "allow": true, "type": "c", "access": "m" }),
        json!({ "allow": true, "type": "b", "access": "m" }),
    ];
    for (major, minor) in [
        (1, 3),
        (1, 5),
        (1, 7),
        (1, 8),
        (1, 9),
        (5, 0),
        (5, 1),
        (5, 2),
        (136, -1),
    ] {
        let mut device = json!({ "allow": true, "type": "c", "major": major, "access": "rwm" });
        if minor >= 0 {
            device["minor"] = json!(minor);
        }
        devices.push(device);
    }
    devices
}

/// "SIGTERM", "TERM", "15", "RTMIN+3".
pub(super) fn parse_signal(text: &str) -> Option<i32> {
    let upper = text.to_ascii_uppercase();
    if let Ok(number) = upper.parse::<i32>() {
        return (1..=64).contains(&number).then_some(number);
    }
    let bare = upper.strip_prefix("SIG").unwrap_or(&upper);
    if let Some(rest) = bare.strip_prefix("RTMIN") {
        let offset = if rest.is_empty() {
            0
        } else {
            rest.strip_prefix('+')?.parse::<i32>().ok()?
        };
        return (0..=30).contains(&offset).then_some(34 + offset);
    }
    if let Some(rest) = bare.strip_prefix("RTMAX") {
        let offset = if rest.is_empty() {
            0
        } else {
            rest.strip_prefix('-')?.parse::<i32>().ok()?
        };
        return (0..=30).contains(&offset).then_some(64 - offset);
    }
    // Older names of the same.
    let bare = match bare {
        "CLD" => "CHLD",
        "IOT" => "ABRT",
        "POLL" => "IO",
        other => other,
    };
    format!("SIG{bare}")
        .parse::<nix::sys::signal::Signal>()
        .ok()
        .map(|signal| signal as i32)
}

/// Numeric identity of a process.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Identity {
    pub uid: u32,
    pub gid: u32,
    pub groups: Vec<u32>,
    pub home: String,
}

/// Looks names up as Docker does: "user[:group]", each a name or a number; a
/// number need not be listed. Without a group, the user's own and those that list it.
pub(super) fn resolve_user(
    wanted: &UserSpec,
    passwd: &str,
    group: &str,
) -> Result<Identity, String> {
    let (user, own_group) = match wanted.user.split_once(':') {
        Some((user, group)) => (user, Some(group).filter(|group| !group.is_empty())),
        None => (wanted.user.as_str(), None),
    };
    let user = if user.is_empty() { "0" } else { user };
    // name:password:uid:gid:comment:home:shell
    let entry = passwd
        .lines()
        .map(|line| line.split(':').collect::<Vec<_>>())
        .find(|fields| fields.len() >= 6 && (fields[0] == user || fields[2] == user));
    let mut identity = Identity {
        home: "/".to_owned(),
        ..Identity::default()
    };
    let mut name = None;
    match (&entry, user.parse::<u32>()) {
        (Some(fields), _) => {
            let number = |text: &str| {
                text.parse::<u32>()
                    .map_err(|_| format!("user {user:?} has a bad line in /etc/passwd"))
            };
            identity.uid = number(fields[2])?;
            identity.gid = number(fields[3])?;
            identity.home = if fields[5].is_empty() {
                "/".into()
            } else {
                fields[5].to_owned()
            };
            name = Some(fields[0]);
        }
        (None, Ok(uid)) => identity.uid = uid,
        (None, Err(_)) => return Err(format!("no user {user:?} in the image's /etc/passwd")),
    }
    // name:password:gid:members
    let groups: Vec<Vec<&str>> = group
        .lines()
        .map(|line| line.split(':').collect::<Vec<_>>())
        .filter(|fields| fields.len() >= 4)
        .collect();
    let find = |wanted: &str| -> Result<u32, String> {
        let listed = groups
            .iter()
            .find(|fields| fields[0] == wanted)
            .map(|fields| fields[2]);
        listed
            .unwrap_or(wanted)
            .parse()
            .map_err(|_| format!("no group {wanted:?} in the image's /etc/group"))
    };
    match own_group {
        Some(group) => identity.gid = find(group)?,
        None => {
            if let Some(name) = name {
                identity.groups = groups
                    .iter()
                    .filter(|fields| fields[3].split(',').any(|member| member == name))
                    .filter_map(|fields| fields[2].parse().ok())
                    .collect();
            }
        }
    }
    for group in &wanted.groups {
        identity.groups.push(find(group)?);
    }
    identity.groups.sort_unstable();
    identity.groups.dedup();
    Ok(identity)
}

#[cfg(test)]
mod tests {
    use super::*;
    use swarm_proto::TaskId;
    use swarm_proto::v1::{ContainerSpec, ResourceRequirements, Resources};

    fn config(change: impl FnOnce(&mut ContainerConfig)) -> ContainerConfig {
        let mut config = ContainerConfig {
            task_id: TaskId::random(),
            name: "web.1.x".into(),
            spec: ContainerSpec {
                command: vec!["/bin/app".into()],
                ..ContainerSpec::default()
            },
            resources: ResourceRequirements::default(),
            labels: Vec::new(),
            hostname: "abc".into(),
            netns: "/run/netns/x".into(),
            etc_hosts: String::new(),
            resolv_conf: String::new(),
        };
        change(&mut config);
        config
    }

    fn built(
        image: &ImageProcess,
        change: impl FnOnce(&mut ContainerConfig),
    ) -> Result<Bundle, RuntimeError> {
        let node = NodeFacts {
            rootfs: Path::new("/c/rootfs"),
            dir: Path::new("/c"),
            cgroup: "/swarm/x",
            max_open_files: 20_000,
            capabilities: u64::MAX,
            architecture: "x86_64",
        };
        build(image, &config(change), &node)
    }

    fn spec(change: impl FnOnce(&mut ContainerConfig)) -> Value {
        built(&ImageProcess::default(), change).unwrap().spec
    }

    fn words(value: &Value) -> Vec<&str> {
        value
            .as_array()
            .unwrap()
            .iter()
            .map(|word| word.as_str().unwrap())
            .collect()
    }

    fn image(entrypoint: &[&str], cmd: &[&str]) -> ImageProcess {
        let own = |words: &[&str]| words.iter().map(|&word| word.to_owned()).collect();
        ImageProcess {
            entrypoint: own(entrypoint),
            cmd: own(cmd),
            ..ImageProcess::default()
        }
    }

    #[test]
    fn libcontainer_understands_the_configuration() {
        let value = spec(|config| {
            config.resources.limits = Some(Resources {
                nano_cpus: 1,
                memory_bytes: 1 << 30,
            });
            config.resources.pids_limit = 5;
            config.spec.capability_add.push("all".into());
        });
        let parsed: libcontainer::oci_spec::runtime::Spec = serde_json::from_value(value).unwrap();
        let caps = parsed
            .process()
            .as_ref()
            .unwrap()
            .capabilities()
            .as_ref()
            .unwrap();
        assert_eq!(
            caps.effective().as_ref().unwrap().len(),
            ALL_CAPABILITIES.len()
        );
        assert!(parsed.linux().as_ref().unwrap().seccomp().is_some());
        assert!(
            parsed
                .process()
                .as_ref()
                .unwrap()
                .no_new_privileges()
                .is_none()
        );
    }

    #[test]
    fn the_command_is_merged_as_docker_does() {
        let args = |image: &ImageProcess, command: &[&str], args: &[&str]| {
            let own = |words: &[&str]| words.iter().map(|&word| word.to_owned()).collect();
            built(image, |config| {
                config.spec.command = own(command);
                config.spec.args = own(args);
            })
            .map(|bundle| words(&bundle.spec["process"]["args"]).join(" "))
        };
        let both = image(&["e"], &["c"]);
        assert_eq!(args(&both, &[], &[]).unwrap(), "e c");
        assert_eq!(args(&both, &[], &["a"]).unwrap(), "e a");
        assert_eq!(args(&both, &["x"], &[]).unwrap(), "x");
        assert_eq!(args(&both, &["x"], &["a"]).unwrap(), "x a");
        assert_eq!(args(&image(&[], &["c"]), &[], &["a"]).unwrap(), "a");
        assert!(args(&image(&[], &[]), &[], &[]).unwrap_err().is_fatal());
    }

    #[test]
    fn environment_is_merged_in_order_and_a_bare_key_takes_away() {
        let image = ImageProcess {
            env: vec!["PATH=/image".into(), "A=1".into(), "B=1".into()],
            ..ImageProcess::default()
        };
        let bundle = built(&image, |config| {
            config.spec.env = vec!["B=2".into(), "A".into(), "C=x=y".into()];
        });
        let spec = bundle.unwrap().spec;
        assert_eq!(
            words(&spec["process"]["env"]),
            ["PATH=/image", "HOSTNAME=abc", "B=2", "C=x=y"]
        );
        for bad in ["", "=x", "A\0=1"] {
            assert!(built(&image, |config| config.spec.env = vec![bad.into()]).is_err());
        }
    }

    #[test]
    fn capabilities_are_dockers_unless_changed() {
        let with = |held: u64, add: &[&str], drop: &[&str]| {
            let own = |words: &[&str]| {
                words
                    .iter()
                    .map(|&word| word.to_owned())
                    .collect::<Vec<_>>()
            };
            capabilities(&own(add), &own(drop), held)
        };
        let caps = |add: &[&str], drop: &[&str]| with(u64::MAX, add, drop);
        assert_eq!(caps(&[], &[]).unwrap(), DEFAULT_CAPABILITIES.into());
        assert_eq!(
            caps(&["net_admin"], &["ALL"]).unwrap(),
            ["CAP_NET_ADMIN"].into()
        );
        assert_eq!(caps(&["ALL"], &["cap_sys_admin"]).unwrap().len(), 40);
        assert!(!caps(&[], &["CHOWN"]).unwrap().contains("CAP_CHOWN"));
        assert!(
            caps(&["CAP_X"], &[])
                .unwrap_err()
                .to_string()
                .contains("CAP_X")
        );
        // A node that has neither CAP_SYS_RESOURCE (24) nor CAP_MKNOD (27).
        let some = !(1u64 << 24 | 1 << 27);
        assert_eq!(with(some, &["ALL"], &[]).unwrap().len(), 39);
        assert_eq!(with(some, &[], &[]).unwrap().len(), 13);
        let refused = with(some, &["mknod"], &[]).unwrap_err().to_string();
        assert!(refused.contains("CAP_MKNOD"), "{refused}");
    }

    #[test]
    fn limits_become_kernel_units() {
        let spec = spec(|config| {
            config.resources.limits = Some(Resources {
                nano_cpus: 1_500_000_000,
                memory_bytes: 64 << 20,
            });
            config.resources.pids_limit = 7;
        });
        let resources = &spec["linux"]["resources"];
        assert_eq!(
            resources["cpu"],
            json!({ "quota": 150_000, "period": 100_000 })
        );
        assert_eq!(resources["memory"], json!({ "limit": 64 << 20 }));
        assert_eq!(resources["pids"], json!({ "limit": 7 }));
        assert_eq!(spec["process"]["rlimits"][0]["hard"], 20_000);
        let tiny = built(&ImageProcess::default(), |config| {
            config.resources.limits = Some(Resources {
                nano_cpus: 0,
                memory_bytes: 1 << 20,
            });
        });
        assert!(tiny.unwrap_err().to_string().contains("6 MiB"));
    }

    #[test]
    fn devices_of_the_host_are_denied_first() {
        let spec = spec(|_| {});
        let devices = spec["linux"]["resources"]["devices"]
            .as_array()
            .unwrap()
            .clone();
        assert_eq!(devices[0], json!({ "allow": false, "access": "rwm" }));
        assert!(
            devices[1..]
                .iter()
                .all(|device| device["access"] == "m" || device["type"] == "c")
        );
    }

    #[test]
    fn an_outer_mount_comes_before_the_one_inside_it_and_replaces_a_default() {
        let mount = |kind: MountType, target: &str| Mount {
            r#type: kind.into(),
            source: "/srv".into(),
            target: target.into(),
            read_only: true,
            ..Mount::default()
        };
        let spec = spec(|config| {
            config.spec.mounts = vec![
                mount(MountType::Bind, "/data/sub"),
                mount(MountType::Tmpfs, "/data"),
                mount(MountType::Bind, "/dev/shm"),
            ];
        });
        let targets: Vec<&str> = spec["mounts"]
            .as_array()
            .unwrap()
            .iter()
            .map(|mount| mount["destination"].as_str().unwrap())
            .collect();
        let at = |target| targets.iter().position(|other| *other == target).unwrap();
        assert!(at("/data") < at("/data/sub") && at("/dev") < at("/dev/shm"));
        assert_eq!(
            targets
                .iter()
                .filter(|target| **target == "/dev/shm")
                .count(),
            1
        );
        for bad in ["", "relative", "/", "/a/../b"] {
            let refused = built(&ImageProcess::default(), |config| {
                config.spec.mounts = vec![mount(MountType::Tmpfs, bad)];
            });
            assert!(refused.unwrap_err().is_fatal(), "{bad}");
        }
    }

    #[test]
    fn signals_have_names_and_numbers() {
        for (text, number) in [
            ("SIGTERM", Some(15)),
            ("term", Some(15)),
            ("9", Some(9)),
            ("SIGRTMIN+3", Some(37)),
            ("SIGRTMIN", Some(34)),
            ("SIGRTMAX", Some(64)),
            ("RTMAX-1", Some(63)),
            ("RTMAX-31", None),
            ("SIGCLD", Some(17)),
            ("iot", Some(6)),
            ("SIGPOLL", Some(29)),
            ("0", None),
            ("65", None),
            ("SIGNOPE", None),
            ("RTMIN-1", None),
            ("", None),
        ] {
            assert_eq!(parse_signal(text), number, "{text}");
        }
    }

    #[test]
    fn users_and_groups_are_found_by_name_and_number() {
        let passwd = "root:x:0:0:r:/root:/bin/sh\nweb:x:100:101:w:/srv:/bin/sh\nbroken\n";
        let group = "root:x:0:\nweb:x:101:\nmore:x:200:root,web\nother:x:300:\n";
        let find = |user: &str, groups: &[&str]| {
            let groups = groups.iter().map(|&group| group.to_owned()).collect();
            resolve_user(
                &UserSpec {
                    user: user.into(),
                    groups,
                },
                passwd,
                group,
            )
        };
        let identity = |uid, gid, groups: &[u32], home: &str| Identity {
            uid,
            gid,
            groups: groups.to_vec(),
            home: home.into(),
        };
        assert_eq!(find("", &[]), Ok(identity(0, 0, &[200], "/root")));
        assert_eq!(find("web", &[]), Ok(identity(100, 101, &[200], "/srv")));
        assert_eq!(find("100", &[]), Ok(identity(100, 101, &[200], "/srv")));
        assert_eq!(find("web:other", &[]), Ok(identity(100, 300, &[], "/srv")));
        assert_eq!(
            find("77:88", &["more", "9"]),
            Ok(identity(77, 88, &[9, 200], "/"))
        );
        assert!(find("nobody", &[]).unwrap_err().contains("nobody"));
        assert!(find("web:none", &[]).unwrap_err().contains("none"));
        assert!(resolve_user(&UserSpec::default(), "", "").is_ok());
    }

    #[test]
    fn null_in_an_image_configuration_means_nothing() {
        let text = r#"{"config":{"Env":null,"Cmd":["x"],"Entrypoint":null,"User":null},"rootfs":{"diff_ids":[]}}"#;
        let image: ImageConfig = serde_json::from_str(text).unwrap();
        assert_eq!(image.config.cmd, ["x"]);
        assert!(serde_json::from_str::<ImageConfig>(r#"{"config":null,"rootfs":{}}"#).is_ok());
    }
}
