//! Which addresses a node tells others: from what the user wrote and what the machine has.
//!
//! Pure, but for [`local_addresses`], which asks the kernel.

use std::net::{IpAddr, SocketAddr};

use swarm_proto::defaults::API_PORT;

/// An address of this machine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LocalAddress {
    /// Name of the interface.
    pub interface: String,
    /// One of its addresses.
    pub addr: IpAddr,
}

/// Why no address could be chosen.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum AddressError {
    /// Neither an address nor an interface of this machine.
    #[error(
        "{text:?} is neither an IP address (with or without a port) nor an interface of this machine"
    )]
    Invalid {
        /// As given.
        text: String,
    },
    /// The machine has no address that others could reach.
    #[error(
        "could not find an IP address to advertise: this system has only loopback addresses - specify one with --advertise-addr"
    )]
    None,
    /// The machine, or the interface, has several.
    #[error(
        "could not choose an IP address to advertise since this system has multiple addresses {place} ({list}) - specify one with --advertise-addr"
    )]
    Several {
        /// "on interface eth0" or "on different interfaces".
        place: String,
        /// The addresses.
        list: String,
    },
    /// 0.0.0.0 is no address to reach anybody at.
    #[error("the advertise address must be a real address, not {addr}")]
    Unspecified {
        /// As given.
        addr: IpAddr,
    },
}

/// The addresses of this machine's interfaces that are up, without loopback and link-local ones.
///
/// # Errors
/// The kernel refuses to list them.
pub fn local_addresses() -> std::io::Result<Vec<LocalAddress>> {
    let mut found = Vec::new();
    for interface in nix::ifaddrs::getifaddrs()? {
        if !interface
            .flags
            .contains(nix::net::if_::InterfaceFlags::IFF_UP)
        {
            continue;
        }
        let Some(address) = interface.address else {
            continue;
        };
        let addr = if let Some(v4) = address.as_sockaddr_in() {
            IpAddr::V4(v4.ip())
        } else if let Some(v6) = address.as_sockaddr_in6() {
            IpAddr::V6(v6.ip())
        } else {
            continue;
        };
        let link_local = match addr {
            IpAddr::V4(v4) => v4.is_link_local(),
            IpAddr::V6(v6) => v6.is_unicast_link_local(),
        };
        // The bridges of containers are the node's own, not a way to it.
        let own = ["docker", "swarm_gwbridge", "br-"]
            .iter()
            .any(|prefix| interface.interface_name.starts_with(prefix));
        if !addr.is_loopback() && !link_local && !own {
            found.push(LocalAddress {
                interface: interface.interface_name,
                addr,
            });
        }
    }
    Ok(found)
}

/// The address to advertise: `text` is an address, an address with a port, an
/// interface, or empty for "the only one there is".
///
/// # Errors
/// See [`AddressError`].
pub fn advertise(text: &str, local: &[LocalAddress]) -> Result<SocketAddr, AddressError> {
    if let Ok(addr) = text.parse::<SocketAddr>() {
        return checked(addr);
    }
    if let Ok(addr) = text.parse::<IpAddr>() {
        return checked(SocketAddr::new(addr, API_PORT));
    }
    // "eth0:2377" is an interface with a port.
    let (name, port) = match text.rsplit_once(':') {
        Some((name, port)) => match port.parse::<u16>() {
            Ok(port) => (name, port),
            Err(_) => return Err(invalid(text)),
        },
        None => (text, API_PORT),
    };
    let candidates: Vec<&LocalAddress> = local
        .iter()
        .filter(|a| name.is_empty() || a.interface == name)
        .collect();
    if candidates.is_empty() && !name.is_empty() {
        return Err(invalid(text));
    }
    // Where there is one IPv4 address, IPv6 addresses beside it make no doubt.
    let v4: Vec<_> = candidates.iter().filter(|a| a.addr.is_ipv4()).collect();
    let chosen = match (v4.as_slice(), candidates.as_slice()) {
        ([one], _) => one.addr,
        ([], [one]) => one.addr,
        (_, []) => return Err(AddressError::None),
        _ => {
            let list = candidates
                .iter()
                .map(|a| a.addr.to_string())
                .collect::<Vec<_>>()
                .join(" and ");
            let first = &candidates[0].interface;
            let place = match candidates.iter().all(|a| a.interface == *first) {
                true => format!("on interface {first}"),
                false => "on different interfaces".to_owned(),
            };
            return Err(AddressError::Several { place, list });
        }
    };
    checked(SocketAddr::new(chosen, port))
}

/// The address that the API is bound to: "0.0.0.0:2377" when empty.
///
/// # Errors
/// Not an address of that form.
pub fn listen(text: &str, local: &[LocalAddress]) -> Result<SocketAddr, AddressError> {
    if text.is_empty() {
        return Ok(SocketAddr::from(([0, 0, 0, 0], API_PORT)));
    }
    if let Ok(addr) = text.parse::<SocketAddr>() {
        return Ok(addr);
    }
    if let Ok(addr) = text.parse::<IpAddr>() {
        return Ok(SocketAddr::new(addr, API_PORT));
    }
    advertise(text, local)
}

fn checked(addr: SocketAddr) -> Result<SocketAddr, AddressError> {
    if addr.ip().is_unspecified() {
        return Err(AddressError::Unspecified { addr: addr.ip() });
    }
    Ok(addr)
}

fn invalid(text: &str) -> AddressError {
    AddressError::Invalid {
        text: text.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn local(list: &[(&str, &str)]) -> Vec<LocalAddress> {
        list.iter()
            .map(|(interface, addr)| LocalAddress {
                interface: (*interface).to_owned(),
                addr: addr.parse().unwrap(),
            })
            .collect()
    }

    #[test]
    fn an_address_is_taken_as_it_is_and_gets_the_port() {
        assert_eq!(
            advertise("10.1.2.3", &[]).unwrap().to_string(),
            "10.1.2.3:2377"
        );
        assert_eq!(
            advertise("10.1.2.3:9", &[]).unwrap().to_string(),
            "10.1.2.3:9"
        );
        assert_eq!(advertise("::2", &[]).unwrap().to_string(), "[::2]:2377");
    }

    #[test]
    fn the_only_address_is_found() {
        let one = local(&[("eth0", "10.0.0.5"), ("eth0", "2001:db8::1")]);
        assert_eq!(advertise("", &one).unwrap().to_string(), "10.0.0.5:2377");
        assert_eq!(
            advertise("eth0", &one).unwrap().to_string(),
            "10.0.0.5:2377"
        );
        assert_eq!(
            advertise("eth0:77", &one).unwrap().to_string(),
            "10.0.0.5:77"
        );
    }

    #[test]
    fn several_addresses_are_named() {
        let two = local(&[("eth0", "10.0.0.5"), ("eth1", "10.0.0.6")]);
        let error = advertise("", &two).unwrap_err().to_string();
        assert!(
            error.contains("on different interfaces (10.0.0.5 and 10.0.0.6)"),
            "{error}"
        );
        assert!(error.contains("--advertise-addr"), "{error}");
        let same = local(&[("eth0", "10.0.0.5"), ("eth0", "10.0.0.6")]);
        for text in ["", "eth0"] {
            let error = advertise(text, &same).unwrap_err().to_string();
            assert!(error.contains("on interface eth0 (10"), "{error}");
        }
    }

    #[test]
    fn what_is_no_address_is_refused() {
        for text in ["nonsense", "eth9", "0.0.0.0", "10.0.0.0/8", "a:b:c", ":x"] {
            assert!(
                advertise(text, &local(&[("eth0", "10.0.0.5")])).is_err(),
                "{text}"
            );
        }
        assert_eq!(advertise("", &[]), Err(AddressError::None));
    }

    #[test]
    fn listening_is_everywhere_by_default() {
        assert_eq!(listen("", &[]).unwrap().to_string(), "0.0.0.0:2377");
        assert_eq!(
            listen("127.0.0.1", &[]).unwrap().to_string(),
            "127.0.0.1:2377"
        );
    }
}
