//! Entry points for fuzzing: layers, registries' answers, image configurations, users' tables, logs.
//!
//! Each function takes what somebody else may send and panics when a rule is broken;
//! `seeds` gives inputs that are valid. Only in builds with the feature `fuzzing`. Layers are
//! unpacked for real, so that needs root.

use std::fs;
use std::io::Write as _;
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};

use swarm_proto::TaskId;
use swarm_proto::image::ImageRef;
use swarm_proto::v1::ContainerSpec;

use super::bundle::{self, ImageConfig, NodeFacts, UserSpec};
use super::layer::{self, LayerError};
use super::{ContainerConfig, execshim, logfile, pull, registry, store};

/// What one layer may take here.
const LAYER_MAX: u64 = 1 << 20;

/// An archive. The first byte chooses how the rest is packed: as it is, or with the checksums of
/// its headers set right, and then plain, by gzip or by zstd. Whatever is in it stays in its
/// directory and within its limit.
pub fn layer(data: &[u8]) {
    thread_local!(static BENCH: Bench = Bench::new());
    let Some((&form, rest)) = data.split_first() else {
        return;
    };
    let archive = match form % 4 {
        0 => rest.to_vec(),
        1 => with_checksums(rest),
        2 => gzip(&with_checksums(rest)),
        _ => zstd::encode_all(&*with_checksums(rest), 1).expect("memory takes all"),
    };
    BENCH.with(|bench| {
        if let Err(LayerError::WrongContents { found, .. }) = bench.unpack(&archive, "sha256:0") {
            // All of it was taken but for the name.
            bench
                .unpack(&archive, &found)
                .expect("the same archive again");
        }
    });
}

/// A directory for layers, with neighbours that must not be touched.
struct Bench {
    dir: tempfile::TempDir,
}

impl Bench {
    fn new() -> Self {
        // In memory, unless somebody says where.
        let memory = Path::new("/dev/shm");
        let dir = match memory.is_dir() && std::env::var_os("TMPDIR").is_none() {
            true => tempfile::tempdir_in(memory),
            false => tempfile::tempdir(),
        };
        let dir = dir.expect("a directory can be made");
        fs::create_dir(dir.path().join("victim")).expect("it is empty");
        fs::write(dir.path().join("victim/file"), "untouched").expect("it is ours");
        Self { dir }
    }

    fn unpack(&self, archive: &[u8], diff_id: &str) -> Result<(), LayerError> {
        let path = |name: &str| self.dir.path().join(name);
        fs::File::create(path("archive"))
            .and_then(|mut file| file.write_all(archive))
            .expect("it is ours");
        fs::create_dir(path("fs")).expect("it was removed before");
        let file = fs::File::open(path("archive")).expect("just written");
        let result = layer::unpack(file, &path("fs"), diff_id, LAYER_MAX);
        let mut left = LAYER_MAX;
        check_tree(&path("fs"), &mut left);
        let mut names: Vec<_> = fs::read_dir(self.dir.path())
            .and_then(Iterator::collect::<std::io::Result<Vec<_>>>)
            .expect("it is ours")
            .iter()
            .map(fs::DirEntry::file_name)
            .collect();
        names.sort();
        assert_eq!(names, ["archive", "fs", "victim"]);
        assert_eq!(fs::read_dir(path("victim")).expect("it is ours").count(), 1);
        let victim = path("victim/file");
        assert_eq!(fs::read(&victim).expect("it is ours"), b"untouched");
        let meta = fs::symlink_metadata(&victim).expect("it is ours");
        assert_eq!((meta.nlink(), meta.mode() & 0o7777 & 0o111), (1, 0));
        store::remove_tree(&path("fs")).expect("it is ours");
        result
    }
}

/// No device but overlayfs' marks, and no more bytes than allowed.
fn check_tree(dir: &Path, left: &mut u64) {
    let mut todo = vec![dir.to_owned()];
    while let Some(dir) = todo.pop() {
        for entry in fs::read_dir(&dir).expect("root may read all") {
            let path: PathBuf = entry.expect("root may read all").path();
            let meta = fs::symlink_metadata(&path).expect("nobody removes it");
            let kind = meta.file_type();
            assert!(!kind.is_block_device() && !kind.is_socket(), "{path:?}");
            assert!(!kind.is_char_device() || meta.rdev() == 0, "{path:?}");
            if kind.is_file() {
                // Each name of a file with several counts its share.
                *left = left
                    .checked_sub(meta.len() / meta.nlink())
                    .expect("more was unpacked than allowed");
            }
            if kind.is_dir() {
                todo.push(path);
            }
        }
    }
}

/// The archive with the checksum of every header as it should be: a mutation inside a header
/// then reaches what reads it.
fn with_checksums(data: &[u8]) -> Vec<u8> {
    let mut archive = data.to_vec();
    let mut at = 0;
    while let Some(header) = archive.get_mut(at..at + 512) {
        if header.iter().all(|byte| *byte == 0) {
            at += 512;
            continue;
        }
        header[148..156].fill(b' ');
        let sum: u32 = header.iter().map(|byte| u32::from(*byte)).sum();
        header[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
        let size = header[124..135]
            .iter()
            .take_while(|byte| (b'0'..=b'7').contains(byte))
            .fold(0usize, |size, byte| size * 8 + usize::from(byte - b'0'));
        at += 512 + size.min(archive.len()).next_multiple_of(512);
    }
    archive
}

fn gzip(data: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(data).expect("memory takes all");
    encoder.finish().expect("memory takes all")
}

/// What a registry answers, and what an image says of itself: a manifest or index, or an image
/// configuration. From every configuration that is taken, a container is built that the runtime
/// understands, or a sentence.
pub fn registry_answer(data: &[u8]) {
    if let Ok(manifest) = pull::parse_manifest(data) {
        let _ = pull::platforms(&manifest);
    }
    if let Ok(text) = std::str::from_utf8(data) {
        let _ = pull::parse(text);
        let _ = registry::parse_challenges(text);
    }
    if let Ok(token) = registry::parse_token(data) {
        assert!(!token.is_empty());
    }
    let _ = registry::parse_errors(data);
    let Ok(image) = serde_json::from_slice::<ImageConfig>(data) else {
        return;
    };
    let written = serde_json::to_vec(&image).expect("just read");
    assert!(serde_json::from_slice::<ImageConfig>(&written).is_ok());
    container(&image, ContainerSpec::default());
}

/// A container of this image and spec: built for the runtime, or refused with a sentence.
fn container(image: &ImageConfig, spec: ContainerSpec) {
    let config = ContainerConfig {
        task_id: TaskId::from("t1"),
        name: "web.1.t1".into(),
        spec,
        resources: Default::default(),
        labels: Vec::new(),
        hostname: "t1".into(),
        netns: "/run/netns/x".into(),
        etc_hosts: String::new(),
        resolv_conf: String::new(),
    };
    let node = NodeFacts {
        rootfs: Path::new("/rootfs"),
        dir: Path::new("/dir"),
        cgroup: "/swarm/t1",
        max_open_files: 1024,
        capabilities: u64::MAX,
        architecture: "x86_64",
    };
    match bundle::build(&image.config, &config, &node) {
        Ok(built) => {
            assert!((1..=64).contains(&built.stop_signal));
            let text = built.spec.to_string();
            serde_json::from_str::<oci_spec::runtime::Spec>(&text).expect("the runtime reads it");
        }
        Err(error) => assert!(error.is_fatal(), "{error}"),
    }
}

/// A container of a plain image as a task asks for it. What the managers accept is built, or
/// refused with a sentence that no other attempt will change.
///
/// # Errors
/// That sentence.
pub fn build(config: &ContainerConfig) -> Result<(), String> {
    let image = bundle::ImageProcess {
        cmd: vec!["sh".into()],
        ..bundle::ImageProcess::default()
    };
    let node = NodeFacts {
        rootfs: Path::new("/rootfs"),
        dir: Path::new("/dir"),
        cgroup: "/swarm/t1",
        max_open_files: 1024,
        capabilities: u64::MAX,
        architecture: "x86_64",
    };
    match bundle::build(&image, config, &node) {
        Ok(built) => {
            let text = built.spec.to_string();
            serde_json::from_str::<oci_spec::runtime::Spec>(&text).expect("the runtime reads it");
            Ok(())
        }
        Err(error) => Err(error.to_string()),
    }
}

/// Where the parts of an image are: addresses of its registry, whatever the reference.
pub fn image_urls(image: &ImageRef) {
    let at = registry::url(image, &[], "manifests", image.tag().unwrap_or("latest"));
    let at = at.expect("a reference has an address");
    assert_eq!(at.scheme(), "https");
    assert!(at.path().starts_with("/v2/") && at.query().is_none() && at.fragment().is_none());
    assert!(at.username().is_empty() && at.password().is_none());
    let host = at.host_str().expect("a registry has a name");
    let registry = image.registry().to_ascii_lowercase();
    assert!(registry == "docker.io" || registry.starts_with(host) || registry.starts_with('['));
}

/// A user as a task or an image names it, /etc/passwd and /etc/group, with zero bytes between them.
pub fn users(data: &[u8]) {
    let text = String::from_utf8_lossy(data);
    let mut parts = text.splitn(3, '\0');
    let mut next = || parts.next().unwrap_or_default();
    let (user, passwd, group) = (next(), next(), next());
    let wanted = UserSpec {
        user: user.to_owned(),
        groups: vec!["audio".into()],
    };
    match bundle::resolve_user(&wanted, passwd, group) {
        Ok(identity) => {
            assert!(!identity.home.is_empty());
            assert!(identity.groups.is_sorted_by(|a, b| a < b));
        }
        Err(sentence) => assert!(sentence.len() <= 100 + 8 * user.len(), "{sentence}"),
    }
}

/// Records of a container's log, and frames of an `exec`.
pub fn log_and_exec(data: &[u8]) {
    for record in data.split(|byte| *byte == b'\n') {
        if let Some(line) = logfile::parse(record) {
            assert!(line.data.len() <= record.len() + 1);
        }
    }
    let mut pending = data.to_vec();
    let mut taken = 0;
    while let Ok(Some((kind, body))) = execshim::take_frame(&mut pending) {
        let frame = execshim::frame(kind, &body);
        assert_eq!(frame, data[taken..taken + frame.len()]);
        taken += frame.len();
    }
    assert_eq!(pending, data[taken..]);
}

/// Valid inputs.
pub mod seeds {
    use super::*;

    fn archive(fill: impl FnOnce(&mut tar::Builder<Vec<u8>>) -> std::io::Result<()>) -> Vec<u8> {
        let mut builder = tar::Builder::new(Vec::new());
        fill(&mut builder).expect("memory takes all");
        builder.into_inner().expect("memory takes all")
    }

    fn entry(
        builder: &mut tar::Builder<Vec<u8>>,
        kind: tar::EntryType,
        path: &str,
        link: &str,
        data: &[u8],
    ) -> std::io::Result<()> {
        let mut header = tar::Header::new_gnu();
        header.set_entry_type(kind);
        header.set_mode(0o755);
        header.set_size(data.len() as u64);
        // Not `set_path`, which is too polite for what belongs in here.
        header.as_old_mut().name[..path.len()].copy_from_slice(path.as_bytes());
        header.as_old_mut().linkname[..link.len()].copy_from_slice(link.as_bytes());
        header.set_cksum();
        builder.append(&header, data)
    }

    /// For [`super::layer`].
    #[must_use]
    pub fn layer() -> Vec<Vec<u8>> {
        use tar::EntryType as Kind;
        let plain = archive(|it| {
            entry(it, Kind::Directory, "./", "", b"")?;
            entry(it, Kind::Directory, "etc", "", b"")?;
            entry(it, Kind::Regular, "etc/a", "", b"text")?;
            entry(it, Kind::Link, "etc/b", "etc/a", b"")?;
            entry(it, Kind::Symlink, "etc/c", "/victim", b"")?;
            entry(it, Kind::Fifo, "pipe", "", b"")
        });
        let marks = archive(|it| {
            entry(it, Kind::Regular, "d/e/x", "", b"")?;
            entry(it, Kind::Regular, "d/.wh.e", "", b"")?;
            entry(it, Kind::Regular, "d/.wh..wh..opq", "", b"")
        });
        let hostile = archive(|it| {
            entry(it, Kind::Symlink, "up", "../..", b"")?;
            entry(it, Kind::Regular, "up/victim/file", "", b"evil")?;
            entry(it, Kind::Link, "h", "../victim/file", b"")?;
            entry(it, Kind::Char, "null", "", b"")
        });
        let pax = archive(|it| {
            it.append_pax_extensions([
                ("SCHILY.xattr.user.a", &b"b"[..]),
                ("path", &b"long/name"[..]),
            ])?;
            entry(it, Kind::Regular, "x", "", b"data")?;
            entry(
                it,
                Kind::GNULongName,
                "././@LongLink",
                "",
                "n".repeat(200).as_bytes(),
            )?;
            entry(it, Kind::Regular, "x", "", b"data")
        });
        let mut all = vec![vec![0]];
        for (form, archive) in [
            (0, &plain),
            (1, &plain),
            (2, &plain),
            (3, &plain),
            (1, &marks),
            (1, &hostile),
            (1, &pax),
        ] {
            all.push([&[form], archive.as_slice()].concat());
        }
        all.push([&[0], gzip(&plain).as_slice()].concat());
        let packed = zstd::encode_all(&*plain, 1).expect("memory takes all");
        all.push([&[0], packed.as_slice()].concat());
        all
    }

    /// For [`super::registry_answer`].
    #[must_use]
    pub fn registry_answer() -> Vec<Vec<u8>> {
        let digest = store::digest_of(b"x");
        vec![
            format!(
                r#"{{"schemaVersion":2,"config":{{"digest":"{digest}","size":9}},"layers":[{{"digest":"{digest}","size":9}}]}}"#
            )
            .into_bytes(),
            format!(
                r#"{{"schemaVersion":2,"manifests":[{{"digest":"{digest}","size":9,"platform":{{"os":"linux","architecture":"amd64"}}}}]}}"#
            )
            .into_bytes(),
            format!(
                r#"{{"os":"linux","architecture":"amd64","config":{{"User":"a:b","Env":["A=b"],"Entrypoint":["/x"],"Cmd":null,"WorkingDir":"/w","StopSignal":"SIGQUIT"}},"rootfs":{{"diff_ids":["{digest}"]}}}}"#
            )
            .into_bytes(),
            br#"Bearer realm="https://a.example/token",service="a",scope="x", Basic realm="y""#.to_vec(),
            br#"{"token":"t","access_token":"t","expires_in":60}"#.to_vec(),
            br#"{"errors":[{"code":"MANIFEST_UNKNOWN","message":"no"}]}"#.to_vec(),
        ]
    }

    /// For [`super::users`].
    #[must_use]
    pub fn users() -> Vec<Vec<u8>> {
        [
            "ann:staff\0root:x:0:0:r:/root:/bin/sh\nann:x:1000:100:a:/home/ann:/bin/sh\n\0staff:x:50:ann\naudio:x:29:\n",
            "1000:50\0\0audio:x:29:root,ann\n",
            "ann\0ann:x:1000:100:a::/bin/sh\n\0a:x:5:ann\naudio:x:29:\n",
        ]
        .map(|text| text.as_bytes().to_vec())
        .to_vec()
    }

    /// For [`super::log_and_exec`].
    #[must_use]
    pub fn log_and_exec() -> Vec<Vec<u8>> {
        vec![
            b"1700000000000000000 1 F hello\n1700000000000000001 2 P part\n".to_vec(),
            [execshim::frame(1, b"input"), execshim::frame(2, b"")].concat(),
        ]
    }
}
