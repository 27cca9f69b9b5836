//! What the tests of this crate share.

use std::time::{Duration, SystemTime};

use swarm_proto::v1::NodeRole;
use zeroize::Zeroizing;

use crate::{KeyMaterial, NewKey, PeerIdentity, RootCa};

/// Key and certificate of a node of cluster "c1", valid for a day.
pub fn material(root: &RootCa, node: &str, role: NodeRole) -> KeyMaterial {
    material_at(root, node, role, SystemTime::now())
}

/// The same, issued by a clock that shows `at`.
pub fn material_at(root: &RootCa, node: &str, role: NodeRole, at: SystemTime) -> KeyMaterial {
    let key = NewKey::generate().unwrap();
    let subject = PeerIdentity {
        node_id: node.into(),
        role,
        cluster_id: "c1".into(),
    };
    let day = Duration::from_secs(24 * 3600);
    KeyMaterial {
        chain_pem: root
            .sign(key.csr_pem.as_bytes(), &subject, day, at)
            .unwrap(),
        key_pem: Zeroizing::new(key.key_pem),
        root_pem: root.cert_pem().to_owned(),
    }
}
