//! Asking other name servers, from the namespace that this process runs in.

use std::fs;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::PathBuf;
use std::time::{Duration, SystemTime};

use hickory_proto::op::{Message, MessageType, ResponseCode};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpStream, UdpSocket};
use tokio::time::timeout;

/// For one server's answer.
const PATIENCE: Duration = Duration::from_secs(2);
/// As resolv.conf(5): more are not asked.
const SERVERS_MAX: usize = 3;

/// The host's name servers, read again when their file changes.
#[derive(Debug)]
pub struct HostServers {
    path: PathBuf,
    seen: Option<(SystemTime, u64)>,
    servers: Vec<IpAddr>,
}

impl HostServers {
    /// From that file.
    pub fn new(path: PathBuf) -> Self {
        Self {
            path,
            seen: None,
            servers: Vec::new(),
        }
    }

    /// Those of now.
    pub fn get(&mut self) -> Vec<IpAddr> {
        let now = fs::metadata(&self.path)
            .and_then(|meta| Ok((meta.modified()?, meta.len())))
            .ok();
        if now.is_none() || now != self.seen {
            self.servers = fs::read_to_string(&self.path)
                .map(|text| parse(&text))
                .unwrap_or_default();
            self.seen = now;
        }
        self.servers.clone()
    }
}

/// The servers of a resolv.conf.
pub fn parse(text: &str) -> Vec<IpAddr> {
    text.lines()
        .filter_map(|line| {
            let mut words = line.split_ascii_whitespace();
            (words.next()? == "nameserver")
                .then(|| words.next()?.parse().ok())
                .flatten()
        })
        .take(SERVERS_MAX)
        .collect()
}

/// Asks the servers one after the other; `packet` is the asker's, and the answer carries its number again.
/// `None`: nobody answered.
pub async fn ask(
    packet: &[u8],
    query: &Message,
    servers: &[IpAddr],
    over_tcp: bool,
) -> Option<Vec<u8>> {
    let mut refused = None;
    // A packet may be lost: who has one server only, asks it twice.
    let again = if servers.len() == 1 && !over_tcp {
        2
    } else {
        1
    };
    for server in servers.iter().cycle().take(servers.len() * again) {
        let server = SocketAddr::new(*server, 53);
        let attempt = async {
            if over_tcp {
                ask_tcp(packet, query, server).await
            } else {
                ask_udp(packet, query, server).await
            }
        };
        match timeout(PATIENCE, attempt).await {
            Ok(Ok((answer, code))) => {
                if !matches!(code, ResponseCode::ServFail | ResponseCode::Refused) {
                    return Some(answer);
                }
                refused = Some(answer);
            }
            Ok(Err(error)) => tracing::debug!(%server, %error, "name server"),
            Err(_) => tracing::debug!(%server, "name server does not answer"),
        }
    }
    refused
}

/// With an own random number, so that nobody can guess it and answer in the server's place.
fn renumbered(packet: &[u8]) -> (Vec<u8>, [u8; 2]) {
    let id: [u8; 2] = rand::random();
    let mut packet = packet.to_vec();
    packet[..2].copy_from_slice(&id);
    (packet, id)
}

/// The answer with the asker's number, if it answers this question.
pub fn accept(
    mut answer: Vec<u8>,
    id: [u8; 2],
    packet: &[u8],
    query: &Message,
) -> Option<(Vec<u8>, ResponseCode)> {
    let message = Message::from_vec(&answer).ok()?;
    let is_answer = message.metadata.message_type == MessageType::Response;
    if !is_answer || answer[..2] != id || message.queries != query.queries {
        return None;
    }
    answer[..2].copy_from_slice(&packet[..2]);
    Some((answer, message.metadata.response_code))
}

async fn ask_udp(
    packet: &[u8],
    query: &Message,
    server: SocketAddr,
) -> std::io::Result<(Vec<u8>, ResponseCode)> {
    let from: IpAddr = if server.is_ipv4() {
        Ipv4Addr::UNSPECIFIED.into()
    } else {
        Ipv6Addr::UNSPECIFIED.into()
    };
    let socket = UdpSocket::bind((from, 0)).await?;
    socket.connect(server).await?;
    let (renumbered, id) = renumbered(packet);
    socket.send(&renumbered).await?;
    let mut buffer = vec![0; 4096];
    loop {
        let length = socket.recv(&mut buffer).await?;
        if let Some(answer) = accept(buffer[..length].to_vec(), id, packet, query) {
            return Ok(answer);
        }
    }
}

async fn ask_tcp(
    packet: &[u8],
    query: &Message,
    server: SocketAddr,
) -> std::io::Result<(Vec<u8>, ResponseCode)> {
    let mut stream = TcpStream::connect(server).await?;
    let (renumbered, id) = renumbered(packet);
    let mut frame = (renumbered.len() as u16).to_be_bytes().to_vec();
    frame.extend(renumbered);
    stream.write_all(&frame).await?;
    let length = stream.read_u16().await?;
    let mut answer = vec![0; usize::from(length)];
    stream.read_exact(&mut answer).await?;
    accept(answer, id, packet, query)
        .ok_or_else(|| std::io::Error::other("an answer to another question"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_question_is_no_answer() {
        let mut query = Message::query();
        query.add_query(hickory_proto::op::Query::query(
            hickory_proto::rr::Name::from_ascii("a.example.").unwrap(),
            hickory_proto::rr::RecordType::A,
        ));
        let packet = query.to_vec().unwrap();
        let id = [packet[0], packet[1]];
        assert!(accept(packet.clone(), id, &packet, &query).is_none());
        let mut answer = packet.clone();
        answer[2] |= 0x80;
        assert!(accept(answer, id, &packet, &query).is_some());
    }

    #[test]
    fn servers_are_read_from_the_file() {
        let text = "# x\nsearch a\nnameserver 192.0.2.1\nnameserver nonsense\n nameserver ::1\n";
        assert_eq!(
            parse(text),
            [
                "192.0.2.1".parse::<IpAddr>().unwrap(),
                "::1".parse().unwrap()
            ]
        );
    }
}
