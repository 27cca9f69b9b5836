//! Whether a history of concurrent operations on one object could have happened one at a time.
//!
//! The search of Wing and Gong, with Lowe's memory of configurations that were seen
//! before: an operation takes effect at one moment between its call and its return,
//! so among the operations that were called before the first return one must come
//! next. The search takes one that the model allows, goes on, and comes back when a
//! return is reached whose operation has not been taken. Pure; histories of different
//! objects are checked each by itself, because linearizability is local.
//!
//! Operations whose outcome is not known may take effect at any time after their call,
//! or never. Trying them everywhere would double the search with each of them, so they
//! are tried last, and only directly before an operation that would be impossible
//! without them. That misses nothing where an operation that is possible in two states
//! changes neither or leads both to the same one: an effect that is not needed yet can
//! then be put off, or is never needed. Registers, their compare-and-swap, creation and
//! removal are like that; a counter is not.

use std::collections::HashSet;
use std::hash::Hash;

/// What an object is meant to do.
pub trait Model {
    /// The object's state.
    type State: Clone + Eq + Hash;
    /// An operation with its outcome.
    type Op;

    /// How many operations without outcome it takes, at most, to get from one state to
    /// any other that they can lead to.
    const CHAIN: usize;

    /// Before the first operation.
    fn start(&self) -> Self::State;

    /// The state after `op`, or `None` if its outcome is impossible in `state`.
    fn step(&self, state: &Self::State, op: &Self::Op) -> Option<Self::State>;
}

/// One operation and when it was under way, by a clock that all clients share.
#[derive(Clone, Debug)]
pub struct Call<Op> {
    /// Before it was sent.
    pub call: u64,
    /// After it was answered; `None` if the outcome is not known.
    pub ret: Option<u64>,
    /// What was done, and what was answered.
    pub op: Op,
}

/// What the search found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// An order exists.
    Linearizable,
    /// None does.
    Violation,
    /// The search was given up after so many steps.
    GaveUp,
}

/// The end of the list, and its beginning.
const NIL: usize = usize::MAX;

/// Calls and returns of the operations that are not taken yet, in order of time.
struct Timeline {
    /// Operation, and whether this is its return.
    entries: Vec<(usize, bool)>,
    times: Vec<u64>,
    next: Vec<usize>,
    prev: Vec<usize>,
    first: usize,
    /// Entry of each operation's call and return.
    places: Vec<(usize, usize)>,
}

impl Timeline {
    fn new<Op>(calls: &[Call<Op>]) -> Self {
        let mut events: Vec<(u64, bool, usize)> = Vec::new();
        for (index, call) in calls.iter().enumerate() {
            if let Some(ret) = call.ret {
                events.push((call.call, false, index));
                events.push((ret, true, index));
            }
        }
        events.sort_unstable();
        let count = events.len();
        let mut places = vec![(NIL, NIL); calls.len()];
        for (entry, (_, is_return, index)) in events.iter().enumerate() {
            match is_return {
                false => places[*index].0 = entry,
                true => places[*index].1 = entry,
            }
        }
        Self {
            entries: events
                .iter()
                .map(|(_, ret, index)| (*index, *ret))
                .collect(),
            times: events.iter().map(|(time, ..)| *time).collect(),
            next: (1..=count)
                .map(|at| if at == count { NIL } else { at })
                .collect(),
            prev: (0..count)
                .map(|at| at.checked_sub(1).unwrap_or(NIL))
                .collect(),
            first: if count == 0 { NIL } else { 0 },
            places,
        }
    }

    fn unlink(&mut self, entry: usize) {
        let (prev, next) = (self.prev[entry], self.next[entry]);
        match prev {
            NIL => self.first = next,
            prev => self.next[prev] = next,
        }
        if next != NIL {
            self.prev[next] = prev;
        }
    }

    fn relink(&mut self, entry: usize) {
        let (prev, next) = (self.prev[entry], self.next[entry]);
        match prev {
            NIL => self.first = entry,
            prev => self.next[prev] = entry,
        }
        if next != NIL {
            self.prev[next] = entry;
        }
    }

    fn take(&mut self, index: usize) {
        let (call, ret) = self.places[index];
        self.unlink(call);
        self.unlink(ret);
    }

    fn give_back(&mut self, index: usize) {
        let (call, ret) = self.places[index];
        self.relink(ret);
        self.relink(call);
    }

    /// When the first return is.
    fn horizon(&self) -> u64 {
        let mut at = self.first;
        while at != NIL && !self.entries[at].1 {
            at = self.next[at];
        }
        if at == NIL { u64::MAX } else { self.times[at] }
    }
}

/// Where the search looks for the operation that comes next.
#[derive(Clone, Copy)]
enum Cursor {
    /// At this entry of the timeline.
    Known(usize),
    /// At this one of the operations without outcome.
    Open(usize),
}

/// A choice that was made, and what to go back to.
struct Choice<S> {
    cursor: Cursor,
    state: S,
    chain: Option<Chain<S>>,
}

/// Operations without outcome that were just taken: how many, and the state before them.
#[derive(Clone)]
struct Chain<S> {
    length: usize,
    before: S,
}

/// Looks for an order, for at most `budget` steps.
pub fn check<M: Model>(model: &M, calls: &[Call<M::Op>], budget: u64) -> Verdict {
    let mut timeline = Timeline::new(calls);
    let mut open: Vec<usize> = (0..calls.len())
        .filter(|&index| calls[index].ret.is_none())
        .collect();
    open.sort_unstable_by_key(|&index| calls[index].call);
    let mut open_taken = vec![false; open.len()];
    let mut state = model.start();
    let mut chain: Option<Chain<M::State>> = None;
    // Which operations are taken, as a sum: exact enough at 128 bits.
    let mut taken = 0_u128;
    let mut seen: HashSet<(u128, M::State)> = HashSet::new();
    let mut stack: Vec<Choice<M::State>> = Vec::new();
    let mut cursor = Cursor::Known(timeline.first);
    let mut steps = 0;
    while timeline.first != NIL {
        steps += 1;
        if steps > budget {
            return Verdict::GaveUp;
        }
        match cursor {
            Cursor::Known(at) if at != NIL && !timeline.entries[at].1 => {
                let index = timeline.entries[at].0;
                let op = &calls[index].op;
                let needs_chain = chain
                    .as_ref()
                    .is_none_or(|chain| model.step(&chain.before, op).is_none());
                let mark = taken ^ fingerprint(index);
                match model.step(&state, op).filter(|_| needs_chain) {
                    Some(new) if seen.insert((mark, new.clone())) => {
                        stack.push(Choice {
                            cursor,
                            state: std::mem::replace(&mut state, new),
                            chain: chain.take(),
                        });
                        taken = mark;
                        timeline.take(index);
                        cursor = Cursor::Known(timeline.first);
                    }
                    _ => cursor = Cursor::Known(timeline.next[at]),
                }
            }
            Cursor::Known(_) => {
                let more = chain.as_ref().is_none_or(|chain| chain.length < M::CHAIN);
                cursor = Cursor::Open(if more { 0 } else { open.len() });
            }
            Cursor::Open(at) if at < open.len() && calls[open[at]].call < timeline.horizon() => {
                let changed = (!open_taken[at])
                    .then(|| model.step(&state, &calls[open[at]].op))
                    .flatten()
                    .filter(|new| *new != state);
                let Some(new) = changed else {
                    cursor = Cursor::Open(at + 1);
                    continue;
                };
                let longer = match &chain {
                    Some(chain) => Chain {
                        length: chain.length + 1,
                        before: chain.before.clone(),
                    },
                    None => Chain {
                        length: 1,
                        before: state.clone(),
                    },
                };
                stack.push(Choice {
                    cursor,
                    state: std::mem::replace(&mut state, new),
                    chain: chain.replace(longer),
                });
                taken ^= fingerprint(open[at]);
                open_taken[at] = true;
                cursor = Cursor::Known(timeline.first);
            }
            Cursor::Open(_) => {
                // Somebody's return is reached: an earlier choice was wrong.
                let Some(choice) = stack.pop() else {
                    return Verdict::Violation;
                };
                state = choice.state;
                chain = choice.chain;
                cursor = match choice.cursor {
                    Cursor::Known(at) => {
                        let index = timeline.entries[at].0;
                        timeline.give_back(index);
                        taken ^= fingerprint(index);
                        Cursor::Known(timeline.next[at])
                    }
                    Cursor::Open(at) => {
                        open_taken[at] = false;
                        taken ^= fingerprint(open[at]);
                        Cursor::Open(at + 1)
                    }
                };
            }
        }
    }
    Verdict::Linearizable
}

/// A number per operation, the sums of which tell sets of operations apart.
fn fingerprint(index: usize) -> u128 {
    let half = |seed: u64| {
        // splitmix64
        let mut z = (index as u64).wrapping_mul(2).wrapping_add(seed);
        z = z.wrapping_mul(0x9e37_79b9_7f4a_7c15);
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    };
    u128::from(half(1)) << 64 | u128::from(half(2))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A register that starts at 0.
    struct Register;

    #[derive(Clone, Debug)]
    enum Op {
        Write(u32),
        Read(u32),
        /// Compare and swap, and whether it succeeded.
        Swap(u32, u32, bool),
    }

    impl Model for Register {
        type State = u32;
        type Op = Op;
        const CHAIN: usize = 1;

        fn start(&self) -> u32 {
            0
        }

        fn step(&self, state: &u32, op: &Op) -> Option<u32> {
            match *op {
                Op::Write(value) => Some(value),
                Op::Read(value) => (*state == value).then_some(value),
                Op::Swap(from, to, true) => (*state == from).then_some(to),
                Op::Swap(from, _, false) => (*state != from).then_some(*state),
            }
        }
    }

    fn at(call: u64, ret: u64, op: Op) -> Call<Op> {
        Call {
            call,
            ret: Some(ret),
            op,
        }
    }

    fn open(call: u64, op: Op) -> Call<Op> {
        Call {
            call,
            ret: None,
            op,
        }
    }

    fn verdict(calls: &[Call<Op>]) -> Verdict {
        check(&Register, calls, 1_000_000)
    }

    use Op::{Read, Swap, Write};
    use Verdict::{Linearizable, Violation};

    #[test]
    fn overlapping_operations_may_come_in_any_order() {
        // The write is seen before it returns, and not yet by one that began after it.
        let calls = [at(0, 9, Write(1)), at(1, 3, Read(1)), at(2, 4, Read(0))];
        assert_eq!(verdict(&calls), Linearizable);
        assert_eq!(verdict(&[]), Linearizable);
    }

    #[test]
    fn a_stale_read_is_a_violation() {
        let calls = [at(0, 1, Write(1)), at(2, 3, Read(0))];
        assert_eq!(verdict(&calls), Violation);
        // Also when another has seen the write already, while it was under way.
        let calls = [at(0, 9, Write(1)), at(1, 2, Read(1)), at(3, 4, Read(0))];
        assert_eq!(verdict(&calls), Violation);
    }

    #[test]
    fn a_lost_update_is_a_violation() {
        // Both succeed from the same value: one of them was lost.
        let calls = [at(0, 5, Swap(0, 1, true)), at(1, 6, Swap(0, 2, true))];
        assert_eq!(verdict(&calls), Violation);
        let calls = [at(0, 5, Swap(0, 1, true)), at(1, 6, Swap(0, 2, false))];
        assert_eq!(verdict(&calls), Linearizable);
        // An acknowledged write that is gone.
        let calls = [at(0, 1, Write(1)), at(2, 3, Write(2)), at(4, 5, Read(1))];
        assert_eq!(verdict(&calls), Violation);
    }

    #[test]
    fn an_operation_without_outcome_happens_later_or_never_but_not_earlier_and_only_once() {
        let never = [open(0, Write(1)), at(1, 2, Read(0)), at(3, 4, Read(0))];
        assert_eq!(verdict(&never), Linearizable);
        let late = [open(0, Write(1)), at(1, 2, Read(0)), at(3, 4, Read(1))];
        assert_eq!(verdict(&late), Linearizable);
        let early = [at(1, 2, Read(1)), open(3, Write(1))];
        assert_eq!(verdict(&early), Violation);
        let twice = [
            open(0, Write(1)),
            at(1, 2, Read(1)),
            at(3, 4, Write(0)),
            at(5, 6, Read(1)),
        ];
        assert_eq!(verdict(&twice), Violation);
    }

    #[test]
    fn the_example_of_the_literature_needs_coming_back() {
        // Three concurrent writes; the reads fix an order that is not that of the calls.
        let calls = [
            at(0, 10, Write(1)),
            at(1, 11, Write(2)),
            at(2, 12, Write(3)),
            at(13, 14, Read(1)),
            at(3, 5, Read(3)),
            at(6, 8, Read(2)),
        ];
        assert_eq!(verdict(&calls), Linearizable);
        let calls = [
            at(0, 10, Write(1)),
            at(1, 11, Write(2)),
            at(3, 5, Read(2)),
            at(6, 8, Read(1)),
            at(13, 14, Read(2)),
        ];
        assert_eq!(verdict(&calls), Violation);
    }

    /// What really happens to a register under `clients` clients, each operation taking
    /// effect somewhere between its call and its return.
    fn real(count: usize, clients: usize, seed: u64, unknown: u64) -> Vec<Call<Op>> {
        let mut random = seed;
        let mut next = |below: u64| {
            random = random
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1);
            (random >> 33) % below
        };
        let mut now = 0;
        let mut value = 0;
        let mut calls = Vec::new();
        // Per client: what is under way, and whether it has taken effect.
        let mut running: Vec<Option<(u64, Op, bool)>> = vec![None; clients];
        // To the end of what is under way.
        while calls.len() < count || running.iter().any(Option::is_some) {
            now += 1;
            let client = next(clients as u64) as usize;
            match running[client].take() {
                None if calls.len() >= count => {}
                None => {
                    let op = match next(3) {
                        0 => Write(now as u32),
                        1 => Read(0),
                        _ => Swap(value, now as u32, false),
                    };
                    running[client] = Some((now, op, false));
                }
                Some((call, op, false)) => {
                    let op = match op {
                        Write(new) => {
                            value = new;
                            op
                        }
                        Read(_) => Read(value),
                        Swap(from, to, _) => {
                            let swapped = value == from;
                            if swapped {
                                value = to;
                            }
                            Swap(from, to, swapped)
                        }
                    };
                    running[client] = Some((call, op, true));
                }
                Some((call, op, true)) => {
                    let lost = matches!(op, Write(_)) && next(100) < unknown;
                    calls.push(Call {
                        call,
                        ret: (!lost).then_some(now),
                        op,
                    });
                }
            }
        }
        calls
    }

    #[test]
    fn what_really_happened_is_linearizable_and_a_changed_read_is_not() {
        for seed in 0..200 {
            let mut calls = real(60, 5, seed, 10);
            assert_eq!(verdict(&calls), Linearizable, "seed {seed}");
            let read = calls.iter_mut().find_map(|call| match &mut call.op {
                Read(value) => Some(value),
                _ => None,
            });
            *read.expect("a third are reads") = u32::MAX;
            assert_eq!(verdict(&calls), Violation, "seed {seed}");
        }
    }

    #[test]
    fn long_histories_cost_little_more_than_their_length() {
        // Steps, not seconds: the machine may be busy.
        let count = 50_000;
        let calls = real(count, 4, 7, 0);
        assert_eq!(check(&Register, &calls, 100 * count as u64), Linearizable);
        assert_eq!(check(&Register, &calls, 1000), Verdict::GaveUp);
        let calls = real(5_000, 4, 7, 1);
        assert!(calls.iter().filter(|call| call.ret.is_none()).count() > 5);
        assert_eq!(verdict(&calls), Linearizable);
    }
}
