//! One connection: the handshake, output and input buffers, and the frames in them.

use std::io;
use std::net::{SocketAddr, TcpStream};
use std::os::fd::{AsFd, BorrowedFd};
use std::time::{Duration, Instant};

use afterimage_wire::Status;
use afterimage_wire::proto::header::MAX_HANDSHAKE_BODY;
use afterimage_wire::proto::{Frame, FrameError, HEADER_LEN, Header, Hello, Message, Welcome};

use crate::address::Login;
use crate::address::{Introduction, Peer};
use crate::channel::{Channel, Lost, Wait};
use crate::dialect::Dialect;
use crate::dialect::http::{self, Response};
use crate::dialect::replies::{Reply, cut, status as status_of};
use crate::error::BenchError;

/// The largest accepted body of a reply: more than the longest error text. A longer one means that
/// the server is broken.
const MAX_REPLY_BODY: u32 = 4096;

/// The longest accepted introduction; the one of Redis has about two thousand bytes.
const MAX_INTRODUCTION: usize = 64 << 10;

/// The size of a read: enough for thousands of replies, and within the L2 cache.
const INPUT_LEN: usize = 128 << 10;

const _: () = assert!(INPUT_LEN > HEADER_LEN + MAX_REPLY_BODY as usize);
const _: () = assert!(INPUT_LEN > HEADER_LEN + MAX_HANDSHAKE_BODY as usize);
const _: () = assert!(INPUT_LEN > MAX_INTRODUCTION);

/// The longest blocking read. Time limits take effect this late.
const TICK: Duration = Duration::from_millis(50);

/// The limit for a document of an HTTP server.
const DOCUMENT_TIMEOUT: Duration = Duration::from_secs(10);

/// A connection after its handshake.
#[derive(Debug)]
pub(crate) struct Connection {
    channel: Channel,
    /// Encoded and not yet taken by the kernel: `output[output_at..]`.
    pub(crate) output: Vec<u8>,
    output_at: usize,
    input: Vec<u8>,
    input_start: usize,
    input_end: usize,
}

impl Connection {
    /// Connects and exchanges introductions, within `timeout` for each step.
    pub(crate) fn open(peer: Peer<'_>) -> Result<(Self, Introduction), BenchError> {
        let Peer { addr, dialect, token, login, tls, timeout } = peer;
        let failed = |source| BenchError::Connect { addr, source };
        let stream = TcpStream::connect_timeout(&addr, timeout).map_err(failed)?;
        stream.set_nodelay(true).map_err(failed)?;
        stream.set_read_timeout(Some(timeout)).map_err(failed)?;
        stream.set_write_timeout(Some(timeout)).map_err(failed)?;
        let channel = Channel::new(stream, tls).map_err(failed)?;
        let mut connection = Connection {
            channel,
            output: Vec::new(),
            output_at: 0,
            input: vec![0; INPUT_LEN],
            input_start: 0,
            input_end: 0,
        };
        let introduction = match dialect {
            Dialect::Wire => Introduction::Welcome(connection.hello(addr, token)?),
            Dialect::Echo => Introduction::Name("echo".into()),
            Dialect::Http => Introduction::Model("HTTP server".into()),
            Dialect::Redis => Introduction::Name(connection.redis_version(addr, token, login)?),
            Dialect::Memcached | Dialect::MemcachedMeta => {
                Introduction::Name(connection.memcached_version(addr)?)
            }
        };
        connection.channel.stream.set_read_timeout(Some(TICK)).map_err(failed)?;
        Ok((connection, introduction))
    }

    fn hello(&mut self, addr: SocketAddr, token: &[u8]) -> Result<Welcome, BenchError> {
        Message::Hello(Hello::new(token)).encode(0, &mut self.output);
        self.say(addr)?;
        loop {
            self.hear(addr)?;
            let bytes = &self.input[..self.input_end];
            let frame = Frame::decode(bytes, MAX_HANDSHAKE_BODY)
                .map_err(|error| BenchError::frame(addr, error))?;
            let Some(frame) = frame else { continue };
            match Message::decode(frame).map_err(|error| BenchError::body(addr, error))? {
                Message::Welcome(welcome) => {
                    self.input_start = frame.header.frame_len();
                    return Ok(welcome);
                }
                Message::Error { status, text, .. } => {
                    return Err(BenchError::Refused { addr, status, text: text.to_owned() });
                }
                _ => {
                    let what = format!("a {} where a Welcome belongs", frame.header.kind.name());
                    return Err(BenchError::Protocol { addr, what });
                }
            }
        }
    }

    /// Logs in to Redis, selects the database, and reads the version.
    fn redis_version(
        &mut self,
        addr: SocketAddr,
        token: &[u8],
        login: &Login,
    ) -> Result<String, BenchError> {
        let protocol = |what: String| BenchError::Protocol { addr, what };
        let Login { user, database } = login;
        if !token.is_empty() || !user.is_empty() {
            let named = [&b"AUTH"[..], user.as_bytes(), token];
            let line = match user.is_empty() {
                true => self.redis_command(addr, &[b"AUTH", token])?,
                false => self.redis_command(addr, &named)?,
            };
            if line != "+OK" {
                // A server without AUTH repeats the arguments in its error.
                let secret = String::from_utf8_lossy(token);
                let text = if secret.is_empty() { line } else { line.replace(&*secret, "***") };
                return Err(BenchError::Refused { addr, status: Status::Unauthenticated, text });
            }
        }
        if *database > 0 {
            let line = self.redis_command(addr, &[b"SELECT", database.to_string().as_bytes()])?;
            if line != "+OK" {
                let (status, text) = (status_of(line.trim_start_matches('-').as_bytes()), line);
                return Err(BenchError::Refused { addr, status, text });
            }
        }
        self.output.extend_from_slice(b"*2\r\n$4\r\nINFO\r\n$6\r\nserver\r\n");
        self.say(addr)?;
        let head = self.line(addr)?;
        if head.starts_with("-NOAUTH") {
            let (status, text) = (Status::Unauthenticated, head);
            return Err(BenchError::Refused { addr, status, text });
        }
        let len = head.strip_prefix('$').and_then(|len| len.parse::<usize>().ok());
        let Some(len) = len.filter(|&len| len < MAX_INTRODUCTION) else {
            return Err(protocol(format!("{head:?} where INFO's answer belongs")));
        };
        while self.input_end - self.input_start < len + 2 {
            self.hear(addr)?;
        }
        let info = String::from_utf8_lossy(&self.input[self.input_start..][..len]).into_owned();
        self.input_start += len + 2;
        let field = |name: &str| info.lines().find_map(|line| line.strip_prefix(name));
        let version = field("valkey_version:").map(|version| format!("valkey {version}"));
        let version = version.or_else(|| Some(format!("redis {}", field("redis_version:")?)));
        version.ok_or_else(|| protocol("INFO names no version".into()))
    }

    /// Sends a command and returns the first line of its reply.
    fn redis_command(&mut self, addr: SocketAddr, parts: &[&[u8]]) -> Result<String, BenchError> {
        self.output.extend(format!("*{}\r\n", parts.len()).bytes());
        for part in parts {
            self.output.extend(format!("${}\r\n", part.len()).bytes());
            self.output.extend_from_slice(part);
            self.output.extend_from_slice(b"\r\n");
        }
        self.say(addr)?;
        self.line(addr)
    }

    fn memcached_version(&mut self, addr: SocketAddr) -> Result<String, BenchError> {
        self.output.extend_from_slice(b"version\r\n");
        self.say(addr)?;
        let line = self.line(addr)?;
        match line.strip_prefix("VERSION ") {
            Some(version) => Ok(format!("memcached {version}")),
            None => Err(BenchError::Protocol { addr, what: format!("{line:?} for a VERSION") }),
        }
    }

    /// Hands all of the output to the kernel.
    fn say(&mut self, addr: SocketAddr) -> Result<(), BenchError> {
        let failed = |source| BenchError::Connect { addr, source };
        self.flush().map_err(|lost| failed(lost.into_io()))?;
        match self.has_output() {
            // A new connection takes far more than a handshake at once.
            true => Err(failed(io::ErrorKind::WriteZero.into())),
            false => Ok(()),
        }
    }

    /// Waits for bytes.
    fn hear(&mut self, addr: SocketAddr) -> Result<(), BenchError> {
        let failed = |source| BenchError::Connect { addr, source };
        match self.receive(Wait::Some).map_err(|lost| failed(lost.into_io()))? {
            0 => Err(failed(io::ErrorKind::TimedOut.into())),
            _ => Ok(()),
        }
    }

    /// Waits for a line and returns it.
    fn line(&mut self, addr: SocketAddr) -> Result<String, BenchError> {
        loop {
            let unread = &self.input[self.input_start..self.input_end];
            if let Some(end) = unread.iter().position(|&byte| byte == b'\n') {
                let line = String::from_utf8_lossy(&unread[..end]).trim_end().to_owned();
                self.input_start += end + 1;
                return Ok(line);
            }
            if unread.len() > MAX_INTRODUCTION {
                let what = "a line without an end".into();
                return Err(BenchError::Protocol { addr, what });
            }
            self.hear(addr)?;
        }
    }

    /// Whether bytes wait for the kernel to take them.
    pub(crate) fn has_output(&self) -> bool {
        self.output_at < self.output.len() || self.channel.keeps()
    }

    /// Hands the output to the kernel, as much as it takes without waiting.
    pub(crate) fn flush(&mut self) -> Result<(), Lost> {
        while self.has_output() {
            let rest = &self.output[self.output_at..];
            let sent = if rest.is_empty() {
                self.channel.flush().map(|()| 0)
            } else {
                self.channel.send(rest)
            };
            match sent {
                Ok(sent) => self.output_at += sent,
                Err(Lost::Io(error)) => match error.kind() {
                    io::ErrorKind::WouldBlock => return Ok(()),
                    io::ErrorKind::Interrupted => {}
                    _ => return Err(error.into()),
                },
                Err(lost) => return Err(lost),
            }
        }
        self.output.clear();
        self.output_at = 0;
        Ok(())
    }

    /// Reads once. Returns the number of bytes: 0 for none yet.
    pub(crate) fn receive(&mut self, wait: Wait) -> Result<usize, Lost> {
        if self.input_start > 0 {
            // The rest is a part of one frame.
            self.input.copy_within(self.input_start..self.input_end, 0);
            self.input_end -= self.input_start;
            self.input_start = 0;
        }
        if self.input_end == self.input.len() {
            // Only a response of HTTP is as long: other replies have a limit below the buffer.
            self.input.resize(2 * self.input_end, 0);
        }
        match self.channel.recv(&mut self.input[self.input_end..], wait) {
            Ok(0) => Err(Lost::Closed),
            Ok(len) => {
                self.input_end += len;
                Ok(len)
            }
            Err(Lost::Io(error)) => match error.kind() {
                io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted => Ok(0),
                _ => Err(error.into()),
            },
            Err(lost) => Err(lost),
        }
    }

    /// Passes every whole frame that has been received to `each`, in place.
    ///
    /// Header and body go separately, in registers: a [`Frame`] handed through memory cost a third
    /// of the time of a small reply.
    #[inline]
    pub(crate) fn frames(&mut self, mut each: impl FnMut(Header, &[u8])) -> Result<(), Lost> {
        let mut rest = &self.input[self.input_start..self.input_end];
        while let Some(header) = Header::decode(rest) {
            if header.body_len > MAX_REPLY_BODY {
                return Err(FrameError::TooLarge { header, limit: MAX_REPLY_BODY }.into());
            }
            let Some((frame, behind)) = rest.split_at_checked(header.frame_len()) else {
                break;
            };
            rest = behind;
            each(header, &frame[HEADER_LEN..]);
        }
        self.input_start = self.input_end - rest.len();
        Ok(())
    }

    /// Passes every whole response of an HTTP server to `each`.
    pub(crate) fn responses(&mut self, mut each: impl FnMut(Response<'_>)) -> Result<(), Lost> {
        let mut rest = &self.input[self.input_start..self.input_end];
        while let Some((response, len)) = http::cut(rest).map_err(Lost::Senseless)? {
            rest = &rest[len..];
            each(response);
        }
        self.input_start = self.input_end - rest.len();
        Ok(())
    }

    /// Asks an HTTP server for a document. Returns the document.
    pub(crate) fn get(
        &mut self,
        addr: SocketAddr,
        host: &str,
        path: &str,
    ) -> Result<Vec<u8>, BenchError> {
        let request =
            format!("GET {path} HTTP/1.1\r\nHost: {host}\r\nAccept: application/json\r\n\r\n");
        self.output.extend_from_slice(request.as_bytes());
        self.say(addr)?;
        let deadline = Instant::now() + DOCUMENT_TIMEOUT;
        let mut found = None;
        while found.is_none() {
            match self.receive(Wait::Some) {
                Ok(0) if Instant::now() > deadline => {
                    return Err(BenchError::Connect {
                        addr,
                        source: io::ErrorKind::TimedOut.into(),
                    });
                }
                Ok(_) => {}
                Err(lost) => return Err(BenchError::Connect { addr, source: lost.into_io() }),
            }
            let responses = self.responses(|response| {
                found = Some((response.code, response.body.into_owned()));
            });
            responses.map_err(|lost| BenchError::Protocol { addr, what: lost.to_string() })?;
        }
        match found {
            Some((200, body)) => Ok(body),
            Some((code, body)) => {
                let text = String::from_utf8_lossy(&body[..body.len().min(200)]).into_owned();
                Err(BenchError::Refused {
                    addr,
                    status: http::status(code),
                    text: format!("GET {path}: {code} {text}"),
                })
            }
            None => unreachable!("the loop ends with a response"),
        }
    }

    /// Passes every whole reply of a server that answers in order to `each`.
    #[inline]
    pub(crate) fn replies(
        &mut self,
        dialect: Dialect,
        mut each: impl FnMut(Reply<'_>),
    ) -> Result<(), Lost> {
        let mut rest = &self.input[self.input_start..self.input_end];
        while let Some((reply, len)) = cut(dialect, rest).map_err(Lost::Senseless)? {
            rest = &rest[len..];
            each(reply);
        }
        self.input_start = self.input_end - rest.len();
        Ok(())
    }
}

impl AsFd for Connection {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.channel.as_fd()
    }
}
