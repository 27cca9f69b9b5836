//! Reading certificates: whose, until when, and when to ask for the next.
//!
//! Pure: the clock and the random number are the caller's.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use rustls_pki_types::pem::PemObject as _;
use rustls_pki_types::{CertificateDer, PrivateKeyDer};
use swarm_proto::defaults::{ROLE_MANAGER, ROLE_WORKER};
use swarm_proto::v1::NodeRole;
use x509_parser::prelude::{FromDer as _, X509Certificate};

use crate::PeerIdentity;

/// A certificate or key that cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CertError {
    /// Not PEM, or not what it should be.
    #[error("cannot read the {what}: {reason}")]
    Malformed {
        /// "certificate", "key".
        what: &'static str,
        /// The parser's words.
        reason: String,
    },
    /// A certificate of some other system.
    #[error("the certificate is not one of a swarm node: {0}")]
    NotOurs(String),
}

impl CertError {
    fn malformed(what: &'static str, reason: impl ToString) -> Self {
        Self::Malformed {
            what,
            reason: reason.to_string(),
        }
    }
}

/// From when until when a certificate is valid.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Validity {
    /// Its notBefore.
    pub not_before: SystemTime,
    /// Its notAfter.
    pub not_after: SystemTime,
}

/// How long to sleep at most before the clock is looked at again: the wall
/// clock may jump, which the timers' clock does not show.
const CLOCK_CHECK: Duration = Duration::from_secs(60);

/// Whether to renew a certificate.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Renewal {
    /// Now.
    Due,
    /// Look again after this long.
    In(Duration),
}

impl Validity {
    /// Whether a certificate is to be renewed at `now`, when its renewal lies at
    /// `share` (0 to 1) of its life. A clock before notBefore has jumped back: it renews nothing.
    #[must_use]
    pub fn renewal(&self, share: f64, now: SystemTime) -> Renewal {
        let life = self
            .not_after
            .duration_since(self.not_before)
            .unwrap_or_default();
        let due = self.not_before + life.mul_f64(share.clamp(0.0, 1.0));
        match due.duration_since(now) {
            Err(_) => Renewal::Due,
            Ok(Duration::ZERO) => Renewal::Due,
            Ok(wait) => Renewal::In(wait.min(CLOCK_CHECK)),
        }
    }

    /// Whether `now` is after the end.
    #[must_use]
    pub fn expired(&self, now: SystemTime) -> bool {
        now > self.not_after
    }
}

/// A node's own certificate.
#[derive(Clone, Debug)]
pub struct Leaf {
    /// Whose it is.
    pub identity: PeerIdentity,
    /// How long it is valid.
    pub validity: Validity,
}

impl Leaf {
    /// Reads the first certificate of a PEM chain.
    ///
    /// # Errors
    /// It is unreadable or not one of a swarm node.
    pub fn from_chain_pem(pem: &[u8]) -> Result<Self, CertError> {
        Self::from_der(&chain_from_pem(pem)?[0])
    }

    /// Reads a certificate.
    ///
    /// # Errors
    /// It is unreadable or not one of a swarm node.
    pub fn from_der(der: &[u8]) -> Result<Self, CertError> {
        let (_, parsed) = X509Certificate::from_der(der)
            .map_err(|error| CertError::malformed("certificate", error))?;
        let subject = parsed.subject();
        let cn = one(subject.iter_common_name(), "common name")?;
        let ou = one(subject.iter_organizational_unit(), "organisational unit")?;
        let o = one(subject.iter_organization(), "organisation")?;
        let role = match ou {
            ROLE_MANAGER => NodeRole::Manager,
            ROLE_WORKER => NodeRole::Worker,
            other => {
                return Err(CertError::NotOurs(format!(
                    "its organisational unit {other:?} is not a role"
                )));
            }
        };
        let validity = parsed.validity();
        Ok(Self {
            identity: PeerIdentity {
                node_id: cn.into(),
                role,
                cluster_id: o.into(),
            },
            validity: Validity {
                not_before: time(validity.not_before.timestamp()),
                not_after: time(validity.not_after.timestamp()),
            },
        })
    }
}

fn time(unix: i64) -> SystemTime {
    UNIX_EPOCH + Duration::from_secs(u64::try_from(unix).unwrap_or(0))
}

fn one<'a>(
    mut values: impl Iterator<Item = &'a x509_parser::x509::AttributeTypeAndValue<'a>>,
    what: &str,
) -> Result<&'a str, CertError> {
    let value = values
        .next()
        .and_then(|value| value.as_str().ok())
        .filter(|value| !value.is_empty());
    match (value, values.next()) {
        (Some(value), None) => Ok(value),
        _ => Err(CertError::NotOurs(format!(
            "its subject has not exactly one {what}"
        ))),
    }
}

/// The certificates of a PEM text; at least one, at most eight.
///
/// # Errors
/// There is none, there are too many, or one is malformed.
pub fn chain_from_pem(pem: &[u8]) -> Result<Vec<CertificateDer<'static>>, CertError> {
    let chain = CertificateDer::pem_slice_iter(pem)
        .take(9)
        .collect::<Result<Vec<_>, _>>()
        .map_err(|error| CertError::malformed("certificate", error))?;
    match chain.len() {
        0 => Err(CertError::malformed("certificate", "there is none")),
        1..=8 => Ok(chain),
        _ => Err(CertError::malformed("certificate", "there are too many")),
    }
}

/// A block of PEM, with plain line ends.
pub(crate) fn to_pem(tag: &str, der: &[u8]) -> String {
    let config = pem::EncodeConfig::new().set_line_ending(pem::LineEnding::LF);
    pem::encode_config(&pem::Pem::new(tag, der), config)
}

/// The private key of a PEM text.
///
/// # Errors
/// There is none, or it is malformed.
pub fn key_from_pem(pem: &[u8]) -> Result<PrivateKeyDer<'static>, CertError> {
    PrivateKeyDer::from_pem_slice(pem).map_err(|error| CertError::malformed("key", error))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn validity() -> Validity {
        Validity {
            not_before: UNIX_EPOCH + Duration::from_secs(10_000),
            not_after: UNIX_EPOCH + Duration::from_secs(20_000),
        }
    }

    fn at(seconds: u64) -> SystemTime {
        UNIX_EPOCH + Duration::from_secs(seconds)
    }

    #[test]
    fn renewal_is_due_from_its_share_of_the_life_on() {
        assert_eq!(
            validity().renewal(0.5, at(14_990)),
            Renewal::In(Duration::from_secs(10))
        );
        assert_eq!(validity().renewal(0.5, at(15_000)), Renewal::Due);
        assert_eq!(validity().renewal(0.5, at(90_000)), Renewal::Due);
    }

    #[test]
    fn a_clock_that_jumped_back_renews_nothing_and_is_looked_at_again() {
        assert_eq!(
            validity().renewal(0.5, UNIX_EPOCH),
            Renewal::In(CLOCK_CHECK)
        );
    }

    proptest! {
        #[test]
        fn reading_never_panics(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            let _ = Leaf::from_der(&bytes);
            let _ = Leaf::from_chain_pem(&bytes);
            let _ = key_from_pem(&bytes);
        }
    }
}
