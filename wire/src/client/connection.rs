//! Drives one connection: writes what callers left in its line's buffer, reads what has come, and
//! hands each answer to whoever waits for it.
//!
//! A hand-rolled poll function instead of a reader and a writer task: a call's way from its caller
//! to the socket and back is one wake-up each. All that one read brought is decoded in place, then
//! looked up under one lock, then handed over outside of it.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, Waker, ready};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, ReadBuf};
use tokio::time::{Instant, Sleep, sleep_until};

use super::error::{CallError, ConnectionError, Violation};
use super::shared::Shared;
use super::state::{Effects, NO_REPLY_ID};
use super::waiter::{Answer, Waiter};
use crate::proto::{Frame, FrameError, Message, Welcome};
use crate::sched::{Rest, corked};

/// Bytes read at once: three thousand cache replies, or a good part of a socket's buffer.
const READ_LEN: usize = 64 << 10;

/// Bytes of replies after which everything else that is ready has its turn: a server that answers
/// without a pause would otherwise keep the thread to itself.
const TURN: usize = READ_LEN;

/// How a connection's time as the current one ends.
#[derive(Debug)]
pub(super) enum Ended {
    /// It is no more.
    Lost(ConnectionError),
    /// The server wants no more requests on it; the driver goes on with those in flight.
    GoAway,
    /// All that had to be written is written, and nothing more is to come.
    Finished,
}

/// See the module.
pub(super) struct Driver<T> {
    transport: T,
    shared: Arc<Shared>,
    number: u64,
    server: Arc<str>,
    welcome: Arc<Welcome>,
    max_body: u32,
    input: Input,
    /// Taken from the line; written up to `written`.
    writing: Vec<u8>,
    written: usize,
    /// The waker that the line knows.
    known_waker: Option<Waker>,
    keepalive: Option<Keepalive>,
    go_away: bool,
    /// Whether it ever replied.
    replied: bool,
    /// Bytes that have come in this turn.
    received: usize,
    /// Others have their turn.
    rest: Rest,
    /// Replies of the current batch, before and after the lock.
    replies: Vec<(u64, Result<Answer, CallError>)>,
    answers: Vec<(Waiter, Result<Answer, CallError>)>,
}

impl<T: AsyncRead + AsyncWrite + Unpin> Driver<T> {
    /// A driver of the line `line`; `input` came with the `Welcome`.
    pub(super) fn new(
        transport: T,
        shared: Arc<Shared>,
        number: u64,
        server: Arc<str>,
        welcome: Arc<Welcome>,
        input: &[u8],
    ) -> Self {
        Driver {
            transport,
            number,
            server,
            welcome,
            max_body: shared.options.max_body,
            input: Input::new(input),
            writing: Vec::new(),
            written: 0,
            known_waker: None,
            keepalive: shared.options.keepalive.map(Keepalive::new),
            go_away: false,
            replied: false,
            received: 0,
            rest: Rest::default(),
            replies: Vec::new(),
            answers: Vec::new(),
            shared,
        }
    }

    /// Whether the server ever replied: a `Welcome` alone does not make a healthy connection.
    pub(super) fn is_healthy(&self) -> bool {
        self.replied
    }

    /// Goes on until the connection ends or, once, until the server says `GoAway`.
    pub(super) fn poll_drive(&mut self, cx: &mut Context<'_>) -> Poll<Ended> {
        self.introduce(cx);
        ready!(self.rest.poll_over(cx));
        self.received = 0;
        loop {
            match self.poll_round(cx) {
                Ok(Round::Progressed) if self.received >= TURN => return self.rest.begin(cx),
                Ok(Round::Progressed) => {}
                Ok(Round::Idle) => return Poll::Pending,
                Ok(Round::GoAway) => return Poll::Ready(Ended::GoAway),
                Ok(Round::Finished) => {
                    // Whatever comes of it: nothing more is expected from this connection.
                    let _ = ready!(Pin::new(&mut self.transport).poll_shutdown(cx));
                    return Poll::Ready(Ended::Finished);
                }
                Err(error) => return Poll::Ready(Ended::Lost(error)),
            }
        }
    }

    /// After the end of our half: reads, and throws away, what still comes, until the server has
    /// ended its half, too. A socket that is closed with something unread in it, or before all
    /// that was written has arrived, may take the last writes along.
    pub(super) async fn see_off(mut self) {
        while matches!(self.transport.read(self.input.scratch()).await, Ok(1..)) {}
    }

    /// Makes the line know whom to wake.
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
        // What came with the `Welcome` waits in the input without a read.
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
            && keepalive.poll_due(cx)?
        {
            progressed = true;
            if let Some(outbound) = self.shared.lock().outbound(self.number) {
                Message::Ping(&[]).encode(NO_REPLY_ID, &mut outbound.out);
            }
        }
        Ok(if progressed { Round::Progressed } else { Round::Idle })
    }

    /// Writes until there is nothing to write or the transport takes no more.
    fn poll_send(&mut self, cx: &mut Context<'_>) -> Result<Sent, ConnectionError> {
        let mut sent = Sent::Nothing;
        loop {
            while self.written < self.writing.len() {
                let unsent = &self.writing[self.written..];
                match Pin::new(&mut self.transport).poll_write(cx, unsent) {
                    Poll::Ready(Ok(0)) => {
                        return Err(ConnectionError::Io(io::ErrorKind::WriteZero.into()));
                    }
                    Poll::Ready(Ok(n)) => {
                        self.written += n;
                        sent = Sent::Some;
                    }
                    Poll::Ready(Err(error)) => return Err(ConnectionError::Io(error)),
                    Poll::Pending => return Ok(sent),
                }
            }
            self.writing.clear();
            self.written = 0;
            let mut state = self.shared.lock();
            if let Some(outbound) = state.outbound(self.number) {
                outbound.take(&mut self.writing);
            }
            if self.writing.is_empty() {
                let finished = state.is_finished(self.number);
                drop(state);
                // TLS and the like keep bytes to themselves until they are flushed.
                if let Poll::Ready(Err(error)) = Pin::new(&mut self.transport).poll_flush(cx) {
                    return Err(ConnectionError::Io(error));
                }
                return Ok(if finished { Sent::All } else { sent });
            }
        }
    }

    /// Reads once; whether anything came.
    fn poll_receive(&mut self, cx: &mut Context<'_>) -> Result<bool, ConnectionError> {
        let mut room = ReadBuf::new(self.input.room());
        match Pin::new(&mut self.transport).poll_read(cx, &mut room) {
            Poll::Ready(Ok(())) => match room.filled().len() {
                0 => Err(ConnectionError::ClosedByPeer),
                read => {
                    self.input.arrived(read);
                    self.received += read;
                    Ok(true)
                }
            },
            Poll::Ready(Err(error)) => Err(ConnectionError::of_transport(error)),
            Poll::Pending => Ok(false),
        }
    }

    /// Turns all whole frames of the input into replies; whether a `GoAway` was among them.
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
            let (kind, id) = (frame.header.kind, frame.header.id);
            let reply = match Message::decode(frame) {
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
                Ok(Message::Error { status, text, connection: true }) => {
                    let text = text.into();
                    return Err(ConnectionError::Rejected { status, text });
                }
                Ok(Message::Error { status, text, .. }) => {
                    let (server, text) = (Arc::clone(&self.server), text.into());
                    Err(CallError::Server { server, status, text })
                }
                Ok(Message::GoAway { text }) => {
                    tracing::debug!(text, "the server asks to go elsewhere");
                    go_away = true;
                    self.input.consume(frame.header.frame_len());
                    continue;
                }
                Ok(Message::Unknown { .. }) => {
                    // A newer server's; the protocol has us step over it.
                    self.input.consume(frame.header.frame_len());
                    continue;
                }
                Ok(_) => Ok(Answer::Other(kind)),
                Err(error) => {
                    let violation = Violation::Body { kind, error };
                    Err(self.broken(violation))
                }
            };
            self.input.consume(frame.header.frame_len());
            self.replied = true;
            if id != NO_REPLY_ID || !matches!(reply, Ok(Answer::Pong)) {
                self.replies.push((id, reply));
            }
        }
    }

    /// The error of a call whose reply breaks the protocol.
    fn broken(&self, violation: Violation) -> CallError {
        CallError::Protocol { server: Arc::clone(&self.server), violation }
    }

    /// Hands the replies to those who wait for them, up to the first that answers nothing: whose
    /// those behind it are cannot be known.
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
            // The next round looks at the line's buffer: whoever fills it need not wake us.
            outbound.awake();
        }
        state.pump(self.shared.now(), &mut effects);
        let _delivering = self.shared.delivering(&state);
        self.shared.release(state, effects);
        // Whoever waits may be a server that answers others with it.
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

/// Received bytes: `bytes[start..end]` are not decoded yet.
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

    /// Bytes that nobody has tried to decode yet, once.
    fn has_news(&mut self) -> bool {
        std::mem::take(&mut self.news)
    }

    fn unread(&self) -> &[u8] {
        &self.bytes[self.start..self.end]
    }

    fn room(&mut self) -> &mut [u8] {
        &mut self.bytes[self.end..]
    }

    /// All of the buffer, for what nobody will look at.
    fn scratch(&mut self) -> &mut [u8] {
        &mut self.bytes
    }

    fn arrived(&mut self, len: usize) {
        self.end += len;
    }

    fn consume(&mut self, len: usize) {
        self.start += len;
    }

    /// Makes room for the rest of a frame: what is left moves to the front, and a frame larger
    /// than the buffer doubles it as it arrives, so that an announcement alone costs nothing.
    fn needs_more(&mut self) {
        self.bytes.copy_within(self.start..self.end, 0);
        (self.start, self.end) = (0, self.end - self.start);
        if self.end == self.bytes.len() {
            self.bytes.resize(self.end * 2, 0);
        } else if self.end == 0 && self.bytes.len() > READ_LEN {
            self.bytes.truncate(READ_LEN);
            self.bytes.shrink_to_fit();
        }
    }
}

/// Notices a peer that has gone without a word.
struct Keepalive {
    interval: Duration,
    timer: Pin<Box<Sleep>>,
    last_heard: Instant,
    /// A ping was sent and nothing came since.
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

    /// Whether it is time to ask for a sign of life.
    fn poll_due(&mut self, cx: &mut Context<'_>) -> Result<bool, ConnectionError> {
        while self.timer.as_mut().poll(cx).is_ready() {
            let now = Instant::now();
            let silence = now - self.last_heard;
            if silence < self.interval {
                self.timer.as_mut().reset(self.last_heard + self.interval);
                continue;
            }
            if self.asked {
                return Err(ConnectionError::Silent { silence });
            }
            // Counted from now: a program that slept is not a server that did.
            self.asked = true;
            self.timer.as_mut().reset(now + self.interval);
            return Ok(true);
        }
        Ok(false)
    }
}
