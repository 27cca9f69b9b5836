//! The root: makes certificates whose every field but the public key is the cluster's choice.
//!
//! Touches neither disk nor network; the clock is the caller's.

use std::fmt;
use std::time::{Duration, SystemTime};

use rcgen::{
    BasicConstraints, CertificateParams, CertificateSigningRequestParams, DistinguishedName,
    DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose,
    PKCS_ECDSA_P256_SHA256, SerialNumber,
};
use sha2::{Digest as _, Sha256};
use swarm_proto::defaults::{ROLE_MANAGER, ROLE_WORKER};
use swarm_proto::v1::NodeRole;

use crate::PeerIdentity;
use crate::cert::{self, CertError};

/// Life of a root.
const ROOT_LIFE: Duration = Duration::from_secs(20 * 365 * 24 * 3600);
/// Certificates begin this long before they are made, for clocks that run behind.
pub const BACKDATE: Duration = Duration::from_secs(3600);
/// No life of a node's certificate is shorter.
pub const LIFE_MIN: Duration = Duration::from_secs(3600);
/// A request for a P-256 certificate has some 400 bytes.
const CSR_MAX: usize = 16 << 10;

/// Something the root could not do.
#[derive(Debug, thiserror::Error)]
pub enum CaError {
    /// The request is not acceptable.
    #[error("invalid certificate request: {0}")]
    Request(String),
    /// The root itself is not usable.
    #[error("unusable root: {0}")]
    Root(String),
    /// The certificate could not be made.
    #[error("cannot make the certificate: {0}")]
    Sign(#[source] rcgen::Error),
}

impl From<CertError> for CaError {
    fn from(error: CertError) -> Self {
        Self::Root(error.to_string())
    }
}

/// SHA-256 of the DER of a root's certificate.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct RootDigest([u8; 32]);

impl RootDigest {
    /// The digest of a certificate's DER.
    #[must_use]
    pub fn of_der(der: &[u8]) -> Self {
        Self(Sha256::digest(der).into())
    }

    /// The digest of the first certificate in `pem`.
    ///
    /// # Errors
    /// There is no certificate in it.
    pub fn of_pem(pem: &[u8]) -> Result<Self, CertError> {
        let chain = cert::chain_from_pem(pem)?;
        Ok(Self::of_der(&chain[0]))
    }

    /// 50 base-36 characters, as in join tokens.
    #[must_use]
    pub fn base36(&self) -> String {
        const DIGITS: &[u8; 36] = b"0123456789abcdefghijklmnopqrstuvwxyz";
        let mut number = self.0;
        let mut text = [b'0'; 50];
        for place in text.iter_mut().rev() {
            let mut rest = 0u32;
            for byte in &mut number {
                let value = (rest << 8) | u32::from(*byte);
                *byte = (value / 36) as u8;
                rest = value % 36;
            }
            *place = DIGITS[rest as usize];
        }
        text.iter().map(|&byte| byte as char).collect()
    }
}

impl fmt::Display for RootDigest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("sha256:")?;
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for RootDigest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// The cluster's root with its key.
pub struct RootCa {
    cert_pem: String,
    key_pem: String,
    digest: RootDigest,
    issuer: Issuer<'static, KeyPair>,
}

impl RootCa {
    /// A new self-signed root: ECDSA P-256, CN `swarm-ca`, 20 years.
    ///
    /// # Errors
    /// The random number generator fails.
    pub fn create(now: SystemTime) -> Result<Self, CaError> {
        let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).map_err(CaError::Sign)?;
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        params
            .distinguished_name
            .push(DnType::CommonName, "swarm-ca");
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        params.serial_number = Some(random_serial());
        params.not_before = (now - BACKDATE).into();
        params.not_after = (now + ROOT_LIFE).into();
        let root = params.self_signed(&key).map_err(CaError::Sign)?;
        Self::from_pem(&root.pem(), &key.serialize_pem())
    }

    /// A root as it is kept in the cluster object.
    ///
    /// # Errors
    /// Either part is not usable PEM.
    pub fn from_pem(cert_pem: &str, key_pem: &str) -> Result<Self, CaError> {
        let root = |error: rcgen::Error| CaError::Root(error.to_string());
        let digest = RootDigest::of_pem(cert_pem.as_bytes())?;
        let key = KeyPair::from_pem(key_pem).map_err(root)?;
        let issuer = Issuer::from_ca_cert_pem(cert_pem, key).map_err(root)?;
        Ok(Self {
            cert_pem: cert_pem.to_owned(),
            key_pem: key_pem.to_owned(),
            digest,
            issuer,
        })
    }

    /// The root's certificate, PEM.
    #[must_use]
    pub fn cert_pem(&self) -> &str {
        &self.cert_pem
    }

    /// The root's key, PEM: a secret.
    #[must_use]
    pub fn key_pem(&self) -> &str {
        &self.key_pem
    }

    /// Digest of the root's certificate.
    #[must_use]
    pub fn digest(&self) -> RootDigest {
        self.digest
    }

    /// A certificate for `subject`, valid from an hour before `now` until
    /// `life` (at least an hour) after it. Of the request only the public key
    /// counts: whatever subject, names or rights it asks for, it gets none of them.
    /// Returns the chain as PEM: the leaf, then the root.
    ///
    /// # Errors
    /// The request is no PKCS#10, is too large, is not signed with its own key, or
    /// asks for an extension that is not known.
    pub fn sign(
        &self,
        csr_pem: &[u8],
        subject: &PeerIdentity,
        life: Duration,
        now: SystemTime,
    ) -> Result<String, CaError> {
        if csr_pem.len() > CSR_MAX {
            return Err(CaError::Request(format!(
                "it has {} bytes, more than {CSR_MAX}",
                csr_pem.len()
            )));
        }
        let text = std::str::from_utf8(csr_pem)
            .map_err(|_| CaError::Request("it is not PEM".to_owned()))?;
        let mut request = CertificateSigningRequestParams::from_pem(text)
            .map_err(|error| CaError::Request(error.to_string()))?;
        request.params = leaf_params(subject, life.max(LIFE_MIN), now)?;
        let leaf = request.signed_by(&self.issuer).map_err(CaError::Sign)?;
        Ok(format!("{}{}", leaf.pem(), self.cert_pem))
    }
}

impl fmt::Debug for RootCa {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "RootCa({})", self.digest)
    }
}

/// The name that certificates of a role carry: subject's OU, and the DNS name that clients verify.
#[must_use]
pub fn role_name(role: NodeRole) -> &'static str {
    match role {
        NodeRole::Manager => ROLE_MANAGER,
        NodeRole::Worker => ROLE_WORKER,
    }
}

fn leaf_params(
    subject: &PeerIdentity,
    life: Duration,
    now: SystemTime,
) -> Result<CertificateParams, CaError> {
    let role = role_name(subject.role);
    let mut params = CertificateParams::new(vec![role.to_owned()]).map_err(CaError::Sign)?;
    params.distinguished_name = DistinguishedName::new();
    for (kind, value) in [
        (DnType::OrganizationName, subject.cluster_id.as_str()),
        (DnType::OrganizationalUnitName, role),
        (DnType::CommonName, subject.node_id.as_str()),
    ] {
        params.distinguished_name.push(kind, value);
    }
    params.is_ca = IsCa::ExplicitNoCa;
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.extended_key_usages = vec![
        ExtendedKeyUsagePurpose::ServerAuth,
        ExtendedKeyUsagePurpose::ClientAuth,
    ];
    params.serial_number = Some(random_serial());
    params.use_authority_key_identifier_extension = true;
    params.not_before = (now - BACKDATE).into();
    params.not_after = (now + life).into();
    Ok(params)
}

fn random_serial() -> SerialNumber {
    // Positive, and 16 bytes in DER: the first bit is clear, the second set.
    let mut bytes: [u8; 16] = rand::random();
    bytes[0] = bytes[0] & 0x7f | 0x40;
    SerialNumber::from_slice(&bytes)
}

/// A new key and a request to certify it. The request names nothing: the CA chooses.
pub struct NewKey {
    /// PKCS#8, PEM: a secret.
    pub key_pem: String,
    /// PKCS#10, PEM.
    pub csr_pem: String,
}

impl NewKey {
    /// Makes an ECDSA P-256 key and its request.
    ///
    /// # Errors
    /// The random number generator fails.
    pub fn generate() -> Result<Self, CaError> {
        let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).map_err(CaError::Sign)?;
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        let request = params.serialize_request(&key).map_err(CaError::Sign)?;
        Ok(Self {
            key_pem: key.serialize_pem(),
            csr_pem: request.pem().map_err(CaError::Sign)?,
        })
    }
}

impl fmt::Debug for NewKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("NewKey")
    }
}

#[cfg(test)]
mod tests {
    use std::sync::LazyLock;

    use proptest::prelude::*;

    use super::*;
    use crate::cert::Leaf;

    fn subject() -> PeerIdentity {
        PeerIdentity {
            node_id: "node1".into(),
            role: NodeRole::Worker,
            cluster_id: "cluster1".into(),
        }
    }

    #[test]
    fn a_digest_has_fifty_base36_characters() {
        assert_eq!(RootDigest([0; 32]).base36(), "0".repeat(50));
        let mut one = [0; 32];
        one[31] = 36;
        assert_eq!(RootDigest(one).base36(), format!("{}10", "0".repeat(48)));
        // 2^256 - 1
        assert_eq!(
            RootDigest([0xff; 32]).base36(),
            "6dp5qcb22im238nr3wvp0ic7q99w035jmy2iw7i6n43d37jtof"
        );
    }

    #[test]
    fn a_root_is_read_back_and_keeps_its_digest() {
        let root = RootCa::create(SystemTime::now()).unwrap();
        let again = RootCa::from_pem(root.cert_pem(), root.key_pem()).unwrap();
        assert_eq!(root.digest(), again.digest());
        assert!(!format!("{root:?}").contains("KEY"));
    }

    #[test]
    fn a_certificate_says_what_the_ca_decided() {
        let now = SystemTime::now();
        let root = RootCa::create(now).unwrap();
        let key = NewKey::generate().unwrap();
        let life = Duration::from_secs(7200);
        let chain = root
            .sign(key.csr_pem.as_bytes(), &subject(), life, now)
            .unwrap();
        let leaf = Leaf::from_chain_pem(chain.as_bytes()).unwrap();
        assert_eq!(leaf.identity, subject());
        let total = leaf
            .validity
            .not_after
            .duration_since(leaf.validity.not_before);
        assert_eq!(total.unwrap().as_secs(), 3 * 3600);
    }

    #[test]
    fn a_request_for_a_ca_bit_and_another_subject_gets_none_of_it() {
        let now = SystemTime::now();
        let root = RootCa::create(now).unwrap();
        let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).unwrap();
        let mut params =
            CertificateParams::new(vec![ROLE_MANAGER.to_owned(), "evil.example".to_owned()])
                .unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
        params
            .distinguished_name
            .push(DnType::CommonName, "somebody else");
        params
            .distinguished_name
            .push(DnType::OrganizationalUnitName, ROLE_MANAGER);
        let csr = params.serialize_request(&key).unwrap().pem().unwrap();
        let chain = root
            .sign(csr.as_bytes(), &subject(), LIFE_MIN, now)
            .unwrap();

        let ders = cert::chain_from_pem(chain.as_bytes()).unwrap();
        let (_, parsed) = x509_parser::parse_x509_certificate(&ders[0]).unwrap();
        assert!(!parsed.is_ca());
        assert!(!parsed.key_usage().unwrap().unwrap().value.key_cert_sign());
        let names = parsed.subject_alternative_name().unwrap().unwrap();
        let names: Vec<_> = names
            .value
            .general_names
            .iter()
            .map(|name| name.to_string())
            .collect();
        assert_eq!(names, [format!("DNSName({ROLE_WORKER})")]);
        let leaf = Leaf::from_chain_pem(chain.as_bytes()).unwrap();
        assert_eq!(leaf.identity, subject());
    }

    #[test]
    fn a_request_that_is_not_signed_with_its_key_is_refused() {
        let root = RootCa::create(SystemTime::now()).unwrap();
        let key = NewKey::generate().unwrap();
        let mut parsed = pem::parse(&key.csr_pem).unwrap().into_contents();
        let last = parsed.len() - 1;
        parsed[last] ^= 1;
        let forged = pem::encode(&pem::Pem::new("CERTIFICATE REQUEST", parsed));
        for bad in [
            forged.as_bytes(),
            b"not PEM",
            &[0xff; 10],
            &vec![b'a'; CSR_MAX + 1],
        ] {
            let error = root
                .sign(bad, &subject(), LIFE_MIN, SystemTime::now())
                .unwrap_err();
            assert!(
                error.to_string().starts_with("invalid certificate request"),
                "{error}"
            );
        }
    }

    proptest! {
        #[test]
        fn a_request_of_any_bytes_is_refused_and_never_panics(
            bytes in proptest::collection::vec(any::<u8>(), 0..300)
        ) {
            static ROOT: LazyLock<RootCa> = LazyLock::new(|| RootCa::create(SystemTime::now()).unwrap());
            let wrapped = pem::encode(&pem::Pem::new("CERTIFICATE REQUEST", bytes.clone()));
            for text in [bytes.as_slice(), wrapped.as_bytes()] {
                prop_assert!(ROOT.sign(text, &subject(), LIFE_MIN, SystemTime::now()).is_err());
            }
        }
    }
}
