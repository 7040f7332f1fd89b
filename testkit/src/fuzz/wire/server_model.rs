//! The replies that a server must send to a stream of bytes: an independent reading of
//! `PROTOCOL.md`, sections 7, 11, 14 and 16, written without the server's code and decoder.

use std::collections::HashMap;

/// Bytes in a header.
const HEADER: usize = 16;
/// The longest Hello.
const HELLO_MAX: usize = 4096;
/// A body that exceeds the limit by at most this is skipped; a larger one ends the connection.
const SKIP_MAX: usize = 16 << 20;

/// The longest value of bytes.
const VALUE_MAX: usize = 16 << 20;
/// The longest body of an InferReq.
const LARGE_MAX: usize = 17 << 20;

/// Bytes of a value that the test service stores; the rest is dropped, so that one write does not
/// multiply the output.
pub(super) const STORED: usize = 64;

/// Kinds, as section 4 numbers them.
pub(super) mod kind {
    pub(in crate::fuzz::wire) const HELLO: u8 = 0x01;
    pub(in crate::fuzz::wire) const WELCOME: u8 = 0x02;
    pub(in crate::fuzz::wire) const PING: u8 = 0x03;
    pub(in crate::fuzz::wire) const PONG: u8 = 0x04;
    pub(in crate::fuzz::wire) const STATS_REQ: u8 = 0x05;
    pub(in crate::fuzz::wire) const STATS_RESP: u8 = 0x06;
    pub(in crate::fuzz::wire) const ERROR: u8 = 0x07;
    pub(in crate::fuzz::wire) const GO_AWAY: u8 = 0x08;
    pub(in crate::fuzz::wire) const SNAPSHOT_REQ: u8 = 0x09;
    pub(in crate::fuzz::wire) const SNAPSHOT_RESP: u8 = 0x0A;
    pub(in crate::fuzz::wire) const CACHE_REQ: u8 = 0x10;
    pub(in crate::fuzz::wire) const CACHE_RESP: u8 = 0x11;
    pub(in crate::fuzz::wire) const BYTES_REQ: u8 = 0x12;
    pub(in crate::fuzz::wire) const BYTES_RESP: u8 = 0x13;
    pub(in crate::fuzz::wire) const INFER_REQ: u8 = 0x22;
    pub(in crate::fuzz::wire) const INFER_RESP: u8 = 0x23;
    pub(in crate::fuzz::wire) const CLASSIFY_REQ: u8 = 0x20;
    pub(in crate::fuzz::wire) const CLASSIFY_RESP: u8 = 0x21;
    pub(in crate::fuzz::wire) const STREAM_OPEN: u8 = 0x40;
    pub(in crate::fuzz::wire) const STREAM_DATA: u8 = 0x41;
    pub(in crate::fuzz::wire) const STREAM_CREDIT: u8 = 0x42;
    pub(in crate::fuzz::wire) const STREAM_PROGRESS: u8 = 0x43;
    pub(in crate::fuzz::wire) const STREAM_RESET: u8 = 0x44;
}

/// Statuses, as section 6 numbers them.
pub(super) mod status {
    pub(in crate::fuzz::wire) const BAD_ARGUMENT: u16 = 4;
    pub(in crate::fuzz::wire) const DEADLINE_EXCEEDED: u16 = 6;
    pub(in crate::fuzz::wire) const UNAUTHENTICATED: u16 = 7;
    pub(in crate::fuzz::wire) const TOO_LARGE: u16 = 8;
    pub(in crate::fuzz::wire) const UNSUPPORTED: u16 = 9;
    pub(in crate::fuzz::wire) const SHUTTING_DOWN: u16 = 10;
    pub(in crate::fuzz::wire) const INTERNAL: u16 = 11;
}

/// The server under test.
#[derive(Clone, Copy, Debug)]
pub(super) struct Setup<'a> {
    /// A cache service; else a classifier.
    pub(super) is_cache: bool,
    /// The token that it demands.
    pub(super) token: Option<&'a [u8]>,
    /// The largest body that it accepts.
    pub(super) max_body: u32,
}

/// A frame of the server, as far as it can be predicted.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Reply {
    pub(super) id: u64,
    pub(super) kind: u8,
    pub(super) flags: u8,
    pub(super) status: u16,
    /// `None` where the body cannot be predicted: texts, statistics, the Welcome's contents.
    pub(super) body: Option<Vec<u8>>,
}

/// The server's state after the last byte, if no more arrives.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Rest {
    /// It waits for a Hello, or for the rest of one.
    Greeting,
    /// It waits for requests.
    Idle,
    /// It waits for the rest of a frame.
    Partial,
    /// It has answered an HTTP client, and closed.
    Http,
    /// It has sent a connection-level error, the last of the replies, and closed.
    Closed,
}

/// All replies to these bytes, in the order of their requests, with unlimited time between them.
pub(super) fn answers(setup: Setup<'_>, stream: &[u8]) -> (Vec<Reply>, Rest) {
    let (values, bytes) = (HashMap::new(), HashMap::new());
    let mut model = Model { setup, version: 0, highest: 0, replies: Vec::new(), values, bytes };
    let rest = model.greet(stream);
    (model.replies, rest)
}

/// The behaviour of the test service for a request: see `server_stream::Service`.
pub(super) fn behaviour(seed: u8) -> Behaviour {
    match seed % 8 {
        0..4 => Behaviour::Now,
        4 => Behaviour::Twice,
        5 => Behaviour::After { ms: u64::from(seed / 8) * 7 },
        6 => Behaviour::Dropped,
        _ => Behaviour::Forgotten,
    }
}

/// How a request is answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Behaviour {
    /// At once.
    Now,
    /// At once, and a second time, which must not be seen.
    Twice,
    /// Later.
    After { ms: u64 },
    /// By dropping its `Later`.
    Dropped,
    /// Not at all.
    Forgotten,
}

/// The test service's snapshot: 1 entry, 2 bytes, 3 microseconds.
const SNAPSHOT_BODY: [u8; 24] =
    [1, 0, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0, 3, 0, 0, 0, 0, 0, 0, 0];

/// The label that the test service gives.
pub(super) fn class(image: &[u8]) -> u16 {
    image.iter().fold(0, |class, &byte| class.wrapping_mul(31).wrapping_add(byte.into()))
}

struct Model<'a> {
    setup: Setup<'a>,
    version: u64,
    /// The highest id of a stream.
    highest: u64,
    replies: Vec<Reply>,
    values: HashMap<u64, i64>,
    bytes: HashMap<[u8; 16], Vec<u8>>,
}

struct Header {
    body_len: usize,
    kind: u8,
    flags: u8,
    id: u64,
}

impl Header {
    fn of(bytes: &[u8]) -> Option<Header> {
        let bytes: &[u8; HEADER] = bytes.first_chunk()?;
        Some(Header {
            body_len: number(&bytes[..4]) as usize,
            kind: bytes[4],
            flags: bytes[5],
            id: number(&bytes[8..]),
        })
    }
}

fn number(bytes: &[u8]) -> u64 {
    bytes.iter().rev().fold(0, |number, &byte| number << 8 | u64::from(byte))
}

impl Model<'_> {
    /// Section 7: the table of wrong first bytes.
    fn greet(&mut self, stream: &[u8]) -> Rest {
        const HTTP: [&str; 10] =
            ["GET ", "HEAD", "POST", "PUT ", "DELE", "OPTI", "PATC", "CONN", "TRAC", "PRI "];
        if HTTP.iter().any(|method| stream.starts_with(method.as_bytes())) {
            return Rest::Http;
        }
        let Some(header) = Header::of(stream) else {
            return Rest::Greeting;
        };
        if matches!(stream, [0x16, 3, 1..=4, ..]) {
            return self.close(header.id, status::UNSUPPORTED);
        }
        if header.kind != kind::HELLO || header.body_len > HELLO_MAX {
            return self.close(header.id, status::BAD_ARGUMENT);
        }
        let Some(body) = stream.get(HEADER..HEADER + header.body_len) else {
            return Rest::Greeting;
        };
        if header.flags != 0 {
            return self.close(header.id, status::UNSUPPORTED);
        }
        let Some((oldest, newest, token)) = hello(body) else {
            return self.close(header.id, status::BAD_ARGUMENT);
        };
        self.version = newest.min(2);
        if self.version == 0 || oldest > self.version {
            return self.close(header.id, status::UNSUPPORTED);
        }
        if self.setup.token.is_some_and(|expected| expected != token) {
            return self.close(header.id, status::UNAUTHENTICATED);
        }
        self.say(header.id, kind::WELCOME, 0, 0, None);
        self.open(&stream[HEADER + header.body_len..])
    }

    /// Section 14: the table of wrong frames.
    fn open(&mut self, mut stream: &[u8]) -> Rest {
        loop {
            let Some(header) = Header::of(stream) else {
                return if stream.is_empty() { Rest::Idle } else { Rest::Partial };
            };
            let max_body = self.setup.max_body as usize;
            if header.body_len > max_body + SKIP_MAX {
                return self.close(header.id, status::TOO_LARGE);
            }
            let frame_len = HEADER + header.body_len;
            if header.body_len > max_body {
                self.error(header.id, status::TOO_LARGE);
                if stream.len() < frame_len {
                    return Rest::Partial;
                }
            } else {
                let Some(body) = stream.get(HEADER..frame_len) else {
                    if self.longest_body(&header).is_some_and(|len| header.body_len > len) {
                        // Answered from the header: no body of this length is valid, so the answer
                        // is the same for any, and for a shorter one above all limits.
                        self.frame(&header, &[0; 65][..header.body_len.min(65)]);
                    }
                    return Rest::Partial;
                };
                self.frame(&header, body);
            }
            stream = &stream[frame_len..];
        }
    }

    /// The longest body that the answer to a frame of this kind depends on; `None` if any.
    fn longest_body(&self, header: &Header) -> Option<usize> {
        match header.kind {
            kind::BYTES_REQ if self.takes_bytes() && header.flags & 1 != 0 => Some(20 + VALUE_MAX),
            kind::BYTES_REQ if self.takes_bytes() => Some(16),
            kind::INFER_REQ if self.takes_rows() => Some(LARGE_MAX),
            kind::CACHE_REQ if self.setup.is_cache => Some(16),
            kind::CLASSIFY_REQ if !self.setup.is_cache => None,
            kind::PING => Some(64),
            kind if self.takes_streams(kind) => Some(longest_of_stream(kind)),
            _ => Some(0),
        }
    }

    fn frame(&mut self, header: &Header, body: &[u8]) {
        let id = header.id;
        match header.kind {
            kind::ERROR | kind::PONG | kind::GO_AWAY => {}
            kind::HELLO => self.error(id, status::BAD_ARGUMENT),
            kind::PING if header.flags != 0 => self.error(id, status::UNSUPPORTED),
            kind::PING if body.len() > 64 => self.error(id, status::BAD_ARGUMENT),
            kind::PING => self.say(id, kind::PONG, 0, 0, Some(body.to_vec())),
            kind::STATS_REQ if header.flags != 0 => self.error(id, status::UNSUPPORTED),
            kind::STATS_REQ if !body.is_empty() => self.error(id, status::BAD_ARGUMENT),
            kind::STATS_REQ => self.say(id, kind::STATS_RESP, 0, 0, None),
            kind::SNAPSHOT_REQ if header.flags != 0 => self.error(id, status::UNSUPPORTED),
            kind::SNAPSHOT_REQ if !body.is_empty() => self.error(id, status::BAD_ARGUMENT),
            kind::SNAPSHOT_REQ => {
                self.say(id, kind::SNAPSHOT_RESP, 1, 0, Some(SNAPSHOT_BODY.to_vec()));
            }
            kind::CACHE_REQ if self.setup.is_cache => self.cache_req(header, body),
            kind::CLASSIFY_REQ if !self.setup.is_cache => self.classify_req(header, body),
            kind::BYTES_REQ if self.takes_bytes() => self.bytes_req(header, body),
            kind::INFER_REQ if self.takes_rows() => self.infer_req(header, body),
            kind if self.takes_streams(kind) => self.stream(header, body),
            // Kinds that are unknown, a reply's, or another service's.
            _ => self.error(id, status::UNSUPPORTED),
        }
    }

    fn cache_req(&mut self, header: &Header, body: &[u8]) {
        let id = header.id;
        match (header.flags, body.len()) {
            (0, 8) => {
                let key = number(body);
                let value = self.values.get(&key).copied();
                let flags = u8::from(value.is_some());
                let body = value.map_or(Vec::new(), |value| value.to_le_bytes().to_vec());
                self.service(id, key as u8, kind::CACHE_RESP, flags, body);
            }
            (1, 16) => {
                let (key, value) = (number(&body[..8]), number(&body[8..]).cast_signed());
                self.values.insert(key, value);
            }
            (0 | 1, _) => self.error(id, status::BAD_ARGUMENT),
            _ => self.error(id, status::UNSUPPORTED),
        }
    }

    fn takes_bytes(&self) -> bool {
        self.setup.is_cache && self.version == 2
    }

    fn takes_rows(&self) -> bool {
        !self.setup.is_cache && self.version == 2
    }

    fn takes_streams(&self, kind: u8) -> bool {
        self.version == 2 && (kind::STREAM_OPEN..=kind::STREAM_RESET).contains(&kind)
    }

    /// A frame of a stream. The test service refuses every stream.
    fn stream(&mut self, header: &Header, body: &[u8]) {
        let (id, kind) = (header.id, header.kind);
        let opens = kind == kind::STREAM_OPEN;
        let is_known = id != 0 && id <= self.highest;
        let known_flags = u8::from(kind == kind::STREAM_DATA);
        let fits = header.body_len <= longest_of_stream(kind);
        let status = if header.flags & !known_flags != 0 {
            status::UNSUPPORTED
        } else if !fits || !is_stream_body(kind, body) || opens == is_known || id == 0 {
            status::BAD_ARGUMENT
        } else if opens {
            self.highest = id;
            status::UNSUPPORTED
        } else {
            return;
        };
        // Late frames of a stream that has ended are dropped, well-formed or not.
        if opens || !is_known {
            self.say(id, kind::STREAM_RESET, 0, status, None);
        }
    }

    fn bytes_req(&mut self, header: &Header, body: &[u8]) {
        let (id, len) = (header.id, header.body_len);
        match (header.flags, body.first_chunk::<16>()) {
            (0, Some(key)) if len == 16 => {
                let value = self.bytes.get(key).cloned();
                let flags = u8::from(value.is_some());
                self.service(id, key[0], kind::BYTES_RESP, flags, value.unwrap_or_default());
            }
            (1, Some(key)) if (20..=20 + VALUE_MAX).contains(&len) => {
                let value = &body[20..];
                self.bytes.insert(*key, value[..value.len().min(STORED)].to_vec());
                self.say(id, kind::BYTES_RESP, 0, 0, Some(Vec::new()));
            }
            (0 | 1, _) => self.error(id, status::BAD_ARGUMENT),
            _ => self.error(id, status::UNSUPPORTED),
        }
    }

    fn infer_req(&mut self, header: &Header, body: &[u8]) {
        if header.flags > 3 {
            return self.error(header.id, status::UNSUPPORTED);
        }
        let fits = header.body_len <= LARGE_MAX;
        let Some(rows) = rows_of(body).filter(|_| fits) else {
            return self.error(header.id, status::BAD_ARGUMENT);
        };
        let mut answers = vec![0; 32];
        answers.extend((rows.len() as u32).to_le_bytes());
        for row in &rows {
            // A miss, no age, a label.
            answers.extend([0; 6]);
            answers.extend(class(row).to_le_bytes());
        }
        let seed = rows[0].first().copied().unwrap_or(0);
        self.service(header.id, seed, kind::INFER_RESP, 0, answers);
    }

    fn classify_req(&mut self, header: &Header, body: &[u8]) {
        if header.flags != 0 {
            return self.error(header.id, status::UNSUPPORTED);
        }
        let (seed, class) = (body.first().copied().unwrap_or(0), class(body));
        self.service(header.id, seed, kind::CLASSIFY_RESP, 0, class.to_le_bytes().to_vec());
    }

    /// A request that reaches the service gets an answer, or an internal error if the service gives
    /// none.
    fn service(&mut self, id: u64, seed: u8, kind: u8, flags: u8, body: Vec<u8>) {
        match behaviour(seed) {
            Behaviour::Now | Behaviour::Twice | Behaviour::After { .. } => {
                self.say(id, kind, flags, 0, Some(body));
            }
            Behaviour::Dropped | Behaviour::Forgotten => self.error(id, status::INTERNAL),
        }
    }

    fn say(&mut self, id: u64, kind: u8, flags: u8, status: u16, body: Option<Vec<u8>>) {
        self.replies.push(Reply { id, kind, flags, status, body });
    }

    fn error(&mut self, id: u64, status: u16) {
        self.say(id, kind::ERROR, 0, status, None);
    }

    fn close(&mut self, id: u64, status: u16) -> Rest {
        self.say(id, kind::ERROR, 1, status, None);
        Rest::Closed
    }
}

/// The longest body of a stream's frame.
fn longest_of_stream(kind: u8) -> usize {
    match kind {
        kind::STREAM_OPEN => 9 + 255 + (64 << 10),
        kind::STREAM_DATA => 64 << 10,
        kind::STREAM_CREDIT => 8,
        kind::STREAM_PROGRESS | kind::STREAM_RESET => 1024,
        _ => 0,
    }
}

/// Whether this is a well-formed body of a stream's frame, which is not too long.
fn is_stream_body(kind: u8, body: &[u8]) -> bool {
    match kind {
        kind::STREAM_OPEN => {
            let name = body.get(8).and_then(|&len| body.get(9..9 + usize::from(len)));
            name.is_some_and(|name| {
                str::from_utf8(name).is_ok() && body.len() - 9 - name.len() <= 64 << 10
            })
        }
        kind::STREAM_CREDIT => body.len() == 8,
        kind::STREAM_RESET => str::from_utf8(body).is_ok(),
        _ => true,
    }
}

/// The rows of a well-formed InferReq.
fn rows_of(mut body: &[u8]) -> Option<Vec<&[u8]>> {
    for _ in ["model", "version"] {
        let (&len, rest) = body.split_first()?;
        let (name, rest) = rest.split_at_checked(len.into())?;
        str::from_utf8(name).ok()?;
        body = rest;
    }
    // Time to live, budget, number of rows.
    let (fields, mut rest) = body.split_at_checked(12)?;
    let count = number(&fields[8..]);
    let mut rows = Vec::new();
    if !(1..=65_536).contains(&count) {
        return None;
    }
    for _ in 0..count {
        let (len, behind) = rest.split_at_checked(4)?;
        let (row, behind) = behind.split_at_checked(number(len) as usize)?;
        rows.push(row);
        rest = behind;
    }
    rest.is_empty().then_some(rows)
}

/// Oldest version, newest version and token of a well-formed Hello.
fn hello(body: &[u8]) -> Option<(u64, u64, &[u8])> {
    let rest = body.strip_prefix(b"AFTERIMG")?;
    let (fields, rest) = rest.split_at_checked(10)?;
    let token_len = number(&fields[8..]) as usize;
    let (token, mut extensions) = rest.split_at_checked(token_len)?;
    if token_len > 1024 {
        return None;
    }
    while !extensions.is_empty() {
        let (head, rest) = extensions.split_at_checked(4)?;
        (_, extensions) = rest.split_at_checked(number(&head[2..]) as usize)?;
    }
    Some((number(&fields[..2]), number(&fields[2..4]), token))
}
