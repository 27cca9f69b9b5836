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
