//! `swarm network create`

use ipnet::IpNet;
use std::net::IpAddr;
use swarm_proto::v1::{Annotations, CreateNetworkRequest, IpamOptions, IpamPool, NetworkSpec};

use crate::daemon::Daemon;
use crate::failure::Result;
use crate::output;

/// Create a network
#[derive(clap::Args, Debug)]
pub struct Create {
    /// Driver to manage the network
    #[arg(short, long, default_value = "overlay")]
    driver: String,
    /// Subnet in CIDR format that represents a network segment
    #[arg(long)]
    subnet: Vec<String>,
    /// IPv4 or IPv6 gateway for the subnet
    #[arg(long)]
    gateway: Vec<String>,
    /// Allocate container ip from a sub-range
    #[arg(long)]
    ip_range: Vec<String>,
    /// Restrict external access to the network
    #[arg(long)]
    internal: bool,
    /// Enable manual container attachment
    #[arg(long)]
    attachable: bool,
    /// Set metadata on a network
    #[arg(long)]
    label: Vec<String>,
    /// Set driver specific options
    #[arg(short, long)]
    opt: Vec<String>,
    /// Control the network's scope
    #[arg(long)]
    scope: Option<String>,
    /// The name
    network: String,
}

/// Creates the network and prints its ID.
pub async fn run(flags: Create, daemon: &Daemon) -> Result {
    let request = CreateNetworkRequest {
        spec: Some(spec(&flags)?),
    };
    let network = daemon.control().create_network(request).await?.into_inner();
    output::line(&network.id)
}

pub(crate) fn spec(flags: &Create) -> std::result::Result<NetworkSpec, String> {
    if let Some(scope) = &flags.scope
        && scope != "swarm"
    {
        return Err(format!(
            "invalid scope {scope:?}: networks of this cluster have the scope \"swarm\""
        ));
    }
    let pairs = |texts: &[String]| -> std::result::Result<_, String> {
        texts
            .iter()
            .map(|text| {
                let (key, value) = text.split_once('=').unwrap_or((text, ""));
                if key.is_empty() {
                    return Err(format!("invalid argument {text:?}: the key is empty"));
                }
                Ok((key.to_owned(), value.to_owned()))
            })
            .collect()
    };
    Ok(NetworkSpec {
        annotations: Some(Annotations {
            name: flags.network.clone(),
            labels: pairs(&flags.label)?,
        }),
        driver: flags.driver.clone(),
        driver_opts: pairs(&flags.opt)?,
        internal: flags.internal,
        attachable: flags.attachable,
        ipam: ipam(&flags.subnet, &flags.ip_range, &flags.gateway)?,
    })
}

/// Each range and each gateway goes to the subnet that it lies in. Whether a
/// subnet is one that the cluster can use is the manager's to say.
fn ipam(
    subnets: &[String],
    ranges: &[String],
    gateways: &[String],
) -> std::result::Result<Option<IpamOptions>, String> {
    if subnets.len() < ranges.len() || subnets.len() < gateways.len() {
        return Err("every ip-range or gateway must have a corresponding subnet".to_owned());
    }
    if subnets.is_empty() {
        return Ok(None);
    }
    let parsed: Vec<Option<IpNet>> = subnets.iter().map(|subnet| subnet.parse().ok()).collect();
    for (place, one) in parsed.iter().enumerate() {
        let overlap = |other: &Option<IpNet>| match (one, other) {
            (Some(a), Some(b)) => a.contains(b) || b.contains(a),
            _ => false,
        };
        if parsed[place + 1..].iter().any(overlap) {
            return Err("multiple overlapping subnet configuration is not supported".to_owned());
        }
    }
    let mut configs: Vec<_> = subnets
        .iter()
        .map(|subnet| IpamPool {
            subnet: subnet.clone(),
            ..IpamPool::default()
        })
        .collect();
    // Nothing can be matched to a subnet that is none: the manager says what is wrong with it.
    if parsed.iter().any(Option::is_none) {
        return Ok(Some(IpamOptions {
            configs,
            ..IpamOptions::default()
        }));
    }
    let find = |inside: &dyn Fn(&IpNet) -> bool| {
        parsed
            .iter()
            .position(|subnet| subnet.as_ref().is_some_and(inside))
    };
    for range in ranges {
        let net: IpNet = range
            .parse()
            .map_err(|_| format!("invalid ip-range {range}: invalid CIDR block notation"))?;
        let place = find(&|subnet| subnet.contains(&net))
            .ok_or_else(|| format!("no matching subnet for range {range}"))?;
        if !configs[place].ip_range.is_empty() {
            return Err(format!(
                "cannot configure multiple ranges ({range}, {}) on the same subnet ({})",
                configs[place].ip_range, subnets[place]
            ));
        }
        configs[place].ip_range.clone_from(range);
    }
    for gateway in gateways {
        let addr: IpAddr = gateway
            .parse()
            .map_err(|_| format!("invalid gateway {gateway}: it must be an IP address"))?;
        let place = find(&|subnet| subnet.contains(&addr))
            .ok_or_else(|| format!("no matching subnet for gateway {gateway}"))?;
        if !configs[place].gateway.is_empty() {
            return Err(format!(
                "cannot configure multiple gateways ({gateway}, {}) for the same subnet ({})",
                configs[place].gateway, subnets[place]
            ));
        }
        configs[place].gateway.clone_from(gateway);
    }
    Ok(Some(IpamOptions {
        configs,
        ..IpamOptions::default()
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn matched(
        subnets: &[&str],
        ranges: &[&str],
        gateways: &[&str],
    ) -> std::result::Result<Vec<IpamPool>, String> {
        let own = |texts: &[&str]| {
            texts
                .iter()
                .map(|&text| text.to_owned())
                .collect::<Vec<_>>()
        };
        Ok(ipam(&own(subnets), &own(ranges), &own(gateways))?
            .unwrap_or_default()
            .configs)
    }

    #[test]
    fn ranges_and_gateways_go_to_their_subnets() {
        let pools = matched(
            &["10.1.0.0/24", "10.2.0.0/24"],
            &["10.2.0.128/25"],
            &["10.2.0.1", "10.1.0.9"],
        )
        .unwrap();
        assert_eq!(
            (pools[0].gateway.as_str(), pools[0].ip_range.as_str()),
            ("10.1.0.9", "")
        );
        assert_eq!(
            (pools[1].gateway.as_str(), pools[1].ip_range.as_str()),
            ("10.2.0.1", "10.2.0.128/25")
        );
        assert!(matched(&[], &[], &[]).unwrap().is_empty());
    }

    #[test]
    fn what_does_not_match_is_named() {
        for (subnets, ranges, gateways, sentence) in [
            (
                &["10.60.0.0/24"][..],
                &[][..],
                &["10.61.0.1"][..],
                "no matching subnet for gateway 10.61.0.1",
            ),
            (
                &["10.60.0.0/24"],
                &["10.61.0.0/25"],
                &[],
                "no matching subnet for range 10.61.0.0/25",
            ),
            (
                &["10.1.0.0/16", "10.1.5.0/24"],
                &[],
                &[],
                "multiple overlapping subnet configuration is not supported",
            ),
            (
                &[],
                &[],
                &["10.0.0.1"],
                "every ip-range or gateway must have a corresponding subnet",
            ),
            (
                &["10.1.0.0/24"],
                &["nonsense"],
                &[],
                "invalid ip-range nonsense: invalid CIDR block notation",
            ),
        ] {
            assert_eq!(matched(subnets, ranges, gateways).unwrap_err(), sentence);
        }
        // What is no subnet at all is left to the manager.
        assert_eq!(
            matched(&["foo"], &[], &["1.2.3.4"]).unwrap()[0].subnet,
            "foo"
        );
    }
}
