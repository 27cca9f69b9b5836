//! Whether the history of one object is linearizable; if not, its smallest part that shows it.
//!
//! The object is there or not, and holds a value that says which write it is from.
//! Versions must rise along the order that is found. An update that is refused as
//! out of sequence proves only that the object is there: the cluster itself changes
//! objects too, which raises their version.

use std::collections::HashMap;

use super::history::{Answer, Ask, ObjectHistory, Record, Seen};
use crate::linearize::{Call, Model, Verdict, check};

/// Steps after which the search is given up, per object.
const BUDGET: u64 = 20_000_000;
/// The same, for each attempt to leave something out.
const SMALL_BUDGET: u64 = 500_000;

/// The object, and the newest version that was seen of anything under its name.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Object {
    /// Value and ID; an ID that nobody saw is `None`.
    there: Option<(u64, Option<u32>)>,
    version: u64,
}

/// An operation with everything that is known of it.
#[derive(Clone, Debug)]
enum Step {
    Create {
        value: u64,
        id: Option<u32>,
    },
    Update {
        from: u64,
        value: u64,
        id: u32,
    },
    Remove {
        id: Option<u32>,
    },
    Saw(Option<(u64, u32, u64)>),
    Exists,
    /// There is no such object; for an update, none with this ID.
    Gone(Option<u32>),
    Stale(u32),
}

struct Named {
    start: Object,
}

impl Model for Named {
    type State = Object;
    type Op = Step;
    // Remove and create.
    const CHAIN: usize = 2;

    fn start(&self) -> Object {
        self.start.clone()
    }

    fn step(&self, state: &Object, op: &Step) -> Option<Object> {
        let with = |there| Object {
            there,
            version: state.version,
        };
        // Two IDs that may be the same one.
        let same = |a: Option<u32>, b: Option<u32>| a.is_none() || b.is_none() || a == b;
        match (*op).clone() {
            Step::Create { value, id } => state.there.is_none().then(|| with(Some((value, id)))),
            Step::Update { from, value, id } => match state.there {
                Some((now, known)) if now == from && same(known, Some(id)) => {
                    Some(with(Some((value, Some(id)))))
                }
                _ => None,
            },
            Step::Remove { id } => match state.there {
                Some((_, known)) if same(known, id) => Some(with(None)),
                _ => None,
            },
            Step::Saw(None) => state.there.is_none().then(|| state.clone()),
            Step::Saw(Some((value, id, version))) => match state.there {
                Some((now, known))
                    if now == value && same(known, Some(id)) && version >= state.version =>
                {
                    Some(Object {
                        there: state.there,
                        version,
                    })
                }
                _ => None,
            },
            Step::Exists => state.there.is_some().then(|| state.clone()),
            Step::Gone(id) => {
                let other = |known: Option<u32>| id.is_some() && known != id;
                match state.there {
                    None => Some(state.clone()),
                    Some((_, known)) if other(known) => Some(state.clone()),
                    Some(_) => None,
                }
            }
            Step::Stale(id) => match state.there {
                Some((_, known)) if same(known, Some(id)) => Some(state.clone()),
                _ => None,
            },
        }
    }
}

/// Turns records into what the search understands, or says what is impossible at first sight.
fn steps(history: &ObjectHistory) -> Result<(Named, Vec<Call<Step>>), String> {
    let mut numbers: HashMap<String, u32> = HashMap::new();
    let mut number = |id: &str| -> u32 {
        let next = u32::try_from(numbers.len()).unwrap_or(u32::MAX);
        match numbers.get(id) {
            Some(&known) => known,
            None => {
                numbers.insert(id.to_owned(), next);
                next
            }
        }
    };
    // Who saw each value first, and with which ID.
    let mut first_seen: HashMap<u64, (u64, u32)> = HashMap::new();
    for record in &history.records {
        if let Answer::Saw(Some(seen)) = &record.answer {
            let id = number(&seen.id);
            let first = first_seen.entry(seen.value).or_insert((record.ret, id));
            if first.1 != id {
                return Err(format!("value {} was seen under two IDs", seen.value));
            }
            first.0 = first.0.min(record.ret);
        }
    }
    let start = history
        .start
        .as_ref()
        .map(|seen| (seen.value, Some(number(&seen.id))));
    let mut calls = Vec::with_capacity(history.records.len());
    for record in &history.records {
        let mut ret = Some(record.ret);
        // A write of unknown outcome whose value was seen has happened, before that.
        let written = match &record.ask {
            Ask::Create(value) | Ask::Update(_, value) => first_seen.get(value).copied(),
            Ask::Remove | Ask::Get => None,
        };
        if record.answer == Answer::Unknown {
            ret = written.map(|(seen, _)| seen);
            if ret.is_some_and(|ret| ret <= record.call) {
                return Err("a value was seen before it was written".into());
            }
        }
        let op = match (&record.ask, &record.answer) {
            (Ask::Get, Answer::Saw(None)) => Step::Saw(None),
            (Ask::Get, Answer::Saw(Some(seen))) => {
                Step::Saw(Some((seen.value, number(&seen.id), seen.version)))
            }
            (Ask::Create(value), Answer::Done(id)) => Step::Create {
                value: *value,
                id: Some(number(id)),
            },
            (Ask::Create(value), Answer::Unknown) => Step::Create {
                value: *value,
                id: written.map(|(_, id)| id),
            },
            (Ask::Create(_), Answer::Exists) => Step::Exists,
            (Ask::Update(seen, value), Answer::Done(_) | Answer::Unknown) => Step::Update {
                from: seen.value,
                value: *value,
                id: number(&seen.id),
            },
            (Ask::Update(seen, _), Answer::Stale) => Step::Stale(number(&seen.id)),
            (Ask::Update(seen, _), Answer::Gone) => Step::Gone(Some(number(&seen.id))),
            (Ask::Remove, Answer::Done(id)) => Step::Remove {
                id: Some(number(id)),
            },
            (Ask::Remove, Answer::Unknown) => Step::Remove { id: None },
            (Ask::Remove, Answer::Gone) => Step::Gone(None),
            // A read without an answer says nothing.
            (Ask::Get, Answer::Unknown) => continue,
            (ask, answer) => return Err(format!("{ask:?} was answered {answer:?}")),
        };
        calls.push(Call {
            call: record.call,
            ret,
            op,
        });
    }
    let start = Object {
        there: start,
        version: history.start.as_ref().map_or(0, |seen| seen.version),
    };
    Ok((Named { start }, calls))
}

fn judge(history: &ObjectHistory, budget: u64) -> Verdict {
    match steps(history) {
        Ok((model, calls)) => check(&model, &calls, budget),
        Err(_) => Verdict::Violation,
    }
}

/// Checks the history of one object.
#[must_use]
pub fn verdict(history: &ObjectHistory) -> Verdict {
    judge(history, BUDGET)
}

/// A smaller history that is not linearizable either, for a person to read: the beginning up
/// to where it goes wrong, without what does not matter. Each step only takes
/// requirements away, so what remains is proof against the whole.
#[must_use]
pub fn smallest(history: &ObjectHistory) -> Vec<Record> {
    let wrong = |records: &[Record]| {
        let part = ObjectHistory {
            start: history.start.clone(),
            records: records.to_vec(),
        };
        judge(&part, SMALL_BUDGET) == Verdict::Violation
    };
    let until = |tick: u64| -> Vec<Record> {
        let called = history.records.iter().filter(|record| record.call <= tick);
        called
            .map(|record| match record.ret > tick {
                true => Record {
                    answer: Answer::Unknown,
                    ..record.clone()
                },
                false => record.clone(),
            })
            .collect()
    };
    let mut ends: Vec<u64> = history.records.iter().map(|record| record.ret).collect();
    ends.sort_unstable();
    let shortest = ends.partition_point(|&end| !wrong(&until(end)));
    let mut records = match ends.get(shortest) {
        Some(&end) => until(end),
        None => history.records.clone(),
    };
    records.sort_by_key(|record| record.call);
    let mut at = records.len();
    while at > 0 {
        at -= 1;
        let effect_free = matches!(
            records[at].answer,
            Answer::Saw(_) | Answer::Exists | Answer::Gone | Answer::Stale
        ) || records[at].ask == Ask::Get;
        let mut without = records.clone();
        if effect_free {
            without.remove(at);
        } else {
            // A write may not be left out, but it may be allowed to happen at any time or never.
            without[at].answer = Answer::Unknown;
            without[at].call = 0;
        }
        if without != records && wrong(&without) {
            records = without;
        }
    }
    // Writes that may be whenever they like matter only if somebody saw them.
    let seen: Vec<u64> = records
        .iter()
        .filter_map(saw)
        .map(|seen| seen.value)
        .collect();
    let from: Vec<u64> = records
        .iter()
        .filter_map(|record| match (&record.ask, record.call) {
            (Ask::Update(seen, _), 1..) => Some(seen.value),
            _ => None,
        })
        .collect();
    records.retain(|record| match record.ask {
        Ask::Create(value) | Ask::Update(_, value) => {
            record.call > 0 || seen.contains(&value) || from.contains(&value)
        }
        Ask::Remove => record.call > 0,
        Ask::Get => true,
    });
    records
}

fn saw(record: &Record) -> Option<&Seen> {
    match &record.answer {
        Answer::Saw(seen) => seen.as_ref(),
        _ => None,
    }
}

/// The history with one read changed to an answer that was true earlier, if there is such a
/// read: a negative control, which the check must find.
#[must_use]
pub fn with_a_stale_read(history: &ObjectHistory) -> Option<ObjectHistory> {
    let mut reads: Vec<usize> = (0..history.records.len())
        .filter(|&at| saw(&history.records[at]).is_some())
        .collect();
    reads.sort_by_key(|&at| history.records[at].call);
    for (position, &late) in reads.iter().enumerate() {
        let newer = saw(&history.records[late])?;
        // Somebody has seen the same before this one was called…
        let known = reads[..position].iter().any(|&at| {
            let record = &history.records[at];
            saw(record) == Some(newer) && record.ret < history.records[late].call
        });
        // …and something older before.
        let old = reads[..position]
            .iter()
            .find_map(|&at| saw(&history.records[at]).filter(|seen| seen.version < newer.version));
        if let (true, Some(old)) = (known, old) {
            let mut changed = history.clone();
            changed.records[late].answer = Answer::Saw(Some(old.clone()));
            return Some(changed);
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::super::history::Who;
    use super::*;

    fn seen(value: u64, version: u64) -> Seen {
        Seen {
            value,
            id: "a".into(),
            version,
        }
    }

    fn record(call: u64, ret: u64, ask: Ask, answer: Answer) -> Record {
        Record {
            call,
            ret,
            ask,
            answer,
            who: Who { client: 1, host: 1 },
            at: Duration::ZERO,
        }
    }

    fn of(records: Vec<Record>) -> ObjectHistory {
        ObjectHistory {
            start: None,
            records,
        }
    }

    fn done() -> Answer {
        Answer::Done("a".into())
    }

    fn get(call: u64, ret: u64, what: Option<Seen>) -> Record {
        record(call, ret, Ask::Get, Answer::Saw(what))
    }

    /// Made, changed, read, removed, made again.
    fn life() -> Vec<Record> {
        vec![
            get(1, 2, None),
            record(3, 6, Ask::Create(1), done()),
            record(4, 7, Ask::Create(2), Answer::Exists),
            get(5, 8, Some(seen(1, 10))),
            record(9, 12, Ask::Update(seen(1, 10), 3), done()),
            record(10, 13, Ask::Update(seen(1, 10), 4), Answer::Stale),
            get(14, 15, Some(seen(3, 11))),
            record(16, 17, Ask::Remove, done()),
            record(18, 19, Ask::Update(seen(3, 11), 5), Answer::Gone),
            get(20, 21, None),
            record(22, 23, Ask::Create(6), Answer::Done("b".into())),
            record(24, 25, Ask::Update(seen(3, 11), 7), Answer::Gone),
        ]
    }

    #[test]
    fn a_life_is_linearizable_and_each_lie_about_it_is_not() {
        assert_eq!(verdict(&of(life())), Verdict::Linearizable);
        let lie = |at: usize, answer: Answer| {
            let mut records = life();
            records[at].answer = answer;
            assert_eq!(verdict(&of(records)), Verdict::Violation, "record {at}");
        };
        lie(0, Answer::Saw(Some(seen(1, 10))));
        lie(2, done());
        // A lost update: both changed the same.
        lie(5, done());
        lie(6, Answer::Saw(Some(seen(1, 10))));
        // The version goes back.
        lie(6, Answer::Saw(Some(seen(3, 9))));
        lie(7, Answer::Gone);
        lie(8, done());
        lie(9, Answer::Saw(Some(seen(3, 11))));
        lie(11, Answer::Stale);
    }

    #[test]
    fn a_write_of_unknown_outcome_that_was_seen_has_happened() {
        let mut records = life();
        records[4].answer = Answer::Unknown;
        records[7].answer = Answer::Unknown;
        assert_eq!(verdict(&of(records.clone())), Verdict::Linearizable);
        // Never removed, but gone.
        records.remove(7);
        assert_eq!(verdict(&of(records)), Verdict::Violation);
        // Seen before it was asked for.
        let records = vec![
            get(1, 2, Some(seen(1, 5))),
            record(3, 4, Ask::Create(1), Answer::Unknown),
        ];
        assert_eq!(verdict(&of(records)), Verdict::Violation);
        // Removed and made again by requests without an answer.
        let records = vec![
            record(1, 2, Ask::Create(1), done()),
            record(3, 4, Ask::Remove, Answer::Unknown),
            record(5, 6, Ask::Create(2), Answer::Unknown),
            record(7, 8, Ask::Remove, Answer::Done("b".into())),
            get(9, 10, None),
        ];
        assert_eq!(verdict(&of(records)), Verdict::Linearizable);
    }

    #[test]
    fn what_is_shown_of_a_violation_is_only_what_matters() {
        let mut records = life();
        // Long before and after it.
        for number in 0..50 {
            let at = 100 + 10 * number;
            records.push(get(
                at,
                at + 1,
                Some(Seen {
                    id: "b".into(),
                    ..seen(6, 30)
                }),
            ));
        }
        records[6].answer = Answer::Saw(Some(seen(1, 10)));
        let shown = smallest(&of(records));
        assert!((1..=4).contains(&shown.len()), "{shown:#?}");
        assert!(shown.iter().any(|record| record.call == 14), "{shown:#?}");
        assert_eq!(verdict(&of(shown)), Verdict::Violation);
    }

    #[test]
    fn a_stale_read_put_into_a_good_history_is_found() {
        let mut records = life();
        records.insert(8, get(151, 152, Some(seen(3, 11))));
        for record in &mut records[9..] {
            record.call += 200;
            record.ret += 200;
        }
        // The removal comes after the second read.
        records[7].call = 160;
        records[7].ret = 161;
        let good = of(records);
        assert_eq!(verdict(&good), Verdict::Linearizable);
        let bad = with_a_stale_read(&good).expect("there is a read to change");
        assert_eq!(verdict(&bad), Verdict::Violation);
    }
}
