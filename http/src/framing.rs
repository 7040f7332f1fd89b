//! Framing of HTTP/1.1 requests, to find a request that states its length twice.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

/// The first bytes of an HTTP/2 connection (RFC 9113, 3.4).
const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

/// The longest line of a head. hyper refuses a head of this size.
const MAX_LINE: usize = 256 << 10;

/// The number of requests on a connection whose length is clear, counted from its start.
#[derive(Clone, Debug, Default)]
pub(crate) struct ClearRequests(Arc<AtomicU64>);

impl ClearRequests {
    /// Whether the request of this number, counted from 0, states its length at most once.
    pub(crate) fn contains(&self, number: u64) -> bool {
        number < self.0.load(Relaxed)
    }
}

/// Follows the requests in the bytes of a connection, before hyper reads them.
///
/// hyper drops `Content-Length` when a request also has `Transfer-Encoding`, so a service cannot
/// see that both were there. Two servers that trust different fields disagree where the next
/// request begins (request smuggling).
///
/// For each stream that hyper accepts, this follows the same heads and bodies. It counts only the
/// requests that are clear, and stops at the first other one. So a disagreement with hyper refuses
/// a request and never admits one.
#[derive(Debug)]
pub(crate) struct Framing {
    state: State,
    /// The start of a line that arrives in parts.
    line: Vec<u8>,
    head: Head,
    clear: ClearRequests,
}

/// The next byte.
#[derive(Clone, Copy, Debug)]
enum State {
    /// After so many bytes of [`PREFACE`].
    Preface(usize),
    Head,
    /// In a body with so many bytes left.
    Body(u64),
    /// In the size of a chunk.
    Size(u64),
    /// After the size of a chunk, in the same line.
    Extension(u64),
    /// In a chunk, with so many bytes left, its line end included.
    Chunk(u64),
    /// At the start of a line after the last chunk.
    TrailerStart,
    Trailer,
    /// After the carriage return of a trailer field.
    TrailerEnd,
    /// After the carriage return of the empty line that ends the body.
    BodyEnd,
    /// No request is counted any more.
    Ended,
}

/// The head so far.
#[derive(Debug, Default)]
struct Head {
    has_request_line: bool,
    length: Option<u64>,
    is_chunked: bool,
}

impl Framing {
    pub(crate) fn new(clear: ClearRequests) -> Self {
        Framing { state: State::Preface(0), line: Vec::new(), head: Head::default(), clear }
    }

    /// Follows the next bytes of the connection.
    pub(crate) fn received(&mut self, mut bytes: &[u8]) {
        while let Some(first) = bytes.first() {
            let taken = match self.state {
                State::Preface(matched) => self.preface(matched, bytes),
                State::Head => self.lines(bytes),
                State::Body(left) => {
                    let taken = shorter(left, bytes);
                    self.state = match left - taken as u64 {
                        0 => State::Head,
                        left => State::Body(left),
                    };
                    taken
                }
                State::Chunk(left) => {
                    let taken = shorter(left, bytes);
                    self.state = match left - taken as u64 {
                        0 => State::Size(0),
                        left => State::Chunk(left),
                    };
                    taken
                }
                State::Ended => return,
                _ => {
                    self.state = self.between_chunks(*first);
                    1
                }
            };
            bytes = &bytes[taken..];
        }
    }

    fn preface(&mut self, matched: usize, bytes: &[u8]) -> usize {
        let expected = &PREFACE[matched..];
        let equal = expected.iter().zip(bytes).take_while(|(a, b)| a == b).count();
        if equal == expected.len() {
            // HTTP/2 has frames, and no two statements of a length.
            self.clear.0.store(u64::MAX, Relaxed);
            self.state = State::Ended;
        } else if equal == bytes.len() {
            self.state = State::Preface(matched + equal);
        } else {
            self.state = State::Head;
            self.received(&PREFACE[..matched + equal]);
        }
        equal
    }

    /// Reads one line of a head, or a part of it.
    fn lines(&mut self, bytes: &[u8]) -> usize {
        let end = bytes.iter().position(|byte| *byte == b'\n');
        let part = &bytes[..end.unwrap_or(bytes.len())];
        if self.line.len() + part.len() > MAX_LINE {
            self.state = State::Ended;
        } else if end.is_none() {
            self.line.extend_from_slice(part);
        } else if self.line.is_empty() {
            self.line(part);
        } else {
            let mut line = std::mem::take(&mut self.line);
            line.extend_from_slice(part);
            self.line(&line);
        }
        end.map_or(bytes.len(), |end| end + 1)
    }

    fn line(&mut self, line: &[u8]) {
        let line = line.strip_suffix(b"\r").unwrap_or(line);
        if line.is_empty() {
            // Empty lines before a request are no request.
            if self.head.has_request_line {
                self.state = self.body();
            }
        } else if !self.head.has_request_line {
            self.head.has_request_line = true;
        } else if let Some(value) = field(line, b"content-length") {
            match std::str::from_utf8(value.trim_ascii()).ok().and_then(|text| text.parse().ok()) {
                Some(length) => self.head.length = Some(length),
                None => self.state = State::Ended,
            }
        } else if field(line, b"transfer-encoding").is_some() {
            self.head.is_chunked = true;
        }
    }

    /// The end of a head: counts the request, unless it states its length twice.
    fn body(&mut self) -> State {
        let Head { length, is_chunked, .. } = std::mem::take(&mut self.head);
        let state = match (length, is_chunked) {
            (Some(_), true) => return State::Ended,
            (None, true) => State::Size(0),
            (None | Some(0), false) => State::Head,
            (Some(length), false) => State::Body(length),
        };
        self.clear.0.fetch_add(1, Relaxed);
        state
    }

    /// The state after a byte of a chunked body that is not in a chunk.
    fn between_chunks(&self, byte: u8) -> State {
        match self.state {
            State::Size(size) => match (byte as char).to_digit(16) {
                Some(digit) => {
                    let size = size.checked_mul(16).and_then(|size| size.checked_add(digit.into()));
                    size.map_or(State::Ended, State::Size)
                }
                None => State::Extension(size),
            },
            State::Extension(0) if byte == b'\n' => State::TrailerStart,
            State::Extension(size) if byte == b'\n' => {
                size.checked_add(2).map_or(State::Ended, State::Chunk)
            }
            State::TrailerStart if byte == b'\r' => State::BodyEnd,
            State::TrailerStart => State::Trailer,
            State::Trailer if byte == b'\r' => State::TrailerEnd,
            State::TrailerEnd if byte == b'\n' => State::TrailerStart,
            State::BodyEnd if byte == b'\n' => State::Head,
            State::TrailerEnd | State::BodyEnd => State::Ended,
            state => state,
        }
    }
}

fn shorter(left: u64, bytes: &[u8]) -> usize {
    usize::try_from(left).map_or(bytes.len(), |left| left.min(bytes.len()))
}

/// The value of a field, if the line has a field of this name.
fn field<'a>(line: &'a [u8], name: &[u8]) -> Option<&'a [u8]> {
    let (found, value) = line.split_at_checked(name.len())?;
    (value.first() == Some(&b':') && found.eq_ignore_ascii_case(name)).then(|| &value[1..])
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The number of clear requests in these bytes, which arrive in parts of this size.
    fn clear(bytes: &[u8], part: usize) -> u64 {
        let clear = ClearRequests::default();
        let mut framing = Framing::new(clear.clone());
        bytes.chunks(part).for_each(|part| framing.received(part));
        clear.0.load(Relaxed)
    }

    #[test]
    fn counts_clear_requests_in_parts_of_any_size() {
        for (bytes, expected) in [
            (&b"GET / HTTP/1.1\r\n\r\nGET / HTTP/1.1\nhost: a\n\n"[..], 2),
            (b"\r\n\nPOST / HTTP/1.1\r\ncontent-length: 3\r\n\r\n\n\n\nGET / HTTP/1.1\r\n\r\n", 2),
            (b"POST / HTTP/1.1\r\nContent-Length:0\r\n\r\nGET / HTTP/1.1\r\n\r\n", 2),
            (
                b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n5;a=b\r\nab\r\nc\r\n00A \r\n0123456789\r\n\
                  0\r\nx: a\n\r\ny: b\r\n\r\nGET / HTTP/1.1\r\n\r\n",
                2,
            ),
            // The body has a head, which is no request.
            (b"POST / HTTP/1.1\r\ncontent-length: 18\r\n\r\nGET / HTTP/1.1\r\n\r\n", 1),
            (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r", 0),
            (b"PUT / HTTP/1.1\r\n\r\n", 1),
            (PREFACE, u64::MAX),
        ] {
            for part in 1..=bytes.len() {
                assert_eq!(clear(bytes, part), expected, "{}", bytes.escape_ascii());
            }
        }
    }

    #[test]
    fn stops_at_a_request_with_two_lengths() {
        const FIRST: &str = "GET / HTTP/1.1\r\n\r\n";
        for head in [
            "content-length: 4\r\ntransfer-encoding: chunked",
            "Transfer-Encoding: chunked\r\nhost: a\r\nCONTENT-LENGTH:4",
            "content-length: 0\r\ntransfer-encoding: gzip",
            "content-length: 99999999999999999999",
        ] {
            let bytes = format!("{FIRST}POST / HTTP/1.1\r\n{head}\r\n\r\n0\r\n\r\n{FIRST}");
            for part in 1..=bytes.len() {
                assert_eq!(clear(bytes.as_bytes(), part), 1, "{head:?}");
            }
        }
        let long = format!("GET / HTTP/1.1\r\nx: {}\r\n\r\n", "x".repeat(MAX_LINE));
        assert_eq!(clear(long.as_bytes(), 1000), 0);
    }
}
