//! Entry points for fuzzing: templates, credentials, and everything that is written as an argument.
//!
//! Each function panics when a rule is broken; `seeds` gives inputs that are valid. Only in
//! builds with the feature `fuzzing`.

use std::time::Duration;

use clap::Parser as _;
use serde_json::json;
use swarm_proto::v1::{NetworkSpec, ServiceSpec};

use crate::output::human;
use crate::output::template::Template;
use crate::service::flags;
use crate::{Cli, Command, auth, filter, network, service};

/// A template of `--format`: what can be parsed renders or says why not, and not to more than
/// its length and the data allow.
pub fn template(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else {
        return;
    };
    let value = json!({
        "ID": "abc", "Spec": {"Name": "web", "Labels": {"a": "b", "ü": null}}, "N": -3, "F": 1.5,
        "VIPs": [{"Addr": "10.0.0.2/24"}, {"Addr": "é"}], "None": [], "_labels": {"k": "v"}, "T": true,
    });
    for strict in [false, true] {
        if let Ok(template) = Template::parse(text, strict) {
            let _ = template.header(&|name| name.to_uppercase());
            if let Ok(rendered) = template.render(&value) {
                assert!(rendered.len() <= 4096 + text.len() * 4096);
                assert_eq!(template.render(&value), Ok(rendered));
            }
        }
    }
}

/// `~/.docker/config.json` and an image, with a zero byte between them.
pub fn docker_config(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else {
        return;
    };
    let (image, config) = text.split_once('\0').unwrap_or(("nginx", text));
    let Ok(config) = serde_json::from_str(config) else {
        return;
    };
    if let Some(found) = auth::find(&config, image) {
        assert!(!found.username.is_empty() || !found.identity_token.is_empty());
        assert!(!found.password.contains('\0') || !found.password.ends_with('\0'));
    }
}

/// One value: a duration, a size, a mount … The first byte chooses which.
pub fn flag_value(data: &[u8]) {
    let Some((&kind, rest)) = data.split_first() else {
        return;
    };
    let Ok(text) = std::str::from_utf8(rest) else {
        return;
    };
    match kind % 12 {
        0 => durations(text),
        1 => sizes(text),
        2 => {
            if let Ok(nano) = human::parse_cpus(text) {
                assert!((0..=1_000_000_000_000_000).contains(&nano));
            }
        }
        3 => {
            let _ = human::parse_since(text, Duration::from_secs(1_000_000));
        }
        4 => mounts(text),
        5 => ports(text),
        6 => {
            if let Ok(attachment) = flags::network(text) {
                assert!(text.is_empty() || !attachment.target.is_empty());
            }
        }
        7 => {
            if let Ok(preference) = flags::preference(text) {
                assert!(preference.preference.is_some());
            }
        }
        8 => words(text),
        9 => {
            if let Ok((key, value)) = flags::key_value(text) {
                assert!(!key.is_empty());
                assert!(text == key || text == format!("{key}={value}"));
            }
        }
        10 => {
            let given: Vec<String> = text.split('\n').map(str::to_owned).collect();
            let _ = filter::Given::parse(&given, &["id", "name", "label"]).map(|it| it.common());
        }
        _ => {
            if let Ok((name, replicas)) = service::scale::parse(text) {
                let again = service::scale::parse(&format!("{name}={replicas}"));
                assert_eq!(again, Ok((name, replicas)));
            }
        }
    }
}

fn durations(text: &str) {
    let Ok(span) = human::parse_duration(text) else {
        return;
    };
    assert!(span <= Duration::from_secs(1_000_000_001));
    let shown = human::show_duration(span);
    let again = human::parse_duration(&shown).unwrap_or_else(|error| panic!("{shown}: {error}"));
    // Shown with 15 digits.
    let off = again.abs_diff(span);
    assert!(
        off <= Duration::from_nanos(1_000) || off.as_secs_f64() <= span.as_secs_f64() * 1e-12,
        "{span:?} is shown as {shown}, which is {again:?}"
    );
    let _ = human::duration(span);
}

fn sizes(text: &str) {
    let Ok(bytes) = human::parse_size(text) else {
        return;
    };
    assert!(bytes >= 0, "{text} is {bytes}");
    let shown = human::show_size(bytes);
    let again = human::parse_size(&shown).unwrap_or_else(|error| panic!("{shown}: {error}"));
    assert!(
        again.abs_diff(bytes) as f64 <= bytes as f64 * 1e-3,
        "{bytes} is shown as {shown}, which is {again}"
    );
}

fn mounts(text: &str) {
    if let Ok(mount) = flags::mount(text) {
        assert!(!mount.target.is_empty());
        assert!(mount.tmpfs_size_bytes >= 0);
    }
}

fn ports(text: &str) {
    if let Ok(ports) = flags::publish(text) {
        assert!(!ports.is_empty() && ports.len() <= 1000);
        for port in ports {
            assert!((1..=65535).contains(&port.target_port), "{text}: {port:?}");
            assert!(port.published_port <= 65535);
        }
    }
}

fn words(text: &str) {
    let Ok(words) = flags::words(text) else {
        return;
    };
    // Quoted again, they are the same words.
    let quoted: Vec<String> = words
        .iter()
        .map(|word| format!("'{}'", word.replace('\'', "'\\''")))
        .collect();
    assert_eq!(flags::words(&quoted.join(" ")), Ok(words));
}

/// What `service create` with these arguments, one a line, would ask for.
/// `None`: the arguments are not understood, or want files of this machine.
#[must_use]
pub fn service_spec(data: &[u8]) -> Option<Result<ServiceSpec, String>> {
    let args = arguments(data, &["service", "create"])?;
    match Cli::try_parse_from(args).ok()?.command {
        Command::Service(service::Command::Create(flags)) if flags.env_file.is_empty() => {
            Some(service::spec::create(&flags))
        }
        _ => None,
    }
}

/// What `network create` with these arguments, one a line, would ask for.
#[must_use]
pub fn network_spec(data: &[u8]) -> Option<Result<NetworkSpec, String>> {
    let args = arguments(data, &["network", "create"])?;
    match Cli::try_parse_from(args).ok()?.command {
        Command::Network(network::Command::Create(flags)) => Some(network::create::spec(&flags)),
        _ => None,
    }
}

fn arguments(data: &[u8], verb: &[&str]) -> Option<Vec<String>> {
    let text = std::str::from_utf8(data).ok()?;
    let mut args = vec!["swarm".to_owned()];
    args.extend(verb.iter().map(|word| (*word).to_owned()));
    args.extend(text.split('\n').map(str::to_owned));
    Some(args)
}

/// The registry whose credentials go with an image.
#[must_use]
pub fn registry(image: &str) -> String {
    auth::registry(image)
}

/// Valid inputs.
pub mod seeds {
    fn texts(texts: &[&str]) -> Vec<Vec<u8>> {
        texts.iter().map(|text| text.as_bytes().to_vec()).collect()
    }

    /// For [`super::template`].
    #[must_use]
    pub fn template() -> Vec<Vec<u8>> {
        texts(&[
            "{{.ID}}: {{ .Spec.Name }}",
            "{{json .Spec}}",
            "{{.Spec.Name | upper}}\\t{{.N}}",
            "{{.Label \"k\"}}",
            "{{range .VIPs}}{{.Addr}} {{end}}",
            "{{range .None}}x{{else}}none{{end}}",
            "{{if .None}}yes{{else}}no{{end}}",
            "{{truncate .ID 2}}|{{pad .N 1 1}}|{{len .VIPs}}{{title .ID}}",
            "{{join (split .ID \"b\") \",\"}}",
            "{{println .F .T}}{{lower .ID}}{{split .ID \"\" | json}}",
        ])
    }

    /// For [`super::docker_config`].
    #[must_use]
    pub fn docker_config() -> Vec<Vec<u8>> {
        texts(&[
            "nginx\0{\"auths\":{\"https://index.docker.io/v1/\":{\"auth\":\"aHViOnNlY3JldA==\"}}}",
            "r.example:5000/a\0{\"auths\":{\"http://r.example:5000/v2/\":{\"identitytoken\":\"t\"}}}",
            "x.y/a\0{\"auths\":{\"x.y\":{\"username\":\"u\",\"password\":\"p\"}}}",
        ])
    }

    /// For [`super::flag_value`].
    #[must_use]
    pub fn flag_value() -> Vec<Vec<u8>> {
        [
            (0, "1h30m5.5s"),
            (0, "250ms"),
            (0, "7µs"),
            (1, "1.5GiB"),
            (1, "512m"),
            (2, "1.5"),
            (3, "2026-11-23T17:11:05.72Z"),
            (3, "10m"),
            (
                4,
                "type=bind,source=/a,target=/b,readonly,bind-propagation=rslave",
            ),
            (4, "type=tmpfs,dst=/b,tmpfs-size=64m,tmpfs-mode=1777"),
            (5, "mode=host,published=8080,target=80,protocol=udp"),
            (5, "8080-8090:80-90/tcp"),
            (6, "name=net,alias=a,driver-opt=k=v"),
            (7, "spread=node.labels.zone"),
            (8, "sh -c 'echo \"a b\"' \\x"),
            (9, "key=value"),
            (10, "name=web\nlabel=a=b"),
            (11, "web=3"),
        ]
        .map(|(kind, text): (u8, &str)| [&[kind], text.as_bytes()].concat())
        .to_vec()
    }

    /// For [`super::service_spec`].
    #[must_use]
    pub fn service_spec() -> Vec<Vec<u8>> {
        texts(&[
            "--name\nweb\nnginx",
            "--name=web\n--replicas=3\n--network=name=net,alias=db\n--publish=mode=host,published=8080,target=80\n\
             --constraint=node.labels.zone==a\n--placement-pref=spread=node.labels.zone\n--env=A=b\nnginx:1\nsleep\n1d",
            "--name=x\n--mode=global\n--mount=type=tmpfs,target=/t,tmpfs-size=1m\n--cap-add=NET_ADMIN\n--cap-drop=ALL\n\
             --host=db:10.0.0.1\n--dns=10.0.0.53\n--dns-search=a.b\n--dns-option=ndots:2\n--hostname=h\n--user=1:2\n\
             --workdir=/w\n--stop-signal=SIGINT\n--stop-grace-period=5s\n--health-cmd=true\n--health-interval=3s\na/b",
            "--name=y\n--limit-cpu=1.5\n--limit-memory=64m\n--reserve-cpu=.5\n--limit-pids=9\n--restart-condition=any\n\
             --restart-delay=1s\n--restart-window=1m\n--restart-max-attempts=3\n--label=a=b\n--container-label=c=d\n\
             --endpoint-mode=dnsrr\n--init\n--read-only\n--tty\n--no-healthcheck\n--group=5\n--entrypoint=a 'b c'\nimg",
        ])
    }

    /// For [`super::network_spec`].
    #[must_use]
    pub fn network_spec() -> Vec<Vec<u8>> {
        texts(&[
            "net",
            "--subnet=10.50.1.0/24\n--gateway=10.50.1.254\n--ip-range=10.50.1.128/25\nnet",
            "--driver=overlay\n--internal\n--attachable\n--label=a=b\n--opt=com.docker.network.driver.mtu=1400\nn",
            "--subnet=10.0.0.0/8\n--subnet=11.0.0.0/29\n--gateway=11.0.0.1\nn",
        ])
    }
}
