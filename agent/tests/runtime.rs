//! The built-in runtime against real kernels, images and registries. Needs root.

mod support;

use std::time::Duration;

use futures::StreamExt;
use support::{Host, eventually, is_alive};
use swarm_agent::runtime::{
    Container, ContainerConfig, ContainerState, ExecConfig, ExecInput, ExecOutput, Exit,
    LogOptions, OciRuntime, Runtime, RuntimeError,
};

async fn run(runtime: &OciRuntime, config: &ContainerConfig) -> (Exit, String) {
    runtime.create(config).await.unwrap();
    runtime.start(&config.task_id).await.unwrap();
    let exit = runtime.wait(&config.task_id).await.unwrap();
    (exit, output(runtime, config).await)
}

async fn output(runtime: &OciRuntime, config: &ContainerConfig) -> String {
    let mut lines = runtime
        .logs(&config.task_id, LogOptions::default())
        .await
        .unwrap();
    let mut text = String::new();
    while let Some(line) = lines.next().await {
        text.push_str(&String::from_utf8_lossy(&line.unwrap().data));
    }
    text
}

#[tokio::test]
async fn a_pulled_image_runs_and_its_exit_code_and_output_are_known() {
    let host = Host::new();
    let runtime = host.runtime();
    let image = host.serve_busybox();
    runtime.pull(&image, None).await.unwrap();
    let mut config = host.container(
        &image,
        &[
            "sh",
            "-c",
            "echo out; echo err >&2; hostname; pwd; id -u; exit 7",
        ],
    );
    config.spec.dir = "/made/for/me".into();
    let (exit, text) = run(&runtime, &config).await;
    assert_eq!(
        exit,
        Exit {
            code: 7,
            oom_killed: false
        },
        "{text}"
    );
    let expected = format!("out\nerr\n{}\n/made/for/me\n0\n", config.hostname);
    let (mut got, mut want): (Vec<_>, Vec<_>) =
        (text.lines().collect(), expected.lines().collect());
    got.sort_unstable();
    want.sort_unstable();
    assert_eq!(got, want);
    let found = runtime.list().await.unwrap();
    let state = ContainerState::Exited(exit);
    assert_eq!(
        found,
        [Container {
            task_id: config.task_id.clone(),
            state
        }]
    );
    runtime.remove(&config.task_id).await.unwrap();
    runtime.remove(&config.task_id).await.unwrap();
    assert_eq!(runtime.list().await.unwrap(), []);
    assert!(matches!(
        runtime.wait(&config.task_id).await,
        Err(RuntimeError::NotFound(_))
    ));
    assert_eq!(host.processes(), Vec::<i32>::new());
}

async fn start(runtime: &OciRuntime, config: &ContainerConfig) -> i32 {
    runtime.pull(&config.spec.image, None).await.unwrap();
    runtime.create(config).await.unwrap();
    runtime.start(&config.task_id).await.unwrap()
}

/// A container that says "ready" once it is in its program.
async fn start_script(host: &Host, runtime: &OciRuntime, script: &str) -> (ContainerConfig, i32) {
    let config = host.container(&host.serve_busybox(), &["sh", "-c", script]);
    let pid = start(runtime, &config).await;
    until_said(runtime, &config, "ready").await;
    (config, pid)
}

async fn until_said(runtime: &OciRuntime, config: &ContainerConfig, word: &str) {
    let options = LogOptions {
        follow: true,
        ..LogOptions::default()
    };
    let mut lines = runtime.logs(&config.task_id, options).await.unwrap();
    while let Some(line) = lines.next().await {
        if line.unwrap().data.starts_with(word.as_bytes()) {
            return;
        }
    }
    panic!("ended without {word}");
}

#[tokio::test]
async fn stop_asks_first_and_kills_after_the_grace_period() {
    let host = Host::new();
    let runtime = host.runtime();
    let script = "trap 'echo asked; exit 3' TERM; echo ready; while :; do sleep 0.01; done";
    let (polite, _) = start_script(&host, &runtime, script).await;
    let exit = runtime
        .stop(&polite.task_id, Duration::from_secs(60))
        .await
        .unwrap();
    assert_eq!(exit.code, 3);
    assert_eq!(output(&runtime, &polite).await, "ready\nasked\n");

    let script = "trap 'echo no' TERM; echo ready; while :; do sleep 0.01; done";
    let (deaf, _) = start_script(&host, &runtime, script).await;
    let exit = runtime
        .stop(&deaf.task_id, Duration::from_millis(200))
        .await
        .unwrap();
    assert_eq!(exit.code, 137);
    assert_eq!(output(&runtime, &deaf).await, "ready\nno\n");
    // Done already: the same answer.
    assert_eq!(
        runtime.stop(&deaf.task_id, Duration::ZERO).await.unwrap(),
        exit
    );
}

#[tokio::test]
async fn what_is_told_to_stop_while_it_starts_still_hears_of_it_and_once() {
    let host = Host::new();
    let runtime = host.runtime();
    let scripts = [
        // Process 1 has no handler yet: the kernel drops what is sent to it now.
        "echo ready; sleep 0.5; trap 'echo asked; exit 3' TERM; while :; do sleep 0.01; done",
        // It has one that is of no use yet, as nginx: what is caught now changes nothing later.
        "trap 'echo early' TERM; echo ready; i=0; while [ $i -lt 60000 ]; do i=$((i+1)); done; \
         trap 'echo asked; exit 3' TERM; while :; do sleep 0.01; done",
    ];
    for script in scripts {
        let (config, _) = start_script(&host, &runtime, script).await;
        let exit = runtime
            .stop(&config.task_id, Duration::from_secs(20))
            .await
            .unwrap();
        assert_eq!(exit.code, 3, "{script}");
        assert_eq!(output(&runtime, &config).await, "ready\nasked\n");
    }
}

#[tokio::test]
async fn a_container_that_was_never_started_stops_at_once() {
    let host = Host::new();
    let runtime = host.runtime();
    let config = host.container(&host.serve_busybox(), &["sh", "-c", "echo never"]);
    runtime.pull(&config.spec.image, None).await.unwrap();
    runtime.create(&config).await.unwrap();
    runtime.create(&config).await.unwrap();
    assert_eq!(
        runtime.list().await.unwrap()[0].state,
        ContainerState::Created
    );
    let exit = runtime
        .stop(&config.task_id, Duration::from_secs(3600))
        .await
        .unwrap();
    assert_eq!(exit.code, 137);
    assert_eq!(output(&runtime, &config).await, "");
}

#[tokio::test]
async fn containers_outlive_the_agent_and_are_adopted() {
    let host = Host::new();
    let script = "trap 'exit 5' TERM; echo ready; while :; do sleep 0.01; done";
    let first = host.runtime();
    let (config, pid) = start_script(&host, &first, script).await;
    let made_only = host.container(&config.spec.image, &["sh", "-c", "echo late; exit 4"]);
    first.create(&made_only).await.unwrap();
    drop(first);

    let second = host.runtime();
    let mut states: Vec<_> = second
        .list()
        .await
        .unwrap()
        .into_iter()
        .map(|found| (found.task_id, found.state))
        .collect();
    states.sort_by_key(|(task, _)| *task != config.task_id);
    assert_eq!(
        states,
        [
            (config.task_id.clone(), ContainerState::Running { pid }),
            (made_only.task_id.clone(), ContainerState::Created),
        ]
    );
    // Started already: the same process, not another one.
    assert_eq!(second.start(&config.task_id).await.unwrap(), pid);
    assert_eq!(
        second
            .stop(&config.task_id, Duration::from_secs(60))
            .await
            .unwrap()
            .code,
        5
    );
    second.start(&made_only.task_id).await.unwrap();
    assert_eq!(second.wait(&made_only.task_id).await.unwrap().code, 4);
    assert_eq!(output(&second, &made_only).await, "late\n");
}

#[tokio::test]
async fn a_container_without_its_shim_ends_with_an_unknown_code_and_leaves_nothing() {
    let host = Host::new();
    let runtime = host.runtime();
    let (config, pid) = start_script(&host, &runtime, "echo ready; sleep 1000").await;
    let shim = host
        .config
        .run
        .join(config.task_id.as_str())
        .join("shim.pid");
    let shim: serde_json::Value = serde_json::from_slice(&std::fs::read(shim).unwrap()).unwrap();
    let shim = i32::try_from(shim["pid"].as_i64().unwrap()).unwrap();
    nix::sys::signal::kill(
        nix::unistd::Pid::from_raw(shim),
        nix::sys::signal::Signal::SIGKILL,
    )
    .unwrap();
    eventually("the shim is gone", || !is_alive(shim));
    assert_eq!(
        runtime.list().await.unwrap()[0].state,
        ContainerState::Running { pid }
    );
    let exit = runtime.stop(&config.task_id, Duration::ZERO).await.unwrap();
    assert_eq!(
        exit,
        Exit {
            code: 255,
            oom_killed: false
        }
    );
    assert!(!is_alive(pid));
    runtime.remove(&config.task_id).await.unwrap();
    assert_eq!(runtime.list().await.unwrap(), []);
    assert_eq!(host.processes(), Vec::<i32>::new());
}

#[tokio::test]
async fn remove_kills_what_runs_and_leaves_no_trace() {
    let host = Host::new();
    let runtime = host.runtime();
    let (config, pid) = start_script(&host, &runtime, "echo ready; sleep 1000").await;
    assert!(!host.cgroups().is_empty());
    runtime.remove(&config.task_id).await.unwrap();
    assert!(!is_alive(pid));
    let left = |dir: &std::path::Path| {
        std::fs::read_dir(dir)
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .filter(|name| *name == config.task_id.as_str())
            .count()
    };
    assert_eq!(
        left(&host.config.run) + left(&host.config.root.join("containers")),
        0
    );
    for group in host.cgroups() {
        assert_eq!(left(&group), 0);
    }
    let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
    assert!(!mounts.contains(config.task_id.as_str()));
}

#[tokio::test]
async fn a_container_is_confined_by_its_capabilities() {
    let host = Host::new();
    let runtime = host.runtime();
    let image = host.serve_busybox();
    runtime.pull(&image, None).await.unwrap();
    let script = "grep -E 'Seccomp:|CapEff|CapPrm|CapBnd' /proc/self/status; unshare -m true && echo unshared";
    let own = std::fs::read_to_string("/proc/self/status").unwrap();
    let own = own.lines().find_map(|line| line.strip_prefix("CapEff:\t"));
    let expected = [
        // It may neither change its capabilities nor load a filter.
        (
            None,
            Some("ALL"),
            "0000000000000000",
            "Operation not permitted",
        ),
        (
            Some("SYS_ADMIN"),
            Some("SETPCAP"),
            "00000000a82424fb",
            "unshared",
        ),
        // All that this machine has, which may be less than there are.
        (Some("ALL"), None, own.unwrap(), "unshared"),
    ];
    for (added, dropped, capabilities, said) in expected {
        let mut config = host.container(&image, &["sh", "-c", script]);
        config.spec.capability_add.extend(added.map(str::to_owned));
        config
            .spec
            .capability_drop
            .extend(dropped.map(str::to_owned));
        runtime.create(&config).await.unwrap();
        runtime.start(&config.task_id).await.unwrap();
        runtime.wait(&config.task_id).await.unwrap();
        let text = output(&runtime, &config).await;
        for set in ["CapEff", "CapPrm", "CapBnd"] {
            let line = format!("{set}:\t{capabilities}\n");
            assert!(text.contains(&line), "{line} not in:\n{text}");
        }
        assert!(text.contains("Seccomp:\t2\n"), "{text}");
        assert!(text.contains(said), "{said} not in:\n{text}");
    }
}

#[tokio::test]
async fn limits_and_confinement_are_in_force() {
    let host = Host::new();
    let runtime = host.runtime();
    let image = host.serve_busybox();
    runtime.pull(&image, None).await.unwrap();
    let script = "grep -E 'Seccomp:|CapEff|CapBnd' /proc/self/status; ls /dev; echo x > /proc/sys/kernel/hostname; \
        mount -t tmpfs x /tmp; unshare -m true; cat /etc/hosts /etc/resolv.conf; echo $HOME; touch /bin/x; \
        dd if=/dev/zero of=/tmp/x count=1 2>/dev/null && echo tmp writable; id";
    let mut config = host.container(&image, &["sh", "-c", script]);
    config.spec.read_only = true;
    config.spec.user = "web".into();
    config.spec.mounts.push(swarm_proto::v1::Mount {
        r#type: swarm_proto::v1::MountType::Tmpfs.into(),
        target: "/tmp".into(),
        ..Default::default()
    });
    config.resources.limits = Some(swarm_proto::v1::Resources {
        nano_cpus: 500_000_000,
        memory_bytes: 64 << 20,
    });
    config.resources.pids_limit = 50;
    runtime.create(&config).await.unwrap();
    let read = |file: &str| {
        host.cgroups().iter().find_map(|group| {
            let text =
                std::fs::read_to_string(group.join(config.task_id.as_str()).join(file)).ok()?;
            Some(text.trim().to_owned())
        })
    };
    let memory = read("memory.limit_in_bytes").or_else(|| read("memory.max"));
    assert_eq!(memory.as_deref(), Some("67108864"));
    let cpu = read("cpu.cfs_quota_us").or_else(|| read("cpu.max"));
    assert!(
        cpu.as_deref()
            .is_some_and(|quota| quota.starts_with("50000")),
        "{cpu:?}"
    );
    assert_eq!(read("pids.max").as_deref(), Some("50"));
    runtime.start(&config.task_id).await.unwrap();
    runtime.wait(&config.task_id).await.unwrap();
    let text = output(&runtime, &config).await;
    for fact in [
        "Seccomp:\t2",
        "CapEff:\t0000000000000000",
        "CapBnd:\t00000000a80425fb",
        "127.0.0.1 localhost",
        "nameserver 127.0.0.11",
        "/tmp\n",
        "tmp writable",
        "uid=1234(web) gid=1235(web) groups=1300(more)",
        "can't create /proc/sys/kernel/hostname",
        "/bin/x: Read-only file system",
    ] {
        assert!(text.contains(fact), "{fact} not in:\n{text}");
    }
    assert!(text.contains("mount: permission denied"), "{text}");
    assert!(
        text.contains("unshare: unshare(0x20000): Operation not permitted"),
        "{text}"
    );
    for device in ["sda", "mem", "kmsg", "loop0", "vda"] {
        assert!(
            !text.lines().any(|line| line == device),
            "{device} in:\n{text}"
        );
    }
}

#[tokio::test]
async fn a_container_beyond_its_memory_is_killed_and_says_so() {
    let host = Host::new();
    let runtime = host.runtime();
    let image = host.serve_busybox();
    runtime.pull(&image, None).await.unwrap();
    let mut config = host.container(
        &image,
        &[
            "sh",
            "-c",
            "exec dd if=/dev/zero of=/dev/null bs=200M count=1",
        ],
    );
    config.resources.limits = Some(swarm_proto::v1::Resources {
        nano_cpus: 0,
        memory_bytes: 16 << 20,
    });
    let (exit, text) = run(&runtime, &config).await;
    assert_eq!(
        exit,
        Exit {
            code: 137,
            oom_killed: true
        },
        "{text}"
    );
}

#[tokio::test]
async fn a_missing_program_is_named_when_the_container_is_made() {
    let host = Host::new();
    let runtime = host.runtime();
    let config = host.container(&host.serve_busybox(), &["no-such-program"]);
    runtime.pull(&config.spec.image, None).await.unwrap();
    let err = runtime.create(&config).await.unwrap_err();
    assert!(err.to_string().contains("no-such-program"), "{err}");
    assert_eq!(runtime.list().await.unwrap(), []);
    assert_eq!(host.processes(), Vec::<i32>::new());
    for group in host.cgroups() {
        assert!(!group.join(config.task_id.as_str()).exists());
    }
}

#[tokio::test]
async fn what_cannot_work_is_refused_before_anything_is_made() {
    let host = Host::new();
    let runtime = host.runtime();
    let image = host.serve_busybox();
    runtime.pull(&image, None).await.unwrap();
    let refused = |change: fn(&mut ContainerConfig)| {
        let mut config = host.container(&image, &["true"]);
        change(&mut config);
        config
    };
    let bind = |source: &str, target: &str| swarm_proto::v1::Mount {
        r#type: swarm_proto::v1::MountType::Bind.into(),
        source: source.into(),
        target: target.into(),
        ..Default::default()
    };
    let mut bad_bind = host.container(&image, &["true"]);
    bad_bind.spec.mounts.push(bind("/no/such/place", "/x"));
    let mut climbing = host.container(&image, &["true"]);
    climbing.spec.mounts.push(bind("/tmp", "/x/../../etc"));
    for (config, word) in [
        (bad_bind, "/no/such/place"),
        (climbing, ".."),
        (
            refused(|config| config.spec.capability_add.push("CAP_FLY".into())),
            "CAP_FLY",
        ),
        (
            refused(|config| config.spec.stop_signal = "SIGWHAT".into()),
            "SIGWHAT",
        ),
        (
            refused(|config| config.resources.pids_limit = -1),
            "negative",
        ),
    ] {
        let err = runtime.create(&config).await.unwrap_err();
        assert!(err.is_fatal() && err.to_string().contains(word), "{err}");
    }
    assert_eq!(runtime.list().await.unwrap(), []);
}

#[tokio::test]
async fn a_small_init_reaps_passes_signals_on_and_ends_as_its_child() {
    let host = Host::new();
    let runtime = host.runtime();
    // Process 1 without a handler would ignore TERM; here it must reach the program.
    let script = "(sleep 0 &); trap 'echo asked; exit 9' TERM; echo pid $$; echo ready; while :; do sleep 0.01; done";
    let mut config = host.container(&host.serve_busybox(), &["sh", "-c", script]);
    config.spec.init = true;
    start(&runtime, &config).await;
    until_said(&runtime, &config, "ready").await;
    let (code, text) = exec(
        &runtime,
        &config,
        &["sh", "-c", ": > /proc/1/exe; ls -l /proc/1/fd"],
    )
    .await;
    assert!(text.contains("can't create /proc/1/exe"), "{code} {text}");
    assert!(
        !text.contains("-> /var") && !text.contains("-> /tmp"),
        "{text}"
    );
    assert_eq!(
        runtime
            .stop(&config.task_id, Duration::from_secs(60))
            .await
            .unwrap()
            .code,
        9
    );
    let text = output(&runtime, &config).await;
    assert!(
        text.contains("asked") && !text.contains("pid 1\n"),
        "{text}"
    );
}

// The session kills on another thread while this one looks.
#[tokio::test(flavor = "multi_thread")]
async fn an_exec_whose_shim_is_killed_ends_with_its_process() {
    let host = Host::new();
    let runtime = host.runtime();
    let (config, first) = start_script(&host, &runtime, "echo ready; sleep 1000").await;
    let command = ["sh", "-c", "sleep 31415 & echo here; wait"].map(str::to_owned);
    let start = ExecConfig {
        command: command.to_vec(),
        ..ExecConfig::default()
    };
    let mut session = runtime.exec(&config.task_id, start).await.unwrap();
    let here = session.output.recv().await;
    assert_eq!(here, Some(ExecOutput::Stdout("here\n".into())));
    let named = |words: [&str; 2]| -> Vec<i32> {
        let entries = std::fs::read_dir("/proc").unwrap().flatten();
        let pids = entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
        pids.filter(|pid| {
            let line = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            let line = String::from_utf8_lossy(&line);
            words.iter().all(|word| line.contains(word))
        })
        .collect()
    };
    let shims = named(["exec-shim-sealed", config.task_id.as_str()]);
    assert_eq!(shims.len(), 1, "{shims:?}");
    nix::sys::signal::kill(
        nix::unistd::Pid::from_raw(shims[0]),
        nix::sys::signal::Signal::SIGKILL,
    )
    .unwrap();
    let sentence = "exec ended: the process that looks after it is gone\n";
    let said = session.output.recv().await;
    assert_eq!(said, Some(ExecOutput::Stderr(sentence.into())));
    assert_eq!(session.output.recv().await, Some(ExecOutput::Exit(255)));
    let left = ["sh", "-c", "ps | grep -c '[s]leep 31415'; true"];
    eventually("what it started has ended", || {
        named(["sleep", "31415"]).is_empty()
    });
    assert_eq!(exec(&runtime, &config, &left).await, (0, "0\n".to_owned()));
    assert!(is_alive(first));
}

async fn exec_with(
    runtime: &OciRuntime,
    config: &ContainerConfig,
    exec: ExecConfig,
    input: &[u8],
) -> (i32, String) {
    let mut session = runtime.exec(&config.task_id, exec).await.unwrap();
    if !input.is_empty() {
        session
            .input
            .send(ExecInput::Stdin(input.to_vec().into()))
            .await
            .unwrap();
        session.input.send(ExecInput::Close).await.unwrap();
    }
    let mut text = String::new();
    while let Some(output) = session.output.recv().await {
        match output {
            ExecOutput::Stdout(data) | ExecOutput::Stderr(data) => {
                text.push_str(&String::from_utf8_lossy(&data));
            }
            ExecOutput::Exit(code) => return (code, text),
        }
    }
    panic!("no exit code after: {text}");
}

async fn exec(runtime: &OciRuntime, config: &ContainerConfig, command: &[&str]) -> (i32, String) {
    let command = command.iter().map(|&word| word.to_owned()).collect();
    exec_with(
        runtime,
        config,
        ExecConfig {
            command,
            ..ExecConfig::default()
        },
        b"",
    )
    .await
}

#[tokio::test]
async fn exec_runs_inside_with_input_code_user_and_confinement() {
    let host = Host::new();
    let runtime = host.runtime();
    let (config, _) = start_script(&host, &runtime, "echo ready; sleep 1000").await;
    assert_eq!(
        exec(&runtime, &config, &["sh", "-c", "echo hi; exit 42"]).await,
        (42, "hi\n".into())
    );
    assert_eq!(
        exec(&runtime, &config, &["sh", "-c", "kill -9 $$"]).await.0,
        137
    );
    let (code, text) = exec(&runtime, &config, &["no-such-program"]).await;
    assert_eq!(code, 127, "{text}");
    assert!(text.contains("no-such-program"), "{text}");
    let cat = ExecConfig {
        command: vec!["cat".into()],
        ..ExecConfig::default()
    };
    let long = "0123456789abcdef".repeat(64 << 10);
    let (code, text) = exec_with(&runtime, &config, cat, long.as_bytes()).await;
    assert!(code == 0 && text == long, "{code} {}", text.len());
    let (_, text) = exec(
        &runtime,
        &config,
        &[
            "sh",
            "-c",
            "grep -E 'Seccomp:|CapEff' /proc/self/status; unshare -m true; echo $$",
        ],
    )
    .await;
    for fact in ["Seccomp:\t2", "CapEff:\t00000000a80425fb", "not permitted"] {
        assert!(text.contains(fact), "{text}");
    }
    let as_web = ExecConfig {
        command: [
            "sh",
            "-c",
            "id; pwd; echo $HOME $MORE; grep CapEff /proc/self/status",
        ]
        .map(String::from)
        .to_vec(),
        user: "web".into(),
        dir: "/etc".into(),
        env: vec!["MORE=yes".into()],
        tty: None,
    };
    let (code, text) = exec_with(&runtime, &config, as_web, b"").await;
    let expected = "uid=1234(web) gid=1235(web) groups=1300(more)\n/etc\n/tmp yes\nCapEff:\t0000000000000000\n";
    assert_eq!((code, text.as_str()), (0, expected));
    runtime.stop(&config.task_id, Duration::ZERO).await.unwrap();
    let late = ExecConfig {
        command: vec!["true".into()],
        ..ExecConfig::default()
    };
    assert!(runtime.exec(&config.task_id, late).await.is_err());
}

#[tokio::test]
async fn exec_with_a_terminal_has_its_size_and_follows_it() {
    let host = Host::new();
    let runtime = host.runtime();
    let (config, _) = start_script(&host, &runtime, "echo ready; sleep 1000").await;
    let mut session = runtime
        .exec(
            &config.task_id,
            ExecConfig {
                command: [
                    "sh",
                    "-c",
                    "stty size; read line; stty size; test -t 0 && exit 11",
                ]
                .map(String::from)
                .to_vec(),
                tty: Some((24, 81)),
                ..ExecConfig::default()
            },
        )
        .await
        .unwrap();
    let mut text = String::new();
    let mut resized = false;
    let code = loop {
        match session.output.recv().await.unwrap() {
            ExecOutput::Stdout(data) | ExecOutput::Stderr(data) => {
                text.push_str(&String::from_utf8_lossy(&data));
            }
            ExecOutput::Exit(code) => break code,
        }
        if text.contains("24 81") && !resized {
            resized = true;
            session
                .input
                .send(ExecInput::Resize(50, 132))
                .await
                .unwrap();
            session
                .input
                .send(ExecInput::Stdin("\n".into()))
                .await
                .unwrap();
        }
    };
    assert_eq!(code, 11, "{text}");
    assert!(text.contains("50 132"), "{text}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn nothing_of_an_exec_is_left_when_its_client_goes_away() {
    let host = Host::new();
    let runtime = host.runtime();
    let (config, _) = start_script(&host, &runtime, "echo ready; sleep 1000").await;
    let count = || {
        let task = config.task_id.as_str();
        let group = host
            .cgroups()
            .into_iter()
            .find(|group| group.join(task).exists())
            .unwrap();
        std::fs::read_to_string(group.join(task).join("cgroup.procs"))
            .unwrap()
            .lines()
            .count()
    };
    let before = count();
    let command = ["sh", "-c", "echo on; sleep 2000 & sleep 3000"]
        .map(String::from)
        .to_vec();
    let mut session = runtime
        .exec(
            &config.task_id,
            ExecConfig {
                command,
                ..ExecConfig::default()
            },
        )
        .await
        .unwrap();
    assert_eq!(
        session.output.recv().await,
        Some(ExecOutput::Stdout("on\n".into()))
    );
    drop(session);
    eventually("only the container's own processes are left", || {
        count() == before
    });
    let run = host.config.run.join(config.task_id.as_str());
    let scratch = std::fs::read_dir(run).unwrap().filter(|entry| {
        entry
            .as_ref()
            .unwrap()
            .file_name()
            .to_string_lossy()
            .starts_with("exec-")
    });
    assert_eq!(scratch.count(), 0);
}

#[tokio::test]
async fn logs_rotate_within_their_bounds_and_can_be_followed_across() {
    let mut host = Host::new();
    host.config.log.max_bytes = 64 << 10;
    host.config.log.max_files = 3;
    let runtime = host.runtime();
    let script = "trap 'go=1' USR1; echo ready; while [ -z \"$go\" ]; do sleep 0.01; done; seq 1 20000; echo end >&2";
    let mut config = host.container(&host.serve_busybox(), &["sh", "-c", script]);
    config.spec.stop_signal = "USR1".into();
    start(&runtime, &config).await;
    let options = LogOptions {
        follow: true,
        ..LogOptions::default()
    };
    let mut lines = runtime.logs(&config.task_id, options).await.unwrap();
    assert_eq!(lines.next().await.unwrap().unwrap().data, "ready\n");
    runtime
        .stop(&config.task_id, Duration::from_secs(60))
        .await
        .unwrap();
    let mut last = (0, false);
    while let Some(line) = lines.next().await {
        let line = line.unwrap();
        match std::str::from_utf8(&line.data)
            .unwrap()
            .trim()
            .parse::<u64>()
        {
            Ok(number) => {
                assert!(number > last.0, "{number} after {}", last.0);
                last.0 = number;
            }
            Err(_) => last.1 = line.stderr,
        }
    }
    assert_eq!(last, (20000, true));
    let log = host
        .config
        .root
        .join("containers")
        .join(config.task_id.as_str())
        .join("log");
    let sizes: Vec<u64> = std::fs::read_dir(log)
        .unwrap()
        .map(|file| file.unwrap().metadata().unwrap().len())
        .collect();
    assert_eq!(sizes.len(), 3);
    assert!(
        sizes.iter().all(|size| *size < (64 << 10) + (2 << 20)),
        "{sizes:?}"
    );
    let tail = LogOptions {
        tail: Some(3),
        ..LogOptions::default()
    };
    let lines: Vec<_> = runtime
        .logs(&config.task_id, tail)
        .await
        .unwrap()
        .collect()
        .await;
    assert_eq!(lines.len(), 3);
    let future = LogOptions {
        since_nanos: Some(i128::MAX),
        ..LogOptions::default()
    };
    assert_eq!(
        runtime
            .logs(&config.task_id, future)
            .await
            .unwrap()
            .count()
            .await,
        0
    );
}

#[tokio::test]
async fn a_container_with_a_terminal_logs_what_it_shows() {
    let host = Host::new();
    let runtime = host.runtime();
    let mut config = host.container(
        &host.serve_busybox(),
        &["sh", "-c", "test -t 1 && echo tty $TERM; exit 6"],
    );
    config.spec.tty = true;
    runtime.pull(&config.spec.image, None).await.unwrap();
    let (exit, text) = run(&runtime, &config).await;
    assert_eq!((exit.code, text.as_str()), (6, "tty xterm\r\n"));
}

#[tokio::test]
async fn another_oci_runtime_runs_the_same_bundles() {
    let program = "/usr/sbin/runc";
    assert!(
        std::path::Path::new(program).exists(),
        "apt-get install runc"
    );
    let mut host = Host::new();
    host.config.oci_runtime = swarm_agent::runtime::OciEngine::Path(program.into());
    let runtime = host.runtime();
    let (config, pid) = start_script(
        &host,
        &runtime,
        "trap 'exit 5' TERM; echo ready; while :; do sleep 0.01; done",
    )
    .await;
    let (code, text) = exec(
        &runtime,
        &config,
        &["sh", "-c", "grep Seccomp: /proc/self/status; exit 4"],
    )
    .await;
    assert_eq!((code, text.as_str()), (4, "Seccomp:\t2\n"), "{program}");
    assert_eq!(
        runtime
            .stop(&config.task_id, Duration::from_secs(60))
            .await
            .unwrap()
            .code,
        5
    );
    assert!(!is_alive(pid));
    let missing = host.container(&config.spec.image, &["no-such-program"]);
    let err = match runtime.create(&missing).await {
        Ok(()) => runtime.start(&missing.task_id).await.unwrap_err(),
        Err(err) => err,
    };
    assert!(err.to_string().contains("no-such-program"), "{err}");
    runtime.remove(&config.task_id).await.unwrap();
    runtime.remove(&missing.task_id).await.unwrap();
    assert_eq!(runtime.list().await.unwrap(), []);
}
