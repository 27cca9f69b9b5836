//! Placement constraints: `node.labels.zone==a`, parsed once at the border.
//!
//! Pure. A [`Constraint`] that exists is one that can be evaluated: unknown
//! keys, operators and addresses are refused by [`Constraint::parse`].

use std::collections::BTreeMap;
use std::fmt;
use std::net::IpAddr;

use ipnet::IpNet;
use swarm_proto::v1::{Node, NodeRole};

/// Longest constraint that is accepted, in bytes.
pub const CONSTRAINT_MAX: usize = 512;

/// One requirement on a node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Constraint {
    text: String,
    subject: Subject,
    equal: bool,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Subject {
    Id(String),
    Hostname(String),
    Ip(IpNet),
    Role(String),
    Os(String),
    Arch(String),
    NodeLabel { name: String, value: String },
    EngineLabel { name: String, value: String },
}

/// Text that is no constraint, and why.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ConstraintError {
    /// Neither `==` nor `!=`.
    #[error("constraint {0:?} has no operator: expected KEY==VALUE or KEY!=VALUE")]
    Operator(String),
    /// Not one of the keys.
    #[error(
        "constraint {text:?} has an unknown key {key:?}: expected node.id, node.hostname, node.ip, node.role, \
         node.platform.os, node.platform.arch, node.labels.NAME or engine.labels.NAME"
    )]
    Key {
        /// The constraint.
        text: String,
        /// Its left side.
        key: String,
    },
    /// The right side cannot be what the key asks for.
    #[error("constraint {text:?} has an invalid value {value:?}: expected {expected}")]
    Value {
        /// The constraint.
        text: String,
        /// Its right side.
        value: String,
        /// What would be valid.
        expected: &'static str,
    },
    /// Longer than [`CONSTRAINT_MAX`].
    #[error("constraint has {0} bytes, more than {CONSTRAINT_MAX}")]
    TooLong(usize),
}

impl Constraint {
    /// Reads one constraint. Spaces around key and value do not count; neither
    /// does the case of the key's fixed part and of the value.
    ///
    /// # Errors
    /// See [`ConstraintError`].
    pub fn parse(text: &str) -> Result<Self, ConstraintError> {
        if text.len() > CONSTRAINT_MAX {
            return Err(ConstraintError::TooLong(text.len()));
        }
        let (key, equal, value) = match (text.find("=="), text.find("!=")) {
            (Some(at), None) => (&text[..at], true, &text[at + 2..]),
            (None, Some(at)) => (&text[..at], false, &text[at + 2..]),
            (Some(eq), Some(ne)) if eq < ne => (&text[..eq], true, &text[eq + 2..]),
            (Some(_), Some(ne)) => (&text[..ne], false, &text[ne + 2..]),
            (None, None) => return Err(ConstraintError::Operator(text.to_owned())),
        };
        let (key, value) = (key.trim(), value.trim());
        let bad_value = |expected| ConstraintError::Value {
            text: text.to_owned(),
            value: value.to_owned(),
            expected,
        };
        if value.is_empty() || value.chars().any(char::is_control) {
            return Err(bad_value("a value without control characters"));
        }
        let bad_key = || ConstraintError::Key {
            text: text.to_owned(),
            key: key.to_owned(),
        };
        // Written without its spaces it would be read with another operator.
        if key.contains(['!', '=']) {
            return Err(bad_key());
        }
        let lower = key.to_ascii_lowercase();
        let owned = value.to_owned();
        let subject = match lower.as_str() {
            "node.id" => Subject::Id(owned),
            "node.hostname" => Subject::Hostname(owned),
            "node.ip" => Subject::Ip(
                value
                    .parse::<IpNet>()
                    .map(|net| net.trunc())
                    .or_else(|_| value.parse::<IpAddr>().map(IpNet::from))
                    .map_err(|_| bad_value("an IP address or CIDR"))?,
            ),
            "node.role" => match value.to_ascii_lowercase().as_str() {
                role @ ("manager" | "worker") => Subject::Role(role.to_owned()),
                _ => return Err(bad_value("manager or worker")),
            },
            "node.platform.os" => Subject::Os(owned),
            "node.platform.arch" => Subject::Arch(canonical_arch(value).to_owned()),
            _ => match (label(key, "node.labels."), label(key, "engine.labels.")) {
                (Some(name), _) => Subject::NodeLabel { name, value: owned },
                (_, Some(name)) => Subject::EngineLabel { name, value: owned },
                (None, None) => return Err(bad_key()),
            },
        };
        let text = format!("{key}{}{value}", if equal { "==" } else { "!=" });
        Ok(Self {
            text,
            subject,
            equal,
        })
    }

    /// Reads all of a placement's constraints.
    ///
    /// # Errors
    /// The first that is none.
    pub fn parse_all(texts: &[String]) -> Result<Vec<Self>, ConstraintError> {
        texts.iter().map(|text| Self::parse(text)).collect()
    }

    /// Whether the node meets it. What a node does not say (a label it lacks) equals nothing.
    #[must_use]
    pub fn matches(&self, node: &Node) -> bool {
        let description = node.description.as_ref();
        let platform = description.and_then(|d| d.platform.as_ref());
        let equals = match &self.subject {
            Subject::Id(value) => same(&node.id, value),
            Subject::Hostname(value) => description.is_some_and(|d| same(&d.hostname, value)),
            Subject::Ip(net) => node
                .status
                .as_ref()
                .and_then(|status| address(&status.addr))
                .is_some_and(|addr| net.contains(&addr)),
            Subject::Role(value) => {
                let role = match NodeRole::try_from(node.role) {
                    Ok(NodeRole::Manager) => "manager",
                    _ => "worker",
                };
                role == value
            }
            Subject::Os(value) => platform.is_some_and(|p| same(&p.os, value)),
            Subject::Arch(value) => {
                platform.is_some_and(|p| same(canonical_arch(&p.architecture), value))
            }
            Subject::NodeLabel { name, value } => node
                .spec
                .as_ref()
                .and_then(|spec| spec.annotations.as_ref())
                .is_some_and(|annotations| holds(&annotations.labels, name, value)),
            Subject::EngineLabel { name, value } => {
                description.is_some_and(|d| holds(&d.engine_labels, name, value))
            }
        };
        equals == self.equal
    }

    /// As written, without the spaces.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.text
    }
}

impl fmt::Display for Constraint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

/// The name by which OCI images call an architecture: x86_64 is amd64, aarch64 is arm64.
#[must_use]
pub fn canonical_arch(arch: &str) -> &str {
    if arch.eq_ignore_ascii_case("x86_64") {
        "amd64"
    } else if arch.eq_ignore_ascii_case("aarch64") {
        "arm64"
    } else {
        arch
    }
}

/// The label's name when `key` starts with `prefix`, whose case does not count.
pub(crate) fn label(key: &str, prefix: &str) -> Option<String> {
    let (head, name) = key.split_at_checked(prefix.len())?;
    let valid = head.eq_ignore_ascii_case(prefix)
        && !name.is_empty()
        && !name.chars().any(|c| c.is_control() || c.is_whitespace());
    valid.then(|| name.to_owned())
}

fn same(left: &str, right: &str) -> bool {
    left.eq_ignore_ascii_case(right)
        || (!(left.is_ascii() && right.is_ascii()) && left.to_lowercase() == right.to_lowercase())
}

fn holds(labels: &BTreeMap<String, String>, name: &str, value: &str) -> bool {
    labels.get(name).is_some_and(|have| same(have, value))
}

/// The address in "10.0.0.1", "10.0.0.1:2377" or "[::1]:2377".
fn address(text: &str) -> Option<IpAddr> {
    text.parse()
        .ok()
        .or_else(|| text.parse::<std::net::SocketAddr>().ok().map(|a| a.ip()))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use swarm_proto::v1::{Annotations, NodeDescription, NodeSpec, NodeStatus, Platform};

    use super::*;

    fn node() -> Node {
        Node {
            id: "n1".into(),
            role: NodeRole::Manager as i32,
            spec: Some(NodeSpec {
                annotations: Some(Annotations {
                    labels: BTreeMap::from([("zone".into(), "A".into())]),
                    ..Default::default()
                }),
                ..Default::default()
            }),
            description: Some(NodeDescription {
                hostname: "Alpha".into(),
                platform: Some(Platform {
                    architecture: "x86_64".into(),
                    os: "linux".into(),
                }),
                engine_labels: BTreeMap::from([("disk".into(), "ssd".into())]),
                ..Default::default()
            }),
            status: Some(NodeStatus {
                addr: "10.1.2.3".into(),
                ..Default::default()
            }),
            ..Default::default()
        }
    }

    #[test]
    fn every_key_is_evaluated() {
        for (text, met) in [
            ("node.id==n1", true),
            ("node.id!=n1", false),
            ("node.hostname==alpha", true),
            (" node.hostname == beta ", false),
            ("node.ip==10.1.0.0/16", true),
            ("node.ip==10.1.2.3", true),
            ("node.ip!=10.1.2.4", true),
            ("node.role==manager", true),
            ("node.role!=Manager", false),
            ("node.platform.os==Linux", true),
            ("node.platform.arch==amd64", true),
            ("node.platform.arch==x86_64", true),
            ("node.platform.arch==aarch64", false),
            ("node.labels.zone==a", true),
            ("Node.Labels.zone!=b", true),
            ("node.labels.rack==1", false),
            ("node.labels.rack!=1", true),
            ("engine.labels.disk==SSD", true),
        ] {
            let constraint = Constraint::parse(text).unwrap();
            assert_eq!(constraint.matches(&node()), met, "{text}");
        }
    }

    #[test]
    fn what_is_not_understood_is_refused_with_a_sentence() {
        for (text, part) in [
            ("node.labels.zone=a", "no operator"),
            ("zone==a", "unknown key"),
            ("node.labels.==a", "unknown key"),
            ("node.labels.a! ==b", "unknown key"),
            ("node.labels.a= ==b", "unknown key"),
            ("node.ip==here", "an IP address or CIDR"),
            ("node.role==boss", "manager or worker"),
            ("node.id==", "invalid value"),
        ] {
            let error = Constraint::parse(text).unwrap_err().to_string();
            assert!(error.contains(part), "{text}: {error}");
        }
        assert!(Constraint::parse(&"x".repeat(CONSTRAINT_MAX + 1)).is_err());
    }

    proptest! {
        #[test]
        fn parsing_never_panics_and_what_it_prints_parses_again(text in ".{0,60}") {
            if let Ok(constraint) = Constraint::parse(&text) {
                let again = Constraint::parse(constraint.as_str()).unwrap();
                prop_assert_eq!(again.matches(&node()), constraint.matches(&node()));
            }
        }

        #[test]
        fn unequal_is_the_opposite_of_equal(
            key in prop::sample::select(vec!["node.id", "node.hostname", "node.labels.zone", "engine.labels.disk"]),
            value in "[a-zA-Z0-9]{1,5}",
        ) {
            let equal = Constraint::parse(&format!("{key}=={value}")).unwrap();
            let unequal = Constraint::parse(&format!("{key}!={value}")).unwrap();
            prop_assert_ne!(equal.matches(&node()), unequal.matches(&node()));
        }
    }
}
