//! What a user may ask of a network.

use std::net::Ipv4Addr;

use ipnet::{IpNet, Ipv4Net};
use swarm_proto::v1::{IpamPool, NetworkSpec};

use super::{Invalid, bounded, text};

/// Sets the MTU of a network's endpoints.
pub const MTU_OPTION: &str = "com.docker.network.driver.mtu";

const DRIVER: &str = "overlay";
/// Most subnets of one network.
const SUBNETS_MAX: usize = 64;
/// Least MTU that IPv4 allows.
const MTU_MIN: u32 = 68;
const MTU_MAX: u32 = 65535;
/// The largest subnet.
const PREFIX_MIN: u8 = 8;
/// The smallest subnet: gateway, a virtual address, and some tasks.
const PREFIX_MAX: u8 = 29;
/// Names of networks that every node has by itself.
const PREDEFINED: [&str; 5] = [
    "bridge",
    "host",
    "none",
    "docker_gwbridge",
    "swarm_gwbridge",
];

/// Checks a network's spec. Returns the MTU it asks for; 0 when it does not say.
///
/// Overlaps with other networks and with the nodes' routes are apply's to refuse.
///
/// # Errors
/// The first part that is not accepted.
pub fn network_spec(spec: &NetworkSpec) -> Result<u32, Invalid> {
    bounded("network", spec)?;
    let annotations = spec
        .annotations
        .as_ref()
        .ok_or_else(|| Invalid::argument("name must be provided"))?;
    text::name(&annotations.name)?;
    if PREDEFINED.contains(&annotations.name.as_str()) {
        return Err(Invalid::argument(format!(
            "{} is a pre-defined network and cannot be created",
            annotations.name
        )));
    }
    text::labels("label", &annotations.labels)?;
    if !spec.driver.is_empty() && spec.driver != DRIVER {
        return Err(Invalid::unsupported(format!(
            "network driver {} is not available: only overlay is",
            text::quoted(&spec.driver)
        )));
    }
    let mtu = driver_options(spec)?;
    if let Some(ipam) = &spec.ipam {
        if !ipam.driver.is_empty() && ipam.driver != "default" {
            return Err(Invalid::unsupported(format!(
                "address manager {} is not available: only default is",
                text::quoted(&ipam.driver)
            )));
        }
        pools(&ipam.configs)?;
    }
    Ok(mtu)
}

fn driver_options(spec: &NetworkSpec) -> Result<u32, Invalid> {
    let mut mtu = 0;
    for (option, value) in &spec.driver_opts {
        match option.as_str() {
            MTU_OPTION => {
                mtu = value
                    .parse()
                    .ok()
                    .filter(|mtu| (MTU_MIN..=MTU_MAX).contains(mtu))
                    .ok_or_else(|| {
                        Invalid::argument(format!(
                            "invalid value {} of option {MTU_OPTION}: expected {MTU_MIN} to {MTU_MAX}",
                            text::quoted(value)
                        ))
                    })?;
            }
            "encrypted" => {
                return Err(Invalid::unsupported(
                    "option encrypted is not available yet: traffic between nodes is not encrypted",
                ));
            }
            _ => {
                return Err(Invalid::argument(format!(
                    "unknown driver option {}: only {MTU_OPTION} is known",
                    text::quoted(option)
                )));
            }
        }
    }
    Ok(mtu)
}

fn pools(configs: &[IpamPool]) -> Result<(), Invalid> {
    text::count("subnet", configs.len(), SUBNETS_MAX)?;
    let mut subnets: Vec<Ipv4Net> = Vec::with_capacity(configs.len());
    for config in configs {
        if config.subnet.is_empty() {
            return Err(Invalid::argument(match config.gateway.as_str() {
                "" => "an address pool needs a subnet".to_owned(),
                gateway => format!("no matching subnet for gateway {}", gateway.escape_debug()),
            }));
        }
        let subnet = cidr("subnet", &config.subnet)?;
        usable(&subnet)?;
        if subnets
            .iter()
            .any(|other| other.contains(&subnet) || subnet.contains(other))
        {
            return Err(Invalid::argument(
                "multiple overlapping subnet configuration is not supported",
            ));
        }
        if !config.ip_range.is_empty() {
            let range = cidr("ip-range", &config.ip_range)?;
            if !subnet.contains(&range) {
                return Err(Invalid::argument(format!(
                    "no matching subnet for range {range}"
                )));
            }
        }
        if !config.gateway.is_empty() {
            gateway(&subnet, &config.gateway)?;
        }
        subnets.push(subnet);
    }
    Ok(())
}

fn gateway(subnet: &Ipv4Net, text: &str) -> Result<(), Invalid> {
    let addr: Ipv4Addr = text.parse().map_err(|_| {
        if text.contains(':') && text.parse::<std::net::Ipv6Addr>().is_ok() {
            Invalid::unsupported(format!(
                "invalid gateway {text}: IPv6 is not available yet in overlay networks"
            ))
        } else {
            Invalid::argument(format!(
                "invalid gateway {}: not an IP address",
                text::quoted(text)
            ))
        }
    })?;
    if !subnet.contains(&addr) {
        return Err(Invalid::argument(format!(
            "no matching subnet for gateway {addr}"
        )));
    }
    if addr == subnet.network() || addr == subnet.broadcast() {
        return Err(Invalid::argument(format!(
            "invalid gateway {addr}: it is the first or last address of {subnet}"
        )));
    }
    Ok(())
}

/// A block of IPv4 addresses without host bits.
fn cidr(what: &str, text: &str) -> Result<Ipv4Net, Invalid> {
    let parsed: IpNet = text.parse().map_err(|_| {
        Invalid::argument(format!(
            "invalid {what} {}: invalid CIDR block notation",
            shown(text)
        ))
    })?;
    if parsed.trunc() != parsed {
        return Err(Invalid::argument(format!(
            "invalid {what} {parsed}: it should be {}",
            parsed.trunc()
        )));
    }
    match parsed {
        IpNet::V4(net) => Ok(net),
        IpNet::V6(net) => Err(Invalid::unsupported(format!(
            "invalid {what} {net}: IPv6 is not available yet in overlay networks"
        ))),
    }
}

fn usable(subnet: &Ipv4Net) -> Result<(), Invalid> {
    if !(PREFIX_MIN..=PREFIX_MAX).contains(&subnet.prefix_len()) {
        return Err(Invalid::argument(format!(
            "invalid subnet {subnet}: its size must be between /{PREFIX_MIN} and /{PREFIX_MAX}"
        )));
    }
    let addr = subnet.network();
    if addr.is_loopback()
        || addr.is_link_local()
        || addr.octets()[0] == 0
        || addr.octets()[0] >= 224
    {
        return Err(Invalid::argument(format!(
            "invalid subnet {subnet}: these addresses are reserved"
        )));
    }
    Ok(())
}

/// As given when that is plain, else quoted.
fn shown(text: &str) -> String {
    if text.len() <= 64 && text.bytes().all(|b| b.is_ascii_graphic()) {
        text.to_owned()
    } else {
        text::quoted(text)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;
    use swarm_proto::v1::{Annotations, IpamOptions};

    use super::*;

    fn pool(subnet: &str, range: &str, gateway: &str) -> IpamPool {
        IpamPool {
            subnet: subnet.to_owned(),
            ip_range: range.to_owned(),
            gateway: gateway.to_owned(),
        }
    }

    fn spec(configs: Vec<IpamPool>, options: &[(&str, &str)]) -> NetworkSpec {
        NetworkSpec {
            annotations: Some(Annotations {
                name: "net".to_owned(),
                ..Default::default()
            }),
            driver: "overlay".to_owned(),
            driver_opts: options
                .iter()
                .map(|(k, v)| ((*k).to_owned(), (*v).to_owned()))
                .collect(),
            ipam: Some(IpamOptions {
                driver: String::new(),
                configs,
            }),
            ..Default::default()
        }
    }

    fn refused(configs: Vec<IpamPool>) -> String {
        network_spec(&spec(configs, &[])).unwrap_err().to_string()
    }

    #[test]
    fn well_formed_networks_are_accepted() {
        let two = vec![
            pool("10.50.1.0/24", "10.50.1.128/25", "10.50.1.254"),
            pool("10.50.2.0/24", "", ""),
        ];
        assert_eq!(network_spec(&spec(two, &[(MTU_OPTION, "1400")])), Ok(1400));
        assert_eq!(network_spec(&spec(Vec::new(), &[])), Ok(0));
    }

    #[test]
    fn bad_addresses_are_named() {
        assert_eq!(
            refused(vec![pool("foo", "", "")]),
            "invalid subnet foo: invalid CIDR block notation"
        );
        assert_eq!(
            refused(vec![pool("10.50.1.5/24", "", "")]),
            "invalid subnet 10.50.1.5/24: it should be 10.50.1.0/24"
        );
        assert_eq!(
            refused(vec![pool("10.50.1.0/24", "", "10.50.2.1")]),
            "no matching subnet for gateway 10.50.2.1"
        );
        assert_eq!(
            refused(vec![pool("", "", "10.50.2.1")]),
            "no matching subnet for gateway 10.50.2.1"
        );
        assert_eq!(
            refused(vec![pool("10.50.1.0/24", "10.51.1.0/25", "")]),
            "no matching subnet for range 10.51.1.0/25"
        );
        assert_eq!(
            refused(vec![
                pool("10.50.0.0/16", "", ""),
                pool("10.50.1.0/24", "", "")
            ]),
            "multiple overlapping subnet configuration is not supported"
        );
        for reserved in ["127.0.0.0/8", "224.0.0.0/8", "169.254.0.0/16", "0.0.0.0/8"] {
            assert!(refused(vec![pool(reserved, "", "")]).contains("reserved"));
        }
        assert!(refused(vec![pool("10.0.0.0/30", "", "")]).contains("/29"));
        assert!(refused(vec![pool("10.50.1.0/24", "", "10.50.1.0")]).contains("first or last"));
        assert!(refused(vec![pool("fd00::/64", "", "")]).contains("IPv6 is not available yet"));
    }

    #[test]
    fn options_are_known_or_refused() {
        for bad in ["67", "65536", "-1", "x", ""] {
            let error = network_spec(&spec(Vec::new(), &[(MTU_OPTION, bad)])).unwrap_err();
            assert!(error.to_string().contains("68 to 65535"), "{bad}");
        }
        assert!(matches!(
            network_spec(&spec(Vec::new(), &[("encrypted", "")])),
            Err(Invalid::Unsupported(_))
        ));
        assert!(
            network_spec(&spec(Vec::new(), &[("colour", "red")]))
                .unwrap_err()
                .to_string()
                .contains("unknown driver option \"colour\"")
        );
        let bridge = NetworkSpec {
            driver: "bridge".to_owned(),
            ..spec(Vec::new(), &[])
        };
        assert!(
            network_spec(&bridge)
                .unwrap_err()
                .to_string()
                .contains("only overlay")
        );
    }

    proptest! {
        #[test]
        fn no_input_makes_the_check_panic(
            name in any::<String>(), driver in any::<String>(), opts in any::<BTreeMap<String, String>>(),
            pools in proptest::collection::vec(("[0-9a-f./:]{0,20}", "[0-9./]{0,20}", "[0-9a-f.:]{0,20}"), 0..4),
        ) {
            let configs = pools.iter().map(|(s, r, g)| pool(s, r, g)).collect();
            let mut spec = spec(configs, &[]);
            let _ = network_spec(&spec);
            spec.annotations = Some(Annotations { name, ..Default::default() });
            spec.driver = driver;
            spec.driver_opts = opts;
            let _ = network_spec(&spec);
        }
    }
}
