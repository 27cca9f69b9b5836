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

use parking_lot::Mutex;
use serde::Deserialize;
use sha2::{Digest, Sha256};
use swarm_proto::image::ImageRef;
use swarm_proto::v1::{Platform, RegistryAuth};
use tokio::io::{AsyncReadExt, AsyncSeekExt, AsyncWriteExt};
use tokio::sync::{OwnedMutexGuard, Semaphore};
use tokio::time::Instant;

use super::bundle::ImageConfig;
use super::oci::ImageLimits;
use super::registry::{Blob, MANIFEST_MAX, Registries, RegistryError, Repository};
use super::store::{Record, Store, digest_of, parse_digest};
use super::{RuntimeError, layer};

/// What fits in one page of overlayfs options; Docker allows 127.
const MAX_LAYERS: usize = 120;
/// Images in an index.
const MAX_PLATFORMS: usize = 1024;
/// Layers in flight at once, over all pulls.
const PARALLEL_LAYERS: usize = 4;
/// A layer is asked for again, from where it broke off, this many times.
const ATTEMPTS: usize = 4;
/// Fewer bytes in a second than this, over [`ImageLimits::patience`], are a standstill: a registry that
/// sends for ever would keep others from pulling.
const RATE_MIN: u64 = 16 << 10;

/// A manifest or an index, with the fields that matter here.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Manifest {
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
    registries: Registries,
    limits: ImageLimits,
    slots: Arc<Semaphore>,
    /// Whoever holds a layer's lock may download it; the others wait and find it.
    locks: Mutex<HashMap<String, Weak<tokio::sync::Mutex<()>>>>,
}

/// One image's conversation with its registry.
struct Remote<'a> {
    /// As the user wrote it.
    image: &'a str,
    reference: &'a ImageRef,
    repository: Repository<'a>,
}

impl Puller {
    pub fn new(
        store: Store,
        insecure_registries: Vec<String>,
        limits: ImageLimits,
    ) -> Result<Self, RuntimeError> {
        let registries = Registries::new(insecure_registries, limits.patience);
        Ok(Self {
            store,
            registries: registries.map_err(|err| RuntimeError::Failed {
                step: "make registry client",
                reason: err.to_string(),
            })?,
            limits,
            slots: Arc::new(Semaphore::new(PARALLEL_LAYERS)),
            locks: Mutex::default(),
        })
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
        let remote = self.remote(image, &reference, auth);
        let (body, digest) = match remote.manifest(None).await {
            Ok(found) => found,
            Err(err @ RegistryError::Unreachable(_)) => {
                let name = reference.whole();
                let store = self.store.clone();
                return match blocking(move || Ok(store.find(&name))).await? {
                    Some(record) if reference.digest().is_none() => {
                        tracing::warn!(image, error = %err, "registry unreachable, using the image on this node");
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
            reference: reference.whole(),
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
        let reference = parse(image)?;
        let remote = self.remote(image, &reference, auth);
        let (body, digest) = remote
            .manifest(None)
            .await
            .map_err(|err| remote.error(err))?;
        let manifest = remote.parse(&body)?;
        let platforms = if let Some(platforms) = platforms(&manifest) {
            platforms
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
        Ok((reference.pinned(&digest).to_string(), platforms))
    }

    async fn local_by_digest(
        &self,
        reference: &ImageRef,
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
        reference: &'a ImageRef,
        auth: Option<&'a RegistryAuth>,
    ) -> Remote<'a> {
        Remote {
            image,
            reference,
            repository: self.registries.repository(reference, auth),
        }
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
        if parse_digest(&entry.digest).is_none() {
            return Err(remote.fail(format!("unsupported digest {:?}", entry.digest)));
        }
        let (body, digest) = remote
            .manifest(Some(&entry.digest))
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
            let mut blob = match remote.repository.blob(&layer.digest, have).await {
                Ok(blob) => blob,
                Err(err @ RegistryError::Unreachable(_)) => {
                    last = Some(err);
                    continue;
                }
                Err(err) => return Err(remote.error(err)),
            };
            if !blob.resumed {
                // The registry does not know ranges: from the start.
                (have, hash) = (0, Sha256::new());
                file.set_len(0).await.map_err(failed)?;
                file.rewind().await.map_err(failed)?;
            }
            let mut pace = Pace::new(self.limits.patience);
            last = None;
            loop {
                let chunk = match pace.next(&mut blob).await {
                    Ok(Some(chunk)) => chunk,
                    Ok(None) => break,
                    Err(err) => {
                        last = Some(err);
                        break;
                    }
                };
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
            let reason = last.map_or_else(String::new, |err| format!(": {err}"));
            return Err(remote.fail(truncated(format!(
                "layer {} broke off after {have} of {} bytes{reason}",
                layer.digest, layer.size
            ))));
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
    /// A manifest with its digest: the one that the reference names, or the one with this digest.
    async fn manifest(&self, digest: Option<&str>) -> Result<(Vec<u8>, String), RegistryError> {
        let wanted = digest.or(self.reference.digest());
        let which = wanted.or(self.reference.tag()).unwrap_or("latest");
        let body = self.repository.manifest(which).await?;
        let digest = digest_of(&body);
        if let Some(wanted) = wanted
            && wanted != digest
        {
            return Err(RegistryError::Unusable(format!(
                "digest mismatch: the manifest is {digest}, not {wanted}"
            )));
        }
        Ok((body, digest))
    }

    fn parse(&self, body: &[u8]) -> Result<Manifest, RuntimeError> {
        parse_manifest(body).map_err(|reason| self.fail(reason))
    }

    async fn small_blob(&self, blob: &Descriptor) -> Result<Vec<u8>, RuntimeError> {
        if parse_digest(&blob.digest).is_none() || blob.size > MANIFEST_MAX as u64 {
            return Err(self.fail(format!("unusable image configuration {}", blob.digest)));
        }
        let bytes = self.repository.small_blob(&blob.digest).await;
        let bytes = bytes.map_err(|err| self.error(err))?;
        if digest_of(&bytes) != blob.digest {
            return Err(self.fail(format!(
                "digest mismatch in image configuration {}",
                blob.digest
            )));
        }
        Ok(bytes)
    }

    fn fail(&self, reason: String) -> RuntimeError {
        RuntimeError::Pull {
            image: self.image.to_owned(),
            reason,
        }
    }

    fn error(&self, err: RegistryError) -> RuntimeError {
        let reason = match err {
            RegistryError::Missing => {
                let image = self.image.to_owned();
                return RuntimeError::NoSuchImage { image };
            }
            RegistryError::Denied => format!(
                "{} refuses access: log in, or use --with-registry-auth",
                self.reference.registry()
            ),
            RegistryError::Unreachable(reason) | RegistryError::Unusable(reason) => reason,
        };
        self.fail(truncated(reason))
    }
}

/// Whether a blob still comes fast enough.
struct Pace {
    patience: Duration,
    /// The end of the present stretch, and what must still come in it.
    until: Instant,
    wanted: u64,
}

impl Pace {
    fn new(patience: Duration) -> Self {
        Self {
            patience,
            until: Instant::now() + patience,
            wanted: Self::wanted(patience),
        }
    }

    fn wanted(patience: Duration) -> u64 {
        (RATE_MIN as f64 * patience.as_secs_f64()) as u64
    }

    async fn next(&mut self, blob: &mut Blob) -> Result<Option<bytes::Bytes>, RegistryError> {
        let chunk = tokio::time::timeout_at(self.until, blob.response.chunk()).await;
        let chunk = match chunk {
            Ok(Ok(chunk)) => chunk,
            Ok(Err(err)) => return Err(RegistryError::Unreachable(chain(&err))),
            Err(_) => {
                return Err(RegistryError::Unreachable(format!(
                    "less than {} bytes came within {:?}",
                    Self::wanted(self.patience),
                    self.patience
                )));
            }
        };
        let came = chunk.as_ref().map_or(0, |chunk| chunk.len() as u64);
        self.wanted = self.wanted.saturating_sub(came);
        if self.wanted == 0 {
            *self = Self::new(self.patience);
        }
        Ok(chunk)
    }
}

/// Reads a manifest or an index.
pub(super) fn parse_manifest(body: &[u8]) -> Result<Manifest, String> {
    let manifest: Manifest =
        serde_json::from_slice(body).map_err(|err| format!("damaged manifest: {err}"))?;
    if manifest.schema_version != 2 {
        return Err(format!(
            "manifests of schema version {} are not supported",
            manifest.schema_version
        ));
    }
    if manifest
        .manifests
        .as_ref()
        .is_some_and(|it| it.len() > MAX_PLATFORMS)
    {
        return Err(format!("an index of more than {MAX_PLATFORMS} images"));
    }
    Ok(manifest)
}

/// The platforms of an index; `None` for the manifest of one image.
pub(super) fn platforms(manifest: &Manifest) -> Option<Vec<Platform>> {
    let entries = manifest.manifests.as_ref()?;
    let platforms = entries.iter().filter_map(|entry| entry.platform.as_ref());
    let known = platforms.filter(|platform| platform.os != "unknown");
    Some(
        known
            .map(|platform| Platform {
                architecture: platform.architecture.clone(),
                os: platform.os.clone(),
            })
            .collect(),
    )
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
pub(super) fn parse(image: &str) -> Result<ImageRef, RuntimeError> {
    ImageRef::parse(image)
        .map_err(|_| RuntimeError::InvalidConfig(format!("invalid image reference {image:?}")))
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
