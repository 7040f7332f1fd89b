//! An open connection: it writes the requests that callers encoded, reads replies, and hands each
//! to its waiter.
//!
//! One poll function replaces a reader and a writer task: a call costs one wake-up on its way to
//! the socket and one on its way back. All frames of one read are decoded in place, then looked up
//! under one lock, then handed over after it is released.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, Waker, ready};
use std::time::Duration;

use bytes::Bytes;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, ReadBuf};
use tokio::time::{Instant, Sleep, sleep_until};

use super::connection_error::{ConnectionError, Violation};
use super::error::CallError;
use super::infer::Inference;
use super::outbound::{LARGE_BODY, SendBuffer};
use super::shared::Shared;
use super::state::{Effects, NO_REPLY_ID};
use super::waiter::{Answer, Waiter};
use crate::proto::{
    Frame, FrameError, HEADER_LEN, Header, InferResp, Kind, Message, Status, StreamFrame, Welcome,
};
use crate::sched::{Rest, corked};
use crate::stream::Streams;
use crate::text::Escaped;

/// Bytes of one read: three thousand cache replies, or a good part of a socket's buffer.
const READ_LEN: usize = 64 << 10;

/// Bytes of replies and of streams after which all other ready tasks are polled: a server that
/// answers without a pause would otherwise occupy the thread.
const TURN: usize = READ_LEN;

/// Why the driver stopped.
#[derive(Debug)]
pub(super) enum Ended {
    /// The connection is lost.
    Lost(ConnectionError),
    /// The server accepts no more requests on it. The driver continues with those in flight.
    GoAway,
    /// Everything is written, and no reply is outstanding.
    Finished,
}

/// Drives one connection. See the module.
pub(super) struct Driver<T> {
    transport: T,
    shared: Arc<Shared>,
    number: u64,
    server: Arc<str>,
    welcome: Arc<Welcome>,
    max_body: u32,
    input: Input,
    /// Taken from the outbound buffer.
    writing: SendBuffer,
    streams: Arc<Streams>,
    /// The waker that the outbound side knows.
    known_waker: Option<Waker>,
    keepalive: Option<Keepalive>,
    go_away: bool,
    /// Whether any reply arrived.
    replied: bool,
    /// Bytes received, and bytes of streams sent, in this turn.
    moved: usize,
    /// Between two turns.
    rest: Rest,
    /// Replies of the current batch, before and after the lock.
    replies: Vec<(u64, Result<Answer, CallError>)>,
    answers: Vec<(Waiter, Result<Answer, CallError>)>,
}

impl<T: AsyncRead + AsyncWrite + Unpin> Driver<T> {
    /// A driver of connection `number`; `input` arrived with the `Welcome`.
    pub(super) fn new(
        transport: T,
        shared: Arc<Shared>,
        number: u64,
        server: Arc<str>,
        welcome: Arc<Welcome>,
        streams: Arc<Streams>,
        input: &[u8],
    ) -> Self {
        Driver {
            transport,
            number,
            server,
            max_body: match welcome.classes {
                0 => shared.options.max_body,
                _ => shared.options.max_body.min(shared.options.max_label_body),
            },
            welcome,
            input: Input::new(input),
            writing: SendBuffer::default(),
            streams,
            known_waker: None,
            keepalive: shared.options.keepalive.map(Keepalive::new),
            go_away: false,
            replied: false,
            moved: 0,
            rest: Rest::default(),
            replies: Vec::new(),
            answers: Vec::new(),
            shared,
        }
    }

    /// Whether any reply arrived: a `Welcome` alone does not make a healthy connection.
    pub(super) fn is_healthy(&self) -> bool {
        self.replied
    }

    /// Continues until the connection ends or, once, until the server sends `GoAway`.
    pub(super) fn poll_drive(&mut self, cx: &mut Context<'_>) -> Poll<Ended> {
        self.introduce(cx);
        ready!(self.rest.poll_over(cx));
        self.moved = 0;
        loop {
            match self.poll_round(cx) {
                Ok(Round::Progressed) if self.moved >= TURN => return self.rest.begin(cx),
                Ok(Round::Progressed) => {}
                Ok(Round::Idle) => return Poll::Pending,
                Ok(Round::GoAway) => return Poll::Ready(Ended::GoAway),
                Ok(Round::Finished) => {
                    // No more is expected from this connection, so an error changes nothing.
                    let _ = ready!(Pin::new(&mut self.transport).poll_shutdown(cx));
                    return Poll::Ready(Ended::Finished);
                }
                Err(error) => return Poll::Ready(Ended::Lost(error)),
            }
        }
    }

    /// Discards input until the server closes its half, too. If a socket is closed with unread
    /// input, or before all written bytes have arrived, the last writes may be lost.
    pub(super) async fn see_off(mut self) {
        while matches!(self.transport.read(self.input.scratch()).await, Ok(1..)) {}
    }

    /// Sets in the outbound side which task to wake.
    fn introduce(&mut self, cx: &Context<'_>) {
        if matches!(&self.known_waker, Some(waker) if waker.will_wake(cx.waker())) {
            return;
        }
        if let Some(outbound) = self.shared.lock().outbound(self.number) {
            outbound.register(cx.waker());
        }
        self.known_waker = Some(cx.waker().clone());
    }

    fn poll_round(&mut self, cx: &mut Context<'_>) -> Result<Round, ConnectionError> {
        let mut progressed = match self.poll_send(cx)? {
            Sent::All => return Ok(Round::Finished),
            Sent::Nothing => false,
            Sent::Some => true,
        };
        // Bytes that arrived with the `Welcome` are in the input without a read.
        let arrived = self.input.has_news() || self.poll_receive(cx)?;
        if arrived {
            progressed = true;
            if let Some(keepalive) = &mut self.keepalive {
                keepalive.heard();
            }
            let outcome = self.decode();
            self.deliver()?;
            if outcome? && !self.go_away {
                self.go_away = true;
                self.shared.with(|state, effects| state.drain(self.number, effects));
                return Ok(Round::GoAway);
            }
        } else if let Some(keepalive) = &mut self.keepalive
            && keepalive.poll_due(cx, || {
                self.shared.lock().outbound(self.number).is_some_and(|out| out.fills_window())
            })?
        {
            progressed = true;
            if let Some(outbound) = self.shared.lock().outbound(self.number) {
                Message::Ping(&[]).encode(NO_REPLY_ID, outbound.out.frames());
            }
        }
        Ok(if progressed { Round::Progressed } else { Round::Idle })
    }

    /// Writes until there is nothing to write or the transport accepts no more.
    fn poll_send(&mut self, cx: &mut Context<'_>) -> Result<Sent, ConnectionError> {
        let mut sent = Sent::Nothing;
        loop {
            while !self.writing.is_empty() {
                match self.writing.poll_write(cx, Pin::new(&mut self.transport)) {
                    Poll::Ready(Ok(0)) => {
                        return Err(ConnectionError::Io(io::ErrorKind::WriteZero.into()));
                    }
                    Poll::Ready(Ok(_)) => sent = Sent::Some,
                    Poll::Ready(Err(error)) => return Err(ConnectionError::Io(error)),
                    Poll::Pending => return Ok(sent),
                }
            }
            self.writing.reset();
            if self.moved >= TURN {
                // More frames of streams follow in the next turn, and requests before them.
                return Ok(sent);
            }
            let mut state = self.shared.lock();
            if let Some(outbound) = state.outbound(self.number) {
                outbound.take(&mut self.writing);
            }
            let finished = self.writing.is_empty() && state.is_finished(self.number);
            drop(state);
            if self.streams.is_used() {
                // Registered first, so that a later frame is not missed.
                self.streams.register(cx.waker());
                let before = self.writing.len();
                let body = self.streams.with(|table| table.take(self.writing.frames()));
                self.writing.push(body);
                self.moved += self.writing.len() - before;
            }
            if self.writing.is_empty() {
                // TLS holds bytes back until a flush.
                if let Poll::Ready(Err(error)) = Pin::new(&mut self.transport).poll_flush(cx) {
                    return Err(ConnectionError::Io(error));
                }
                return Ok(if finished { Sent::All } else { sent });
            }
        }
    }

    /// Reads once; true if bytes arrived.
    fn poll_receive(&mut self, cx: &mut Context<'_>) -> Result<bool, ConnectionError> {
        let mut room = ReadBuf::new(self.input.room());
        match Pin::new(&mut self.transport).poll_read(cx, &mut room) {
            Poll::Ready(Ok(())) => match room.filled().len() {
                0 => Err(ConnectionError::ClosedByPeer),
                read => {
                    self.input.arrived(read);
                    self.moved += read;
                    Ok(true)
                }
            },
            Poll::Ready(Err(error)) => Err(ConnectionError::of_transport(error)),
            Poll::Pending => Ok(false),
        }
    }

    /// Turns all whole frames of the input into replies; true if a `GoAway` was among them.
    fn decode(&mut self) -> Result<bool, ConnectionError> {
        let mut go_away = false;
        loop {
            let frame = match Frame::decode(self.input.unread(), self.max_body) {
                Ok(Some(frame)) => frame,
                Ok(None) => {
                    self.input.needs_more();
                    return Ok(go_away);
                }
                Err(error) => {
                    let FrameError::TooLarge { header, .. } = error;
                    let violation = Violation::Frame(error);
                    let reply = self.broken(violation.clone());
                    self.replies.push((header.id, Err(reply)));
                    return Err(ConnectionError::Violation(violation));
                }
            };
            let Header { kind, id, .. } = frame.header;
            let (header, len) = (frame.header, frame.header.frame_len());
            // The frame's own memory, if it is detached.
            let owner = match kind {
                Kind::BytesResp | Kind::InferResp if len >= LARGE_BODY => self.input.detach(len),
                _ => None,
            };
            let (bytes, unread) = match &owner {
                Some(owner) => (&owner[..], 0),
                None => (&self.input.unread()[..len], len),
            };
            let reply = match Message::decode(Frame { header, body: &bytes[HEADER_LEN..] }) {
                Ok(Message::ClassifyResp(label)) => {
                    let (class, classes) = (label.label, self.welcome.classes);
                    if classes > 0 && u32::from(class) >= classes {
                        let violation = Violation::ClassOutOfRange { class, classes };
                        Err(self.broken(violation))
                    } else {
                        Ok(Answer::Classification(label))
                    }
                }
                Ok(Message::CacheResp { value }) => Ok(Answer::Value(value)),
                Ok(Message::Pong(_)) => Ok(Answer::Pong),
                Ok(Message::StatsResp(stats)) => Ok(Answer::Stats(Box::new(stats))),
                Ok(Message::SnapshotResp(snapshot)) => Ok(Answer::Snapshot(snapshot)),
                Ok(Message::BytesResp { value }) => {
                    Ok(Answer::Bytes(value.map(|value| match &owner {
                        Some(owner) => owner.slice_ref(value),
                        None => Bytes::copy_from_slice(value),
                    })))
                }
                Ok(Message::InferResp(InferResp { digest, answers })) => {
                    let rows = match &owner {
                        Some(owner) => answers.slices_of(owner),
                        None => answers.to_rows(),
                    };
                    Ok(Answer::Inference(Box::new(Inference { digest, rows })))
                }
                Ok(Message::ForgetResp { count }) => Ok(Answer::Forgotten(count)),
                Ok(Message::FlushResp) => Ok(Answer::Flushed),
                Ok(Message::Error { status, text, connection: true }) => {
                    let text = text.into();
                    return Err(ConnectionError::Rejected { status, text });
                }
                Ok(Message::Error { status, text, .. }) if self.is_of_stream(id, status, text) => {
                    self.replied = true;
                    self.input.consume(unread);
                    continue;
                }
                Ok(Message::Error { status, text, .. }) => {
                    let (server, text) = (Arc::clone(&self.server), text.into());
                    Err(CallError::Server { server, status, text })
                }
                Ok(Message::GoAway { text }) => {
                    tracing::debug!(text = %Escaped(text), "the server sent GoAway");
                    go_away = true;
                    self.input.consume(unread);
                    continue;
                }
                Ok(Message::Unknown { .. } | Message::StreamOpen(_)) => {
                    // A kind of a newer version, or a stream that the server opens; the protocol
                    // requires clients to skip both.
                    self.input.consume(unread);
                    continue;
                }
                Ok(Message::Stream(stream_frame)) => {
                    let own = || match stream_frame {
                        StreamFrame::Data { bytes, .. } => Bytes::copy_from_slice(bytes),
                        _ => Bytes::new(),
                    };
                    if self.streams.with(|table| table.receive(id, stream_frame, own)).is_err() {
                        return Err(ConnectionError::Violation(Violation::UnknownId { id }));
                    }
                    self.replied = true;
                    self.input.consume(unread);
                    continue;
                }
                Ok(_) => Ok(Answer::Other(kind)),
                Err(error) if kind.is_stream() => {
                    let text = format!("malformed {}: {error}", kind.name());
                    let status = error.status();
                    if !self.streams.with(|table| table.fault(id, false, status, &text)) {
                        return Err(ConnectionError::Violation(Violation::UnknownId { id }));
                    }
                    self.input.consume(unread);
                    continue;
                }
                Err(error) => {
                    let violation = Violation::Body { kind, error };
                    Err(self.broken(violation))
                }
            };
            self.input.consume(unread);
            self.replied = true;
            if id != NO_REPLY_ID || !matches!(reply, Ok(Answer::Pong)) {
                self.replies.push((id, reply));
            }
        }
    }

    /// Whether an error is the end of a stream, which it then ends. A server that has no streams
    /// answers a `StreamOpen` like that.
    fn is_of_stream(&self, id: u64, status: Status, text: &str) -> bool {
        let reset = StreamFrame::Reset { status, text };
        self.streams.is_used()
            && self.streams.with(|table| table.receive(id, reset, Bytes::new)).is_ok()
    }

    /// The error of a call whose reply breaks the protocol.
    fn broken(&self, violation: Violation) -> CallError {
        CallError::Protocol { server: Arc::clone(&self.server), violation }
    }

    /// Hands replies to their waiters, up to the first with an unknown id: after it, replies may be
    /// for the wrong requests.
    fn deliver(&mut self) -> Result<(), ConnectionError> {
        if self.replies.is_empty() {
            return Ok(());
        }
        let mut outcome = Ok(());
        let mut effects = Effects::default();
        let mut state = self.shared.lock();
        for (id, reply) in self.replies.drain(..) {
            match state.reply(self.number, id) {
                Ok(Some(waiter)) => self.answers.push((waiter, reply)),
                Ok(None) => {}
                Err(violation) => {
                    outcome = Err(ConnectionError::Violation(violation));
                    break;
                }
            }
        }
        if let Some(outbound) = state.outbound(self.number) {
            // The next round reads the outbound buffer again, so callers need not wake the driver.
            outbound.awake();
        }
        state.pump(self.shared.now(), &mut effects);
        let _delivering = self.shared.delivering(&state);
        self.shared.release(state, effects);
        // The waiters may belong to a server that answers its own clients with these replies.
        corked(|| {
            for (waiter, reply) in self.answers.drain(..) {
                match reply {
                    Ok(answer) => waiter.answer(answer, &self.server, &self.welcome),
                    Err(error) => waiter.fail(error),
                }
            }
        });
        outcome
    }
}

enum Round {
    Progressed,
    Idle,
    GoAway,
    Finished,
}

enum Sent {
    Nothing,
    Some,
    All,
}

/// The receive buffer of the driver. `bytes[start..end]` are not decoded yet.
struct Input {
    bytes: Vec<u8>,
    start: usize,
    end: usize,
    news: bool,
}

impl Input {
    fn new(first: &[u8]) -> Self {
        let mut bytes = vec![0; READ_LEN.max(first.len() + 1)];
        bytes[..first.len()].copy_from_slice(first);
        Input { bytes, start: 0, end: first.len(), news: !first.is_empty() }
    }

    /// Whether there are bytes that no decoding was tried on, once.
    fn has_news(&mut self) -> bool {
        std::mem::take(&mut self.news)
    }

    fn unread(&self) -> &[u8] {
        &self.bytes[self.start..self.end]
    }

    fn room(&mut self) -> &mut [u8] {
        &mut self.bytes[self.end..]
    }

    /// The whole buffer, for input that is discarded.
    fn scratch(&mut self) -> &mut [u8] {
        &mut self.bytes
    }

    fn arrived(&mut self, len: usize) {
        self.end += len;
    }

    fn consume(&mut self, len: usize) {
        self.start += len;
    }

    /// Consumes the first `len` unread bytes and gives their memory away, uncopied. `None` if they
    /// fill less than half of the buffer: a copy then costs less than the memory.
    fn detach(&mut self, len: usize) -> Option<Bytes> {
        if len < self.bytes.len() / 2 {
            return None;
        }
        let (at, end) = (self.start, self.start + len);
        let fresh = Input::new(&self.bytes[end..self.end]);
        let old = std::mem::replace(self, Input { news: self.news, ..fresh });
        Some(Bytes::from(old.bytes).slice(at..end))
    }

    /// Makes space for the rest of a frame. The unread part moves to the front. A larger frame
    /// doubles the buffer as it arrives, up to its length, so that a header that announces a large
    /// body allocates nothing by itself.
    fn needs_more(&mut self) {
        self.bytes.copy_within(self.start..self.end, 0);
        (self.start, self.end) = (0, self.end - self.start);
        if self.end == self.bytes.len() {
            let frame_len = Header::decode(&self.bytes).map_or(0, |header| header.frame_len());
            self.bytes.resize(frame_len.clamp(self.end + 1, self.end * 2), 0);
        } else if self.end == 0 && self.bytes.len() > READ_LEN {
            self.bytes.truncate(READ_LEN);
            self.bytes.shrink_to_fit();
        }
    }
}

/// Detects a peer that has ended without closing the connection.
struct Keepalive {
    interval: Duration,
    timer: Pin<Box<Sleep>>,
    last_heard: Instant,
    /// A ping was sent, and nothing was received since.
    asked: bool,
}

impl Keepalive {
    fn new(interval: Duration) -> Self {
        let last_heard = Instant::now();
        let timer = Box::pin(sleep_until(last_heard + interval));
        Keepalive { interval, timer, last_heard, asked: false }
    }

    fn heard(&mut self) {
        self.last_heard = Instant::now();
        self.asked = false;
    }

    /// Whether a ping is due. A server whose window is full reads no pings, so its silence proves
    /// nothing.
    fn poll_due(
        &mut self,
        cx: &mut Context<'_>,
        window_is_full: impl Fn() -> bool,
    ) -> Result<bool, ConnectionError> {
        while self.timer.as_mut().poll(cx).is_ready() {
            let now = Instant::now();
            if window_is_full() {
                self.asked = false;
                self.timer.as_mut().reset(now + self.interval);
                continue;
            }
            let silence = now - self.last_heard;
            if silence < self.interval {
                self.timer.as_mut().reset(self.last_heard + self.interval);
                continue;
            }
            if self.asked {
                return Err(ConnectionError::Silent { silence });
            }
            // Counted from now: the program may have been suspended, not the server.
            self.asked = true;
            self.timer.as_mut().reset(now + self.interval);
            return Ok(true);
        }
        Ok(false)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Receives `sent`, as far as there is space.
    fn receive(input: &mut Input, sent: &[u8]) -> usize {
        let len = sent.len().min(input.room().len());
        input.room()[..len].copy_from_slice(&sent[..len]);
        input.arrived(len);
        len
    }

    #[test]
    fn a_large_frame_is_detached_and_the_rest_stays() {
        let mut input = Input::new(&[]);
        let mut sent = Vec::new();
        let value: Vec<u8> = (0..300_000).map(|i| (i * 7 / 5) as u8).collect();
        Message::BytesResp { value: Some(&value) }.encode(1, &mut sent);
        let large = sent.len();
        Message::Pong(b"the rest").encode(2, &mut sent);
        let mut at = 0;
        while input.unread().len() < large {
            at += receive(&mut input, &sent[at..]);
            if input.unread().len() < large {
                input.needs_more();
            }
        }
        assert!(input.bytes.len() <= large.max(2 * READ_LEN), "no larger than the frame");
        assert!(input.detach(100).is_none(), "too small for its buffer");
        let (address, rest) = (input.unread().as_ptr(), input.unread()[large..].to_vec());
        let frame = input.detach(large).unwrap();
        assert_eq!(frame.as_ptr(), address, "without a copy");
        assert!(frame == sent[..large] && input.unread() == rest);
        at += receive(&mut input, &sent[at..]);
        assert!(at == sent.len() && input.unread() == &sent[large..]);
        assert_eq!(input.bytes.len(), READ_LEN);
    }
}
