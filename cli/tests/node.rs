//! The binary against a daemon that is a worker: it serves NodeLocal and no Control API.

use std::path::Path;
use std::pin::Pin;
use std::process::Stdio;
use std::task::{Context, Poll};

use swarm_proto::v1::node_local_server::{NodeLocal, NodeLocalServer};
use swarm_proto::v1::{
    ExecRequest, ExecResponse, InfoRequest, InfoResponse, InitRequest, InitResponse,
    JoinClusterRequest, JoinClusterResponse, LeaveClusterRequest, LeaveClusterResponse,
    ListLocalNetworksRequest, ListLocalNetworksResponse, LocalNetwork, LocalState, LogsRequest,
    LogsResponse, NodeRole, ResolveImageRequest, ResolveImageResponse, exec_request, exec_response,
};
use tokio::io::AsyncWriteExt as _;
use tokio::net::UnixListener;
use tokio::process::Command;
use tokio_stream::Stream;
use tokio_stream::iter;
use tokio_stream::wrappers::UnixListenerStream;
use tonic::body::Body;
use tonic::transport::Server;
use tonic::{Request, Response, Status, Streaming};
use tower::Service;

const NETWORK: &str = "abcdefghijklmnopqrstuvwxy";

/// What swarmd says on a worker's local socket to everything but NodeLocal.
const REFUSAL: &str = "This node is not a swarm manager. Worker nodes can't be used to view or modify cluster state. Please run this command on a manager node or promote the current node to a manager.";

/// Refuses the managers' services.
#[derive(Clone)]
struct Refusing<S>(S);

impl<S> Service<http::Request<Body>> for Refusing<S>
where
    S: Service<http::Request<Body>, Response = http::Response<Body>>,
    S::Future: Send + 'static,
{
    type Response = S::Response;
    type Error = S::Error;
    type Future = Pin<Box<dyn Future<Output = Result<S::Response, S::Error>> + Send>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.0.poll_ready(cx)
    }

    fn call(&mut self, request: http::Request<Body>) -> Self::Future {
        if request.uri().path().starts_with("/swarm.v1.NodeLocal/") {
            return Box::pin(self.0.call(request));
        }
        Box::pin(async { Ok(Status::unavailable(REFUSAL).into_http()) })
    }
}

struct Worker;

type Answers<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

#[tonic::async_trait]
impl NodeLocal for Worker {
    async fn init(&self, _: Request<InitRequest>) -> Result<Response<InitResponse>, Status> {
        Err(Status::failed_precondition(
            "This node is already part of a swarm. Use \"swarm leave\" to leave this swarm and join another one.",
        ))
    }

    async fn join(
        &self,
        request: Request<JoinClusterRequest>,
    ) -> Result<Response<JoinClusterResponse>, Status> {
        assert_eq!(request.get_ref().remotes, ["10.0.0.1:2377"]);
        Ok(Response::new(JoinClusterResponse {
            node_id: "n1".to_owned(),
            role: NodeRole::Worker.into(),
        }))
    }

    async fn leave(
        &self,
        _: Request<LeaveClusterRequest>,
    ) -> Result<Response<LeaveClusterResponse>, Status> {
        Ok(Response::new(LeaveClusterResponse {}))
    }

    async fn info(&self, _: Request<InfoRequest>) -> Result<Response<InfoResponse>, Status> {
        Ok(Response::new(InfoResponse {
            state: LocalState::Active.into(),
            node_id: "n1".to_owned(),
            role: NodeRole::Worker.into(),
            ..InfoResponse::default()
        }))
    }

    async fn list_local_networks(
        &self,
        _: Request<ListLocalNetworksRequest>,
    ) -> Result<Response<ListLocalNetworksResponse>, Status> {
        let network = |id: &str, name: &str, driver: &str, scope: &str| LocalNetwork {
            id: id.to_owned(),
            name: name.to_owned(),
            driver: driver.to_owned(),
            scope: scope.to_owned(),
            ..LocalNetwork::default()
        };
        Ok(Response::new(ListLocalNetworksResponse {
            networks: vec![
                network(&"f".repeat(64), "swarm_gwbridge", "bridge", "local"),
                network(NETWORK, "my-net", "overlay", "swarm"),
            ],
        }))
    }

    async fn resolve_image(
        &self,
        _: Request<ResolveImageRequest>,
    ) -> Result<Response<ResolveImageResponse>, Status> {
        Err(Status::unavailable("no registry"))
    }

    type ExecStream = Answers<ExecResponse>;

    /// Echoes its input, then ends with 7.
    async fn exec(
        &self,
        request: Request<Streaming<ExecRequest>>,
    ) -> Result<Response<Self::ExecStream>, Status> {
        let mut input = request.into_inner();
        let Some(exec_request::Message::Start(start)) =
            input.message().await?.and_then(|first| first.message)
        else {
            return Err(Status::invalid_argument("no start"));
        };
        if start.task != "web.1" {
            return Err(Status::not_found(format!("task {} not found", start.task)));
        }
        let answer = |message| {
            Ok(ExecResponse {
                message: Some(message),
            })
        };
        let mut answers = vec![answer(exec_response::Message::Stderr(
            format!("{:?}", start.command).into(),
        ))];
        while let Some(next) = input.message().await? {
            match next.message {
                Some(exec_request::Message::Stdin(bytes)) => {
                    answers.push(answer(exec_response::Message::Stdout(bytes)));
                }
                Some(exec_request::Message::StdinClosed(_)) => break,
                _ => {}
            }
        }
        answers.push(answer(exec_response::Message::ExitCode(7)));
        Ok(Response::new(Box::pin(iter(answers))))
    }

    type LogsStream = Answers<LogsResponse>;

    async fn logs(
        &self,
        request: Request<LogsRequest>,
    ) -> Result<Response<Self::LogsStream>, Status> {
        let line = |text: &str, stderr| {
            Ok(LogsResponse {
                stderr,
                data: text.to_owned().into(),
                ..LogsResponse::default()
            })
        };
        let tail = request.get_ref().tail;
        let first = format!("tail {tail:?}\n");
        Ok(Response::new(Box::pin(iter(vec![
            line(&first, false),
            line("oops\n", true),
        ]))))
    }
}

struct Ran {
    code: Option<i32>,
    out: String,
    err: String,
}

async fn swarm(socket: &Path, args: &[&str], input: &str) -> Ran {
    let mut child = Command::new(env!("CARGO_BIN_EXE_swarm"))
        .args(args)
        .env("SWARM_SOCKET", socket)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut stdin = child.stdin.take().unwrap();
    // A command that does not read its input may have ended already.
    let _ = stdin.write_all(input.as_bytes()).await;
    drop(stdin);
    let output = child.wait_with_output().await.unwrap();
    Ran {
        code: output.status.code(),
        out: String::from_utf8_lossy(&output.stdout).into_owned(),
        err: String::from_utf8_lossy(&output.stderr).into_owned(),
    }
}

#[tokio::test]
async fn a_daemon_that_does_not_run_is_named() {
    let socket = Path::new("/nonexistent/swarm.sock");
    let ran = swarm(socket, &["service", "ls"], "").await;
    assert_eq!(ran.code, Some(1));
    assert_eq!(
        ran.err,
        "Cannot connect to the swarm daemon at unix:///nonexistent/swarm.sock. Is swarmd running?\n"
    );
    let ran = swarm(socket, &["--version"], "").await;
    assert_eq!(ran.code, Some(0));
    assert!(ran.out.starts_with("swarm "));
    let ran = swarm(socket, &["service", "create", "--nonsense", "nginx"], "").await;
    assert_eq!(ran.code, Some(1));
    assert!(ran.err.contains("--nonsense") && ran.err.contains("Usage:"));
}

#[tokio::test]
async fn a_worker_answers_for_itself_and_not_for_the_cluster() {
    let directory = tempfile::tempdir().unwrap();
    let socket = directory.path().join("swarm.sock");
    let incoming = UnixListenerStream::new(UnixListener::bind(&socket).unwrap());
    let serve = Server::builder()
        .layer(tower::layer::layer_fn(Refusing))
        .add_service(NodeLocalServer::new(Worker))
        .serve_with_incoming(incoming);
    let server = tokio::spawn(serve);
    let run = async |args: &[&str]| swarm(&socket, args, "").await;

    for args in [
        &["service", "ls"][..],
        &["node", "ls"],
        &["service", "scale", "web=2"],
        &["service", "rm", "web"],
        &["network", "rm", "n"],
    ] {
        let ran = run(args).await;
        assert_eq!(ran.code, Some(1));
        assert_eq!(
            ran.err,
            format!("Error response from daemon: {REFUSAL}\n"),
            "{args:?}"
        );
    }

    let ran = run(&["network", "ls"]).await;
    assert_eq!(
        ran.out,
        "NETWORK ID     NAME             DRIVER    SCOPE\n\
         abcdefghijkl   my-net           overlay   swarm\n\
         ffffffffffff   swarm_gwbridge   bridge    local\n"
    );
    let ran = run(&["network", "ls", "--no-trunc", "-q", "-f", "scope=swarm"]).await;
    assert_eq!(ran.out, format!("{NETWORK}\n"));
    let ran = run(&["network", "ls", "-f", "bad=1"]).await;
    assert_eq!(
        (ran.code, ran.err.as_str()),
        (
            Some(1),
            "Error response from daemon: invalid filter 'bad'\n"
        )
    );
    let ran = run(&["network", "inspect", "-f", "{{.Id}}", "abc"]).await;
    assert_eq!(ran.out, format!("{NETWORK}\n"));
    let ran = run(&["network", "inspect", "nope"]).await;
    assert_eq!((ran.code, ran.out.as_str()), (Some(1), "[]\n"));
    assert_eq!(
        ran.err,
        "Error response from daemon: network nope not found\n"
    );

    let ran = run(&["join", "--token", "t", "10.0.0.1"]).await;
    assert_eq!(ran.out, "This node joined a swarm as a worker.\n");
    assert_eq!(run(&["leave"]).await.out, "Node left the swarm.\n");
    let ran = run(&["init"]).await;
    assert!(
        ran.err
            .starts_with("Error response from daemon: This node is already part of a swarm.")
    );

    let ran = swarm(
        &socket,
        &["exec", "-i", "web.1", "cat", "-n", "--tty"],
        "hello",
    )
    .await;
    assert_eq!((ran.code, ran.out.as_str()), (Some(7), "hello"));
    assert_eq!(ran.err, "[\"cat\", \"-n\", \"--tty\"]");
    let ran = run(&["exec", "web.7", "true"]).await;
    assert_eq!(ran.code, Some(1));
    assert_eq!(
        ran.err,
        "Error response from daemon: task web.7 not found\n"
    );

    let ran = run(&["logs", "--tail", "5", "web.1"]).await;
    assert_eq!(
        (ran.out.as_str(), ran.err.as_str()),
        ("tail Some(5)\n", "oops\n")
    );
    server.abort();
}
