//! Keeping the certificate alive: one loop that asks a manager for the next one in time.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::cert::Renewal;
use crate::identity::Identity;
use crate::join::{JoinError, renew_certificate};
use crate::keystore::{KeyStore, Stored};

const RETRY_FIRST: Duration = Duration::from_millis(500);
const RETRY_MAX: Duration = Duration::from_secs(60);

/// Renews the certificate at a random point between half and four fifths of its
/// life, and at once whenever `role` (what the cluster says of this node,
/// as managers tell the agent) differs from the certificate's. A new certificate is
/// saved, then taken into use; nothing restarts. Ends when cancelled.
///
/// `managers` are the addresses (host:port) to ask, in any order.
pub async fn keep_renewed(
    identity: Arc<Identity>,
    store: KeyStore,
    mut managers: watch::Receiver<Vec<String>>,
    mut role: watch::Receiver<swarm_proto::v1::NodeRole>,
    cancel: CancellationToken,
) {
    let mut retry = RETRY_FIRST;
    loop {
        let wanted = *role.borrow_and_update();
        let wait = if wanted == identity.role() {
            match identity.renewal(SystemTime::now()) {
                Renewal::Due => Duration::ZERO,
                Renewal::In(wait) => wait,
            }
        } else {
            Duration::ZERO
        };
        if wait.is_zero() {
            let addrs = managers.borrow_and_update().clone();
            let renewed = tokio::select! {
                () = cancel.cancelled() => return,
                renewed = renew(&identity, &store, &addrs) => renewed,
            };
            match renewed {
                // Asked a manager that has not seen the change of role yet.
                Ok(()) if identity.role() != wanted => {}
                Ok(()) if identity.renewal(SystemTime::now()) == Renewal::Due => tracing::warn!(
                    expires = ?identity.validity().not_after,
                    "the certificate just issued is to be renewed again already: \
                     this machine's clock or the manager's is wrong"
                ),
                Ok(()) => {
                    retry = RETRY_FIRST;
                    continue;
                }
                Err(error) => tracing::warn!(
                    error = &error as &dyn std::error::Error,
                    expires = ?identity.validity().not_after,
                    "certificate not renewed, will try again"
                ),
            }
        }
        let pause = if wait.is_zero() { retry } else { wait };
        tokio::select! {
            () = cancel.cancelled() => return,
            () = tokio::time::sleep(pause) => {}
            Ok(()) = role.changed() => {}
            Ok(()) = managers.changed(), if wait.is_zero() => {}
        }
        if wait.is_zero() {
            retry = (retry * 2).min(RETRY_MAX);
        }
    }
}

/// Why a certificate was not renewed.
#[derive(Debug, thiserror::Error)]
pub enum RenewError {
    /// There is nobody to ask.
    #[error("no manager is known")]
    NoManager,
    /// Nobody gave one; the last refusal.
    #[error("no manager issued one")]
    Refused(#[source] JoinError),
    /// It could not be saved.
    #[error(transparent)]
    Save(#[from] crate::KeyStoreError),
    /// It could not be taken into use.
    #[error(transparent)]
    Use(#[from] crate::IdentityError),
    /// The key store was emptied under a running node.
    #[error("{} is gone", .0.display())]
    Gone(std::path::PathBuf),
}

/// Renews now: asks one manager after the other, saves the certificate and takes it into use.
///
/// # Errors
/// No manager issued one, or it could not be saved. The present one stays in use.
pub async fn renew(
    identity: &Arc<Identity>,
    store: &KeyStore,
    managers: &[String],
) -> Result<(), RenewError> {
    let mut refused = RenewError::NoManager;
    for addr in managers {
        let material = match renew_certificate(addr, identity).await {
            Ok(material) => material,
            Err(error) => {
                refused = RenewError::Refused(error);
                continue;
            }
        };
        let data_key = store
            .load()?
            .ok_or_else(|| RenewError::Gone(store.path()))?
            .data_key;
        identity.check_successor(&material)?;
        store.save(&Stored {
            material: material.clone(),
            data_key,
        })?;
        identity.replace(material)?;
        tracing::info!(
            role = identity.role().as_str_name(),
            expires = ?identity.validity().not_after,
            "certificate renewed"
        );
        return Ok(());
    }
    Err(refused)
}
