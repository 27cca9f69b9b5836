//! Keeps the data plane's tables equal to the held set.
//!
//! One loop. It always works on the newest held set, so changes that arrive
//! while the kernel is being programmed are taken together. A revision counts
//! as programmed when the tables of all its networks are in the kernel; a
//! network that fails is tried again and holds back the acknowledgement, not
//! the others. A network is forgotten only when none of our tasks is on it.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use futures::future::join_all;
use imbl::OrdMap;
use swarm_proto::NetworkId;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::network::{Dataplane, NetworkView};
use crate::worker::Held;

/// Wait before the kernel is asked again after a failure.
const RETRY: Duration = Duration::from_millis(500);

/// What the kernel should have.
#[derive(Clone, Debug, Default)]
pub(crate) struct Goal {
    pub held: Held,
    /// Networks of tasks that are still being taken down.
    pub lingering: BTreeSet<NetworkId>,
}

/// What the kernel was told.
#[derive(Clone, Debug, Default)]
pub(crate) struct Programmed {
    /// Newest revision of which the kernel has everything; 0 = none.
    pub revision: u64,
    /// The tables, as last told.
    pub networks: OrdMap<NetworkId, Arc<NetworkView>>,
}

pub(crate) async fn run(
    dataplane: Arc<dyn Dataplane>,
    mut goal: watch::Receiver<Goal>,
    programmed: watch::Sender<Programmed>,
    cancel: CancellationToken,
) {
    loop {
        let wanted = goal.borrow_and_update().clone();
        let complete = program(dataplane.as_ref(), &wanted, &programmed).await;
        let retry = async {
            if complete {
                std::future::pending::<()>().await;
            }
            tokio::time::sleep(RETRY).await;
        };
        tokio::select! {
            () = cancel.cancelled() => return,
            changed = goal.changed() => if changed.is_err() { return },
            () = retry => {}
        }
    }
}

/// One pass. True if the kernel has everything.
async fn program(
    dataplane: &dyn Dataplane,
    wanted: &Goal,
    programmed: &watch::Sender<Programmed>,
) -> bool {
    let told = programmed.borrow().networks.clone();
    let changed = wanted.held.networks.iter().filter(|(id, view)| {
        told.get(*id)
            .is_none_or(|told_view| !Arc::ptr_eq(told_view, view))
    });
    let set = join_all(changed.map(|(id, view)| async move {
        let result = dataplane.set_network(view.as_ref().clone()).await;
        if let Err(error) = &result {
            tracing::warn!(network = %id, %error, "cannot program network, trying again");
        } else {
            // Tasks wait for their networks, not for all of them.
            programmed.send_modify(|state| {
                state.networks.insert(id.clone(), view.clone());
            });
        }
        result.is_ok()
    }))
    .await;
    let complete = set.iter().all(|&done| done);
    if complete {
        programmed.send_if_modified(|state| {
            let news = state.revision != wanted.held.revision;
            state.revision = wanted.held.revision;
            news
        });
    }
    let unused = told
        .keys()
        .filter(|id| !wanted.held.networks.contains_key(*id) && !wanted.lingering.contains(*id));
    let forgotten = join_all(unused.map(|id| async move {
        let result = dataplane.forget_network(id).await;
        if let Err(error) = &result {
            tracing::warn!(network = %id, %error, "cannot forget network, trying again");
        } else {
            programmed.send_modify(|state| {
                state.networks.remove(id);
            });
        }
        result.is_ok()
    }))
    .await;
    complete && forgotten.iter().all(|&done| done)
}
