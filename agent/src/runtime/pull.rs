//! Brings images from registries into the [`Store`].
//!
//! What a registry says is believed only as far as digests prove it: a pinned
//! manifest must have that digest, every blob the digest its manifest gives,
//! every unpacked layer the one in the image's configuration. Plain HTTP only to
//! the registries named in the configuration. Layers that several pulls need
//! are downloaded once. Touches the network and the store's directories.

use std::collections::HashMap;
use std::path::Path;
use std::sync::{Arc, Weak};
use std::time::Duration;

use futures::StreamExt;
use oci_client::client::{BlobResponse, ClientConfig, ClientProtocol, SizedStream};
use oci_client::errors::{OciDistributionError, OciErrorCode};
use oci_client::manifest::{
    IMAGE_MANIFEST_LIST_MEDIA_TYPE, IMAGE_MANIFEST_MEDIA_TYPE, OCI_IMAGE_INDEX_MEDIA_TYPE,
    OCI_IMAGE_MEDIA_TYPE,
};
use oci_client::secrets::RegistryAuth as ClientAuth;
use oci_client::{Client, Reference};
use parking_lot::Mutex;
use serde::Deserialize;
use sha2::{Digest, Sha256};
use swarm_proto::v1::{Platform, RegistryAuth};
use tokio::io::{AsyncReadExt, AsyncSeekExt, AsyncWriteExt};
use tokio::sync::{OwnedMutexGuard, Semaphore};

use super::bundle::ImageConfig;
use super::oci::ImageLimits;
use super::store::{Record, Store, digest_of, parse_digest};
use super::{RuntimeError, layer};

/// Manifests and configurations, as containerd limits them.
const MAX_MANIFEST: usize = 4 << 20;
/// What fits in one page of overlayfs options; Docker allows 127.
const MAX_LAYERS: usize = 120;
/// Layers in flight at once, over all pulls.
const PARALLEL_LAYERS: usize = 4;
/// A layer is asked for again, from where it broke off, this many times.
const ATTEMPTS: usize = 4;
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// Without a single byte.
const READ_TIMEOUT: Duration = Duration::from_secs(60);

const MANIFEST_TYPES: [&str; 4] = [
    OCI_IMAGE_INDEX_MEDIA_TYPE,
    OCI_IMAGE_MEDIA_TYPE,
    IMAGE_MANIFEST_LIST_MEDIA_TYPE,
    IMAGE_MANIFEST_MEDIA_TYPE,
];

/// A manifest or an index, with the fields that matter here.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Manifest {
    schema_version: u32,
    config: Option<Descriptor>,
    layers: Option<Vec<Descriptor>>,
    manifests: Option<Vec<Descriptor>>,
}

#[derive(Clone, Debug, Deserialize)]
struct Descriptor {
    digest: String,
    size: u64,
    platform: Option<ManifestPlatform>,
}

#[derive(Clone, Debug, Deserialize)]
struct ManifestPlatform {
    #[serde(default)]
    architecture: String,
    #[serde(default)]
    os: String,
}

/// Pulls images. One per runtime.
pub(super) struct Puller {
    store: Store,
    insecure_registries: Vec<String>,
    limits: ImageLimits,
    slots: Arc<Semaphore>,
    /// Whoever holds a layer's lock may download it; the others wait and find it.
    locks: Mutex<HashMap<String, Weak<tokio::sync::Mutex<()>>>>,
}

/// One image's conversation with its registry.
struct Remote<'a> {
    image: &'a str,
    reference: Reference,
    client: Client,
    auth: ClientAuth,
}

impl Puller {
    pub fn new(store: Store, insecure_registries: Vec<String>, limits: ImageLimits) -> Self {
        Self {
            store,
            insecure_registries,
            limits,
            slots: Arc::new(Semaphore::new(PARALLEL_LAYERS)),
            locks: Mutex::default(),
        }
    }

    /// The record of an image on this node, after pulling what is missing.
    pub async fn pull(
        &self,
        image: &str,
        auth: Option<&RegistryAuth>,
    ) -> Result<Record, RuntimeError> {
        let reference = parse(image)?;
        if let Some(digest) = reference.digest()
            && let Some(record) = self.local_by_digest(&reference, digest).await?
        {
            return Ok(record);
        }
        let remote = self.remote(image, reference, auth)?;
        let (body, digest) = match remote.manifest(&remote.reference).await {
            Ok(found) => found,
            Err(err) if is_unreachable(&err) => {
                let name = remote.reference.whole();
                let store = self.store.clone();
                return match blocking(move || Ok(store.find(&name))).await? {
                    Some(record) if remote.reference.digest().is_none() => {
                        tracing::warn!(image, error = %chain(&err), "registry unreachable, using the image on this node");
                        Ok(record)
                    }
                    _ => Err(remote.error(err)),
                };
            }
            Err(err) => return Err(remote.error(err)),
        };
        let (manifest, bytes, manifest_digest) =
            self.for_this_platform(&remote, body, &digest).await?;
        let (Some(config), Some(layers)) = (manifest.config, manifest.layers) else {
            return Err(remote.fail("the manifest is not of an image".into()));
        };
        let config_bytes = remote.small_blob(&config).await?;
        let image_config: ImageConfig = serde_json::from_slice(&config_bytes)
            .map_err(|err| remote.fail(format!("damaged image configuration: {err}")))?;
        let diff_ids = image_config.rootfs.diff_ids;
        if layers.is_empty() || layers.len() != diff_ids.len() || layers.len() > MAX_LAYERS {
            return Err(remote.fail(format!(
                "{} layers, {} in its configuration; 1 to {MAX_LAYERS} work",
                layers.len(),
                diff_ids.len()
            )));
        }
        // Bounded by MAX_LAYERS, and by the slots for what is heavy.
        let wanted = layers.iter().zip(&diff_ids);
        let fetches: Vec<_> = wanted
            .map(|(layer, diff_id)| self.ensure_layer(&remote, layer, diff_id))
            .collect();
        futures::future::try_join_all(fetches).await?;
        let mut digests = vec![manifest_digest.clone()];
        if digest != manifest_digest {
            digests.push(digest);
        }
        let record = Record {
            reference: remote.reference.whole(),
            digests,
            manifest: manifest_digest,
            config: config.digest,
            layers: diff_ids,
        };
        let (store, kept) = (self.store.clone(), record.clone());
        blocking(move || {
            store.put_blob(&kept.manifest, &bytes)?;
            store.put_blob(&kept.config, &config_bytes)?;
            store.put_record(&kept)
        })
        .await?;
        Ok(record)
    }

    /// The image as the user wrote it with the digest it has now, and its platforms.
    pub async fn resolve(
        &self,
        image: &str,
        auth: Option<&RegistryAuth>,
    ) -> Result<(String, Vec<Platform>), RuntimeError> {
        let remote = self.remote(image, parse(image)?, auth)?;
        let (body, digest) = remote
            .manifest(&remote.reference)
            .await
            .map_err(|err| remote.error(err))?;
        let manifest = remote.parse(&body)?;
        let platforms = if let Some(manifests) = manifest.manifests {
            let platforms = manifests.into_iter().filter_map(|entry| entry.platform);
            platforms
                .filter(|platform| platform.os != "unknown")
                .map(|platform| Platform {
                    architecture: platform.architecture,
                    os: platform.os,
                })
                .collect()
        } else if let Some(config) = manifest.config {
            let config: ImageConfig = serde_json::from_slice(&remote.small_blob(&config).await?)
                .map_err(|err| remote.fail(format!("damaged image configuration: {err}")))?;
            vec![Platform {
                architecture: config.architecture,
                os: config.os,
            }]
        } else {
            return Err(remote.fail("the manifest is not of an image".into()));
        };
        Ok((pinned(image, &remote.reference, &digest), platforms))
    }

    async fn local_by_digest(
        &self,
        reference: &Reference,
        digest: &str,
    ) -> Result<Option<Record>, RuntimeError> {
        let (store, digest, whole) = (self.store.clone(), digest.to_owned(), reference.whole());
        blocking(move || {
            let Some(mut record) = store.find_digest(&digest) else {
                return Ok(None);
            };
            if record.reference != whole && store.find(&whole).is_none() {
                // From now on it also goes by this name, which garbage collection is told.
                record.reference = whole;
                store.put_record(&record)?;
            }
            Ok(Some(record))
        })
        .await
    }

    fn remote<'a>(
        &self,
        image: &'a str,
        reference: Reference,
        auth: Option<&RegistryAuth>,
    ) -> Result<Remote<'a>, RuntimeError> {
        let config = ClientConfig {
            protocol: ClientProtocol::HttpsExcept(self.insecure_registries.clone()),
            connect_timeout: Some(CONNECT_TIMEOUT),
            read_timeout: Some(READ_TIMEOUT),
            user_agent: concat!("swarm/", env!("CARGO_PKG_VERSION")),
            // An index is resolved here, against this node's platform.
            platform_resolver: None,
            ..ClientConfig::default()
        };
        // A client caches tokens per registry. One per pull: what one task's credentials
        // opened must not be open to a task without them.
        let client = Client::try_from(config).map_err(|err| RuntimeError::Failed {
            step: "make registry client",
            reason: chain(&err),
        })?;
        let auth = match auth {
            Some(auth) if !auth.identity_token.is_empty() => {
                ClientAuth::Bearer(auth.identity_token.clone())
            }
            Some(auth) if !auth.username.is_empty() => {
                ClientAuth::Basic(auth.username.clone(), auth.password.clone())
            }
            _ => ClientAuth::Anonymous,
        };
        Ok(Remote {
            image,
            reference,
            client,
            auth,
        })
    }

    async fn for_this_platform(
        &self,
        remote: &Remote<'_>,
        body: Vec<u8>,
        digest: &str,
    ) -> Result<(Manifest, Vec<u8>, String), RuntimeError> {
        let manifest = remote.parse(&body)?;
        let Some(entries) = manifest.manifests else {
            return Ok((manifest, body, digest.to_owned()));
        };
        let architecture = oci_architecture();
        let entry = entries
            .iter()
            .find(|entry| {
                entry.platform.as_ref().is_some_and(|platform| {
                    platform.os == "linux" && platform.architecture == architecture
                })
            })
            .ok_or_else(|| {
                RuntimeError::InvalidConfig(format!(
                    "image {} is not made for linux/{architecture}",
                    remote.image
                ))
            })?;
        let reference = remote.reference.clone_with_digest(entry.digest.clone());
        let (body, digest) = remote
            .manifest(&reference)
            .await
            .map_err(|err| remote.error(err))?;
        let manifest = remote.parse(&body)?;
        if manifest.manifests.is_some() {
            return Err(remote.fail("an index inside an index".into()));
        }
        Ok((manifest, body, digest))
    }

    async fn lock(&self, key: &str) -> OwnedMutexGuard<()> {
        let lock = {
            let mut locks = self.locks.lock();
            locks.retain(|_, lock| lock.strong_count() > 0);
            let found = locks.get(key).and_then(Weak::upgrade);
            found.unwrap_or_else(|| {
                let lock = Arc::new(tokio::sync::Mutex::new(()));
                locks.insert(key.to_owned(), Arc::downgrade(&lock));
                lock
            })
        };
        lock.lock_owned().await
    }

    async fn ensure_layer(
        &self,
        remote: &Remote<'_>,
        layer: &Descriptor,
        diff_id: &str,
    ) -> Result<(), RuntimeError> {
        if parse_digest(&layer.digest).is_none() || parse_digest(diff_id).is_none() {
            return Err(remote.fail(format!(
                "unsupported digest {:?} or {diff_id:?}",
                layer.digest
            )));
        }
        if layer.size > self.limits.layer_bytes {
            return Err(remote.fail(format!(
                "layer {} has {} bytes, the limit is {}",
                layer.digest, layer.size, self.limits.layer_bytes
            )));
        }
        let guard = self.lock(diff_id).await;
        if self.store.has_layer(diff_id) {
            return Ok(());
        }
        let _slot = self
            .slots
            .acquire()
            .await
            .expect("the semaphore is never closed");
        let part = self.store.download(&layer.digest, diff_id);
        self.download(remote, layer, &part).await?;
        let (store, diff_id, limit) = (
            self.store.clone(),
            diff_id.to_owned(),
            self.limits.unpacked_bytes,
        );
        let unpacked = tokio::task::spawn_blocking(move || {
            // Held to the end even if the caller goes away.
            let _guard = guard;
            let dir = store.new_layer()?;
            let result = std::fs::File::open(&part)
                .map_err(layer::LayerError::from)
                .and_then(|file| layer::unpack(file, &dir.join("fs"), &diff_id, limit))
                .and_then(|()| Ok(store.keep_layer(&dir, &diff_id)?));
            // Unpacked or useless: in both cases the archive has done its work.
            let _ = std::fs::remove_file(&part);
            let _ = super::store::remove_tree(&dir);
            result
        })
        .await
        .expect("unpacking does not panic");
        unpacked.map_err(|err| remote.fail(format!("layer {}: {}", layer.digest, chain(&err))))
    }

    /// Fills `part` with the layer, going on where an earlier attempt ended.
    async fn download(
        &self,
        remote: &Remote<'_>,
        layer: &Descriptor,
        part: &Path,
    ) -> Result<(), RuntimeError> {
        let failed = |err: std::io::Error| RuntimeError::Failed {
            step: "write layer",
            reason: format!("{}: {err}", part.display()),
        };
        let mut file = tokio::fs::OpenOptions::new()
            .create(true)
            .truncate(false)
            .read(true)
            .write(true)
            .open(part)
            .await
            .map_err(failed)?;
        let mut hash = Sha256::new();
        let mut have = 0;
        let mut buffer = vec![0; 128 << 10];
        loop {
            match file.read(&mut buffer).await.map_err(failed)? {
                0 => break,
                n => {
                    hash.update(&buffer[..n]);
                    have += n as u64;
                }
            }
        }
        let mut last = None;
        for _ in 0..ATTEMPTS {
            if have > layer.size {
                (have, hash) = (0, Sha256::new());
                file.set_len(0).await.map_err(failed)?;
                file.rewind().await.map_err(failed)?;
            }
            if have == layer.size {
                break;
            }
            let mut stream = match remote.layer(layer, have).await {
                Ok((stream, true)) => stream,
                Ok((stream, false)) => {
                    // The registry does not know ranges: from the start.
                    (have, hash) = (0, Sha256::new());
                    file.set_len(0).await.map_err(failed)?;
                    file.rewind().await.map_err(failed)?;
                    stream
                }
                Err(err) if is_unreachable(&err) => {
                    last = Some(err);
                    continue;
                }
                Err(err) => return Err(remote.error(err)),
            };
            while let Some(chunk) = stream.next().await {
                let Ok(chunk) = chunk else { break };
                have += chunk.len() as u64;
                if have > layer.size {
                    break;
                }
                hash.update(&chunk);
                file.write_all(&chunk).await.map_err(failed)?;
            }
            if have > layer.size {
                break;
            }
        }
        file.flush().await.map_err(failed)?;
        if have < layer.size {
            return Err(match last {
                Some(err) => remote.error(err),
                None => remote.fail(format!(
                    "layer {} broke off after {have} of {} bytes",
                    layer.digest, layer.size
                )),
            });
        }
        let found = format!("sha256:{}", hex::encode(hash.finalize()));
        if have > layer.size || found != layer.digest {
            let _ = tokio::fs::remove_file(part).await;
            return Err(remote.fail(format!(
                "the registry sent other bytes than layer {} (digest mismatch)",
                layer.digest
            )));
        }
        Ok(())
    }
}

impl Remote<'_> {
    async fn manifest(
        &self,
        reference: &Reference,
    ) -> Result<(Vec<u8>, String), OciDistributionError> {
        let (body, _) = self
            .client
            .pull_manifest_raw(reference, &self.auth, &MANIFEST_TYPES)
            .await?;
        let digest = digest_of(&body);
        // The client checks this too; whatever else it believes, this must hold.
        if let Some(wanted) = reference.digest()
            && wanted != digest
        {
            return Err(OciDistributionError::SpecViolationError(format!(
                "digest mismatch: the manifest is {digest}, not {wanted}"
            )));
        }
        Ok((body.to_vec(), digest))
    }

    fn parse(&self, body: &[u8]) -> Result<Manifest, RuntimeError> {
        if body.len() > MAX_MANIFEST {
            return Err(self.fail(format!("a manifest of {} bytes is too large", body.len())));
        }
        let manifest: Manifest = serde_json::from_slice(body)
            .map_err(|err| self.fail(format!("damaged manifest: {err}")))?;
        if manifest.schema_version != 2 {
            return Err(self.fail(format!(
                "manifests of schema version {} are not supported",
                manifest.schema_version
            )));
        }
        Ok(manifest)
    }

    async fn small_blob(&self, blob: &Descriptor) -> Result<Vec<u8>, RuntimeError> {
        if parse_digest(&blob.digest).is_none() || blob.size > MAX_MANIFEST as u64 {
            return Err(self.fail(format!("unusable image configuration {}", blob.digest)));
        }
        let mut stream = self
            .client
            .pull_blob_stream(&self.reference, blob.digest.as_str())
            .await
            .map_err(|err| self.error(err))?;
        let mut bytes = Vec::new();
        while let Some(chunk) = stream.next().await {
            bytes.extend_from_slice(&chunk.map_err(|err| self.fail(chain(&err)))?);
            if bytes.len() > MAX_MANIFEST {
                return Err(self.fail("the image configuration is too large".into()));
            }
        }
        if digest_of(&bytes) != blob.digest {
            return Err(self.fail(format!(
                "digest mismatch in image configuration {}",
                blob.digest
            )));
        }
        Ok(bytes)
    }

    /// The layer's bytes from `offset`; `false` if the registry starts from the beginning.
    async fn layer(
        &self,
        layer: &Descriptor,
        offset: u64,
    ) -> Result<(SizedStream, bool), OciDistributionError> {
        let digest = layer.digest.as_str();
        if offset == 0 {
            return Ok((
                self.client
                    .pull_blob_stream(&self.reference, digest)
                    .await?,
                true,
            ));
        }
        let response = self
            .client
            .pull_blob_stream_partial(&self.reference, digest, offset, None);
        Ok(match response.await? {
            BlobResponse::Full(stream) => (stream, false),
            BlobResponse::Partial(stream) => (stream, true),
        })
    }

    fn fail(&self, reason: String) -> RuntimeError {
        RuntimeError::Pull {
            image: self.image.to_owned(),
            reason,
        }
    }

    fn error(&self, err: OciDistributionError) -> RuntimeError {
        let image = self.image.to_owned();
        let missing = match &err {
            OciDistributionError::RegistryError { envelope, .. } => {
                envelope.errors.iter().any(|err| {
                    matches!(
                        err.code,
                        OciErrorCode::ManifestUnknown
                            | OciErrorCode::NameUnknown
                            | OciErrorCode::NameInvalid
                            | OciErrorCode::NotFound
                    )
                })
            }
            OciDistributionError::ServerError { code, .. } => *code == 404,
            OciDistributionError::ImageManifestNotFoundError(_) => true,
            _ => false,
        };
        if missing {
            return RuntimeError::NoSuchImage { image };
        }
        let reason = match &err {
            OciDistributionError::UnauthorizedError { .. }
            | OciDistributionError::AuthenticationFailure(_) => format!(
                "{} refuses access: log in, or use --with-registry-auth",
                self.reference.registry()
            ),
            OciDistributionError::RegistryError { envelope, .. } => envelope
                .errors
                .iter()
                .map(|err| format!("{:?}: {}", err.code, err.message))
                .collect::<Vec<_>>()
                .join("; "),
            other => chain(other),
        };
        RuntimeError::Pull {
            image,
            reason: truncated(reason),
        }
    }
}

/// What a registry sends ends up in task statuses; those are small.
fn truncated(mut reason: String) -> String {
    if reason.len() > 500 {
        let end = (0..=500)
            .rev()
            .find(|at| reason.is_char_boundary(*at))
            .unwrap_or(0);
        reason.truncate(end);
        reason.push('…');
    }
    reason
}

/// No answer, or the answer of a registry that is ill: worth another try.
fn is_unreachable(err: &OciDistributionError) -> bool {
    match err {
        OciDistributionError::RequestError(_) | OciDistributionError::IoError(_) => true,
        OciDistributionError::ServerError { code, .. } => *code >= 500,
        _ => false,
    }
}

/// An error with its causes, which HTTP clients hide.
pub(super) fn chain(err: &dyn std::error::Error) -> String {
    let mut text = err.to_string();
    let mut next = err.source();
    while let Some(cause) = next {
        let cause_text = cause.to_string();
        if !text.contains(&cause_text) {
            text = format!("{text}: {cause_text}");
        }
        next = cause.source();
    }
    text
}

/// Parses an image reference; "nginx" is "docker.io/library/nginx:latest".
pub(super) fn parse(image: &str) -> Result<Reference, RuntimeError> {
    let invalid = |why: String| {
        RuntimeError::InvalidConfig(format!("invalid image reference {image:?}: {why}"))
    };
    let reference: Reference = image.parse().map_err(|err| invalid(chain(&err)))?;
    if let Some(digest) = reference.digest()
        && parse_digest(digest).is_none()
    {
        return Err(invalid("only sha256 digests are supported".into()));
    }
    Ok(reference)
}

/// As the user wrote it, with its tag and the digest.
fn pinned(image: &str, reference: &Reference, digest: &str) -> String {
    let name = image.split_once('@').map_or(image, |(name, _)| name);
    let has_tag = name
        .rsplit('/')
        .next()
        .is_some_and(|last| last.contains(':'));
    match reference.tag() {
        Some(tag) if !has_tag => format!("{name}:{tag}@{digest}"),
        _ => format!("{name}@{digest}"),
    }
}

/// This machine's architecture in the words of images.
pub(super) fn oci_architecture() -> &'static str {
    match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        "x86" => "386",
        other => other,
    }
}

/// Runs file work on a thread of its own.
pub(super) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> std::io::Result<T> + Send + 'static,
) -> Result<T, RuntimeError> {
    tokio::task::spawn_blocking(work)
        .await
        .expect("file work does not panic")
        .map_err(|err| RuntimeError::Failed {
            step: "use the image store",
            reason: err.to_string(),
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pinned_reference_keeps_the_users_words() {
        let digest = digest_of(b"x");
        let pin = |image: &str| pinned(image, &parse(image).unwrap(), &digest);
        assert_eq!(pin("nginx"), format!("nginx:latest@{digest}"));
        assert_eq!(pin("h:5000/a/b:1"), format!("h:5000/a/b:1@{digest}"));
        assert_eq!(pin("h:5000/a/b"), format!("h:5000/a/b:latest@{digest}"));
        assert_eq!(pin(&format!("a:1@{digest}")), format!("a:1@{digest}"));
        assert_eq!(pin(&format!("a@{digest}")), format!("a@{digest}"));
    }

    #[test]
    fn a_bad_reference_is_fatal_and_quoted() {
        for image in ["", "UPPER", "a b", "a@sha256:12", "http://x/y"] {
            let err = parse(image).unwrap_err();
            assert!(err.is_fatal(), "{image}");
            assert!(err.to_string().contains(&format!("{image:?}")), "{err}");
        }
    }

    #[test]
    fn long_reasons_are_cut_between_characters() {
        let cut = truncated("ä".repeat(1000));
        assert!(cut.len() < 510 && cut.ends_with('…'));
    }
}
