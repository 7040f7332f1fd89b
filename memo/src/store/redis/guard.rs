//! Limits on what a Redis server may send: the size and the time of a reply, and no data without a
//! request.
//!
//! The client library keeps a reply in memory until it is complete, however long it is. So a
//! [`Guarded`] stream below the library follows both directions and fails at the first violation.

use std::collections::VecDeque;
use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use arrayvec::ArrayVec;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::sync::oneshot;
use tokio::time::{Instant, Sleep, sleep};

use super::PATIENCE;

/// Bytes of a reply, beside those of one value. The longest honest ones, the values of 65,536
/// labels and the slots of a large cluster, have about one million.
const MAX_REPLY_LEN: usize = 2 << 20;

/// Values of a reply, nested ones included: those of the largest lookup, or the slots of a cluster
/// of a thousand nodes. The library needs some sixty bytes for each.
const MAX_VALUES: u64 = 70_000;

/// Bytes of a line: a simple string, an error, a number.
const MAX_LINE_LEN: usize = 16 << 10;

/// Nested arrays. The slots of a cluster have four levels.
const MAX_DEPTH: usize = 8;

/// The end of a connection. Receives the cause if the server broke a rule.
pub(super) type Closed = oneshot::Receiver<String>;

/// Ends a connection, with the cause.
pub(super) type Kill = oneshot::Sender<String>;

/// A stream to a Redis server that fails when the server breaks a rule.
pub(super) struct Guarded<S> {
    stream: S,
    requests: Scanner,
    replies: Scanner,
    /// When each command without a reply was written.
    unanswered: VecDeque<Instant>,
    /// When the last reply ended. Replies come one after the other, so that of a large value must
    /// not count as time of the next one.
    last_reply: Instant,
    timer: Pin<Box<Sleep>>,
    closed: Option<oneshot::Sender<String>>,
    killed: Option<oneshot::Receiver<String>>,
    fault: Option<String>,
}

impl<S> Guarded<S> {
    /// Guards a stream whose replies have values of up to `max_value_len` bytes.
    pub(super) fn new(stream: S, max_value_len: usize) -> (Self, Closed, Kill) {
        let (close, closed) = oneshot::channel();
        let (kill, killed) = oneshot::channel();
        let max_reply_len = MAX_REPLY_LEN + max_value_len;
        let guarded = Guarded {
            stream,
            requests: Scanner::new(usize::MAX, u64::MAX),
            replies: Scanner::new(max_reply_len, MAX_VALUES),
            unanswered: VecDeque::new(),
            last_reply: Instant::now(),
            timer: Box::pin(sleep(PATIENCE)),
            closed: Some(close),
            killed: Some(killed),
            fault: None,
        };
        (guarded, closed, kill)
    }

    /// Follows bytes from the server.
    fn check(&mut self, bytes: &[u8]) -> Result<(), String> {
        let replies = self.replies.scan(bytes)?;
        let is_begun = usize::from(!self.replies.is_at_start());
        if replies + is_begun > self.unanswered.len() {
            return Err("the server sent data without a request".into());
        }
        self.unanswered.drain(..replies);
        if replies > 0 {
            self.last_reply = Instant::now();
        }
        Ok(())
    }

    /// Ready with the cause when the connection is to end.
    fn poll_killed(&mut self, cx: &mut Context<'_>) -> Poll<String> {
        let Some(killed) = &mut self.killed else { return Poll::Pending };
        let outcome = ready!(Pin::new(killed).poll(cx));
        self.killed = None;
        outcome.map_or(Poll::Pending, Poll::Ready)
    }

    /// Ready when the oldest command has waited for too long.
    fn poll_late(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        loop {
            ready!(self.timer.as_mut().poll(cx));
            // Without a command the timer stays elapsed. It is set again at the first poll after
            // the next command.
            let Some(&oldest) = self.unanswered.front() else { return Poll::Pending };
            let end = oldest.max(self.last_reply) + PATIENCE;
            if end <= Instant::now() {
                return Poll::Ready(());
            }
            self.timer.as_mut().reset(end);
        }
    }

    fn fail(&mut self, kind: io::ErrorKind, fault: String) -> io::Error {
        if let Some(closed) = self.closed.take() {
            // Without a receiver, the connection has been replaced.
            let _ = closed.send(fault.clone());
        }
        self.fault = Some(fault.clone());
        io::Error::new(kind, fault)
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Guarded<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = &mut *self;
        if let Some(fault) = &this.fault {
            return Poll::Ready(Err(io::Error::new(io::ErrorKind::InvalidData, fault.clone())));
        }
        if let Poll::Ready(fault) = this.poll_killed(cx) {
            return Poll::Ready(Err(this.fail(io::ErrorKind::InvalidData, fault)));
        }
        let before = buf.filled().len();
        if Pin::new(&mut this.stream).poll_read(cx, buf)?.is_pending() {
            ready!(this.poll_late(cx));
            let fault = format!("the server did not answer within {PATIENCE:?}; timed out");
            return Poll::Ready(Err(this.fail(io::ErrorKind::TimedOut, fault)));
        }
        if let Err(fault) = this.check(&buf.filled()[before..]) {
            buf.set_filled(before);
            return Poll::Ready(Err(this.fail(io::ErrorKind::InvalidData, fault)));
        }
        Poll::Ready(Ok(()))
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Guarded<S> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let len = ready!(Pin::new(&mut self.stream).poll_write(cx, bytes))?;
        let commands = self.requests.scan(&bytes[..len]).map_err(io::Error::other)?;
        let now = Instant::now();
        self.unanswered.extend((0..commands).map(|_| now));
        Poll::Ready(Ok(len))
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

/// Finds the ends of RESP values in a stream, and keeps none of them.
struct Scanner {
    max_len: usize,
    max_values: u64,
    state: State,
    /// Values that are missing on each level.
    missing: ArrayVec<u64, MAX_DEPTH>,
    /// Bytes of the unfinished top-level value.
    len: usize,
    /// Values of the unfinished top-level value, as announced.
    values: u64,
}

enum State {
    /// Before the first byte of a value.
    Start,
    /// In the line that a value begins with.
    Line { kind: u8, len: usize, number: Number, ends: bool },
    /// In the content of a string, with so many bytes to come.
    Content(usize),
}

/// The length in a line.
#[derive(Clone, Copy)]
enum Number {
    Empty,
    Length(u64),
    /// Minus one stands for no value.
    Negative,
    Invalid,
}

impl Number {
    fn push(self, byte: u8) -> Number {
        match (self, byte) {
            (Number::Empty, b'-') => Number::Negative,
            (Number::Empty, b'0'..=b'9') => Number::Length(u64::from(byte - b'0')),
            (Number::Length(length), b'0'..=b'9') if length < u64::from(u32::MAX) => {
                Number::Length(length * 10 + u64::from(byte - b'0'))
            }
            (Number::Negative, b'1') => Number::Negative,
            _ => Number::Invalid,
        }
    }
}

impl Scanner {
    fn new(max_len: usize, max_values: u64) -> Self {
        let (missing, state) = (ArrayVec::new(), State::Start);
        Scanner { max_len, max_values, state, missing, len: 0, values: 0 }
    }

    /// Whether the last byte was the end of a top-level value.
    fn is_at_start(&self) -> bool {
        self.len == 0
    }

    /// The number of top-level values that end in `bytes`, the next ones of the stream.
    fn scan(&mut self, mut bytes: &[u8]) -> Result<usize, String> {
        let mut ended = 0;
        while let [first, rest @ ..] = bytes {
            let (first, mut used, mut is_end) = (*first, 1, false);
            match &mut self.state {
                State::Start => {
                    if !b"+-:$*_,#!=(~%|>".contains(&first) {
                        return Err("invalid reply: it is not of the Redis protocol".into());
                    }
                    if first == b'>' && self.missing.is_empty() {
                        return Err("the server sent data without a request".into());
                    }
                    let number = Number::Empty;
                    self.state = State::Line { kind: first, len: 0, number, ends: false };
                }
                State::Line { kind, number, ends: true, .. } if first == b'\n' => {
                    let (kind, number) = (*kind, *number);
                    is_end = self.line(kind, number)?;
                }
                State::Line { len, number, ends, .. } => {
                    *len += 1;
                    if *len > MAX_LINE_LEN {
                        return Err(format!("a line of a reply has more than {MAX_LINE_LEN} bytes"));
                    }
                    *ends = first == b'\r';
                    if !*ends {
                        *number = number.push(first);
                    }
                }
                State::Content(left) => {
                    used = bytes.len().min(*left);
                    *left -= used;
                    is_end = *left == 0;
                }
            }
            self.len += used;
            let max_len = self.max_len;
            if self.len > max_len {
                return Err(format!("a reply has more than {max_len} bytes"));
            }
            bytes = if used == 1 { rest } else { &bytes[used..] };
            if is_end {
                self.state = State::Start;
                ended += usize::from(self.end());
            }
        }
        Ok(ended)
    }

    /// The end of a value's line. True if it is the end of the value.
    fn line(&mut self, kind: u8, number: Number) -> Result<bool, String> {
        let values_each = match kind {
            b'$' | b'!' | b'=' => {
                let length = match number {
                    Number::Length(length) => usize::try_from(length).unwrap_or(usize::MAX),
                    Number::Negative if kind == b'$' => return Ok(true),
                    _ => return Err(invalid_length()),
                };
                let content = length.saturating_add(2);
                if self.len.saturating_add(content) > self.max_len {
                    let max_len = self.max_len;
                    return Err(format!("a reply of {length} bytes; the limit is {max_len}"));
                }
                self.state = State::Content(content);
                return Ok(false);
            }
            b'*' | b'~' | b'>' => 1,
            b'%' | b'|' => 2,
            _ => return Ok(true),
        };
        let values = match number {
            // The value that an attribute belongs to counts as one of the attribute's own.
            Number::Length(length) => length * values_each + u64::from(kind == b'|'),
            Number::Negative if kind == b'*' => 0,
            _ => return Err(invalid_length()),
        };
        self.values = self.values.saturating_add(values);
        if self.values > self.max_values {
            let (values, max) = (self.values, self.max_values);
            return Err(format!("a reply of {values} values; the limit is {max}"));
        }
        if values > 0 && self.missing.try_push(values).is_err() {
            return Err(format!("a reply has more than {MAX_DEPTH} levels"));
        }
        self.state = State::Start;
        Ok(values == 0)
    }

    /// The end of a value. True if it is the end of the top-level value, too.
    fn end(&mut self) -> bool {
        while let Some(missing) = self.missing.last_mut() {
            *missing -= 1;
            if *missing > 0 {
                return false;
            }
            self.missing.pop();
        }
        (self.len, self.values) = (0, 0);
        true
    }
}

fn invalid_length() -> String {
    "invalid reply: a length is not a number".into()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn replies() -> Scanner {
        Scanner::new(MAX_REPLY_LEN, MAX_VALUES)
    }

    #[test]
    fn finds_the_end_of_every_kind_of_value() {
        let values: &[&[u8]] = &[
            b"+OK\r\n",
            b"+a\rb\r\n",
            b"-ERR no\r\n",
            b":-12\r\n",
            b"$-1\r\n",
            b"$0\r\n\r\n",
            b"$4\r\n\r\n\r\n\r\n",
            b"*-1\r\n",
            b"*0\r\n",
            b"*3\r\n$1\r\na\r\n$-1\r\n*1\r\n*2\r\n:1\r\n_\r\n",
            b"%1\r\n+a\r\n~2\r\n#t\r\n,1.5\r\n",
            b"|1\r\n+a\r\n+b\r\n=5\r\ntxt:a\r\n",
            b"!3\r\nERR\r\n",
            b"(123\r\n",
        ];
        let stream = values.concat();
        for step in [1, 2, 3, 7, stream.len()] {
            let mut scanner = replies();
            let ended: usize =
                stream.chunks(step).map(|bytes| scanner.scan(bytes).unwrap()).sum();
            assert_eq!((ended, scanner.is_at_start()), (values.len(), true), "{step}");
        }
        for value in values {
            let mut scanner = replies();
            assert_eq!(scanner.scan(&value[..value.len() - 1]), Ok(0), "{value:?}");
            assert!(!scanner.is_at_start());
            assert_eq!(scanner.scan(b"\n"), Ok(1), "{value:?}");
        }
    }

    #[test]
    fn refuses_a_reply_beyond_a_limit_from_its_header() {
        for (reply, part) in [
            (&b"$536870912\r\n"[..], "536870912 bytes"),
            (b"$99999999999999999999\r\n", "not a number"),
            (b"*2147483647\r\n", "2147483647 values"),
            (b"*2\r\n*40000\r\n*40000\r\n", "values"),
            (b"%60000\r\n", "120000 values"),
            (b"$-2\r\n", "not a number"),
            (b"$?\r\n", "not a number"),
            (b"HTTP/1.1 400 Bad Request\r\n", "Redis protocol"),
            (b">1\r\n+a\r\n", "without a request"),
        ] {
            // The nested arrays are complete only on paper.
            let error = replies().scan(reply).unwrap_err();
            assert!(error.contains(part), "{error}");
        }
        assert!(replies().scan(&b"*1\r\n".repeat(9)).unwrap_err().contains("levels"));
        assert!(replies().scan(&[b'+'; 20_000]).unwrap_err().contains("line"));
        let many = [&b"*200\r\n"[..], &b"$16000\r\n"[..]].concat();
        let mut scanner = replies();
        scanner.scan(&many).unwrap();
        let value = [&[0; 16_000][..], b"\r\n$16000\r\n"].concat();
        let error = (0..200).find_map(|_| scanner.scan(&value).err()).unwrap();
        assert!(error.contains("bytes"), "{error}");
    }
}
