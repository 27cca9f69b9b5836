//! The `NodeLocal` service: one node about itself, on the local socket.
//!
//! Translates between the wire and [`Node`]; decides nothing.

use std::pin::Pin;
use std::sync::Arc;

use futures::{Stream, StreamExt as _};
use swarm_agent::runtime::{ExecConfig, ExecInput, ExecOutput, LogLine, LogOptions, RuntimeError};
use swarm_proto::v1::node_local_server::NodeLocal;
use swarm_proto::v1::{
    ExecRequest, ExecResponse, ExecStart, InfoRequest, InfoResponse, InitRequest, InitResponse,
    JoinClusterRequest, JoinClusterResponse, LeaveClusterRequest, LeaveClusterResponse,
    ListLocalNetworksRequest, ListLocalNetworksResponse, LogsRequest, LogsResponse,
    ResolveImageRequest, ResolveImageResponse, exec_request, exec_response,
};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};

use crate::node::Node;

/// Pieces of an exec's output that may wait for a slow client.
const EXEC_QUEUE: usize = 64;

/// Answers for one node.
pub struct LocalService {
    node: Arc<Node>,
}

impl LocalService {
    /// For this node.
    #[must_use]
    pub fn new(node: Arc<Node>) -> Self {
        Self { node }
    }
}

type ResponseStream<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

#[tonic::async_trait]
impl NodeLocal for LocalService {
    async fn init(&self, request: Request<InitRequest>) -> Result<Response<InitResponse>, Status> {
        let node = Arc::clone(&self.node);
        let request = request.into_inner();
        // A client that goes away must not leave half a cluster.
        finish(async move { node.init(request).await }).await
    }

    async fn join(
        &self,
        request: Request<JoinClusterRequest>,
    ) -> Result<Response<JoinClusterResponse>, Status> {
        let node = Arc::clone(&self.node);
        let request = request.into_inner();
        finish(async move { node.join(request).await }).await
    }

    async fn leave(
        &self,
        request: Request<LeaveClusterRequest>,
    ) -> Result<Response<LeaveClusterResponse>, Status> {
        let node = Arc::clone(&self.node);
        let force = request.into_inner().force;
        finish(async move { node.leave(force).await }).await
    }

    async fn info(&self, _: Request<InfoRequest>) -> Result<Response<InfoResponse>, Status> {
        Ok(Response::new(self.node.info()))
    }

    async fn list_local_networks(
        &self,
        _: Request<ListLocalNetworksRequest>,
    ) -> Result<Response<ListLocalNetworksResponse>, Status> {
        Ok(Response::new(ListLocalNetworksResponse {
            networks: self.node.local_networks().await,
        }))
    }

    async fn resolve_image(
        &self,
        request: Request<ResolveImageRequest>,
    ) -> Result<Response<ResolveImageResponse>, Status> {
        let request = request.into_inner();
        let (image, platforms) = self
            .node
            .resolve_image(&request.image, request.auth.as_ref())
            .await
            .map_err(|error| runtime_status(&error))?;
        Ok(Response::new(ResolveImageResponse { image, platforms }))
    }

    type ExecStream = ResponseStream<ExecResponse>;

    async fn exec(
        &self,
        request: Request<Streaming<ExecRequest>>,
    ) -> Result<Response<Self::ExecStream>, Status> {
        let mut requests = request.into_inner();
        let Some(exec_request::Message::Start(start)) =
            requests.message().await?.and_then(|first| first.message)
        else {
            return Err(Status::invalid_argument(
                "the first message of an exec says what to start",
            ));
        };
        let task = start.task.clone();
        let mut session = self.node.exec(&task, exec_config(start)?).await?;
        let (sender, responses) = mpsc::channel(EXEC_QUEUE);
        // Ends with the process or with the client; dropping the session ends the process.
        tokio::spawn(async move {
            let mut requests = Some(requests);
            loop {
                tokio::select! {
                    request = next_request(&mut requests) => {
                        let input = match request {
                            Some(exec_request::Message::Stdin(data)) => ExecInput::Stdin(data),
                            Some(exec_request::Message::StdinClosed(_)) => ExecInput::Close,
                            Some(exec_request::Message::Resize(size)) => {
                                let (rows, columns) = terminal_size(size.rows, size.columns);
                                ExecInput::Resize(rows, columns)
                            }
                            Some(exec_request::Message::Start(_)) | None => continue,
                        };
                        // The process may have ended: its output says so.
                        let _ = session.input.send(input).await;
                    }
                    output = session.output.recv() => {
                        let (message, last) = match output {
                            Some(ExecOutput::Stdout(data)) => (exec_response::Message::Stdout(data), false),
                            Some(ExecOutput::Stderr(data)) => (exec_response::Message::Stderr(data), false),
                            Some(ExecOutput::Exit(code)) => (exec_response::Message::ExitCode(code), true),
                            None => return,
                        };
                        if sender.send(Ok(ExecResponse { message: Some(message) })).await.is_err() || last {
                            return;
                        }
                    }
                    () = sender.closed() => return,
                }
            }
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(responses))))
    }

    type LogsStream = ResponseStream<LogsResponse>;

    async fn logs(
        &self,
        request: Request<LogsRequest>,
    ) -> Result<Response<Self::LogsStream>, Status> {
        let request = request.into_inner();
        let options = LogOptions {
            follow: request.follow,
            tail: request.tail,
            since_nanos: request
                .since
                .map(|time| i128::from(time.seconds) * 1_000_000_000 + i128::from(time.nanos)),
        };
        let lines = self.node.logs(&request.task, options).await?;
        Ok(Response::new(Box::pin(lines.map(|line| {
            line.map(log_response)
                .map_err(|error| runtime_status(&error))
        }))))
    }
}

/// The client's next message; pends for ever once the client has said its last.
async fn next_request(
    requests: &mut Option<Streaming<ExecRequest>>,
) -> Option<exec_request::Message> {
    let Some(stream) = requests else {
        return std::future::pending().await;
    };
    match stream.message().await {
        Ok(Some(request)) => request.message,
        Ok(None) | Err(_) => {
            *requests = None;
            Some(exec_request::Message::StdinClosed(true))
        }
    }
}

/// Runs to the end whatever becomes of the caller.
async fn finish<T: Send + 'static>(
    work: impl Future<Output = Result<T, Status>> + Send + 'static,
) -> Result<Response<T>, Status> {
    tokio::spawn(work)
        .await
        .map_err(|error| Status::internal(format!("ended abnormally: {error}")))?
        .map(Response::new)
}

fn exec_config(start: ExecStart) -> Result<ExecConfig, Status> {
    if start.command.is_empty() {
        return Err(Status::invalid_argument("no command to run was given"));
    }
    let tty = start.tty.then(|| {
        let size = start.size.unwrap_or_default();
        terminal_size(size.rows, size.columns)
    });
    Ok(ExecConfig {
        command: start.command,
        env: start.env,
        user: start.user,
        dir: start.dir,
        tty,
    })
}

/// What a terminal can be; 0 means "unknown" and becomes 24 × 80.
fn terminal_size(rows: u32, columns: u32) -> (u16, u16) {
    let clamp = |value: u32, unknown: u16| match u16::try_from(value) {
        Ok(0) => unknown,
        Ok(value) => value,
        Err(_) => u16::MAX,
    };
    (clamp(rows, 24), clamp(columns, 80))
}

fn log_response(line: LogLine) -> LogsResponse {
    let nanos = line.time_nanos;
    LogsResponse {
        stderr: line.stderr,
        timestamp: Some(prost_types::Timestamp {
            seconds: i64::try_from(nanos.div_euclid(1_000_000_000)).unwrap_or_default(),
            nanos: i32::try_from(nanos.rem_euclid(1_000_000_000)).unwrap_or_default(),
        }),
        data: line.data,
    }
}

/// A runtime's error as gRPC says it.
pub fn runtime_status(error: &RuntimeError) -> Status {
    let text = error.to_string();
    match error {
        RuntimeError::NoSuchImage { .. } | RuntimeError::NotFound(_) => Status::not_found(text),
        RuntimeError::InvalidConfig(_) => Status::invalid_argument(text),
        RuntimeError::Pull { .. } => Status::unavailable(text),
        RuntimeError::Failed { .. } => Status::internal(text),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_terminal_has_a_size_that_fits() {
        assert_eq!(terminal_size(0, 0), (24, 80));
        assert_eq!(terminal_size(50, 1 << 20), (50, u16::MAX));
    }

    #[test]
    fn an_exec_without_a_command_is_refused() {
        assert!(exec_config(ExecStart::default()).is_err());
    }
}
