//! Links, addresses, routes, neighbours and forwarding entries of one namespace.

use std::io;
use std::net::Ipv4Addr;
use std::os::fd::{AsRawFd, BorrowedFd};

use ipnet::Ipv4Net;

use super::netlink::{
    ACK, CREATE, DUMP, EXCL, REPLACE, Request, Socket, as_text, as_u32, attribute, attributes,
    ignore_exists, ignore_gone,
};

/// Bytes of an Ethernet address.
pub type Mac = [u8; 6];

const AF_BRIDGE: u8 = libc::AF_BRIDGE as u8;
const AF_INET: u8 = libc::AF_INET as u8;
const IFLA_VXLAN_ID: u16 = 1;
const IFLA_VXLAN_LOCAL: u16 = 4;
const IFLA_VXLAN_LEARNING: u16 = 7;
const IFLA_VXLAN_PROXY: u16 = 11;
const IFLA_VXLAN_PORT: u16 = 15;
const IFLA_BRPORT_MODE: u16 = 4;
const IFLA_BRPORT_LEARNING: u16 = 8;
const IFLA_BRPORT_ISOLATED: u16 = 33;
const IFLA_BR_MCAST_SNOOPING: u16 = 23;
const VETH_INFO_PEER: u16 = 1;
const IFLA_INFO_KIND: u16 = 1;
const IFLA_INFO_DATA: u16 = 2;
const NDA_DST: u16 = 1;
const NDA_LLADDR: u16 = 2;

/// A link as the kernel shows it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Link {
    /// Number within its namespace.
    pub index: u32,
    /// Name within its namespace.
    pub name: String,
    /// Largest packet.
    pub mtu: u32,
    /// Ethernet address, if it has one of six bytes.
    pub mac: Option<Mac>,
    /// The bridge it is a port of.
    pub master: Option<u32>,
    /// Set for VXLAN devices.
    pub vxlan: Option<Vxlan>,
}

/// What makes a VXLAN device the one we want.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Vxlan {
    /// Network number.
    pub vni: u32,
    /// Where its packets leave from.
    pub local: Ipv4Addr,
    /// UDP port.
    pub port: u16,
}

/// One end of a veth pair.
#[derive(Clone, Copy, Debug)]
pub struct VethEnd<'a> {
    /// Name within its namespace.
    pub name: &'a str,
    /// `None`: the kernel chooses.
    pub mac: Option<Mac>,
    /// The namespace; `None` = the socket's.
    pub netns: Option<BorrowedFd<'a>>,
    /// The bridge it becomes a port of.
    pub master: Option<u32>,
    /// Links of one group can be removed together.
    pub group: u32,
}

/// Routing and links of the namespace that it was opened in.
#[derive(Debug)]
pub struct Route {
    socket: Socket,
}

fn link_header(family: u8, index: u32, up: bool) -> [u8; 16] {
    let mut header = [0; 16];
    header[0] = family;
    header[4..8].copy_from_slice(&index.to_ne_bytes());
    let flags = u32::from(up) * libc::IFF_UP as u32;
    header[8..12].copy_from_slice(&flags.to_ne_bytes());
    header[12..16].copy_from_slice(&flags.to_ne_bytes());
    header
}

fn neighbour_header(family: u8, index: u32, state: u16, flags: u8) -> [u8; 12] {
    let mut header = [0; 12];
    header[0] = family;
    header[4..8].copy_from_slice(&index.to_ne_bytes());
    header[8..10].copy_from_slice(&state.to_ne_bytes());
    header[10] = flags;
    header
}

fn address_header(addr: Ipv4Net, index: u32) -> [u8; 8] {
    let mut header = [0; 8];
    header[0] = AF_INET;
    header[1] = addr.prefix_len();
    header[4..8].copy_from_slice(&index.to_ne_bytes());
    header
}

fn v4(data: &[u8]) -> Option<Ipv4Addr> {
    Some(Ipv4Addr::from(<[u8; 4]>::try_from(data).ok()?))
}

/// Link and address of an `RTM_NEWADDR`.
pub(super) fn parse_address(payload: &[u8]) -> Option<(u32, Ipv4Net)> {
    let index = as_u32(payload.get(4..8)?)?;
    let body = payload.get(8..)?;
    let addr = attribute(body, libc::IFA_LOCAL)
        .or_else(|| attribute(body, libc::IFA_ADDRESS))
        .and_then(v4)?;
    Some((index, Ipv4Net::new(addr, payload[1]).ok()?))
}

/// Link and destination of an `RTM_NEWROUTE`, unless it is a default route.
pub(super) fn parse_route(payload: &[u8]) -> Option<(u32, Ipv4Net)> {
    let body = payload.get(12..)?;
    let addr = attribute(body, libc::RTA_DST).and_then(v4)?;
    let link = attribute(body, libc::RTA_OIF).and_then(as_u32).unwrap_or(0);
    Some((link, Ipv4Net::new(addr, payload[1]).ok()?))
}

/// Link, address and MAC of a permanent `RTM_NEWNEIGH`.
pub(super) fn parse_neighbour(payload: &[u8]) -> Option<(u32, Ipv4Addr, Mac)> {
    let index = as_u32(payload.get(4..8)?)?;
    let state = u16::from_ne_bytes(payload.get(8..10)?.try_into().ok()?);
    if state & libc::NUD_PERMANENT == 0 {
        return None;
    }
    let body = payload.get(12..)?;
    Some((
        index,
        attribute(body, NDA_DST).and_then(v4)?,
        attribute(body, NDA_LLADDR)?.try_into().ok()?,
    ))
}

/// An `RTM_NEWLINK`.
pub(super) fn parse_link(payload: &[u8]) -> Option<Link> {
    let index = as_u32(payload.get(4..8)?)?;
    let body = payload.get(16..)?;
    let mut link = Link {
        index,
        name: String::new(),
        mtu: 0,
        mac: None,
        master: None,
        vxlan: None,
    };
    for (kind, data) in attributes(body) {
        match kind {
            libc::IFLA_IFNAME => link.name = as_text(data),
            libc::IFLA_MTU => link.mtu = as_u32(data)?,
            libc::IFLA_ADDRESS => link.mac = data.try_into().ok(),
            libc::IFLA_MASTER => link.master = as_u32(data),
            libc::IFLA_LINKINFO
                if attribute(data, IFLA_INFO_KIND).map(as_text).as_deref() == Some("vxlan") =>
            {
                link.vxlan = attribute(data, IFLA_INFO_DATA).and_then(parse_vxlan);
            }
            _ => {}
        }
    }
    Some(link)
}

fn parse_vxlan(data: &[u8]) -> Option<Vxlan> {
    Some(Vxlan {
        vni: attribute(data, IFLA_VXLAN_ID).and_then(as_u32)?,
        local: attribute(data, IFLA_VXLAN_LOCAL)
            .and_then(v4)
            .unwrap_or(Ipv4Addr::UNSPECIFIED),
        port: u16::from_be_bytes(attribute(data, IFLA_VXLAN_PORT)?.try_into().ok()?),
    })
}

impl Route {
    /// Opens a socket in the calling thread's namespace.
    pub fn open() -> io::Result<Self> {
        Ok(Self {
            socket: Socket::open(libc::NETLINK_ROUTE)?,
        })
    }

    fn call(&self, write: impl FnOnce(&mut Request)) -> io::Result<()> {
        let mut request = Request::default();
        write(&mut request);
        self.socket.call(&request)
    }

    /// Every link.
    pub fn links(&self) -> io::Result<Vec<Link>> {
        let mut request = Request::default();
        request.message(libc::RTM_GETLINK, DUMP, &link_header(0, 0, false));
        self.socket.dump(&request, parse_link)
    }

    /// The link of that name.
    pub fn link(&self, name: &str) -> io::Result<Option<Link>> {
        let mut request = Request::default();
        request
            .message(libc::RTM_GETLINK, ACK, &link_header(0, 0, false))
            .text(libc::IFLA_IFNAME, name);
        match self.socket.dump(&request, parse_link) {
            Ok(found) => Ok(found.into_iter().next()),
            Err(error) => ignore_gone(Err(error)).map(|()| None),
        }
    }

    /// Every IPv4 address with its link's number.
    pub fn addresses(&self) -> io::Result<Vec<(u32, Ipv4Net)>> {
        let mut request = Request::default();
        request.message(libc::RTM_GETADDR, DUMP, &[AF_INET, 0, 0, 0, 0, 0, 0, 0]);
        self.socket.dump(&request, parse_address)
    }

    /// Destinations of all IPv4 routes except default ones, with the link they leave by.
    pub fn routes(&self) -> io::Result<Vec<(u32, Ipv4Net)>> {
        let mut request = Request::default();
        let mut header = [0; 12];
        header[0] = AF_INET;
        request.message(libc::RTM_GETROUTE, DUMP, &header);
        self.socket.dump(&request, parse_route)
    }

    /// Makes a bridge that is up. Already there is success.
    pub fn add_bridge(&self, name: &str, mtu: u32, mac: Option<Mac>) -> io::Result<()> {
        ignore_exists(self.call(|request| {
            request
                .message(
                    libc::RTM_NEWLINK,
                    ACK | CREATE | EXCL,
                    &link_header(0, 0, true),
                )
                .text(libc::IFLA_IFNAME, name)
                .u32(libc::IFLA_MTU, mtu);
            if let Some(mac) = mac {
                request.attr(libc::IFLA_ADDRESS, &mac);
            }
            request.nest(libc::IFLA_LINKINFO, |info| {
                info.text(IFLA_INFO_KIND, "bridge")
                    .nest(IFLA_INFO_DATA, |data| {
                        data.u8(IFLA_BR_MCAST_SNOOPING, 0);
                    });
            });
        }))
    }

    /// Makes a VXLAN device: its UDP socket in this socket's namespace, the device itself in `netns`,
    /// in one step, so that nothing can be left between the two.
    pub fn add_vxlan(
        &self,
        name: &str,
        vxlan: Vxlan,
        mtu: u32,
        netns: BorrowedFd<'_>,
    ) -> io::Result<()> {
        self.call(|request| {
            request
                .message(
                    libc::RTM_NEWLINK,
                    ACK | CREATE | EXCL,
                    &link_header(0, 0, false),
                )
                .text(libc::IFLA_IFNAME, name)
                .u32(libc::IFLA_MTU, mtu)
                .u32(libc::IFLA_NET_NS_FD, netns.as_raw_fd() as u32)
                .nest(libc::IFLA_LINKINFO, |info| {
                    info.text(IFLA_INFO_KIND, "vxlan")
                        .nest(IFLA_INFO_DATA, |data| {
                            data.u32(IFLA_VXLAN_ID, vxlan.vni)
                                .attr(IFLA_VXLAN_LOCAL, &vxlan.local.octets())
                                .u8(IFLA_VXLAN_LEARNING, 0)
                                .u8(IFLA_VXLAN_PROXY, 1)
                                .attr(IFLA_VXLAN_PORT, &vxlan.port.to_be_bytes());
                        });
                });
        })
    }

    /// Makes a veth pair, named and placed in one step. The far end is not up yet: the kernel refuses it here.
    pub fn add_veth(&self, near: VethEnd<'_>, far: VethEnd<'_>, mtu: u32) -> io::Result<()> {
        fn end(request: &mut Request, end: VethEnd<'_>, mtu: u32) {
            request
                .text(libc::IFLA_IFNAME, end.name)
                .u32(libc::IFLA_MTU, mtu);
            if let Some(mac) = end.mac {
                request.attr(libc::IFLA_ADDRESS, &mac);
            }
            if let Some(netns) = end.netns {
                request.u32(libc::IFLA_NET_NS_FD, netns.as_raw_fd() as u32);
            }
            if let Some(master) = end.master {
                request.u32(libc::IFLA_MASTER, master);
            }
            request.u32(libc::IFLA_GROUP, end.group);
        }
        self.call(|request| {
            request.message(
                libc::RTM_NEWLINK,
                ACK | CREATE | EXCL,
                &link_header(0, 0, true),
            );
            end(request, near, mtu);
            request.nest(libc::IFLA_LINKINFO, |info| {
                info.text(IFLA_INFO_KIND, "veth")
                    .nest(IFLA_INFO_DATA, |data| {
                        data.nest_after(VETH_INFO_PEER, &link_header(0, 0, false), |peer| {
                            end(peer, far, mtu);
                        });
                    });
            });
        })
    }

    /// Makes a link a port of a bridge, and brings it up.
    pub fn enslave(&self, index: u32, master: u32) -> io::Result<()> {
        self.call(|request| {
            request
                .message(libc::RTM_NEWLINK, ACK, &link_header(0, index, true))
                .u32(libc::IFLA_MASTER, master);
        })
    }

    /// Brings a link up.
    pub fn set_up(&self, index: u32) -> io::Result<()> {
        self.call(|request| {
            request.message(libc::RTM_NEWLINK, ACK, &link_header(0, index, true));
        })
    }

    /// Sets the largest packet of a link.
    pub fn set_mtu(&self, index: u32, mtu: u32) -> io::Result<()> {
        self.call(|request| {
            request
                .message(libc::RTM_NEWLINK, ACK, &link_header(0, index, false))
                .u32(libc::IFLA_MTU, mtu);
        })
    }

    /// Settings of a bridge's port: `isolated` reaches the bridge itself but no other isolated port;
    /// `hairpin` may get back what it has sent.
    pub fn set_port(&self, index: u32, isolated: bool, hairpin: bool) -> io::Result<()> {
        self.call(|request| {
            request
                .message(
                    libc::RTM_SETLINK,
                    ACK,
                    &link_header(AF_BRIDGE, index, false),
                )
                .nest(libc::IFLA_PROTINFO, |port| {
                    port.u8(IFLA_BRPORT_ISOLATED, u8::from(isolated))
                        .u8(IFLA_BRPORT_MODE, u8::from(hairpin));
                });
        })
    }

    /// A bridge's port on which the bridge learns no addresses.
    pub fn stop_learning(&self, index: u32) -> io::Result<()> {
        self.call(|request| {
            request
                .message(
                    libc::RTM_SETLINK,
                    ACK,
                    &link_header(AF_BRIDGE, index, false),
                )
                .nest(libc::IFLA_PROTINFO, |port| {
                    port.u8(IFLA_BRPORT_LEARNING, 0);
                });
        })
    }

    /// Removes a link. Already gone is success.
    pub fn remove_link(&self, name: &str) -> io::Result<()> {
        ignore_gone(self.call(|request| {
            request
                .message(libc::RTM_DELLINK, ACK, &link_header(0, 0, false))
                .text(libc::IFLA_IFNAME, name);
        }))
    }

    /// Removes all links of a group at once: the kernel waits for its readers only once. None is success.
    pub fn remove_group(&self, group: u32) -> io::Result<()> {
        ignore_gone(self.call(|request| {
            request
                .message(libc::RTM_DELLINK, ACK, &link_header(0, 0, false))
                .u32(libc::IFLA_GROUP, group);
        }))
    }

    /// Gives a link an address. Already there is success.
    pub fn add_address(&self, index: u32, addr: Ipv4Net) -> io::Result<()> {
        ignore_exists(self.call(|request| {
            request
                .message(
                    libc::RTM_NEWADDR,
                    ACK | CREATE | EXCL,
                    &address_header(addr, index),
                )
                .attr(libc::IFA_LOCAL, &addr.addr().octets())
                .attr(libc::IFA_ADDRESS, &addr.addr().octets());
        }))
    }

    /// Adds or replaces a route: through `gateway`, or straight onto the link.
    pub fn set_route(
        &self,
        index: u32,
        destination: Ipv4Net,
        gateway: Option<Ipv4Addr>,
    ) -> io::Result<()> {
        let scope = match gateway {
            Some(_) => libc::RT_SCOPE_UNIVERSE,
            None => libc::RT_SCOPE_LINK,
        };
        let header = [
            AF_INET,
            destination.prefix_len(),
            0,
            0,
            libc::RT_TABLE_MAIN,
            libc::RTPROT_STATIC,
            scope,
            libc::RTN_UNICAST,
            0,
            0,
            0,
            0,
        ];
        self.call(|request| {
            request.message(libc::RTM_NEWROUTE, ACK | CREATE | REPLACE, &header);
            if destination.prefix_len() > 0 {
                request.attr(libc::RTA_DST, &destination.network().octets());
            }
            request.u32(libc::RTA_OIF, index);
            if let Some(gateway) = gateway {
                request.attr(libc::RTA_GATEWAY, &gateway.octets());
            }
        })
    }

    /// Adds or replaces a permanent neighbour.
    pub fn set_neighbour(&self, index: u32, addr: Ipv4Addr, mac: Mac) -> io::Result<()> {
        self.call(|request| {
            request
                .message(
                    libc::RTM_NEWNEIGH,
                    ACK | CREATE | REPLACE,
                    &neighbour_header(AF_INET, index, libc::NUD_PERMANENT, 0),
                )
                .attr(NDA_DST, &addr.octets())
                .attr(NDA_LLADDR, &mac);
        })
    }

    /// Removes a neighbour. Already gone is success.
    pub fn remove_neighbour(&self, index: u32, addr: Ipv4Addr) -> io::Result<()> {
        ignore_gone(self.call(|request| {
            request
                .message(
                    libc::RTM_DELNEIGH,
                    ACK,
                    &neighbour_header(AF_INET, index, 0, 0),
                )
                .attr(NDA_DST, &addr.octets());
        }))
    }

    /// Adds or replaces the tunnel address behind which a VXLAN device finds a MAC address.
    pub fn set_forwarding(&self, index: u32, mac: Mac, vtep: Ipv4Addr) -> io::Result<()> {
        self.call(|request| {
            request
                .message(
                    libc::RTM_NEWNEIGH,
                    ACK | CREATE | REPLACE,
                    &neighbour_header(AF_BRIDGE, index, libc::NUD_PERMANENT, libc::NTF_SELF),
                )
                .attr(NDA_LLADDR, &mac)
                .attr(NDA_DST, &vtep.octets());
        })
    }

    /// Removes it. Already gone is success.
    pub fn remove_forwarding(&self, index: u32, mac: Mac) -> io::Result<()> {
        ignore_gone(self.call(|request| {
            request
                .message(
                    libc::RTM_DELNEIGH,
                    ACK,
                    &neighbour_header(AF_BRIDGE, index, 0, libc::NTF_SELF),
                )
                .attr(NDA_LLADDR, &mac);
        }))
    }

    /// Tells a bridge, for good, behind which of its ports a MAC address is.
    pub fn set_station(&self, port: u32, mac: Mac) -> io::Result<()> {
        self.call(|request| {
            request
                .message(
                    libc::RTM_NEWNEIGH,
                    ACK | CREATE | REPLACE,
                    &neighbour_header(AF_BRIDGE, port, libc::NUD_NOARP, libc::NTF_MASTER),
                )
                .attr(NDA_LLADDR, &mac);
        })
    }

    /// Takes it back, if the bridge has it behind that port. Already gone is success.
    pub fn remove_station(&self, port: u32, mac: Mac) -> io::Result<()> {
        ignore_gone(self.call(|request| {
            request
                .message(
                    libc::RTM_DELNEIGH,
                    ACK,
                    &neighbour_header(AF_BRIDGE, port, 0, libc::NTF_MASTER),
                )
                .attr(NDA_LLADDR, &mac);
        }))
    }

    /// Permanent neighbours of all links: link, address, MAC.
    pub fn neighbours(&self) -> io::Result<Vec<(u32, Ipv4Addr, Mac)>> {
        self.neighbour_dump(AF_INET)
    }

    /// Forwarding entries of all VXLAN devices: link, MAC, tunnel address.
    pub fn forwarding(&self) -> io::Result<Vec<(u32, Mac, Ipv4Addr)>> {
        let found = self.neighbour_dump(AF_BRIDGE)?;
        Ok(found
            .into_iter()
            .map(|(index, vtep, mac)| (index, mac, vtep))
            .collect())
    }

    fn neighbour_dump(&self, family: u8) -> io::Result<Vec<(u32, Ipv4Addr, Mac)>> {
        let mut request = Request::default();
        request.message(libc::RTM_GETNEIGH, DUMP, &neighbour_header(family, 0, 0, 0));
        self.socket.dump(&request, parse_neighbour)
    }
}
