//! Pulling, unpacking and dropping images, from a registry that is honest or not. Needs root.

mod support;

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::json;
use support::{Host, Layer, Tar, Trick, architecture, busybox, digest, eventually};
use swarm_agent::runtime::{OciRuntime, Runtime, RuntimeError};
use swarm_proto::v1::RegistryAuth;

/// The files of the one layer whose digest this is.
fn unpacked(host: &Host, layer: &Layer) -> PathBuf {
    host.config
        .root
        .join("layers")
        .join(&layer.diff_id[7..33])
        .join("fs")
}

fn count(dir: &Path) -> usize {
    fs::read_dir(dir).unwrap().count()
}

/// Nothing is left of a pull that failed, and the layer is not taken for good.
async fn refused(host: &Host, runtime: &OciRuntime, archive: Vec<u8>) -> String {
    let (image, _) = host
        .registry
        .put_image("bad", json!({}), &[Layer::gzip(&archive)]);
    let err = runtime.pull(&image, None).await.unwrap_err();
    assert!(
        matches!(err, RuntimeError::Pull { .. }) && !err.is_fatal(),
        "{err}"
    );
    for dir in ["layers", "tmp", "downloads", "images"] {
        assert_eq!(count(&host.config.root.join(dir)), 0, "{dir}");
    }
    err.to_string()
}

#[tokio::test]
async fn archives_that_reach_outside_are_refused() {
    let host = Host::new();
    let runtime = host.runtime();
    let outside = host.dir.path().join("victim");
    fs::write(&outside, "untouched").unwrap();
    let victim = outside.to_str().unwrap();
    let up = format!("{}{}", "../".repeat(12), victim.trim_start_matches('/'));

    let archive = Tar::new().file(&up, 0o644, b"evil").finish();
    assert!(refused(&host, &runtime, archive).await.contains(".."));
    let archive = Tar::new().dir("a", 0o755).hardlink("a/link", &up).finish();
    assert!(refused(&host, &runtime, archive).await.contains(".."));
    // Inside the layer's root this path does not exist, whatever the host has there.
    let archive = Tar::new().hardlink("link", victim).finish();
    assert!(
        refused(&host, &runtime, archive)
            .await
            .contains("hard link")
    );
    let archive = Tar::new().device("null").finish();
    assert!(refused(&host, &runtime, archive).await.contains("device"));
    assert_eq!(fs::read_to_string(&outside).unwrap(), "untouched");
}

#[tokio::test]
async fn symbolic_links_lead_to_places_inside_only() {
    let host = Host::new();
    let runtime = host.runtime();
    let outside = host.dir.path().join("victims");
    fs::create_dir(&outside).unwrap();
    fs::write(outside.join("file"), "untouched").unwrap();
    let target = outside.to_str().unwrap();
    let archive = Tar::new()
        .symlink("door", target)
        .file("door/file", 0o644, b"evil")
        .symlink("up", "../../../../../../..")
        .file("up/top", 0o644, b"top")
        .symlink("name", &format!("{target}/file"))
        .file("name", 0o644, b"replaced")
        .finish();
    let layer = Layer::plain(&archive);
    let (image, _) = host
        .registry
        .put_image("links", json!({}), std::slice::from_ref(&layer));
    // A link to a place that the layer does not have: nothing to write through.
    match runtime.pull(&image, None).await {
        Ok(_) => {
            let root = unpacked(&host, &layer);
            assert_eq!(fs::read(root.join("top")).unwrap(), b"top");
            assert!(fs::symlink_metadata(root.join("name")).unwrap().is_file());
        }
        Err(err) => assert!(err.to_string().contains("door/file"), "{err}"),
    }
    assert_eq!(count(&outside), 1);
    assert_eq!(
        fs::read_to_string(outside.join("file")).unwrap(),
        "untouched"
    );
}

#[tokio::test]
async fn all_packings_are_read_and_files_keep_what_matters() {
    let host = Host::new();
    let runtime = host.runtime();
    let base = Tar::new()
        .dir("./", 0o755)
        .dir("etc", 0o750)
        .file("etc/gone", 0o644, b"old")
        .dir("etc/all", 0o755)
        .file("etc/all/x", 0o644, b"x")
        .file("bin/tool", 0o4755, b"tool")
        .hardlink("bin/same", "bin/tool")
        .owned("data", 4321, b"mine")
        .symlink("etc/link", "/nowhere/at/all")
        .finish();
    let above = Tar::new()
        .file("etc/.wh.gone", 0, b"")
        .file("etc/all/.wh..wh..opq", 0, b"")
        .finish();
    let layers = [
        Layer::gzip(&base),
        Layer::zstd(&above),
        Layer::plain(&Tar::new().dir("z", 0o700).finish()),
    ];
    let (image, _) = host.registry.put_image("packed", json!({}), &layers);
    runtime.pull(&image, None).await.unwrap();
    let root = unpacked(&host, &layers[0]);
    let meta = |path: &str| fs::symlink_metadata(root.join(path)).unwrap();
    assert_eq!(meta("etc").mode() & 0o7777, 0o750);
    assert_eq!(meta("etc").mtime(), 1_700_000_000);
    assert_eq!(meta("bin/tool").mode() & 0o7777, 0o4755);
    assert_eq!(meta("bin/tool").ino(), meta("bin/same").ino());
    assert_eq!(meta("data").uid(), 4321);
    assert_eq!(
        fs::read_link(root.join("etc/link")).unwrap(),
        Path::new("/nowhere/at/all")
    );
    let root = unpacked(&host, &layers[1]);
    let gone = fs::symlink_metadata(root.join("etc/gone")).unwrap();
    assert!(gone.file_type().is_char_device() && gone.rdev() == 0);
    let opaque = xattr::get(root.join("etc/all"), "trusted.overlay.opaque").unwrap();
    assert_eq!(opaque.as_deref(), Some(&b"y"[..]));
    assert_eq!(count(&root.join("etc/all")), 0);
}

#[tokio::test]
async fn lies_about_digests_are_found_out() {
    let host = Host::new();
    let runtime = host.runtime();
    let archive = Tar::new().file("a", 0o644, b"a").finish();
    let layer = Layer::gzip(&archive);

    let (image, _) = host
        .registry
        .put_image("swapped", json!({}), std::slice::from_ref(&layer));
    let other = vec![0; layer.packed.len()];
    host.registry
        .shelf
        .lock()
        .unwrap()
        .blobs
        .insert(digest(&layer.packed), other);
    let err = runtime.pull(&image, None).await.unwrap_err();
    assert!(err.to_string().contains("digest mismatch"), "{err}");

    let mut lying = Layer::gzip(&Tar::new().file("b", 0o644, b"b").finish());
    lying.diff_id = digest(b"something else");
    let (image, _) = host.registry.put_image("lying", json!({}), &[lying]);
    let err = runtime.pull(&image, None).await.unwrap_err();
    assert!(err.to_string().contains("the image says"), "{err}");

    // The manifest under a digest is another one.
    let (image, good) = host
        .registry
        .put_image("pinned", json!({}), &[Layer::gzip(&busybox())]);
    let wrong = digest(b"wrong");
    let manifest = host.registry.shelf.lock().unwrap().manifests["pinned:1"].clone();
    host.registry
        .shelf
        .lock()
        .unwrap()
        .manifests
        .insert(format!("pinned@{wrong}"), manifest);
    let err = runtime
        .pull(&format!("{image}@{wrong}"), None)
        .await
        .unwrap_err();
    assert!(matches!(err, RuntimeError::Pull { .. }), "{err}");
    runtime
        .pull(&format!("{image}@{good}"), None)
        .await
        .unwrap();
    assert_eq!(count(&host.config.root.join("downloads")), 0);
}

#[tokio::test]
async fn an_image_that_does_not_exist_is_final_and_a_dead_registry_is_not() {
    let host = Host::new();
    let runtime = host.runtime();
    let missing = format!("{}/nothing:1", host.registry.address);
    let err = runtime.pull(&missing, None).await.unwrap_err();
    assert!(
        matches!(err, RuntimeError::NoSuchImage { .. }) && err.is_fatal(),
        "{err}"
    );
    assert!(
        runtime
            .resolve(&missing, None)
            .await
            .unwrap_err()
            .is_fatal()
    );
    // A port where nobody listens; TLS, since it is not among the insecure ones.
    let err = runtime.pull("127.0.0.1:1/x:1", None).await.unwrap_err();
    assert!(matches!(err, RuntimeError::Pull { .. }), "{err}");
    assert!(err.to_string().contains("onnect"), "{err}");
    // Plain HTTP is not spoken to a registry that is not named.
    let mut strict = Host::new();
    strict.config.insecure_registries.clear();
    let image = strict.serve_busybox();
    let err = strict.runtime().pull(&image, None).await.unwrap_err();
    assert!(matches!(err, RuntimeError::Pull { .. }), "{err}");
}

#[tokio::test]
async fn what_is_on_disk_needs_no_registry() {
    let host = Host::new();
    let runtime = host.runtime();
    let layer = Layer::gzip(&busybox());
    let (image, known) = host.registry.put_image("busybox", json!({}), &[layer]);
    let config = runtime.pull(&image, None).await.unwrap();
    let (name, port) = host.registry.address.split_once(':').unwrap();
    assert!(!name.is_empty() && !port.is_empty());
    // The same registry name, with nobody there any more.
    host.registry.shelf.lock().unwrap().manifests.clear();
    host.registry.shelf.lock().unwrap().blobs.clear();
    let pinned = format!("{image}@{known}");
    assert_eq!(runtime.pull(&pinned, None).await.unwrap(), config);
    let again = host.runtime();
    assert_eq!(again.pull(&pinned, None).await.unwrap(), config);
    // A tag is asked for each time: the registry answers that it is gone.
    assert!(matches!(
        again.pull(&image, None).await,
        Err(RuntimeError::NoSuchImage { .. })
    ));
}

#[tokio::test]
async fn a_download_goes_on_where_it_broke_off() {
    let host = Host::new();
    let runtime = host.runtime();
    let layer = Layer::gzip(&busybox());
    let blob = digest(&layer.packed);
    let half = layer.packed.len() / 2;
    let (image, _) = host
        .registry
        .put_image("busybox", json!({}), std::slice::from_ref(&layer));
    host.registry.shelf.lock().unwrap().break_after = Some((blob.clone(), half));
    runtime.pull(&image, None).await.unwrap();
    assert_eq!(host.registry.times_served(&blob), 2);
    assert!(unpacked(&host, &layer).join("bin/busybox").exists());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn pulls_at_the_same_time_download_each_layer_once() {
    let host = Host::new();
    let runtime = host.runtime();
    let shared = Layer::gzip(&busybox());
    let blob = digest(&shared.packed);
    let images: Vec<String> = (0..8)
        .map(|index| {
            let own = Layer::gzip(
                &Tar::new()
                    .file(&format!("own{index}"), 0o644, b"x")
                    .finish(),
            );
            host.registry
                .put_image(&format!("i{index}"), json!({}), &[shared.clone(), own])
                .0
        })
        .collect();
    let pulls = images.iter().map(|image| runtime.pull(image, None));
    for result in futures::future::join_all(pulls).await {
        result.unwrap();
    }
    assert_eq!(host.registry.times_served(&blob), 1);
    assert_eq!(count(&host.config.root.join("layers")), 9);
}

#[tokio::test]
async fn an_index_is_resolved_for_this_machine_and_its_platforms_are_told() {
    let host = Host::new();
    let runtime = host.runtime();
    let (_, mine) = host
        .registry
        .put_image("mine", json!({}), &[Layer::gzip(&busybox())]);
    let shelf = host.registry.shelf.lock().unwrap().manifests[&format!("mine@{mine}")].clone();
    host.registry
        .shelf
        .lock()
        .unwrap()
        .manifests
        .insert(format!("multi@{mine}"), shelf);
    let entry = |digest: &str, os: &str, architecture: &str| {
        json!({ "mediaType": "application/vnd.oci.image.manifest.v1+json", "size": 1,
            "digest": digest, "platform": { "os": os, "architecture": architecture } })
    };
    let kind = "application/vnd.oci.image.index.v1+json";
    let nowhere = digest(b"nowhere");
    let index = json!({ "schemaVersion": 2, "mediaType": kind, "manifests": [
        entry(&nowhere, "linux", "vax"), entry(&mine, "linux", architecture()),
        entry(&nowhere, "unknown", "unknown"),
    ]});
    let known = host.registry.put_manifest("multi", "1", kind, &index);
    let image = format!("{}/multi:1", host.registry.address);
    let (pinned, platforms) = runtime.resolve(&image, None).await.unwrap();
    assert_eq!(pinned, format!("{image}@{known}"));
    let shown: Vec<(&str, &str)> = platforms
        .iter()
        .map(|it| (it.os.as_str(), it.architecture.as_str()))
        .collect();
    assert_eq!(shown, [("linux", "vax"), ("linux", architecture())]);
    runtime.pull(&pinned, None).await.unwrap();

    let index = json!({ "schemaVersion": 2, "mediaType": kind, "manifests": [entry(&nowhere, "linux", "vax")]});
    host.registry.put_manifest("vax", "1", kind, &index);
    let err = runtime
        .pull(&format!("{}/vax:1", host.registry.address), None)
        .await
        .unwrap_err();
    assert!(
        err.is_fatal() && err.to_string().contains("linux/"),
        "{err}"
    );
}

#[tokio::test]
async fn credentials_are_sent_and_not_shared_between_pulls() {
    let host = Host::new();
    let runtime = host.runtime();
    let image = host.serve_busybox();
    host.registry.shelf.lock().unwrap().login = Some("ann:secret".into());
    let auth = |password: &str| RegistryAuth {
        username: "ann".into(),
        password: password.into(),
        identity_token: String::new(),
    };
    let err = runtime
        .pull(&image, Some(&auth("wrong")))
        .await
        .unwrap_err();
    assert!(
        err.to_string().contains("refuses access") && !err.to_string().contains("wrong"),
        "{err}"
    );
    runtime.pull(&image, Some(&auth("secret"))).await.unwrap();
    assert!(runtime.resolve(&image, None).await.is_err());
}

#[tokio::test]
async fn oversized_answers_are_refused() {
    let mut host = Host::new();
    host.config.images.layer_bytes = 1 << 20;
    host.config.images.unpacked_bytes = 2 << 20;
    let runtime = host.runtime();
    let bomb = Tar::new().file("zeros", 0o644, &vec![0; 4 << 20]).finish();
    let text = refused(&host, &runtime, bomb).await;
    assert!(text.contains("unpacked"), "{text}");
    let noise: Vec<u8> = (0..2_000_000u32)
        .map(|n| (n.wrapping_mul(2_654_435_761) >> 13) as u8)
        .collect();
    let big = Layer::plain(&Tar::new().file("noise", 0o644, &noise[..1 << 20]).finish());
    let (image, _) = host.registry.put_image("big", json!({}), &[big]);
    let err = runtime.pull(&image, None).await.unwrap_err();
    assert!(err.to_string().contains("the limit is"), "{err}");
}

#[tokio::test]
async fn garbage_collection_spares_what_is_named_and_what_containers_use() {
    let mut host = Host::new();
    host.config.images.unused_for = Duration::ZERO;
    let runtime = host.runtime();
    let used = host.serve_busybox();
    runtime.pull(&used, None).await.unwrap();
    let mut images = BTreeMap::new();
    for name in ["kept", "dropped"] {
        let layer = Layer::gzip(&Tar::new().file(name, 0o644, name.as_bytes()).finish());
        let (image, _) = host
            .registry
            .put_image(name, json!({}), std::slice::from_ref(&layer));
        runtime.pull(&image, None).await.unwrap();
        images.insert(name, (image, layer));
    }
    let config = host.container(&used, &["true"]);
    runtime.create(&config).await.unwrap();
    fs::write(host.config.root.join("downloads/half.part"), b"half").unwrap();
    runtime
        .collect_garbage(&[images["kept"].0.clone()])
        .await
        .unwrap();
    assert!(unpacked(&host, &images["kept"].1).exists());
    assert!(!unpacked(&host, &images["dropped"].1).exists());
    assert_eq!(count(&host.config.root.join("layers")), 2);
    assert_eq!(count(&host.config.root.join("downloads")), 0);
    runtime.start(&config.task_id).await.unwrap();
    assert_eq!(runtime.wait(&config.task_id).await.unwrap().code, 0);
    runtime.remove(&config.task_id).await.unwrap();
    runtime.collect_garbage(&[]).await.unwrap();
    for dir in ["layers", "blobs/sha256", "images", "downloads", "tmp"] {
        assert_eq!(count(&host.config.root.join(dir)), 0, "{dir}");
    }
    eventually("no process is left", || host.processes().is_empty());
}

#[tokio::test]
async fn an_image_that_was_in_use_a_moment_ago_is_kept() {
    let host = Host::new();
    let runtime = host.runtime();
    let image = host.serve_busybox();
    let (pinned, _) = runtime.resolve(&image, None).await.unwrap();
    runtime.pull(&pinned, None).await.unwrap();
    let layers = count(&host.config.root.join("layers"));
    let config = host.container(&pinned, &["true"]);
    runtime.create(&config).await.unwrap();
    runtime.remove(&config.task_id).await.unwrap();
    let next = runtime.collect_garbage(&[]).await.unwrap();
    assert!(
        next.is_some_and(|next| next <= host.config.images.unused_for),
        "{next:?}; is the disk nearly full?"
    );
    assert!(layers > 0);
    assert_eq!(count(&host.config.root.join("layers")), layers);
}

/// A host whose registry does this for paths with that in them, and an image there.
fn tricked(part: &str, trick: Trick) -> (Host, String) {
    let host = Host::new();
    let layer = Layer::gzip(&Tar::new().file("a", 0o644, b"a").finish());
    let (image, _) = host.registry.put_image("odd", json!({}), &[layer]);
    let mut shelf = host.registry.shelf.lock().unwrap();
    shelf.tricks.push((part.to_owned(), trick));
    drop(shelf);
    (host, image)
}

#[tokio::test]
async fn an_answer_that_does_not_end_is_not_taken_into_memory() {
    for part in ["/manifests/", "/blobs/"] {
        for status in ["200 OK", "500 Internal Server Error", "400 Bad Request"] {
            let (host, image) = tricked(part, Trick::Endless(status));
            let err = host.runtime().pull(&image, None).await.unwrap_err();
            assert!(matches!(err, RuntimeError::Pull { .. }), "{err}");
            assert!(err.to_string().len() < 700, "{err}");
            // 4 MiB, and what lies in the buffers of the sockets.
            let sent = host.registry.shelf.lock().unwrap().endless;
            assert!(sent < 32 << 20, "{part} {status}: {sent} bytes were taken");
        }
    }
    // The token server is not trusted with more.
    let (host, image) = tricked("/token", Trick::Endless("200 OK"));
    let realm = format!("http://{}/token", host.registry.address);
    let challenge = ("/v2/".to_owned(), Trick::Challenge(realm));
    host.registry.shelf.lock().unwrap().tricks.push(challenge);
    let err = host.runtime().pull(&image, None).await.unwrap_err();
    assert!(err.to_string().contains("more than"), "{err}");
    assert!(host.registry.shelf.lock().unwrap().endless < 32 << 20);
}

#[tokio::test]
async fn a_registry_that_stands_still_is_given_up_with_the_reason() {
    // Long enough for whoever does answer.
    let patience = std::time::Duration::from_secs(1);
    let (mut host, image) = tricked("/manifests/", Trick::Silence);
    host.config.images.patience = patience;
    let err = host.runtime().pull(&image, None).await.unwrap_err();
    assert!(err.to_string().contains("did not answer within"), "{err}");
    assert!(!err.is_fatal());

    let (mut host, image) = tricked("/manifests/", Trick::Drip(1 << 20));
    host.config.images.patience = patience;
    let err = host.runtime().pull(&image, None).await.unwrap_err();
    assert!(err.to_string().contains("did not answer within"), "{err}");

    // A layer that comes too slowly to ever be there. Its image's configuration comes at once.
    let mut host = Host::new();
    host.config.images.patience = patience;
    let noise: Vec<u8> = (0..400_000u32)
        .map(|n| (n.wrapping_mul(2_654_435_761) >> 13) as u8)
        .collect();
    let layer = Layer::plain(&Tar::new().file("noise", 0o644, &noise).finish());
    let size = layer.packed.len();
    let slow = digest(&layer.packed);
    let (image, _) = host.registry.put_image("slow", json!({}), &[layer]);
    host.registry
        .shelf
        .lock()
        .unwrap()
        .tricks
        .push((slow, Trick::Drip(size)));
    let err = host.runtime().pull(&image, None).await.unwrap_err();
    assert!(
        err.to_string().contains("broke off") && err.to_string().contains("came within"),
        "{err}"
    );
}

#[tokio::test]
async fn redirects_are_followed_a_little_and_without_credentials_to_others() {
    let auth = RegistryAuth {
        username: "ann".into(),
        password: "secret".into(),
        identity_token: String::new(),
    };
    let (host, image) = tricked("/nowhere", Trick::Silence);
    let elsewhere = support::Registry::start();
    {
        let mut shelf = host.registry.shelf.lock().unwrap();
        shelf.login = Some("ann:secret".into());
        elsewhere.shelf.lock().unwrap().blobs = shelf.blobs.clone();
        let blobs: Vec<String> = shelf.blobs.keys().cloned().collect();
        for blob in blobs {
            let to = format!("http://{}/v2/odd/blobs/{blob}", elsewhere.address);
            shelf.tricks.push((blob, Trick::Redirect(to)));
        }
    }
    host.runtime().pull(&image, Some(&auth)).await.unwrap();
    let asked = elsewhere.shelf.lock().unwrap().asked.clone();
    assert_eq!(asked.len(), 2, "{asked:?}");
    assert!(asked.iter().all(|(_, shown)| shown.is_none()), "{asked:?}");

    let (host, image) = tricked("/nowhere", Trick::Silence);
    let round = Trick::Redirect(format!(
        "http://{}/v2/odd/manifests/1",
        host.registry.address
    ));
    host.registry
        .shelf
        .lock()
        .unwrap()
        .tricks
        .push(("/manifests/".into(), round));
    let err = host.runtime().pull(&image, None).await.unwrap_err();
    assert!(err.to_string().contains("too many redirects"), "{err}");
    assert!(host.registry.shelf.lock().unwrap().asked.len() < 10);
}

#[tokio::test]
async fn a_token_is_fetched_where_the_registry_says_and_shown_to_it() {
    let (host, image) = tricked("/nowhere", Trick::Silence);
    let tokens = support::Registry::start();
    let realm = format!("http://{}/token", tokens.address);
    host.registry
        .shelf
        .lock()
        .unwrap()
        .tricks
        .push(("/v2/".into(), Trick::Challenge(realm)));
    let auth = RegistryAuth {
        username: "ann".into(),
        password: "secret".into(),
        identity_token: String::new(),
    };
    host.runtime().pull(&image, Some(&auth)).await.unwrap();
    let asked = tokens.shelf.lock().unwrap().asked.clone();
    assert!(
        asked[0].0.contains("scope=repository%3Aodd%3Apull"),
        "{asked:?}"
    );
    assert!(
        asked[0]
            .1
            .as_ref()
            .is_some_and(|shown| shown.starts_with("Basic ")),
        "{asked:?}"
    );
    let shown = host.registry.shelf.lock().unwrap().asked.clone();
    let last = shown.last().unwrap();
    assert_eq!(last.1.as_deref(), Some("Bearer abc"), "{shown:?}");
}

#[tokio::test]
async fn sizes_that_are_not_what_the_manifest_says_are_found_out() {
    let host = Host::new();
    let runtime = host.runtime();
    let layer = Layer::gzip(&Tar::new().file("a", 0o644, b"a").finish());
    let (image, _) = host
        .registry
        .put_image("sized", json!({}), std::slice::from_ref(&layer));
    let (kind, bytes) = host.registry.shelf.lock().unwrap().manifests["sized:1"].clone();
    let manifest: serde_json::Value = serde_json::from_slice(&bytes).unwrap();
    for (size, expected) in [
        (layer.packed.len() - 1, "digest mismatch"),
        (layer.packed.len() + 1, "broke off"),
    ] {
        let mut other = manifest.clone();
        other["layers"][0]["size"] = size.into();
        host.registry.put_manifest("sized", "1", &kind, &other);
        let err = runtime.pull(&image, None).await.unwrap_err();
        assert!(err.to_string().contains(expected), "{err}");
    }
    let mut other = manifest.clone();
    other["config"]["size"] = (5 << 20).into();
    host.registry.put_manifest("sized", "1", &kind, &other);
    let err = runtime.pull(&image, None).await.unwrap_err();
    assert!(
        err.to_string().contains("unusable image configuration"),
        "{err}"
    );
    for dir in ["layers", "tmp", "images"] {
        assert_eq!(count(&host.config.root.join(dir)), 0, "{dir}");
    }
}

#[tokio::test]
async fn odd_entries_of_an_archive_are_refused() {
    let host = Host::new();
    let runtime = host.runtime();
    let archive = Tar::new().dir("a", 0o755).hardlink("b", "a").finish();
    assert!(
        refused(&host, &runtime, archive)
            .await
            .contains("hard link to a directory")
    );
    let archive = Tar::new().link(tar::EntryType::Block, "disk", "").finish();
    assert!(refused(&host, &runtime, archive).await.contains("device"));
    let archive = Tar::new()
        .link(tar::EntryType::new(b'Z'), "what", "")
        .finish();
    assert!(
        refused(&host, &runtime, archive)
            .await
            .contains("unknown kind")
    );
    let archive = Tar::new().file("a", 0o644, b"cut off here").finish();
    assert!(
        refused(&host, &runtime, archive[..515].to_vec())
            .await
            .contains("damaged")
    );
}
