//! The free numbers of a range, as a map of gaps.

use imbl::OrdMap;

/// A set of free `u32`s, kept as maximal runs: a /16 that is filled in order
/// is one entry, and cloning is O(1) whatever it holds.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct FreeRanges {
    /// First of a run → last of it. Runs neither touch nor overlap.
    runs: OrdMap<u32, u32>,
}

impl FreeRanges {
    /// All of `first..=last`; nothing when `first > last`.
    pub(crate) fn new(first: u32, last: u32) -> Self {
        let runs = match first <= last {
            true => OrdMap::unit(first, last),
            false => OrdMap::new(),
        };
        Self { runs }
    }

    /// The run that `number` is in.
    fn run_of(&self, number: u32) -> Option<(u32, u32)> {
        let (&first, &last) = self.runs.get_prev(&number)?;
        (number <= last).then_some((first, last))
    }

    /// Takes this number; false when it is not free.
    pub(crate) fn take(&mut self, number: u32) -> bool {
        let Some((first, last)) = self.run_of(number) else {
            return false;
        };
        self.runs.remove(&first);
        if first < number {
            self.runs.insert(first, number - 1);
        }
        if number < last {
            self.runs.insert(number + 1, last);
        }
        true
    }

    /// Takes the first free number from `start` on, or else the lowest.
    pub(crate) fn take_from(&mut self, start: u32) -> Option<u32> {
        let number = match self.run_of(start) {
            Some(_) => start,
            None => match self.runs.get_next(&start) {
                Some((&next, _)) => next,
                None => self.runs.get_min()?.0,
            },
        };
        self.take(number).then_some(number)
    }

    /// Gives a number back; false when it is free already.
    pub(crate) fn give(&mut self, number: u32) -> bool {
        if self.run_of(number).is_some() {
            return false;
        }
        let (mut first, mut last) = (number, number);
        if let Some((&before, &end)) = self.runs.get_prev(&number)
            && end.checked_add(1) == Some(number)
        {
            self.runs.remove(&before);
            first = before;
        }
        if let Some(next) = number.checked_add(1)
            && let Some(end) = self.runs.remove(&next)
        {
            last = end;
        }
        self.runs.insert(first, last);
        true
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_number_that_was_given_back_is_the_last_to_be_taken_again() {
        let mut free = FreeRanges::new(10, 13);
        let mut next = 10;
        let mut take = |free: &mut FreeRanges| {
            let taken = free.take_from(next);
            next = taken.map_or(next, |taken| taken + 1);
            taken
        };
        assert_eq!(take(&mut free), Some(10));
        assert_eq!(take(&mut free), Some(11));
        assert!(free.give(10));
        assert_eq!(take(&mut free), Some(12));
        assert_eq!(take(&mut free), Some(13));
        assert_eq!(take(&mut free), Some(10));
        assert_eq!(take(&mut free), None);
    }

    #[derive(Clone, Debug)]
    enum Step {
        Take(u32),
        TakeFrom(u32),
        Give(u32),
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            (0..40u32).prop_map(Step::Take),
            (0..40u32).prop_map(Step::TakeFrom),
            (5..35u32).prop_map(Step::Give),
        ]
    }

    proptest! {
        #[test]
        fn it_agrees_with_a_plain_set(steps in prop::collection::vec(step(), 0..200)) {
            let mut free = FreeRanges::new(5, 34);
            let mut plain: BTreeSet<u32> = (5..35).collect();
            for step in steps {
                match step {
                    Step::Take(number) => prop_assert_eq!(free.take(number), plain.remove(&number)),
                    Step::TakeFrom(start) => {
                        let expected = plain.range(start..).next().or(plain.first()).copied();
                        prop_assert_eq!(free.take_from(start), expected);
                        expected.map(|number| plain.remove(&number));
                    }
                    Step::Give(number) => prop_assert_eq!(free.give(number), plain.insert(number)),
                }
                let runs = free.runs.iter().flat_map(|(&first, &last)| first..=last);
                prop_assert!(runs.eq(plain.iter().copied()));
                let touching = free.runs.values().any(|last| free.runs.contains_key(&(last + 1)));
                prop_assert!(!touching);
            }
        }
    }
}
