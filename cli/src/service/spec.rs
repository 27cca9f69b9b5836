//! From flags to a service's spec. Pure: names of networks are resolved before.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use swarm_proto::v1::{
    Annotations, ContainerSpec, EndpointMode, EndpointSpec, GlobalMode, HealthConfig, PortConfig,
    PortProtocol, ReplicatedMode, RestartCondition, ServiceMode, ServiceSpec, TaskSpec,
    service_mode,
};

use super::create::Create;
use super::flags::{self, Common};
use super::update::Update;

const NOT_REPLICATED: &str = "can only be used with replicated or replicated-job mode";

/// The spec of a new service.
pub fn create(flags: &Create) -> Result<ServiceSpec, String> {
    let (image, args) = flags
        .image
        .split_first()
        .ok_or("requires at least 1 argument: the image")?;
    let mode = match flags.mode.as_str() {
        "replicated" => service_mode::Mode::Replicated(ReplicatedMode::default()),
        "global" => service_mode::Mode::Global(GlobalMode {}),
        "replicated-job" | "global-job" => {
            return Err(format!("service mode {} is not available yet", flags.mode));
        }
        other => {
            return Err(format!(
                "Unknown mode: {other}, only replicated and global supported"
            ));
        }
    };
    let mut env = Vec::new();
    for file in &flags.env_file {
        env.extend(flags::env_file(file)?);
    }
    env.extend(each(&flags.env, flags::env)?);
    let (add, drop) = capabilities(&flags.cap_add, &flags.cap_drop);
    let mut ports = Vec::new();
    for text in &flags.publish {
        ports.extend(flags::publish(text)?);
    }
    let container = ContainerSpec {
        image: image.clone(),
        args: args.to_vec(),
        labels: pairs(&flags.container_label)?,
        env: unique_env(env),
        groups: flags.group.clone(),
        mounts: each(&flags.mount, flags::mount)?,
        hosts: each(&flags.host, host)?,
        dns_nameservers: flags.dns.clone(),
        dns_search: flags.dns_search.clone(),
        dns_options: flags.dns_option.clone(),
        capability_add: add,
        capability_drop: drop,
        ..ContainerSpec::default()
    };
    let mut spec = ServiceSpec {
        annotations: Some(Annotations {
            name: flags.name.clone().unwrap_or_default(),
            labels: pairs(&flags.label)?,
        }),
        task: Some(
            TaskSpec {
                container: Some(container),
                networks: each(&flags.network, flags::network)?,
                ..TaskSpec::default()
            }
            .into(),
        ),
        mode: Some(ServiceMode { mode: Some(mode) }),
        endpoint: (!ports.is_empty()).then(|| EndpointSpec {
            ports,
            ..EndpointSpec::default()
        }),
        ..ServiceSpec::default()
    };
    let task = spec.task.get_or_insert_default();
    if !flags.constraint.is_empty() || !flags.placement_pref.is_empty() {
        let placement = task.placement.get_or_insert_default();
        placement.constraints.clone_from(&flags.constraint);
        placement.preferences = each(&flags.placement_pref, flags::preference)?;
    }
    common(&mut spec, &flags.common)?;
    Ok(spec)
}

/// The spec after an update. Networks to add and remove are IDs already.
pub fn update(old: &ServiceSpec, flags: &Update) -> Result<ServiceSpec, String> {
    let mut spec = old.clone();
    let annotations = spec.annotations.get_or_insert_default();
    change_pairs(&mut annotations.labels, &flags.label_add, &flags.label_rm)?;
    let task = spec.task.get_or_insert_default();
    if flags.force {
        task.force_update += 1;
    }
    let container = task.container.get_or_insert_default();
    if let Some(image) = &flags.image {
        container.image.clone_from(image);
    }
    if let Some(args) = &flags.args {
        container.args = flags::words(args)?;
    }
    change_pairs(
        &mut container.labels,
        &flags.container_label_add,
        &flags.container_label_rm,
    )?;
    container
        .env
        .retain(|entry| !flags.env_rm.iter().any(|key| key == env_key(entry)));
    container.env.extend(each(&flags.env_add, flags::env)?);
    container.env = unique_env(std::mem::take(&mut container.env));
    change(&mut container.groups, flags.group_add.clone(), |group| {
        flags.group_rm.contains(group)
    });
    change(&mut container.hosts, each(&flags.host_add, host)?, |line| {
        flags
            .host_rm
            .iter()
            .any(|gone| gone == line || line.split(':').next() == Some(gone))
    });
    change(
        &mut container.dns_nameservers,
        flags.dns_add.clone(),
        |one| flags.dns_rm.contains(one),
    );
    change(
        &mut container.dns_search,
        flags.dns_search_add.clone(),
        |one| flags.dns_search_rm.contains(one),
    );
    change(
        &mut container.dns_options,
        flags.dns_option_add.clone(),
        |one| flags.dns_option_rm.contains(one),
    );
    let mounts = each(&flags.mount_add, flags::mount)?;
    container.mounts.retain(|mount| {
        !flags.mount_rm.contains(&mount.target)
            && !mounts.iter().any(|new| new.target == mount.target)
    });
    container.mounts.extend(mounts);
    // What is added is no longer dropped, and the other way round.
    let (add, drop) = capabilities(&flags.cap_add, &flags.cap_drop);
    container.capability_add.retain(|cap| !drop.contains(cap));
    container.capability_drop.retain(|cap| !add.contains(cap));
    change(&mut container.capability_add, add, |_| false);
    change(&mut container.capability_drop, drop, |_| false);

    for text in &flags.network_add {
        let attachment = flags::network(text)?;
        if task
            .networks
            .iter()
            .any(|old| old.target == attachment.target)
            && !flags.network_rm.contains(&attachment.target)
        {
            return Err(format!("service is already attached to network {text}"));
        }
    }
    task.networks
        .retain(|old| !flags.network_rm.contains(&old.target));
    task.networks
        .extend(each(&flags.network_add, flags::network)?);
    change_placement(task, flags)?;
    change_ports(&mut spec, flags)?;
    common(&mut spec, &flags.common)?;
    Ok(spec)
}

fn change_placement(task: &mut TaskSpec, flags: &Update) -> Result<(), String> {
    let preferences = each(&flags.placement_pref_add, flags::preference)?;
    let gone = each(&flags.placement_pref_rm, flags::preference)?;
    if flags.constraint_add.is_empty()
        && flags.constraint_rm.is_empty()
        && preferences.is_empty()
        && gone.is_empty()
    {
        return Ok(());
    }
    let plain = |constraint: &str| constraint.replace(' ', "");
    let placement = task.placement.get_or_insert_default();
    change(
        &mut placement.constraints,
        flags.constraint_add.clone(),
        |old| {
            flags
                .constraint_rm
                .iter()
                .any(|gone| plain(gone) == plain(old))
        },
    );
    placement.preferences.retain(|old| !gone.contains(old));
    placement.preferences.extend(preferences);
    Ok(())
}

fn change_ports(spec: &mut ServiceSpec, flags: &Update) -> Result<(), String> {
    if flags.publish_add.is_empty() && flags.publish_rm.is_empty() {
        return Ok(());
    }
    let gone = each(&flags.publish_rm, target_port)?;
    let mut new = Vec::new();
    for text in &flags.publish_add {
        new.extend(flags::publish(text)?);
    }
    let key = |port: &PortConfig| (port.target_port, port.protocol());
    let endpoint = spec.endpoint.get_or_insert_default();
    endpoint
        .ports
        .retain(|old| !gone.contains(&key(old)) && !new.iter().any(|port| key(port) == key(old)));
    endpoint.ports.extend(new);
    Ok(())
}

/// "80", "80/udp", or what `--publish-add` takes.
fn target_port(text: &str) -> Result<(u32, PortProtocol), String> {
    if text.contains('=') {
        let port = flags::publish(text)?;
        let port = port
            .first()
            .ok_or_else(|| format!("invalid port {text:?}"))?;
        return Ok((port.target_port, port.protocol()));
    }
    let (port, protocol) = text.split_once('/').unwrap_or((text, "tcp"));
    let protocol = match protocol {
        "tcp" => PortProtocol::Tcp,
        "udp" => PortProtocol::Udp,
        "sctp" => PortProtocol::Sctp,
        other => return Err(format!("invalid protocol value {other}")),
    };
    let port: u16 = port.parse().ok().filter(|port| *port > 0).ok_or_else(|| {
        format!("invalid port {text:?}: it must be a target port from 1 to 65535")
    })?;
    Ok((port.into(), protocol))
}

/// What `create` and `update` set in the same way.
fn common(spec: &mut ServiceSpec, flags: &Common) -> Result<(), String> {
    if let Some(replicas) = flags.replicas {
        set_replicas(spec, replicas).map_err(|()| format!("replicas {NOT_REPLICATED}"))?;
    }
    if let Some(mode) = &flags.endpoint_mode {
        let mode = match mode.as_str() {
            "vip" => EndpointMode::Vip,
            "dnsrr" => EndpointMode::Dnsrr,
            other => {
                return Err(format!(
                    "invalid endpoint mode {other:?}: it must be \"vip\" or \"dnsrr\""
                ));
            }
        };
        spec.endpoint.get_or_insert_default().mode = mode.into();
    }
    let global = is_global(spec);
    let task = spec.task.get_or_insert_default();
    if let Some(most) = flags.replicas_max_per_node {
        if global {
            return Err(format!("replicas-max-per-node {NOT_REPLICATED}"));
        }
        task.placement.get_or_insert_default().max_replicas = most;
    }
    resources(task, flags);
    restart(task, flags)?;
    container(task.container.get_or_insert_default(), flags)
}

fn container(container: &mut ContainerSpec, flags: &Common) -> Result<(), String> {
    for (given, field) in [
        (&flags.hostname, &mut container.hostname),
        (&flags.user, &mut container.user),
        (&flags.workdir, &mut container.dir),
        (&flags.stop_signal, &mut container.stop_signal),
    ] {
        if let Some(given) = given {
            field.clone_from(given);
        }
    }
    if let Some(entrypoint) = &flags.entrypoint {
        container.command = flags::words(entrypoint)?;
    }
    for (given, field) in [
        (flags.read_only, &mut container.read_only),
        (flags.init, &mut container.init),
        (flags.tty, &mut container.tty),
    ] {
        if let Some(given) = given {
            *field = given;
        }
    }
    if let Some(grace) = flags.stop_grace_period {
        container.stop_grace_period = Some(span(grace));
    }
    health(container, flags)
}

fn health(container: &mut ContainerSpec, flags: &Common) -> Result<(), String> {
    let times = [
        flags.health_interval,
        flags.health_timeout,
        flags.health_start_period,
    ];
    let given = flags.health_cmd.is_some()
        || flags.health_retries.is_some()
        || times.iter().any(Option::is_some);
    if flags.no_healthcheck {
        if given {
            return Err("--no-healthcheck conflicts with --health-* options".to_owned());
        }
        container.healthcheck = Some(HealthConfig {
            test: vec!["NONE".to_owned()],
            ..HealthConfig::default()
        });
        return Ok(());
    }
    if !given {
        return Ok(());
    }
    let config = container.healthcheck.get_or_insert_default();
    if config.test == ["NONE"] {
        config.test.clear();
    }
    if let Some(command) = &flags.health_cmd {
        config.test = vec!["CMD-SHELL".to_owned(), command.clone()];
    }
    let [interval, timeout, start] = times;
    for (given, field) in [
        (interval, &mut config.interval),
        (timeout, &mut config.timeout),
        (start, &mut config.start_period),
    ] {
        if let Some(given) = given {
            *field = Some(span(given));
        }
    }
    if let Some(retries) = flags.health_retries {
        config.retries = retries;
    }
    Ok(())
}

fn resources(task: &mut TaskSpec, flags: &Common) {
    let mut set = |given: Option<i64>, put: fn(&mut swarm_proto::v1::ResourceRequirements, i64)| {
        if let Some(given) = given {
            put(task.resources.get_or_insert_default(), given);
        }
    };
    set(flags.limit_cpu, |all, cpus| {
        all.limits.get_or_insert_default().nano_cpus = cpus;
    });
    set(flags.limit_memory, |all, bytes| {
        all.limits.get_or_insert_default().memory_bytes = bytes;
    });
    set(flags.limit_pids, |all, pids| all.pids_limit = pids);
    set(flags.reserve_cpu, |all, cpus| {
        all.reservations.get_or_insert_default().nano_cpus = cpus;
    });
    set(flags.reserve_memory, |all, bytes| {
        all.reservations.get_or_insert_default().memory_bytes = bytes;
    });
}

fn restart(task: &mut TaskSpec, flags: &Common) -> Result<(), String> {
    if let Some(condition) = &flags.restart_condition {
        let condition = match condition.as_str() {
            "any" => RestartCondition::Any,
            "none" => RestartCondition::None,
            "on-failure" => RestartCondition::OnFailure,
            other => {
                return Err(format!(
                    "invalid restart condition {other:?}: it must be \"none\", \"on-failure\" or \"any\""
                ));
            }
        };
        task.restart.get_or_insert_default().condition = condition.into();
    }
    if let Some(delay) = flags.restart_delay {
        task.restart.get_or_insert_default().delay = Some(span(delay));
    }
    if let Some(attempts) = flags.restart_max_attempts {
        task.restart.get_or_insert_default().max_attempts = attempts;
    }
    if let Some(window) = flags.restart_window {
        task.restart.get_or_insert_default().window = Some(span(window));
    }
    Ok(())
}

/// How many replicas a replicated service wants; `None` for a global one.
pub fn replicas(spec: &ServiceSpec) -> Option<u64> {
    match spec.mode.as_ref().and_then(|mode| mode.mode.as_ref()) {
        Some(service_mode::Mode::Global(_)) => None,
        Some(service_mode::Mode::Replicated(mode)) => Some(mode.replicas.unwrap_or(1)),
        None => Some(1),
    }
}

/// Sets the number of replicas; a global service has none.
pub fn set_replicas(spec: &mut ServiceSpec, replicas: u64) -> Result<(), ()> {
    if is_global(spec) {
        return Err(());
    }
    spec.mode = Some(ServiceMode {
        mode: Some(service_mode::Mode::Replicated(ReplicatedMode {
            replicas: Some(replicas),
        })),
    });
    Ok(())
}

fn is_global(spec: &ServiceSpec) -> bool {
    replicas(spec).is_none()
}

fn span(span: Duration) -> prost_types::Duration {
    prost_types::Duration {
        seconds: i64::try_from(span.as_secs()).unwrap_or(i64::MAX),
        nanos: i32::try_from(span.subsec_nanos()).unwrap_or(0),
    }
}

fn each<T>(texts: &[String], read: impl Fn(&str) -> Result<T, String>) -> Result<Vec<T>, String> {
    texts.iter().map(|text| read(text)).collect()
}

fn pairs(texts: &[String]) -> Result<BTreeMap<String, String>, String> {
    texts.iter().map(|text| flags::key_value(text)).collect()
}

fn change_pairs(
    map: &mut BTreeMap<String, String>,
    add: &[String],
    remove: &[String],
) -> Result<(), String> {
    map.retain(|key, _| !remove.contains(key));
    map.extend(pairs(add)?);
    Ok(())
}

/// Takes out what is gone, then adds what is new and not there yet.
fn change(list: &mut Vec<String>, add: Vec<String>, gone: impl Fn(&String) -> bool) {
    list.retain(|one| !gone(one));
    for one in add {
        if !list.contains(&one) {
            list.push(one);
        }
    }
}

fn env_key(entry: &str) -> &str {
    entry.split('=').next().unwrap_or(entry)
}

/// Of several values for a variable the last counts, at the place of the first.
fn unique_env(env: Vec<String>) -> Vec<String> {
    let mut unique: Vec<String> = Vec::with_capacity(env.len());
    for entry in env {
        match unique
            .iter_mut()
            .find(|old| env_key(old) == env_key(&entry))
        {
            Some(old) => *old = entry,
            None => unique.push(entry),
        }
    }
    unique
}

/// "CAP_NET_ADMIN" for "net_admin"; what is both added and dropped is added.
fn capabilities(add: &[String], drop: &[String]) -> (Vec<String>, Vec<String>) {
    let normal = |caps: &[String]| -> BTreeSet<String> {
        caps.iter()
            .map(|cap| {
                let cap = cap.to_uppercase();
                if cap == "ALL" || cap.starts_with("CAP_") {
                    cap
                } else {
                    format!("CAP_{cap}")
                }
            })
            .collect()
    };
    let add = normal(add);
    let drop = normal(drop).difference(&add).cloned().collect();
    (add.into_iter().collect(), drop)
}

/// Reads "name:address".
fn host(text: &str) -> Result<String, String> {
    let (name, address) = text
        .split_once(':')
        .filter(|(name, _)| !name.is_empty())
        .ok_or_else(|| format!("bad format for add-host: {text:?}"))?;
    address
        .parse::<std::net::IpAddr>()
        .map_err(|_| format!("invalid IP address in add-host: {address:?}"))?;
    Ok(format!("{name}:{address}"))
}

#[cfg(test)]
mod tests {
    use clap::Parser as _;
    use swarm_proto::v1::PublishMode;

    use super::*;

    #[derive(clap::Parser)]
    struct CreateLine {
        #[command(flatten)]
        flags: Create,
    }

    #[derive(clap::Parser)]
    struct UpdateLine {
        #[command(flatten)]
        flags: Update,
    }

    fn created(line: &str) -> Result<ServiceSpec, String> {
        let words = flags::words(&format!("create {line}")).unwrap();
        create(
            &CreateLine::try_parse_from(words)
                .map_err(|error| error.to_string())?
                .flags,
        )
    }

    fn updated(old: &ServiceSpec, line: &str) -> Result<ServiceSpec, String> {
        let words = flags::words(&format!("update {line} web")).unwrap();
        update(
            old,
            &UpdateLine::try_parse_from(words)
                .map_err(|error| error.to_string())?
                .flags,
        )
    }

    fn task(spec: &ServiceSpec) -> &TaskSpec {
        spec.task.as_ref().unwrap()
    }

    fn container_of(spec: &ServiceSpec) -> &ContainerSpec {
        task(spec).container.as_ref().unwrap()
    }

    #[test]
    fn every_flag_finds_its_field() {
        let spec = created(
            "--name web --replicas 3 --network net --network name=db,alias=store --endpoint-mode dnsrr \
             --publish mode=host,published=8080,target=80 --constraint node.role==worker --placement-pref spread=node.labels.zone \
             --replicas-max-per-node 2 --env A=1 -e B=2 -e A=3 --label a=b --container-label c=d --hostname h --user u --workdir /w \
             --entrypoint 'sh -c' --mount type=bind,source=/a,target=/b --mount type=tmpfs,target=/t --limit-cpu 1.5 --limit-memory 64m \
             --reserve-cpu 0.5 --reserve-memory 32m --restart-condition on-failure --restart-delay 1s --restart-max-attempts 4 \
             --restart-window 1m --stop-signal SIGINT --stop-grace-period 3s --cap-add net_admin --cap-drop ALL --read-only --init \
             nginx:1 -g --replicas 9",
        )
        .unwrap();
        let container = container_of(&spec);
        assert_eq!(spec.annotations.as_ref().unwrap().name, "web");
        assert_eq!(spec.annotations.as_ref().unwrap().labels["a"], "b");
        assert_eq!(replicas(&spec), Some(3));
        assert_eq!(container.image, "nginx:1");
        // After the image everything is the container's.
        assert_eq!(container.args, ["-g", "--replicas", "9"]);
        assert_eq!(container.command, ["sh", "-c"]);
        assert_eq!(container.env, ["A=3", "B=2"]);
        assert_eq!(container.labels["c"], "d");
        assert_eq!(
            (
                container.hostname.as_str(),
                container.user.as_str(),
                container.dir.as_str()
            ),
            ("h", "u", "/w")
        );
        assert_eq!(container.mounts.len(), 2);
        assert_eq!(container.stop_signal, "SIGINT");
        assert_eq!(container.stop_grace_period.unwrap().seconds, 3);
        assert_eq!(container.capability_add, ["CAP_NET_ADMIN"]);
        assert_eq!(container.capability_drop, ["ALL"]);
        assert!(container.read_only && container.init);
        let placement = task(&spec).placement.as_ref().unwrap();
        assert_eq!(placement.constraints, ["node.role==worker"]);
        assert_eq!(placement.preferences.len(), 1);
        assert_eq!(placement.max_replicas, 2);
        assert_eq!(task(&spec).networks[1].aliases, ["store"]);
        let resources = task(&spec).resources.unwrap();
        assert_eq!(resources.limits.unwrap().nano_cpus, 1_500_000_000);
        assert_eq!(resources.limits.unwrap().memory_bytes, 64 << 20);
        assert_eq!(resources.reservations.unwrap().nano_cpus, 500_000_000);
        let restart = task(&spec).restart.unwrap();
        assert_eq!(restart.condition(), RestartCondition::OnFailure);
        assert_eq!(
            (
                restart.delay.unwrap().seconds,
                restart.window.unwrap().seconds
            ),
            (1, 60)
        );
        assert_eq!(restart.max_attempts, 4);
        let endpoint = spec.endpoint.as_ref().unwrap();
        assert_eq!(endpoint.mode(), EndpointMode::Dnsrr);
        assert_eq!(endpoint.ports[0].publish_mode(), PublishMode::Host);
    }

    #[test]
    fn what_is_not_given_stays_absent() {
        let spec = created("nginx").unwrap();
        assert!(spec.endpoint.is_none() && spec.update.is_none());
        assert!(task(&spec).placement.is_none());
        assert!(task(&spec).restart.is_none() && task(&spec).resources.is_none());
        assert!(container_of(&spec).stop_grace_period.is_none());
        assert!(container_of(&spec).healthcheck.is_none());
    }

    #[test]
    fn bad_flags_are_named() {
        for (line, what) in [
            (
                "--mode global --replicas 2 nginx",
                "replicas can only be used with replicated",
            ),
            (
                "--mode global --replicas-max-per-node 2 nginx",
                "replicas-max-per-node can only",
            ),
            ("--mode several nginx", "Unknown mode: several"),
            ("--endpoint-mode magic nginx", "magic"),
            ("--publish 8080:80 nginx", "mode=host"),
            ("--restart-condition maybe nginx", "maybe"),
            ("--restart-delay soon nginx", "soon"),
            ("--limit-memory lots nginx", "lots"),
            ("--nonsense nginx", "--nonsense"),
            ("--host nonsense nginx", "nonsense"),
            (
                "--no-healthcheck --health-cmd true nginx",
                "--no-healthcheck",
            ),
            ("", "IMAGE"),
        ] {
            let error = created(line).unwrap_err();
            assert!(error.contains(what), "{line}: {error}");
        }
    }

    #[test]
    fn an_update_changes_what_it_names_and_nothing_else() {
        let old = created(
            "--name web -e A=1 -e B=2 --label k=v --container-label c=d --constraint node.role==worker --network n1 \
             --publish mode=host,published=8080,target=80 --mount type=tmpfs,target=/t --cap-add sys_time --placement-pref spread=node.labels.a nginx arg",
        )
        .unwrap();
        assert_eq!(updated(&old, "").unwrap(), old);
        let new = updated(
            &old,
            "--image nginx:2 --args 'x y' --env-add C=3 --env-rm A --label-rm k --label-add m=n --container-label-rm c --constraint-rm 'node.role == worker' \
             --constraint-add node.labels.z==1 --network-rm n1 --network-add n2 --publish-rm 80 --publish-add mode=host,published=9090,target=90 \
             --mount-rm /t --mount-add type=bind,source=/a,target=/b --cap-drop sys_time --force --replicas 4 \
             --placement-pref-rm spread=node.labels.a --placement-pref-add spread=node.labels.b",
        )
        .unwrap();
        let container = container_of(&new);
        assert_eq!(container.image, "nginx:2");
        assert_eq!(container.args, ["x", "y"]);
        assert_eq!(container.env, ["B=2", "C=3"]);
        assert!(container.labels.is_empty());
        assert_eq!(container.mounts.len(), 1);
        assert_eq!(container.mounts[0].target, "/b");
        assert!(container.capability_add.is_empty());
        assert_eq!(container.capability_drop, ["CAP_SYS_TIME"]);
        let labels = &new.annotations.as_ref().unwrap().labels;
        assert_eq!(
            labels.iter().collect::<Vec<_>>(),
            [(&"m".to_owned(), &"n".to_owned())]
        );
        let placement = task(&new).placement.as_ref().unwrap();
        assert_eq!(placement.constraints, ["node.labels.z==1"]);
        assert_eq!(
            placement.preferences,
            [flags::preference("spread=node.labels.b").unwrap()]
        );
        assert_eq!(task(&new).networks.len(), 1);
        assert_eq!(task(&new).networks[0].target, "n2");
        assert_eq!(task(&new).force_update, 1);
        let ports = &new.endpoint.as_ref().unwrap().ports;
        assert_eq!(ports.len(), 1);
        assert_eq!(ports[0].target_port, 90);
        assert_eq!(replicas(&new), Some(4));
    }

    #[test]
    fn a_network_is_not_attached_twice() {
        let old = created("--network n1 nginx").unwrap();
        assert!(
            updated(&old, "--network-add n1")
                .unwrap_err()
                .contains("already attached")
        );
        assert!(updated(&old, "--network-rm n1 --network-add n1").is_ok());
    }

    #[test]
    fn a_global_service_has_no_replicas_to_set() {
        let mut spec = created("--mode global nginx").unwrap();
        assert_eq!(replicas(&spec), None);
        assert_eq!(set_replicas(&mut spec, 3), Err(()));
        assert!(updated(&spec, "--replicas 3").is_err());
    }
}
