//! The flags of `service create` and `service update`, and the parts of a spec
//! that are written as one argument. Parsing here, meaning in [`super::spec`]. Pure.

use std::time::Duration;

use swarm_proto::v1::{
    Mount, MountType, NetworkAttachmentConfig, PlacementPreference, PortConfig, PortProtocol,
    PublishMode, SpreadOver, placement_preference,
};

use crate::output::human;

/// Ports in one `--publish`.
const RANGE_MAX: u32 = 1000;

/// Flags that `create` and `update` share: what is not given is left as it is.
#[derive(clap::Args, Clone, Debug, Default)]
pub struct Common {
    /// Exit immediately instead of waiting for the service to converge
    #[arg(short, long, num_args = 0..=1, require_equals = true, default_missing_value = "true", default_value = "false")]
    pub detach: std::primitive::bool,
    /// Suppress progress output
    #[arg(short, long)]
    pub quiet: bool,
    /// Number of tasks
    #[arg(long)]
    pub replicas: Option<u64>,
    /// Maximum number of tasks per node (default 0 = unlimited)
    #[arg(long)]
    pub replicas_max_per_node: Option<u64>,
    /// Endpoint mode ("vip", "dnsrr")
    #[arg(long)]
    pub endpoint_mode: Option<String>,
    /// Container hostname
    #[arg(long)]
    pub hostname: Option<String>,
    /// Username or UID (format: <name|uid>[:<group|gid>])
    #[arg(short, long)]
    pub user: Option<String>,
    /// Working directory inside the container
    #[arg(short, long)]
    pub workdir: Option<String>,
    /// Overwrite the default ENTRYPOINT of the image
    #[arg(long)]
    pub entrypoint: Option<String>,
    /// Limit CPUs
    #[arg(long, value_parser = human::parse_cpus)]
    pub limit_cpu: Option<i64>,
    /// Limit memory
    #[arg(long, value_parser = human::parse_size)]
    pub limit_memory: Option<i64>,
    /// Limit maximum number of processes (default 0 = unlimited)
    #[arg(long)]
    pub limit_pids: Option<i64>,
    /// Reserve CPUs
    #[arg(long, value_parser = human::parse_cpus)]
    pub reserve_cpu: Option<i64>,
    /// Reserve memory
    #[arg(long, value_parser = human::parse_size)]
    pub reserve_memory: Option<i64>,
    /// Restart when condition is met ("none", "on-failure", "any")
    #[arg(long)]
    pub restart_condition: Option<String>,
    /// Delay between restart attempts (ns|us|ms|s|m|h)
    #[arg(long, value_parser = human::parse_duration)]
    pub restart_delay: Option<Duration>,
    /// Maximum number of restarts before giving up
    #[arg(long)]
    pub restart_max_attempts: Option<u64>,
    /// Window used to evaluate the restart policy (ns|us|ms|s|m|h)
    #[arg(long, value_parser = human::parse_duration)]
    pub restart_window: Option<Duration>,
    /// Signal to stop the container
    #[arg(long)]
    pub stop_signal: Option<String>,
    /// Time to wait before force killing a container (ns|us|ms|s|m|h)
    #[arg(long, value_parser = human::parse_duration)]
    pub stop_grace_period: Option<Duration>,
    /// Mount the container's root filesystem as read only
    #[arg(long, num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    pub read_only: Option<bool>,
    /// Use an init inside each service container to forward signals and reap processes
    #[arg(long, num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    pub init: Option<bool>,
    /// Allocate a pseudo-TTY
    #[arg(short, long, num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    pub tty: Option<bool>,
    /// Command to run to check health
    #[arg(long)]
    pub health_cmd: Option<String>,
    /// Time between running the check (ms|s|m|h)
    #[arg(long, value_parser = human::parse_duration)]
    pub health_interval: Option<Duration>,
    /// Maximum time to allow one check to run (ms|s|m|h)
    #[arg(long, value_parser = human::parse_duration)]
    pub health_timeout: Option<Duration>,
    /// Consecutive failures needed to report unhealthy
    #[arg(long)]
    pub health_retries: Option<u32>,
    /// Start period for the container to initialize before counting retries (ms|s|m|h)
    #[arg(long, value_parser = human::parse_duration)]
    pub health_start_period: Option<Duration>,
    /// Disable any container-specified HEALTHCHECK
    #[arg(long)]
    pub no_healthcheck: bool,
    /// Send registry authentication details to the nodes
    #[arg(long)]
    pub with_registry_auth: bool,
    /// Do not query the registry to resolve image digest and supported platforms
    #[arg(long)]
    pub no_resolve_image: bool,
}

/// Reads "key=value" or "key".
pub fn key_value(text: &str) -> Result<(String, String), String> {
    let (key, value) = text.split_once('=').unwrap_or((text, ""));
    if key.is_empty() {
        return Err(format!("invalid argument {text:?}: the key is empty"));
    }
    Ok((key.to_owned(), value.to_owned()))
}

/// Reads an environment variable; without "=" its value is this process's, if it has one.
pub fn env(text: &str) -> Result<String, String> {
    if text.is_empty() || text.starts_with('=') {
        return Err(format!("invalid environment variable: {text}"));
    }
    if text.contains('=') {
        return Ok(text.to_owned());
    }
    Ok(std::env::var(text).map_or_else(|_| text.to_owned(), |value| format!("{text}={value}")))
}

/// Reads the lines of an `--env-file`.
pub fn env_file(path: &str) -> Result<Vec<String>, String> {
    let text = std::fs::read_to_string(path).map_err(|error| format!("open {path}: {error}"))?;
    text.lines()
        .map(str::trim_start)
        .filter(|line| !line.is_empty() && !line.starts_with('#'))
        .map(env)
        .collect()
}

/// Reads "name", or "name=net,alias=a,driver-opt=k=v".
pub fn network(text: &str) -> Result<NetworkAttachmentConfig, String> {
    let mut attachment = NetworkAttachmentConfig::default();
    if !text.contains('=') {
        attachment.target = text.to_owned();
        return Ok(attachment);
    }
    for field in text.split(',') {
        let (key, value) = field
            .split_once('=')
            .ok_or_else(|| format!("invalid field {field:?} of network {text:?}"))?;
        match key.trim().to_lowercase().as_str() {
            "name" => attachment.target = value.to_owned(),
            "alias" => attachment.aliases.push(value.to_lowercase()),
            "driver-opt" => {
                let (key, value) = key_value(value)?;
                attachment.driver_opts.insert(key, value);
            }
            other => return Err(format!("invalid field key {other} of network {text:?}")),
        }
    }
    if attachment.target.is_empty() {
        return Err(format!("network name/id is not specified in {text:?}"));
    }
    Ok(attachment)
}

/// Reads "spread=node.labels.zone".
pub fn preference(text: &str) -> Result<PlacementPreference, String> {
    let (strategy, descriptor) = text
        .split_once('=')
        .ok_or("placement preference must be of the format \"<strategy>=<arg>\"")?;
    if strategy != "spread" {
        return Err(format!(
            "unsupported placement preference {strategy} (only spread is supported)"
        ));
    }
    Ok(PlacementPreference {
        preference: Some(placement_preference::Preference::Spread(SpreadOver {
            spread_descriptor: descriptor.to_owned(),
        })),
    })
}

/// Reads "type=bind,source=/a,target=/b,readonly".
pub fn mount(text: &str) -> Result<Mount, String> {
    let mut mount = Mount {
        r#type: MountType::Volume.into(),
        ..Mount::default()
    };
    for field in text.split(',') {
        let (key, value) = match field.split_once('=') {
            Some((key, value)) => (key.trim(), Some(value)),
            None => (field.trim(), None),
        };
        let key = key.to_lowercase();
        if matches!(key.as_str(), "readonly" | "ro") {
            mount.read_only = match value {
                None | Some("true" | "1") => true,
                Some("false" | "0") => false,
                Some(other) => return Err(format!("invalid value for {key}: {other}")),
            };
            continue;
        }
        let value = value
            .ok_or_else(|| format!("invalid field '{field}' must be a key=value pair"))?
            .to_owned();
        match key.as_str() {
            "type" => {
                let kind = match value.to_lowercase().as_str() {
                    "bind" => MountType::Bind,
                    "volume" => MountType::Volume,
                    "tmpfs" => MountType::Tmpfs,
                    other => return Err(format!("invalid mount type: {other}")),
                };
                mount.r#type = kind.into();
            }
            "source" | "src" => mount.source = value,
            "target" | "dst" | "destination" => mount.target = value,
            "bind-propagation" => mount.bind_propagation = value.to_lowercase(),
            "tmpfs-size" => {
                mount.tmpfs_size_bytes = human::parse_size(&value)
                    .map_err(|_| format!("invalid value for {key}: {value}"))?;
            }
            "tmpfs-mode" => {
                mount.tmpfs_mode = u32::from_str_radix(&value, 8)
                    .map_err(|_| format!("invalid value for {key}: {value}"))?;
            }
            _ => return Err(format!("unexpected key '{key}' in '{field}'")),
        }
    }
    if mount.target.is_empty() {
        return Err("target is required".to_owned());
    }
    if mount.r#type() == MountType::Bind && mount.source.is_empty() {
        return Err("source is required when specifying a bind mount".to_owned());
    }
    if mount.r#type() != MountType::Tmpfs && (mount.tmpfs_size_bytes != 0 || mount.tmpfs_mode != 0)
    {
        return Err("tmpfs options are only for mounts of type tmpfs".to_owned());
    }
    Ok(mount)
}

/// Reads "mode=host,published=8080,target=80,protocol=tcp", or the short "8080:80/tcp".
pub fn publish(text: &str) -> Result<Vec<PortConfig>, String> {
    let ports = if text.contains('=') {
        vec![publish_long(text)?]
    } else {
        publish_short(text)?
    };
    if ports
        .iter()
        .any(|port| port.publish_mode() == PublishMode::Ingress)
    {
        return Err(format!(
            "cannot publish {text}: publishing on every node (mode=ingress) is not available yet; publish on the task's node with mode=host, as in --publish mode=host,published=8080,target=80"
        ));
    }
    Ok(ports)
}

fn port(text: &str, whole: &str) -> Result<u32, String> {
    text.parse::<u16>().map(u32::from).map_err(|_| {
        format!("invalid port {text:?} in {whole:?}: it must be a number from 1 to 65535")
    })
}

fn protocol(text: &str) -> Result<PortProtocol, String> {
    match text.to_lowercase().as_str() {
        "tcp" => Ok(PortProtocol::Tcp),
        "udp" => Ok(PortProtocol::Udp),
        "sctp" => Ok(PortProtocol::Sctp),
        other => Err(format!("invalid protocol value {other}")),
    }
}

fn publish_long(text: &str) -> Result<PortConfig, String> {
    let mut config = PortConfig::default();
    for field in text.split(',') {
        let (key, value) = field
            .split_once('=')
            .filter(|(_, value)| !value.is_empty())
            .ok_or_else(|| format!("invalid field: {field}"))?;
        match key.trim().to_lowercase().as_str() {
            "protocol" => config.protocol = protocol(value)?.into(),
            "mode" => {
                config.publish_mode = match value {
                    "host" => PublishMode::Host,
                    "ingress" => PublishMode::Ingress,
                    _ => return Err(format!("invalid publish mode value ({value}): must be either \"ingress\" or \"host\"")),
                }
                .into();
            }
            "target" => config.target_port = port(value, text)?,
            "published" => config.published_port = port(value, text)?,
            "name" => config.name = value.to_owned(),
            other => return Err(format!("invalid field key: {other}")),
        }
    }
    if config.target_port == 0 {
        return Err(format!("missing mandatory field \"target\" in {text:?}"));
    }
    Ok(config)
}

fn publish_short(text: &str) -> Result<Vec<PortConfig>, String> {
    let (ports, kind) = text.split_once('/').unwrap_or((text, "tcp"));
    let kind = protocol(kind)?;
    let (published, target) = match ports.rsplit_once(':') {
        Some((published, target)) => (Some(range(published, text)?), range(target, text)?),
        None => (None, range(ports, text)?),
    };
    if let Some(published) = &published
        && published.len() != target.len()
    {
        return Err(format!(
            "invalid ranges specified for container and host ports: {text}"
        ));
    }
    Ok(target
        .enumerate()
        .map(|(place, target_port)| PortConfig {
            protocol: kind.into(),
            target_port,
            published_port: published
                .clone()
                .and_then(|mut range| range.nth(place))
                .unwrap_or(0),
            publish_mode: PublishMode::Ingress.into(),
            ..PortConfig::default()
        })
        .collect())
}

/// "80" or "80-90"
fn range(text: &str, whole: &str) -> Result<std::vec::IntoIter<u32>, String> {
    let (first, last) = text.split_once('-').unwrap_or((text, text));
    let (first, last) = (port(first, whole)?, port(last, whole)?);
    if first > last || last - first >= RANGE_MAX {
        return Err(format!("invalid range {text} in {whole:?}"));
    }
    Ok((first..=last).collect::<Vec<_>>().into_iter())
}

/// Splits a command line as a shell does: spaces, quotes, backslashes.
pub fn words(text: &str) -> Result<Vec<String>, String> {
    let mut words = Vec::new();
    let mut word: Option<String> = None;
    let mut quote = None;
    let mut chars = text.chars();
    while let Some(next) = chars.next() {
        match (quote, next) {
            (Some(open), _) if next == open => quote = None,
            (None, '\'' | '"') => {
                quote = Some(next);
                word.get_or_insert_default();
            }
            (None | Some('"'), '\\') => {
                let escaped = chars.next().ok_or("EOF found after escape character")?;
                word.get_or_insert_default().push(escaped);
            }
            (None, space) if space.is_whitespace() => words.extend(word.take()),
            _ => word.get_or_insert_default().push(next),
        }
    }
    if quote.is_some() {
        return Err("EOF found when expecting closing quote".to_owned());
    }
    words.extend(word);
    Ok(words)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn host_ports_are_published_and_ingress_says_what_to_do() {
        let ports = publish("mode=host,published=8080,target=80").unwrap();
        assert_eq!(ports.len(), 1);
        assert_eq!((ports[0].published_port, ports[0].target_port), (8080, 80));
        assert_eq!(ports[0].publish_mode(), PublishMode::Host);
        for ingress in [
            "8080:80",
            "80",
            "8080-8081:80-81/udp",
            "target=80",
            "mode=ingress,target=80",
        ] {
            let error = publish(ingress).unwrap_err();
            assert!(error.contains("mode=host"), "{error}");
        }
    }

    #[test]
    fn bad_ports_are_named() {
        for (wrong, what) in [
            ("mode=host,published=99999,target=80", "99999"),
            ("mode=host,published=8080", "target"),
            ("mode=maybe,target=80", "maybe"),
            ("target=80,colour=red", "colour"),
            ("mode=host,target=80,protocol=smtp", "smtp"),
            ("80-90:80", "80-90:80"),
            ("x:80", "x:80"),
        ] {
            let error = publish(wrong).unwrap_err();
            assert!(error.contains(what), "{error}");
        }
    }

    #[test]
    fn mounts_are_read() {
        let bind = mount("type=bind,src=/a,dst=/b,ro,bind-propagation=rshared").unwrap();
        assert_eq!(bind.r#type(), MountType::Bind);
        assert_eq!((bind.source.as_str(), bind.target.as_str()), ("/a", "/b"));
        assert!(bind.read_only);
        assert_eq!(bind.bind_propagation, "rshared");
        let tmpfs = mount("type=tmpfs,target=/t,tmpfs-size=64m,tmpfs-mode=1770").unwrap();
        assert_eq!(
            (tmpfs.tmpfs_size_bytes, tmpfs.tmpfs_mode),
            (64 << 20, 0o1770)
        );
        for wrong in [
            "type=bind,target=/b",
            "type=bind,source=/a",
            "type=magic,target=/b",
            "type=tmpfs,target=/t,tmpfs-mode=9",
            "type=bind,source=/a,target=/b,tmpfs-size=1",
            "colour=red,target=/b",
            "target=/b,ro=perhaps",
            "",
        ] {
            assert!(mount(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn networks_are_names_or_fields() {
        assert_eq!(network("net").unwrap().target, "net");
        let full = network("name=net,alias=DB,driver-opt=k=v").unwrap();
        assert_eq!(full.target, "net");
        assert_eq!(full.aliases, ["db"]);
        assert_eq!(full.driver_opts["k"], "v");
        assert!(network("alias=db").is_err());
        assert!(network("name=n,colour=red").is_err());
    }

    #[test]
    fn an_entrypoint_is_split_as_a_shell_does() {
        assert_eq!(
            words("sh -c 'a b' \"c \\\" d\" e\\ f ''").unwrap(),
            ["sh", "-c", "a b", "c \" d", "e f", ""]
        );
        assert!(words("'open").is_err());
        assert!(words("end\\").is_err());
    }

    #[test]
    fn only_spread_is_a_preference() {
        assert!(preference("spread=node.labels.zone").is_ok());
        assert!(
            preference("pack=node.id")
                .unwrap_err()
                .contains("only spread")
        );
        assert!(preference("spread").is_err());
    }

    #[test]
    fn a_variable_without_a_value_is_taken_from_here_or_removed_there() {
        assert_eq!(env("A=1").unwrap(), "A=1");
        assert_eq!(env("SURELY_NOT_SET_HERE").unwrap(), "SURELY_NOT_SET_HERE");
        assert!(env("=x").is_err());
    }

    proptest! {
        #[test]
        fn parsing_never_panics(text in "[a-z0-9=,:/\\-'\" ]{0,40}") {
            let _ = publish(&text);
            let _ = mount(&text);
            let _ = network(&text);
            let _ = words(&text);
            let _ = preference(&text);
        }
    }
}
