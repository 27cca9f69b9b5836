//! Pinning an image's digest before a service is created or updated.

use std::time::Duration;

use swarm_proto::v1::{ResolveImageRequest, ServiceSpec};
use tonic::Code;

use super::flags::Common;
use crate::auth;
use crate::daemon::Daemon;
use crate::failure::Result;

/// A registry that takes longer is as good as absent: the nodes will ask again.
const REGISTRY_TIMEOUT: Duration = Duration::from_secs(30);

/// Asks the image's registry for the digest and the platforms, and puts them
/// into the spec. Returns the warning for the user when the registry cannot be asked.
///
/// # Errors
/// The registry says that it has no such image: no node would get it either.
pub async fn pin(
    daemon: &Daemon,
    spec: &mut ServiceSpec,
    flags: &Common,
) -> Result<Option<String>> {
    let task = spec.task.get_or_insert_default();
    let container = task.container.get_or_insert_default();
    let credentials = auth::for_image(&container.image);
    if flags.with_registry_auth {
        container.pull_auth.clone_from(&credentials);
    }
    if flags.no_resolve_image || container.image.contains('@') {
        return Ok(None);
    }
    let request = ResolveImageRequest {
        image: container.image.clone(),
        auth: credentials,
    };
    let mut local = daemon.local();
    let asked = tokio::time::timeout(REGISTRY_TIMEOUT, local.resolve_image(request)).await;
    match asked {
        Ok(Ok(answer)) => {
            let answer = answer.into_inner();
            container.image = answer.image;
            if !answer.platforms.is_empty() {
                task.placement.get_or_insert_default().platforms = answer.platforms;
            }
            Ok(None)
        }
        Ok(Err(status)) if status.code() == Code::NotFound => Err(format!(
            "{} in its registry (--no-resolve-image does not ask)",
            status.message()
        )
        .into()),
        _ => Ok(Some(format!(
            "image {} could not be accessed on a registry to record\nits digest. Each node will access {} independently,\npossibly leading to different nodes running different\nversions of the image.\n",
            container.image, container.image
        ))),
    }
}

/// Takes image, credentials and platforms from a spec that was pinned.
pub fn take(spec: &mut ServiceSpec, pinned: &ServiceSpec) {
    let Some(from) = &pinned.task else { return };
    let task = spec.task.get_or_insert_default();
    if let Some(from) = &from.container {
        let container = task.container.get_or_insert_default();
        container.image.clone_from(&from.image);
        if from.pull_auth.is_some() {
            container.pull_auth.clone_from(&from.pull_auth);
        }
    }
    match (&from.placement, &mut task.placement) {
        (Some(from), _) => {
            task.placement
                .get_or_insert_default()
                .platforms
                .clone_from(&from.platforms);
        }
        // The new image may run on others than the old one.
        (None, Some(placement)) => placement.platforms.clear(),
        (None, None) => {}
    }
}
