//! Netlink: messages written into and read from plain bytes, and a blocking socket.
//!
//! The kernel answers a request while it is sent, so nothing here waits for
//! anyone else; callers still run on threads that may block, since a commit
//! can take some ten milliseconds. A socket belongs to the network namespace of the
//! thread that opened it, for good. Never trusts a length that it reads.

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

/// `NLM_F_REQUEST`
const REQUEST: u16 = 1;
/// `NLM_F_ACK`
pub const ACK: u16 = 4;
/// `NLM_F_DUMP`
pub const DUMP: u16 = 0x300;
/// `NLM_F_REPLACE`
pub const REPLACE: u16 = 0x100;
/// `NLM_F_EXCL`
pub const EXCL: u16 = 0x200;
/// `NLM_F_CREATE`
pub const CREATE: u16 = 0x400;
/// `NLM_F_APPEND`
pub const APPEND: u16 = 0x800;
/// `NLMSG_ERROR`
const ERROR: u16 = 2;
/// `NLMSG_DONE`
const DONE: u16 = 3;
const HEADER: usize = 16;
const NESTED: u16 = 0x8000;

const fn align(length: usize) -> usize {
    (length + 3) & !3
}

/// One or several requests being written.
#[derive(Clone, Debug, Default)]
pub struct Request {
    bytes: Vec<u8>,
    start: usize,
    count: u32,
}

impl Request {
    /// Begins the next message: the header, then the family's fixed part.
    pub fn message(&mut self, kind: u16, flags: u16, fixed: &[u8]) -> &mut Self {
        self.start = self.bytes.len();
        self.count += 1;
        self.bytes.extend_from_slice(&0u32.to_ne_bytes());
        self.bytes.extend_from_slice(&kind.to_ne_bytes());
        self.bytes
            .extend_from_slice(&(flags | REQUEST).to_ne_bytes());
        self.bytes.extend_from_slice(&self.count.to_ne_bytes());
        self.bytes.extend_from_slice(&0u32.to_ne_bytes());
        self.raw(fixed)
    }

    fn raw(&mut self, data: &[u8]) -> &mut Self {
        self.bytes.extend_from_slice(data);
        self.bytes.resize(align(self.bytes.len()), 0);
        let length = (self.bytes.len() - self.start) as u32;
        self.bytes[self.start..self.start + 4].copy_from_slice(&length.to_ne_bytes());
        self
    }

    /// An attribute.
    pub fn attr(&mut self, kind: u16, data: &[u8]) -> &mut Self {
        let length = (data.len() + 4) as u16;
        self.bytes.extend_from_slice(&length.to_ne_bytes());
        self.bytes.extend_from_slice(&kind.to_ne_bytes());
        self.raw(data)
    }

    /// An attribute holding a text, ended by a zero byte.
    pub fn text(&mut self, kind: u16, text: &str) -> &mut Self {
        let mut data = text.as_bytes().to_vec();
        data.push(0);
        self.attr(kind, &data)
    }

    /// A number in the machine's byte order (routing).
    pub fn u32(&mut self, kind: u16, value: u32) -> &mut Self {
        self.attr(kind, &value.to_ne_bytes())
    }

    /// A number in network byte order (nftables).
    pub fn be32(&mut self, kind: u16, value: u32) -> &mut Self {
        self.attr(kind, &value.to_be_bytes())
    }

    /// One byte.
    pub fn u8(&mut self, kind: u16, value: u8) -> &mut Self {
        self.attr(kind, &[value])
    }

    /// Attributes inside an attribute.
    pub fn nest(&mut self, kind: u16, inside: impl FnOnce(&mut Self)) -> &mut Self {
        self.nest_after(kind, &[], inside)
    }

    /// Attributes inside an attribute, after a fixed part.
    pub fn nest_after(
        &mut self,
        kind: u16,
        fixed: &[u8],
        inside: impl FnOnce(&mut Self),
    ) -> &mut Self {
        let at = self.bytes.len();
        self.attr(kind | NESTED, fixed);
        inside(self);
        let length = (self.bytes.len() - at) as u16;
        self.bytes[at..at + 2].copy_from_slice(&length.to_ne_bytes());
        self
    }

    /// What has been written.
    #[cfg(feature = "fuzzing")]
    #[must_use]
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// How many messages have been begun.
    #[must_use]
    pub fn messages(&self) -> u32 {
        self.count
    }
}

/// A message as received.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Reply<'a> {
    /// `nlmsg_type`
    pub kind: u16,
    /// `nlmsg_seq`
    pub sequence: u32,
    /// After the header.
    pub payload: &'a [u8],
}

/// Cuts a datagram into messages; stops at the first that makes no sense.
pub fn replies(mut bytes: &[u8]) -> impl Iterator<Item = Reply<'_>> {
    std::iter::from_fn(move || {
        let length = u32::from_ne_bytes(bytes.get(..4)?.try_into().ok()?) as usize;
        if length < HEADER || length > bytes.len() {
            return None;
        }
        let reply = Reply {
            kind: u16::from_ne_bytes(bytes[4..6].try_into().ok()?),
            sequence: u32::from_ne_bytes(bytes[8..12].try_into().ok()?),
            payload: &bytes[HEADER..length],
        };
        bytes = bytes.get(align(length)..).unwrap_or_default();
        Some(reply)
    })
}

/// Cuts a payload into attributes (kind without flag bits, data); stops at the first that makes no sense.
pub fn attributes(mut bytes: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    std::iter::from_fn(move || {
        let length = u16::from_ne_bytes(bytes.get(..2)?.try_into().ok()?) as usize;
        let kind = u16::from_ne_bytes(bytes.get(2..4)?.try_into().ok()?) & 0x3fff;
        if length < 4 || length > bytes.len() {
            return None;
        }
        let data = &bytes[4..length];
        bytes = bytes.get(align(length)..).unwrap_or_default();
        Some((kind, data))
    })
}

/// The first attribute of a kind.
#[must_use]
pub fn attribute(bytes: &[u8], wanted: u16) -> Option<&[u8]> {
    attributes(bytes)
        .find(|(kind, _)| *kind == wanted)
        .map(|(_, data)| data)
}

/// A text attribute without its closing zero.
#[must_use]
pub fn as_text(data: &[u8]) -> String {
    let end = data.iter().position(|&b| b == 0).unwrap_or(data.len());
    String::from_utf8_lossy(&data[..end]).into_owned()
}

/// A number in the machine's byte order.
#[must_use]
pub fn as_u32(data: &[u8]) -> Option<u32> {
    Some(u32::from_ne_bytes(data.get(..4)?.try_into().ok()?))
}

/// A socket to one netlink family in one namespace.
#[derive(Debug)]
pub struct Socket {
    fd: OwnedFd,
}

impl Socket {
    /// Opens one in the calling thread's network namespace. `protocol` is `libc::NETLINK_ROUTE` or `NETLINK_NETFILTER`.
    pub fn open(protocol: i32) -> io::Result<Self> {
        // SAFETY: plain system call; the descriptor it returns is owned by nobody else.
        let fd = unsafe {
            let raw = libc::socket(
                libc::AF_NETLINK,
                libc::SOCK_RAW | libc::SOCK_CLOEXEC,
                protocol,
            );
            if raw < 0 {
                return Err(io::Error::last_os_error());
            }
            OwnedFd::from_raw_fd(raw)
        };
        let socket = Self { fd };
        // Big batches need room; without the privilege the default has to do.
        for option in [libc::SO_SNDBUFFORCE, libc::SO_RCVBUFFORCE] {
            socket.option(libc::SOL_SOCKET, option, 8 << 20);
        }
        // The kernel must not copy our request into its error messages.
        socket.option(libc::SOL_NETLINK, libc::NETLINK_CAP_ACK, 1);
        socket.option(libc::SOL_NETLINK, libc::NETLINK_EXT_ACK, 1);
        // A lost answer must end in an error, not in a thread that hangs.
        let limit = libc::timeval {
            tv_sec: 10,
            tv_usec: 0,
        };
        // SAFETY: the pointer and length describe `limit`, which lives across the call.
        unsafe {
            libc::setsockopt(
                socket.fd.as_raw_fd(),
                libc::SOL_SOCKET,
                libc::SO_RCVTIMEO,
                (&raw const limit).cast(),
                size_of::<libc::timeval>() as u32,
            );
        }
        Ok(socket)
    }

    fn option(&self, level: i32, option: i32, value: i32) {
        // SAFETY: the pointer and length describe `value`, which lives across the call.
        unsafe {
            libc::setsockopt(
                self.fd.as_raw_fd(),
                level,
                option,
                (&raw const value).cast(),
                size_of::<i32>() as u32,
            );
        }
    }

    /// Sends; hands every answer that is not an acknowledgement to `take`; returns once `acks`
    /// acknowledgements or the end of a dump have come. The first error of the kernel is the result.
    fn exchange(
        &self,
        request: &Request,
        acks: u32,
        mut take: impl FnMut(Reply<'_>),
    ) -> io::Result<()> {
        // SAFETY: the pointer and length describe the request's bytes.
        let sent = unsafe {
            libc::send(
                self.fd.as_raw_fd(),
                request.bytes.as_ptr().cast(),
                request.bytes.len(),
                0,
            )
        };
        if sent < 0 {
            return Err(io::Error::last_os_error());
        }
        let mut buffer = vec![0u8; 64 << 10];
        let mut left = acks;
        loop {
            // SAFETY: the pointer and length describe `buffer`, which outlives the call.
            let got = unsafe {
                libc::recv(
                    self.fd.as_raw_fd(),
                    buffer.as_mut_ptr().cast(),
                    buffer.len(),
                    0,
                )
            };
            if got < 0 {
                let error = io::Error::last_os_error();
                if error.kind() == io::ErrorKind::Interrupted {
                    continue;
                }
                return Err(error);
            }
            for reply in replies(&buffer[..got as usize]) {
                match reply.kind {
                    ERROR => {
                        let code = reply
                            .payload
                            .get(..4)
                            .and_then(|b| Some(i32::from_ne_bytes(b.try_into().ok()?)))
                            .unwrap_or(-libc::EBADMSG);
                        if code != 0 {
                            self.drain();
                            return Err(kernel_error(code, reply.payload));
                        }
                        left = left.saturating_sub(1);
                        if left == 0 {
                            return Ok(());
                        }
                    }
                    DONE => return Ok(()),
                    _ => take(reply),
                }
            }
        }
    }

    /// Throws away what is still queued after an error, so that the next request finds an empty queue.
    fn drain(&self) {
        let mut buffer = [0u8; 4096];
        loop {
            // SAFETY: the pointer and length describe `buffer`, which outlives the call.
            let got = unsafe {
                libc::recv(
                    self.fd.as_raw_fd(),
                    buffer.as_mut_ptr().cast(),
                    buffer.len(),
                    libc::MSG_DONTWAIT,
                )
            };
            if got <= 0 {
                return;
            }
        }
    }

    /// Sends one request that ends in an acknowledgement.
    pub fn call(&self, request: &Request) -> io::Result<()> {
        self.exchange(request, 1, |_| {})
    }

    /// Sends a batch of which `acks` messages ask for an acknowledgement.
    pub fn batch(&self, request: &Request, acks: u32) -> io::Result<()> {
        self.exchange(request, acks, |_| {})
    }

    /// Sends one request and collects what `parse` makes of the answers.
    pub fn dump<T>(
        &self,
        request: &Request,
        mut parse: impl FnMut(&[u8]) -> Option<T>,
    ) -> io::Result<Vec<T>> {
        let mut found = Vec::new();
        self.exchange(request, 1, |reply| found.extend(parse(reply.payload)))?;
        Ok(found)
    }
}

/// The kernel's own sentence when it gives one, else the error's.
pub(super) fn kernel_error(code: i32, payload: &[u8]) -> io::Error {
    const ERRMSG_TEXT: u16 = 1;
    let error = io::Error::from_raw_os_error(-code);
    let extended = payload.get(4 + HEADER..).unwrap_or_default();
    match attribute(extended, ERRMSG_TEXT) {
        Some(text) => io::Error::new(
            error.kind(),
            Refusal {
                code: -code,
                text: as_text(text),
            },
        ),
        None => error,
    }
}

/// An error code with the kernel's explanation.
#[derive(Debug)]
struct Refusal {
    code: i32,
    text: String,
}

impl std::fmt::Display for Refusal {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "{} ({})",
            io::Error::from_raw_os_error(self.code),
            self.text
        )
    }
}

impl std::error::Error for Refusal {}

/// The kernel's error code, also inside an error with its explanation.
#[must_use]
pub fn code(error: &io::Error) -> Option<i32> {
    error.raw_os_error().or_else(|| {
        error
            .get_ref()
            .and_then(|inner| inner.downcast_ref::<Refusal>())
            .map(|refusal| refusal.code)
    })
}

/// Removing what is already gone is success.
pub fn ignore_gone(result: io::Result<()>) -> io::Result<()> {
    match result {
        Err(error)
            if matches!(
                code(&error),
                Some(libc::ENOENT | libc::ENODEV | libc::ESRCH | libc::EADDRNOTAVAIL)
            ) =>
        {
            Ok(())
        }
        other => other,
    }
}

/// Making what is already there is success.
pub fn ignore_exists(result: io::Result<()>) -> io::Result<()> {
    match result {
        Err(error) if code(&error) == Some(libc::EEXIST) => Ok(()),
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_written_message_reads_back() {
        let mut request = Request::default();
        request
            .message(16, CREATE, &[7; 6])
            .text(3, "eth0")
            .nest(18, |inner| {
                inner.u32(1, 99);
            });
        let all: Vec<_> = replies(&request.bytes).collect();
        assert_eq!(all.len(), 1);
        let body = &all[0].payload[8..];
        assert_eq!(as_text(attribute(body, 3).unwrap()), "eth0");
        let inner = attribute(body, 18).unwrap();
        assert_eq!(attribute(inner, 1).and_then(as_u32), Some(99));
    }

    proptest! {
        #[test]
        fn garbage_is_read_without_a_panic(bytes in proptest::collection::vec(any::<u8>(), 0..256)) {
            for reply in replies(&bytes) {
                for (_, data) in attributes(reply.payload) {
                    let _ = (as_u32(data), as_text(data));
                }
                let _ = kernel_error(-1, reply.payload);
            }
            let _ = attributes(&bytes).count();
        }
    }
}
