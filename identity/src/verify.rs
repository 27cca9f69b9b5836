//! Verifying the other side by a clock that may be wrong.
//!
//! As webpki does, but a certificate from the future is taken: our own root has signed it, so it is this
//! machine's clock that is behind, or its issuer's that was ahead, and a refusal would only cut the node off. One
//! that has expired is refused. Reads no clock itself.

use std::sync::Arc;
use std::time::Duration;

use rustls::client::WebPkiServerVerifier;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::server::WebPkiClientVerifier;
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::{
    CertificateError, DigitallySignedStruct, DistinguishedName, Error, RootCertStore,
    SignatureScheme,
};

use crate::identity::{IdentityError, provider};

/// For callers, who may also have no certificate.
pub(crate) fn callers(roots: RootCertStore) -> Result<Arc<dyn ClientCertVerifier>, IdentityError> {
    let strict = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider())
        .allow_unauthenticated()
        .build()
        .map_err(IdentityError::Verifier)?;
    Ok(Arc::new(Callers(strict)))
}

/// For managers that are called.
pub(crate) fn managers(roots: RootCertStore) -> Result<Arc<dyn ServerCertVerifier>, IdentityError> {
    let strict = WebPkiServerVerifier::builder_with_provider(Arc::new(roots), provider())
        .build()
        .map_err(IdentityError::Verifier)?;
    Ok(Arc::new(Managers(strict)))
}

/// Verifies at `now`, or when the certificate begins if that is later.
fn not_too_early<T>(
    now: UnixTime,
    verify: impl Fn(UnixTime) -> Result<T, Error>,
) -> Result<T, Error> {
    match verify(now) {
        Err(Error::InvalidCertificate(CertificateError::NotValidYetContext {
            not_before, ..
        })) => {
            let verified = verify(not_before)?;
            let early = not_before.as_secs().saturating_sub(now.as_secs());
            tracing::warn!(
                by = ?Duration::from_secs(early),
                "the other side's certificate is not valid yet by this machine's clock, which must be behind, \
                 or was issued by a clock that was ahead; taken all the same"
            );
            Ok(verified)
        }
        other => other,
    }
}

#[derive(Debug)]
struct Callers(Arc<dyn ClientCertVerifier>);

impl ClientCertVerifier for Callers {
    fn offer_client_auth(&self) -> bool {
        self.0.offer_client_auth()
    }

    fn client_auth_mandatory(&self) -> bool {
        self.0.client_auth_mandatory()
    }

    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        self.0.root_hint_subjects()
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        not_too_early(now, |at| {
            self.0.verify_client_cert(end_entity, intermediates, at)
        })
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.0.verify_tls12_signature(message, cert, dss)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.0.verify_tls13_signature(message, cert, dss)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.supported_verify_schemes()
    }
}

#[derive(Debug)]
struct Managers(Arc<WebPkiServerVerifier>);

impl ServerCertVerifier for Managers {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        name: &ServerName<'_>,
        ocsp: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        not_too_early(now, |at| {
            self.0
                .verify_server_cert(end_entity, intermediates, name, ocsp, at)
        })
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.0.verify_tls12_signature(message, cert, dss)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.0.verify_tls13_signature(message, cert, dss)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.supported_verify_schemes()
    }
}
