//! Spreads the tasks of a service over nodes, and over groups of nodes first.
//!
//! The tree has one level per preference; a leaf holds the nodes that agree in
//! all of them. Each task goes down the branch with the fewest tasks of its service.

use std::cmp::Reverse;
use std::collections::BTreeMap;
use std::collections::BinaryHeap;
use std::collections::binary_heap::PeekMut;

use swarm_proto::v1::Node;

use super::constraint::label;

/// A label whose values divide the nodes into groups.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Spread {
    engine: bool,
    name: String,
}

/// Text that names no label to spread over.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("cannot spread over {0:?}: expected node.labels.NAME or engine.labels.NAME")]
pub struct SpreadError(pub String);

impl Spread {
    /// Reads "node.labels.zone".
    ///
    /// # Errors
    /// The text names no label.
    pub fn parse(text: &str) -> Result<Self, SpreadError> {
        let text = text.trim();
        let node = label(text, "node.labels.").map(|name| (false, name));
        let found = node.or_else(|| label(text, "engine.labels.").map(|name| (true, name)));
        let (engine, name) = found.ok_or_else(|| SpreadError(text.to_owned()))?;
        Ok(Self { engine, name })
    }

    /// The node's group. Nodes without the label form one.
    pub(crate) fn value<'a>(&self, node: &'a Node) -> &'a str {
        let labels = if self.engine {
            node.description.as_ref().map(|d| &d.engine_labels)
        } else {
            let annotations = node.spec.as_ref().and_then(|s| s.annotations.as_ref());
            annotations.map(|annotations| &annotations.labels)
        };
        let value = labels.and_then(|labels| labels.get(&self.name));
        value.map_or("", String::as_str)
    }
}

/// A node that may take tasks of the group that is being placed.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Candidate {
    /// Index in the mirror.
    pub(crate) node: u32,
    /// How many more tasks fit; at least 1.
    pub(crate) room: u32,
    /// The service's tasks have failed there lately.
    pub(crate) failing: bool,
    /// Tasks of the service on it.
    pub(crate) of_service: u32,
    /// All tasks on it.
    pub(crate) total: u32,
}

/// Order among nodes: healthy ones, then few tasks of the service, then few tasks.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Rank {
    key: u64,
    node: u32,
    room: u32,
}

/// One more task of the service and one more in all.
const ONE_MORE: u64 = (1 << 32) + 1;

impl Rank {
    fn of(candidate: &Candidate) -> Self {
        let of_service = u64::from(candidate.of_service.min(u32::MAX >> 1));
        Self {
            key: u64::from(candidate.failing) << 63 | of_service << 32 | u64::from(candidate.total),
            node: candidate.node,
            room: candidate.room,
        }
    }
}

/// Where the next task goes.
pub(crate) enum Tree {
    Leaf(BinaryHeap<Reverse<Rank>>),
    Fork {
        branches: Vec<Tree>,
        /// (tasks of the service, branch); exhausted branches are gone from it.
        order: BinaryHeap<Reverse<(u64, usize)>>,
    },
}

impl Tree {
    /// The tree over `candidates`. `others` are nodes that take no task but count:
    /// each with the service's tasks on it.
    pub(crate) fn build<'a>(
        candidates: Vec<Candidate>,
        others: &[(u32, u32)],
        preferences: &[Spread],
        node: &impl Fn(u32) -> Option<&'a Node>,
    ) -> Self {
        let Some((first, rest)) = preferences.split_first() else {
            let ranks: Vec<_> = candidates.iter().map(|c| Reverse(Rank::of(c))).collect();
            return Self::Leaf(ranks.into());
        };
        type Part = (Vec<Candidate>, Vec<(u32, u32)>);
        let mut parts: BTreeMap<&str, Part> = BTreeMap::new();
        for candidate in candidates {
            let value = node(candidate.node).map_or("", |node| first.value(node));
            parts.entry(value).or_default().0.push(candidate);
        }
        for &(index, count) in others {
            let value = node(index).map_or("", |node| first.value(node));
            if let Some(part) = parts.get_mut(value) {
                part.1.push((index, count));
            }
        }
        let mut branches = Vec::with_capacity(parts.len());
        let mut order = Vec::with_capacity(parts.len());
        for (at, (mine, theirs)) in parts.into_values().enumerate() {
            let count: u64 = mine.iter().map(|c| u64::from(c.of_service)).sum::<u64>()
                + theirs
                    .iter()
                    .map(|(_, count)| u64::from(*count))
                    .sum::<u64>();
            order.push(Reverse((count, at)));
            branches.push(Self::build(mine, &theirs, rest, node));
        }
        Self::Fork {
            branches,
            order: order.into(),
        }
    }

    /// The node for the next task; `None` when nothing has room.
    pub(crate) fn take(&mut self) -> Option<u32> {
        match self {
            Self::Leaf(ranks) => {
                let mut top = ranks.peek_mut()?;
                let node = top.0.node;
                if top.0.room > 1 {
                    top.0.room -= 1;
                    top.0.key += ONE_MORE;
                } else {
                    PeekMut::pop(top);
                }
                Some(node)
            }
            Self::Fork { branches, order } => loop {
                let mut top = order.peek_mut()?;
                let at = top.0.1;
                if let Some(node) = branches[at].take() {
                    top.0.0 += 1;
                    return Some(node);
                }
                PeekMut::pop(top);
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_labels_can_be_spread_over() {
        assert!(Spread::parse("node.labels.zone").is_ok());
        assert!(Spread::parse(" Engine.Labels.rack ").is_ok());
        for text in ["", "zone", "node.labels.", "node.id", "node.labels.a b"] {
            let error = Spread::parse(text).unwrap_err().to_string();
            assert!(error.contains("expected node.labels.NAME"), "{error}");
        }
    }
}
