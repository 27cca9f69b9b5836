//! The helper process: sockets in the sandboxes, tables in memory, connections of agents.

use std::cell::{Cell, RefCell};
use std::collections::{HashMap, HashSet};
use std::fs;
use std::io;
use std::net::Ipv4Addr;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use hickory_proto::op::{Message, ResponseCode};
use nix::fcntl::{Flock, FlockArg};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream, UdpSocket, UnixListener, UnixStream};
use tokio::sync::{Notify, Semaphore};
use tokio::task::{JoinHandle, JoinSet, LocalSet};
use tokio::time::timeout;

use super::super::lb::{NAMES_ADDR, NAMES_PORT};
use super::super::netns::run_in;
use super::answer::{self, Outcome, Table};
use super::upstream::{self, HostServers};
use super::wire::{self, NetworkNames, Reply, Request, SandboxNames, VERSION};

/// Questions of one sandbox that wait for other name servers.
const FORWARDS_MAX: usize = 64;
/// TCP connections of one sandbox.
const CONNECTIONS_MAX: usize = 32;
/// A TCP connection without a question.
const IDLE: Duration = Duration::from_secs(10);
/// Agents at one time: the present one, and one that is being replaced.
const AGENTS_MAX: usize = 4;

struct Served {
    names: SandboxNames,
    inode: u64,
    loops: Vec<JoinHandle<()>>,
}

struct State {
    sandboxes: RefCell<HashMap<String, Served>>,
    tables: RefCell<HashMap<String, (NetworkNames, Table)>>,
    host_servers: RefCell<HostServers>,
    turn: Cell<usize>,
    end: Notify,
}

/// The whole life of the process.
pub async fn run(run_dir: PathBuf, resolv_conf: PathBuf) -> Result<(), String> {
    let step =
        |what: &str, error: io::Error| format!("names: {what} in {}: {error}", run_dir.display());
    // Ends of sessions and terminals are the agent's business. Fails only for who leads a session already.
    let _ = nix::unistd::setsid();
    let lock = fs::File::create(run_dir.join("names.lock")).map_err(|e| step("make a lock", e))?;
    // Waits for one that is just ending.
    let _lock = Flock::lock(lock, FlockArg::LockExclusive)
        .map_err(|(_, error)| step("take the lock", error.into()))?;
    let path = run_dir.join("names.sock");
    match fs::remove_file(&path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            return Err(step("remove the old socket", error));
        }
        _ => {}
    }
    let listener = UnixListener::bind(&path).map_err(|e| step("open the socket", e))?;
    fs::set_permissions(&path, std::os::unix::fs::PermissionsExt::from_mode(0o600))
        .map_err(|e| step("protect the socket", e))?;
    let state = Rc::new(State {
        sandboxes: RefCell::default(),
        tables: RefCell::default(),
        host_servers: RefCell::new(HostServers::new(resolv_conf)),
        turn: Cell::new(0),
        end: Notify::new(),
    });
    let local = LocalSet::new();
    local
        .run_until(async {
            let mut agents = JoinSet::new();
            if let Some(first) = standard_input() {
                agents.spawn_local(serve_agent(Rc::clone(&state), first));
            }
            loop {
                tokio::select! {
                    () = state.end.notified() => break,
                    accepted = listener.accept() => if let Ok((stream, _)) = accepted
                        && agents.len() < AGENTS_MAX {
                            agents.spawn_local(serve_agent(Rc::clone(&state), stream));
                        },
                    Some(_) = agents.join_next() => {
                        if agents.is_empty() && state.sandboxes.borrow().is_empty() {
                            break;
                        }
                    }
                }
            }
        })
        .await;
    let _ = fs::remove_file(&path);
    Ok(())
}

/// The agent that started us is at the other end of it.
fn standard_input() -> Option<UnixStream> {
    // SAFETY: descriptor 0 is open for the life of the process, and nothing else in it uses it.
    let fd = unsafe { OwnedFd::from_raw_fd(0) };
    let is_socket = nix::sys::socket::getsockname::<nix::sys::socket::UnixAddr>(fd.as_raw_fd());
    if is_socket.is_err() {
        // Must not be closed: the number would be given to the next socket.
        std::mem::forget(fd);
        return None;
    }
    let copy = fd.try_clone().ok();
    std::mem::forget(fd);
    let stream = std::os::unix::net::UnixStream::from(copy?);
    // The copy lives as long as the agent; number 0 must not keep the connection open after it.
    let null = fs::File::open("/dev/null").ok()?;
    // SAFETY: both descriptors are open; 0 is replaced in one step.
    unsafe {
        libc::dup2(null.as_raw_fd(), 0);
    }
    stream.set_nonblocking(true).ok()?;
    UnixStream::from_std(stream).ok()
}

async fn serve_agent(state: Rc<State>, mut stream: UnixStream) {
    while let Ok(Some(request)) = wire::receive::<Request>(&mut stream).await {
        let ends = request == Request::End;
        let reply = match state.apply(request).await {
            Ok(reply) => reply,
            Err(error) => Reply::Failed(error),
        };
        if wire::send(&mut stream, &reply).await.is_err() {
            break;
        }
        if ends {
            state.end.notify_one();
        }
    }
}

impl State {
    async fn apply(self: &Rc<Self>, request: Request) -> Result<Reply, String> {
        match request {
            Request::Hello(_) => return Ok(Reply::Hello(VERSION)),
            Request::Retain {
                sandboxes,
                networks,
            } => {
                let keep: HashSet<String> = sandboxes.into_iter().collect();
                let drop: Vec<String> = self
                    .sandboxes
                    .borrow()
                    .keys()
                    .filter(|task| !keep.contains(*task))
                    .cloned()
                    .collect();
                for task in drop {
                    self.remove_sandbox(&task).await;
                }
                let keep: HashSet<String> = networks.into_iter().collect();
                self.tables.borrow_mut().retain(|id, _| keep.contains(id));
            }
            Request::Sandbox(names) => self.add_sandbox(names).await?,
            Request::RemoveSandbox(task) => self.remove_sandbox(&task).await,
            Request::Network(network) => {
                let unchanged = self
                    .tables
                    .borrow()
                    .get(&network.id)
                    .is_some_and(|(old, _)| *old == network);
                if !unchanged {
                    let table = Table::build(&network);
                    self.tables
                        .borrow_mut()
                        .insert(network.id.clone(), (network, table));
                }
            }
            Request::RemoveNetwork(id) => {
                self.tables.borrow_mut().remove(&id);
            }
            Request::End => {
                let all: Vec<String> = self.sandboxes.borrow().keys().cloned().collect();
                for task in all {
                    self.remove_sandbox(&task).await;
                }
            }
        }
        Ok(Reply::Done)
    }

    /// Its sockets stay open when only its names have changed.
    async fn add_sandbox(self: &Rc<Self>, names: SandboxNames) -> Result<(), String> {
        let failed = |error: io::Error| {
            format!(
                "open name server sockets in {}: {error}",
                names.netns.display()
            )
        };
        let inode = fs::metadata(&names.netns).map_err(failed)?.ino();
        if let Some(served) = self.sandboxes.borrow_mut().get_mut(&names.task)
            && served.inode == inode
            && served.loops.iter().all(|task| !task.is_finished())
        {
            served.names = names;
            return Ok(());
        }
        self.remove_sandbox(&names.task).await;
        let (udp, tcp) = open_sockets(&names.netns).map_err(failed)?;
        let task: Rc<str> = names.task.as_str().into();
        let loops = vec![
            tokio::task::spawn_local(serve_udp(Rc::clone(self), Rc::clone(&task), udp)),
            tokio::task::spawn_local(serve_tcp(Rc::clone(self), task, tcp)),
        ];
        let served = Served {
            names,
            inode,
            loops,
        };
        self.sandboxes
            .borrow_mut()
            .insert(served.names.task.clone(), served);
        Ok(())
    }

    async fn remove_sandbox(&self, task: &str) {
        let removed = self.sandboxes.borrow_mut().remove(task);
        if let Some(served) = removed {
            for task in &served.loops {
                task.abort();
            }
            for task in served.loops {
                let _ = task.await;
            }
        }
    }

    fn decide(&self, task: &str, packet: &[u8]) -> Decision {
        let sandboxes = self.sandboxes.borrow();
        let Some(served) = sandboxes.get(task) else {
            return Decision::Ignore;
        };
        let tables = self.tables.borrow();
        let mine = served
            .names
            .networks
            .iter()
            .filter_map(|id| tables.get(id).map(|(_, table)| table));
        let turn = self.turn.get();
        self.turn.set(turn.wrapping_add(1));
        match answer::decide(packet, &served.names, mine, turn) {
            Outcome::Answer(answer) => Decision::Answer(answer),
            Outcome::Ignore => Decision::Ignore,
            // The agent has yet to say what this network holds: to ask outside would be wrong, and so would "no".
            Outcome::Forward(query)
                if served
                    .names
                    .networks
                    .iter()
                    .any(|id| !tables.contains_key(id)) =>
            {
                Decision::Answer(answer::respond(&query, ResponseCode::ServFail))
            }
            // From internal networks nothing leaves, questions neither.
            Outcome::Forward(query) if !served.names.external => {
                Decision::Answer(answer::respond(&query, ResponseCode::NXDomain))
            }
            Outcome::Forward(query) => {
                let servers = if served.names.nameservers.is_empty() {
                    self.host_servers.borrow_mut().get()
                } else {
                    served.names.nameservers.clone()
                };
                Decision::Forward(query, servers)
            }
        }
    }
}

enum Decision {
    Answer(Message),
    Forward(Message, Vec<std::net::IpAddr>),
    Ignore,
}

fn open_sockets(netns: &Path) -> io::Result<(UdpSocket, TcpListener)> {
    let file = fs::File::open(netns)?;
    let at: (Ipv4Addr, u16) = (NAMES_ADDR, NAMES_PORT);
    let (udp, tcp) = run_in(Some(file.as_fd()), || {
        Ok((
            std::net::UdpSocket::bind(at)?,
            std::net::TcpListener::bind(at)?,
        ))
    })?;
    udp.set_nonblocking(true)?;
    tcp.set_nonblocking(true)?;
    Ok((UdpSocket::from_std(udp)?, TcpListener::from_std(tcp)?))
}

async fn serve_udp(state: Rc<State>, task: Rc<str>, socket: UdpSocket) {
    let socket = Rc::new(socket);
    let mut forwards = JoinSet::new();
    let mut buffer = vec![0; 4096];
    loop {
        while forwards.try_join_next().is_some() {}
        let (length, from) = match socket.recv_from(&mut buffer).await {
            Ok(received) => received,
            // An asker that is gone is reported here; it is no reason to end.
            Err(_) => {
                tokio::task::yield_now().await;
                continue;
            }
        };
        let packet = &buffer[..length];
        let limit = Some(answer::udp_limit(packet));
        let bytes = match state.decide(&task, packet) {
            Decision::Ignore => None,
            Decision::Answer(message) => answer::encode(message, limit),
            Decision::Forward(query, _) if forwards.len() >= FORWARDS_MAX => {
                answer::encode(answer::respond(&query, ResponseCode::ServFail), limit)
            }
            Decision::Forward(query, servers) => {
                // The sandbox may go while the answer is awaited: then nobody holds the socket.
                let socket = Rc::downgrade(&socket);
                let packet = packet.to_vec();
                forwards.spawn_local(async move {
                    let found = upstream::ask(&packet, &query, &servers, false).await;
                    let bytes = found.or_else(|| {
                        answer::encode(answer::respond(&query, ResponseCode::ServFail), limit)
                    });
                    if let (Some(bytes), Some(socket)) = (bytes, socket.upgrade()) {
                        let _ = socket.send_to(&bytes, from).await;
                    }
                });
                None
            }
        };
        if let Some(bytes) = bytes {
            let _ = socket.send_to(&bytes, from).await;
        }
    }
}

async fn serve_tcp(state: Rc<State>, task: Rc<str>, listener: TcpListener) {
    let places = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    let mut connections = JoinSet::new();
    loop {
        while connections.try_join_next().is_some() {}
        let Ok(place) = Arc::clone(&places).acquire_owned().await else {
            return;
        };
        match listener.accept().await {
            Ok((stream, _)) => {
                let (state, task) = (Rc::clone(&state), Rc::clone(&task));
                connections.spawn_local(async move {
                    let _place = place;
                    let _ = serve_connection(&state, &task, stream).await;
                });
            }
            // Out of descriptors, most likely: others must end first.
            Err(error) => {
                tracing::warn!(%error, "accept a connection");
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
    }
}

async fn serve_connection(state: &State, task: &str, mut stream: TcpStream) -> io::Result<()> {
    loop {
        let length = timeout(IDLE, stream.read_u16()).await??;
        let mut packet = vec![0; usize::from(length)];
        timeout(IDLE, stream.read_exact(&mut packet)).await??;
        let bytes = match state.decide(task, &packet) {
            Decision::Ignore => return Ok(()),
            Decision::Answer(message) => answer::encode(message, None),
            Decision::Forward(query, servers) => upstream::ask(&packet, &query, &servers, true)
                .await
                .or_else(|| answer::encode(answer::respond(&query, ResponseCode::ServFail), None)),
        };
        let Some(bytes) = bytes.filter(|bytes| u16::try_from(bytes.len()).is_ok()) else {
            return Ok(());
        };
        let mut frame = (bytes.len() as u16).to_be_bytes().to_vec();
        frame.extend(bytes);
        timeout(IDLE, stream.write_all(&frame)).await??;
    }
}
