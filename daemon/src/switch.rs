//! What the local socket serves: always the node's own services, and the
//! managers' while this node is one. Otherwise a sentence that says what to do.

use std::convert::Infallible;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use arc_swap::{ArcSwap, ArcSwapOption};
use tonic::Status;
use tonic::body::Body;
use tonic::codegen::Service;
use tonic::codegen::http::{Request, Response};
use tonic::service::Routes;

/// Why the managers' services are not served now.
pub const NOT_IN_A_SWARM: &str = "This node is not a swarm manager. Use \"swarm init\" or \"swarm join\" to connect this node to swarm and try again.";
/// On a worker.
pub const WORKER: &str = "This node is not a swarm manager. Worker nodes can't be used to view or modify cluster state. Please run this command on a manager node or promote the current node to a manager.";
/// On a manager that is not there yet.
pub const PREPARING: &str = "This node is not a swarm manager. Manager is being prepared or has trouble connecting to the cluster.";

/// The managers' services, or why there are none. Shared with the node that starts and stops them.
#[derive(Clone, Default)]
pub struct ManagerSlot {
    routes: Arc<ArcSwapOption<Routes>>,
    refusal: Arc<ArcSwap<&'static str>>,
}

impl ManagerSlot {
    /// Nothing is served; callers get `refusal`.
    pub fn close(&self, refusal: &'static str) {
        self.refusal.store(Arc::new(refusal));
        self.routes.store(None);
    }

    /// From now on these are served.
    pub fn open(&self, routes: Routes) {
        self.routes.store(Some(Arc::new(routes)));
    }

    /// Whether something is served.
    #[must_use]
    pub fn is_open(&self) -> bool {
        self.routes.load().is_some()
    }
}

/// Sends each request to the node's own services or to the managers'.
#[derive(Clone)]
pub struct Switch {
    own: Routes,
    own_prefixes: &'static [&'static str],
    manager: ManagerSlot,
}

impl Switch {
    /// `own_prefixes` are the paths ("/swarm.v1.NodeLocal/") that `own` serves.
    #[must_use]
    pub fn new(own: Routes, own_prefixes: &'static [&'static str], manager: ManagerSlot) -> Self {
        Self {
            own,
            own_prefixes,
            manager,
        }
    }
}

impl Service<Request<Body>> for Switch {
    type Response = Response<Body>;
    type Error = Infallible;
    type Future = Pin<Box<dyn Future<Output = Result<Response<Body>, Infallible>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        let path = request.uri().path();
        let mut routes = if self.own_prefixes.iter().any(|p| path.starts_with(p)) {
            self.own.clone()
        } else if let Some(routes) = self.manager.routes.load_full() {
            (*routes).clone()
        } else {
            let refusal = **self.manager.refusal.load();
            return Box::pin(async move { Ok(Status::unavailable(refusal).into_http()) });
        };
        // Routes are always ready.
        Box::pin(async move { Service::call(&mut routes, request).await })
    }
}
