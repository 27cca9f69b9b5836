//! Faults on purpose: processes killed, hosts silent, links cut.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use swarm_tests::cluster::{Cluster, PATIENCE, busybox, nginx};
use swarm_tests::lab::wait_until;

/// Fetches a page by name in a container, without pause, until it is told to stop.
struct Fetcher {
    child: std::process::Child,
    /// The container's first process: while the fetcher runs, its sandbox has others too.
    container: String,
}

impl Fetcher {
    /// In `task` of `host`; results are counted in the container's /tmp.
    fn start(cluster: &Cluster, host: &str, task: &str, url: &str) -> Result<Self> {
        let script = format!(
            "rm -f /tmp/stop /tmp/good /tmp/bad; touch /tmp/good /tmp/bad; \
             while [ ! -e /tmp/stop ]; do \
               if timeout 5 wget -qO- {url} >/dev/null 2>>/tmp/why; then echo >>/tmp/good; else date >>/tmp/bad; fi; \
             done"
        );
        // Not through swarmd, which the test kills: straight into the container.
        let pid = container_pid(cluster, host, task)?;
        let child = cluster
            .command(host, "nsenter")?
            .args(["-t", &pid, "-m", "-n", "-r", "-w", "/bin/sh", "-c", &script])
            .stdin(std::process::Stdio::null())
            .spawn()?;
        Ok(Self {
            child,
            container: pid,
        })
    }

    /// Good and failed fetches.
    fn stop(mut self, cluster: &Cluster, host: &str) -> Result<(usize, usize, String)> {
        let pid = self.container.clone();
        let read = |script: &str| {
            cluster.host_sh(
                host,
                &format!("nsenter -t {pid} -m -r -w /bin/sh -c '{script}'"),
            )
        };
        read("touch /tmp/stop")?;
        self.child.wait()?;
        let count = |text: String| text.trim().parse::<usize>().context("a count");
        Ok((
            count(read("wc -l </tmp/good")?)?,
            count(read("wc -l </tmp/bad")?)?,
            read("cat /tmp/bad /tmp/why")?,
        ))
    }
}

/// The first process of a task's container, found by what it sleeps.
fn container_pid(cluster: &Cluster, host: &str, task: &str) -> Result<String> {
    let id = cluster
        .tasks("h1", task.split('.').next().unwrap_or_default())
        .or_else(|_| cluster.tasks("h2", task.split('.').next().unwrap_or_default()))?
        .into_iter()
        .find(|line| line.name == task)
        .context("no such task")?
        .id;
    // The sandbox is named after the task; whoever is in it belongs to the container.
    let script = format!(
        "want=$(stat -Lc %i /run/swarm/netns/{id}); for p in /proc/[0-9]*; do \
           [ \"$(stat -Lc %i $p/ns/net 2>/dev/null)\" = \"$want\" ] && basename $p; done | sort -n | head -n 1"
    );
    let pid = cluster.host_sh(host, &script)?.trim().to_owned();
    ensure!(!pid.is_empty(), "no process in the sandbox of {task}");
    Ok(pid)
}

#[test]
fn scaling_updating_and_draining_fail_no_request() -> Result<()> {
    let cluster = Cluster::up(3, 1)?;
    cluster.swarm("h1", &["network", "create", "--driver", "overlay", "net"])?;
    let args = [
        "--network",
        "net",
        "--replicas",
        "4",
        "--constraint",
        "node.hostname!=h3",
        // Who answers is asked for.
        "--health-cmd",
        "wget -qO /dev/null http://127.0.0.1/",
        "--health-interval",
        "100ms",
        &nginx(),
    ];
    cluster.service("h1", "web", 4, &args)?;
    cluster.client("h1", "client", "h3", "net")?;
    let fetcher = Fetcher::start(&cluster, "h3", "client.1", "http://web")?;
    // The client's node is slow to hear of it: who would be stopped at once would still be asked.
    cluster.pause("h3")?;
    cluster.swarm("h1", &["service", "scale", "--detach", "web=1"])?;
    std::thread::sleep(Duration::from_secs(1));
    cluster.resume("h3")?;
    cluster.wait_running("h1", "web", 1)?;
    for replicas in [4, 1, 4] {
        cluster.swarm("h1", &["service", "scale", &format!("web={replicas}")])?;
        cluster.wait_running("h1", "web", replicas)?;
    }
    cluster.swarm("h1", &["service", "update", "--env-add", "A=1", "web"])?;
    cluster.wait_running("h1", "web", 4)?;
    cluster.swarm("h1", &["node", "update", "--availability", "drain", "h2"])?;
    wait_until(PATIENCE, "all tasks run on h1", || {
        let tasks = cluster.wait_running("h1", "web", 4)?;
        Ok(tasks.iter().all(|task| task.node == "h1").then_some(()))
    })?;
    let (good, bad, why) = fetcher.stop(&cluster, "h3")?;
    ensure!(
        bad == 0 && good > 100,
        "{good} fetches were answered, {bad} failed: {why}"
    );
    Ok(())
}

#[test]
fn killing_every_swarmd_in_turn_fails_no_request() -> Result<()> {
    let mut cluster = Cluster::up(3, 3)?;
    cluster.swarm("h1", &["network", "create", "--driver", "overlay", "net"])?;
    cluster.service(
        "h1",
        "web",
        2,
        &[
            "--network",
            "net",
            "--replicas",
            "2",
            "--constraint",
            "node.hostname!=h3",
            &nginx(),
        ],
    )?;
    cluster.client("h1", "client", "h3", "net")?;
    let before = cluster.wait_running("h1", "web", 2)?;
    let fetcher = Fetcher::start(&cluster, "h3", "client.1", "http://web")?;
    for host in ["h1", "h2", "h3"] {
        cluster.kill(host)?;
        let until = Instant::now() + Duration::from_secs(5);
        cluster.start(host)?;
        cluster.wait_ready(PATIENCE)?;
        // The pace of the fault, not a wait for its effect.
        std::thread::sleep(until.saturating_duration_since(Instant::now()));
    }
    let (good, bad, why) = fetcher.stop(&cluster, "h3")?;
    ensure!(
        bad == 0 && good > 100,
        "{good} fetches were answered, {bad} failed: {why}"
    );
    let after = cluster.wait_running("h1", "web", 2)?;
    ensure!(
        before == after,
        "the tasks are the same ones: {before:?} {after:?}"
    );
    Ok(())
}

#[test]
fn losing_the_leader_loses_no_acknowledged_write() -> Result<()> {
    let mut cluster = Cluster::up(3, 3)?;
    cluster.swarm("h1", &["network", "create", "--driver", "overlay", "net"])?;
    cluster.service(
        "h1",
        "web",
        2,
        &["--network", "net", "--replicas", "2", &nginx()],
    )?;
    cluster.client("h1", "client", "h3", "net")?;
    let leader = cluster.leader("h1")?;
    let writer = ["h1", "h2", "h3"]
        .into_iter()
        .find(|host| *host != leader)
        .context("no other host")?;
    let fetcher = Fetcher::start(&cluster, "h3", "client.1", "http://web")?;

    let stop = Arc::new(AtomicBool::new(false));
    let (acknowledged, gap) = std::thread::scope(|scope| -> Result<_> {
        let (cluster_ref, stop_ref) = (&cluster, Arc::clone(&stop));
        let image = busybox();
        let writing = scope.spawn(move || -> Result<(Vec<String>, Duration)> {
            let (mut acknowledged, mut number, mut gap) = (Vec::new(), 0, Duration::ZERO);
            let mut last = Instant::now();
            while !stop_ref.load(Ordering::Relaxed) {
                number += 1;
                let name = format!("write{number}");
                // Scaled to nothing: this is about the writes.
                let output = cluster_ref.run(
                    writer,
                    &[
                        "swarm",
                        "service",
                        "create",
                        "--detach",
                        "--quiet",
                        "--no-resolve-image",
                        "--name",
                        &name,
                        "--replicas",
                        "0",
                        &image,
                    ],
                )?;
                if output.status.success() {
                    acknowledged.push(name);
                    gap = gap.max(last.elapsed());
                    last = Instant::now();
                }
            }
            Ok((acknowledged, gap))
        });
        let count = || -> Result<usize> {
            Ok(cluster_ref
                .swarm(writer, &["service", "ls", "-q"])?
                .lines()
                .count())
        };
        let some = count()? + 10;
        wait_until(PATIENCE, "ten writes are done", || {
            Ok((count()? > some).then_some(()))
        })?;
        let victim = cluster_ref.swarmd(&leader)?;
        nix::sys::signal::kill(victim, nix::sys::signal::Signal::SIGKILL)?;
        let more = wait_until(PATIENCE, "a new leader reads", || Ok(Some(count()?)))? + 10;
        wait_until(PATIENCE, "ten more writes are done", || {
            Ok((count()? > more).then_some(()))
        })?;
        stop.store(true, Ordering::Relaxed);
        writing
            .join()
            .map_err(|_| anyhow::anyhow!("the writer panicked"))?
    })?;
    ensure!(
        gap < Duration::from_secs(2),
        "writes stood still for {gap:?}"
    );
    let listed = cluster.swarm(writer, &["service", "ls", "--format", "{{.Name}}"])?;
    let lost: Vec<_> = acknowledged
        .iter()
        .filter(|name| !listed.lines().any(|line| line == *name))
        .collect();
    ensure!(
        lost.is_empty(),
        "{} acknowledged, lost: {lost:?}",
        acknowledged.len()
    );
    let (good, bad, why) = fetcher.stop(&cluster, "h3")?;
    ensure!(
        bad == 0 && good > 10,
        "{good} fetches were answered, {bad} failed: {why}"
    );
    cluster.start(&leader)?;
    cluster.wait_ready(PATIENCE)?;
    Ok(())
}

#[test]
fn the_tasks_of_a_silent_node_start_elsewhere_and_a_returning_one_stops_them() -> Result<()> {
    let cluster = Cluster::up(3, 1)?;
    cluster.swarm("h1", &["network", "create", "--driver", "overlay", "net"])?;
    cluster.service(
        "h1",
        "web",
        2,
        &[
            "--network",
            "net",
            "--replicas",
            "2",
            "--constraint",
            "node.hostname!=h1",
            &nginx(),
        ],
    )?;
    let silent = Instant::now();
    cluster.pause("h2")?;
    wait_until(PATIENCE, "h2 is Down", || {
        Ok((cluster.status_of("h1", "h2")? == "Down").then_some(()))
    })?;
    let elapsed = silent.elapsed();
    ensure!(
        elapsed < Duration::from_secs(5),
        "a silent node was Down after {elapsed:?}"
    );
    let tasks = cluster.wait_running("h1", "web", 2)?;
    ensure!(tasks.iter().all(|task| task.node == "h3"), "{tasks:?}");
    cluster.resume("h2")?;
    wait_until(
        PATIENCE,
        "h2 is Ready again and has stopped what was replaced",
        || {
            let left = cluster.host_sh("h2", "ls /run/swarm/netns 2>/dev/null | wc -l")?;
            Ok((cluster.status_of("h1", "h2")? == "Ready" && left.trim() == "0").then_some(()))
        },
    )?;
    Ok(())
}

#[test]
fn a_manager_that_hangs_takes_no_agent_down_with_it() -> Result<()> {
    let cluster = Cluster::up(5, 3)?;
    // The leader, and then whoever hears a worker.
    for leader in [true, false] {
        let hung = match leader {
            true => cluster.leader("h1")?,
            false => manager_of(&cluster, "h4")?,
        };
        let asked = ["h1", "h2", "h3"].into_iter().find(|host| *host != hung);
        let asked = asked.context("there are three")?;
        cluster.pause(&hung)?;
        // Its own node hangs with it.
        wait_until(PATIENCE, "the manager's node is Down", || {
            for worker in ["h4", "h5"] {
                let status = cluster.status_of(asked, worker)?;
                ensure!(status == "Ready", "{worker} is {status}, {hung} hangs");
            }
            Ok((cluster.status_of(asked, &hung)? == "Down").then_some(()))
        })?;
        wait_until(PATIENCE, "the workers have gone elsewhere", || {
            for worker in ["h4", "h5"] {
                let status = cluster.status_of(asked, worker)?;
                ensure!(status == "Ready", "{worker} is {status}, {hung} hangs");
                if manager_of(&cluster, worker)? == hung {
                    return Ok(None);
                }
            }
            Ok(Some(()))
        })?;
        cluster.resume(&hung)?;
        wait_until(PATIENCE, "the manager's node is Ready again", || {
            Ok((cluster.status_of(asked, &hung)? == "Ready").then_some(()))
        })?;
    }
    Ok(())
}

/// The manager with which the host has registered last.
fn manager_of(cluster: &Cluster, host: &str) -> Result<String> {
    let log = cluster.log(host)?;
    let line = log.lines().rfind(|line| line.contains("registered"));
    let line = line.context("it has registered")?;
    let mut managers = cluster.hosts().into_iter().take(cluster.managers());
    let at = |name: &String| {
        cluster
            .addr(name)
            .is_ok_and(|addr| line.contains(&format!("{addr}:")))
    };
    managers
        .find(at)
        .with_context(|| format!("no manager in {line}"))
}

#[test]
fn a_cut_minority_changes_nothing_and_catches_up() -> Result<()> {
    let cluster = Cluster::up(3, 3)?;
    let leader = cluster.leader("h1")?;
    let others: Vec<&str> = ["h1", "h2", "h3"]
        .into_iter()
        .filter(|host| *host != leader)
        .collect();
    for other in &others {
        cluster.cut(&leader, other)?;
    }
    // The majority goes on.
    wait_until(PATIENCE, "the majority writes", || {
        Ok(cluster
            .swarm(
                others[0],
                &["network", "create", "--driver", "overlay", "after-cut"],
            )
            .is_ok()
            .then_some(()))
    })?;
    // The minority neither writes nor answers from the past.
    let stale = cluster.run(&leader, &["timeout", "15", "swarm", "network", "ls"])?;
    ensure!(
        !stale.status.success(),
        "a manager without quorum answered: {}",
        String::from_utf8_lossy(&stale.stdout)
    );
    cluster.heal()?;
    wait_until(PATIENCE, "the old leader has caught up", || {
        Ok(cluster
            .swarm(&leader, &["network", "ls"])?
            .contains("after-cut")
            .then_some(()))
    })?;
    cluster.wait_ready(PATIENCE)
}

/// The manager that holds the session of a worker.
fn session_manager(cluster: &Cluster, worker: &str, managers: &[&str]) -> Result<Option<String>> {
    let script = "ss -Htn state established '( dport = :2377 )' | awk '{print $4}'";
    let peers = cluster.host_sh(worker, script)?;
    for manager in managers {
        let addr = cluster.host_sh(manager, "hostname -I | awk '{print $1}'")?;
        if peers
            .lines()
            .any(|peer| peer == format!("{}:2377", addr.trim()))
        {
            return Ok(Some((*manager).to_owned()));
        }
    }
    Ok(None)
}

#[test]
fn agents_whose_managers_are_lost_keep_their_tasks() -> Result<()> {
    let mut cluster = Cluster::up(4, 3)?;
    let managers = ["h1", "h2", "h3"];
    let on_worker = [
        "--constraint",
        "node.hostname==h4",
        &busybox(),
        "sleep",
        "1000000",
    ];
    let ids = |cluster: &Cluster, asked: &str| -> Result<Vec<String>> {
        let tasks = cluster.wait_running(asked, "held", 1)?;
        Ok(tasks.into_iter().map(|task| task.id).collect())
    };
    cluster.service("h1", "held", 1, &on_worker)?;
    let before = ids(&cluster, "h1")?;

    // The one that the agent has a session with is cut off from the other two, not from the agent.
    let cut = session_manager(&cluster, "h4", &managers)?.context("h4 has no session")?;
    let others: Vec<&str> = managers.into_iter().filter(|host| *host != cut).collect();
    for other in &others {
        cluster.cut(&cut, other)?;
    }
    let status = |host: &str| cluster.status_of(others[0], host);
    wait_until(PATIENCE, "the manager that is cut off is Down", || {
        Ok((status(&cut)? == "Down").then_some(()))
    })?;
    wait_until(PATIENCE, "h4 has a session with another manager", || {
        let now = session_manager(&cluster, "h4", &others)?;
        Ok(now.is_some().then_some(()))
    })?;
    ensure!(status("h4")? == "Ready", "h4 counts as silent");
    ensure!(
        ids(&cluster, others[0])? == before,
        "the task on h4 was replaced"
    );
    cluster.heal()?;
    cluster.wait_ready(PATIENCE)?;

    // All managers are away for so long that the agent has long waits between its attempts.
    let attempts = |cluster: &Cluster| -> Result<usize> {
        Ok(cluster.log("h4")?.matches("no session").count())
    };
    let until = attempts(&cluster)? + 18;
    for manager in managers {
        cluster.kill(manager)?;
    }
    wait_until(
        PATIENCE,
        "h4 has tried all managers again and again",
        || Ok((attempts(&cluster)? >= until).then_some(())),
    )?;
    for manager in managers {
        cluster.start(manager)?;
    }
    wait_until(PATIENCE, "h4 has a session again", || {
        let now = session_manager(&cluster, "h4", &managers)?;
        Ok(now.is_some().then_some(()))
    })?;
    cluster.wait_ready(PATIENCE)?;
    ensure!(
        ids(&cluster, "h1")? == before,
        "the task on h4 was replaced"
    );
    Ok(())
}
