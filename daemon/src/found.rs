//! What `swarm init` asks for, checked: pure.

use std::time::Duration;

use ipnet::Ipv4Net;
use swarm_manager::ca::InitParams;
use swarm_proto::defaults::{ADDRESS_POOL, DATA_PATH_PORT, SUBNET_PREFIX};
use swarm_proto::v1::InitRequest;
use swarm_proto::{ClusterId, NodeId};

/// The shortest life of a node's certificate, as in Swarm.
const CERT_LIFE_MIN: Duration = Duration::from_secs(3600);
/// The shortest heartbeat: below, a busy machine looks dead.
const HEARTBEAT_MIN: Duration = Duration::from_millis(100);

/// The parameters of a new cluster, or one sentence on what is wrong with the request.
///
/// # Errors
/// A pool, length, port or duration that cannot be used.
pub fn params(
    request: &InitRequest,
    hostname: &str,
    advertise_addr: String,
) -> Result<InitParams, String> {
    let subnet_size = match request.default_addr_pool_mask_length {
        0 => u32::from(SUBNET_PREFIX),
        length @ 8..=29 => length,
        length => {
            return Err(format!(
                "the default address pool mask length must be between 8 and 29, not {length}"
            ));
        }
    };
    let mut pools: Vec<Ipv4Net> = Vec::new();
    for text in &request.default_addr_pool {
        let pool: Ipv4Net = text.parse().map_err(|_| {
            format!("invalid default address pool {text}: invalid CIDR block notation")
        })?;
        if pool.trunc() != pool {
            return Err(format!(
                "invalid default address pool {text}: it should be {}",
                pool.trunc()
            ));
        }
        if u32::from(pool.prefix_len()) > subnet_size {
            return Err(format!(
                "the default address pool {pool} is smaller than one subnet of it (/{subnet_size})"
            ));
        }
        if let Some(other) = pools
            .iter()
            .find(|other| other.contains(&pool) || pool.contains(*other))
        {
            return Err(format!(
                "the default address pools {other} and {pool} overlap"
            ));
        }
        pools.push(pool);
    }
    let data_path_port = match request.data_path_port {
        0 => u32::from(DATA_PATH_PORT),
        port @ 1024..=49151 => port,
        port => {
            return Err(format!(
                "the data path port must be between 1024 and 49151, not {port}"
            ));
        }
    };
    Ok(InitParams {
        cluster_id: ClusterId::random(),
        node_id: NodeId::random(),
        hostname: hostname.to_owned(),
        advertise_addr,
        availability: request.availability(),
        default_addr_pool: if pools.is_empty() {
            vec![ADDRESS_POOL.to_owned()]
        } else {
            pools.iter().map(ToString::to_string).collect()
        },
        subnet_size,
        data_path_port,
        node_cert_expiry: at_least(
            request.node_cert_expiry,
            CERT_LIFE_MIN,
            "certificate expiry",
        )?,
        heartbeat_period: at_least(request.heartbeat_period, HEARTBEAT_MIN, "heartbeat period")?,
    })
}

fn at_least(
    given: Option<prost_types::Duration>,
    least: Duration,
    what: &str,
) -> Result<Option<Duration>, String> {
    let Some(given) = given else {
        return Ok(None);
    };
    match Duration::try_from(given) {
        Ok(span) if span >= least => Ok(Some(span)),
        _ => Err(format!("the {what} must be at least {least:?}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn with(change: impl FnOnce(&mut InitRequest)) -> Result<InitParams, String> {
        let mut request = InitRequest::default();
        change(&mut request);
        params(&request, "host", "10.0.0.1:2377".to_owned())
    }

    #[test]
    fn an_empty_request_has_the_defaults() {
        let params = with(|_| {}).unwrap();
        assert_eq!(params.default_addr_pool, ["10.0.0.0/8"]);
        assert_eq!(params.subnet_size, 24);
        assert_eq!(params.data_path_port, 4789);
        assert_eq!(params.heartbeat_period, None);
    }

    #[test]
    fn what_cannot_work_is_refused_with_a_sentence() {
        let pool = |text: &str| {
            let text = text.to_owned();
            with(|request| request.default_addr_pool = vec![text])
        };
        assert!(pool("foo").unwrap_err().contains("invalid CIDR"));
        assert!(
            pool("10.1.2.3/16")
                .unwrap_err()
                .contains("it should be 10.1.0.0/16")
        );
        assert!(pool("10.1.0.0/25").unwrap_err().contains("smaller"));
        assert!(
            with(|r| r.default_addr_pool = vec!["10.0.0.0/8".into(), "10.1.0.0/16".into()])
                .unwrap_err()
                .contains("overlap")
        );
        assert!(with(|r| r.default_addr_pool_mask_length = 30).is_err());
        assert!(with(|r| r.data_path_port = 80).is_err());
        assert!(
            with(|r| r.heartbeat_period = Some(prost_types::Duration {
                seconds: -1,
                nanos: 0
            }))
            .is_err()
        );
    }
}
