//! Bad days of real processes: disks that are full or damaged, strangers at the door, a
//! terminal that is let go of, another container engine.

use std::fs::File;
use std::io::{Read as _, Write as _};
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::os::unix::process::CommandExt as _;
use std::sync::mpsc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use nix::pty::{OpenptyResult, Winsize, openpty};
use nix::sys::termios::LocalFlags;
use swarm_proto::v1::control_client::ControlClient;
use swarm_proto::v1::{GetClusterRequest, UpdateClusterRequest};
use swarm_tests::cluster::{Cluster, PATIENCE, busybox};
use swarm_tests::lab::{host_dir, wait_until};

#[test]
fn a_full_disk_stops_its_manager_and_space_lets_it_start_again() -> Result<()> {
    let mut cluster = Cluster::up(3, 3)?;
    let full = ["h1", "h2", "h3"]
        .into_iter()
        .find(|host| cluster.leader("h1").is_ok_and(|leader| leader != *host))
        .context("no follower")?;
    let other = if full == "h1" { "h2" } else { "h1" };
    // A disk of its own, of which little is left.
    cluster.stop(full)?;
    cluster.host_sh(
        full,
        "set -e; cp -a /var/lib/swarm /run/swarm/kept; mount -t tmpfs -o size=24m full /var/lib/swarm; \
         cp -a /run/swarm/kept/. /var/lib/swarm/; rm -r /run/swarm/kept",
    )?;
    cluster.start(full)?;
    cluster.wait_ready(PATIENCE)?;
    let _ = cluster.host_sh(
        full,
        "dd if=/dev/zero of=/var/lib/swarm/fill bs=4k 2>/dev/null",
    );
    let mut written = 0;
    wait_until(
        PATIENCE,
        "the manager without space has stopped itself",
        || {
            let name = format!("n{written}");
            cluster.swarm(other, &["network", "create", "--driver", "overlay", &name])?;
            written += 1;
            Ok(cluster.swarmd(full).is_err().then_some(()))
        },
    )?;
    let log = cluster.log(full)?;
    let last = log.lines().last().unwrap_or_default();
    ensure!(
        last.contains("/var/lib/swarm/raft/log/db") && last.contains("No space left on device"),
        "its last words do not say why: {last}"
    );
    // The others go on; it is not started as long as there is no space, and says so.
    cluster.swarm(
        other,
        &["network", "create", "--driver", "overlay", "without"],
    )?;
    let error = cluster
        .start(full)
        .err()
        .context("it started on a full disk")?;
    ensure!(
        format!("{error:#}").contains("No space left on device"),
        "{error:#}"
    );
    cluster.host_sh(full, "rm /var/lib/swarm/fill")?;
    cluster.start(full)?;
    cluster.wait_ready(PATIENCE)?;
    let overlays = ["--filter", "scope=swarm"];
    let listed = cluster.swarm(
        full,
        &[&["network", "ls", "--format", "{{.Name}}"][..], &overlays].concat(),
    )?;
    ensure!(
        listed.lines().count() == written + 1 && listed.lines().any(|name| name == "without"),
        "{written} networks were made: {listed}"
    );
    Ok(())
}

#[test]
fn a_damaged_file_is_named_and_nothing_of_it_is_served() -> Result<()> {
    let mut cluster = Cluster::up(1, 1)?;
    snapshot_every(20)?;
    for number in 0..30 {
        let name = format!("n{number}");
        cluster.swarm("h1", &["network", "create", "--driver", "overlay", &name])?;
    }
    let files = "find /var/lib/swarm/raft/snapshots -name '*.snapshot' -type f";
    wait_until(PATIENCE, "there is a snapshot", || {
        Ok((!cluster.host_sh("h1", files)?.trim().is_empty()).then_some(()))
    })?;
    cluster.stop("h1")?;
    let snapshot = cluster.host_sh("h1", files)?.trim().to_owned();
    let flipped = |bytes: &[u8]| -> Vec<u8> {
        let middle = bytes.len() / 2..bytes.len() / 2 + 8;
        let flip = |(at, byte): (usize, &u8)| byte ^ if middle.contains(&at) { 0x55 } else { 0 };
        bytes.iter().enumerate().map(flip).collect()
    };
    let cut = |bytes: &[u8]| bytes[..bytes.len() / 2].to_vec();
    let emptied = |_: &[u8]| Vec::new();
    for (file, damages) in [
        (
            snapshot.as_str(),
            &[&flipped as &dyn Fn(&[u8]) -> Vec<u8>][..],
        ),
        ("/var/lib/swarm/raft/member", &[&flipped]),
        ("/var/lib/swarm/raft/log.mark", &[&flipped]),
        (
            "/var/lib/swarm/certificates/swarm-node.pem",
            &[&flipped, &cut, &emptied],
        ),
        ("/var/lib/swarm/node.json", &[&flipped, &cut, &emptied]),
    ] {
        let path = host_dir("h1").join("lib").join(
            file.strip_prefix("/var/lib/swarm/")
                .context("a file of swarmd")?,
        );
        let whole = std::fs::read(&path).with_context(|| format!("reading {file}"))?;
        for damage in damages {
            std::fs::write(&path, damage(&whole))?;
            let error = cluster
                .start("h1")
                .err()
                .with_context(|| format!("swarmd started with a damaged {file}"))?;
            let last = format!("{error:#}");
            let last = last.lines().last().unwrap_or_default();
            ensure!(last.contains(file), "{file} is not named: {last}");
        }
        std::fs::write(&path, whole)?;
    }
    // None of the refusals has changed anything.
    cluster.start("h1")?;
    ensure!(
        cluster
            .swarm("h1", &["network", "ls", "-q", "--filter", "scope=swarm"])?
            .lines()
            .count()
            == 30
    );
    Ok(())
}

/// Sets the cluster's snapshot interval, which the command line has no flag for.
fn snapshot_every(entries: u64) -> Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    runtime.block_on(async {
        let socket = host_dir("h1").join("run/swarm.sock");
        let channel = tonic::transport::Endpoint::from_static("http://localhost")
            .connect_with_connector(tower::service_fn(move |_| {
                let socket = socket.clone();
                async move {
                    let stream = tokio::net::UnixStream::connect(socket).await?;
                    std::io::Result::Ok(hyper_util::rt::TokioIo::new(stream))
                }
            }))
            .await?;
        let mut control = ControlClient::new(channel);
        let cluster = control
            .get_cluster(GetClusterRequest {})
            .await?
            .into_inner();
        let mut spec = cluster.spec.unwrap_or_default();
        spec.snapshot_interval = Some(entries);
        let version = cluster.meta.and_then(|meta| meta.version);
        control
            .update_cluster(UpdateClusterRequest {
                version: version.map_or(0, |version| version.index),
                spec: Some(spec),
            })
            .await?;
        Ok(())
    })
}

#[test]
fn outsiders_and_workers_are_refused_and_named_in_the_log() -> Result<()> {
    let cluster = Cluster::up(2, 1)?;
    let before = cluster.swarm("h1", &["node", "ls"])?;
    // Half-open: a connection that never begins its handshake, and one that stops in it.
    let mut half_open = [
        cluster.half_open("h2", "172.30.99.1", "")?,
        cluster.half_open("h2", "172.30.99.1", "\\x16\\x03\\x01\\x02")?,
    ];
    let sources = concat!(env!("CARGO_MANIFEST_DIR"), "/..");
    let output = cluster.run(
        "h2",
        &[
            "/var/cache/swarm-lab/venv/bin/python",
            &format!("{sources}/tests/python/outsider.py"),
            "172.30.99.1:2377",
            "/var/lib/swarm/certificates/swarm-node.pem",
            &format!("{sources}/proto/proto"),
        ],
    )?;
    ensure!(
        output.status.success(),
        "{}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    wait_until(PATIENCE, "half-open handshakes are dropped", || {
        let mut ended = 0;
        for child in &mut half_open {
            ended += usize::from(child.try_wait()?.is_some());
        }
        Ok((ended == half_open.len()).then_some(()))
    })?;
    let log = cluster.log("h1")?;
    for said in [
        "/swarm.v1.Control/ListNodes needs a client certificate of this cluster",
        "/swarm.v1.Control/CreateNetwork is only for managers and the local socket, not for",
        "no TLS handshake within",
        "172.30.99.2",
    ] {
        ensure!(log.contains(said), "the log does not say {said:?}");
    }
    ensure!(cluster.swarm("h1", &["node", "ls"])? == before);
    let overlays = ["network", "ls", "-q", "--filter", "scope=swarm"];
    ensure!(cluster.swarm("h1", &overlays)?.is_empty());
    Ok(())
}

/// One end of a terminal on which a command runs.
struct Terminal {
    master: File,
    said: mpsc::Receiver<Vec<u8>>,
    text: String,
}

impl Terminal {
    /// The command in a session of its own, with the terminal as its controlling one.
    fn run(
        cluster: &Cluster,
        host: &str,
        argv: &[&str],
    ) -> Result<(Self, OwnedFd, std::process::Child)> {
        let size = Winsize {
            ws_row: 33,
            ws_col: 101,
            ws_xpixel: 0,
            ws_ypixel: 0,
        };
        let OpenptyResult { master, slave } = openpty(Some(&size), None)?;
        let (program, args) = argv.split_first().context("an empty command")?;
        let mut command = cluster.command(host, program)?;
        command
            .args(args)
            .stdin(slave.try_clone()?)
            .stdout(slave.try_clone()?)
            .stderr(slave.try_clone()?);
        // SAFETY: only system calls, on the child's own standard input.
        unsafe {
            command.pre_exec(|| {
                nix::unistd::setsid()?;
                if libc::ioctl(0, libc::TIOCSCTTY, 0) < 0 {
                    return Err(std::io::Error::last_os_error());
                }
                Ok(())
            });
        }
        let child = command.spawn()?;
        let master = File::from(master);
        let mut reader = master.try_clone()?;
        let (sender, said) = mpsc::channel();
        std::thread::spawn(move || {
            let mut buffer = [0; 4096];
            // Ends with an error when the other side is closed.
            while let Ok(count @ 1..) = reader.read(&mut buffer) {
                if sender.send(buffer[..count].to_vec()).is_err() {
                    break;
                }
            }
        });
        let text = String::new();
        Ok((Self { master, said, text }, slave, child))
    }

    fn press(&mut self, keys: &str) -> Result<()> {
        Ok(self.master.write_all(keys.as_bytes())?)
    }

    /// Returns once the terminal shows this, with all that was shown before; forgets it.
    fn shows(&mut self, what: &str) -> Result<String> {
        let end = Instant::now() + PATIENCE;
        loop {
            if let Some(at) = self.text.find(what) {
                let rest = self.text.split_off(at + what.len());
                return Ok(std::mem::replace(&mut self.text, rest));
            }
            let left = end.saturating_duration_since(Instant::now());
            match self.said.recv_timeout(left) {
                Ok(bytes) => self.text += &String::from_utf8_lossy(&bytes),
                Err(_) => bail!("the terminal does not show {what:?}, but {:?}", self.text),
            }
        }
    }
}

#[test]
fn exec_on_a_terminal_is_a_terminal() -> Result<()> {
    let cluster = Cluster::up(1, 1)?;
    cluster.service("h1", "box", 1, &[&busybox(), "sleep", "1000000"])?;
    let argv = ["swarm", "exec", "-it", "box.1", "sh"];
    let (mut terminal, slave, mut child) = Terminal::run(&cluster, "h1", &argv)?;
    // The size is known inside, at first and after a change.
    terminal.press("stty size; echo done-$((1+1))\r")?;
    ensure!(terminal.shows("done-2")?.contains("33 101"));
    let size = Winsize {
        ws_row: 50,
        ws_col: 80,
        ws_xpixel: 0,
        ws_ypixel: 0,
    };
    // SAFETY: the structure is of the type that this request reads.
    ensure!(unsafe { libc::ioctl(terminal.master.as_raw_fd(), libc::TIOCSWINSZ, &size) } == 0);
    wait_until(PATIENCE, "the new size is known inside", || {
        terminal.press("stty size; echo again-$((1+1))\r")?;
        Ok(terminal.shows("again-2")?.contains("50 80").then_some(()))
    })?;
    // Ctrl-C reaches what runs inside, not swarm; then the shell ends with its own status.
    // (A shell that is still about to start what it runs would swallow it, so that says when it is there.)
    terminal.press("sh -c 'echo ready-$((1+1)); exec sleep 1000000'\r")?;
    terminal.shows("ready-2")?;
    terminal.press("\u{3}")?;
    terminal.press("echo status-$?\r")?;
    terminal.shows("status-130")?;
    terminal.press("exit 7\r")?;
    let status = child.wait()?;
    ensure!(status.code() == Some(7), "{status}");
    // The user's terminal is as it was: what is typed is shown, line by line.
    let flags = nix::sys::termios::tcgetattr(&slave)?.local_flags;
    ensure!(
        flags.contains(LocalFlags::ICANON | LocalFlags::ECHO | LocalFlags::ISIG),
        "{flags:?}"
    );
    // A user who closes the window leaves nothing running inside.
    let argv = [
        "swarm",
        "exec",
        "-it",
        "box.1",
        "sh",
        "-c",
        "echo here; exec sleep 31415",
    ];
    let (mut terminal, slave, mut child) = Terminal::run(&cluster, "h1", &argv)?;
    terminal.shows("here")?;
    drop((terminal, slave));
    nix::sys::signal::kill(
        nix::unistd::Pid::from_raw(i32::try_from(child.id())?),
        nix::sys::signal::Signal::SIGHUP,
    )?;
    child.wait()?;
    wait_until(PATIENCE, "the process inside has ended", || {
        let left = cluster.sh("h1", "box.1", "ps | grep -c '[s]leep 31415' || true")?;
        Ok((left.trim() == "0").then_some(()))
    })
}

#[test]
fn an_exec_ends_with_the_process_that_looks_after_it() -> Result<()> {
    let cluster = Cluster::up(1, 1)?;
    let before = cluster.service("h1", "box", 1, &[&busybox(), "sleep", "1000000"])?;
    let argv = ["-c", "swarm exec box.1 sh -c 'echo here; exec sleep 31415'"];
    let mut exec = cluster
        .command("h1", "sh")?
        .args(argv)
        .stdout(std::process::Stdio::piped())
        .stderr(std::process::Stdio::piped())
        .spawn()?;
    let mut here = [0; 5];
    let stdout = exec.stdout.as_mut().context("a pipe")?;
    stdout.read_exact(&mut here)?;
    let shim = format!("kill -9 $(pgrep -f '[e]xec-shim.*{}')", before[0].id);
    cluster.host_sh("h1", &shim)?;
    let ended = exec.wait_with_output()?;
    let said = String::from_utf8_lossy(&ended.stderr);
    ensure!(ended.status.code() == Some(255), "{}: {said}", ended.status);
    ensure!(
        said == "exec ended: the process that looks after it is gone\n",
        "{said}"
    );
    wait_until(PATIENCE, "the process inside has ended", || {
        let left = cluster.sh("h1", "box.1", "ps | grep -c '[s]leep 31415' || true")?;
        Ok((left.trim() == "0").then_some(()))
    })?;
    ensure!(cluster.wait_running("h1", "box", 1)? == before);
    Ok(())
}

#[test]
fn other_container_engines_do_the_same() -> Result<()> {
    let mut cluster = Cluster::up(2, 1)?;
    let config = host_dir("h2").join("etc/swarmd.toml");
    let plain = std::fs::read_to_string(&config)?;
    cluster.stop("h2")?;
    // One that is not there keeps swarmd from starting: tasks would find out one by one.
    std::fs::write(&config, format!("oci-runtime = \"/nowhere/crun\"\n{plain}"))?;
    let error = cluster
        .start("h2")
        .err()
        .context("swarmd started without it")?;
    ensure!(
        format!("{error:#}").contains("oci-runtime: /nowhere/crun: No such file or directory"),
        "{error:#}"
    );
    cluster.swarm("h1", &["network", "create", "--driver", "overlay", "net"])?;
    for engine in ["/usr/sbin/runc", "/usr/bin/crun"] {
        std::fs::write(&config, format!("oci-runtime = \"{engine}\"\n{plain}"))?;
        cluster.start("h2")?;
        with_engine(&mut cluster, engine).with_context(|| format!("with {engine}"))?;
        cluster.stop("h2")?;
    }
    Ok(())
}

/// A container on h2, whose engine this is, from its start to its end.
fn with_engine(cluster: &mut Cluster, engine: &str) -> Result<()> {
    let before = cluster.service(
        "h1",
        "box",
        1,
        &[
            "--network",
            "net",
            "--constraint",
            "node.hostname==h2",
            "--limit-memory",
            "64M",
            "--env",
            "A=b",
            &busybox(),
            "sh",
            "-c",
            "echo started; exec sleep 1000000",
        ],
    )?;
    // It is this engine's container.
    let list = format!("{engine} --root /run/swarm/runtime/engine list -q");
    // crun wants no unified cgroups beside others, and is not in a namespace of ours here.
    let list = format!("unshare -m sh -c 'umount /sys/fs/cgroup/unified 2>/dev/null; {list}'");
    let known = cluster.host_sh("h2", &list)?;
    ensure!(known.trim() == before[0].id, "it knows of {known}");
    let limit =
        "cat /sys/fs/cgroup/memory/memory.limit_in_bytes /sys/fs/cgroup/memory.max 2>/dev/null";
    ensure!(cluster.sh("h2", "box.1", &format!("{limit}; true"))?.trim() == "67108864");
    ensure!(
        cluster.sh(
            "h2",
            "box.1",
            "echo $A; ping -c 1 -W 2 box >/dev/null && echo pong"
        )? == "b\npong\n"
    );
    ensure!(cluster.swarm("h2", &["logs", "box.1"])?.contains("started"));
    let output = cluster.run("h2", &["swarm", "exec", "box.1", "sh", "-c", "exit 5"])?;
    ensure!(output.status.code() == Some(5), "{}", output.status);
    // It outlives swarmd, and ends with its task.
    cluster.kill("h2")?;
    cluster.start("h2")?;
    ensure!(cluster.wait_running("h1", "box", 1)? == before);
    cluster.sh("h2", "box.1", "true")?;
    cluster.swarm("h1", &["service", "rm", "box"])?;
    wait_until(PATIENCE, "every trace of the container is gone", || {
        let left = cluster.host_sh(
            "h2",
            &format!("{list}; ls /run/swarm/netns /run/swarm/runtime/engine /var/lib/swarm/runtime/containers | grep -v -e : -e '^$' || true; find /sys/fs/cgroup -name {}", before[0].id),
        )?;
        Ok(left.trim().is_empty().then_some(()))
    })
}

#[test]
fn what_is_on_the_node_runs_without_the_registry() -> Result<()> {
    let cluster = Cluster::up(1, 1)?;
    cluster.service("h1", "first", 1, &[&busybox(), "sleep", "1000000"])?;
    // The registry is killed; what is pinned and here needs it no more.
    let registry = cluster.processes_on_switch("docker-registry")?;
    ensure!(registry.len() == 1, "{registry:?}");
    nix::sys::signal::kill(
        nix::unistd::Pid::from_raw(registry[0]),
        nix::sys::signal::Signal::SIGKILL,
    )?;
    cluster.swarm("h1", &["service", "scale", "--detach", "first=3"])?;
    cluster.wait_running("h1", "first", 3)?;
    // What is not here says what is missing, and goes on trying.
    let missing = format!("{}/nginx", swarm_tests::lab::REGISTRY);
    let started = Instant::now();
    let (code, said) = cluster.attempt(
        "h1",
        &[
            "swarm", "service", "create", "--detach", "--name", "web", &missing,
        ],
    )?;
    ensure!(
        code == Some(0) && said.contains("could not be accessed on a registry"),
        "{said}"
    );
    ensure!(started.elapsed() < Duration::from_secs(30));
    wait_until(PATIENCE, "the task says why it does not run", || {
        let text = cluster.swarm("h1", &["service", "ps", "--no-trunc", "web"])?;
        Ok((text.contains(swarm_tests::lab::REGISTRY) && text.contains("refused")).then_some(()))
    })
    .with_context(|| {
        cluster
            .swarm("h1", &["service", "ps", "--no-trunc", "web"])
            .unwrap_or_default()
    })?;
    cluster.start_registry()?;
    cluster.wait_running("h1", "web", 1).map(drop)
}
