//! Images made on the spot, a registry that serves them, and a host to run them on.

// Each test program uses its part of this.
#![allow(dead_code)]

use std::collections::HashMap;
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use swarm_agent::runtime::{ContainerConfig, OciRuntime, RuntimeConfig};
use swarm_proto::TaskId;
use swarm_proto::v1::{ContainerSpec, ResourceRequirements};

pub fn digest(bytes: &[u8]) -> String {
    format!("sha256:{}", hex::encode(Sha256::digest(bytes)))
}

/// What a registry does instead of answering.
#[derive(Clone, Debug)]
pub enum Trick {
    /// Nothing.
    Silence,
    /// An answer of this status that never ends, as fast as it is taken.
    Endless(&'static str),
    /// An answer of that many bytes, but one byte every few milliseconds.
    Drip(usize),
    /// Sends the asker there.
    Redirect(String),
    /// Wants a token from there.
    Challenge(String),
}

/// What the registry holds and how it misbehaves.
#[derive(Default)]
pub struct Shelf {
    /// For requests whose path has this in it.
    pub tricks: Vec<(String, Trick)>,
    /// Bytes sent by [`Trick::Endless`].
    pub endless: usize,
    /// Paths asked for, with the credentials that were shown.
    pub asked: Vec<(String, Option<String>)>,
    /// By digest.
    pub blobs: HashMap<String, Vec<u8>>,
    /// By "name:tag" and "name@digest".
    pub manifests: HashMap<String, (String, Vec<u8>)>,
    /// Blob requests answered so far, by digest.
    pub served: HashMap<String, usize>,
    /// The connection breaks after this many bytes of that blob, once.
    pub break_after: Option<(String, usize)>,
    /// "user:password" everybody must give.
    pub login: Option<String>,
}

/// A registry on loopback, gone with the process.
#[derive(Clone)]
pub struct Registry {
    pub address: String,
    pub shelf: Arc<Mutex<Shelf>>,
}

impl Registry {
    pub fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let shelf = Arc::new(Mutex::new(Shelf::default()));
        let served = shelf.clone();
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let shelf = served.clone();
                std::thread::spawn(move || serve(&stream, &shelf));
            }
        });
        Self { address, shelf }
    }

    pub fn put_blob(&self, bytes: Vec<u8>) -> String {
        let name = digest(&bytes);
        self.shelf.lock().unwrap().blobs.insert(name.clone(), bytes);
        name
    }

    pub fn put_manifest(&self, name: &str, tag: &str, kind: &str, manifest: &Value) -> String {
        let bytes = manifest.to_string().into_bytes();
        let known = digest(&bytes);
        let mut shelf = self.shelf.lock().unwrap();
        for key in [format!("{name}:{tag}"), format!("{name}@{known}")] {
            shelf
                .manifests
                .insert(key, (kind.to_owned(), bytes.clone()));
        }
        known
    }

    /// Puts an image of these archives on the shelf. Returns its reference and digest.
    pub fn put_image(&self, name: &str, config: Value, layers: &[Layer]) -> (String, String) {
        let diff_ids: Vec<String> = layers.iter().map(|layer| layer.diff_id.clone()).collect();
        let config = json!({
            "architecture": architecture(), "os": "linux", "config": config,
            "rootfs": { "type": "layers", "diff_ids": diff_ids },
        });
        let config = config.to_string().into_bytes();
        let layers: Vec<Value> = layers
            .iter()
            .map(|layer| {
                json!({
                    "mediaType": layer.kind,
                    "size": layer.packed.len(),
                    "digest": self.put_blob(layer.packed.clone()),
                })
            })
            .collect();
        let manifest = json!({
            "schemaVersion": 2,
            "mediaType": "application/vnd.oci.image.manifest.v1+json",
            "config": {
                "mediaType": "application/vnd.oci.image.config.v1+json",
                "size": config.len(), "digest": self.put_blob(config),
            },
            "layers": layers,
        });
        let kind = "application/vnd.oci.image.manifest.v1+json";
        let known = self.put_manifest(name, "1", kind, &manifest);
        (format!("{}/{name}:1", self.address), known)
    }

    pub fn times_served(&self, digest: &str) -> usize {
        self.shelf
            .lock()
            .unwrap()
            .served
            .get(digest)
            .copied()
            .unwrap_or(0)
    }
}

pub fn architecture() -> &'static str {
    match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    }
}

fn serve(stream: &TcpStream, shelf: &Mutex<Shelf>) {
    let mut reader = BufReader::new(stream);
    loop {
        let mut request = String::new();
        if reader.read_line(&mut request).unwrap_or(0) == 0 {
            return;
        }
        let mut headers = HashMap::new();
        loop {
            let mut line = String::new();
            if reader.read_line(&mut line).unwrap_or(0) == 0 {
                return;
            }
            let Some((key, value)) = line.trim().split_once(": ") else {
                break;
            };
            headers.insert(key.to_ascii_lowercase(), value.to_owned());
        }
        let path = request.split(' ').nth(1).unwrap_or("/").to_owned();
        let trick = {
            let mut shelf = shelf.lock().unwrap();
            let shown = headers.get("authorization").cloned();
            shelf.asked.push((path.clone(), shown.clone()));
            let found = shelf.tricks.iter().find(|(part, _)| path.contains(part));
            // Who has a token has passed the challenge.
            let found = found.map(|(_, trick)| trick.clone());
            found.filter(|trick| !matches!(trick, Trick::Challenge(_)) || shown.is_none())
        };
        if let Some(trick) = trick {
            if play(&trick, stream, shelf).is_err() {
                return;
            }
            continue;
        }
        let mut shelf = shelf.lock().unwrap();
        let (status, kind, mut body) = answer(&path, &headers, &mut shelf);
        let mut status = status.to_owned();
        let start = headers.get("range").and_then(|range| {
            range
                .strip_prefix("bytes=")?
                .strip_suffix('-')?
                .parse::<usize>()
                .ok()
        });
        if let Some(start) = start.filter(|start| *start <= body.len()) {
            body.drain(..start);
            status = "206 Partial Content".into();
        }
        let mut cut = None;
        if let Some((digest, after)) = &shelf.break_after
            && path.ends_with(digest.as_str())
        {
            cut = Some(*after);
            shelf.break_after = None;
        }
        drop(shelf);
        let mut stream = stream;
        let login = if status.starts_with("401") {
            "WWW-Authenticate: Basic realm=\"x\"\r\n"
        } else {
            ""
        };
        let head = format!(
            "HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {}\r\n{login}\r\n",
            body.len()
        );
        if stream.write_all(head.as_bytes()).is_err() {
            return;
        }
        if let Some(cut) = cut {
            let _ = stream.write_all(&body[..cut]);
            let _ = stream.shutdown(std::net::Shutdown::Both);
            return;
        }
        if stream.write_all(&body).is_err() {
            return;
        }
    }
}

fn play(trick: &Trick, mut stream: &TcpStream, shelf: &Mutex<Shelf>) -> std::io::Result<()> {
    let over = || Err(std::io::ErrorKind::ConnectionAborted.into());
    let json = "Content-Type: application/json";
    match trick {
        Trick::Silence => {
            // Until the asker gives up.
            let _ = std::io::Read::read(&mut stream, &mut [0]);
            over()
        }
        Trick::Endless(status) => {
            write!(
                stream,
                "HTTP/1.1 {status}\r\n{json}\r\nConnection: close\r\n\r\n"
            )?;
            loop {
                stream.write_all(&[b' '; 16 << 10])?;
                shelf.lock().unwrap().endless += 16 << 10;
            }
        }
        Trick::Drip(length) => {
            write!(
                stream,
                "HTTP/1.1 200 OK\r\n{json}\r\nContent-Length: {length}\r\n\r\n"
            )?;
            for _ in 0..*length {
                stream.write_all(b" ")?;
                std::thread::sleep(Duration::from_millis(5));
            }
            over()
        }
        Trick::Redirect(to) => write!(
            stream,
            "HTTP/1.1 307 Temporary Redirect\r\nLocation: {to}\r\nContent-Length: 0\r\n\r\n"
        ),
        Trick::Challenge(realm) => write!(
            stream,
            "HTTP/1.1 401 Unauthorized\r\nWWW-Authenticate: Bearer realm=\"{realm}\",service=\"r\"\r\n\
             Content-Length: 0\r\n\r\n"
        ),
    }
}

fn answer(
    path: &str,
    headers: &HashMap<String, String>,
    shelf: &mut Shelf,
) -> (&'static str, String, Vec<u8>) {
    let plain = |status, text: &str| {
        (
            status,
            "application/json".to_owned(),
            text.as_bytes().to_vec(),
        )
    };
    if let Some(login) = &shelf.login {
        use base64::Engine;
        let wanted = format!(
            "Basic {}",
            base64::engine::general_purpose::STANDARD.encode(login)
        );
        if headers.get("authorization") != Some(&wanted) {
            return plain("401 Unauthorized", "{}");
        }
    }
    if path == "/v2/" {
        return plain("200 OK", "{}");
    }
    if path.starts_with("/token") {
        return plain("200 OK", r#"{"token":"abc"}"#);
    }
    let path = path.strip_prefix("/v2/").unwrap_or(path);
    if let Some((name, reference)) = path.split_once("/manifests/") {
        let join = if reference.starts_with("sha256:") {
            "@"
        } else {
            ":"
        };
        return match shelf.manifests.get(&format!("{name}{join}{reference}")) {
            Some((kind, bytes)) => ("200 OK", kind.clone(), bytes.clone()),
            None => plain(
                "404 Not Found",
                r#"{"errors":[{"code":"MANIFEST_UNKNOWN","message":"unknown"}]}"#,
            ),
        };
    }
    if let Some((_, digest)) = path.split_once("/blobs/") {
        *shelf.served.entry(digest.to_owned()).or_default() += 1;
        return match shelf.blobs.get(digest) {
            Some(bytes) => ("200 OK", "application/octet-stream".into(), bytes.clone()),
            None => plain(
                "404 Not Found",
                r#"{"errors":[{"code":"BLOB_UNKNOWN","message":"unknown"}]}"#,
            ),
        };
    }
    plain("404 Not Found", "{}")
}

/// One layer, packed as a registry serves it.
#[derive(Clone)]
pub struct Layer {
    pub packed: Vec<u8>,
    pub diff_id: String,
    pub kind: &'static str,
}

impl Layer {
    pub fn gzip(archive: &[u8]) -> Self {
        let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        encoder.write_all(archive).unwrap();
        let packed = encoder.finish().unwrap();
        let kind = "application/vnd.oci.image.layer.v1.tar+gzip";
        Self {
            packed,
            diff_id: digest(archive),
            kind,
        }
    }

    pub fn zstd(archive: &[u8]) -> Self {
        let packed = zstd::encode_all(archive, 1).unwrap();
        let kind = "application/vnd.oci.image.layer.v1.tar+zstd";
        Self {
            packed,
            diff_id: digest(archive),
            kind,
        }
    }

    pub fn plain(archive: &[u8]) -> Self {
        let kind = "application/vnd.oci.image.layer.v1.tar";
        Self {
            packed: archive.to_vec(),
            diff_id: digest(archive),
            kind,
        }
    }
}

/// Writes archives entry by entry, good and bad ones.
pub struct Tar(tar::Builder<Vec<u8>>);

impl Tar {
    pub fn new() -> Self {
        Self(tar::Builder::new(Vec::new()))
    }

    fn header(kind: tar::EntryType, mode: u32, size: usize) -> tar::Header {
        let mut header = tar::Header::new_gnu();
        header.set_entry_type(kind);
        header.set_mode(mode);
        header.set_size(size as u64);
        header.set_uid(0);
        header.set_gid(0);
        header.set_mtime(1_700_000_000);
        header
    }

    /// With the name exactly as given, `..` and all.
    fn raw(mut self, mut header: tar::Header, name: &str, data: &[u8]) -> Self {
        assert!(name.len() < 100);
        header.as_gnu_mut().unwrap().name[..name.len()].copy_from_slice(name.as_bytes());
        header.set_cksum();
        self.0.append(&header, data).unwrap();
        self
    }

    pub fn dir(self, name: &str, mode: u32) -> Self {
        self.raw(Self::header(tar::EntryType::Directory, mode, 0), name, &[])
    }

    pub fn file(self, name: &str, mode: u32, data: &[u8]) -> Self {
        self.raw(
            Self::header(tar::EntryType::Regular, mode, data.len()),
            name,
            data,
        )
    }

    pub fn owned(self, name: &str, uid: u64, data: &[u8]) -> Self {
        let mut header = Self::header(tar::EntryType::Regular, 0o644, data.len());
        header.set_uid(uid);
        self.raw(header, name, data)
    }

    pub fn link(self, kind: tar::EntryType, name: &str, target: &str) -> Self {
        let mut header = Self::header(kind, 0o777, 0);
        header.set_link_name_literal(target).unwrap();
        self.raw(header, name, &[])
    }

    pub fn symlink(self, name: &str, target: &str) -> Self {
        self.link(tar::EntryType::Symlink, name, target)
    }

    pub fn hardlink(self, name: &str, target: &str) -> Self {
        self.link(tar::EntryType::Link, name, target)
    }

    pub fn device(self, name: &str) -> Self {
        let mut header = Self::header(tar::EntryType::Char, 0o666, 0);
        header.set_device_major(1).unwrap();
        header.set_device_minor(3).unwrap();
        self.raw(header, name, &[])
    }

    pub fn finish(self) -> Vec<u8> {
        self.0.into_inner().unwrap()
    }
}

const APPLETS: [&str; 24] = [
    "sh", "cat", "echo", "sleep", "id", "env", "ls", "stat", "true", "false", "kill", "mkdir",
    "mount", "seq", "touch", "grep", "stty", "pwd", "hostname", "ps", "dd", "unshare", "test",
    "rm",
];

/// The host's busybox with its libraries and the files a program expects.
pub fn busybox() -> Vec<u8> {
    let busybox = ["/bin/busybox", "/usr/bin/busybox"]
        .into_iter()
        .find(|path| Path::new(path).exists())
        .expect("these tests need Debian's busybox: apt-get install busybox");
    let mut tar = Tar::new();
    for dir in [
        "bin", "etc", "dev", "proc", "sys", "tmp", "root", "lib", "lib64",
    ] {
        tar = tar.dir(dir, if dir == "tmp" { 0o1777 } else { 0o755 });
    }
    tar = tar
        .file(
            "etc/passwd",
            0o644,
            b"root:x:0:0:root:/root:/bin/sh\nweb:x:1234:1235::/tmp:/bin/sh\n",
        )
        .file(
            "etc/group",
            0o644,
            b"root:x:0:\nweb:x:1235:\nmore:x:1300:web\n",
        )
        .file("bin/busybox", 0o755, &fs::read(busybox).unwrap());
    for applet in APPLETS {
        tar = tar.symlink(&format!("bin/{applet}"), "busybox");
    }
    let ldd = std::process::Command::new("ldd")
        .arg(busybox)
        .output()
        .unwrap();
    let mut dirs = vec![String::from("lib"), String::from("lib64")];
    for word in String::from_utf8_lossy(&ldd.stdout).split_whitespace() {
        if !word.starts_with('/') {
            continue;
        }
        let target = word.trim_start_matches('/');
        let mut parents: Vec<&Path> = Path::new(target).ancestors().skip(1).collect();
        parents.pop();
        for parent in parents.into_iter().rev() {
            let parent = parent.to_string_lossy().into_owned();
            if !dirs.contains(&parent) {
                tar = tar.dir(&parent, 0o755);
                dirs.push(parent);
            }
        }
        tar = tar.file(target, 0o755, &fs::read(word).unwrap());
    }
    tar.finish()
}

/// A runtime with directories, control groups and a network namespace of its own.
/// Everything is gone after the test, whatever its result.
pub struct Host {
    pub dir: tempfile::TempDir,
    pub registry: Registry,
    pub config: RuntimeConfig,
    netns: PathBuf,
}

impl Host {
    pub fn new() -> Self {
        assert!(
            nix::unistd::geteuid().is_root(),
            "these tests make containers: run them as root"
        );
        let dir = tempfile::tempdir().unwrap();
        let registry = Registry::start();
        let mut config = RuntimeConfig::new(dir.path().join("lib"), dir.path().join("run"));
        config.insecure_registries = vec![registry.address.clone()];
        config.shim_exe = env!("CARGO_BIN_EXE_swarm-shim").into();
        config.cgroup_parent = format!("swarm-test-{}", TaskId::random());
        let netns = dir.path().join("netns");
        fs::File::create(&netns).unwrap();
        let target = netns.clone();
        std::thread::spawn(move || {
            nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET).unwrap();
            let own = format!("/proc/self/task/{}/ns/net", nix::unistd::gettid());
            let none = None::<&str>;
            let bind = nix::mount::MsFlags::MS_BIND;
            nix::mount::mount(Some(own.as_str()), &target, none, bind, none).unwrap();
        })
        .join()
        .unwrap();
        Self {
            dir,
            registry,
            config,
            netns,
        }
    }

    pub fn runtime(&self) -> OciRuntime {
        OciRuntime::new(self.config.clone()).unwrap()
    }

    /// Serves the busybox image. Returns its reference.
    pub fn serve_busybox(&self) -> String {
        let layer = Layer::gzip(&busybox());
        self.registry
            .put_image("busybox", json!({ "Cmd": ["/bin/sh"] }), &[layer])
            .0
    }

    pub fn container(&self, image: &str, command: &[&str]) -> ContainerConfig {
        let task_id = TaskId::random();
        ContainerConfig {
            name: format!("test.1.{task_id}"),
            spec: ContainerSpec {
                image: image.to_owned(),
                command: command.iter().map(|&word| word.to_owned()).collect(),
                ..ContainerSpec::default()
            },
            resources: ResourceRequirements::default(),
            labels: Vec::new(),
            hostname: task_id[..12].to_owned(),
            netns: self.netns.clone(),
            etc_hosts: "127.0.0.1 localhost\n".into(),
            resolv_conf: "nameserver 127.0.0.11\n".into(),
            task_id,
        }
    }

    pub fn cgroups(&self) -> Vec<PathBuf> {
        let points = fs::read_to_string("/proc/self/mountinfo").unwrap();
        points
            .lines()
            .filter(|line| line.contains(" - cgroup"))
            .filter_map(|line| line.split(' ').nth(4))
            .map(|point| Path::new(point).join(&self.config.cgroup_parent))
            .filter(|dir| dir.is_dir())
            .collect()
    }

    /// PIDs that shims and containers left in the run directory, of those alive.
    pub fn processes(&self) -> Vec<i32> {
        let mut pids = Vec::new();
        for task in fs::read_dir(&self.config.run)
            .into_iter()
            .flatten()
            .flatten()
        {
            for name in ["shim.pid", "init.json"] {
                if let Ok(text) = fs::read(task.path().join(name))
                    && let Ok(value) = serde_json::from_slice::<Value>(&text)
                    && let Some(pid) = value["pid"].as_i64()
                    && is_alive(pid as i32)
                {
                    pids.push(pid as i32);
                }
            }
        }
        pids
    }
}

pub fn is_alive(pid: i32) -> bool {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit_once(") ")
        .is_some_and(|(_, rest)| !rest.starts_with(['Z', 'X']))
}

/// Until the fact holds; fails after half a minute.
#[track_caller]
pub fn eventually(what: &str, mut fact: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(30);
    while !fact() {
        assert!(Instant::now() < deadline, "never came true: {what}");
        std::thread::yield_now();
        std::thread::sleep(Duration::from_millis(5));
    }
}

fn walk(dir: &Path, visit: &mut dyn FnMut(&Path)) {
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            walk(&entry.path(), visit);
        }
    }
    visit(dir);
}

impl Drop for Host {
    fn drop(&mut self) {
        let deadline = Instant::now() + Duration::from_secs(10);
        loop {
            for group in self.cgroups() {
                walk(&group, &mut |dir| {
                    for pid in fs::read_to_string(dir.join("cgroup.procs"))
                        .unwrap_or_default()
                        .lines()
                    {
                        let pid = nix::unistd::Pid::from_raw(pid.parse().unwrap_or(i32::MAX));
                        let _ = nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL);
                    }
                    let _ = fs::remove_dir(dir);
                });
            }
            for pid in self.processes() {
                let _ = nix::sys::signal::kill(
                    nix::unistd::Pid::from_raw(pid),
                    nix::sys::signal::Signal::SIGKILL,
                );
            }
            if (self.cgroups().is_empty() && self.processes().is_empty())
                || Instant::now() > deadline
            {
                break;
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        let _ = nix::mount::umount2(&self.netns, nix::mount::MntFlags::MNT_DETACH);
    }
}
