//! Managers in one process, each with a runtime, a directory and a port of its
//! own, over real TCP and mutual TLS. Killing one drops all of that at once.

use std::collections::BTreeSet;
use std::io;
use std::net::SocketAddr;
use std::path::Path;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll};
use std::time::{Duration, Instant, SystemTime};

use swarm_identity::net::{Acceptor, BoxStream, Net, Tcp};
use swarm_identity::{
    AuthorizeLayer, DataKey, Identity, KeyMaterial, Listener, NewKey, PeerIdentity, RootCa,
};
use swarm_proto::NodeId;
use swarm_proto::defaults::TRANSACTION_MAX;
use swarm_proto::v1::raft_client::RaftClient;
use swarm_proto::v1::rejection::Code;
use swarm_proto::v1::{JoinRequest, Node, NodeRole, RaftMessage, ReadIndexRequest, Transaction};
use swarm_raft::{RaftConfig, RaftNode, StartError};
use swarm_store::testing::{cluster, create, network, node, transaction, update};
use swarm_store::{Consensus, Member, MembershipError, ProposeError};
use tempfile::TempDir;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::runtime::Runtime;
use tokio::sync::watch;
use zeroize::Zeroizing;

/// What a wait ends with when the awaited fact never becomes true.
const PATIENCE: Duration = Duration::from_secs(60);

struct Lab {
    root: RootCa,
}

struct Host {
    identity: Arc<Identity>,
    cable: Cable,
    key: DataKey,
    dir: TempDir,
    addr: SocketAddr,
    configure: fn(&mut RaftConfig),
    running: Option<(Runtime, Arc<RaftNode>)>,
}

/// What a host is on the network with. Pulled out, whatever goes through it breaks.
#[derive(Clone, Debug, Default)]
struct Cable(Arc<AtomicBool>, Arc<AtomicBool>);

impl Cable {
    fn pull(&self) {
        self.0.store(true, Ordering::SeqCst);
    }

    fn plug_in(&self) {
        self.0.store(false, Ordering::SeqCst);
    }

    /// From now on nothing goes through it, for good, and nothing breaks: as if the process hung.
    fn hang(&self) {
        self.1.store(true, Ordering::SeqCst);
    }

    fn hangs(&self) -> bool {
        self.1.load(Ordering::SeqCst)
    }

    fn check(&self) -> io::Result<()> {
        match self.0.load(Ordering::SeqCst) {
            true => Err(io::ErrorKind::NetworkUnreachable.into()),
            false => Ok(()),
        }
    }
}

#[async_trait::async_trait]
impl Net for Cable {
    async fn connect(&self, target: &str) -> io::Result<BoxStream> {
        self.check()?;
        let stream = Tcp.connect(target).await?;
        Ok(Box::new(Wire(stream, self.clone())))
    }

    async fn listen(&self, addr: &str) -> io::Result<Box<dyn Acceptor>> {
        let listener = Tcp.listen(addr).await?;
        Ok(Box::new(Wire(listener, self.clone())))
    }
}

/// What goes through a cable.
#[derive(Debug)]
struct Wire<T>(T, Cable);

#[async_trait::async_trait]
impl Acceptor for Wire<Box<dyn Acceptor>> {
    fn local_addr(&self) -> io::Result<SocketAddr> {
        self.0.local_addr()
    }

    async fn accept(&self) -> io::Result<(BoxStream, SocketAddr)> {
        let (stream, from) = self.0.accept().await?;
        Ok((Box::new(Wire(stream, self.1.clone())), from))
    }
}

impl AsyncRead for Wire<BoxStream> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        into: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        self.1.check()?;
        if self.1.hangs() {
            return Poll::Pending;
        }
        let read = Pin::new(&mut self.0).poll_read(context, into);
        self.1.check()?;
        read
    }
}

impl AsyncWrite for Wire<BoxStream> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        self.1.check()?;
        if self.1.hangs() {
            return Poll::Pending;
        }
        Pin::new(&mut self.0).poll_write(context, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_shutdown(context)
    }
}

fn material(root: &RootCa, node: &str, role: NodeRole) -> KeyMaterial {
    let key = NewKey::generate().unwrap();
    let subject = PeerIdentity {
        node_id: node.into(),
        role,
        cluster_id: "c1".into(),
    };
    let day = Duration::from_secs(24 * 3600);
    let chain = root.sign(key.csr_pem.as_bytes(), &subject, day, SystemTime::now());
    KeyMaterial {
        chain_pem: chain.unwrap(),
        key_pem: Zeroizing::new(key.key_pem),
        root_pem: root.cert_pem().to_owned(),
    }
}

fn manager(id: &str) -> Node {
    let mut made = node(id, "10.0.0.1");
    made.role = NodeRole::Manager.into();
    made.spec.get_or_insert_default().desired_role = NodeRole::Manager.into();
    made
}

/// A transaction that anyone can count: a network of this number.
fn numbered(number: usize) -> Transaction {
    let (id, name) = (format!("net{number}"), format!("network-{number}"));
    let subnet = format!("10.{}.{}.0/24", number / 250 + 1, number % 250);
    transaction([create(network(&id, &name, &subnet))])
}

impl Lab {
    fn new() -> Self {
        Self {
            root: RootCa::create(SystemTime::now()).unwrap(),
        }
    }

    fn host(&self, name: &str, configure: fn(&mut RaftConfig)) -> Host {
        let free = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let (cable, material) = (
            Cable::default(),
            material(&self.root, name, NodeRole::Manager),
        );
        Host {
            identity: Identity::on(material, Arc::new(cable.clone())).unwrap(),
            cable,
            key: DataKey::random(),
            dir: tempfile::tempdir().unwrap(),
            addr: free.local_addr().unwrap(),
            configure,
            running: None,
        }
    }

    /// The first `count` managers, all voters.
    async fn cluster(&self, count: usize, configure: fn(&mut RaftConfig)) -> Vec<Host> {
        let mut hosts = vec![self.host("n1", configure)];
        hosts[0].bootstrap().await;
        for number in 2..=count {
            let mut host = self.host(&format!("n{number}"), configure);
            hosts[0].enroll(&host).await;
            host.join(&hosts[0]).await;
            hosts.push(host);
        }
        hosts
    }
}

impl Host {
    fn config(&self) -> RaftConfig {
        let mut config = RaftConfig::new(
            self.dir.path().join("raft"),
            self.addr.to_string(),
            self.identity.clone(),
            self.key.clone(),
        );
        (self.configure)(&mut config);
        config
    }

    fn node(&self) -> &Arc<RaftNode> {
        &self.running.as_ref().unwrap().1
    }

    fn id(&self) -> String {
        self.identity.node_id().to_string()
    }

    async fn run<F>(&mut self, starting: F) -> Result<(), StartError>
    where
        F: Future<Output = Result<Arc<RaftNode>, StartError>> + Send + 'static,
    {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .enable_all()
            .build()
            .unwrap();
        let (addr, identity) = (self.addr.to_string(), self.identity.clone());
        let started = runtime.spawn(async move {
            let node = starting.await?;
            let listener = Listener::bind(&addr, identity).await.unwrap();
            let store = node.store().clone();
            let role = move |peer: &PeerIdentity| {
                let state = store.state();
                Ok(state.node(&peer.node_id).map_or(peer.role, |it| it.role()))
            };
            let server = swarm_identity::grpc_server()
                .layer(AuthorizeLayer::with_check(Arc::new(role)))
                .add_service(node.service());
            tokio::spawn(server.serve_with_incoming(listener.incoming()));
            Ok(node)
        });
        match started.await.unwrap() {
            Ok(node) => {
                self.running = Some((runtime, node));
                Ok(())
            }
            Err(error) => {
                runtime.shutdown_background();
                Err(error)
            }
        }
    }

    async fn bootstrap(&mut self) {
        let first = transaction([create(cluster("c1")), create(manager(&self.id()))]);
        let config = self.config();
        self.run(RaftNode::bootstrap(config, first)).await.unwrap();
    }

    async fn start(&mut self) -> Result<(), StartError> {
        let config = self.config();
        self.run(RaftNode::start(config)).await
    }

    async fn join(&mut self, remote: &Host) {
        let (config, remotes) = (self.config(), vec![remote.addr.to_string()]);
        self.run(RaftNode::join(config, remotes)).await.unwrap();
        within("joining", self.node().joined()).await.unwrap();
    }

    async fn enroll(&self, newcomer: &Host) {
        let made = transaction([create(manager(&newcomer.id()))]);
        self.node().propose(made).await.unwrap();
    }

    fn kill(&mut self) {
        let (runtime, node) = self.running.take().unwrap();
        drop(node);
        // A process that is killed leaves no thread behind which still writes a snapshot.
        let ended = std::thread::spawn(move || runtime.shutdown_timeout(PATIENCE));
        ended.join().unwrap();
    }

    async fn stop(&mut self) {
        let (runtime, node) = self.running.take().unwrap();
        node.shutdown().await;
        drop(node);
        runtime.shutdown_background();
    }

    async fn has_applied(&self, index: u64) {
        within("applying", self.node().store().wait_for(index)).await;
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        if self.running.is_some() {
            self.kill();
        }
    }
}

async fn within<T>(what: &str, fact: impl Future<Output = T>) -> T {
    tokio::time::timeout(PATIENCE, fact)
        .await
        .unwrap_or_else(|_| panic!("{what} takes too long"))
}

async fn leads(node: &RaftNode) {
    let mut leadership = node.leadership();
    let _ = within("leading", leadership.wait_for(|now| now.is_leader))
        .await
        .unwrap();
}

/// Which of the running hosts leads.
async fn leader(hosts: &[Host]) -> usize {
    let running = hosts
        .iter()
        .enumerate()
        .filter(|(_, host)| host.running.is_some());
    let waits = running.map(|(place, host)| {
        Box::pin(async move {
            leads(host.node()).await;
            place
        })
    });
    futures::future::select_all(waits).await.0
}

fn networks(node: &RaftNode) -> BTreeSet<String> {
    node.store()
        .state()
        .networks()
        .map(|network| network.id.clone())
        .collect()
}

fn snapshots(host: &Host) -> usize {
    let dir = host.dir.path().join("raft/snapshots");
    std::fs::read_dir(dir).map_or(0, Iterator::count)
}

fn blobs(dir: &Path) -> usize {
    std::fs::read_dir(dir.join("raft/log/blobs")).map_or(0, Iterator::count)
}

fn often_snapshots(config: &mut RaftConfig) {
    config.snapshot_interval = 40;
    config.kept_entries = 10;
}

#[tokio::test(flavor = "multi_thread")]
async fn one_manager_keeps_its_state_over_restarts() {
    let lab = Lab::new();
    let mut host = lab.host("n1", often_snapshots);
    host.bootstrap().await;
    assert_eq!(host.node().raft_id(), 1);
    let mut expected = BTreeSet::new();
    for round in 0..3 {
        leads(host.node()).await;
        for number in round * 60..(round + 1) * 60 {
            host.node().propose(numbered(number)).await.unwrap();
            expected.insert(format!("net{number}"));
        }
        if round == 1 {
            host.kill()
        } else {
            host.stop().await
        }
        host.start().await.unwrap();
        let state = within("reading", host.node().read()).await.unwrap();
        assert_eq!(state.networks().count(), expected.len());
        assert_eq!(networks(host.node()), expected);
    }
    assert_eq!(snapshots(&host), 1);
    assert_eq!(blobs(host.dir.path()), 0);
    let status = host
        .node()
        .store()
        .state()
        .node("n1")
        .unwrap()
        .manager_status
        .clone();
    assert_eq!(status.unwrap().raft_id, 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn bootstrap_and_join_refuse_a_directory_in_use_and_start_an_empty_one() {
    let lab = Lab::new();
    let mut host = lab.host("n1", |_| {});
    assert!(matches!(host.start().await, Err(StartError::Empty(_))));
    host.bootstrap().await;
    host.stop().await;
    let again = RaftNode::bootstrap(host.config(), transaction([])).await;
    assert!(matches!(again, Err(StartError::NotEmpty(_))));
    let again = RaftNode::join(host.config(), vec!["127.0.0.1:1".into()]).await;
    assert!(matches!(again, Err(StartError::NotEmpty(_))));

    let mut other = lab.host("n2", |_| {});
    std::mem::swap(&mut other.dir, &mut host.dir);
    other.key = host.key.clone();
    assert!(matches!(
        other.start().await,
        Err(StartError::Foreign { .. })
    ));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_damaged_snapshot_keeps_the_manager_from_starting() {
    let lab = Lab::new();
    let mut host = lab.host("n1", often_snapshots);
    host.bootstrap().await;
    for number in 0..100 {
        host.node().propose(numbered(number)).await.unwrap();
    }
    host.stop().await;
    let dir = host.dir.path().join("raft/snapshots");
    let file = std::fs::read_dir(dir)
        .unwrap()
        .next()
        .unwrap()
        .unwrap()
        .path();
    let whole = std::fs::read(&file).unwrap();
    let mut damaged = whole.clone();
    damaged[whole.len() / 2] ^= 0x10;
    std::fs::write(&file, damaged).unwrap();
    let error = host.start().await.unwrap_err().to_string();
    assert!(error.contains(file.to_str().unwrap()), "{error}");

    // Nor is a missing one passed over.
    std::fs::remove_file(&file).unwrap();
    let error = host.start().await.unwrap_err().to_string();
    assert!(error.contains("missing"), "{error}");

    std::fs::write(&file, whole).unwrap();
    host.start().await.unwrap();
    within("reading", host.node().read()).await.unwrap();
    assert_eq!(networks(host.node()).len(), 100);
}

#[tokio::test(flavor = "multi_thread")]
async fn acknowledged_writes_survive_the_death_of_leaders() {
    let lab = Lab::new();
    let mut hosts = lab.cluster(3, |_| {}).await;
    let mut acknowledged = BTreeSet::new();
    for round in 0..3 {
        let dead = leader(&hosts).await;
        let survivor = hosts[(dead + 1) % 3].node().clone();
        let writes = (round * 40..(round + 1) * 40).map(|number| {
            let survivor = survivor.clone();
            async move { (number, survivor.propose(numbered(number)).await) }
        });
        let writing = tokio::spawn(futures::future::join_all(writes));
        hosts[dead].kill();
        for (number, result) in within("writing", writing).await.unwrap() {
            match result {
                Ok(_) => drop(acknowledged.insert(format!("net{number}"))),
                // Sent to the leader that died: nobody knows.
                Err(ProposeError::Unknown(_)) => {}
                Err(error) => panic!("write {number}: {error}"),
            }
        }
        let index = within("writing", survivor.propose(numbered(1000 + round)))
            .await
            .unwrap();
        acknowledged.insert(format!("net{}", 1000 + round));
        hosts[dead].start().await.unwrap();
        for host in &hosts {
            host.has_applied(index).await;
            let lost: Vec<_> = acknowledged
                .difference(&networks(host.node()))
                .cloned()
                .collect();
            assert!(lost.is_empty(), "{lost:?}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn followers_forward_and_read_what_the_leader_has_committed() {
    let lab = Lab::new();
    let hosts = lab.cluster(3, |_| {}).await;
    let leader = leader(&hosts).await;
    let (leader, follower) = (hosts[leader].node(), hosts[(leader + 1) % 3].node());
    assert!(!follower.leadership().borrow().is_leader);

    for number in 0..50 {
        let index = leader.propose(numbered(number)).await.unwrap();
        let state = follower.read().await.unwrap();
        assert!(state.index() >= index && state.network(&format!("net{number}")).is_some());
    }
    let index = follower.propose(numbered(50)).await.unwrap();
    assert!(leader.read().await.unwrap().index() >= index);

    for node in [leader, follower] {
        match node.propose(numbered(7)).await {
            Err(ProposeError::Rejected(rejection)) => {
                assert_eq!(
                    rejection.code(),
                    Code::AlreadyExists,
                    "{}",
                    rejection.message
                );
            }
            other => panic!("{other:?}"),
        }
        let huge = Transaction {
            proposer: "x".repeat(TRANSACTION_MAX),
            ..transaction([])
        };
        let result = node.propose(huge).await;
        assert!(
            matches!(result, Err(ProposeError::TooLarge { .. })),
            "{result:?}"
        );
    }
    let largest = Transaction {
        proposer: "x".repeat(TRANSACTION_MAX - 1000),
        ..transaction([])
    };
    follower.propose(largest).await.unwrap();
    // Reachability is a matter of time alone, so there is nothing to wait on.
    let all_in = |members: &[Member]| members.iter().all(|one| one.voter && one.reachable);
    let reachable = async {
        while !all_in(&leader.members()) {
            tokio::task::yield_now().await;
        }
    };
    within("hearing from all", reachable).await;
    assert_eq!(leader.members().len(), 3);
    assert!(hosts.iter().all(|host| blobs(host.dir.path()) == 0));
}

#[tokio::test(flavor = "multi_thread")]
async fn nobody_waits_for_a_leader_that_hangs() {
    let lab = Lab::new();
    let hosts = lab.cluster(3, |_| {}).await;
    let at = leader(&hosts).await;
    let follower = hosts[(at + 1) % 3].node();
    follower.propose(numbered(0)).await.unwrap();
    follower.read().await.unwrap();
    let addr = hosts[at].addr.to_string();
    let mut waits = RaftClient::new(hosts[(at + 1) % 3].identity.channel(&addr).unwrap());
    waits.read_index(ReadIndexRequest {}).await.unwrap();
    hosts[at].cable.hang();
    // All three ask the leader that they know; one is told only when the connection is found to be dead.
    let (read, written) = (follower.read(), follower.propose(numbered(1)));
    tokio::select! {
        (read, written) = async { tokio::join!(read, written) } => {
            read.unwrap();
            written.unwrap();
        }
        dead = waits.read_index(ReadIndexRequest {}) => panic!("ended before the others: {dead:?}"),
    }
    let state = within("reading", follower.read()).await.unwrap();
    assert_eq!(state.networks().count(), 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn writes_on_their_way_to_a_leader_that_dies_are_done_once() {
    let lab = Lab::new();
    let mut hosts = lab.cluster(3, |_| {}).await;
    let mut expected = BTreeSet::new();
    for round in 0..3 {
        let at = leader(&hosts).await;
        let follower = hosts[(at + 1) % 3].node().clone();
        let acknowledged = watch::Sender::new(0);
        let mut writers = tokio::task::JoinSet::new();
        for writer in 0..20 {
            let numbers = (0..20).map(|write| (round * 20 + writer) * 20 + write);
            let numbers: Vec<usize> = numbers.collect();
            expected.extend(numbers.iter().map(|number| format!("net{number}")));
            let (follower, acknowledged) = (follower.clone(), acknowledged.clone());
            writers.spawn(async move {
                for number in numbers {
                    // Done twice it would be refused the second time: the name is taken.
                    follower.propose(numbered(number)).await.unwrap();
                    acknowledged.send_modify(|count| *count += 1);
                }
            });
        }
        let mut seen = acknowledged.subscribe();
        let some = seen.wait_for(|&count| count >= 50);
        within("writing", some).await.unwrap();
        hosts[at].kill();
        within("writing", writers.join_all()).await;
        within("reading", follower.read()).await.unwrap();
        assert_eq!(networks(&follower), expected);
        hosts[at].start().await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_deposed_leader_could_not_commit_is_done_by_the_next() {
    let lab = Lab::new();
    let hosts = lab.cluster(3, |_| {}).await;
    let at = leader(&hosts).await;
    let former = hosts[at].node().clone();
    let term = former.leadership().borrow().term;
    hosts[at].cable.pull();
    let writing = tokio::spawn(async move { former.propose(numbered(0)).await });
    let next = hosts[(at + 1) % 3].node();
    let mut leadership = next.leadership();
    let later = leadership.wait_for(|now| now.term > term && now.leader.is_some());
    within("electing", later).await.unwrap();
    next.propose(numbered(1)).await.unwrap();
    hosts[at].cable.plug_in();
    within("writing", writing).await.unwrap().unwrap();
    let state = within("reading", next.read()).await.unwrap();
    assert_eq!(state.networks().count(), 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_wiped_manager_comes_back_as_another_member() {
    let lab = Lab::new();
    let mut hosts = lab.cluster(3, |_| {}).await;
    let lead = leader(&hosts).await;
    let wiped = (lead + 1) % 3;
    let former = hosts[wiped].node().raft_id();
    hosts[wiped].kill();
    hosts[wiped].dir = tempfile::tempdir().unwrap();
    let (before, rest) = hosts.split_at_mut(wiped.max(lead));
    let (wiped, lead) = if wiped > lead {
        (&mut rest[0], &before[lead])
    } else {
        (&mut before[wiped], &rest[0])
    };
    wiped.join(lead).await;
    let new = wiped.node().raft_id();
    assert!(new > former, "{new} after {former}");
    let members = lead.node().members();
    assert_eq!(members.len(), 3, "{members:?}");
    assert!(
        members
            .iter()
            .all(|member| member.voter && member.raft_id != former)
    );
    wiped.node().propose(numbered(1)).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_newcomer_gets_a_snapshot_when_the_log_is_gone() {
    let lab = Lab::new();
    let mut hosts = lab.cluster(1, often_snapshots).await;
    for number in 0..200 {
        hosts[0].node().propose(numbered(number)).await.unwrap();
    }
    let mut newcomer = lab.host("n2", often_snapshots);
    hosts[0].enroll(&newcomer).await;
    newcomer.join(&hosts[0]).await;
    let index = newcomer.node().propose(numbered(200)).await.unwrap();
    newcomer.has_applied(index).await;
    assert_eq!(networks(newcomer.node()).len(), 201);
    assert_eq!(snapshots(&newcomer), 1);

    // Both keep it over a restart of all.
    newcomer.stop().await;
    hosts[0].kill();
    newcomer.start().await.unwrap();
    hosts[0].start().await.unwrap();
    for host in [&newcomer, &hosts[0]] {
        within("reading", host.node().read()).await.unwrap();
        assert_eq!(networks(host.node()).len(), 201);
    }
}

fn heavy_entries(config: &mut RaftConfig) {
    config.snapshot_bytes = 1 << 20;
    config.kept_bytes = 256 << 10;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_heavy_entries_leave_is_cut_off_behind_a_snapshot() {
    let lab = Lab::new();
    let mut hosts = lab.cluster(1, heavy_entries).await;
    // Far fewer than the entries between two snapshots.
    for number in 0..40 {
        let heavy = Transaction {
            proposer: "x".repeat(100_000),
            ..numbered(number)
        };
        hosts[0].node().propose(heavy).await.unwrap();
    }
    let written = async {
        while snapshots(&hosts[0]) == 0 {
            tokio::task::yield_now().await;
        }
    };
    within("a snapshot", written).await;
    // Whoever comes now cannot be given the log from its beginning.
    let mut newcomer = lab.host("n2", heavy_entries);
    hosts[0].enroll(&newcomer).await;
    newcomer.join(&hosts[0]).await;
    let index = newcomer.node().propose(numbered(40)).await.unwrap();
    newcomer.has_applied(index).await;
    assert_eq!(networks(newcomer.node()).len(), 41);
    assert_eq!(snapshots(&newcomer), 1);
    hosts[0].kill();
    hosts[0].start().await.unwrap();
    within("reading", hosts[0].node().read()).await.unwrap();
    assert_eq!(networks(hosts[0].node()).len(), 41);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_snapshot_is_due_after_many_changes() {
    let lab = Lab::new();
    let hosts = lab.cluster(1, |config| config.snapshot_changes = 300).await;
    for round in 0..4 {
        let nodes = (0..100).map(|number| create(node(&format!("w{round}-{number}"), "")));
        hosts[0].node().propose(transaction(nodes)).await.unwrap();
    }
    let written = async {
        while snapshots(&hosts[0]) == 0 {
            tokio::task::yield_now().await;
        }
    };
    within("a snapshot", written).await;
}

/// What the replica of `host` says of where the manager of `node` is.
async fn published(host: &Host, node: &str, addr: &str) {
    let published = async {
        let (mut state, mut watch) = host.node().store().watch();
        loop {
            let status = state.node(node).and_then(|n| n.manager_status.clone());
            if status.is_some_and(|status| status.addr == addr) {
                return;
            }
            state = watch.next().await.unwrap().state;
        }
    };
    within("publishing the address", published).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_manager_with_a_new_address_is_known_by_it() {
    let lab = Lab::new();
    let mut hosts = lab.cluster(3, |_| {}).await;
    let lead = leader(&hosts).await;
    let moving = (lead + 1) % 3;
    hosts[moving].stop().await;
    hosts[moving].addr = lab.host("n9", |_| {}).addr;
    hosts[moving].start().await.unwrap();
    let (id, addr) = (hosts[moving].id(), hosts[moving].addr.to_string());
    for host in &hosts {
        published(host, &id, &addr).await;
    }
    within("joining", hosts[moving].node().joined())
        .await
        .unwrap();
    hosts[moving].node().propose(numbered(1)).await.unwrap();

    // One that leads alone has nobody to ask.
    let mut alone = lab.cluster(1, |_| {}).await.remove(0);
    alone.stop().await;
    alone.addr = lab.host("n9", |_| {}).addr;
    alone.start().await.unwrap();
    published(&alone, &alone.id(), &alone.addr.to_string()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn followers_know_whom_the_leader_hears() {
    let lab = Lab::new();
    let mut hosts = lab.cluster(3, |_| {}).await;
    let lead = leader(&hosts).await;
    let (follower, down) = ((lead + 1) % 3, (lead + 2) % 3);
    let silent = hosts[down].node().raft_id();
    hosts[down].kill();
    let follower = hosts[follower].node();
    let missed = async {
        loop {
            let heard = follower.members_heard().await.unwrap();
            assert_eq!(heard.len(), 3);
            if heard
                .iter()
                .all(|one| one.reachable == (one.raft_id != silent))
            {
                return;
            }
        }
    };
    within("missing the dead one", missed).await;
    let by_leader = hosts[lead].node().members_heard().await.unwrap();
    assert_eq!(follower.members_heard().await.unwrap(), by_leader);
}

#[tokio::test(flavor = "multi_thread")]
async fn members_leave_only_while_quorum_stays() {
    let lab = Lab::new();
    let mut hosts = lab.cluster(3, |_| {}).await;
    let lead = leader(&hosts).await;
    let id = |host: &Host| host.node().raft_id();
    let (other, down) = ((lead + 1) % 3, (lead + 2) % 3);
    let (lead_id, other_id, down_id) = (id(&hosts[lead]), id(&hosts[other]), id(&hosts[down]));
    let refused = hosts[other].node().remove_member(down_id).await;
    assert!(matches!(refused, Err(MembershipError::NotLeader)));

    hosts[down].kill();
    let leading = hosts[lead].node().clone();
    let unreachable = async {
        // Reachability is a matter of time alone, so there is nothing to wait on.
        while leading.members().iter().all(|member| member.reachable) {
            tokio::task::yield_now().await;
        }
    };
    within("missing the dead one", unreachable).await;
    let refused = leading
        .remove_member(other_id)
        .await
        .unwrap_err()
        .to_string();
    let start = "can't remove member from the raft: this would result in a loss of quorum (";
    assert!(refused.starts_with(start), "{refused}");
    leading.remove_member(down_id).await.unwrap();
    leading.remove_member(down_id).await.unwrap();

    // The leader takes itself out, as it is to be a worker: another leads then, alone.
    let state = leading.read().await.unwrap();
    let mut demoted = Node::clone(state.node(&hosts[lead].id()).unwrap());
    demoted.spec.get_or_insert_default().desired_role = NodeRole::Worker.into();
    leading
        .propose(transaction([update(demoted)]))
        .await
        .unwrap();
    within("leaving", leading.remove_member(lead_id))
        .await
        .unwrap();
    leads(hosts[other].node()).await;
    let members = hosts[other].node().members();
    assert_eq!(members.len(), 1, "{members:?}");
    hosts[other].node().propose(numbered(1)).await.unwrap();
    let refused = hosts[other]
        .node()
        .remove_member(other_id)
        .await
        .unwrap_err();
    assert!(refused.to_string().contains("last manager"), "{refused}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_leader_that_has_just_been_elected_can_take_the_dead_one_out() {
    let lab = Lab::new();
    let mut hosts = lab.cluster(3, |_| {}).await;
    let lead = leader(&hosts).await;
    let dead = hosts[lead].node().raft_id();
    hosts[lead].kill();
    let removal = |host: &Host| {
        let node = host.node().clone();
        // From the first moment in which it leads: nobody has answered it then.
        async move {
            loop {
                match node.remove_member(dead).await {
                    Err(MembershipError::NotLeader) => tokio::task::yield_now().await,
                    removed => return removed,
                }
            }
        }
    };
    let (one, two) = ((lead + 1) % 3, (lead + 2) % 3);
    let removed = async {
        tokio::select! {
            removed = removal(&hosts[one]) => removed,
            removed = removal(&hosts[two]) => removed,
        }
    };
    within("removing the dead one", removed).await.unwrap();
}

/// Takes a member out of the group and its raft ID from its node, as a demotion does.
async fn demote(leading: &RaftNode, id: &str, raft_id: u64) {
    leading.remove_member(raft_id).await.unwrap();
    let state = leading.read().await.unwrap();
    let demoted = Node {
        manager_status: None,
        ..(**state.node(id).unwrap()).clone()
    };
    leading
        .propose(transaction([update(demoted)]))
        .await
        .unwrap();
}

async fn expelled(node: &RaftNode) {
    let mut expelled = node.expelled();
    let reason = within("being told", expelled.wait_for(Option::is_some)).await;
    drop(reason.unwrap());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_member_that_was_taken_out_learns_it_and_comes_back_as_another() {
    let lab = Lab::new();
    let mut hosts = lab.cluster(3, |_| {}).await;
    let lead = leader(&hosts).await;
    let away = (lead + 1) % 3;
    // One that runs, and one that was down meanwhile.
    for down in [false, true] {
        let (id, raft_id) = (hosts[away].id(), hosts[away].node().raft_id());
        if down {
            hosts[away].stop().await;
        }
        demote(hosts[lead].node(), &id, raft_id).await;
        if down {
            hosts[away].start().await.unwrap();
        }
        expelled(hosts[away].node()).await;
        assert!(hosts[away].node().joined().await.is_err());
        // What its node does then.
        hosts[away].stop().await;
        hosts[away].dir = tempfile::tempdir().unwrap();
        let (config, remotes) = (hosts[away].config(), vec![hosts[lead].addr.to_string()]);
        hosts[away]
            .run(RaftNode::join(config, remotes))
            .await
            .unwrap();
        within("joining", hosts[away].node().joined())
            .await
            .unwrap();
    }
    assert_eq!(hosts[away].node().raft_id(), 5);
    assert!(hosts[lead].node().members().iter().all(|one| one.voter));
    hosts[away].node().propose(numbered(1)).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_member_that_was_taken_out_and_is_wanted_under_its_raft_id_is_taken_in_again() {
    let lab = Lab::new();
    let hosts = lab.cluster(3, |_| {}).await;
    let lead = leader(&hosts).await;
    let away = hosts[(lead + 1) % 3].node();
    // The demotion was taken back before the node had lost its role.
    hosts[lead]
        .node()
        .remove_member(away.raft_id())
        .await
        .unwrap();
    let back = async {
        let back = |member: &Member| member.voter && member.raft_id == away.raft_id();
        while !hosts[lead].node().members().iter().any(back) {
            tokio::task::yield_now().await;
        }
    };
    within("coming back", back).await;
    within("writing", away.propose(numbered(1))).await.unwrap();
    assert!(away.expelled().borrow().is_none());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_leader_that_has_lost_its_quorum_tells_nobody_that_it_is_no_member() {
    let lab = Lab::new();
    let mut hosts = lab.cluster(2, |_| {}).await;
    let lead = leader(&hosts).await;
    hosts[1 - lead].kill();
    // A raft ID that another leader may have given meanwhile.
    let peer = Identity::new(material(
        &lab.root,
        &hosts[1 - lead].id(),
        NodeRole::Manager,
    ));
    let addr = hosts[lead].addr.to_string();
    let mut client = RaftClient::new(peer.unwrap().channel(&addr).unwrap());
    let request = JoinRequest {
        addr: hosts[1 - lead].addr.to_string(),
        raft_id: 77,
    };
    let status = within("an answer", client.join(request.clone())).await;
    let status = status.unwrap_err();
    assert_eq!(status.code(), tonic::Code::Unavailable, "{status}");

    hosts[1 - lead].start().await.unwrap();
    within("reading", hosts[1 - lead].node().read())
        .await
        .unwrap();
    let status = within("an answer", client.join(request)).await.unwrap_err();
    assert_eq!(status.code(), tonic::Code::FailedPrecondition, "{status}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_member_that_was_taken_out_answers_for_its_write_when_it_learns_it() {
    let lab = Lab::new();
    let hosts = lab.cluster(3, |_| {}).await;
    let former = leader(&hosts).await;
    let next = (former + 1) % 3;
    let away = hosts[former].node().clone();
    hosts[former].cable.pull();
    let writing = tokio::spawn(async move { away.propose(numbered(1)).await });
    let mut leadership = hosts[next].node().leadership();
    let away = hosts[former].node();
    let elected = leadership.wait_for(|now| {
        let other = |leader: &Member| leader.raft_id != away.raft_id();
        now.leader.as_ref().is_some_and(other)
    });
    let elected = within("electing", elected).await.unwrap().leader.clone();
    let elected = elected.map(|leader| leader.raft_id);
    let is_elected = |host: &&Host| Some(host.node().raft_id()) == elected;
    let leading = hosts.iter().find(is_elected).unwrap().node();
    leads(leading).await;
    demote(leading, &hosts[former].id(), away.raft_id()).await;
    assert!(away.expelled().borrow().is_none());
    hosts[former].cable.plug_in();
    let answer = within("answering", writing).await.unwrap();
    match answer {
        Err(ProposeError::Unknown(reason)) => assert!(reason.contains("taken out"), "{reason}"),
        other => panic!("{other:?}"),
    }
    let late = away.propose(numbered(2)).await;
    assert!(matches!(late, Err(ProposeError::Denied(_))), "{late:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_leader_refuses_for_who_sends_it_is_certainly_not_done() {
    let lab = Lab::new();
    let hosts = lab.cluster(3, |_| {}).await;
    let lead = leader(&hosts).await;
    let (leading, other) = (hosts[lead].node(), &hosts[(lead + 1) % 3]);
    let state = leading.read().await.unwrap();
    let demoted = Node {
        role: NodeRole::Worker.into(),
        ..(**state.node(&other.id()).unwrap()).clone()
    };
    leading
        .propose(transaction([update(demoted)]))
        .await
        .unwrap();
    let refused = within("an answer", other.node().propose(numbered(1))).await;
    assert!(
        matches!(refused, Err(ProposeError::Denied(_))),
        "{refused:?}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_planned_stop_hands_leadership_over() {
    let lab = Lab::new();
    let mut hosts = lab.cluster(3, |_| {}).await;
    let lead = leader(&hosts).await;
    let (before, stopped) = (Instant::now(), hosts[lead].node().raft_id());
    hosts[lead].stop().await;
    let next = &hosts[(lead + 1) % 3];
    let mut leadership = next.node().leadership();
    let new = within(
        "another leading",
        leadership.wait_for(|now| {
            now.leader
                .as_ref()
                .is_some_and(|leader| leader.raft_id != stopped)
        }),
    );
    drop(new.await.unwrap());
    next.node().propose(numbered(1)).await.unwrap();
    println!("a write {:?} after the stop began", before.elapsed());
}

#[tokio::test(flavor = "multi_thread")]
async fn only_managers_are_answered_and_only_by_the_member_that_is_meant() {
    let lab = Lab::new();
    let hosts = lab.cluster(1, |_| {}).await;
    let addr = hosts[0].addr.to_string();
    let worker = Identity::new(material(&lab.root, "w1", NodeRole::Worker)).unwrap();
    let mut client = RaftClient::new(worker.channel(&addr).unwrap());
    let status = client.read_index(ReadIndexRequest {}).await.unwrap_err();
    assert_eq!(status.code(), tonic::Code::PermissionDenied);

    let peer = Identity::new(material(&lab.root, "n9", NodeRole::Manager)).unwrap();
    let mut client = RaftClient::new(peer.channel(&addr).unwrap());
    client.read_index(ReadIndexRequest {}).await.unwrap();
    let message = RaftMessage {
        to: 77,
        from: 2,
        cluster_id: "c1".into(),
        body: vec![1].into(),
    };
    let status = client.vote(message.clone()).await.unwrap_err();
    assert_eq!(status.code(), tonic::Code::FailedPrecondition);
    let to_me = RaftMessage { to: 1, ..message };
    let status = client.vote(to_me).await.unwrap_err();
    assert_eq!(status.code(), tonic::Code::InvalidArgument);

    // A manager's certificate alone does not make a member.
    let host = lab.host("n9", |_| {});
    let error = RaftNode::join(host.config(), vec![addr]).await.unwrap_err();
    assert!(matches!(error, StartError::Join(_)), "{error}");
    let _: NodeId = host.identity.node_id();
}
