//! What the Control API accepts: every check that needs nothing but the request.
//!
//! Pure. Each function takes a message from outside and either returns what was
//! parsed out of it or one sentence that names the wrong part. Sizes and counts
//! are bounded here, so nothing behind the border has to ask again. Checks that
//! need the cluster's state are in the noun's own file, or in apply.

mod network;
mod service;
mod text;

pub use network::{MTU_OPTION, network_spec};
pub use service::service_spec;

use std::time::Duration;

use swarm_proto::v1::{ClusterSpec, NodeAvailability, NodeRole, NodeSpec};

/// A request that is refused, in one sentence for a person.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Invalid {
    /// A value that is never accepted.
    #[error("{0}")]
    Argument(String),
    /// A wish that is well-formed but that this version does not fulfil.
    #[error("{0}")]
    Unsupported(String),
}

impl Invalid {
    fn argument(message: impl Into<String>) -> Self {
        Self::Argument(message.into())
    }

    fn unsupported(message: impl Into<String>) -> Self {
        Self::Unsupported(message.into())
    }
}

/// Largest spec, encoded: of a service, it is part of each of its tasks; of a network, of what each node on it holds.
const SPEC_MAX: usize = 960 << 10;
/// No duration in a spec is longer: ten years.
const DURATION_MAX: Duration = Duration::from_secs(10 * 365 * 24 * 3600);
/// Heartbeats are not more frequent than this.
const HEARTBEAT_MIN: Duration = Duration::from_millis(100);
/// Heartbeats are not rarer than this.
const HEARTBEAT_MAX: Duration = Duration::from_secs(3600);
/// A certificate lives at least this long, as in Swarm.
const CERT_LIFE_MIN: Duration = Duration::from_secs(3600);
/// Largest number of old tasks kept per slot.
const TASK_HISTORY_MAX: u64 = 1000;

/// A duration of a spec, or the reason why it is none.
fn duration(
    what: &str,
    value: Option<&prost_types::Duration>,
) -> Result<Option<Duration>, Invalid> {
    let Some(value) = value else { return Ok(None) };
    let parts = (u64::try_from(value.seconds), u32::try_from(value.nanos));
    match parts {
        (Ok(seconds), Ok(nanos)) if nanos < 1_000_000_000 => {
            let parsed = Duration::new(seconds, nanos);
            if parsed > DURATION_MAX {
                return Err(Invalid::argument(format!(
                    "{what} is longer than ten years"
                )));
            }
            Ok(Some(parsed))
        }
        _ => Err(Invalid::argument(format!(
            "{what} must not be negative and its nanoseconds must be below one second"
        ))),
    }
}

/// A spec that fits into a transaction with whatever else its object has.
fn bounded(whose: &str, spec: &impl prost::Message) -> Result<(), Invalid> {
    match spec.encoded_len() {
        size if size <= SPEC_MAX => Ok(()),
        size => Err(Invalid::argument(format!(
            "the {whose}'s spec has {size} bytes, more than {SPEC_MAX}"
        ))),
    }
}

/// What a node's owner may set.
///
/// # Errors
/// A name, label, role or availability that is not accepted.
pub fn node_spec(spec: &NodeSpec) -> Result<(), Invalid> {
    bounded("node", spec)?;
    if let Some(annotations) = &spec.annotations {
        if !annotations.name.is_empty() {
            text::name(&annotations.name)?;
        }
        text::labels("label", &annotations.labels)?;
    }
    NodeRole::try_from(spec.desired_role)
        .map_err(|_| Invalid::argument(format!("unknown role {}", spec.desired_role)))?;
    NodeAvailability::try_from(spec.availability)
        .map_err(|_| Invalid::argument(format!("unknown availability {}", spec.availability)))?;
    Ok(())
}

/// The cluster's settings.
///
/// # Errors
/// A setting out of its range.
pub fn cluster_spec(spec: &ClusterSpec) -> Result<(), Invalid> {
    bounded("cluster", spec)?;
    if let Some(annotations) = &spec.annotations {
        if !annotations.name.is_empty() {
            text::name(&annotations.name)?;
        }
        text::labels("label", &annotations.labels)?;
    }
    if let Some(limit) = spec.task_history_limit
        && limit > TASK_HISTORY_MAX
    {
        return Err(Invalid::argument(format!(
            "task history limit {limit} is more than {TASK_HISTORY_MAX}"
        )));
    }
    if let Some(period) = duration("heartbeat period", spec.heartbeat_period.as_ref())?
        && !(HEARTBEAT_MIN..=HEARTBEAT_MAX).contains(&period)
    {
        return Err(Invalid::argument(
            "heartbeat period must be between 100ms and 1h",
        ));
    }
    if let Some(life) = duration("certificate expiry", spec.node_cert_expiry.as_ref())?
        && life < CERT_LIFE_MIN
    {
        return Err(Invalid::argument(
            "minimum allowed certificate expiry duration is 1h0m0s",
        ));
    }
    if spec.snapshot_interval == Some(0) {
        return Err(Invalid::argument("snapshot interval must be at least 1"));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cluster_settings_out_of_range_are_refused() {
        let seconds = |seconds| Some(prost_types::Duration { seconds, nanos: 0 });
        let refused = |spec: ClusterSpec| cluster_spec(&spec).unwrap_err().to_string();
        assert_eq!(cluster_spec(&ClusterSpec::default()), Ok(()));
        assert!(
            refused(ClusterSpec {
                node_cert_expiry: seconds(60),
                ..Default::default()
            })
            .contains("1h0m0s")
        );
        assert!(
            refused(ClusterSpec {
                heartbeat_period: seconds(-1),
                ..Default::default()
            })
            .contains("negative")
        );
        assert!(
            refused(ClusterSpec {
                heartbeat_period: seconds(0),
                ..Default::default()
            })
            .contains("100ms")
        );
        assert!(
            refused(ClusterSpec {
                snapshot_interval: Some(0),
                ..Default::default()
            })
            .contains("at least 1")
        );
        assert!(
            refused(ClusterSpec {
                task_history_limit: Some(1 << 40),
                ..Default::default()
            })
            .contains("more than 1000")
        );
    }

    #[test]
    fn specs_of_every_kind_are_bounded_in_size() {
        let labels = |bytes: usize| {
            // Eight labels below the limit of one text.
            let value = "x".repeat(bytes / 8);
            let labels = (0..8).map(|n| (n.to_string(), value.clone())).collect();
            Some(swarm_proto::v1::Annotations {
                name: "name".into(),
                labels,
            })
        };
        let results = |bytes| {
            [
                node_spec(&NodeSpec {
                    annotations: labels(bytes),
                    ..Default::default()
                }),
                cluster_spec(&ClusterSpec {
                    annotations: labels(bytes),
                    ..Default::default()
                }),
                network_spec(&swarm_proto::v1::NetworkSpec {
                    annotations: labels(bytes),
                    ..Default::default()
                })
                .map(drop),
            ]
        };
        for result in results(SPEC_MAX - 1024) {
            assert_eq!(result, Ok(()));
        }
        for result in results(SPEC_MAX + 1024) {
            assert!(result.unwrap_err().to_string().contains("more than 983040"));
        }
    }

    #[test]
    fn an_unknown_role_or_availability_is_refused() {
        assert!(
            node_spec(&NodeSpec {
                desired_role: 7,
                ..Default::default()
            })
            .is_err()
        );
        assert!(
            node_spec(&NodeSpec {
                availability: -1,
                ..Default::default()
            })
            .is_err()
        );
        assert_eq!(node_spec(&NodeSpec::default()), Ok(()));
    }
}
