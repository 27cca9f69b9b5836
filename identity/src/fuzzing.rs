//! Entry points for fuzzing: join tokens, certificate requests, certificates, the key file.
//!
//! Each function takes what somebody else may send and panics when a rule is
//! broken; `seeds` gives inputs that are valid. Only in builds with the feature `fuzzing`.

use std::sync::LazyLock;
use std::time::{Duration, SystemTime};

use sha2::{Digest as _, Sha256};
use swarm_proto::v1::NodeRole;
use zeroize::Zeroizing;

use crate::ca::LIFE_MIN;
use crate::{
    DataKey, JoinToken, KeyMaterial, Leaf, NewKey, PeerIdentity, RootCa, RootDigest, Stored, cert,
    keystore, same_token,
};

static ROOT: LazyLock<RootCa> =
    LazyLock::new(|| RootCa::create(SystemTime::now()).expect("a root can be made"));

fn subject() -> PeerIdentity {
    PeerIdentity {
        node_id: "node1".into(),
        role: NodeRole::Worker,
        cluster_id: "cluster1".into(),
    }
}

/// A join token as somebody types it.
pub fn join_token(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else {
        return;
    };
    match text.parse::<JoinToken>() {
        Ok(token) => {
            assert_eq!(token.as_str(), text);
            assert!(same_token(token.as_str(), text));
            assert_eq!(token.digest().len(), 50);
            // What is public may be the same by chance.
            let (public, secret) = text.split_at(text.len() - 25);
            assert!(public.contains(secret) || !format!("{token:?}").contains(secret));
        }
        // One sentence, whatever was given.
        Err(error) => assert!(error.to_string().len() < 200, "{error}"),
    }
}

/// A certificate request: whatever it asks for, the certificate says what the CA
/// decided. The first byte chooses how the rest is packed: as it is, as PEM, or as the
/// attributes of a request that is properly signed.
pub fn certificate_request(data: &[u8]) {
    let Some((&form, rest)) = data.split_first() else {
        return;
    };
    let text = match form % 3 {
        0 => rest.to_vec(),
        1 => cert::to_pem("CERTIFICATE REQUEST", rest).into_bytes(),
        _ => cert::to_pem("CERTIFICATE REQUEST", &signed_request(rest)).into_bytes(),
    };
    let now = SystemTime::now();
    match ROOT.sign(&text, &subject(), LIFE_MIN, now) {
        Ok(chain) => {
            let leaf = Leaf::from_chain_pem(chain.as_bytes()).expect("our own certificate");
            assert_eq!(leaf.identity, subject());
            assert!(leaf.validity.not_after <= now + LIFE_MIN + Duration::from_secs(1));
            let ders = cert::chain_from_pem(chain.as_bytes()).expect("our own certificate");
            let (_, parsed) =
                x509_parser::parse_x509_certificate(&ders[0]).expect("our own certificate");
            assert!(!parsed.is_ca());
        }
        Err(error) => assert!(error.to_string().starts_with("invalid certificate request")),
    }
}

/// DER: a value of `tag` around `content`.
fn der(tag: u8, content: &[u8]) -> Vec<u8> {
    let mut out = vec![tag];
    match content.len() {
        short @ 0..=127 => out.push(short as u8),
        long => {
            let length = long.to_be_bytes();
            let skip = length.iter().take_while(|&&b| b == 0).count();
            out.push(0x80 | (length.len() - skip) as u8);
            out.extend_from_slice(&length[skip..]);
        }
    }
    out.extend_from_slice(content);
    out
}

/// A PKCS#10 request with these bytes as its attributes, signed with its own key.
fn signed_request(attributes: &[u8]) -> Vec<u8> {
    use ring::rand::SystemRandom;
    use ring::signature::{ECDSA_P256_SHA256_ASN1_SIGNING, EcdsaKeyPair, KeyPair as _};
    static KEY: LazyLock<EcdsaKeyPair> = LazyLock::new(|| {
        let rng = SystemRandom::new();
        let pkcs8 = EcdsaKeyPair::generate_pkcs8(&ECDSA_P256_SHA256_ASN1_SIGNING, &rng)
            .expect("there are random numbers");
        EcdsaKeyPair::from_pkcs8(&ECDSA_P256_SHA256_ASN1_SIGNING, pkcs8.as_ref(), &rng)
            .expect("just made")
    });
    // id-ecPublicKey with prime256v1, and ecdsa-with-SHA256.
    const EC_P256: [u8; 19] = [
        0x06, 0x07, 0x2a, 0x86, 0x48, 0xce, 0x3d, 0x02, 0x01, 0x06, 0x08, 0x2a, 0x86, 0x48, 0xce,
        0x3d, 0x03, 0x01, 0x07,
    ];
    const ECDSA_SHA256: [u8; 10] = [0x06, 0x08, 0x2a, 0x86, 0x48, 0xce, 0x3d, 0x04, 0x03, 0x02];
    let mut point = vec![0];
    point.extend_from_slice(KEY.public_key().as_ref());
    let key = [der(0x30, &EC_P256), der(0x03, &point)].concat();
    let info = [
        der(0x02, &[0]),
        der(0x30, &[]),
        der(0x30, &key),
        der(0xa0, attributes),
    ];
    let info = der(0x30, &info.concat());
    let signature = KEY
        .sign(&SystemRandom::new(), &info)
        .expect("there are random numbers");
    let mut bits = vec![0];
    bits.extend_from_slice(signature.as_ref());
    der(
        0x30,
        &[info, der(0x30, &ECDSA_SHA256), der(0x03, &bits)].concat(),
    )
}

/// Certificates, chains, private keys and the node's key file.
pub fn certificate(data: &[u8]) {
    let _ = Leaf::from_der(data);
    let _ = cert::key_from_pem(data);
    let _ = RootDigest::of_pem(data);
    if let Ok(chain) = cert::chain_from_pem(data) {
        assert!((1..=8).contains(&chain.len()));
        // What was read is written to something that reads the same.
        let text: String = chain
            .iter()
            .map(|der| cert::to_pem("CERTIFICATE", der))
            .collect();
        assert_eq!(cert::chain_from_pem(text.as_bytes()), Ok(chain));
    }
    // As it is, and with a checksum that fits.
    let sum = cert::to_pem("SWARM CHECKSUM", &Sha256::digest(data));
    let summed = [data, sum.as_bytes()].concat();
    for stored in [data, &summed].into_iter().flat_map(keystore::decode) {
        let again = keystore::encode(&stored).expect("just read");
        let again = keystore::decode(&again).expect("just written");
        assert_eq!(again.material.chain_pem, stored.material.chain_pem);
        assert_eq!(again.data_key.as_bytes(), stored.data_key.as_bytes());
    }
}

/// Valid inputs.
pub mod seeds {
    use super::*;

    /// For [`super::join_token`].
    #[must_use]
    pub fn join_token() -> Vec<Vec<u8>> {
        let token = JoinToken::generate(&ROOT.digest());
        vec![token.as_str().into(), b"SWMTKN-1-a-b".to_vec()]
    }

    /// For [`super::certificate_request`].
    #[must_use]
    pub fn certificate_request() -> Vec<Vec<u8>> {
        let csr = NewKey::generate().expect("a key can be made").csr_pem;
        let plain = pem::parse(&csr).expect("just made").into_contents();
        // extensionRequest: basicConstraints CA:TRUE.
        let wish = [
            0x30, 0x1d, 0x06, 0x09, 0x2a, 0x86, 0x48, 0x86, 0xf7, 0x0d, 0x01, 0x09, 0x0e, 0x31,
            0x10, 0x30, 0x0e, 0x30, 0x0c, 0x06, 0x03, 0x55, 0x1d, 0x13, 0x04, 0x05, 0x30, 0x03,
            0x01, 0x01, 0xff,
        ];
        vec![
            [&[0], csr.as_bytes()].concat(),
            [&[1], plain.as_slice()].concat(),
            vec![2],
            [&[2], wish.as_slice()].concat(),
        ]
    }

    /// For [`super::certificate`].
    #[must_use]
    pub fn certificate() -> Vec<Vec<u8>> {
        let key = NewKey::generate().expect("a key can be made");
        let chain = ROOT
            .sign(
                key.csr_pem.as_bytes(),
                &subject(),
                LIFE_MIN,
                SystemTime::now(),
            )
            .expect("our own request");
        let leaf = cert::chain_from_pem(chain.as_bytes()).expect("just made")[0].to_vec();
        let stored = Stored {
            material: KeyMaterial {
                chain_pem: chain.clone(),
                key_pem: Zeroizing::new(key.key_pem.clone()),
                root_pem: ROOT.cert_pem().to_owned(),
            },
            data_key: DataKey::random(),
        };
        let file = keystore::encode(&stored).expect("whole");
        vec![
            leaf,
            chain.into_bytes(),
            key.key_pem.into_bytes(),
            file.to_vec(),
        ]
    }
}
