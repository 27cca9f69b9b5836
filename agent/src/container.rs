//! What a task's spec becomes for the runtime and the data plane.
//!
//! Pure functions. Refuses what cannot work with a sentence that names it.

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::net::IpAddr;
use std::path::PathBuf;
use std::time::Duration;

use swarm_proto::defaults::STOP_GRACE;
use swarm_proto::v1::{ContainerSpec, HealthConfig, PortConfig, PublishMode, Task};
use swarm_proto::{NetworkId, NodeId, TaskId};

use crate::network::{Sandbox, SandboxAttachment, SandboxSpec};
use crate::runtime::ContainerConfig;
use crate::worker::task_name;

/// Where the name server of a sandbox listens.
const NAME_SERVER: &str = "127.0.0.11";
/// Options of the container's resolver, unless the spec says otherwise.
const RESOLVER_OPTIONS: [&str; 3] = ["ndots:0", "timeout:1", "attempts:3"];

/// The part of the spec that describes the container.
///
/// # Errors
/// A sentence, if it has none.
pub fn container_spec(task: &Task) -> Result<&ContainerSpec, String> {
    task.spec
        .as_ref()
        .and_then(|spec| spec.container.as_ref())
        .ok_or_else(|| format!("task {} has no container", task.id))
}

/// "web.1.<task id>": the container's name.
#[must_use]
pub fn full_name(task: &Task) -> String {
    format!("{}.{}", task_name(task), task.id)
}

/// The sandbox that the task needs.
///
/// # Errors
/// A sentence that names what makes no sense.
pub fn sandbox_spec(task: &Task) -> Result<SandboxSpec, String> {
    let spec = container_spec(task)?;
    let mut attachments = Vec::new();
    for attachment in &task.networks {
        let Some(addr) = attachment.addresses.first() else {
            return Err(format!(
                "task {} has no address on network {}",
                task.id, attachment.network_id
            ));
        };
        attachments.push(SandboxAttachment {
            network_id: NetworkId::from(&attachment.network_id),
            addr: addr.clone(),
        });
    }
    let mut nameservers = Vec::new();
    for server in &spec.dns_nameservers {
        let addr: IpAddr = server
            .parse()
            .map_err(|_| format!("name server {server:?} is not an IP address"))?;
        nameservers.push(addr);
    }
    Ok(SandboxSpec {
        task_id: TaskId::from(&task.id),
        name: full_name(task),
        attachments,
        host_ports: host_ports(task),
        nameservers,
    })
}

fn host_ports(task: &Task) -> Vec<PortConfig> {
    let Some(endpoint) = &task.endpoint else {
        return Vec::new();
    };
    let asked = endpoint.spec.as_ref().map_or(&[][..], |spec| &spec.ports);
    let ports = if endpoint.ports.is_empty() {
        asked
    } else {
        &endpoint.ports
    };
    ports
        .iter()
        .filter(|port| port.publish_mode == PublishMode::Host as i32)
        .cloned()
        .collect()
}

/// Everything the runtime needs to make the container.
///
/// # Errors
/// A sentence that names what makes no sense.
pub fn container_config(
    task: &Task,
    sandbox: &Sandbox,
    node: &NodeId,
) -> Result<ContainerConfig, String> {
    let spec = container_spec(task)?.clone();
    let hostname: String = if spec.hostname.is_empty() {
        task.id.chars().take(12).collect()
    } else {
        spec.hostname.clone()
    };
    let service = task.service_annotations.clone().unwrap_or_default();
    let labels = [
        ("node.id", node.to_string()),
        ("service.id", task.service_id.clone()),
        ("service.name", service.name.clone()),
        ("task", String::new()),
        ("task.id", task.id.clone()),
        ("task.name", full_name(task)),
    ]
    .map(|(key, value)| (format!("com.docker.swarm.{key}"), value))
    .to_vec();
    let resources = task.spec.as_ref().and_then(|spec| spec.resources);
    Ok(ContainerConfig {
        task_id: TaskId::from(&task.id),
        name: full_name(task),
        etc_hosts: etc_hosts(task, &spec, sandbox, &hostname)?,
        resolv_conf: resolv_conf(&spec),
        resources: resources.unwrap_or_default(),
        labels,
        hostname,
        netns: PathBuf::from(&sandbox.netns),
        spec,
    })
}

fn etc_hosts(
    task: &Task,
    spec: &ContainerSpec,
    sandbox: &Sandbox,
    hostname: &str,
) -> Result<String, String> {
    let mut text = String::from(
        "127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n\
         fe00::\tip6-localnet\nff00::\tip6-mcastprefix\nff02::1\tip6-allnodes\nff02::2\tip6-allrouters\n",
    );
    for line in &spec.hosts {
        let parsed = line
            .split_once(':')
            .filter(|(name, _)| !name.is_empty() && !name.contains(char::is_whitespace))
            .and_then(|(name, addr)| Some((name, addr.parse::<IpAddr>().ok()?)));
        let (name, addr) =
            parsed.ok_or_else(|| format!("host entry {line:?} is not \"name:address\""))?;
        let _ = writeln!(text, "{addr}\t{name}");
    }
    let mut own: Vec<String> = task
        .networks
        .iter()
        .filter_map(|attachment| attachment.addresses.first())
        .map(|addr| addr.split('/').next().unwrap_or(addr).to_owned())
        .collect();
    if own.is_empty() {
        own.extend(sandbox.gateway_addr.map(|addr| addr.to_string()));
    }
    for addr in own {
        let _ = writeln!(text, "{addr}\t{hostname}");
    }
    Ok(text)
}

fn resolv_conf(spec: &ContainerSpec) -> String {
    let clean = |text: &String| !text.is_empty() && !text.contains(char::is_whitespace);
    let search: Vec<_> = spec.dns_search.iter().filter(|s| clean(s)).collect();
    let mut text = String::new();
    if !search.is_empty() {
        text.push_str("search");
        for domain in search {
            let _ = write!(text, " {domain}");
        }
        text.push('\n');
    }
    let _ = writeln!(text, "nameserver {NAME_SERVER}");
    let key = |option: &str| option.split(':').next().unwrap_or(option).to_owned();
    let given: Vec<&String> = spec.dns_options.iter().filter(|o| clean(o)).collect();
    let overridden: BTreeSet<String> = given.iter().map(|option| key(option)).collect();
    text.push_str("options");
    for option in RESOLVER_OPTIONS {
        if !overridden.contains(&key(option)) {
            let _ = write!(text, " {option}");
        }
    }
    for option in given {
        let _ = write!(text, " {option}");
    }
    text.push('\n');
    text
}

/// From the stop signal to SIGKILL.
#[must_use]
pub fn stop_grace(task: &Task) -> Duration {
    container_spec(task)
        .ok()
        .and_then(|spec| spec.stop_grace_period)
        .and_then(|period| Duration::try_from(period).ok())
        .unwrap_or(STOP_GRACE)
}

/// How to find out whether a container is healthy.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HealthCheck {
    /// Program and arguments.
    pub command: Vec<String>,
    /// Between two checks.
    pub interval: Duration,
    /// A check that takes longer has failed.
    pub timeout: Duration,
    /// Failures in a row that make it unhealthy.
    pub retries: u32,
    /// Failures before this age of the container do not count.
    pub start_period: Duration,
}

/// The check to run, from the spec over the image's own; `None` if there is none.
#[must_use]
pub fn health_check(
    spec: Option<&HealthConfig>,
    image: Option<&HealthConfig>,
) -> Option<HealthCheck> {
    let test = [spec, image]
        .into_iter()
        .flatten()
        .map(|config| &config.test)
        .find(|test| !test.is_empty())?;
    let command = match test[0].as_str() {
        "CMD" if test.len() > 1 => test[1..].to_vec(),
        "CMD-SHELL" if test.len() > 1 => {
            vec!["/bin/sh".to_owned(), "-c".to_owned(), test[1].clone()]
        }
        _ => return None,
    };
    let period = |field: fn(&HealthConfig) -> Option<prost_types::Duration>| {
        [spec, image]
            .into_iter()
            .flatten()
            .filter_map(field)
            .filter_map(|period| Duration::try_from(period).ok())
            .find(|period| !period.is_zero())
    };
    let retries = [spec, image]
        .into_iter()
        .flatten()
        .map(|config| config.retries)
        .find(|&retries| retries > 0);
    Some(HealthCheck {
        command,
        interval: period(|c| c.interval).unwrap_or(Duration::from_secs(30)),
        timeout: period(|c| c.timeout).unwrap_or(Duration::from_secs(30)),
        retries: retries.unwrap_or(3),
        start_period: period(|c| c.start_period).unwrap_or_default(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use swarm_proto::v1::{Annotations, Endpoint, NetworkAttachment, TaskSpec};

    fn task() -> Task {
        Task {
            id: "abcdefghijklmnopqrstuvwxy".to_owned(),
            slot: 1,
            service_annotations: Some(
                Annotations {
                    name: "web".to_owned(),
                    ..Default::default()
                }
                .into(),
            ),
            networks: vec![NetworkAttachment {
                network_id: "net".to_owned(),
                addresses: vec!["10.0.1.3/24".to_owned()],
                ..Default::default()
            }],
            spec: Some(
                TaskSpec {
                    container: Some(ContainerSpec {
                        hosts: vec!["db:10.9.9.9".to_owned()],
                        dns_search: vec!["example.org".to_owned()],
                        dns_options: vec!["ndots:2".to_owned()],
                        ..Default::default()
                    }),
                    ..Default::default()
                }
                .into(),
            ),
            ..Default::default()
        }
    }

    fn sandbox() -> Sandbox {
        Sandbox {
            netns: PathBuf::from("/run/x"),
            gateway_addr: Some(IpAddr::from([172, 18, 0, 2])),
            host_ports: Vec::new(),
        }
    }

    #[test]
    fn files_of_the_container_name_itself_and_the_name_server() {
        let config = container_config(&task(), &sandbox(), &NodeId::from("n1")).unwrap();
        assert_eq!(config.hostname, "abcdefghijkl");
        assert_eq!(config.name, "web.1.abcdefghijklmnopqrstuvwxy");
        assert!(config.etc_hosts.starts_with("127.0.0.1\tlocalhost\n"));
        assert!(config.etc_hosts.contains("10.9.9.9\tdb\n"));
        assert!(config.etc_hosts.ends_with("10.0.1.3\tabcdefghijkl\n"));
        assert_eq!(
            config.resolv_conf,
            "search example.org\nnameserver 127.0.0.11\noptions timeout:1 attempts:3 ndots:2\n"
        );
    }

    #[test]
    fn bad_hosts_and_name_servers_are_named() {
        let mut bad = task();
        let spec = bad.spec.as_mut().unwrap().container.as_mut().unwrap();
        spec.hosts = vec!["db".to_owned()];
        spec.dns_nameservers = vec!["dns.example".to_owned()];
        let error = container_config(&bad, &sandbox(), &NodeId::from("n1")).unwrap_err();
        assert!(error.contains("\"db\""), "{error}");
        assert!(sandbox_spec(&bad).unwrap_err().contains("dns.example"));
    }

    #[test]
    fn only_host_ports_reach_the_sandbox() {
        let mut with_ports = task();
        let port = |mode: PublishMode, number| PortConfig {
            publish_mode: mode as i32,
            published_port: number,
            ..Default::default()
        };
        with_ports.endpoint = Some(Endpoint {
            ports: vec![port(PublishMode::Ingress, 80), port(PublishMode::Host, 81)],
            ..Default::default()
        });
        let spec = sandbox_spec(&with_ports).unwrap();
        assert_eq!(spec.host_ports.len(), 1);
        assert_eq!(spec.host_ports[0].published_port, 81);
    }

    #[test]
    fn the_specs_check_goes_over_the_images_and_none_turns_it_off() {
        let image = HealthConfig {
            test: vec!["CMD-SHELL".to_owned(), "curl -f /".to_owned()],
            retries: 7,
            ..Default::default()
        };
        let spec = HealthConfig {
            interval: Some(prost_types::Duration {
                seconds: 2,
                nanos: 0,
            }),
            ..Default::default()
        };
        let check = health_check(Some(&spec), Some(&image)).unwrap();
        assert_eq!(check.command, ["/bin/sh", "-c", "curl -f /"]);
        assert_eq!((check.interval.as_secs(), check.retries), (2, 7));
        let none = HealthConfig {
            test: vec!["NONE".to_owned()],
            ..Default::default()
        };
        assert_eq!(health_check(Some(&none), Some(&image)), None);
        assert_eq!(health_check(None, None), None);
    }
}
