//! nftables in one namespace: batches that the kernel takes whole or not at all.
//!
//! Writes only what this project needs, into one table that belongs to it. Starts no process.

use std::io;
use std::net::Ipv4Addr;

use super::netlink::{ACK, CREATE, DUMP, Request, Socket, attribute, attributes, ignore_gone};

/// The table, in every namespace.
pub const TABLE: &str = "swarm";

const SUBSYSTEM: u16 = 10 << 8;
const NEW_TABLE: u16 = SUBSYSTEM;
const DEL_TABLE: u16 = SUBSYSTEM | 2;
const NEW_CHAIN: u16 = SUBSYSTEM | 3;
const DEL_CHAIN: u16 = SUBSYSTEM | 5;
const NEW_RULE: u16 = SUBSYSTEM | 6;
const DEL_RULE: u16 = SUBSYSTEM | 8;
const NEW_SET: u16 = SUBSYSTEM | 9;
const NEW_ELEMENT: u16 = SUBSYSTEM | 12;
const GET_ELEMENT: u16 = SUBSYSTEM | 13;
const DEL_ELEMENT: u16 = SUBSYSTEM | 14;
const BATCH_BEGIN: u16 = 0x10;
const BATCH_END: u16 = 0x11;

const LIST_ELEMENT: u16 = 1;
/// Elements per message: keeps a list below the 64 KiB that an attribute can hold.
const ELEMENTS_MAX: usize = 300;
const SET_ANONYMOUS: u32 = 1;
const SET_CONSTANT: u32 = 2;
const SET_MAP: u32 = 8;
const VERDICT: u32 = 0xffff_ff00;
const JUMP: i32 = -3;

/// `ipv4_addr`, as the `nft` program numbers it.
pub const TYPE_IPV4: u32 = 7;
const TYPE_INTEGER: u32 = 4;
const TYPE_PROTO: u32 = 12;
const TYPE_PORT: u32 = 13;
/// `inet_proto . inet_service`
pub const TYPE_PROTO_PORT: u32 = (TYPE_PROTO << 6) | TYPE_PORT;
/// `ipv4_addr . inet_service`
pub const TYPE_IPV4_PORT: u32 = (TYPE_IPV4 << 6) | TYPE_PORT;

/// First register of 16 bytes, and of the 4-byte ones inside it.
const REG: u32 = 1;
/// The second 4 bytes of `REG`.
const REG_SECOND: u32 = 9;

/// Where a chain of the kernel's hooks is attached.
#[derive(Clone, Copy, Debug)]
pub struct Hook {
    /// "nat" or "filter".
    pub kind: &'static str,
    /// `NF_INET_*`.
    pub hook: u32,
    /// Order among the chains of one hook.
    pub priority: i32,
}

/// What an element of a map leads to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Value {
    /// No map: a set.
    None,
    /// Bytes.
    Data(Vec<u8>),
    /// The chain to continue in.
    Jump(String),
}

fn family(number: u8, subsystem: u16) -> [u8; 4] {
    let id = subsystem.to_be_bytes();
    [number, 0, id[0], id[1]]
}

const IPV4: u8 = libc::AF_INET as u8;

/// Changes that take effect together.
#[derive(Debug)]
pub struct Batch {
    request: Request,
    next_set: u32,
}

impl Default for Batch {
    fn default() -> Self {
        let mut request = Request::default();
        request.message(BATCH_BEGIN, 0, &family(0, 10));
        Self {
            request,
            next_set: 1,
        }
    }
}

impl Batch {
    fn message(&mut self, kind: u16, flags: u16) -> &mut Request {
        self.request.message(kind, flags | ACK, &family(IPV4, 0))
    }

    /// Nothing to send.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.request.messages() == 1
    }

    /// Makes the table, if it is not there.
    pub fn add_table(&mut self) {
        self.message(NEW_TABLE, CREATE).text(1, TABLE).be32(2, 0);
    }

    /// Removes the table with everything in it, whether it is there or not.
    pub fn replace_table(&mut self) {
        self.add_table();
        self.remove_table();
        self.add_table();
    }

    /// Removes the table with everything in it.
    pub fn remove_table(&mut self) {
        self.message(DEL_TABLE, 0).text(1, TABLE);
    }

    /// Makes a chain; one with a hook sees packets by itself.
    pub fn add_chain(&mut self, name: &str, hook: Option<Hook>) {
        let message = self.message(NEW_CHAIN, CREATE);
        message.text(1, TABLE).text(3, name);
        if let Some(hook) = hook {
            message
                .nest(4, |inner| {
                    inner.be32(1, hook.hook).be32(2, hook.priority as u32);
                })
                .be32(5, libc::NF_ACCEPT as u32)
                .text(7, hook.kind);
        }
    }

    /// Removes a chain that is empty and not referred to.
    pub fn remove_chain(&mut self, name: &str) {
        self.message(DEL_CHAIN, 0).text(1, TABLE).text(3, name);
    }

    /// Removes all rules of a chain.
    pub fn flush_chain(&mut self, name: &str) {
        self.message(DEL_RULE, 0).text(1, TABLE).text(2, name);
    }

    /// Adds a rule at the end of a chain.
    pub fn add_rule(&mut self, chain: &str, expressions: impl FnOnce(&mut Rule<'_>)) {
        self.message(NEW_RULE, CREATE | super::netlink::APPEND)
            .text(1, TABLE)
            .text(2, chain)
            .nest(4, |list| expressions(&mut Rule(list)));
    }

    /// A named set (or map, with the type and length of its values).
    pub fn add_set(&mut self, name: &str, key: (u32, u32), value: Option<(u32, u32)>) {
        let id = self.next_set;
        self.next_set += 1;
        self.set(name, id, 0, key, value);
    }

    /// A named map that leads to chains.
    pub fn add_verdict_map(&mut self, name: &str, key: (u32, u32)) {
        self.add_set(name, key, Some((VERDICT, 0)));
    }

    /// A map without a name, for the next rule: number → value. Returns its name and number in this batch.
    pub fn add_numbered_map(&mut self, value: (u32, u32), values: &[Vec<u8>]) -> (String, u32) {
        let id = self.next_set;
        self.next_set += 1;
        self.set(
            "__map%d",
            id,
            SET_ANONYMOUS | SET_CONSTANT,
            (TYPE_INTEGER, 4),
            Some(value),
        );
        let elements: Vec<_> = values
            .iter()
            .enumerate()
            .map(|(number, data)| {
                (
                    (number as u32).to_ne_bytes().to_vec(),
                    Value::Data(data.clone()),
                )
            })
            .collect();
        self.elements(NEW_ELEMENT, CREATE, "__map%d", Some(id), &elements);
        ("__map%d".to_owned(), id)
    }

    fn set(&mut self, name: &str, id: u32, flags: u32, key: (u32, u32), value: Option<(u32, u32)>) {
        let message = self.message(NEW_SET, CREATE);
        message
            .text(1, TABLE)
            .text(2, name)
            .be32(3, flags | if value.is_some() { SET_MAP } else { 0 })
            .be32(4, key.0)
            .be32(5, key.1);
        if let Some((kind, length)) = value {
            message.be32(6, kind);
            if kind != VERDICT {
                message.be32(7, length);
            }
        }
        message.be32(10, id);
    }

    /// Adds elements to a named set.
    pub fn add_elements(&mut self, set: &str, elements: &[(Vec<u8>, Value)]) {
        self.elements(NEW_ELEMENT, CREATE, set, None, elements);
    }

    /// Removes elements, which must be there.
    pub fn remove_elements(&mut self, set: &str, elements: &[(Vec<u8>, Value)]) {
        self.elements(DEL_ELEMENT, 0, set, None, elements);
    }

    fn elements(
        &mut self,
        kind: u16,
        flags: u16,
        set: &str,
        id: Option<u32>,
        elements: &[(Vec<u8>, Value)],
    ) {
        for part in elements.chunks(ELEMENTS_MAX) {
            let message = self.message(kind, flags);
            message.text(1, TABLE).text(2, set);
            if let Some(id) = id {
                message.be32(4, id);
            }
            message.nest(3, |list| {
                for (key, value) in part {
                    list.nest(LIST_ELEMENT, |element| {
                        element.nest(1, |data| {
                            data.attr(1, key);
                        });
                        match value {
                            Value::None => {}
                            Value::Data(bytes) => {
                                element.nest(2, |data| {
                                    data.attr(1, bytes);
                                });
                            }
                            Value::Jump(chain) => {
                                element.nest(2, |data| {
                                    data.nest(2, |verdict| {
                                        verdict.be32(1, JUMP as u32).text(2, chain);
                                    });
                                });
                            }
                        }
                    });
                }
            });
        }
    }
}

/// The expressions of one rule, in the order in which the kernel evaluates them.
#[derive(Debug)]
pub struct Rule<'a>(&'a mut Request);

impl Rule<'_> {
    fn expression(&mut self, name: &str, data: impl FnOnce(&mut Request)) -> &mut Self {
        self.0.nest(LIST_ELEMENT, |element| {
            element.text(1, name).nest(2, data);
        });
        self
    }

    fn compare(&mut self, operator: u32, value: &[u8]) -> &mut Self {
        self.expression("cmp", |e| {
            e.be32(1, REG).be32(2, operator).nest(3, |data| {
                data.attr(1, value);
            });
        })
    }

    fn payload(&mut self, base: u32, offset: u32, length: u32, register: u32) -> &mut Self {
        self.expression("payload", |e| {
            e.be32(1, register)
                .be32(2, base)
                .be32(3, offset)
                .be32(4, length);
        })
    }

    fn meta(&mut self, key: u32) -> &mut Self {
        self.expression("meta", |e| {
            e.be32(1, REG).be32(2, key);
        })
    }

    fn mask(&mut self, mask: &[u8]) -> &mut Self {
        let zero = vec![0; mask.len()];
        self.expression("bitwise", |e| {
            e.be32(1, REG)
                .be32(2, REG)
                .be32(3, mask.len() as u32)
                .nest(4, |data| {
                    data.attr(1, mask);
                })
                .nest(5, |data| {
                    data.attr(1, &zero);
                });
        })
    }

    /// The protocol above IP.
    pub fn protocol(&mut self, number: u8) -> &mut Self {
        self.meta(16).compare(0, &[number])
    }

    /// Loads the destination address.
    pub fn load_destination(&mut self) -> &mut Self {
        self.payload(1, 16, 4, REG)
    }

    /// The destination is this address.
    pub fn destination(&mut self, addr: Ipv4Addr) -> &mut Self {
        self.load_destination().compare(0, &addr.octets())
    }

    /// The destination is inside this subnet.
    pub fn destination_in(&mut self, net: ipnet::Ipv4Net) -> &mut Self {
        self.load_destination()
            .mask(&net.netmask().octets())
            .compare(0, &net.network().octets())
    }

    /// The source is inside this subnet.
    pub fn source_in(&mut self, net: ipnet::Ipv4Net) -> &mut Self {
        self.payload(1, 12, 4, REG)
            .mask(&net.netmask().octets())
            .compare(0, &net.network().octets())
    }

    /// The destination port.
    pub fn destination_port(&mut self, port: u16) -> &mut Self {
        self.payload(2, 2, 2, REG).compare(0, &port.to_be_bytes())
    }

    /// Loads protocol and destination port, for a lookup.
    pub fn load_protocol_and_port(&mut self) -> &mut Self {
        self.meta(16).payload(2, 2, 2, REG_SECOND)
    }

    /// It came in by this link, or (`false`) not by it.
    pub fn arrives_by(&mut self, link: &str, yes: bool) -> &mut Self {
        self.meta(6).compare(u32::from(!yes), &link_name(link))
    }

    /// It goes out by this link, or (`false`) not by it.
    pub fn leaves_by(&mut self, link: &str, yes: bool) -> &mut Self {
        self.meta(7).compare(u32::from(!yes), &link_name(link))
    }

    /// The destination (or the source) is one of the host's own addresses.
    pub fn is_local(&mut self, destination: bool) -> &mut Self {
        const ADDRESS_TYPE: u32 = 3;
        self.expression("fib", |e| {
            e.be32(1, REG)
                .be32(2, ADDRESS_TYPE)
                .be32(3, if destination { 2 } else { 1 });
        })
        .compare(0, &u32::from(libc::RTN_LOCAL).to_ne_bytes())
    }

    /// The connection's destination has been translated.
    pub fn is_translated(&mut self) -> &mut Self {
        const STATUS: u32 = 2;
        const DST_NAT: u32 = 1 << 5;
        self.expression("ct", |e| {
            e.be32(1, REG).be32(2, STATUS);
        })
        .mask(&DST_NAT.to_ne_bytes())
        .compare(1, &0u32.to_ne_bytes())
    }

    /// A connection being opened whose destination has not been translated.
    pub fn is_new_and_direct(&mut self) -> &mut Self {
        const STATE: u32 = 0;
        const STATUS: u32 = 2;
        const NEW: u32 = 1 << 3;
        const DST_NAT: u32 = 1 << 5;
        for (key, mask, operator) in [(STATE, NEW, 1), (STATUS, DST_NAT, 0)] {
            self.expression("ct", |e| {
                e.be32(1, REG).be32(2, key);
            })
            .mask(&mask.to_ne_bytes())
            .compare(operator, &0u32.to_ne_bytes());
        }
        self
    }

    /// What was loaded is in the set.
    pub fn is_in(&mut self, set: &str) -> &mut Self {
        self.expression("lookup", |e| {
            e.text(1, set).be32(2, REG);
        })
    }

    /// What was loaded becomes what the map says; not in the map: the rule ends.
    pub fn look_up(&mut self, map: (&str, Option<u32>)) -> &mut Self {
        self.expression("lookup", |e| {
            e.text(1, map.0).be32(2, REG).be32(3, REG);
            if let Some(id) = map.1 {
                e.be32(4, id);
            }
        })
    }

    /// Continues in the chain that the map names for what was loaded.
    pub fn jump_by(&mut self, map: &str) -> &mut Self {
        self.expression("lookup", |e| {
            e.text(1, map).be32(2, REG).be32(3, 0);
        })
    }

    /// Loads 0, 1, 2 … below `count`, one after the other.
    pub fn next_number(&mut self, count: u32) -> &mut Self {
        self.expression("numgen", |e| {
            e.be32(1, REG).be32(2, count).be32(3, 0).be32(4, 0);
        })
    }

    /// Loads bytes: the address, and a port in the second register.
    pub fn load_target(&mut self, addr: Ipv4Addr, port: Option<u16>) -> &mut Self {
        let mut load = |register: u32, value: &[u8]| {
            self.expression("immediate", |e| {
                e.be32(1, register).nest(2, |data| {
                    data.attr(1, value);
                });
            });
        };
        load(REG, &addr.octets());
        if let Some(port) = port {
            load(REG_SECOND, &port.to_be_bytes());
        }
        self
    }

    /// Translates the destination to what was loaded: the address, and the port if `port`.
    pub fn translate(&mut self, port: bool) -> &mut Self {
        const DNAT: u32 = 1;
        self.expression("nat", |e| {
            e.be32(1, DNAT).be32(2, u32::from(IPV4)).be32(3, REG);
            if port {
                e.be32(5, REG_SECOND);
            }
        })
    }

    /// Translates the source to the address of the link it leaves by.
    pub fn masquerade(&mut self) -> &mut Self {
        self.expression("masq", |_| {})
    }

    /// Drops the packet.
    pub fn drop(&mut self) -> &mut Self {
        self.expression("immediate", |e| {
            e.be32(1, 0).nest(2, |data| {
                data.nest(2, |verdict| {
                    verdict.be32(1, libc::NF_DROP as u32);
                });
            });
        })
    }

    /// Answers with a TCP reset.
    pub fn reset(&mut self) -> &mut Self {
        self.expression("reject", |e| {
            e.be32(1, 1);
        })
    }

    /// Answers that the port cannot be reached.
    pub fn reject(&mut self) -> &mut Self {
        const PORT_UNREACHABLE: u8 = 3;
        self.expression("reject", |e| {
            e.be32(1, 0).u8(2, PORT_UNREACHABLE);
        })
    }
}

fn link_name(name: &str) -> [u8; 16] {
    let mut padded = [0; 16];
    for (to, from) in padded[..15].iter_mut().zip(name.bytes()) {
        *to = from;
    }
    padded
}

/// The tuple of a tracked connection as it was opened.
const ORIGINAL: u16 = 1;
/// The tuple of its answers.
const ANSWER: u16 = 2;

/// Keys and values of the elements in one message.
pub(super) fn parse_elements(payload: &[u8]) -> Option<Vec<(Vec<u8>, Vec<u8>)>> {
    let list = attribute(payload.get(4..)?, 3)?;
    let elements = attributes(list).filter_map(|(_, element)| {
        let key = attribute(attribute(element, 1)?, 1)?.to_vec();
        let value = attribute(element, 2)
            .and_then(|data| attribute(data, 1))
            .unwrap_or_default()
            .to_vec();
        Some((key, value))
    });
    Some(elements.collect())
}

/// Protocol, original destination, the address that answers, and the original tuple.
pub(super) fn parse_connection(payload: &[u8]) -> Option<(u8, Ipv4Addr, Ipv4Addr, &[u8])> {
    let body = payload.get(4..)?;
    let original = attribute(body, ORIGINAL)?;
    let answer = attribute(body, ANSWER)?;
    let addr = |tuple: &[u8], which: u16| -> Option<Ipv4Addr> {
        let bytes: [u8; 4] = attribute(attribute(tuple, 1)?, which)?.try_into().ok()?;
        Some(bytes.into())
    };
    let protocol = *attribute(attribute(original, 2)?, 1)?.first()?;
    Some((protocol, addr(original, 2)?, addr(answer, 1)?, original))
}

/// The rules of the namespace that it was opened in.
#[derive(Debug)]
pub struct Nft {
    socket: Socket,
}

impl Nft {
    /// Opens a socket in the calling thread's namespace.
    pub fn open() -> io::Result<Self> {
        Ok(Self {
            socket: Socket::open(libc::NETLINK_NETFILTER)?,
        })
    }

    /// Sends a batch: all of it takes effect, or none.
    pub fn commit(&self, mut batch: Batch) -> io::Result<()> {
        if batch.is_empty() {
            return Ok(());
        }
        let acks = batch.request.messages() - 1;
        batch.request.message(BATCH_END, 0, &family(0, 10));
        self.socket.batch(&batch.request, acks)
    }

    /// Removes our table. Already gone is success.
    pub fn clear(&self) -> io::Result<()> {
        let mut batch = Batch::default();
        batch.remove_table();
        ignore_gone(self.commit(batch))
    }

    /// Keys and values of a map; empty when there is none.
    pub fn elements(&self, set: &str) -> io::Result<Vec<(Vec<u8>, Vec<u8>)>> {
        let mut request = Request::default();
        request
            .message(GET_ELEMENT, DUMP, &family(IPV4, 0))
            .text(1, TABLE)
            .text(2, set);
        let found = self.socket.dump(&request, parse_elements);
        match found {
            Ok(parts) => Ok(parts.into_iter().flatten().collect()),
            Err(error) => match ignore_gone(Err(error)) {
                Ok(()) => Ok(Vec::new()),
                Err(error) => Err(error),
            },
        }
    }

    /// How many connections are tracked in this namespace.
    fn tracked(&self) -> io::Result<u32> {
        const GET_STATS: u16 = (1 << 8) | 5;
        const ENTRIES: u16 = 1;
        let mut request = Request::default();
        request.message(GET_STATS, ACK, &family(0, 0));
        let found = self.socket.dump(&request, |payload| {
            let count = attribute(payload.get(4..)?, ENTRIES)?.try_into().ok()?;
            Some(u32::from_be_bytes(count))
        })?;
        let count = found.first().copied();
        count.ok_or_else(|| io::Error::other("the kernel does not say how many it tracks"))
    }

    /// Forgets tracked connections for which `stale` is true: (protocol, original destination, the address that answers).
    pub fn forget_connections(
        &self,
        stale: impl Fn(u8, Ipv4Addr, Ipv4Addr) -> bool,
    ) -> io::Result<()> {
        const GET: u16 = (1 << 8) | 1;
        const DELETE: u16 = (1 << 8) | 2;
        // The kernel has one table for all namespaces and walks all of it, milliseconds long.
        if self.tracked()? == 0 {
            return Ok(());
        }
        let mut request = Request::default();
        request.message(GET, DUMP, &family(IPV4, 0));
        let found = self.socket.dump(&request, |payload| {
            let (protocol, destination, backend, original) = parse_connection(payload)?;
            stale(protocol, destination, backend).then(|| original.to_vec())
        })?;
        for tuple in found {
            let mut request = Request::default();
            request
                .message(DELETE, ACK, &family(IPV4, 0))
                .attr(ORIGINAL | 0x8000, &tuple);
            ignore_gone(self.socket.call(&request))?;
        }
        Ok(())
    }
}
