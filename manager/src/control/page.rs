//! Lists in pages: a large list does not fit into one message.
//!
//! A page holds objects in the order of their IDs, and its token is the last ID in it. So nothing
//! is remembered between pages, and any manager can answer the next one. An object that is there
//! all the time is listed exactly once, whatever comes and goes between the pages.

use prost::Message;
use tonic::Status;

/// Encoded bytes of the objects on a page, if no single one is larger.
const PAGE_BYTES: usize = 512 << 10;

/// What a list asks for.
#[derive(Clone, Copy, Debug)]
pub(super) struct Page<'a> {
    /// Most objects; 0 = all in one message.
    size: usize,
    after: &'a str,
}

impl<'a> Page<'a> {
    /// From the fields of a request.
    pub(super) fn of(size: u32, token: &'a str) -> Result<Self, Status> {
        if size == 0 && !token.is_empty() {
            return Err(Status::invalid_argument(
                "a page_token needs a page_size: the most objects of each page",
            ));
        }
        Ok(Self {
            size: size as usize,
            after: token,
        })
    }

    /// The ID after which the page begins.
    pub(super) fn after(&self) -> &'a str {
        self.after
    }

    /// Takes the page off `objects`, which follow [`Page::after`] in the order of their IDs: with
    /// the token of the next page, which is empty after the last one.
    pub(super) fn take<T: Message>(
        &self,
        objects: impl Iterator<Item = T>,
        id: impl Fn(&T) -> &str,
    ) -> (Vec<T>, String) {
        if self.size == 0 {
            return (objects.collect(), String::new());
        }
        let mut page: Vec<T> = Vec::new();
        let mut bytes = 0;
        for object in objects {
            bytes += object.encoded_len();
            if let Some(last) = page.last()
                && (page.len() == self.size || bytes > PAGE_BYTES)
            {
                let token = id(last).to_owned();
                return (page, token);
            }
            page.push(object);
        }
        (page, String::new())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use swarm_proto::v1::{Node, NodeDescription};

    use super::*;

    fn node(id: &str) -> Node {
        Node {
            id: id.to_owned(),
            ..Node::default()
        }
    }

    #[test]
    fn a_token_without_a_size_is_refused() {
        assert!(Page::of(0, "").is_ok());
        assert!(Page::of(1, "x").is_ok());
        assert!(Page::of(0, "x").is_err());
    }

    #[test]
    fn a_large_object_has_a_page_of_its_own() {
        let described = NodeDescription {
            hostname: "x".repeat(PAGE_BYTES + 1),
            ..NodeDescription::default()
        };
        let large = Node {
            description: Some(described),
            ..node("b")
        };
        let all = [node("a"), large, node("c")];
        let mut token = String::new();
        let mut pages = Vec::new();
        loop {
            let page = Page::of(10, &token).unwrap();
            let rest = all
                .iter()
                .filter(|node| node.id.as_str() > page.after())
                .cloned();
            let (objects, next) = page.take(rest, |node| &node.id);
            pages.push(objects.len());
            if next.is_empty() {
                break;
            }
            token = next;
        }
        assert_eq!(pages, [1, 1, 1]);
    }

    proptest! {
        #[test]
        fn what_stays_is_listed_once_whatever_comes_and_goes(
            stays in prop::collection::btree_set("[a-z]{2}", 0..40),
            comes_and_goes in prop::collection::vec(prop::collection::btree_set("[a-z]{2}", 0..40), 1..8),
            size in 1..10_u32,
        ) {
            let mut token = String::new();
            let mut seen = Vec::new();
            for passing in comes_and_goes.iter().cycle() {
                let page = Page::of(size, &token).unwrap();
                let now: std::collections::BTreeSet<_> = stays.union(passing).collect();
                let rest = now.into_iter().filter(|id| id.as_str() > page.after()).map(|id| node(id));
                let (objects, next) = page.take(rest, |node| &node.id);
                prop_assert!(objects.len() <= size as usize);
                prop_assert!(next.is_empty() || !objects.is_empty());
                seen.extend(objects.into_iter().map(|node| node.id));
                if next.is_empty() {
                    break;
                }
                token = next;
            }
            prop_assert!(seen.is_sorted_by(|a, b| a < b), "{seen:?}");
            seen.retain(|id| stays.contains(id));
            prop_assert_eq!(seen, stays.into_iter().collect::<Vec<_>>());
        }
    }
}
