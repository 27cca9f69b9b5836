//! Load balancing inside a task's namespace.
//!
//! [`plan`] and [`changes`] are pure: tables in, the wanted balance and the difference out.
//! [`install`] and [`update`] write it as nftables batches: on the output hook one map finds the
//! service's chain by its address, the chain takes the backends in turn. Cost does not grow with services
//! or backends; connections keep the backend they began with. A service without a backend refuses at once.

use std::collections::{BTreeMap, BTreeSet};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::net::Ipv4Addr;

use swarm_proto::TaskId;

use super::NetworkView;
use super::nft::{Batch, Hook, TYPE_IPV4, Value};

/// Where the containers ask for names.
pub const NAMES_ADDR: Ipv4Addr = Ipv4Addr::new(127, 0, 0, 11);
/// Where the name server really listens, so that port 53 is the container's.
pub const NAMES_PORT: u16 = 40053;

const OUTPUT: u32 = 3;
const VIPS: &str = "vips";
const SERVED: &str = "served";

/// Virtual address → the addresses that answer, in the order in which they take turns.
pub type Balance = BTreeMap<Ipv4Addr, Vec<Ipv4Addr>>;

/// One step from one balance to another.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Change {
    /// New backends (none: refuse).
    Set(Ipv4Addr, Vec<Ipv4Addr>),
    /// The service is gone.
    Remove(Ipv4Addr),
}

/// The balance that one task should see. Each task starts the turn elsewhere, so that
/// many clients with one request each spread as well.
#[must_use]
pub fn plan<'a>(task: &TaskId, views: impl IntoIterator<Item = &'a NetworkView>) -> Balance {
    let mut balance = Balance::new();
    for view in views {
        let mut by_service: BTreeMap<&str, Vec<Ipv4Addr>> = BTreeMap::new();
        for endpoint in view.endpoints.values() {
            if endpoint.ready
                && !endpoint.draining
                && let Some(addr) = super::overlay::endpoint_addr(endpoint)
            {
                by_service
                    .entry(endpoint.service_id.as_str())
                    .or_default()
                    .push(addr);
            }
        }
        for service in view.services.values() {
            if let Ok(vip) = service.vip.parse::<Ipv4Addr>() {
                let mut backends = by_service
                    .remove(service.service_id.as_str())
                    .unwrap_or_default();
                backends.sort_by_cached_key(|addr| {
                    let mut hasher = DefaultHasher::new();
                    (task, addr).hash(&mut hasher);
                    (hasher.finish(), *addr)
                });
                backends.dedup();
                balance.insert(vip, backends);
            }
        }
    }
    balance
}

/// The steps from `old` to `new`.
#[must_use]
pub fn changes(old: &Balance, new: &Balance) -> Vec<Change> {
    let removed = old
        .keys()
        .filter(|vip| !new.contains_key(vip))
        .map(|vip| Change::Remove(*vip));
    let set = new
        .iter()
        .filter(|(vip, backends)| old.get(vip) != Some(backends))
        .map(|(vip, backends)| Change::Set(*vip, backends.clone()));
    removed.chain(set).collect()
}

/// Pairs (virtual address, backend) that `new` no longer has.
#[must_use]
pub fn withdrawn(old: &Balance, new: &Balance) -> BTreeSet<(Ipv4Addr, Ipv4Addr)> {
    let pairs = |balance: &Balance| -> BTreeSet<_> {
        balance
            .iter()
            .flat_map(|(vip, backends)| backends.iter().map(|backend| (*vip, *backend)))
            .collect()
    };
    let kept = pairs(new);
    pairs(old).difference(&kept).copied().collect()
}

fn chain_of(vip: Ipv4Addr) -> String {
    format!("svc-{:08x}", u32::from(vip))
}

fn key(vip: Ipv4Addr) -> Vec<u8> {
    vip.octets().to_vec()
}

fn fill_chain(batch: &mut Batch, chain: &str, backends: &[Ipv4Addr]) {
    let values: Vec<Vec<u8>> = backends.iter().map(|addr| key(*addr)).collect();
    let (map, id) = batch.add_numbered_map((TYPE_IPV4, 4), &values);
    batch.add_rule(chain, |rule| {
        rule.next_number(backends.len() as u32)
            .look_up((&map, Some(id)))
            .translate(false);
    });
}

/// Everything a task's namespace needs, in place of whatever is there.
#[must_use]
pub fn install(balance: &Balance) -> Batch {
    let mut batch = Batch::default();
    batch.replace_table();
    batch.add_verdict_map(VIPS, (TYPE_IPV4, 4));
    batch.add_set(SERVED, (TYPE_IPV4, 4), None);
    let mut vips = Vec::new();
    for (vip, backends) in balance.iter().filter(|(_, backends)| !backends.is_empty()) {
        let chain = chain_of(*vip);
        batch.add_chain(&chain, None);
        fill_chain(&mut batch, &chain, backends);
        vips.push((key(*vip), Value::Jump(chain)));
    }
    batch.add_elements(VIPS, &vips);
    let served: Vec<_> = balance.keys().map(|vip| (key(*vip), Value::None)).collect();
    batch.add_elements(SERVED, &served);
    batch.add_chain(
        "balance",
        Some(Hook {
            kind: "nat",
            hook: OUTPUT,
            priority: -100,
        }),
    );
    for protocol in [libc::IPPROTO_UDP, libc::IPPROTO_TCP] {
        batch.add_rule("balance", |rule| {
            rule.destination(NAMES_ADDR)
                .protocol(protocol as u8)
                .destination_port(53)
                .load_target(NAMES_ADDR, Some(NAMES_PORT))
                .translate(true);
        });
    }
    batch.add_rule("balance", |rule| {
        rule.load_destination().jump_by(VIPS);
    });
    // What still goes to a virtual address after the translation has no backend.
    batch.add_chain(
        "refuse",
        Some(Hook {
            kind: "filter",
            hook: OUTPUT,
            priority: 0,
        }),
    );
    batch.add_rule("refuse", |rule| {
        rule.load_destination()
            .is_in(SERVED)
            .protocol(libc::IPPROTO_TCP as u8)
            .reset();
    });
    batch.add_rule("refuse", |rule| {
        rule.load_destination().is_in(SERVED).reject();
    });
    batch
}

/// The difference only. `old` must be what [`install`] or `update` left.
#[must_use]
pub fn update(old: &Balance, new: &Balance) -> Batch {
    let mut batch = Batch::default();
    for change in changes(old, new) {
        let (vip, backends, gone) = match change {
            Change::Set(vip, backends) => (vip, backends, false),
            Change::Remove(vip) => (vip, Vec::new(), true),
        };
        let chain = chain_of(vip);
        let had = old.get(&vip);
        let was_balanced = had.is_some_and(|backends| !backends.is_empty());
        if backends.is_empty() {
            if was_balanced {
                batch.remove_elements(VIPS, &[(key(vip), Value::None)]);
                batch.flush_chain(&chain);
                batch.remove_chain(&chain);
            }
        } else if was_balanced {
            batch.flush_chain(&chain);
            fill_chain(&mut batch, &chain, &backends);
        } else {
            batch.add_chain(&chain, None);
            fill_chain(&mut batch, &chain, &backends);
            batch.add_elements(VIPS, &[(key(vip), Value::Jump(chain))]);
        }
        if gone {
            batch.remove_elements(SERVED, &[(key(vip), Value::None)]);
        } else if had.is_none() {
            batch.add_elements(SERVED, &[(key(vip), Value::None)]);
        }
    }
    batch
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn balances() -> impl Strategy<Value = Balance> {
        proptest::collection::btree_map(
            (0u8..6).prop_map(|n| Ipv4Addr::new(10, 0, 1, n)),
            proptest::collection::btree_set(
                (0u8..6).prop_map(|n| Ipv4Addr::new(10, 0, 2, n)),
                0..4,
            )
            .prop_map(|set| set.into_iter().collect()),
            0..5,
        )
    }

    proptest! {
        #[test]
        fn changes_lead_from_the_old_balance_to_the_new(old in balances(), new in balances()) {
            let mut now = old.clone();
            for change in changes(&old, &new) {
                match change {
                    Change::Set(vip, backends) => { now.insert(vip, backends); }
                    Change::Remove(vip) => { prop_assert!(now.remove(&vip).is_some()); }
                }
            }
            prop_assert_eq!(&now, &new);
            prop_assert!(changes(&new, &new).is_empty());
            prop_assert!(update(&new, &new).is_empty());
            for (vip, backend) in withdrawn(&old, &new) {
                prop_assert!(old[&vip].contains(&backend));
                prop_assert!(!new.get(&vip).is_some_and(|backends| backends.contains(&backend)));
            }
        }
    }
}
