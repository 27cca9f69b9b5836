//! Real connections on the loopback: handshakes, joining, renewal, refusals.

use std::io::ErrorKind;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::{Duration, SystemTime};

use rustls::client::WantsClientCert;
use rustls::{ClientConfig, ConfigBuilder};
use swarm_proto::v1::ca_client::CaClient;
use swarm_proto::v1::ca_server::{Ca, CaServer};
use swarm_proto::v1::control_client::ControlClient;
use swarm_proto::v1::liveness_client::LivenessClient;
use swarm_proto::v1::liveness_server::{Liveness, LivenessServer};
use swarm_proto::v1::{
    GetRootCaRequest, GetRootCaResponse, IssueCertificateRequest, IssueCertificateResponse,
    ListNodesRequest, LivenessAck, LivenessReport, NodeAvailability, NodeRole,
};
use tokio::io::AsyncReadExt as _;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;
use tonic::{Code, Request, Response, Status};

use super::*;
use crate::identity::{CALLS, client_builder, connect_lazy, finish_client, root_store};

/// A CA that makes every caller a manager "n2", and counts how often it is asked.
#[derive(Clone)]
struct TestCa {
    root: Arc<RootCa>,
    asked: Arc<AtomicUsize>,
    /// By how many seconds its clock is behind.
    behind: Arc<AtomicU64>,
}

#[tonic::async_trait]
impl Ca for TestCa {
    async fn get_root_ca(
        &self,
        _: Request<GetRootCaRequest>,
    ) -> Result<Response<GetRootCaResponse>, Status> {
        Ok(Response::new(GetRootCaResponse {
            cert_pem: self.root.cert_pem().to_owned().into(),
        }))
    }

    async fn issue_certificate(
        &self,
        request: Request<IssueCertificateRequest>,
    ) -> Result<Response<IssueCertificateResponse>, Status> {
        self.asked.fetch_add(1, Ordering::SeqCst);
        let subject = PeerIdentity {
            node_id: "n2".into(),
            role: NodeRole::Manager,
            cluster_id: "c1".into(),
        };
        let day = Duration::from_secs(24 * 3600);
        let behind = Duration::from_secs(self.behind.load(Ordering::SeqCst));
        let now = SystemTime::now() - behind;
        let chain = self
            .root
            .sign(&request.get_ref().csr_pem, &subject, day, now)
            .map_err(|error| Status::invalid_argument(error.to_string()))?;
        Ok(Response::new(IssueCertificateResponse {
            cert_chain_pem: chain.into(),
            node_id: "n2".to_owned(),
            role: NodeRole::Manager.into(),
        }))
    }
}

/// Answers whoever the layer lets through.
#[derive(Clone)]
struct TestLiveness;

#[tonic::async_trait]
impl Liveness for TestLiveness {
    async fn report(
        &self,
        request: Request<LivenessReport>,
    ) -> Result<Response<LivenessAck>, Status> {
        assert!(Caller::of(&request).peer().is_some());
        assert!(remote_addr(&request).is_some());
        Ok(Response::new(LivenessAck {}))
    }
}

struct Manager {
    root: Arc<RootCa>,
    addr: String,
    asked: Arc<AtomicUsize>,
    behind: Arc<AtomicU64>,
    _server: AbortOnDropHandle<()>,
}

async fn manager_with(limits: Limits, layer: AuthorizeLayer, role: NodeRole) -> Manager {
    let root = Arc::new(RootCa::create(SystemTime::now()).unwrap());
    let identity = Identity::new(testing::material(&root, "n1", role)).unwrap();
    let listener = Listener::bind("127.0.0.1:0", identity)
        .await
        .unwrap()
        .with_limits(limits);
    let addr = listener.local_addr().unwrap().to_string();
    let asked = Arc::new(AtomicUsize::new(0));
    let behind = Arc::new(AtomicU64::new(0));
    let ca = TestCa {
        root: Arc::clone(&root),
        asked: Arc::clone(&asked),
        behind: Arc::clone(&behind),
    };
    let serve = grpc_server()
        .layer(layer)
        .add_service(CaServer::new(ca))
        .add_service(LivenessServer::new(TestLiveness))
        .serve_with_incoming(listener.incoming());
    let server = AbortOnDropHandle::new(tokio::spawn(async move { serve.await.unwrap() }));
    Manager {
        root,
        addr,
        asked,
        behind,
        _server: server,
    }
}

async fn manager() -> Manager {
    manager_with(Limits::default(), AuthorizeLayer::new(), NodeRole::Manager).await
}

fn identity(root: &RootCa, node: &str, role: NodeRole) -> Arc<Identity> {
    Identity::new(testing::material(root, node, role)).unwrap()
}

/// A client that accepts managers of this root.
fn client_of(root: &RootCa) -> ConfigBuilder<ClientConfig, WantsClientCert> {
    let verifier = verify::managers(root_store(root.cert_pem()).unwrap()).unwrap();
    client_builder(verifier).unwrap()
}

async fn report(identity: &Arc<Identity>, addr: &str) -> Result<(), Status> {
    LivenessClient::new(identity.channel(addr).unwrap())
        .report(LivenessReport::default())
        .await
        .map(|_| ())
}

#[tokio::test]
async fn managers_talk_and_workers_are_refused_by_name() {
    let manager = manager().await;
    let other = identity(&manager.root, "n2", NodeRole::Manager);
    report(&other, &manager.addr).await.unwrap();

    let worker = identity(&manager.root, "n3", NodeRole::Worker);
    let refusal = report(&worker, &manager.addr).await.unwrap_err();
    assert_eq!(refusal.code(), Code::PermissionDenied);
    assert_eq!(
        refusal.message(),
        "/swarm.v1.Liveness/Report is only for managers, not for worker n3"
    );
    let refusal = ControlClient::new(worker.channel(&manager.addr).unwrap())
        .list_nodes(ListNodesRequest::default())
        .await
        .unwrap_err();
    assert_eq!(refusal.code(), Code::PermissionDenied);
}

#[tokio::test]
async fn without_a_certificate_only_the_ca_answers() {
    let manager = manager().await;
    let config = client_of(&manager.root).with_no_client_auth();
    let config = Arc::new(finish_client(config));
    let channel = connect_lazy(Tcp::shared(), &manager.addr, CALLS, move || {
        Arc::clone(&config)
    })
    .unwrap();
    CaClient::new(channel.clone())
        .get_root_ca(GetRootCaRequest {})
        .await
        .unwrap();
    let refusal = LivenessClient::new(channel)
        .report(LivenessReport::default())
        .await
        .unwrap_err();
    assert_eq!(refusal.code(), Code::Unauthenticated);
}

#[tokio::test]
async fn too_many_connections_without_a_certificate_are_refused() {
    let limits = Limits {
        anonymous: 1,
        ..Limits::default()
    };
    let manager = manager_with(limits, AuthorizeLayer::new(), NodeRole::Manager).await;
    let token = JoinToken::generate(&manager.root.digest());
    let config = client_of(&manager.root).with_no_client_auth();
    let config = Arc::new(finish_client(config));
    let held = connect_lazy(Tcp::shared(), &manager.addr, CALLS, move || {
        Arc::clone(&config)
    })
    .unwrap();
    let mut held = CaClient::new(held);
    held.get_root_ca(GetRootCaRequest {}).await.unwrap();

    fetch_root(&Tcp::shared(), &manager.addr, &token)
        .await
        .unwrap_err();
    let member = identity(&manager.root, "n2", NodeRole::Manager);
    report(&member, &manager.addr).await.unwrap();
    held.get_root_ca(GetRootCaRequest {}).await.unwrap();
}

#[tokio::test]
async fn too_many_connections_of_one_node_are_refused_and_others_are_not() {
    let limits = Limits {
        per_node: 2,
        ..Limits::default()
    };
    let manager = manager_with(limits, AuthorizeLayer::new(), NodeRole::Manager).await;
    let greedy = identity(&manager.root, "n2", NodeRole::Manager);
    let mut held = Vec::new();
    for _ in 0..2 {
        let mut client = LivenessClient::new(greedy.channel(&manager.addr).unwrap());
        client.report(LivenessReport::default()).await.unwrap();
        held.push(client);
    }
    report(&greedy, &manager.addr).await.unwrap_err();
    let other = identity(&manager.root, "n3", NodeRole::Manager);
    report(&other, &manager.addr).await.unwrap();
    // A place is given back with its connection.
    drop(held);
    while report(&greedy, &manager.addr).await.is_err() {
        tokio::task::yield_now().await;
    }
}

#[tokio::test]
async fn a_certificate_of_another_ca_is_refused_both_ways() {
    let manager = manager().await;
    let foreign = RootCa::create(SystemTime::now()).unwrap();
    // The foreigner does not accept the manager…
    let stranger = identity(&foreign, "n2", NodeRole::Manager);
    assert!(report(&stranger, &manager.addr).await.is_err());
    // …and the manager does not accept a foreigner who would accept it.
    let key = testing::material(&foreign, "n2", NodeRole::Manager);
    let config = client_of(&manager.root)
        .with_client_auth_cert(
            cert::chain_from_pem(key.chain_pem.as_bytes()).unwrap(),
            cert::key_from_pem(key.key_pem.as_bytes()).unwrap(),
        )
        .unwrap();
    let config = Arc::new(finish_client(config));
    let channel = connect_lazy(Tcp::shared(), &manager.addr, CALLS, move || {
        Arc::clone(&config)
    })
    .unwrap();
    let refused = CaClient::new(channel)
        .get_root_ca(GetRootCaRequest {})
        .await;
    assert!(refused.is_err());
    // Others are served as before.
    let member = identity(&manager.root, "n3", NodeRole::Manager);
    report(&member, &manager.addr).await.unwrap();
}

#[tokio::test]
async fn a_worker_s_certificate_does_not_pass_for_a_manager_s() {
    let impostor = manager_with(Limits::default(), AuthorizeLayer::new(), NodeRole::Worker).await;
    let member = identity(&impostor.root, "n2", NodeRole::Manager);
    assert!(report(&member, &impostor.addr).await.is_err());
}

#[tokio::test]
async fn half_open_handshakes_are_dropped_and_hold_up_nobody() {
    let limits = Limits {
        handshake_timeout: Duration::from_millis(300),
        ..Limits::default()
    };
    let manager = manager_with(limits, AuthorizeLayer::new(), NodeRole::Manager).await;
    let addr: SocketAddr = manager.addr.parse().unwrap();
    let mut silent = Vec::new();
    for _ in 0..20 {
        silent.push(tokio::net::TcpStream::connect(addr).await.unwrap());
    }
    let member = identity(&manager.root, "n2", NodeRole::Manager);
    report(&member, &manager.addr).await.unwrap();
    for mut connection in silent {
        let end = connection.read(&mut [0; 16]).await;
        match end {
            Ok(read) => assert_eq!(read, 0),
            Err(error) => assert_eq!(error.kind(), ErrorKind::ConnectionReset),
        }
    }
}

#[tokio::test]
async fn a_node_that_the_check_refuses_is_refused_at_each_request() {
    let (removed, seen) = watch::channel(false);
    let check: Check = Arc::new(move |peer| {
        if *seen.borrow() {
            return Err(format!(
                "node {} was removed from the cluster",
                peer.node_id
            ));
        }
        Ok(peer.role)
    });
    let layer = AuthorizeLayer::with_check(check);
    let manager = manager_with(Limits::default(), layer, NodeRole::Manager).await;
    let member = identity(&manager.root, "n2", NodeRole::Manager);
    let channel = member.channel(&manager.addr).unwrap();
    let mut client = LivenessClient::new(channel);
    client.report(LivenessReport::default()).await.unwrap();
    removed.send(true).unwrap();
    let refusal = client.report(LivenessReport::default()).await.unwrap_err();
    assert_eq!(refusal.code(), Code::PermissionDenied);
    assert!(
        refusal
            .message()
            .ends_with("node n2 was removed from the cluster"),
        "{refusal}"
    );
    assert!(is_removed(&refusal));
}

#[tokio::test]
async fn a_demoted_manager_has_a_worker_s_rights_at_once() {
    let layer = AuthorizeLayer::with_check(Arc::new(|_| Ok(NodeRole::Worker)));
    let manager = manager_with(Limits::default(), layer, NodeRole::Manager).await;
    let member = identity(&manager.root, "n2", NodeRole::Manager);
    let refusal = report(&member, &manager.addr).await.unwrap_err();
    assert_eq!(refusal.code(), Code::PermissionDenied);
}

#[tokio::test]
async fn a_node_joins_with_the_root_checked_first() {
    let manager = manager().await;
    let token = JoinToken::generate(&manager.root.digest());
    let root = fetch_root(&Tcp::shared(), &manager.addr, &token)
        .await
        .unwrap();
    assert_eq!(manager.asked.load(Ordering::SeqCst), 0);
    let material = request_certificate(
        &Tcp::shared(),
        &manager.addr,
        &root,
        &token,
        NodeAvailability::Active,
        "host2",
    )
    .await
    .unwrap();
    let joined = Identity::new(material).unwrap();
    assert_eq!(joined.node_id().as_str(), "n2");
    report(&joined, &manager.addr).await.unwrap();
}

#[tokio::test]
async fn an_oversized_message_is_refused_before_it_is_read() {
    let manager = manager().await;
    let member = identity(&manager.root, "n2", NodeRole::Manager);
    let huge = IssueCertificateRequest {
        csr_pem: vec![b'a'; swarm_proto::defaults::MESSAGE_MAX + 1].into(),
        ..IssueCertificateRequest::default()
    };
    let mut client = CaClient::new(member.channel(&manager.addr).unwrap());
    let refusal = client.issue_certificate(huge).await.unwrap_err();
    assert_eq!(refusal.code(), Code::OutOfRange);
    assert!(refusal.message().contains("too large"), "{refusal}");
    assert_eq!(manager.asked.load(Ordering::SeqCst), 0);
    report(&member, &manager.addr).await.unwrap();
}

#[tokio::test]
async fn a_root_that_is_not_the_token_s_gets_nothing() {
    let manager = manager().await;
    let token = JoinToken::generate(&RootDigest::of_der(b"another root"));
    let error = fetch_root(&Tcp::shared(), &manager.addr, &token)
        .await
        .unwrap_err();
    assert!(!error.retryable());
    assert!(
        error
            .to_string()
            .starts_with("remote CA does not match fingerprint. Expected: "),
        "{error}"
    );
    // And a manager of another root is not asked for a certificate.
    let other = RootCa::create(SystemTime::now()).unwrap();
    request_certificate(
        &Tcp::shared(),
        &manager.addr,
        other.cert_pem(),
        &token,
        NodeAvailability::Active,
        "host2",
    )
    .await
    .unwrap_err();
    assert_eq!(manager.asked.load(Ordering::SeqCst), 0);
}

#[tokio::test]
async fn a_change_of_role_renews_the_certificate_without_a_restart() {
    let manager = manager().await;
    let directory = tempfile::tempdir().unwrap();
    let store = KeyStore::new(directory.path());
    let material = testing::material(&manager.root, "n2", NodeRole::Worker);
    let data_key = DataKey::random();
    store
        .save(&Stored {
            material: material.clone(),
            data_key: data_key.clone(),
        })
        .unwrap();
    let node = Identity::new(material).unwrap();
    report(&node, &manager.addr).await.unwrap_err();

    let mut changed = node.changed();
    let (role, roles) = watch::channel(NodeRole::Worker);
    // One manager does not answer: the next is asked.
    let (_managers, addrs) = watch::channel(vec!["127.0.0.1:1".to_owned(), manager.addr.clone()]);
    let cancel = CancellationToken::new();
    let renewing = tokio::spawn(keep_renewed(
        Arc::clone(&node),
        store.clone(),
        addrs,
        roles,
        cancel.clone(),
    ));
    role.send(NodeRole::Manager).unwrap();
    changed.changed().await.unwrap();
    assert_eq!(node.role(), NodeRole::Manager);
    report(&node, &manager.addr).await.unwrap();
    let stored = store.load().unwrap().unwrap();
    assert_eq!(stored.data_key, data_key);
    assert_eq!(
        Identity::new(stored.material).unwrap().role(),
        NodeRole::Manager
    );
    cancel.cancel();
    renewing.await.unwrap();
}

#[tokio::test]
async fn a_server_shows_its_new_certificate_to_the_next_connection() {
    let root = RootCa::create(SystemTime::now()).unwrap();
    let server = identity(&root, "n1", NodeRole::Manager);
    let listener = Listener::bind("127.0.0.1:0", Arc::clone(&server))
        .await
        .unwrap();
    let addr = listener.local_addr().unwrap().to_string();
    let serve = grpc_server()
        .layer(AuthorizeLayer::new())
        .add_service(LivenessServer::new(TestLiveness))
        .serve_with_incoming(listener.incoming());
    let _server = AbortOnDropHandle::new(tokio::spawn(async move { serve.await.unwrap() }));
    // A new root altogether: who knows only the old one is out, who knows the new one is in.
    let new_root = RootCa::create(SystemTime::now()).unwrap();
    let old_member = identity(&root, "n2", NodeRole::Manager);
    let new_member = identity(&new_root, "n3", NodeRole::Manager);
    report(&old_member, &addr).await.unwrap();
    report(&new_member, &addr).await.unwrap_err();
    server
        .replace(testing::material(&new_root, "n1", NodeRole::Manager))
        .unwrap();
    report(&new_member, &addr).await.unwrap();
    report(&old_member, &addr).await.unwrap_err();
    // Another node's certificate is not taken.
    let stranger = testing::material(&new_root, "n9", NodeRole::Manager);
    assert!(matches!(
        server.replace(stranger),
        Err(IdentityError::Stranger { .. })
    ));
}

#[tokio::test]
async fn an_expired_certificate_is_refused() {
    let manager = manager().await;
    let key = NewKey::generate().unwrap();
    let subject = PeerIdentity {
        node_id: "n2".into(),
        role: NodeRole::Manager,
        cluster_id: "c1".into(),
    };
    let long_ago = SystemTime::now() - Duration::from_secs(100 * 24 * 3600);
    let chain = manager
        .root
        .sign(key.csr_pem.as_bytes(), &subject, ca::LIFE_MIN, long_ago)
        .unwrap();
    let expired = Identity::new(KeyMaterial {
        chain_pem: chain,
        key_pem: zeroize::Zeroizing::new(key.key_pem),
        root_pem: manager.root.cert_pem().to_owned(),
    })
    .unwrap();
    assert!(expired.validity().expired(SystemTime::now()));
    report(&expired, &manager.addr).await.unwrap_err();
}

/// Days from now.
fn in_days(days: u64) -> SystemTime {
    SystemTime::now() + Duration::from_secs(days * 24 * 3600)
}

#[tokio::test]
async fn a_clock_that_is_behind_cuts_off_nobody() {
    let root = RootCa::create(SystemTime::now()).unwrap();
    let later = |node: &str| {
        let material = testing::material_at(&root, node, NodeRole::Manager, in_days(30));
        Identity::new(material).unwrap()
    };
    let listener = Listener::bind("127.0.0.1:0", later("n1")).await.unwrap();
    let addr = listener.local_addr().unwrap().to_string();
    let serve = grpc_server()
        .layer(AuthorizeLayer::new())
        .add_service(LivenessServer::new(TestLiveness))
        .serve_with_incoming(listener.incoming());
    let _server = AbortOnDropHandle::new(tokio::spawn(async move { serve.await.unwrap() }));
    // Either side's certificate is of the future, as when one was issued while clocks were right.
    report(&identity(&root, "n2", NodeRole::Manager), &addr)
        .await
        .unwrap();
    report(&later("n3"), &addr).await.unwrap();
    // What is wrong with it otherwise is not forgiven.
    let foreign = RootCa::create(SystemTime::now()).unwrap();
    let mut stranger = testing::material_at(&foreign, "n4", NodeRole::Manager, in_days(30));
    root.cert_pem().clone_into(&mut stranger.root_pem);
    let (chain, key) = (
        cert::chain_from_pem(stranger.chain_pem.as_bytes()).unwrap(),
        cert::key_from_pem(stranger.key_pem.as_bytes()).unwrap(),
    );
    let config = client_of(&root).with_client_auth_cert(chain, key).unwrap();
    let config = Arc::new(finish_client(config));
    let channel = connect_lazy(Tcp::shared(), &addr, CALLS, move || Arc::clone(&config)).unwrap();
    LivenessClient::new(channel)
        .report(LivenessReport::default())
        .await
        .unwrap_err();
    let worker = testing::material_at(&root, "n5", NodeRole::Worker, in_days(30));
    let refusal = report(&Identity::new(worker).unwrap(), &addr).await;
    assert_eq!(refusal.unwrap_err().code(), Code::PermissionDenied);
}

#[tokio::test]
async fn a_certificate_that_has_expired_already_is_not_taken() {
    let manager = manager().await;
    manager.behind.store(100 * 24 * 3600, Ordering::SeqCst);
    let directory = tempfile::tempdir().unwrap();
    let store = KeyStore::new(directory.path());
    let member = identity(&manager.root, "n2", NodeRole::Manager);
    let saved = Stored {
        material: member.material(),
        data_key: DataKey::random(),
    };
    store.save(&saved).unwrap();
    let before = member.validity();
    let addrs = [manager.addr.clone()];
    let error = renew(&member, &store, &addrs).await.unwrap_err();
    let RenewError::Refused(reason) = &error else {
        panic!("{error}");
    };
    assert_eq!(
        reason.to_string(),
        format!(
            "{} issued a certificate that has expired already: the clock of that manager or of this machine is wrong",
            manager.addr
        )
    );
    assert_eq!(member.validity(), before);
    assert_eq!(
        store.load().unwrap().unwrap().material.chain_pem,
        saved.material.chain_pem
    );
    manager.behind.store(0, Ordering::SeqCst);
    renew(&member, &store, &addrs).await.unwrap();
}

#[tokio::test]
async fn a_certificate_that_is_due_as_soon_as_it_is_issued_is_not_asked_for_all_the_time() {
    let manager = manager().await;
    // Of a day, the next one has an hour or two left.
    manager.behind.store(22 * 3600, Ordering::SeqCst);
    let directory = tempfile::tempdir().unwrap();
    let store = KeyStore::new(directory.path());
    let root = &manager.root;
    let at = SystemTime::now() - Duration::from_secs(22 * 3600);
    let old = testing::material_at(root, "n2", NodeRole::Manager, at);
    let member = Identity::new(old).unwrap();
    let saved = Stored {
        material: member.material(),
        data_key: DataKey::random(),
    };
    store.save(&saved).unwrap();
    let (_managers, managers) = watch::channel(vec![manager.addr.clone()]);
    let (_role, role) = watch::channel(NodeRole::Manager);
    let cancel = CancellationToken::new();
    let renewing = tokio::spawn(keep_renewed(
        Arc::clone(&member),
        store,
        managers,
        role,
        cancel.clone(),
    ));
    let mut changed = member.changed();
    changed.changed().await.unwrap();
    let first = tokio::time::Instant::now();
    changed.changed().await.unwrap();
    assert!(first.elapsed() > Duration::from_millis(400));
    cancel.cancel();
    renewing.await.unwrap();
}

#[tokio::test]
async fn the_local_socket_is_root_s_and_a_dead_one_is_replaced() {
    use std::os::unix::fs::PermissionsExt as _;
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("run/swarm.sock");
    let first = LocalListener::bind(&path).await.unwrap();
    let mode = std::fs::metadata(&path).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o660);
    let error = LocalListener::bind(&path).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::AddrInUse);
    drop(first);
    let second = LocalListener::bind(&path).await.unwrap();
    let _client = tokio::net::UnixStream::connect(&path).await.unwrap();
    let mut incoming = std::pin::pin!(second.incoming());
    let connection = futures::StreamExt::next(&mut incoming)
        .await
        .unwrap()
        .unwrap();
    assert_eq!(connection.info().caller, Caller::Local);
}

#[test]
fn an_address_without_a_port_is_refused() {
    let root = RootCa::create(SystemTime::now()).unwrap();
    let node = identity(&root, "n1", NodeRole::Manager);
    for wrong in [
        "",
        "host",
        "host:",
        ":2377",
        "host:0",
        "host:99999",
        "a b:1",
    ] {
        assert!(node.channel(wrong).is_err(), "{wrong}");
    }
}

/// A network of one address: whoever connects is given one end of a pipe.
#[derive(Debug)]
struct Pipes {
    connect: tokio::sync::mpsc::Sender<tokio::io::DuplexStream>,
    accept: tokio::sync::Mutex<tokio::sync::mpsc::Receiver<tokio::io::DuplexStream>>,
}

#[derive(Debug)]
struct End(Arc<Pipes>);

#[tonic::async_trait]
impl net::Net for End {
    async fn connect(&self, target: &str) -> std::io::Result<net::BoxStream> {
        assert_eq!(target, "manager:2377");
        let (here, there) = tokio::io::duplex(4096);
        let nobody = |_| std::io::Error::from(ErrorKind::ConnectionRefused);
        self.0.connect.send(there).await.map_err(nobody)?;
        Ok(Box::new(here))
    }

    async fn listen(&self, _: &str) -> std::io::Result<Box<dyn net::Acceptor>> {
        Ok(Box::new(Self(Arc::clone(&self.0))))
    }
}

#[tonic::async_trait]
impl net::Acceptor for End {
    fn local_addr(&self) -> std::io::Result<SocketAddr> {
        Ok(([192, 0, 2, 1], 2377).into())
    }

    async fn accept(&self) -> std::io::Result<(net::BoxStream, SocketAddr)> {
        match self.0.accept.lock().await.recv().await {
            Some(stream) => Ok((Box::new(stream), ([192, 0, 2, 2], 1).into())),
            None => std::future::pending().await,
        }
    }
}

#[tokio::test]
async fn mutual_tls_is_the_same_on_another_network() {
    let (connect, accept) = tokio::sync::mpsc::channel(1);
    let net: Arc<dyn Net> = Arc::new(End(Arc::new(Pipes {
        connect,
        accept: accept.into(),
    })));
    let root = RootCa::create(SystemTime::now()).unwrap();
    let on = |node: &str, root: &RootCa| {
        Identity::on(
            testing::material(root, node, NodeRole::Manager),
            Arc::clone(&net),
        )
        .unwrap()
    };
    let listener = Listener::bind("any", on("n1", &root)).await.unwrap();
    assert_eq!(listener.local_addr().unwrap().port(), 2377);
    let serve = grpc_server()
        .layer(AuthorizeLayer::new())
        .add_service(LivenessServer::new(TestLiveness))
        .serve_with_incoming(listener.incoming());
    let _server = AbortOnDropHandle::new(tokio::spawn(serve));
    report(&on("n2", &root), "manager:2377").await.unwrap();
    let stranger = on("n2", &RootCa::create(SystemTime::now()).unwrap());
    report(&stranger, "manager:2377").await.unwrap_err();
}

#[test]
fn an_urgent_connection_does_not_wait_for_what_the_runtime_is_busy_with() {
    let runtime = || {
        let mut builder = tokio::runtime::Builder::new_multi_thread();
        builder.worker_threads(1).enable_all().build().unwrap()
    };
    let (busy, own, client) = (runtime(), runtime(), runtime());
    let root = RootCa::create(SystemTime::now()).unwrap();
    let (n1, n2) = (
        identity(&root, "n1", NodeRole::Manager),
        identity(&root, "n2", NodeRole::Manager),
    );
    let listener = busy.block_on(Listener::bind("127.0.0.1:0", n1)).unwrap();
    let addr = listener.local_addr().unwrap().to_string();
    let server = || {
        grpc_server()
            .layer(AuthorizeLayer::new())
            .add_service(LivenessServer::new(TestLiveness))
    };
    let (urgent, connections) = tokio::sync::mpsc::channel(1);
    busy.spawn(server().serve_with_incoming(listener.incoming_with_urgent(urgent)));
    let connections = futures::stream::unfold(connections, |mut connections| async {
        let connection = connections.recv().await?;
        Some((connection.move_here(), connections))
    });
    own.spawn(server().serve_with_incoming(connections));

    client.block_on(async {
        let mut urgent = LivenessClient::new(n2.urgent_channel(&addr).unwrap());
        let mut other = LivenessClient::new(n2.channel(&addr).unwrap());
        // Both are connected.
        urgent.report(LivenessReport::default()).await.unwrap();
        other.report(LivenessReport::default()).await.unwrap();
        let (release, held) = std::sync::mpsc::channel::<()>();
        let (started, busy_now) = tokio::sync::oneshot::channel();
        busy.spawn(async move {
            started.send(()).unwrap();
            held.recv()
        });
        busy_now.await.unwrap();
        let patience = Duration::from_secs(20);
        let report = urgent.report(LivenessReport::default());
        tokio::time::timeout(patience, report)
            .await
            .unwrap()
            .unwrap();
        let mut waiting = std::pin::pin!(other.report(LivenessReport::default()));
        let moment = Duration::from_millis(50);
        tokio::time::timeout(moment, &mut waiting)
            .await
            .unwrap_err();
        drop(release);
        tokio::time::timeout(patience, waiting)
            .await
            .unwrap()
            .unwrap();
    });
}
