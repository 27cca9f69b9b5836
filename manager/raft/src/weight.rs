//! How much has been applied: when a snapshot is due, and how far back the log is kept.
//!
//! Entries weigh differently: one may carry ten thousand tasks. Counted are the bytes
//! of the log, which the disk keeps and a follower must be sent, and the changes to
//! objects, which a manager that starts again has to make once more. Pure.

use std::collections::VecDeque;
use std::time::Duration;

use tokio::time::Instant;

/// Where in the log the bytes are is known in so many steps of what is kept.
const STEPS: u64 = 64;

/// What has been applied since this manager was started.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Work {
    pub(crate) index: u64,
    pub(crate) bytes: u64,
    pub(crate) changes: u64,
}

/// When a snapshot is due: after any of these since the one before.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Due {
    pub(crate) entries: u64,
    pub(crate) bytes: u64,
    pub(crate) changes: u64,
}

impl Due {
    /// A snapshot costs what it holds. So that the cost stays in proportion, it waits for as much
    /// to be written as the last one was large, and for as many changes as there are objects.
    pub(crate) fn in_proportion(self, snapshot_bytes: u64, objects: u64) -> Self {
        Self {
            bytes: self.bytes.max(snapshot_bytes),
            changes: self.changes.max(objects),
            ..self
        }
    }

    /// Managers apply the same entries, and would all make their snapshots at once: what a quorum has to
    /// answer meanwhile would wait for most of them. This many come before this one.
    pub(crate) fn after_others(self, rank: u64) -> Self {
        let later = |limit: u64| limit.saturating_add(limit.saturating_mul(rank) / 16);
        Self {
            entries: later(self.entries),
            bytes: later(self.bytes),
            changes: later(self.changes),
        }
    }

    /// Whether it is time for one, when the last one was asked for at `before`.
    pub(crate) fn is_due(self, before: Work, now: Work) -> bool {
        now.index >= before.index.saturating_add(self.entries)
            || now.bytes >= before.bytes.saturating_add(self.bytes)
            || now.changes >= before.changes.saturating_add(self.changes)
    }
}

/// Sees when so little happens that a snapshot holds nobody up.
#[derive(Debug)]
pub(crate) struct Lull {
    /// When work was looked at last, and what was done then.
    looked: Option<(Instant, u64)>,
    /// How many looks in a row have found next to nothing.
    quiet: u64,
}

impl Lull {
    /// Between two looks.
    const LASTS: Duration = Duration::from_secs(3);
    /// Next to nothing: such a part of what a snapshot would save a manager that starts again.
    const PART: u64 = 1024;
    /// Looks between one manager's snapshot and the next one's, as they do not look at the same time.
    const TURN: u64 = 2;

    pub(crate) fn new() -> Self {
        Self {
            looked: None,
            quiet: 0,
        }
    }

    /// Whether there is one now, and this manager's turn, before which `rank` others have theirs. The last
    /// snapshot was asked for at `before`.
    pub(crate) fn is(&mut self, at: Instant, before: Work, now: Work, rank: u64) -> bool {
        let Some((since, changes)) = self.looked else {
            self.looked = Some((at, now.changes));
            return false;
        };
        if at.saturating_duration_since(since) < Self::LASTS {
            return false;
        }
        self.looked = Some((at, now.changes));
        let saved = now.changes.saturating_sub(before.changes);
        match now.changes - changes <= saved / Self::PART {
            true => self.quiet += 1,
            false => self.quiet = 0,
        }
        self.quiet > rank.saturating_mul(Self::TURN)
    }
}

/// Weighs entries as they are applied.
#[derive(Debug)]
pub(crate) struct Scales {
    work: Work,
    /// Of the last snapshot.
    snapshot_bytes: u64,
    /// Bytes of the log that are kept behind a snapshot.
    keep: u64,
    /// Work after some entries, oldest first: the first has what is kept behind it, if any has.
    marks: VecDeque<Work>,
}

impl Scales {
    pub(crate) fn new(keep: u64) -> Self {
        Self {
            work: Work::default(),
            snapshot_bytes: 0,
            keep,
            marks: VecDeque::new(),
        }
    }

    pub(crate) fn applied(&mut self, index: u64, bytes: u64, changes: u64) {
        self.work = Work {
            index,
            bytes: self.work.bytes + bytes,
            changes: self.work.changes + changes,
        };
        let step = self.keep / STEPS;
        let last = self.marks.back().map_or(0, |mark| mark.bytes);
        if self.marks.is_empty() || self.work.bytes - last >= step {
            self.marks.push_back(self.work);
        }
        while self.marks.get(1).is_some_and(|mark| self.is_enough(mark)) {
            self.marks.pop_front();
        }
    }

    /// A snapshot of this size was written.
    pub(crate) fn snapshot(&mut self, bytes: u64) {
        self.snapshot_bytes = bytes;
    }

    pub(crate) fn work(&self) -> Work {
        self.work
    }

    pub(crate) fn snapshot_bytes(&self) -> u64 {
        self.snapshot_bytes
    }

    fn is_enough(&self, mark: &Work) -> bool {
        self.work.bytes - mark.bytes >= self.keep
    }

    /// The last entry that is not kept: there is enough after it.
    pub(crate) fn dispensable(&self) -> Option<u64> {
        let first = self.marks.front().filter(|mark| self.is_enough(mark))?;
        Some(first.index)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const DUE: Due = Due {
        entries: 100,
        bytes: 1000,
        changes: 50,
    };

    #[test]
    fn a_snapshot_is_due_after_many_entries_or_bytes_or_changes() {
        let before = Work {
            index: 7,
            bytes: 300,
            changes: 5,
        };
        let after = |index, bytes, changes| Work {
            index: before.index + index,
            bytes: before.bytes + bytes,
            changes: before.changes + changes,
        };
        assert!(!DUE.is_due(before, after(99, 999, 49)));
        assert!(DUE.is_due(before, after(100, 0, 0)));
        assert!(DUE.is_due(before, after(1, 1000, 0)));
        assert!(DUE.is_due(before, after(1, 0, 50)));
        // What a large state costs is not paid after every few changes.
        let large = DUE.in_proportion(5000, 700);
        assert!(!large.is_due(before, after(99, 4999, 699)));
        assert!(large.is_due(before, after(1, 5000, 0)));
        assert!(large.is_due(before, after(1, 0, 700)));
        assert!(large.is_due(before, after(100, 0, 0)));
    }

    #[test]
    fn a_lull_is_when_next_to_nothing_has_happened_for_a_while() {
        let mut lull = Lull::new();
        let begin = Instant::now();
        let mut look = |seconds, changes| {
            let now = Work {
                changes,
                ..Work::default()
            };
            lull.is(
                begin + Duration::from_secs(seconds),
                Work::default(),
                now,
                0,
            )
        };
        assert!(!look(0, 100_000));
        assert!(!look(2, 100_000), "too short");
        assert!(look(3, 100_050));
        assert!(!look(4, 100_050), "too soon after the last look");
        assert!(!look(6, 102_000), "too busy");
        assert!(look(9, 102_000));
    }

    #[test]
    fn managers_take_turns() {
        let begin = Instant::now();
        let mut lulls = [(); 3].map(|()| Lull::new());
        let mut first = |rank: usize| {
            let mut look = |seconds| {
                let at = begin + Duration::from_secs(seconds);
                lulls[rank].is(at, Work::default(), Work::default(), rank as u64)
            };
            (0..60).find(|seconds| look(*seconds)).unwrap()
        };
        assert_eq!([first(0), first(1), first(2)], [3, 9, 15]);
        // One that others have gone before starts from the beginning when it gets busy.
        let busy = Work {
            changes: 5000,
            ..Work::default()
        };
        let mut lull = Lull::new();
        for (seconds, now) in [(0, Work::default()), (3, Work::default()), (6, busy)] {
            assert!(!lull.is(begin + Duration::from_secs(seconds), busy, now, 1));
        }
        let looks: Vec<bool> = [9, 12, 15]
            .map(|seconds| lull.is(begin + Duration::from_secs(seconds), busy, busy, 1))
            .into();
        assert_eq!(looks, [false, false, true]);
        let after: Vec<u64> = (0..3).map(|rank| DUE.after_others(rank).bytes).collect();
        assert_eq!(after, [1000, 1062, 1125]);
    }

    proptest::proptest! {
        #[test]
        fn what_is_kept_is_enough_and_not_much_more(
            sizes in proptest::collection::vec(1..300u64, 1..400),
            keep in 64..5000u64,
        ) {
            let mut scales = Scales::new(keep);
            for (place, &bytes) in sizes.iter().enumerate() {
                scales.applied(place as u64 + 1, bytes, 1);
                let kept_after = |index: u64| sizes[index as usize..=place].iter().sum::<u64>();
                match scales.dispensable() {
                    Some(last) => {
                        let kept = kept_after(last);
                        proptest::prop_assert!(kept >= keep, "{kept} of {keep}");
                        proptest::prop_assert!(kept <= keep + keep / STEPS + 600, "{kept} of {keep}");
                    }
                    None => proptest::prop_assert!(kept_after(1) < keep),
                }
                proptest::prop_assert!(scales.marks.len() as u64 <= 2 * STEPS + 2);
            }
        }
    }
}
