//! Certificates, key files, join tokens, mutual TLS, and who may call what.
//!
//! Knows the object model only: managers and agents both build on it. The
//! clock is read for renewal and by rustls for validity; leases have nothing to do with it.

pub mod authorize;
pub mod ca;
pub mod caller;
pub mod cert;
#[cfg(feature = "fuzzing")]
pub mod fuzzing;
pub mod identity;
pub mod join;
pub mod keystore;
pub mod net;
pub mod renew;
pub mod server;
pub mod token;
mod verify;

#[cfg(test)]
mod testing;
#[cfg(test)]
mod tls_test;

pub use authorize::{
    Allowed, AuthorizeLayer, Check, Refusal, TABLE, authorize, is_removed, removed,
};
pub use ca::{CaError, NewKey, RootCa, RootDigest};
pub use caller::{Caller, ConnectionInfo, PeerIdentity, remote_addr};
pub use cert::{CertError, Leaf, Renewal, Validity};
pub use identity::{AddrError, Identity, IdentityError, KeyMaterial, SESSION_CONNECT_MAX};
pub use join::{JoinError, fetch_root, request_certificate};
pub use keystore::{DataKey, KeyStore, KeyStoreError, Stored};
pub use net::{Net, Tcp, UNACKNOWLEDGED_MAX};
pub use renew::{RenewError, keep_renewed, renew};
pub use server::{Connection, Limits, Listener, LocalListener, grpc_server};
pub use token::{JoinToken, TokenError, same_token};
