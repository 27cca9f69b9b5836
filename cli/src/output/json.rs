//! Objects in the shape of the Docker Engine API's JSON, as `inspect` shows them. Pure.

use prost_types::Timestamp;
use serde_json::{Map, Value, json};
use swarm_proto::v1::{
    ContainerSpec, Endpoint, EndpointMode, EndpointSpec, FailureAction, HealthConfig, LocalNetwork,
    Meta, Mount, MountType, Network, NetworkDetail, Node, NodeAvailability, NodeRole, NodeState,
    Placement, Platform, PortConfig, PortProtocol, PublishMode, Reachability, ResourceRequirements,
    Resources, RestartCondition, RestartPolicy, Service, ServiceSpec, TaskSpec, UpdateConfig,
    UpdateOrder, UpdateState, placement_preference, service_mode,
};

use super::human::rfc3339;

/// Keys in order; those without a value are left out, as Go's `omitempty` does.
struct Fields(Map<String, Value>);

impl Fields {
    fn new() -> Self {
        Self(Map::new())
    }

    /// Always there.
    fn put(mut self, key: &str, value: impl Into<Value>) -> Self {
        self.0.insert(key.to_owned(), value.into());
        self
    }

    /// Left out when empty, zero, false or null.
    fn some(self, key: &str, value: impl Into<Value>) -> Self {
        let value = value.into();
        let empty = match &value {
            Value::Null | Value::Bool(false) => true,
            Value::Number(number) => number.as_f64() == Some(0.0),
            Value::String(text) => text.is_empty(),
            Value::Array(items) => items.is_empty(),
            Value::Object(map) => map.is_empty(),
            Value::Bool(true) => false,
        };
        if empty { self } else { self.put(key, value) }
    }

    fn done(self) -> Value {
        Value::Object(self.0)
    }
}

fn head(id: &str, meta: Option<&Meta>) -> Fields {
    let index = meta
        .and_then(|meta| meta.version)
        .map_or(0, |version| version.index);
    let time = |at: fn(&Meta) -> Option<Timestamp>| rfc3339(meta.and_then(at).as_ref());
    Fields::new()
        .put("ID", id)
        .put("Version", json!({"Index": index}))
        .put("CreatedAt", time(|meta| meta.created_at))
        .put("UpdatedAt", time(|meta| meta.updated_at))
}

fn nanos(span: Option<&prost_types::Duration>) -> Value {
    span.map_or(Value::Null, |span| {
        Value::from(
            span.seconds
                .saturating_mul(1_000_000_000)
                .saturating_add(span.nanos.into()),
        )
    })
}

/// A node.
pub fn node(node: &Node) -> Value {
    let spec = node.spec.clone().unwrap_or_default();
    let annotations = spec.annotations.clone().unwrap_or_default();
    let description = node.description.clone().unwrap_or_default();
    let status = node.status.clone().unwrap_or_default();
    let mut fields = head(&node.id, node.meta.as_ref())
        .put(
            "Spec",
            Fields::new()
                .some("Name", annotations.name)
                .put("Labels", json!(annotations.labels))
                .put("Role", role(spec.desired_role()))
                .put("Availability", availability(spec.availability()))
                .done(),
        )
        .put(
            "Description",
            Fields::new()
                .put("Hostname", description.hostname)
                .put("Platform", platform(description.platform.as_ref()))
                .put("Resources", resources(description.resources.as_ref()))
                .put(
                    "Engine",
                    Fields::new()
                        .put("EngineVersion", description.engine_version)
                        .some("Labels", json!(description.engine_labels))
                        .done(),
                )
                .some("DataPathAddr", description.data_path_addr)
                .done(),
        )
        .put(
            "Status",
            Fields::new()
                .put("State", node_state(status.state()))
                .some("Message", status.message)
                .put("Addr", status.addr)
                .done(),
        );
    if let Some(manager) = &node.manager_status {
        fields = fields.put(
            "ManagerStatus",
            Fields::new()
                .some("Leader", manager.leader)
                .put("Reachability", reachability(manager.reachability()))
                .put("Addr", manager.addr.as_str())
                .done(),
        );
    }
    fields.done()
}

/// "worker", "manager"
pub fn role(role: NodeRole) -> &'static str {
    match role {
        NodeRole::Worker => "worker",
        NodeRole::Manager => "manager",
    }
}

/// "active", "pause", "drain"
pub fn availability(availability: NodeAvailability) -> &'static str {
    match availability {
        NodeAvailability::Active => "active",
        NodeAvailability::Pause => "pause",
        NodeAvailability::Drain => "drain",
    }
}

/// "ready", "down", "unknown", "disconnected"
pub fn node_state(state: NodeState) -> &'static str {
    match state {
        NodeState::Unknown => "unknown",
        NodeState::Down => "down",
        NodeState::Ready => "ready",
        NodeState::Disconnected => "disconnected",
    }
}

/// "reachable", "unreachable", "unknown"
pub fn reachability(reachability: Reachability) -> &'static str {
    match reachability {
        Reachability::Unknown => "unknown",
        Reachability::Unreachable => "unreachable",
        Reachability::Reachable => "reachable",
    }
}

fn platform(platform: Option<&Platform>) -> Value {
    let platform = platform.cloned().unwrap_or_default();
    Fields::new()
        .some("Architecture", platform.architecture)
        .some("OS", platform.os)
        .done()
}

fn resources(resources: Option<&Resources>) -> Value {
    let resources = resources.copied().unwrap_or_default();
    Fields::new()
        .some("NanoCPUs", resources.nano_cpus)
        .some("MemoryBytes", resources.memory_bytes)
        .done()
}

/// A service.
pub fn service(service: &Service) -> Value {
    let mut fields = head(&service.id, service.meta.as_ref()).put(
        "Spec",
        service_spec(&service.spec.clone().unwrap_or_default()),
    );
    if let Some(previous) = &service.previous_spec {
        fields = fields.put("PreviousSpec", service_spec(previous));
    }
    fields = fields.put(
        "Endpoint",
        endpoint(&service.endpoint.clone().unwrap_or_default()),
    );
    if let Some(update) = &service.update_status
        && update.state() != UpdateState::Unspecified
    {
        let time = |at: &Option<Timestamp>| {
            at.as_ref()
                .map_or(Value::Null, |at| rfc3339(Some(at)).into())
        };
        fields = fields.put(
            "UpdateStatus",
            Fields::new()
                .put("State", update_state(update.state()))
                .some("StartedAt", time(&update.started_at))
                .some("CompletedAt", time(&update.completed_at))
                .put("Message", update.message.as_str())
                .done(),
        );
    }
    if let Some(reason) = &service.reason {
        fields = fields.put(
            "Reason",
            json!({"Code": reason.code, "Object": reason.object, "Message": reason.message}),
        );
    }
    fields.done()
}

/// "updating", "paused", "completed"
pub fn update_state(state: UpdateState) -> &'static str {
    match state {
        UpdateState::Unspecified => "",
        UpdateState::Updating => "updating",
        UpdateState::Paused => "paused",
        UpdateState::Completed => "completed",
    }
}

fn service_spec(spec: &ServiceSpec) -> Value {
    let annotations = spec.annotations.clone().unwrap_or_default();
    let mode = match spec.mode.as_ref().and_then(|mode| mode.mode.as_ref()) {
        Some(service_mode::Mode::Global(_)) => json!({"Global": {}}),
        Some(service_mode::Mode::Replicated(mode)) => {
            json!({"Replicated": {"Replicas": mode.replicas.unwrap_or(1)}})
        }
        None => json!({"Replicated": {"Replicas": 1}}),
    };
    let mut fields = Fields::new()
        .put("Name", annotations.name)
        .put("Labels", json!(annotations.labels))
        .put(
            "TaskTemplate",
            task_spec(&spec.task.clone().unwrap_or_default()),
        )
        .put("Mode", mode);
    if let Some(update) = &spec.update {
        fields = fields.put("UpdateConfig", update_config(update));
    }
    if let Some(rollback) = &spec.rollback {
        fields = fields.put("RollbackConfig", update_config(rollback));
    }
    fields
        .put(
            "EndpointSpec",
            endpoint_spec(&spec.endpoint.clone().unwrap_or_default()),
        )
        .done()
}

fn update_config(config: &UpdateConfig) -> Value {
    Fields::new()
        .put("Parallelism", config.parallelism)
        .some("Delay", nanos(config.delay.as_ref()))
        .put(
            "FailureAction",
            match config.failure_action() {
                FailureAction::Pause => "pause",
                FailureAction::Continue => "continue",
                FailureAction::Rollback => "rollback",
            },
        )
        .some("Monitor", nanos(config.monitor.as_ref()))
        .put("MaxFailureRatio", f64::from(config.max_failure_ratio))
        .put(
            "Order",
            match config.order() {
                UpdateOrder::StopFirst => "stop-first",
                UpdateOrder::StartFirst => "start-first",
            },
        )
        .done()
}

fn task_spec(spec: &TaskSpec) -> Value {
    let mut fields = Fields::new()
        .put(
            "ContainerSpec",
            container(&spec.container.clone().unwrap_or_default()),
        )
        .put(
            "Resources",
            requirements(&spec.resources.unwrap_or_default()),
        );
    if let Some(restart) = &spec.restart {
        fields = fields.put("RestartPolicy", restart_policy(restart));
    }
    let networks: Vec<_> = spec
        .networks
        .iter()
        .map(|network| {
            Fields::new()
                .put("Target", network.target.as_str())
                .some("Aliases", json!(network.aliases))
                .some("DriverOpts", json!(network.driver_opts))
                .done()
        })
        .collect();
    fields
        .put(
            "Placement",
            placement(&spec.placement.clone().unwrap_or_default()),
        )
        .some("Networks", networks)
        .put("ForceUpdate", spec.force_update)
        .put("Runtime", "container")
        .done()
}

fn container(spec: &ContainerSpec) -> Value {
    let dns = Fields::new()
        .some("Nameservers", json!(spec.dns_nameservers))
        .some("Search", json!(spec.dns_search))
        .some("Options", json!(spec.dns_options))
        .done();
    let mounts: Vec<_> = spec.mounts.iter().map(mount).collect();
    Fields::new()
        .put("Image", spec.image.as_str())
        .some("Labels", json!(spec.labels))
        .some("Command", json!(spec.command))
        .some("Args", json!(spec.args))
        .some("Hostname", spec.hostname.as_str())
        .some("Env", json!(spec.env))
        .some("Dir", spec.dir.as_str())
        .some("User", spec.user.as_str())
        .some("Groups", json!(spec.groups))
        .put("Init", spec.init)
        .some("TTY", spec.tty)
        .some("ReadOnly", spec.read_only)
        .some("Mounts", mounts)
        .some("StopSignal", spec.stop_signal.as_str())
        .some("StopGracePeriod", nanos(spec.stop_grace_period.as_ref()))
        .some(
            "Healthcheck",
            spec.healthcheck.as_ref().map_or(Value::Null, health),
        )
        .some("Hosts", json!(spec.hosts))
        .put("DNSConfig", dns)
        .some("CapabilityAdd", json!(spec.capability_add))
        .some("CapabilityDrop", json!(spec.capability_drop))
        .done()
}

fn health(config: &HealthConfig) -> Value {
    Fields::new()
        .some("Test", json!(config.test))
        .some("Interval", nanos(config.interval.as_ref()))
        .some("Timeout", nanos(config.timeout.as_ref()))
        .some("StartPeriod", nanos(config.start_period.as_ref()))
        .some("Retries", config.retries)
        .done()
}

/// "bind", "volume", "tmpfs"
pub fn mount_type(kind: MountType) -> &'static str {
    match kind {
        MountType::Bind => "bind",
        MountType::Volume => "volume",
        MountType::Tmpfs => "tmpfs",
    }
}

fn mount(mount: &Mount) -> Value {
    let mut fields = Fields::new()
        .put("Type", mount_type(mount.r#type()))
        .some("Source", mount.source.as_str())
        .put("Target", mount.target.as_str())
        .some("ReadOnly", mount.read_only);
    if !mount.bind_propagation.is_empty() {
        fields = fields.put(
            "BindOptions",
            json!({"Propagation": mount.bind_propagation}),
        );
    }
    let tmpfs = Fields::new()
        .some("SizeBytes", mount.tmpfs_size_bytes)
        .some("Mode", mount.tmpfs_mode)
        .done();
    fields.some("TmpfsOptions", tmpfs).done()
}

fn requirements(requirements: &ResourceRequirements) -> Value {
    let limits = requirements.limits.unwrap_or_default();
    let limits = Fields::new()
        .some("NanoCPUs", limits.nano_cpus)
        .some("MemoryBytes", limits.memory_bytes)
        .some("Pids", requirements.pids_limit)
        .done();
    json!({"Limits": limits, "Reservations": resources(requirements.reservations.as_ref())})
}

/// "any", "none", "on-failure"
pub fn restart_condition(condition: RestartCondition) -> &'static str {
    match condition {
        RestartCondition::Any => "any",
        RestartCondition::None => "none",
        RestartCondition::OnFailure => "on-failure",
    }
}

fn restart_policy(policy: &RestartPolicy) -> Value {
    Fields::new()
        .put("Condition", restart_condition(policy.condition()))
        .some("Delay", nanos(policy.delay.as_ref()))
        .put("MaxAttempts", policy.max_attempts)
        .some("Window", nanos(policy.window.as_ref()))
        .done()
}

fn placement(placement: &Placement) -> Value {
    let preferences: Vec<_> = placement
        .preferences
        .iter()
        .filter_map(|preference| preference.preference.as_ref())
        .map(|placement_preference::Preference::Spread(spread)| {
            json!({"Spread": {"SpreadDescriptor": spread.spread_descriptor}})
        })
        .collect();
    let platforms: Vec<_> = placement
        .platforms
        .iter()
        .map(|one| platform(Some(one)))
        .collect();
    Fields::new()
        .some("Constraints", json!(placement.constraints))
        .some("Preferences", preferences)
        .some("MaxReplicas", placement.max_replicas)
        .some("Platforms", platforms)
        .done()
}

/// "vip", "dnsrr"
pub fn endpoint_mode(mode: EndpointMode) -> &'static str {
    match mode {
        EndpointMode::Vip => "vip",
        EndpointMode::Dnsrr => "dnsrr",
    }
}

/// "tcp", "udp", "sctp"
pub fn protocol(protocol: PortProtocol) -> &'static str {
    match protocol {
        PortProtocol::Tcp => "tcp",
        PortProtocol::Udp => "udp",
        PortProtocol::Sctp => "sctp",
    }
}

/// "ingress", "host"
pub fn publish_mode(mode: PublishMode) -> &'static str {
    match mode {
        PublishMode::Ingress => "ingress",
        PublishMode::Host => "host",
    }
}

fn ports(ports: &[PortConfig]) -> Value {
    ports
        .iter()
        .map(|port| {
            Fields::new()
                .some("Name", port.name.as_str())
                .put("Protocol", protocol(port.protocol()))
                .put("TargetPort", port.target_port)
                .some("PublishedPort", port.published_port)
                .put("PublishMode", publish_mode(port.publish_mode()))
                .done()
        })
        .collect()
}

fn endpoint_spec(spec: &EndpointSpec) -> Value {
    Fields::new()
        .put("Mode", endpoint_mode(spec.mode()))
        .some("Ports", ports(&spec.ports))
        .done()
}

fn endpoint(endpoint: &Endpoint) -> Value {
    let vips: Vec<_> = endpoint
        .virtual_ips
        .iter()
        .map(|vip| json!({"NetworkID": vip.network_id, "Addr": vip.addr}))
        .collect();
    Fields::new()
        .put(
            "Spec",
            endpoint_spec(&endpoint.spec.clone().unwrap_or_default()),
        )
        .some("Ports", ports(&endpoint.ports))
        .some("VirtualIPs", vips)
        .done()
}

/// A network of the cluster; with services and peers when they were asked for.
pub fn network(detail: &NetworkDetail, verbose: bool) -> Value {
    let network = detail.network.clone().unwrap_or_default();
    let mut fields = network_fields(&network);
    let peers: Vec<_> = detail
        .peers
        .iter()
        .map(|peer| json!({"Name": peer.hostname, "IP": peer.addr}))
        .collect();
    fields = fields.some("Peers", peers);
    if verbose {
        let mut services = Map::new();
        for service in &detail.services {
            let tasks: Vec<_> = service
                .tasks
                .iter()
                .map(|task| {
                    json!({
                        "Name": task.name,
                        "EndpointID": task.task_id,
                        "EndpointIP": task.addr,
                        "Info": {"Host IP": task.vtep},
                    })
                })
                .collect();
            services.insert(
                service.name.clone(),
                json!({"VIP": service.vip, "Ports": ports(&service.ports), "Tasks": tasks}),
            );
        }
        fields = fields.put("Services", services);
    }
    fields.done()
}

fn network_fields(network: &Network) -> Fields {
    let spec = network.spec.clone().unwrap_or_default();
    let annotations = spec.annotations.clone().unwrap_or_default();
    let pools: Vec<_> = network
        .subnets
        .iter()
        .filter_map(|subnet| subnet.pool.as_ref())
        .map(|pool| {
            Fields::new()
                .put("Subnet", pool.subnet.as_str())
                .some("IPRange", pool.ip_range.as_str())
                .put("Gateway", pool.gateway.as_str())
                .done()
        })
        .collect();
    let vnis: Vec<_> = network
        .subnets
        .iter()
        .map(|subnet| subnet.vni.to_string())
        .collect();
    let mut options = spec.driver_opts.clone();
    options.insert(
        "com.docker.network.driver.overlay.vxlanid_list".to_owned(),
        vnis.join(","),
    );
    let v6 = network
        .subnets
        .iter()
        .filter_map(|subnet| subnet.pool.as_ref())
        .any(|pool| pool.subnet.contains(':'));
    let created = network.meta.as_ref().and_then(|meta| meta.created_at);
    Fields::new()
        .put("Name", annotations.name)
        .put("Id", network.id.as_str())
        .put("Created", rfc3339(created.as_ref()))
        .put("Scope", "swarm")
        .put("Driver", spec.driver)
        .put("EnableIPv4", true)
        .put("EnableIPv6", v6)
        .put(
            "IPAM",
            json!({"Driver": "default", "Options": null, "Config": pools}),
        )
        .put("Internal", spec.internal)
        .put("Attachable", spec.attachable)
        .put("Ingress", false)
        .put("ConfigFrom", json!({"Network": ""}))
        .put("ConfigOnly", false)
        .put("Containers", json!({}))
        .put("Options", json!(options))
        .put("Labels", json!(annotations.labels))
}

/// A network as one node holds it.
pub fn local_network(local: &LocalNetwork) -> Value {
    if let Some(network) = &local.network {
        return network_fields(network).done();
    }
    let pools: Vec<_> = local
        .subnets
        .iter()
        .map(|subnet| json!({"Subnet": subnet}))
        .collect();
    Fields::new()
        .put("Name", local.name.as_str())
        .put("Id", local.id.as_str())
        .put("Scope", local.scope.as_str())
        .put("Driver", local.driver.as_str())
        .put(
            "IPAM",
            json!({"Driver": "default", "Options": null, "Config": pools}),
        )
        .put("Internal", local.internal)
        .put("Containers", json!({}))
        .put("Options", json!({}))
        .put("Labels", json!({}))
        .done()
}

#[cfg(test)]
mod tests {
    use swarm_proto::v1::{Annotations, ReplicatedMode, ServiceMode, Version};

    use super::*;

    #[test]
    fn a_service_has_docker_s_keys_in_docker_s_order() {
        let object = Service {
            id: "s1".to_owned(),
            meta: Some(Meta {
                version: Some(Version { index: 7 }),
                created_at: Some(Timestamp {
                    seconds: 1_000_000_000,
                    nanos: 500_000_000,
                }),
                updated_at: None,
            }),
            spec: Some(ServiceSpec {
                annotations: Some(Annotations {
                    name: "web".to_owned(),
                    ..Annotations::default()
                }),
                mode: Some(ServiceMode {
                    mode: Some(service_mode::Mode::Replicated(ReplicatedMode {
                        replicas: Some(2),
                    })),
                }),
                ..ServiceSpec::default()
            }),
            ..Service::default()
        };
        let value = service(&object);
        let keys: Vec<_> = value.as_object().unwrap().keys().cloned().collect();
        assert_eq!(
            keys,
            [
                "ID",
                "Version",
                "CreatedAt",
                "UpdatedAt",
                "Spec",
                "Endpoint"
            ]
        );
        assert_eq!(value["Version"]["Index"], 7);
        assert_eq!(value["CreatedAt"], "2001-09-09T01:46:40.5Z");
        assert_eq!(value["Spec"]["Mode"]["Replicated"]["Replicas"], 2);
        assert_eq!(value["Spec"]["EndpointSpec"]["Mode"], "vip");
    }
}
