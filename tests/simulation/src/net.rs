//! The network between hosts: streams of bytes, in order, with everything that TCP cannot hide.
//!
//! Delay with a long tail, loss (a retransmission's delay, as TCP shows it), one-way and two-way
//! cuts (data waits and arrives after the cut, in order, or never; its sender gives up as with
//! TCP_USER_TIMEOUT), resets in mid-stream, a bandwidth, hosts that die with or without their
//! kernel. A stream is two pipes; what is written goes on its way in segments, and each arrival is
//! one event of the world.

use std::collections::{BTreeMap, VecDeque};
use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::pin::Pin;
use std::task::{Context, Poll, Waker};

use bytes::{Buf as _, Bytes, BytesMut};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use crate::dice::Dice;
use crate::world::{self, Event, HostId, MICRO, MILLI, SECOND, World, digest};

/// Bytes written and not yet read at the other end: sockets' buffers on both sides.
const WINDOW: usize = 512 << 10;
/// The first retransmission of TCP, and the first of a connection request.
const RETRANSMIT: u64 = 200 * MILLI;
const SYN_RETRY: u64 = SECOND;
const SYN_RETRIES: u32 = 6;
/// Connections that wait to be accepted.
const BACKLOG: usize = 1024;
/// Bytes in a nanosecond times 1000: 1 Gbit/s.
const BANDWIDTH: u64 = 125;

/// What the network does next.
pub enum NetEvent {
    /// The next segment of a pipe arrives.
    Arrive { pipe: usize },
    /// The sender hears that so many bytes were taken.
    Taken { pipe: usize, bytes: usize },
    /// A connection request arrives.
    Ask { conn: usize, attempt: u32 },
    /// Its answer arrives.
    Answer { conn: usize, accepted: bool },
    /// One end hears that the connection is no more.
    Reset { conn: usize, side: usize },
    /// The sender of a pipe has waited long enough for the kernel at the other end to have taken what
    /// it knows as `stuck`.
    GiveUp { pipe: usize, stuck: Stuck },
}

/// Why nobody has told the sender that its data has arrived.
#[derive(Clone, Copy)]
pub enum Stuck {
    /// It has not: what was to arrive at this time is still on its way.
    Data { at: u64 },
    /// What tells it is lost.
    Answers,
    /// There is no kernel.
    Dead,
}

/// How a line between two hosts is, one way.
#[derive(Clone, Debug)]
pub struct Line {
    /// Nothing passes.
    pub cut: bool,
    /// Mean of the delay, nanoseconds.
    pub delay: u64,
    /// Chance in a million that a segment has to be sent again.
    pub loss: u64,
    waiting: Vec<usize>,
}

/// All of it.
pub struct Fabric {
    dice: Dice,
    lines: BTreeMap<(HostId, HostId), Line>,
    listeners: BTreeMap<(HostId, u16), Listening>,
    conns: Vec<Conn>,
    pipes: Vec<Pipe>,
    held: BTreeMap<usize, Vec<NetEvent>>,
    holds: usize,
    /// What has passed.
    pub counts: Counts,
}

/// What has passed.
#[derive(Clone, Copy, Debug, Default)]
pub struct Counts {
    /// Segments that arrived.
    pub segments: u64,
    /// Bytes in them.
    pub bytes: u64,
    /// Connections asked for.
    pub connections: u64,
    /// Resets told.
    pub resets: u64,
}

struct Listening {
    backlog: VecDeque<usize>,
    waker: Option<Waker>,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Phase {
    Asking,
    Refused,
    TimedOut,
    Open,
}

struct Conn {
    hosts: [HostId; 2],
    boots: [u64; 2],
    port: u16,
    phase: Phase,
    opening: Option<Waker>,
    reset: [bool; 2],
    /// The end was dropped by its program.
    closed: [bool; 2],
}

/// Pipe 2n carries from connection n's side 0 to side 1, pipe 2n+1 back.
#[derive(Default)]
struct Pipe {
    flight: VecDeque<(u64, Piece)>,
    last_at: u64,
    outstanding: usize,
    arrived: VecDeque<Bytes>,
    ended: bool,
    reader: Option<Waker>,
    writer: Option<Waker>,
    fin_sent: bool,
    written_at: u64,
}

enum Piece {
    Data(BytesMut),
    End,
}

impl Fabric {
    pub fn new(seed: u64) -> Self {
        Self {
            dice: Dice::new(seed, "network"),
            lines: BTreeMap::new(),
            listeners: BTreeMap::new(),
            conns: Vec::new(),
            pipes: Vec::new(),
            held: BTreeMap::new(),
            holds: 0,
            counts: Counts::default(),
        }
    }

    /// The line from one host to another.
    pub fn line(&mut self, from: HostId, to: HostId) -> &mut Line {
        let dice = &mut self.dice;
        self.lines.entry((from, to)).or_insert_with(|| Line {
            cut: false,
            delay: if from == to {
                15 * MICRO
            } else {
                dice.between(80 * MICRO, 700 * MICRO)
            },
            loss: 0,
            waiting: Vec::new(),
        })
    }

    fn delay(&mut self, from: HostId, to: HostId) -> u64 {
        let (mean, loss) = {
            let line = self.line(from, to);
            (line.delay, line.loss)
        };
        let mut delay = mean / 2 + self.dice.around(mean / 2);
        let mut again = RETRANSMIT;
        while self.dice.ppm(loss) && again < 10 * SECOND {
            delay += again;
            again *= 2;
        }
        delay
    }

    /// Connections that are open now at both ends.
    pub fn open(&self) -> Vec<usize> {
        (0..self.conns.len())
            .filter(|conn| {
                let conn = &self.conns[*conn];
                conn.phase == Phase::Open && conn.reset == [false; 2] && conn.closed == [false; 2]
            })
            .collect()
    }

    /// Whether the host is one of a connection's ends.
    pub fn is_end(&self, conn: usize, host: HostId) -> bool {
        self.conns[conn].hosts.contains(&host)
    }

    /// Bytes that were sent and not yet read.
    pub fn outstanding(&self) -> usize {
        self.pipes.iter().map(|pipe| pipe.outstanding).sum()
    }
}

/// The address of a host.
pub fn ip_of(host: HostId) -> IpAddr {
    let host = host as u32 + 1;
    IpAddr::V4(Ipv4Addr::from(
        u32::from(Ipv4Addr::new(10, 77, 0, 0)) + host,
    ))
}

fn host_of(world: &World, ip: IpAddr) -> Option<HostId> {
    (0..world.hosts.len()).find(|host| ip_of(*host) == ip)
}

impl World {
    /// Cuts or mends the line from one host to another. What waits at a cut goes on when it is mended.
    pub fn set_cut(&mut self, from: HostId, to: HostId, cut: bool) {
        let line = self.fabric.line(from, to);
        line.cut = cut;
        if cut {
            return;
        }
        for hold in std::mem::take(&mut line.waiting) {
            for event in self.fabric.held.remove(&hold).unwrap_or_default() {
                // Retransmissions have backed off by then.
                let at = self.now() + self.fabric.dice.below(2 * SECOND);
                self.schedule(at, Event::Net(event));
            }
        }
    }

    fn hold(&mut self, from: HostId, to: HostId, event: NetEvent) {
        let hold = self.fabric.holds;
        self.fabric.holds += 1;
        self.fabric.held.insert(hold, vec![event]);
        self.fabric.line(from, to).waiting.push(hold);
    }

    fn pass(&mut self, from: HostId, to: HostId, event: NetEvent) {
        let at = self.now() + self.fabric.delay(from, to);
        self.schedule(at, Event::Net(event));
    }

    /// The ends of a pipe: who writes, who reads.
    fn ends(&self, pipe: usize) -> (HostId, HostId) {
        let conn = &self.fabric.conns[pipe / 2];
        (conn.hosts[pipe % 2], conn.hosts[1 - pipe % 2])
    }

    /// Whether the program that had this end still runs.
    fn alive(&self, conn: usize, side: usize) -> bool {
        let conn = &self.fabric.conns[conn];
        let host = &self.hosts[conn.hosts[side]];
        host.up && host.boot == conn.boots[side]
    }

    /// Carries out an event of the network.
    pub fn net(&mut self, event: NetEvent) {
        match event {
            NetEvent::Arrive { pipe } => self.arrive(pipe),
            NetEvent::Taken { pipe, bytes } => {
                let (writer, reader) = self.ends(pipe);
                if self.fabric.line(reader, writer).cut {
                    return self.hold(reader, writer, NetEvent::Taken { pipe, bytes });
                }
                let state = &mut self.fabric.pipes[pipe];
                state.outstanding = state.outstanding.saturating_sub(bytes);
                if let Some(waker) = state.writer.take()
                    && self.alive(pipe / 2, pipe % 2)
                {
                    self.wake(writer, waker);
                }
            }
            NetEvent::Ask { conn, attempt } => self.ask(conn, attempt),
            NetEvent::Answer { conn, accepted } => {
                let [client, server] = self.fabric.conns[conn].hosts;
                if self.fabric.line(server, client).cut {
                    return self.hold(server, client, NetEvent::Answer { conn, accepted });
                }
                let state = &mut self.fabric.conns[conn];
                if state.phase == Phase::Asking {
                    state.phase = if accepted {
                        Phase::Open
                    } else {
                        Phase::Refused
                    };
                }
                self.opened(conn);
            }
            NetEvent::Reset { conn, side } => {
                let [at, from] = [side, 1 - side].map(|side| self.fabric.conns[conn].hosts[side]);
                if self.fabric.line(from, at).cut {
                    // Resets are not sent again; whoever writes next gets another.
                    return;
                }
                self.reset(conn, side);
            }
            NetEvent::GiveUp { pipe, stuck } => {
                let (from, to) = self.ends(pipe);
                let still = match stuck {
                    Stuck::Data { at } => {
                        let front = self.fabric.pipes[pipe].flight.front();
                        front.is_some_and(|(front, _)| *front == at)
                    }
                    Stuck::Answers => self.fabric.line(to, from).cut,
                    Stuck::Dead => true,
                };
                if still {
                    self.reset(pipe / 2, pipe % 2);
                }
            }
        }
    }

    fn may_give_up(&mut self, pipe: usize, stuck: Stuck) {
        let patience = u64::try_from(swarm_identity::UNACKNOWLEDGED_MAX.as_nanos());
        let at = self.now() + patience.unwrap_or(u64::MAX);
        self.schedule(at, Event::Net(NetEvent::GiveUp { pipe, stuck }));
    }

    fn opened(&mut self, conn: usize) {
        let waker = self.fabric.conns[conn].opening.take();
        if let Some(waker) = waker
            && self.alive(conn, 0)
        {
            self.wake(self.fabric.conns[conn].hosts[0], waker);
        }
    }

    fn ask(&mut self, conn: usize, attempt: u32) {
        let [client, server] = self.fabric.conns[conn].hosts;
        if !self.alive(conn, 0) || self.fabric.conns[conn].phase != Phase::Asking {
            return;
        }
        if self.fabric.line(client, server).cut || !self.hosts[server].powered {
            if attempt >= SYN_RETRIES {
                self.fabric.conns[conn].phase = Phase::TimedOut;
                return self.opened(conn);
            }
            let at = self.now() + (SYN_RETRY << attempt);
            let attempt = attempt + 1;
            return self.schedule(at, Event::Net(NetEvent::Ask { conn, attempt }));
        }
        let port = self.fabric.conns[conn].port;
        let accepted = match self.fabric.listeners.get_mut(&(server, port)) {
            Some(listening) if self.hosts[server].up && listening.backlog.len() < BACKLOG => {
                listening.backlog.push_back(conn);
                let waker = listening.waker.take();
                self.fabric.conns[conn].boots[1] = self.hosts[server].boot;
                if let Some(waker) = waker {
                    self.wake(server, waker);
                }
                true
            }
            _ => false,
        };
        self.trace(2, conn as u64, u64::from(accepted));
        self.pass(server, client, NetEvent::Answer { conn, accepted });
    }

    fn arrive(&mut self, pipe: usize) {
        let (conn, from_side, to_side) = (pipe / 2, pipe % 2, 1 - pipe % 2);
        let (from, to) = self.ends(pipe);
        let now = self.now();
        let at = match self.fabric.pipes[pipe].flight.front() {
            Some((at, _)) if *at <= now => *at,
            _ => return,
        };
        if self.fabric.line(from, to).cut {
            self.may_give_up(pipe, Stuck::Data { at });
            return self.hold(from, to, NetEvent::Arrive { pipe });
        }
        if self.fabric.conns[conn].reset[to_side] {
            return;
        }
        if !self.alive(conn, to_side) || self.fabric.conns[conn].closed[to_side] {
            // Nobody reads here any more: a kernel that runs says so, to each segment.
            self.fabric.pipes[pipe].flight.clear();
            if self.hosts[to].powered {
                let side = from_side;
                self.pass(to, from, NetEvent::Reset { conn, side });
            } else {
                self.may_give_up(pipe, Stuck::Dead);
            }
            return;
        }
        if self.fabric.line(to, from).cut {
            self.may_give_up(pipe, Stuck::Answers);
        }
        let mut words = (0, 0);
        let mut waker = None;
        while let Some((at, _)) = self.fabric.pipes[pipe].flight.front() {
            if *at > now {
                break;
            }
            let state = &mut self.fabric.pipes[pipe];
            match state.flight.pop_front() {
                Some((_, Piece::Data(data))) => {
                    words = (data.len() as u64, words.1 ^ digest(&data));
                    self.fabric.counts.segments += 1;
                    self.fabric.counts.bytes += data.len() as u64;
                    state.arrived.push_back(data.freeze());
                }
                Some((_, Piece::End)) => state.ended = true,
                None => {}
            }
            waker = state.reader.take().or(waker);
        }
        self.trace(1 << 32 | pipe as u64, words.0, words.1);
        if let Some(waker) = waker {
            self.wake(to, waker);
        }
        // Segments that waited together arrive one after the other.
        if let Some((at, _)) = self.fabric.pipes[pipe].flight.front() {
            let at = *at;
            self.schedule(at, Event::Net(NetEvent::Arrive { pipe }));
        }
    }

    /// One end hears that the connection is no more.
    pub fn reset(&mut self, conn: usize, side: usize) {
        if self.fabric.conns[conn].reset[side] || !self.alive(conn, side) {
            return;
        }
        self.fabric.counts.resets += 1;
        self.trace(3, conn as u64, side as u64);
        self.fabric.conns[conn].reset[side] = true;
        let host = self.fabric.conns[conn].hosts[side];
        let reader = self.fabric.pipes[2 * conn + 1 - side].reader.take();
        let writer = self.fabric.pipes[2 * conn + side].writer.take();
        for waker in reader.into_iter().chain(writer) {
            self.wake(host, waker);
        }
    }

    /// Breaks an open connection in mid-stream: what is on its way is lost, each end hears of it in its time.
    pub fn break_connection(&mut self, conn: usize) {
        let hosts = self.fabric.conns[conn].hosts;
        for side in [0, 1] {
            self.fabric.pipes[2 * conn + side].flight.clear();
            let (at, from) = (hosts[side], hosts[1 - side]);
            let when = self.now() + self.fabric.delay(from, at);
            self.schedule(when, Event::Net(NetEvent::Reset { conn, side }));
        }
    }

    /// The host's process has ended. A kernel that goes on resets its connections.
    pub fn host_ends(&mut self, host: HostId) {
        self.fabric.listeners.retain(|(at, _), _| *at != host);
        if !self.hosts[host].powered {
            return;
        }
        for conn in 0..self.fabric.conns.len() {
            let state = &self.fabric.conns[conn];
            for side in [0, 1] {
                let boot = self.hosts[host].boot;
                if state.hosts[side] == host
                    && state.boots[side] == boot
                    && !state.closed[side]
                    && matches!(state.phase, Phase::Open | Phase::Asking)
                {
                    let (peer, side) = (state.hosts[1 - side], 1 - side);
                    self.pass(host, peer, NetEvent::Reset { conn, side });
                    break;
                }
            }
        }
    }
}

/// One end of a stream.
#[derive(Debug)]
pub struct SimStream {
    conn: usize,
    side: usize,
}

impl SimStream {
    /// Connects the running host to an address.
    pub async fn connect(target: SocketAddr) -> io::Result<Self> {
        let conn = world::with(|world| {
            let client = world.running.expect("connecting on a host");
            let server = host_of(world, target.ip())
                .ok_or_else(|| io::Error::from(io::ErrorKind::HostUnreachable))?;
            let conn = world.fabric.conns.len();
            world.fabric.counts.connections += 1;
            let boot = world.hosts[client].boot;
            world.fabric.conns.push(Conn {
                hosts: [client, server],
                boots: [boot, 0],
                port: target.port(),
                phase: Phase::Asking,
                opening: None,
                reset: [false; 2],
                closed: [false; 2],
            });
            world.fabric.pipes.push(Pipe::default());
            world.fabric.pipes.push(Pipe::default());
            world.pass(client, server, NetEvent::Ask { conn, attempt: 0 });
            Ok::<_, io::Error>(conn)
        })?;
        let mut stream = Self { conn, side: 0 };
        std::future::poll_fn(|cx| stream.poll_open(cx)).await?;
        Ok(stream)
    }

    fn poll_open(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let waker = cx.waker().clone();
        let (answer, _old) = world::with(|world| {
            let conn = &mut world.fabric.conns[self.conn];
            match conn.phase {
                Phase::Asking => (Poll::Pending, conn.opening.replace(waker)),
                Phase::Refused => (
                    Poll::Ready(Err(io::ErrorKind::ConnectionRefused.into())),
                    None,
                ),
                Phase::TimedOut => (Poll::Ready(Err(io::ErrorKind::TimedOut.into())), None),
                Phase::Open => (Poll::Ready(Ok(())), None),
            }
        });
        answer
    }
}

impl AsyncRead for SimStream {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let waker = cx.waker().clone();
        let (answer, _old) = world::with(|world| {
            if world.fabric.conns[self.conn].reset[self.side] {
                return (
                    Poll::Ready(Err(io::ErrorKind::ConnectionReset.into())),
                    None,
                );
            }
            let index = 2 * self.conn + 1 - self.side;
            let pipe = &mut world.fabric.pipes[index];
            let before = buf.filled().len();
            while buf.remaining() > 0
                && let Some(front) = pipe.arrived.front_mut()
            {
                let part = front.len().min(buf.remaining());
                buf.put_slice(&front[..part]);
                front.advance(part);
                if front.is_empty() {
                    pipe.arrived.pop_front();
                }
            }
            let bytes = buf.filled().len() - before;
            if bytes > 0 {
                let (writer, reader) = world.ends(index);
                let pipe = &mut world.fabric.pipes[index];
                if pipe.writer.is_none() && pipe.outstanding < WINDOW / 2 {
                    // Nobody is near to waiting for room: when the sender hears of it changes nothing.
                    pipe.outstanding = pipe.outstanding.saturating_sub(bytes);
                } else {
                    world.pass(reader, writer, NetEvent::Taken { pipe: index, bytes });
                }
                return (Poll::Ready(Ok(())), None);
            }
            if pipe.ended || buf.remaining() == 0 {
                return (Poll::Ready(Ok(())), None);
            }
            (Poll::Pending, pipe.reader.replace(waker))
        });
        answer
    }
}

impl AsyncWrite for SimStream {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        data: &[u8],
    ) -> Poll<io::Result<usize>> {
        let waker = cx.waker().clone();
        let (answer, _old) = world::with(|world| {
            if world.fabric.conns[self.conn].reset[self.side] {
                return (
                    Poll::Ready(Err(io::ErrorKind::ConnectionReset.into())),
                    None,
                );
            }
            let index = 2 * self.conn + self.side;
            let pipe = &mut world.fabric.pipes[index];
            if pipe.fin_sent {
                return (Poll::Ready(Err(io::ErrorKind::BrokenPipe.into())), None);
            }
            let room = WINDOW.saturating_sub(pipe.outstanding);
            if room == 0 {
                return (Poll::Pending, pipe.writer.replace(waker));
            }
            let part = room.min(data.len());
            world.send(index, &data[..part]);
            (Poll::Ready(Ok(part)), None)
        });
        answer
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        world::with(|world| world.finish(2 * self.conn + self.side));
        Poll::Ready(Ok(()))
    }
}

impl World {
    fn send(&mut self, index: usize, data: &[u8]) {
        let now = self.now();
        let pipe = &mut self.fabric.pipes[index];
        pipe.outstanding += data.len();
        // What is written at one moment travels together.
        if pipe.written_at == now
            && let Some((_, Piece::Data(last))) = pipe.flight.back_mut()
        {
            last.extend_from_slice(data);
            return;
        }
        self.fly(index, Piece::Data(data.into()), data.len());
    }

    fn fly(&mut self, index: usize, piece: Piece, len: usize) {
        let now = self.now();
        let (from, to) = self.ends(index);
        let delay = self.fabric.delay(from, to) + len as u64 * 1000 / BANDWIDTH;
        let pipe = &mut self.fabric.pipes[index];
        let at = (now + delay).max(pipe.last_at + 1);
        pipe.last_at = at;
        pipe.written_at = now;
        let first = pipe.flight.is_empty();
        pipe.flight.push_back((at, piece));
        // Only the first has an event: each arrival schedules the next.
        if first {
            self.schedule(at, Event::Net(NetEvent::Arrive { pipe: index }));
        }
    }

    fn finish(&mut self, index: usize) {
        if !std::mem::replace(&mut self.fabric.pipes[index].fin_sent, true) {
            self.fly(index, Piece::End, 0);
        }
    }
}

impl Drop for SimStream {
    fn drop(&mut self) {
        if !world::exists() {
            return;
        }
        let _wakers = world::with(|world| {
            let conn = &mut world.fabric.conns[self.conn];
            conn.closed[self.side] = true;
            if conn.phase == Phase::Asking && self.side == 0 {
                conn.phase = Phase::TimedOut;
            }
            let open = conn.phase == Phase::Open || self.side == 1;
            // A process that is being killed has said nothing; its kernel does.
            if open && world.alive(self.conn, self.side) {
                world.finish(2 * self.conn + self.side);
            }
            let reading = &mut world.fabric.pipes[2 * self.conn + 1 - self.side];
            reading.arrived.clear();
            let reader = reading.reader.take();
            (
                reader,
                world.fabric.pipes[2 * self.conn + self.side].writer.take(),
            )
        });
    }
}

/// A port of the running host that is listened on.
#[derive(Debug)]
pub struct SimListener {
    host: HostId,
    boot: u64,
    addr: SocketAddr,
}

impl SimListener {
    /// Listens on the running host.
    pub fn listen(addr: SocketAddr) -> io::Result<Self> {
        world::with(|world| {
            let host = world.running.expect("listening on a host");
            let mut port = addr.port();
            while port == 0
                || (addr.port() == 0 && world.fabric.listeners.contains_key(&(host, port)))
            {
                port = world.fabric.dice.between(32_768, 60_999) as u16;
            }
            if world.fabric.listeners.contains_key(&(host, port)) {
                return Err(io::ErrorKind::AddrInUse.into());
            }
            let listening = Listening {
                backlog: VecDeque::new(),
                waker: None,
            };
            world.fabric.listeners.insert((host, port), listening);
            Ok(Self {
                host,
                boot: world.hosts[host].boot,
                addr: SocketAddr::new(ip_of(host), port),
            })
        })
    }

    /// Where it listens.
    pub fn local_addr(&self) -> SocketAddr {
        self.addr
    }

    /// The next connection.
    pub async fn accept(&self) -> (SimStream, SocketAddr) {
        std::future::poll_fn(|cx| {
            let waker = cx.waker().clone();
            let (answer, _old) = world::with(|world| {
                let key = (self.host, self.addr.port());
                let Some(listening) = world.fabric.listeners.get_mut(&key) else {
                    return (Poll::Pending, None);
                };
                match listening.backlog.pop_front() {
                    None => (Poll::Pending, listening.waker.replace(waker)),
                    Some(conn) => {
                        let client = world.fabric.conns[conn].hosts[0];
                        let port = 10_000 + (conn % 50_000) as u16;
                        let peer = SocketAddr::new(ip_of(client), port);
                        (Poll::Ready((SimStream { conn, side: 1 }, peer)), None)
                    }
                }
            });
            answer
        })
        .await
    }
}

impl Drop for SimListener {
    fn drop(&mut self) {
        if !world::exists() {
            return;
        }
        let _gone = world::with(|world| {
            if world.hosts[self.host].boot != self.boot {
                return None;
            }
            let gone = world
                .fabric
                .listeners
                .remove(&(self.host, self.addr.port()))?;
            for conn in &gone.backlog {
                let client = world.fabric.conns[*conn].hosts[0];
                let (conn, side) = (*conn, 0);
                world.pass(self.host, client, NetEvent::Reset { conn, side });
            }
            Some(gone)
        });
    }
}
