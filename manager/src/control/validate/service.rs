//! What a user may ask of a service.

use std::collections::HashSet;
use std::net::IpAddr;
use std::path::{Component, Path, PathBuf};

use swarm_proto::image::ImageRef;
use swarm_proto::v1::{
    ContainerSpec, EndpointMode, EndpointSpec, FailureAction, HealthConfig, Mount, MountType,
    NetworkAttachmentConfig, Placement, PortProtocol, PublishMode, ResourceRequirements, Resources,
    RestartCondition, RestartPolicy, ServiceMode, ServiceSpec, TaskSpec, UpdateConfig, UpdateOrder,
    placement_preference, service_mode,
};

use super::{Invalid, bounded, duration, text};
use crate::scheduler::Spread;
use crate::scheduler::constraint::Constraint;

/// Most replicas of one service.
const REPLICAS_MAX: u64 = 1_000_000;
/// Most values of a list whose members are cheap (arguments, variables).
const VALUES_MAX: usize = 4096;
/// Most values of a list whose members cost a kernel object or a rule each.
const PARTS_MAX: usize = 256;
/// Most networks of one service: one interface each.
const NETWORKS_MAX: usize = 64;
/// What Swarm asks of a CPU limit or reservation: a thousandth of a core.
const NANO_CPUS_MIN: i64 = 1_000_000;
/// What Swarm asks of a memory limit or reservation.
const MEMORY_MIN: i64 = 4 << 20;
/// What nodes ask of a memory limit: with less a process cannot even start.
const MEMORY_LIMIT_MIN: i64 = 6 << 20;

/// Checks a service's spec.
///
/// Whether its networks exist is not asked here.
///
/// # Errors
/// The first part that is not accepted.
pub fn service_spec(spec: &ServiceSpec) -> Result<(), Invalid> {
    bounded("service", spec)?;
    let annotations = spec
        .annotations
        .as_ref()
        .ok_or_else(|| Invalid::argument("name must be provided"))?;
    text::name(&annotations.name)?;
    text::labels("label", &annotations.labels)?;
    mode(spec.mode.as_ref())?;
    let task = spec
        .task
        .as_ref()
        .ok_or_else(|| Invalid::argument("TaskSpec: missing"))?;
    task_spec(task)?;
    update_config("update", spec.update.as_ref())?;
    update_config("rollback", spec.rollback.as_ref())?;
    if let Some(endpoint) = &spec.endpoint {
        endpoint_spec(endpoint)?;
    }
    Ok(())
}

fn mode(mode: Option<&ServiceMode>) -> Result<(), Invalid> {
    if let Some(service_mode::Mode::Replicated(replicated)) = mode.and_then(|m| m.mode.as_ref())
        && let Some(replicas) = replicated.replicas
        && replicas > REPLICAS_MAX
    {
        return Err(Invalid::argument(format!(
            "{replicas} replicas are more than {REPLICAS_MAX}"
        )));
    }
    Ok(())
}

fn task_spec(task: &TaskSpec) -> Result<(), Invalid> {
    let container = task
        .container
        .as_ref()
        .ok_or_else(|| Invalid::argument("ContainerSpec: missing"))?;
    container_spec(container)?;
    if let Some(requirements) = &task.resources {
        resource_requirements(requirements)?;
    }
    if let Some(policy) = &task.restart {
        restart_policy(policy)?;
    }
    if let Some(wishes) = &task.placement {
        placement(wishes)?;
    }
    attachments(&task.networks)
}

fn container_spec(container: &ContainerSpec) -> Result<(), Invalid> {
    ImageRef::parse(&container.image).map_err(|error| Invalid::argument(error.to_string()))?;
    text::labels("container label", &container.labels)?;
    for (what, values) in [
        ("entrypoint", &container.command),
        ("argument", &container.args),
    ] {
        text::count(what, values.len(), VALUES_MAX)?;
        for value in values {
            text::short(what, value)?;
        }
    }
    if !container.hostname.is_empty() {
        text::domain("hostname", &container.hostname)?;
        if container.hostname.len() > 64 {
            return Err(Invalid::argument("hostname is longer than 64 characters"));
        }
    }
    text::count("environment variable", container.env.len(), VALUES_MAX)?;
    for variable in &container.env {
        text::variable(variable)?;
    }
    if !container.dir.is_empty() {
        absolute(&container.dir).ok_or_else(|| {
            Invalid::argument(format!(
                "working directory {} must be an absolute path",
                text::quoted(&container.dir)
            ))
        })?;
    }
    text::line("user", &container.user)?;
    text::count("group", container.groups.len(), PARTS_MAX)?;
    for group in &container.groups {
        text::line("group", group)?;
    }
    mounts(&container.mounts)?;
    if !container.stop_signal.is_empty() && !is_signal(&container.stop_signal) {
        return Err(Invalid::argument(format!(
            "unknown stop signal {}",
            text::quoted(&container.stop_signal)
        )));
    }
    duration("stop grace period", container.stop_grace_period.as_ref())?;
    if let Some(check) = &container.healthcheck {
        health(check)?;
    }
    for list in [&container.capability_add, &container.capability_drop] {
        text::count("capability", list.len(), PARTS_MAX)?;
    }
    for capability in container
        .capability_add
        .iter()
        .chain(&container.capability_drop)
    {
        if !is_capability(capability) {
            return Err(Invalid::argument(format!(
                "unknown capability {}",
                text::quoted(capability)
            )));
        }
    }
    if let Some(auth) = &container.pull_auth {
        for secret in [&auth.username, &auth.password, &auth.identity_token] {
            if secret.len() > 64 << 10 {
                return Err(Invalid::argument(
                    "registry credentials are longer than 64 KiB",
                ));
            }
        }
    }
    resolver(container)
}

fn resolver(container: &ContainerSpec) -> Result<(), Invalid> {
    for (what, values) in [
        ("host", &container.hosts),
        ("name server", &container.dns_nameservers),
        ("search domain", &container.dns_search),
        ("resolver option", &container.dns_options),
    ] {
        text::count(what, values.len(), PARTS_MAX)?;
    }
    for host in &container.hosts {
        let parsed = host
            .split_once(':')
            .and_then(|(name, addr)| Some((name, addr.parse::<IpAddr>().ok()?)));
        let Some((name, _)) = parsed else {
            return Err(Invalid::argument(format!(
                "invalid host {}: expected NAME:ADDRESS",
                text::quoted(host)
            )));
        };
        text::domain("host", name)?;
    }
    for server in &container.dns_nameservers {
        server.parse::<IpAddr>().map_err(|_| {
            Invalid::argument(format!(
                "name server {} is not an IP address",
                text::quoted(server)
            ))
        })?;
    }
    for domain in &container.dns_search {
        // A single dot means: search nowhere.
        if domain != "." {
            text::domain("search domain", domain.trim_end_matches('.'))?;
        }
    }
    for option in &container.dns_options {
        text::line("resolver option", option)?;
        if option.is_empty() || option.contains(char::is_whitespace) {
            return Err(Invalid::argument(format!(
                "resolver option {} must be one word",
                text::quoted(option)
            )));
        }
    }
    Ok(())
}

fn mounts(mounts: &[Mount]) -> Result<(), Invalid> {
    text::count("mount", mounts.len(), PARTS_MAX)?;
    let mut targets = HashSet::new();
    for mount in mounts {
        text::short("mount target", &mount.target)?;
        text::short("mount source", &mount.source)?;
        let target = absolute(&mount.target).ok_or_else(|| {
            Invalid::argument(format!(
                "invalid mount target, must be an absolute path: {}",
                text::quoted(&mount.target)
            ))
        })?;
        if target == Path::new("/") {
            return Err(Invalid::argument(
                "invalid mount target, must not be the root directory",
            ));
        }
        if !targets.insert(target) {
            return Err(Invalid::argument(format!(
                "ContainerSpec: duplicate mount point: {}",
                mount.target
            )));
        }
        match MountType::try_from(mount.r#type) {
            Ok(MountType::Bind) => bind(mount)?,
            Ok(MountType::Tmpfs) => tmpfs(mount)?,
            Ok(MountType::Volume) => {
                return Err(Invalid::unsupported(format!(
                    "mount {}: volumes are not available yet, use type=bind or type=tmpfs",
                    text::quoted(&mount.target)
                )));
            }
            Err(_) => {
                return Err(Invalid::argument(format!(
                    "unknown mount type {}",
                    mount.r#type
                )));
            }
        }
    }
    Ok(())
}

fn bind(mount: &Mount) -> Result<(), Invalid> {
    if absolute(&mount.source).is_none() {
        return Err(Invalid::argument(format!(
            "invalid bind mount source, must be an absolute path: {}",
            text::quoted(&mount.source)
        )));
    }
    match mount.bind_propagation.as_str() {
        "" | "rprivate" | "private" | "rslave" | "slave" => Ok(()),
        shared @ ("rshared" | "shared") => Err(Invalid::unsupported(format!(
            "mount propagation {shared} is not available: use rprivate or rslave"
        ))),
        other => Err(Invalid::argument(format!(
            "unknown mount propagation {}",
            text::quoted(other)
        ))),
    }
}

fn tmpfs(mount: &Mount) -> Result<(), Invalid> {
    if !mount.source.is_empty() {
        return Err(Invalid::argument(
            "invalid tmpfs mount, source must be empty",
        ));
    }
    if mount.tmpfs_size_bytes < 0 {
        return Err(Invalid::argument("tmpfs size must not be negative"));
    }
    if mount.tmpfs_mode > 0o7777 {
        return Err(Invalid::argument(format!(
            "tmpfs mode {:o} is more than 7777",
            mount.tmpfs_mode
        )));
    }
    Ok(())
}

/// The path without `.` and double slashes, if it is absolute and never goes up.
fn absolute(path: &str) -> Option<PathBuf> {
    let parsed = Path::new(path);
    let plain = parsed
        .components()
        .all(|part| matches!(part, Component::RootDir | Component::Normal(_)));
    (parsed.is_absolute() && plain && !path.contains('\0')).then(|| parsed.components().collect())
}

fn health(check: &HealthConfig) -> Result<(), Invalid> {
    text::count("health check", check.test.len(), VALUES_MAX)?;
    for part in &check.test {
        text::short("health check", part)?;
    }
    match check.test.first().map(String::as_str) {
        None => {}
        Some("NONE") if check.test.len() == 1 => {}
        Some("CMD") if check.test.len() > 1 => {}
        Some("CMD-SHELL") if check.test.len() == 2 => {}
        Some(_) => {
            return Err(Invalid::argument(
                "health check must be NONE, or CMD with a command, or CMD-SHELL with one line",
            ));
        }
    }
    duration("health check interval", check.interval.as_ref())?;
    duration("health check timeout", check.timeout.as_ref())?;
    duration("health check start period", check.start_period.as_ref())?;
    Ok(())
}

fn resource_requirements(requirements: &ResourceRequirements) -> Result<(), Invalid> {
    for part in [&requirements.limits, &requirements.reservations]
        .into_iter()
        .flatten()
    {
        resources(part)?;
    }
    if let Some(limit) = requirements.limits.map(|limits| limits.memory_bytes)
        && (1..MEMORY_LIMIT_MIN).contains(&limit)
    {
        return Err(Invalid::argument(format!(
            "invalid memory limit {limit}: no node runs a process in less than 6MiB"
        )));
    }
    if requirements.pids_limit < 0 {
        return Err(Invalid::argument(
            "the limit of processes must not be negative",
        ));
    }
    Ok(())
}

fn resources(resources: &Resources) -> Result<(), Invalid> {
    if resources.nano_cpus != 0 && resources.nano_cpus < NANO_CPUS_MIN {
        #[allow(clippy::cast_precision_loss)] // below a million, or nonsense anyway
        let cpus = resources.nano_cpus as f64 / 1e9;
        return Err(Invalid::argument(format!(
            "invalid cpu value {cpus}: Must be at least 0.001"
        )));
    }
    if resources.memory_bytes != 0 && resources.memory_bytes < MEMORY_MIN {
        return Err(Invalid::argument(format!(
            "invalid memory value {}: Must be at least 4MiB",
            resources.memory_bytes
        )));
    }
    Ok(())
}

fn restart_policy(policy: &RestartPolicy) -> Result<(), Invalid> {
    RestartCondition::try_from(policy.condition).map_err(|_| {
        Invalid::argument(format!("unknown restart condition {}", policy.condition))
    })?;
    duration("restart delay", policy.delay.as_ref())?;
    duration("restart window", policy.window.as_ref())?;
    Ok(())
}

fn placement(placement: &Placement) -> Result<(), Invalid> {
    text::count("constraint", placement.constraints.len(), PARTS_MAX)?;
    for constraint in &placement.constraints {
        Constraint::parse(constraint).map_err(|error| Invalid::argument(error.to_string()))?;
    }
    text::count("placement preference", placement.preferences.len(), 16)?;
    for preference in &placement.preferences {
        let descriptor = match &preference.preference {
            Some(placement_preference::Preference::Spread(spread)) => {
                spread.spread_descriptor.as_str()
            }
            None => "",
        };
        text::line("placement preference", descriptor)?;
        Spread::parse(descriptor).map_err(|error| Invalid::argument(error.to_string()))?;
    }
    text::count("platform", placement.platforms.len(), PARTS_MAX)?;
    for platform in &placement.platforms {
        text::line("platform", &platform.architecture)?;
        text::line("platform", &platform.os)?;
    }
    Ok(())
}

fn attachments(networks: &[NetworkAttachmentConfig]) -> Result<(), Invalid> {
    text::count("network", networks.len(), NETWORKS_MAX)?;
    for network in networks {
        if network.target.is_empty() {
            return Err(Invalid::argument("a network must be named"));
        }
        text::line("network", &network.target)?;
        text::count("alias", network.aliases.len(), PARTS_MAX)?;
        for alias in &network.aliases {
            text::domain("alias", alias)?;
        }
        if let Some(option) = network.driver_opts.keys().next() {
            return Err(Invalid::argument(format!(
                "unknown driver option {} of network {}",
                text::quoted(option),
                network.target
            )));
        }
    }
    Ok(())
}

fn update_config(what: &str, config: Option<&UpdateConfig>) -> Result<(), Invalid> {
    let Some(config) = config else { return Ok(()) };
    duration(&format!("{what} delay"), config.delay.as_ref())?;
    duration(&format!("{what} monitor"), config.monitor.as_ref())?;
    let action = FailureAction::try_from(config.failure_action).map_err(|_| {
        Invalid::argument(format!(
            "unknown {what} failure action {}",
            config.failure_action
        ))
    })?;
    if action == FailureAction::Rollback {
        return Err(Invalid::argument(format!(
            "{what} failure action rollback comes later: use pause or continue"
        )));
    }
    UpdateOrder::try_from(config.order)
        .map_err(|_| Invalid::argument(format!("unknown {what} order {}", config.order)))?;
    if !(0.0..=1.0).contains(&config.max_failure_ratio) {
        return Err(Invalid::argument(format!(
            "{what} max failure ratio must be between 0 and 1"
        )));
    }
    Ok(())
}

fn endpoint_spec(endpoint: &EndpointSpec) -> Result<(), Invalid> {
    let mode = EndpointMode::try_from(endpoint.mode)
        .map_err(|_| Invalid::argument(format!("unknown endpoint mode {}", endpoint.mode)))?;
    text::count("published port", endpoint.ports.len(), PARTS_MAX)?;
    let mut published = HashSet::new();
    for port in &endpoint.ports {
        text::line("port name", &port.name)?;
        let protocol = PortProtocol::try_from(port.protocol)
            .map_err(|_| Invalid::argument(format!("unknown protocol {}", port.protocol)))?;
        let publish = PublishMode::try_from(port.publish_mode).map_err(|_| {
            Invalid::argument(format!("unknown publish mode {}", port.publish_mode))
        })?;
        if !(1..=65535).contains(&port.target_port) {
            return Err(Invalid::argument(format!(
                "invalid target port {}: expected 1 to 65535",
                port.target_port
            )));
        }
        if port.published_port > 65535 {
            return Err(Invalid::argument(format!(
                "invalid published port {}: expected 1 to 65535",
                port.published_port
            )));
        }
        if publish == PublishMode::Ingress {
            if mode == EndpointMode::Dnsrr {
                return Err(Invalid::argument(
                    "EndpointSpec: port published with ingress mode can't be used with dnsrr mode",
                ));
            }
            return Err(Invalid::unsupported(format!(
                "publishing port {} on every node (mode=ingress) comes later; mode=host works now",
                port.published_port
            )));
        }
        if protocol == PortProtocol::Sctp {
            return Err(Invalid::unsupported(
                "publishing sctp ports comes later; tcp and udp work now",
            ));
        }
        if port.published_port != 0 && !published.insert((port.published_port, port.protocol)) {
            return Err(Invalid::argument(format!(
                "EndpointSpec: duplicate published ports provided: {}/{}",
                port.published_port,
                if protocol == PortProtocol::Udp {
                    "udp"
                } else {
                    "tcp"
                }
            )));
        }
    }
    Ok(())
}

/// A signal's name, with or without `SIG`, or its number.
fn is_signal(text: &str) -> bool {
    const NAMES: [&str; 34] = [
        "ABRT", "ALRM", "BUS", "CHLD", "CLD", "CONT", "FPE", "HUP", "ILL", "INT", "IO", "IOT",
        "KILL", "PIPE", "POLL", "PROF", "PWR", "QUIT", "SEGV", "STKFLT", "STOP", "SYS", "TERM",
        "TRAP", "TSTP", "TTIN", "TTOU", "URG", "USR1", "USR2", "VTALRM", "WINCH", "XCPU", "XFSZ",
    ];
    if let Ok(number) = text.parse::<u8>() {
        return (1..=64).contains(&number);
    }
    let upper = text.to_ascii_uppercase();
    let name = upper.strip_prefix("SIG").unwrap_or(&upper);
    let real_time = |rest: &str, sign: char| {
        rest.is_empty()
            || rest
                .strip_prefix(sign)
                .and_then(|n| n.parse::<u8>().ok())
                .is_some_and(|n| n <= 30)
    };
    NAMES.contains(&name)
        || name
            .strip_prefix("RTMIN")
            .is_some_and(|rest| real_time(rest, '+'))
        || name
            .strip_prefix("RTMAX")
            .is_some_and(|rest| real_time(rest, '-'))
}

/// A Linux capability, with or without `CAP_`, or `ALL`.
fn is_capability(text: &str) -> bool {
    const NAMES: [&str; 42] = [
        "ALL",
        "AUDIT_CONTROL",
        "AUDIT_READ",
        "AUDIT_WRITE",
        "BLOCK_SUSPEND",
        "BPF",
        "CHECKPOINT_RESTORE",
        "CHOWN",
        "DAC_OVERRIDE",
        "DAC_READ_SEARCH",
        "FOWNER",
        "FSETID",
        "IPC_LOCK",
        "IPC_OWNER",
        "KILL",
        "LEASE",
        "LINUX_IMMUTABLE",
        "MAC_ADMIN",
        "MAC_OVERRIDE",
        "MKNOD",
        "NET_ADMIN",
        "NET_BIND_SERVICE",
        "NET_BROADCAST",
        "NET_RAW",
        "PERFMON",
        "SETFCAP",
        "SETGID",
        "SETPCAP",
        "SETUID",
        "SYSLOG",
        "SYS_ADMIN",
        "SYS_BOOT",
        "SYS_CHROOT",
        "SYS_MODULE",
        "SYS_NICE",
        "SYS_PACCT",
        "SYS_PTRACE",
        "SYS_RAWIO",
        "SYS_RESOURCE",
        "SYS_TIME",
        "SYS_TTY_CONFIG",
        "WAKE_ALARM",
    ];
    let upper = text.to_ascii_uppercase();
    let name = upper.strip_prefix("CAP_").unwrap_or(&upper);
    NAMES.contains(&name)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;
    use prost::Message as _;
    use swarm_proto::v1::{
        Annotations, GlobalMode, PlacementPreference, PortConfig, RegistryAuth, ReplicatedMode,
        SpreadOver,
    };

    use super::*;

    fn spec() -> ServiceSpec {
        ServiceSpec {
            annotations: Some(Annotations {
                name: "web".to_owned(),
                ..Default::default()
            }),
            task: Some(
                TaskSpec {
                    container: Some(ContainerSpec {
                        image: "nginx".to_owned(),
                        ..Default::default()
                    }),
                    ..Default::default()
                }
                .into(),
            ),
            ..Default::default()
        }
    }

    fn with_container(change: impl FnOnce(&mut ContainerSpec)) -> Result<(), Invalid> {
        let mut spec = spec();
        change(spec.task.as_mut().unwrap().container.as_mut().unwrap());
        service_spec(&spec)
    }

    fn with_task(change: impl FnOnce(&mut TaskSpec)) -> Result<(), Invalid> {
        let mut spec = spec();
        change(spec.task.as_mut().unwrap());
        service_spec(&spec)
    }

    fn with_ports(mode: EndpointMode, ports: Vec<PortConfig>) -> Result<(), Invalid> {
        service_spec(&ServiceSpec {
            endpoint: Some(EndpointSpec {
                mode: mode.into(),
                ports,
            }),
            ..spec()
        })
    }

    fn text(result: Result<(), Invalid>) -> String {
        result.unwrap_err().to_string()
    }

    fn port(target: u32, published: u32, mode: PublishMode) -> PortConfig {
        PortConfig {
            target_port: target,
            published_port: published,
            publish_mode: mode.into(),
            ..Default::default()
        }
    }

    fn mount(kind: MountType, source: &str, target: &str) -> Mount {
        Mount {
            r#type: kind.into(),
            source: source.to_owned(),
            target: target.to_owned(),
            ..Default::default()
        }
    }

    #[test]
    fn a_plain_service_is_accepted() {
        assert_eq!(service_spec(&spec()), Ok(()));
        assert_eq!(
            with_container(|c| {
                c.env = vec!["A=b=c".to_owned(), "UNSET".to_owned()];
                c.stop_signal = "SIGRTMIN+3".to_owned();
                c.capability_add = vec!["net_admin".to_owned(), "CAP_SYS_TIME".to_owned()];
                c.capability_drop = vec!["ALL".to_owned()];
                c.hosts = vec!["db.local:10.0.0.1".to_owned(), "six:fd00::1".to_owned()];
                c.mounts = vec![
                    mount(MountType::Bind, "/srv", "/data"),
                    mount(MountType::Tmpfs, "", "/tmp"),
                ];
            }),
            Ok(())
        );
    }

    #[test]
    fn images_must_be_references() {
        assert_eq!(
            text(with_container(|c| c.image.clear())),
            "ContainerSpec: image reference must be provided"
        );
        assert_eq!(
            text(with_container(|c| c.image = "NGINX:".to_owned())),
            "ContainerSpec: \"NGINX:\" is not a valid repository/tag"
        );
    }

    #[test]
    fn mounts_are_absolute_single_and_of_an_available_type() {
        let refused = |mounts| text(with_container(|c| c.mounts = mounts));
        assert!(
            refused(vec![mount(MountType::Bind, "/a", "data")])
                .starts_with("invalid mount target, must be an absolute path")
        );
        assert!(
            refused(vec![mount(MountType::Bind, "/a", "/data/../x")])
                .starts_with("invalid mount target, must be an absolute path")
        );
        assert!(
            refused(vec![mount(MountType::Bind, "a", "/data")])
                .starts_with("invalid bind mount source, must be an absolute path")
        );
        assert_eq!(
            refused(vec![
                mount(MountType::Bind, "/a", "/data"),
                mount(MountType::Tmpfs, "", "//data/")
            ]),
            "ContainerSpec: duplicate mount point: //data/"
        );
        assert!(refused(vec![mount(MountType::Bind, "/a", "/")]).contains("root directory"));
        // No node does this: it would be refused there, task after task.
        let shared = Mount {
            bind_propagation: "rshared".to_owned(),
            ..mount(MountType::Bind, "/a", "/b")
        };
        assert!(refused(vec![shared]).contains("propagation rshared is not available"));
        assert!(
            refused(vec![mount(MountType::Volume, "v", "/data")])
                .contains("volumes are not available yet")
        );
    }

    #[test]
    fn resources_have_swarms_minima() {
        let refused = |resources| {
            text(with_task(|task| {
                task.resources = Some(ResourceRequirements {
                    reservations: Some(resources),
                    ..Default::default()
                });
            }))
        };
        assert_eq!(
            refused(Resources {
                memory_bytes: 1,
                ..Default::default()
            }),
            "invalid memory value 1: Must be at least 4MiB"
        );
        assert_eq!(
            refused(Resources {
                nano_cpus: 100_000,
                ..Default::default()
            }),
            "invalid cpu value 0.0001: Must be at least 0.001"
        );
    }

    #[test]
    fn a_memory_limit_is_one_that_nodes_accept() {
        let with_limit = |memory_bytes| {
            with_task(|task| {
                task.resources = Some(ResourceRequirements {
                    limits: Some(Resources {
                        memory_bytes,
                        ..Default::default()
                    }),
                    ..Default::default()
                });
            })
        };
        assert_eq!(with_limit(6 << 20), Ok(()));
        assert_eq!(
            text(with_limit(5 << 20)),
            "invalid memory limit 5242880: no node runs a process in less than 6MiB"
        );
    }

    #[test]
    fn ports_are_in_range_single_and_of_the_host() {
        use EndpointMode::{Dnsrr, Vip};
        use PublishMode::{Host, Ingress};
        assert_eq!(with_ports(Vip, vec![port(80, 8080, Host)]), Ok(()));
        assert_eq!(
            with_ports(Dnsrr, vec![port(80, 0, Host), port(81, 0, Host)]),
            Ok(())
        );
        assert!(text(with_ports(Vip, vec![port(0, 80, Host)])).contains("1 to 65535"));
        assert!(text(with_ports(Vip, vec![port(80, 65536, Host)])).contains("1 to 65535"));
        assert!(
            text(with_ports(
                Vip,
                vec![port(80, 8080, Host), port(81, 8080, Host)]
            ))
            .starts_with("EndpointSpec: duplicate published ports provided")
        );
        assert!(text(with_ports(Vip, vec![port(80, 8080, Ingress)])).contains("mode=host works"));
        assert_eq!(
            text(with_ports(Dnsrr, vec![port(80, 8080, Ingress)])),
            "EndpointSpec: port published with ingress mode can't be used with dnsrr mode"
        );
    }

    #[test]
    fn placement_is_parsed_at_the_border() {
        let constraint = |constraint: &str| {
            with_task(|task| {
                task.placement = Some(Placement {
                    constraints: vec![constraint.to_owned()],
                    ..Default::default()
                });
            })
        };
        assert_eq!(constraint("node.labels.zone==a"), Ok(()));
        assert!(text(constraint("zone=a")).contains("zone=a"));
        let spread = |over: &str| {
            with_task(|task| {
                task.placement = Some(Placement {
                    preferences: vec![PlacementPreference {
                        preference: Some(placement_preference::Preference::Spread(SpreadOver {
                            spread_descriptor: over.to_owned(),
                        })),
                    }],
                    ..Default::default()
                });
            })
        };
        assert_eq!(spread("node.labels.zone"), Ok(()));
        assert!(text(spread("zone")).contains("cannot spread over \"zone\""));
    }

    #[test]
    fn names_of_signals_capabilities_and_variables_are_known() {
        assert!(text(with_container(|c| c.stop_signal = "SIGFOO".to_owned())).contains("SIGFOO"));
        assert!(text(with_container(|c| c.stop_signal = "65".to_owned())).contains("65"));
        assert!(
            text(with_container(|c| c.capability_add = vec!["FLY".to_owned()])).contains("FLY")
        );
        assert!(text(with_container(|c| c.env = vec!["=x".to_owned()])).contains("=x"));
        for good in ["TERM", "sigterm", "15", "SIGRTMAX-1", "WINCH"] {
            assert!(is_signal(good), "{good}");
        }
    }

    #[test]
    fn everything_is_bounded() {
        assert!(
            text(with_container(
                |c| c.env = vec!["A=1".to_owned(); VALUES_MAX + 1]
            ))
            .contains("more than 4096")
        );
        assert!(
            text(with_container(
                |c| c.capability_drop = vec!["ALL".to_owned(); PARTS_MAX + 1]
            ))
            .contains("more than 256")
        );
        assert!(
            text(with_container(|c| c.args = vec!["x".repeat(1 << 20)]))
                .contains("the service's spec has")
        );
        let mut many = spec();
        many.mode = Some(ServiceMode {
            mode: Some(service_mode::Mode::Replicated(ReplicatedMode {
                replicas: Some(u64::MAX),
            })),
        });
        assert!(text(service_spec(&many)).contains("more than 1000000"));
        many.mode = Some(ServiceMode {
            mode: Some(service_mode::Mode::Global(GlobalMode {})),
        });
        assert_eq!(service_spec(&many), Ok(()));
        many.update = Some(UpdateConfig {
            max_failure_ratio: f32::NAN,
            ..Default::default()
        });
        assert!(text(service_spec(&many)).contains("between 0 and 1"));
        // Never stored as if it were kept.
        many.update = Some(UpdateConfig {
            failure_action: FailureAction::Rollback.into(),
            ..Default::default()
        });
        assert!(text(service_spec(&many)).contains("rollback comes later: use pause or continue"));
    }

    proptest! {
        #[test]
        fn no_texts_make_the_check_panic(
            texts in proptest::collection::vec(any::<String>(), 12),
            labels in any::<BTreeMap<String, String>>(),
            numbers in proptest::collection::vec(any::<i32>(), 6),
            seconds in any::<i64>(), wide in any::<i64>(),
        ) {
            let one = |at: usize| vec![texts[at].clone()];
            let span = Some(prost_types::Duration { seconds, nanos: numbers[0] });
            let container = |image: &str| ContainerSpec {
                image: image.to_owned(), labels: labels.clone(), command: one(0), args: one(1),
                hostname: String::new(), env: one(2), dir: String::new(), user: texts[3].clone(), groups: one(4),
                mounts: vec![Mount { r#type: numbers[1], source: texts[5].clone(), target: texts[6].clone(),
                    tmpfs_size_bytes: wide, ..Default::default() }],
                stop_signal: texts[7].clone(), stop_grace_period: span, capability_add: one(8),
                hosts: one(9), dns_nameservers: one(10), dns_search: one(11), dns_options: one(0),
                pull_auth: Some(RegistryAuth::default()),
                healthcheck: Some(HealthConfig { test: texts.clone(), interval: span, ..Default::default() }),
                ..Default::default()
            };
            for image in ["nginx", texts[0].as_str()] {
                let _ = container_spec(&container(image));
                let _ = resolver(&container(image));
                let _ = mounts(&container(image).mounts);
                let _ = health(container(image).healthcheck.as_ref().unwrap());
                let _ = is_signal(&texts[7]);
                let _ = is_capability(&texts[8]);
                let _ = absolute(&texts[5]);
            }
            let _ = resources(&Resources { nano_cpus: wide, memory_bytes: seconds });
            let _ = placement(&Placement { constraints: one(3), ..Default::default() });
            let _ = attachments(&[NetworkAttachmentConfig { target: texts[4].clone(), aliases: one(5), ..Default::default() }]);
            let _ = endpoint_spec(&EndpointSpec { mode: numbers[2], ports: vec![PortConfig { name: texts[0].clone(),
                protocol: numbers[3], target_port: numbers[4] as u32, published_port: numbers[5] as u32, publish_mode: 1 }] });
            let _ = update_config("update", Some(&UpdateConfig { delay: span, failure_action: numbers[2],
                max_failure_ratio: f32::from_bits(numbers[5] as u32), ..Default::default() }));
        }

        #[test]
        fn no_bytes_that_decode_make_the_check_panic(bytes in proptest::collection::vec(any::<u8>(), 0..400)) {
            if let Ok(decoded) = ServiceSpec::decode(bytes.as_slice()) {
                let _ = service_spec(&decoded);
            }
        }
    }
}
