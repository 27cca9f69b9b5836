//! Containers in good and bad days: ends, hangs, floods, limits, updates.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use swarm_tests::cluster::{Cluster, PATIENCE, busybox, nginx};
use swarm_tests::lab::wait_until;

#[test]
fn an_update_replaces_every_task_and_keeps_the_slots() -> Result<()> {
    let cluster = Cluster::up(2, 1)?;
    let before = cluster.service(
        "h1",
        "web",
        3,
        &[
            "--replicas",
            "3",
            "--env",
            "COLOR=red",
            "--stop-grace-period",
            "1s",
            &busybox(),
            "sleep",
            "1000000",
        ],
    )?;
    let said = cluster.swarm(
        "h1",
        &["service", "update", "--env-add", "COLOR=blue", "web"],
    )?;
    ensure!(said.contains("converged"), "{said}");
    let after = cluster.wait_running("h1", "web", 3)?;
    ensure!(
        before
            .iter()
            .map(|t| &t.name)
            .eq(after.iter().map(|t| &t.name)),
        "{after:?}"
    );
    ensure!(
        before
            .iter()
            .all(|old| after.iter().all(|new| new.id != old.id)),
        "{after:?}"
    );
    for task in &after {
        let color = cluster.sh(&task.node, &task.name, "echo $COLOR")?;
        ensure!(color.trim() == "blue", "{} has {color}", task.name);
    }
    // A label is no reason to replace anything.
    cluster.swarm(
        "h1",
        &["service", "update", "--detach", "--label-add", "a=b", "web"],
    )?;
    ensure!(cluster.wait_running("h1", "web", 3)? == after);
    Ok(())
}

#[test]
fn a_container_that_ends_at_once_is_restarted_with_back_off() -> Result<()> {
    let cluster = Cluster::up(1, 1)?;
    cluster.swarm(
        "h1",
        &[
            "service",
            "create",
            "--detach",
            "--name",
            "ends",
            "--restart-delay",
            "100ms",
            &busybox(),
            "sh",
            "-c",
            "exit 3",
        ],
    )?;
    wait_until(PATIENCE, "it was restarted and says why", || {
        let text = cluster.swarm("h1", &["service", "ps", "--no-trunc", "ends"])?;
        Ok((text.matches("non-zero exit (3)").count() >= 3).then_some(()))
    })?;
    // History is bounded.
    wait_until(PATIENCE, "old tasks are forgotten", || {
        let text = cluster.swarm("h1", &["service", "ps", "-q", "ends"])?;
        Ok((text.lines().count() <= 6).then_some(()))
    })?;
    // And "none" means none.
    cluster.swarm(
        "h1",
        &[
            "service",
            "create",
            "--detach",
            "--name",
            "once",
            "--restart-condition",
            "none",
            &busybox(),
            "true",
        ],
    )?;
    wait_until(PATIENCE, "it is complete", || {
        Ok(cluster
            .swarm("h1", &["service", "ps", "once"])?
            .contains("Complete")
            .then_some(()))
    })?;
    ensure!(
        cluster
            .swarm("h1", &["service", "ps", "-q", "once"])?
            .lines()
            .count()
            == 1
    );
    Ok(())
}

#[test]
fn a_container_that_ignores_its_stop_signal_is_killed_after_the_grace_period() -> Result<()> {
    let cluster = Cluster::up(1, 1)?;
    cluster.service(
        "h1",
        "stubborn",
        1,
        &[
            "--stop-grace-period",
            "1s",
            &busybox(),
            "sh",
            "-c",
            "trap '' TERM; while :; do sleep 1; done",
        ],
    )?;
    let start = Instant::now();
    cluster.swarm("h1", &["service", "rm", "stubborn"])?;
    wait_until(PATIENCE, "it is gone", || {
        Ok((cluster
            .host_sh("h1", "ls /run/swarm/netns 2>/dev/null | wc -l")?
            .trim()
            == "0")
            .then_some(()))
    })?;
    let elapsed = start.elapsed();
    ensure!(
        elapsed >= Duration::from_secs(1),
        "killed after {elapsed:?}, before its grace period"
    );
    Ok(())
}

#[test]
fn a_flood_of_output_is_bounded_and_the_end_of_it_readable() -> Result<()> {
    let cluster = Cluster::up(1, 1)?;
    cluster.service("h1", "loud", 1, &[&busybox(), "sh", "-c", "yes 0123456789012345678901234567890123456789 | head -c 80000000; echo the-end; sleep 1000000"])?;
    wait_until(PATIENCE, "the end of the output is there", || {
        Ok(cluster
            .swarm("h1", &["logs", "--tail", "1", "loud.1"])?
            .contains("the-end")
            .then_some(()))
    })?;
    let used = cluster.host_sh(
        "h1",
        "du -sk /var/lib/swarm/runtime/containers/*/log | awk '{n += $1} END {print n}'",
    )?;
    ensure!(used.trim().parse::<u64>()? < 64 << 10, "{used} KiB of logs");
    Ok(())
}

#[test]
fn limits_environment_user_and_read_only_root_hold() -> Result<()> {
    let cluster = Cluster::up(1, 1)?;
    cluster.service(
        "h1",
        "box",
        1,
        &[
            "--limit-memory",
            "64M",
            "--limit-cpu",
            "0.5",
            "--user",
            "nobody",
            "--workdir",
            "/tmp",
            "--hostname",
            "boxed",
            "--read-only",
            "--mount",
            "type=tmpfs,target=/scratch",
            "--env",
            "A=b c",
            "--cap-drop",
            "ALL",
            "--init",
            &busybox(),
            "sleep",
            "1000000",
        ],
    )?;
    ensure!(
        cluster.sh("h1", "box.1", "id -u; pwd; hostname; echo $A")? == "65534\n/tmp\nboxed\nb c\n"
    );
    ensure!(
        cluster.sh("h1", "box.1", "echo x > /etc/x").is_err(),
        "the root is writable"
    );
    cluster.sh("h1", "box.1", "echo x > /scratch/x")?;
    let caps = cluster.sh("h1", "box.1", "grep CapEff /proc/self/status")?;
    ensure!(caps.contains("0000000000000000"), "{caps}");
    let first = cluster.sh("h1", "box.1", "cat /proc/1/comm")?;
    ensure!(
        first.trim() != "sleep",
        "with --init, process 1 is the init, not {first}"
    );
    // Beyond the memory limit: killed, and it says so.
    cluster.swarm(
        "h1",
        &[
            "service",
            "create",
            "--detach",
            "--name",
            "greedy",
            "--restart-condition",
            "none",
            "--limit-memory",
            "16M",
            &busybox(),
            "sh",
            "-c",
            "tail /dev/zero",
        ],
    )?;
    wait_until(PATIENCE, "the greedy task was killed", || {
        Ok(cluster
            .swarm("h1", &["service", "ps", "--no-trunc", "greedy"])?
            .contains("137")
            .then_some(()))
    })
    .with_context(|| {
        cluster
            .swarm("h1", &["service", "ps", "--no-trunc", "greedy"])
            .unwrap_or_default()
    })
}

#[test]
fn exec_passes_input_output_and_exit_status() -> Result<()> {
    let cluster = Cluster::up(1, 1)?;
    cluster.service("h1", "box", 1, &[&busybox(), "sleep", "1000000"])?;
    let output = cluster.run(
        "h1",
        &[
            "swarm",
            "exec",
            "box.1",
            "sh",
            "-c",
            "echo out; echo err >&2; exit 5",
        ],
    )?;
    ensure!(output.status.code() == Some(5), "{}", output.status);
    ensure!(
        output.stdout == b"out\n" && output.stderr == b"err\n",
        "{output:?}"
    );
    let piped = cluster.host_sh("h1", "printf 'a\\nb\\n' | swarm exec -i box.1 wc -l")?;
    ensure!(piped.trim() == "2", "{piped}");
    let tty = cluster.host_sh(
        "h1",
        "script -qec 'swarm exec -it box.1 tty' /dev/null </dev/null",
    )?;
    ensure!(
        tty.contains("/dev/pts/") || tty.contains("/dev/console"),
        "{tty}"
    );
    Ok(())
}

#[test]
fn a_host_port_is_reachable_and_given_once_per_node() -> Result<()> {
    let cluster = Cluster::up(2, 1)?;
    cluster.service(
        "h1",
        "web",
        2,
        &[
            "--replicas",
            "2",
            "--publish",
            "mode=host,published=8080,target=80",
            &nginx(),
        ],
    )?;
    for addr in ["172.30.99.1", "172.30.99.2"] {
        for host in ["h1", "h2"] {
            let page = cluster.host_sh(host, &format!("curl -sf -m 5 http://{addr}:8080/"))?;
            ensure!(page.contains("Welcome to nginx!"), "{page}");
        }
    }
    // A third task finds no node with the port free, and says so.
    cluster.swarm("h1", &["service", "scale", "--detach", "web=3"])?;
    wait_until(PATIENCE, "the third task says why it waits", || {
        let text = cluster.swarm("h1", &["service", "ps", "--no-trunc", "web"])?;
        Ok(text
            .contains("no suitable node (host port 8080 in use on 2 nodes)")
            .then_some(()))
    })
    .with_context(|| {
        cluster
            .swarm("h1", &["service", "ps", "--no-trunc", "web"])
            .unwrap_or_default()
    })
}

#[test]
fn containers_go_on_when_every_process_of_the_node_is_killed_in_turn() -> Result<()> {
    let mut cluster = Cluster::up(2, 1)?;
    cluster.swarm("h1", &["network", "create", "--driver", "overlay", "net"])?;
    cluster.service(
        "h1",
        "web",
        1,
        &[
            "--network",
            "net",
            "--constraint",
            "node.hostname==h2",
            &nginx(),
        ],
    )?;
    cluster.client("h1", "client", "h2", "net")?;
    let before = (
        cluster.wait_running("h1", "web", 1)?,
        cluster.wait_running("h1", "client", 1)?,
    );
    for _ in 0..3 {
        cluster.kill("h2")?;
        cluster.start("h2")?;
    }
    // The name server dies: it is started again.
    cluster.host_sh("h2", "kill -9 $(pgrep -f '[s]warmd names' | while read p; do [ \"$(readlink /proc/$p/ns/mnt)\" = \"$(readlink /proc/self/ns/mnt)\" ] && echo $p; done)")?;
    wait_until(PATIENCE, "names are answered again", || {
        Ok(cluster
            .sh("h2", "client.1", "timeout 2 wget -qO- http://web")
            .is_ok()
            .then_some(()))
    })?;
    let after = (
        cluster.wait_running("h1", "web", 1)?,
        cluster.wait_running("h1", "client", 1)?,
    );
    ensure!(before == after, "{before:?} {after:?}");
    // A shim dies: its container goes on, and is followed by its process alone.
    cluster.host_sh(
        "h2",
        &format!("kill -9 $(pgrep -f '[s]him.*{}')", after.0[0].id),
    )?;
    cluster.sh("h2", "client.1", "wget -qO- http://web")?;
    ensure!(cluster.wait_running("h1", "web", 1)? == after.0);
    // Only with its process the task ends, and is replaced.
    cluster.host_sh("h2", "kill -9 $(pgrep -f '[n]ginx: master')")?;
    wait_until(PATIENCE, "the task is replaced", || {
        let tasks = cluster.tasks("h1", "web")?;
        Ok(
            (tasks.len() == 1 && tasks[0].id != after.0[0].id && tasks[0].state == "Running")
                .then_some(()),
        )
    })
}
