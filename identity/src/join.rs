//! Joining: the root is fetched and checked against the token before anything else is said.

use std::fmt;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use rustls::ClientConfig;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, verify_tls12_signature, verify_tls13_signature};
use rustls_pki_types::{CertificateDer, ServerName, UnixTime};
use swarm_proto::v1::ca_client::CaClient;
use swarm_proto::v1::{
    GetRootCaRequest, IssueCertificateRequest, IssueCertificateResponse, NodeAvailability,
};
use tonic::transport::Channel;
use zeroize::Zeroizing;

use crate::ca::{CaError, NewKey, RootDigest};
use crate::cert::CertError;
use crate::identity::{
    AddrError, CALLS, Identity, IdentityError, KeyMaterial, check, client_builder, connect_lazy,
    finish_client, provider, root_store,
};
use crate::net::Net;
use crate::token::JoinToken;
use crate::verify;

/// For one call, with the connection.
const CALL_TIMEOUT: Duration = Duration::from_secs(20);
/// A root or a chain has some 2 KiB.
const ANSWER_MAX: usize = 128 << 10;

/// Why a certificate was not got.
#[derive(Debug, thiserror::Error)]
pub enum JoinError {
    /// Not host:port.
    #[error(transparent)]
    Addr(#[from] AddrError),
    /// The other side is not the cluster that the token is from.
    #[error("remote CA does not match fingerprint. Expected: {expected} (at {addr}: {found})")]
    Fingerprint {
        /// The manager asked.
        addr: String,
        /// The token's digest, base 36.
        expected: String,
        /// The digest of the root it presented, base 36.
        found: String,
    },
    /// The manager refused, or could not be reached.
    #[error("{addr}: {}", status.message())]
    Call {
        /// The manager asked.
        addr: String,
        /// Its answer.
        status: Box<tonic::Status>,
    },
    /// No answer in time.
    #[error("{addr} did not answer within {CALL_TIMEOUT:?}")]
    Timeout {
        /// The manager asked.
        addr: String,
    },
    /// What came back cannot be used.
    #[error("{addr} answered with an unusable certificate")]
    Answer {
        /// The manager asked.
        addr: String,
        /// Why.
        #[source]
        source: IdentityError,
    },
    /// What came back is of no use any more.
    #[error(
        "{addr} issued a certificate that has expired already: the clock of that manager or of this machine is wrong"
    )]
    Expired {
        /// The manager asked.
        addr: String,
    },
    /// A key could not be made.
    #[error(transparent)]
    Key(#[from] CaError),
    /// TLS could not be set up.
    #[error(transparent)]
    Tls(#[from] IdentityError),
}

impl JoinError {
    /// Another manager, or the same one later, may answer differently.
    #[must_use]
    pub fn retryable(&self) -> bool {
        match self {
            Self::Call { status, .. } => matches!(
                status.code(),
                tonic::Code::Unavailable | tonic::Code::DeadlineExceeded | tonic::Code::Unknown
            ),
            Self::Timeout { .. } => true,
            _ => false,
        }
    }
}

/// Fetches the root (PEM) from the manager at `addr` (host:port) over a
/// connection that nothing is known of yet, sends nothing but the question, and
/// checks the answer against the token.
///
/// # Errors
/// The manager cannot be reached, or its root is not the token's.
pub async fn fetch_root(
    net: &Arc<dyn Net>,
    addr: &str,
    token: &JoinToken,
) -> Result<String, JoinError> {
    let config = client_builder(Arc::new(NotYetVerified(provider())))?.with_no_client_auth();
    let mut client = ca_client(net, addr, config)?;
    let answer = call(addr, client.get_root_ca(GetRootCaRequest {})).await?;
    let unusable = |error: CertError| JoinError::Answer {
        addr: addr.to_owned(),
        source: error.into(),
    };
    let found = RootDigest::of_pem(&answer.cert_pem).map_err(unusable)?;
    if !token.matches_root(&found) {
        return Err(JoinError::Fingerprint {
            addr: addr.to_owned(),
            expected: token.digest().to_owned(),
            found: found.base36(),
        });
    }
    // Only the certificate whose digest was checked is trusted, whatever else came along.
    let chain = crate::cert::chain_from_pem(&answer.cert_pem).map_err(unusable)?;
    Ok(crate::cert::to_pem("CERTIFICATE", &chain[0]))
}

/// Asks the manager at `addr`, verified with `root_pem`, for a new node's
/// certificate. The role is the token's.
///
/// # Errors
/// The manager cannot be reached, is not of this root, or refuses the token.
pub async fn request_certificate(
    net: &Arc<dyn Net>,
    addr: &str,
    root_pem: &str,
    token: &JoinToken,
    availability: NodeAvailability,
    hostname: &str,
) -> Result<KeyMaterial, JoinError> {
    let config = client_builder(verify::managers(root_store(root_pem)?)?)?.with_no_client_auth();
    let mut client = ca_client(net, addr, config)?;
    let key = NewKey::generate()?;
    let request = IssueCertificateRequest {
        csr_pem: key.csr_pem.clone().into(),
        token: token.as_str().to_owned(),
        availability: availability.into(),
        hostname: hostname.to_owned(),
    };
    let answer = call(addr, client.issue_certificate(request)).await?;
    accept(addr, answer, key, root_pem)
}

/// Asks the manager at `addr` for this node's next certificate, over mutual
/// TLS with the present one.
///
/// # Errors
/// The manager cannot be reached, or refuses.
pub async fn renew_certificate(
    addr: &str,
    identity: &Arc<Identity>,
) -> Result<KeyMaterial, JoinError> {
    let channel = identity.channel(addr)?;
    let mut client = CaClient::new(channel).max_decoding_message_size(ANSWER_MAX);
    let key = NewKey::generate()?;
    let request = IssueCertificateRequest {
        csr_pem: key.csr_pem.clone().into(),
        ..Default::default()
    };
    let answer = call(addr, client.issue_certificate(request)).await?;
    accept(addr, answer, key, &identity.root_pem())
}

fn ca_client(
    net: &Arc<dyn Net>,
    addr: &str,
    config: ClientConfig,
) -> Result<CaClient<Channel>, JoinError> {
    let config = Arc::new(finish_client(config));
    let channel = connect_lazy(Arc::clone(net), addr, CALLS, move || Arc::clone(&config))?;
    Ok(CaClient::new(channel).max_decoding_message_size(ANSWER_MAX))
}

async fn call<T>(
    addr: &str,
    call: impl Future<Output = Result<tonic::Response<T>, tonic::Status>>,
) -> Result<T, JoinError> {
    match tokio::time::timeout(CALL_TIMEOUT, call).await {
        Ok(Ok(response)) => Ok(response.into_inner()),
        Ok(Err(status)) => Err(JoinError::Call {
            addr: addr.to_owned(),
            status: Box::new(status),
        }),
        Err(_) => Err(JoinError::Timeout {
            addr: addr.to_owned(),
        }),
    }
}

fn accept(
    addr: &str,
    answer: IssueCertificateResponse,
    key: NewKey,
    root_pem: &str,
) -> Result<KeyMaterial, JoinError> {
    let material = KeyMaterial {
        chain_pem: String::from_utf8_lossy(&answer.cert_chain_pem).into_owned(),
        key_pem: Zeroizing::new(key.key_pem),
        root_pem: root_pem.to_owned(),
    };
    let leaf = check(&material).map_err(|source| JoinError::Answer {
        addr: addr.to_owned(),
        source,
    })?;
    if leaf.validity.expired(SystemTime::now()) {
        return Err(JoinError::Expired {
            addr: addr.to_owned(),
        });
    }
    Ok(material)
}

/// Accepts any certificate: for the one question whose answer is checked by its digest.
struct NotYetVerified(Arc<CryptoProvider>);

impl fmt::Debug for NotYetVerified {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("NotYetVerified")
    }
}

impl ServerCertVerifier for NotYetVerified {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &rustls::DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls12_signature(
            message,
            cert,
            dss,
            &self.0.signature_verification_algorithms,
        )
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &rustls::DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(
            message,
            cert,
            dss,
            &self.0.signature_verification_algorithms,
        )
    }

    fn supported_verify_schemes(&self) -> Vec<rustls::SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}
