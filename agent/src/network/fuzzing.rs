//! Entry points for fuzzing: DNS packets, netlink answers, the name server's frames.
//!
//! Each function takes what somebody else may send and panics when a rule is broken;
//! `seeds` gives inputs that are valid. Only in builds with the feature `fuzzing`.

use std::net::Ipv4Addr;

use futures::FutureExt as _;
use hickory_proto::op::{Message, MessageType, Query};
use hickory_proto::rr::{Name, RecordType};
use swarm_proto::TaskId;

use super::names::answer::{self, Outcome, Table};
use super::names::wire::{self, NetworkNames, Reply, SandboxNames, ServiceNames, TaskNames};
use super::names::{client, upstream, wire::Request as Frame};
use super::netlink::{self, Request};
use super::{NetworkView, SandboxSpec, lb, nft, overlay, route, sandbox};

fn network() -> NetworkNames {
    let task = |n: u8, ready| TaskNames {
        id: format!("task{n}"),
        service: "s1".into(),
        place: n.to_string(),
        addr: Ipv4Addr::new(10, 0, 1, 10 + n),
        aliases: vec!["db".into()],
        ready,
    };
    NetworkNames {
        id: "n1".into(),
        name: "back".into(),
        services: vec![
            ServiceNames {
                id: "s1".into(),
                names: vec!["Web".into(), "www".into()],
                vip: None,
            },
            ServiceNames {
                id: "s2".into(),
                names: vec!["vip".into()],
                vip: Some(Ipv4Addr::new(10, 0, 1, 2)),
            },
        ],
        tasks: (0..60).map(|n| task(n, n % 3 != 0)).collect(),
    }
}

fn box_names() -> SandboxNames {
    SandboxNames {
        task: "t".into(),
        netns: "/x".into(),
        networks: vec!["n1".into()],
        own: vec!["box".into()],
        addrs: vec![Ipv4Addr::new(10, 0, 1, 50)],
        external: true,
        nameservers: vec![],
    }
}

/// A packet from a container: never answered in more bytes than it can take, never if it is
/// itself an answer, and always under its own number.
pub fn dns_query(data: &[u8]) {
    thread_local!(static TABLE: Table = Table::build(&network()));
    let limit = answer::udp_limit(data);
    assert!((512..=4096).contains(&limit));
    let outcome = TABLE.with(|table| answer::decide(data, &box_names(), [table], data.len()));
    let is_answer = data.get(2).is_some_and(|flags| flags & 0x80 != 0);
    match outcome {
        Outcome::Answer(message) => {
            assert!(!is_answer);
            for limit in [Some(limit), None] {
                let bytes = answer::encode(message.clone(), limit).expect("an answer is encodable");
                assert!(bytes.len() <= limit.unwrap_or(usize::from(u16::MAX)));
                assert_eq!(bytes[..2], data[..2]);
                let read = Message::from_vec(&bytes).expect("an answer is readable");
                assert_eq!(read.metadata.message_type, MessageType::Response);
            }
        }
        Outcome::Forward(query) => {
            assert!(!is_answer);
            assert_eq!(query.queries.len(), 1);
            let failed = answer::respond(&query, hickory_proto::op::ResponseCode::ServFail);
            assert!(answer::encode(failed, Some(limit)).is_some_and(|it| it.len() <= limit));
        }
        Outcome::Ignore => {}
    }
}

/// What another name server answers to a question about example.com: it reaches the asker only
/// under the asker's number and with the asker's question. Also a resolv.conf.
pub fn dns_answer(data: &[u8]) {
    if let Ok(text) = std::str::from_utf8(data) {
        assert!(upstream::parse(text).len() <= 3);
    }
    let packet = question("example.com.", RecordType::A);
    let query = Message::from_vec(&packet).expect("our own question");
    let Some(id) = data.first_chunk::<2>() else {
        return;
    };
    if let Some((answer, _)) = upstream::accept(data.to_vec(), *id, &packet, &query) {
        assert_eq!(answer[..2], packet[..2]);
        assert_eq!(answer[2..], data[2..]);
        let read = Message::from_vec(&answer).expect("it was read before");
        assert_eq!(read.queries, query.queries);
        assert_eq!(read.metadata.message_type, MessageType::Response);
    }
    let other = [!id[0], id[1]];
    assert!(upstream::accept(data.to_vec(), other, &packet, &query).is_none());
}

fn question(name: &str, kind: RecordType) -> Vec<u8> {
    let mut query = Message::query();
    query.metadata.id = 0x4242;
    query.add_query(Query::query(Name::from_ascii(name).expect("a name"), kind));
    query.to_vec().expect("our own question")
}

/// A datagram of the kernel, read as every kind of answer. Whatever it says, no parser reads past
/// the end or for ever.
pub fn netlink_reply(data: &[u8]) {
    let mut messages = 0;
    for reply in netlink::replies(data) {
        messages += 1;
        assert!(reply.payload.len() + 16 <= data.len());
        let payload = reply.payload;
        let _ = netlink::code(&netlink::kernel_error(-2, payload));
        let _ = route::parse_link(payload);
        let _ = route::parse_neighbour(payload);
        for (_, net) in [route::parse_address(payload), route::parse_route(payload)]
            .into_iter()
            .flatten()
        {
            assert!(net.prefix_len() <= 32);
        }
        if let Some(elements) = nft::parse_elements(payload) {
            let bytes: usize = elements.iter().map(|(k, v)| k.len() + v.len()).sum();
            assert!(bytes <= payload.len());
        }
        let _ = nft::parse_connection(payload);
        // Attributes written again are read the same.
        let all: Vec<(u16, &[u8])> = netlink::attributes(payload).collect();
        let mut again = Request::default();
        again.message(1, 0, &[]);
        for (kind, data) in &all {
            again.attr(*kind, data);
        }
        let written = again.bytes();
        let read = netlink::replies(written).next().expect("just written");
        assert!(netlink::attributes(read.payload).eq(all));
    }
    assert!(messages * 16 <= data.len());
}

/// What the dataplane makes of a sandbox before it touches the kernel.
///
/// # Errors
/// What is wrong with it.
pub fn sandbox(spec: &SandboxSpec) -> Result<(), String> {
    sandbox::Plan::parse(spec)
        .map(drop)
        .map_err(|error| error.to_string())
}

/// What the dataplane makes of networks before it touches the kernel.
///
/// # Errors
/// What is wrong with one of them.
pub fn views<'a>(views: impl IntoIterator<Item = &'a NetworkView>) -> Result<(), String> {
    let underlay = overlay::Underlay {
        addr: Ipv4Addr::new(192, 0, 2, 1),
        port: 4789,
        mtu: 1500,
    };
    let views: Vec<&NetworkView> = views.into_iter().collect();
    let balance = lb::plan(&TaskId::from("t1"), views.iter().copied());
    assert!(lb::changes(&balance, &balance).is_empty());
    for view in views {
        let rows = view.endpoints.values().map(|row| &**row);
        let forwarding = overlay::Forwarding::plan(rows, underlay.addr);
        assert!(forwarding.changes(&forwarding).is_empty());
        let _ = Table::build(&client::names_of(view));
        overlay::Shape::parse(view, underlay).map_err(|error| error.to_string())?;
    }
    Ok(())
}

/// Frames between agent and name server: what is read is written back to the same message, and
/// reading ends.
pub fn names_frame(data: &[u8]) {
    let mut from = data;
    while let Some(Ok(Some(frame))) = wire::receive::<Frame>(&mut from).now_or_never() {
        same(&frame);
        if let Frame::Network(network) = &frame {
            let _ = Table::build(network);
        }
    }
    let mut from = data;
    while let Some(Ok(Some(reply))) = wire::receive::<Reply>(&mut from).now_or_never() {
        same(&reply);
    }
}

fn same<T>(message: &T)
where
    T: serde::Serialize + serde::de::DeserializeOwned + PartialEq + std::fmt::Debug,
{
    let bytes = frame(message);
    let read = wire::receive::<T>(&mut bytes.as_slice()).now_or_never();
    let read = read.expect("memory does not wait").expect("just written");
    assert_eq!(read.as_ref(), Some(message));
}

fn frame<T: serde::Serialize>(message: &T) -> Vec<u8> {
    let mut bytes = Vec::new();
    let sent = wire::send(&mut bytes, message).now_or_never();
    sent.expect("memory does not wait").expect("it is small");
    bytes
}

/// Valid inputs.
pub mod seeds {
    use hickory_proto::op::{Edns, ResponseCode};
    use hickory_proto::rr::rdata::A;
    use hickory_proto::rr::{RData, Record};

    use super::*;

    /// For [`super::dns_query`].
    #[must_use]
    pub fn dns_query() -> Vec<Vec<u8>> {
        let mut edns = Message::from_vec(&question("web.", RecordType::A)).expect("our own");
        edns.set_edns(Edns::new());
        vec![
            question("web.", RecordType::A),
            question("tasks.web.back.", RecordType::ANY),
            question("vip.", RecordType::AAAA),
            question("example.com.", RecordType::MX),
            question("11.1.0.10.in-addr.arpa.", RecordType::PTR),
            edns.to_vec().expect("our own"),
        ]
    }

    /// For [`super::dns_answer`].
    #[must_use]
    pub fn dns_answer() -> Vec<Vec<u8>> {
        let query = Message::from_vec(&question("example.com.", RecordType::A)).expect("our own");
        let mut answer = answer::respond(&query, ResponseCode::NoError);
        let name = Name::from_ascii("example.com.").expect("a name");
        let addr = RData::A(A(Ipv4Addr::new(192, 0, 2, 1)));
        answer.add_answer(Record::from_rdata(name, 60, addr));
        vec![
            answer.to_vec().expect("our own"),
            answer::respond(&query, ResponseCode::NXDomain)
                .to_vec()
                .expect("our own"),
            b"search a\nnameserver 192.0.2.1\nnameserver ::1\n".to_vec(),
        ]
    }

    /// For [`super::netlink_reply`].
    #[must_use]
    pub fn netlink_reply() -> Vec<Vec<u8>> {
        let mut link = Request::default();
        link.message(16, 0, &[0; 16])
            .text(libc::IFLA_IFNAME, "vx001000")
            .u32(libc::IFLA_MTU, 1450)
            .attr(libc::IFLA_ADDRESS, &[2, 0x42, 10, 0, 0, 1])
            .nest(libc::IFLA_LINKINFO, |info| {
                info.text(1, "vxlan").nest(2, |data| {
                    data.u32(1, 4096)
                        .attr(4, &[192, 0, 2, 1])
                        .attr(15, &4789u16.to_be_bytes());
                });
            });
        let mut addr = Request::default();
        addr.message(20, 0, &[2, 24, 0, 0, 1, 0, 0, 0])
            .attr(libc::IFA_LOCAL, &[10, 0, 0, 1]);
        let mut way = Request::default();
        way.message(24, 0, &[2, 24, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0])
            .attr(libc::RTA_DST, &[10, 0, 0, 0])
            .u32(libc::RTA_OIF, 3);
        let mut neighbour = Request::default();
        neighbour
            .message(28, 0, &[2, 0, 0, 0, 1, 0, 0, 0, 0x80, 0, 0, 0])
            .attr(1, &[10, 0, 0, 9])
            .attr(2, &[2, 0x42, 10, 0, 0, 9]);
        let mut elements = Request::default();
        elements.message(0xa0c, 0, &[2, 0, 0, 0]).nest(3, |list| {
            list.nest(1, |element| {
                element
                    .nest(1, |data| {
                        data.attr(1, &[6, 0, 0, 0, 0x1f, 0x90, 0, 0]);
                    })
                    .nest(2, |data| {
                        data.attr(1, &[10, 0, 0, 2, 0, 80, 0, 0]);
                    });
            });
        });
        let mut tracked = Request::default();
        tracked.message(0x100, 0, &[2, 0, 0, 0]);
        for kind in [1, 2] {
            tracked.nest(kind, |tuple| {
                tuple
                    .nest(1, |ip| {
                        ip.attr(1, &[10, 0, 0, 2]).attr(2, &[10, 0, 0, 3]);
                    })
                    .nest(2, |protocol| {
                        protocol.u8(1, 6);
                    });
            });
        }
        let mut refusal = Request::default();
        refusal.message(2, 0, &[0; 20]).text(1, "no such thing");
        [link, addr, way, neighbour, elements, tracked, refusal]
            .iter()
            .map(|request| request.bytes().to_vec())
            .collect()
    }

    /// For [`super::names_frame`].
    #[must_use]
    pub fn names_frame() -> Vec<Vec<u8>> {
        let retain = Frame::Retain {
            sandboxes: vec!["t".into()],
            networks: vec!["n1".into()],
        };
        vec![
            frame(&Frame::Hello(1)),
            frame(&retain),
            frame(&Frame::Sandbox(box_names())),
            frame(&Frame::Network(NetworkNames {
                tasks: Vec::new(),
                ..network()
            })),
            frame(&Reply::Failed("no".into())),
            [
                frame(&Frame::RemoveNetwork("n1".into())),
                frame(&Frame::End),
            ]
            .concat(),
        ]
    }
}
