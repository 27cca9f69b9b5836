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
}

impl Lull {
    /// How long there must be next to nothing to do.
    const LASTS: Duration = Duration::from_secs(5);
    /// Next to nothing: such a part of what a snapshot would save a manager that starts again.
    const PART: u64 = 1024;

    pub(crate) fn new() -> Self {
        Self { looked: None }
    }

    /// Whether there is one now. The last snapshot was asked for at `before`.
    pub(crate) fn is(&mut self, at: Instant, before: Work, now: Work) -> bool {
        let Some((since, changes)) = self.looked else {
            self.looked = Some((at, now.changes));
            return false;
        };
        if at.saturating_duration_since(since) < Self::LASTS {
            return false;
        }
        self.looked = Some((at, now.changes));
        let saved = now.changes.saturating_sub(before.changes);
        now.changes - changes <= saved / Self::PART
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
            lull.is(begin + Duration::from_secs(seconds), Work::default(), now)
        };
        assert!(!look(0, 100_000));
        assert!(!look(4, 100_000), "too short");
        assert!(look(5, 100_050));
        assert!(!look(6, 100_050), "too soon after the last look");
        assert!(!look(10, 102_000), "too busy");
        assert!(look(15, 102_000));
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
