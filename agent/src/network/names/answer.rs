//! What a question about a name is answered with.
//!
//! Pure: tables and a question in, an answer out (or that someone else must be asked).
//! Touches no socket and no clock; never panics on what a container sends.

use std::collections::{BTreeMap, BTreeSet};
use std::net::Ipv4Addr;

use hickory_proto::op::{Message, MessageType, OpCode, Query, ResponseCode};
use hickory_proto::rr::rdata::{A, PTR};
use hickory_proto::rr::{DNSClass, Name, RData, Record, RecordType};

use super::wire::{NetworkNames, SandboxNames};

/// Seconds that an answer may be kept: tasks come and go, and clients must notice.
const TTL: u32 = 1;
/// Without EDNS.
const UDP_MIN: usize = 512;
/// Larger ones are cut by somebody's network.
const UDP_MAX: usize = 4096;

/// A network's names, ready for questions. All names are lower-case, without the last dot.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Table {
    forward: BTreeMap<String, BTreeSet<Ipv4Addr>>,
    reverse: BTreeMap<Ipv4Addr, String>,
}

impl Table {
    /// Works the names out.
    #[must_use]
    pub fn build(network: &NetworkNames) -> Self {
        let mut table = Self::default();
        let suffix = network.name.to_lowercase();
        let mut add = |name: &str, addrs: &[Ipv4Addr]| {
            let name = name.to_lowercase();
            for name in [format!("{name}.{suffix}"), name] {
                table.forward.entry(name).or_default().extend(addrs);
            }
        };
        let mut ready: BTreeMap<&str, Vec<Ipv4Addr>> = BTreeMap::new();
        for task in network.tasks.iter().filter(|task| task.ready) {
            ready
                .entry(task.service.as_str())
                .or_default()
                .push(task.addr);
        }
        for service in &network.services {
            let tasks = ready
                .get(service.id.as_str())
                .map_or(&[][..], Vec::as_slice);
            for name in &service.names {
                match service.vip {
                    Some(vip) => add(name, &[vip]),
                    None => add(name, tasks),
                }
                add(&format!("tasks.{name}"), tasks);
            }
        }
        let name_of: BTreeMap<&str, &str> = network
            .services
            .iter()
            .filter_map(|service| Some((service.id.as_str(), service.names.first()?.as_str())))
            .collect();
        let vip_of: BTreeMap<&str, Option<Ipv4Addr>> = network
            .services
            .iter()
            .map(|service| (service.id.as_str(), service.vip))
            .collect();
        for task in &network.tasks {
            if let Some(service) = name_of.get(task.service.as_str()) {
                add(
                    &format!("{service}.{}.{}", task.place, task.id),
                    &[task.addr],
                );
            }
            let vip = vip_of.get(task.service.as_str()).copied().flatten();
            let answers: &[Ipv4Addr] = if task.ready { &[task.addr] } else { &[] };
            for alias in &task.aliases {
                match vip {
                    Some(vip) => add(alias, &[vip]),
                    None => add(alias, answers),
                }
                add(&format!("tasks.{alias}"), answers);
            }
        }
        for task in &network.tasks {
            if let Some(service) = name_of.get(task.service.as_str()) {
                let name = format!("{service}.{}.{}.{suffix}", task.place, task.id);
                table.reverse.insert(task.addr, name);
            }
        }
        for service in &network.services {
            if let (Some(vip), Some(name)) = (service.vip, service.names.first()) {
                table.reverse.insert(vip, format!("{name}.{suffix}"));
            }
        }
        table
    }
}

/// What to do with a question.
#[derive(Debug)]
pub enum Outcome {
    /// This is the answer.
    Answer(Message),
    /// Not ours: the outside must be asked.
    Forward(Message),
    /// Not even a question.
    Ignore,
}

/// Decides about one packet. `turn` rotates answers with several addresses.
#[must_use]
pub fn decide<'a>(
    packet: &[u8],
    sandbox: &SandboxNames,
    tables: impl IntoIterator<Item = &'a Table>,
    turn: usize,
) -> Outcome {
    let query = match Message::from_vec(packet) {
        Ok(message) if message.metadata.message_type == MessageType::Query => message,
        Ok(_) => return Outcome::Ignore,
        Err(_) => {
            // What has a header gets an answer; what claims to be one does not.
            return match packet {
                [a, b, flags, ..] if packet.len() >= 12 && flags & 0x80 == 0 => {
                    Outcome::Answer(Message::error_msg(
                        u16::from_be_bytes([*a, *b]),
                        OpCode::Query,
                        ResponseCode::FormErr,
                    ))
                }
                _ => Outcome::Ignore,
            };
        }
    };
    if query.metadata.op_code != OpCode::Query {
        let mut answer = respond(&query, ResponseCode::NotImp);
        answer.queries.clear();
        return Outcome::Answer(answer);
    }
    let [question] = query.queries.as_slice() else {
        // Not repeated: nobody knows how long they are.
        let mut answer = respond(&query, ResponseCode::FormErr);
        answer.queries.clear();
        return Outcome::Answer(answer);
    };
    if question.query_class() != DNSClass::IN {
        return Outcome::Answer(respond(&query, ResponseCode::NotImp));
    }
    let tables: Vec<&Table> = tables.into_iter().collect();
    if question.query_type() == RecordType::PTR {
        return match reverse(question, sandbox, &tables) {
            Some(name) => {
                let mut answer = respond(&query, ResponseCode::NoError);
                let record =
                    Record::from_rdata(question.name().clone(), TTL, RData::PTR(PTR(name)));
                answer.add_answer(record);
                Outcome::Answer(answer)
            }
            None => Outcome::Forward(query),
        };
    }
    let name = question.name().to_lowercase().to_ascii();
    let name = name.trim_end_matches('.');
    let Some(mut addrs) = forward(name, sandbox, &tables) else {
        return Outcome::Forward(query);
    };
    let mut answer = respond(&query, ResponseCode::NoError);
    // The name is known, and has addresses of one kind only.
    if matches!(question.query_type(), RecordType::A | RecordType::ANY) {
        if !addrs.is_empty() {
            let middle = turn % addrs.len();
            addrs.rotate_left(middle);
        }
        for addr in addrs {
            let record = Record::from_rdata(question.name().clone(), TTL, RData::A(A(addr)));
            answer.add_answer(record);
        }
    }
    Outcome::Answer(answer)
}

/// Addresses of a name; `None`: not known here. The first network that knows it counts.
fn forward(name: &str, sandbox: &SandboxNames, tables: &[&Table]) -> Option<Vec<Ipv4Addr>> {
    if let Some(found) = tables.iter().find_map(|table| table.forward.get(name)) {
        return Some(found.iter().copied().collect());
    }
    sandbox
        .own
        .iter()
        .any(|own| own.eq_ignore_ascii_case(name))
        .then(|| sandbox.addrs.first().copied().into_iter().collect())
}

fn reverse(question: &Query, sandbox: &SandboxNames, tables: &[&Table]) -> Option<Name> {
    let net = question.name().parse_arpa_name().ok()?;
    let addr = match net.addr() {
        std::net::IpAddr::V4(addr) if net.prefix_len() == 32 => addr,
        _ => return None,
    };
    let name = tables
        .iter()
        .find_map(|table| table.reverse.get(&addr))
        .or_else(|| {
            sandbox
                .addrs
                .contains(&addr)
                .then(|| sandbox.own.first())
                .flatten()
        })?;
    let mut name = Name::from_ascii(name).ok()?;
    name.set_fqdn(true);
    Some(name)
}

/// An answer without records yet.
#[must_use]
pub fn respond(query: &Message, code: ResponseCode) -> Message {
    let mut answer = Message::response(query.metadata.id, query.metadata.op_code);
    answer.metadata.recursion_desired = query.metadata.recursion_desired;
    answer.metadata.recursion_available = true;
    answer.metadata.response_code = code;
    answer.add_queries(query.queries.iter().cloned());
    if query.edns.is_some() {
        let mut edns = hickory_proto::op::Edns::new();
        edns.set_max_payload(UDP_MAX as u16);
        answer.set_edns(edns);
    }
    answer
}

/// The bytes of an answer. Over UDP (`limit`) what does not fit is left out, and marked as such.
#[must_use]
pub fn encode(mut answer: Message, limit: Option<usize>) -> Option<Vec<u8>> {
    let mut bytes = answer.to_vec().ok()?;
    if let Some(limit) = limit {
        while bytes.len() > limit && !answer.answers.is_empty() {
            answer.metadata.truncation = true;
            let keep = answer.answers.len() * limit / bytes.len();
            let keep = keep.min(answer.answers.len() - 1);
            answer.answers.truncate(keep);
            bytes = answer.to_vec().ok()?;
        }
    }
    Some(bytes)
}

/// How large an answer the asker takes over UDP.
#[must_use]
pub fn udp_limit(packet: &[u8]) -> usize {
    Message::from_vec(packet)
        .ok()
        .and_then(|query| query.edns)
        .map_or(UDP_MIN, |edns| {
            usize::from(edns.max_payload()).clamp(UDP_MIN, UDP_MAX)
        })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::wire::{ServiceNames, TaskNames};
    use super::*;

    fn addr(last: u8) -> Ipv4Addr {
        Ipv4Addr::new(10, 0, 1, last)
    }

    fn network(vip: Option<Ipv4Addr>) -> Table {
        let task = |n: u8, ready| TaskNames {
            id: format!("task{n}"),
            service: "s1".into(),
            place: n.to_string(),
            addr: addr(10 + n),
            aliases: vec![],
            ready,
        };
        Table::build(&NetworkNames {
            id: "n1".into(),
            name: "back".into(),
            services: vec![ServiceNames {
                id: "s1".into(),
                names: vec!["Web".into(), "www".into()],
                vip,
            }],
            tasks: vec![task(1, true), task(2, true), task(3, false)],
        })
    }

    fn sandbox() -> SandboxNames {
        SandboxNames {
            task: "t".into(),
            netns: "/x".into(),
            networks: vec!["n1".into()],
            own: vec!["box".into()],
            addrs: vec![addr(50)],
            external: true,
            nameservers: vec![],
        }
    }

    fn question(name: &str, kind: RecordType) -> Vec<u8> {
        let mut query = Message::query();
        query.add_query(Query::query(Name::from_ascii(name).unwrap(), kind));
        query.to_vec().unwrap()
    }

    fn ask(table: &Table, name: &str) -> Option<Vec<Ipv4Addr>> {
        match decide(&question(name, RecordType::A), &sandbox(), [table], 0) {
            Outcome::Answer(answer) => Some(
                answer
                    .answers
                    .iter()
                    .filter_map(|record| match &record.data {
                        RData::A(A(addr)) => Some(*addr),
                        _ => None,
                    })
                    .collect(),
            ),
            _ => None,
        }
    }

    #[test]
    fn a_service_answers_with_its_virtual_address_under_all_its_names() {
        let table = network(Some(addr(2)));
        for name in ["web", "WEB.", "www", "web.back", "www.back."] {
            assert_eq!(ask(&table, name), Some(vec![addr(2)]), "{name}");
        }
    }

    #[test]
    fn without_virtual_address_the_ready_tasks_answer() {
        let table = network(None);
        assert_eq!(ask(&table, "web"), Some(vec![addr(11), addr(12)]));
    }

    #[test]
    fn the_ready_tasks_answer_to_the_tasks_name() {
        let table = network(Some(addr(2)));
        for name in ["tasks.web", "tasks.www.back."] {
            assert_eq!(ask(&table, name), Some(vec![addr(11), addr(12)]), "{name}");
        }
    }

    #[test]
    fn one_task_has_a_name_even_before_it_is_ready() {
        let table = network(Some(addr(2)));
        assert_eq!(ask(&table, "web.3.task3"), Some(vec![addr(13)]));
        assert_eq!(ask(&table, "web.1.task1.back"), Some(vec![addr(11)]));
    }

    #[test]
    fn a_known_name_has_no_other_kind_of_address() {
        let table = network(Some(addr(2)));
        let outcome = decide(&question("web", RecordType::AAAA), &sandbox(), [&table], 0);
        let Outcome::Answer(answer) = outcome else {
            panic!("{outcome:?}");
        };
        assert_eq!(answer.metadata.response_code, ResponseCode::NoError);
        assert!(answer.answers.is_empty());
    }

    #[test]
    fn other_names_are_somebody_elses() {
        let table = network(None);
        for name in ["example.com", "webx", "1.1.0.10.in-addr.arpa"] {
            assert_eq!(ask(&table, name), None, "{name}");
        }
    }

    #[test]
    fn addresses_have_names() {
        let table = network(Some(addr(2)));
        for (addr, name) in [
            ("2.1.0.10.in-addr.arpa.", "web.back."),
            ("11.1.0.10.in-addr.arpa.", "web.1.task1.back."),
            ("50.1.0.10.in-addr.arpa.", "box."),
        ] {
            let outcome = decide(&question(addr, RecordType::PTR), &sandbox(), [&table], 0);
            let Outcome::Answer(answer) = outcome else {
                panic!("{outcome:?}");
            };
            let RData::PTR(PTR(found)) = &answer.answers[0].data else {
                panic!("{answer:?}");
            };
            assert_eq!(found.to_ascii().to_lowercase(), name);
        }
    }

    #[test]
    fn answers_take_turns() {
        let table = network(None);
        let first = |turn| match decide(&question("web", RecordType::A), &sandbox(), [&table], turn)
        {
            Outcome::Answer(answer) => answer.answers[0].data.clone(),
            other => panic!("{other:?}"),
        };
        assert_ne!(first(0), first(1));
    }

    #[test]
    fn what_does_not_fit_is_left_out_and_marked() {
        let tasks = (0..200)
            .map(|n| TaskNames {
                id: format!("t{n}"),
                service: "s1".into(),
                place: n.to_string(),
                addr: addr(n),
                aliases: vec![],
                ready: true,
            })
            .collect();
        let table = Table::build(&NetworkNames {
            id: "n".into(),
            name: "back".into(),
            services: vec![ServiceNames {
                id: "s1".into(),
                names: vec!["web".into()],
                vip: None,
            }],
            tasks,
        });
        let outcome = decide(&question("web", RecordType::A), &sandbox(), [&table], 0);
        let Outcome::Answer(answer) = outcome else {
            panic!("{outcome:?}");
        };
        let cut = encode(answer.clone(), Some(512)).unwrap();
        assert!(cut.len() <= 512);
        let cut = Message::from_vec(&cut).unwrap();
        assert!(cut.metadata.truncation && cut.answers.len() > 20);
        let whole = Message::from_vec(&encode(answer, None).unwrap()).unwrap();
        assert!(!whole.metadata.truncation);
        assert_eq!(whole.answers.len(), 200);
    }

    proptest! {
        #[test]
        fn any_packet_is_survived(packet in proptest::collection::vec(any::<u8>(), 0..80)) {
            let table = network(None);
            let _ = udp_limit(&packet);
            if let Outcome::Answer(answer) = decide(&packet, &sandbox(), [&table], 7) {
                prop_assert!(encode(answer, Some(512)).is_some_and(|bytes| bytes.len() <= 512));
            }
        }

        #[test]
        fn a_damaged_question_is_survived(at in 0usize..40, value: u8) {
            let table = network(None);
            let mut packet = question("tasks.web.back", RecordType::A);
            let at = at % packet.len();
            packet[at] = value;
            if let Outcome::Answer(answer) = decide(&packet, &sandbox(), [&table], 3) {
                prop_assert!(encode(answer, Some(512)).is_some_and(|bytes| bytes.len() <= 512));
            }
        }
    }
}
