//! Bad input and bad days: one clear sentence, exit status 1, nothing half-made.

use anyhow::{Context as _, Result, ensure};
use swarm_tests::cluster::{Cluster, PATIENCE, busybox};
use swarm_tests::lab::{REGISTRY, host_dir, wait_until};

#[test]
fn bad_input_is_refused_with_one_sentence_and_changes_nothing() -> Result<()> {
    let cluster = Cluster::up(2, 1)?;
    cluster.swarm(
        "h1",
        &[
            "network",
            "create",
            "--driver",
            "overlay",
            "--subnet",
            "10.50.0.0/24",
            "taken",
        ],
    )?;
    cluster.service(
        "h1",
        "web",
        1,
        &["--network", "taken", &busybox(), "sleep", "1000000"],
    )?;
    let image = busybox();
    let image = image.as_str();
    let before = everything(&cluster)?;
    let missing = format!("{REGISTRY}/nothing-here:1");
    let cases: &[(&[&str], &str)] = &[
        (&["service", "create", "--nonsense", image], "--nonsense"),
        (&["service", "create", &missing], "no such image: "),
        (
            &["service", "update", "--image", &missing, "web"],
            "no such image: ",
        ),
        (
            &[
                "network", "create", "--driver", "overlay", "--subnet", "foo", "n",
            ],
            "invalid subnet foo: invalid CIDR block notation",
        ),
        (
            &[
                "network",
                "create",
                "--driver",
                "overlay",
                "--subnet",
                "10.50.1.5/24",
                "n",
            ],
            "invalid subnet 10.50.1.5/24: it should be 10.50.1.0/24",
        ),
        (
            &[
                "network",
                "create",
                "--driver",
                "overlay",
                "--subnet",
                "10.50.0.128/25",
                "n",
            ],
            "taken",
        ),
        (
            &[
                "network",
                "create",
                "--driver",
                "overlay",
                "--subnet",
                "172.30.99.0/24",
                "n",
            ],
            "172.30.99.0/24",
        ),
        (
            &[
                "network",
                "create",
                "--driver",
                "overlay",
                "--subnet",
                "10.60.0.0/24",
                "--gateway",
                "10.61.0.1",
                "n",
            ],
            "no matching subnet for gateway 10.61.0.1",
        ),
        (
            &["network", "create", "--driver", "overlay", "taken"],
            "network with name taken already exists",
        ),
        (
            &["network", "create", "--driver", "nonsense", "n"],
            "nonsense",
        ),
        (&["network", "rm", "taken"], "is in use by service"),
        (&["network", "rm", "missing"], "network missing not found"),
        (
            &[
                "service",
                "create",
                "--detach",
                "--name",
                "s",
                "--network",
                "missing",
                image,
            ],
            "network missing not found",
        ),
        (
            &[
                "service",
                "create",
                "--detach",
                "--name",
                "s",
                "UPPER/case image",
            ],
            "is not a valid repository/tag",
        ),
        (
            &[
                "service",
                "create",
                "--detach",
                "--name",
                "s",
                "--constraint",
                "nonsense",
                image,
            ],
            "nonsense",
        ),
        (
            &[
                "service",
                "create",
                "--detach",
                "--name",
                "s",
                "--constraint",
                "node.color==red",
                image,
            ],
            "node.color",
        ),
        (
            &["service", "create", "--detach", "--name", "web", image],
            "name conflicts with an existing object: service web already exists",
        ),
        (
            &["service", "create", "--detach", "--name", "not_dns!", image],
            "name must be valid as a DNS name component",
        ),
        (
            &[
                "service",
                "create",
                "--detach",
                "--name",
                "s",
                "--publish",
                "8080:80",
                image,
            ],
            "mode=host",
        ),
        (
            &[
                "service",
                "create",
                "--detach",
                "--name",
                "s",
                "--publish",
                "mode=host,published=99999,target=80",
                image,
            ],
            "99999",
        ),
        (
            &[
                "service",
                "create",
                "--detach",
                "--name",
                "s",
                "--limit-memory",
                "1",
                image,
            ],
            "Must be at least 4MiB",
        ),
        (
            &[
                "service",
                "create",
                "--detach",
                "--name",
                "s",
                "--mode",
                "global",
                "--replicas",
                "2",
                image,
            ],
            "replicas can only be used with replicated",
        ),
        (
            &["service", "scale", "--detach", "missing=2"],
            "service missing not found",
        ),
        (&["service", "scale", "--detach", "web=many"], "many"),
        (&["service", "rm", "missing"], "service missing not found"),
        (
            &["service", "inspect", "missing"],
            "no such service: missing",
        ),
        (&["node", "rm", "h2"], "is not down and can't be removed"),
        (
            &["node", "demote", "h1"],
            "attempting to demote the last manager of the swarm",
        ),
        (
            &["node", "update", "--availability", "sleepy", "h2"],
            "sleepy",
        ),
        (&["init"], "This node is already part of a swarm"),
        (&["leave"], "Use `--force`"),
        (&["exec", "web.7", "true"], "web.7"),
    ];
    for (args, expected) in cases {
        let mut argv = vec!["swarm"];
        argv.extend(*args);
        let output = cluster.run("h1", &argv)?;
        let stderr = String::from_utf8_lossy(&output.stderr);
        ensure!(
            stderr.contains(expected),
            "{args:?} should say {expected:?}, but says {stderr:?}"
        );
        ensure!(
            output.status.code() == Some(1),
            "{args:?} exits with {}",
            output.status
        );
        ensure!(!stderr.contains("panicked"), "{args:?}: {stderr}");
    }
    ensure!(
        everything(&cluster)? == before,
        "a refused command changed something"
    );

    // Where the registry was not asked, the node finds out, and its task says so.
    let output = cluster.run(
        "h1",
        &[
            "swarm",
            "service",
            "create",
            "--detach",
            "--name",
            "absent",
            "--restart-condition",
            "none",
            "--no-resolve-image",
            &missing,
        ],
    )?;
    ensure!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    wait_until(
        PATIENCE,
        "the task says that there is no such image",
        || {
            Ok(cluster
                .swarm("h1", &["service", "ps", "--no-trunc", "absent"])?
                .contains("No such image")
                .then_some(()))
        },
    )?;

    // On a worker.
    let output = cluster.run("h2", &["swarm", "service", "ls"])?;
    let stderr = String::from_utf8_lossy(&output.stderr);
    ensure!(
        !output.status.success()
            && stderr.contains("Worker nodes can't be used to view or modify cluster state"),
        "{stderr}"
    );
    Ok(())
}

#[test]
fn a_task_that_fits_nowhere_says_why() -> Result<()> {
    let cluster = Cluster::up(3, 1)?;
    cluster.swarm(
        "h1",
        &[
            "service",
            "create",
            "--detach",
            "--name",
            "big",
            "--reserve-memory",
            "1000g",
            &busybox(),
        ],
    )?;
    cluster.swarm(
        "h1",
        &[
            "service",
            "create",
            "--detach",
            "--name",
            "picky",
            "--constraint",
            "node.labels.zone==b",
            &busybox(),
        ],
    )?;
    for (service, reason) in [
        ("big", "no suitable node (insufficient memory on 3 nodes)"),
        (
            "picky",
            "no suitable node (constraint node.labels.zone==b not met on 3 nodes)",
        ),
    ] {
        wait_until(PATIENCE, "the reason is in service ps", || {
            Ok(cluster
                .swarm("h1", &["service", "ps", "--no-trunc", service])?
                .contains(reason)
                .then_some(()))
        })
        .with_context(|| {
            cluster
                .swarm("h1", &["service", "ps", "--no-trunc", service])
                .unwrap_or_default()
        })?;
    }
    // It is placed as soon as it can be.
    cluster.swarm("h1", &["node", "update", "--label-add", "zone=b", "h2"])?;
    wait_until(PATIENCE, "the task is placed", || {
        Ok(cluster
            .tasks("h1", "picky")?
            .iter()
            .any(|task| task.node == "h2")
            .then_some(()))
    })
}

#[test]
fn strangers_get_nothing() -> Result<()> {
    let cluster = Cluster::unformed(2)?;
    cluster.swarm("h1", &["init", "--advertise-addr", "172.30.99.1"])?;
    let token = cluster.swarm("h1", &["join-token", "-q", "worker"])?;
    let token = token.trim();
    let join = |token: &str| -> Result<String> {
        let output = cluster.run(
            "h2",
            &["swarm", "join", "--token", token, "172.30.99.1:2377"],
        )?;
        ensure!(
            output.status.code() == Some(1),
            "a join with {token} exits with {}",
            output.status
        );
        Ok(String::from_utf8_lossy(&output.stderr).into_owned())
    };
    // A wrong secret, a wrong CA digest, nonsense, an old token.
    let (head, secret) = token.rsplit_once('-').context("a token")?;
    let wrong_secret = format!("{head}-{}", "0".repeat(secret.len()));
    ensure!(join(&wrong_secret)?.contains("invalid join token"));
    let digest = head.rsplit_once('-').context("a token")?.1;
    let wrong_digest = token.replace(digest, &"1".repeat(digest.len()));
    ensure!(join(&wrong_digest)?.contains("fingerprint"));
    ensure!(join("nonsense")?.contains("token"));
    cluster.swarm("h1", &["join-token", "--rotate", "worker"])?;
    ensure!(join(token)?.contains("invalid join token"));
    let nodes = cluster.swarm("h1", &["node", "ls", "-q"])?;
    ensure!(
        nodes.lines().count() == 1,
        "a refused node is in the list: {nodes}"
    );
    ensure!(
        cluster
            .swarm("h2", &["info"])?
            .to_lowercase()
            .contains("inactive")
    );

    // A half-open connection keeps nobody from being served, and does not last.
    let mut silent = cluster.half_open("h2", "172.30.99.1", "")?;
    let fresh = cluster.swarm("h1", &["join-token", "-q", "worker"])?;
    cluster.swarm("h2", &["join", "--token", fresh.trim(), "172.30.99.1:2377"])?;
    wait_until(PATIENCE, "the silent connection is ended", || {
        Ok(silent.try_wait()?.map(drop))
    })?;
    let nodes = cluster.swarm("h1", &["node", "ls", "-q"])?;
    ensure!(nodes.lines().count() == 2, "{nodes}");
    let log = std::fs::read_to_string(host_dir("h1").join("swarmd.log"))?;
    ensure!(
        log.contains("join token"),
        "the refused token is not in the log"
    );
    Ok(())
}

#[test]
fn a_damaged_log_is_named_and_not_served() -> Result<()> {
    let mut cluster = Cluster::up(1, 1)?;
    cluster.swarm("h1", &["network", "create", "--driver", "overlay", "n"])?;
    cluster.stop("h1")?;
    // Flip a byte in the middle of the log's file.
    cluster.host_sh(
        "h1",
        "f=$(find /var/lib/swarm/raft -name db -type f | head -n 1); s=$(stat -c %s $f); \
         python3 - $f <<'END'\nimport sys\np = sys.argv[1]\nb = bytearray(open(p, 'rb').read())\n\
         used = [i for i, x in enumerate(b) if x]\nfor i in used[len(used)//4 : len(used)//4 + 2000]: b[i] ^= 0x55\nopen(p, 'wb').write(b)\nEND",
    )?;
    let error = cluster
        .start("h1")
        .err()
        .context("swarmd started on a damaged log")?;
    let text = format!("{error:#}");
    ensure!(
        text.contains("/var/lib/swarm/raft"),
        "the error does not name the file: {text}"
    );
    Ok(())
}

/// What users can see of the cluster.
fn everything(cluster: &Cluster) -> Result<String> {
    let mut text = String::new();
    for args in [
        &["service", "ls"][..],
        &["network", "ls", "--no-trunc"],
        &["node", "ls"],
        &["service", "inspect", "web"],
        &["network", "inspect", "taken"],
    ] {
        text += &cluster.swarm("h1", args)?;
    }
    Ok(text)
}
