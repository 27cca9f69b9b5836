//! The cluster's own object, and its join tokens.

use std::sync::Arc;

use swarm_identity::{JoinToken, RootDigest};
use swarm_proto::v1::{
    Cluster, JoinTokens, NodeRole, RotateJoinTokenRequest, UpdateClusterRequest, object,
};
use swarm_store::State;
use tonic::Status;

use super::{Control, error, expecting, redact, update, validate, version_of};

/// The cluster object. Every manager that serves this API has one.
pub(super) fn of(state: &State) -> Result<&Arc<Cluster>, Status> {
    state
        .cluster()
        .ok_or_else(|| Status::unavailable("the cluster is being initialized; try again"))
}

impl Control {
    pub(super) async fn get_cluster(&self) -> Result<Cluster, Status> {
        let state = self.state().await?;
        Ok(redacted(of(&state)?))
    }

    pub(super) async fn update_cluster(
        &self,
        request: UpdateClusterRequest,
    ) -> Result<Cluster, Status> {
        let spec = request
            .spec
            .ok_or_else(|| Status::invalid_argument("the cluster's spec is missing"))?;
        validate::cluster_spec(&spec).map_err(error::invalid)?;
        let known = |state: &State| {
            state
                .cluster()
                .is_some_and(|old| version_of(old.meta.as_ref()) == request.version)
        };
        let state = self.state_with(known).await?;
        let old = of(&state)?;
        if version_of(old.meta.as_ref()) != request.version {
            return Err(error::out_of_sequence());
        }
        let new = Cluster {
            spec: Some(spec),
            meta: expecting(request.version),
            ..Cluster::clone(old)
        };
        let state = self
            .write(vec![update(object::Object::Cluster(new))])
            .await?;
        Ok(redacted(of(&state)?))
    }

    pub(super) async fn get_join_tokens(&self) -> Result<JoinTokens, Status> {
        let state = self.state().await?;
        tokens(of(&state)?)
    }

    pub(super) async fn rotate_join_token(
        &self,
        request: RotateJoinTokenRequest,
    ) -> Result<JoinTokens, Status> {
        let role = NodeRole::try_from(request.role)
            .map_err(|_| Status::invalid_argument(format!("unknown role {}", request.role)))?;
        let state = self.state().await?;
        let old = of(&state)?;
        let mut new = Cluster::clone(old);
        let root = new
            .root_ca
            .as_mut()
            .ok_or_else(|| Status::internal("the cluster has no root certificate"))?;
        let digest = RootDigest::of_pem(&root.cert_pem)
            .map_err(|error| Status::internal(format!("the cluster's root: {error}")))?;
        let token = JoinToken::generate(&digest).as_str().to_owned();
        let stored = root.join_tokens.get_or_insert_default();
        match role {
            NodeRole::Worker => stored.worker = token,
            NodeRole::Manager => stored.manager = token,
        }
        let state = self
            .write(vec![update(object::Object::Cluster(new))])
            .await?;
        tracing::info!(role = role.as_str_name(), "join token rotated");
        tokens(of(&state)?)
    }
}

fn tokens(cluster: &Cluster) -> Result<JoinTokens, Status> {
    cluster
        .root_ca
        .as_ref()
        .and_then(|root| root.join_tokens.clone())
        .ok_or_else(|| Status::internal("the cluster has no join tokens"))
}

fn redacted(found: &Arc<Cluster>) -> Cluster {
    let mut cluster = Cluster::clone(found);
    redact::cluster(&mut cluster);
    cluster
}

#[cfg(test)]
mod tests {
    use swarm_identity::RootCa;
    use swarm_proto::v1::{self, ClusterSpec};
    use swarm_store::Consensus as _;
    use tonic::Code;

    use super::super::testing::{Bench, cluster};
    use super::*;

    #[tokio::test]
    async fn a_rotation_changes_one_token_and_keeps_the_digest() {
        let bench = Bench::new();
        let old = bench.control.get_join_tokens().await.unwrap();
        let new = bench
            .control
            .rotate_join_token(RotateJoinTokenRequest {
                role: NodeRole::Worker.into(),
            })
            .await
            .unwrap();
        assert_eq!(new.manager, old.manager);
        assert_ne!(new.worker, old.worker);
        let digest = |token: &str| token.parse::<JoinToken>().unwrap().digest().to_owned();
        assert_eq!(digest(&new.worker), digest(&old.worker));
        assert_eq!(bench.control.get_join_tokens().await.unwrap(), new);
    }

    #[tokio::test]
    async fn an_update_keeps_what_is_not_the_spec_and_needs_the_version() {
        let bench = Bench::new();
        let spec = ClusterSpec {
            task_history_limit: Some(2),
            ..Default::default()
        };
        let found = bench.control.get_cluster().await.unwrap();
        let version = found.meta.unwrap().version.unwrap().index;
        let updated = bench
            .control
            .update_cluster(UpdateClusterRequest {
                version,
                spec: Some(spec.clone()),
            })
            .await
            .unwrap();
        assert_eq!(updated.spec, Some(spec.clone()));
        let tokens = bench.control.get_join_tokens().await.unwrap();
        assert!(tokens.worker.starts_with("SWMTKN-1-"));
        let stale = bench
            .control
            .update_cluster(UpdateClusterRequest {
                version,
                spec: Some(spec),
            })
            .await
            .unwrap_err();
        assert_eq!(stale.code(), Code::Aborted);
        assert_eq!(stale.message(), "update out of sequence");
    }

    #[tokio::test]
    async fn the_cluster_is_shown_without_its_key_and_tokens() {
        let bench = Bench::new();
        let found = bench.control.get_cluster().await.unwrap();
        let root: v1::RootCa = found.root_ca.unwrap();
        assert!(root.key_pem.is_empty() && root.join_tokens.is_none());
        assert!(!root.cert_pem.is_empty());
        let stored = bench.consensus.store().state();
        let stored = stored.cluster().unwrap().root_ca.clone().unwrap();
        let (cert, key) = (
            std::str::from_utf8(&stored.cert_pem).unwrap().to_owned(),
            std::str::from_utf8(&stored.key_pem).unwrap().to_owned(),
        );
        assert!(RootCa::from_pem(&cert, &key).is_ok());
        assert_ne!(cluster("c").root_ca, None);
    }
}
