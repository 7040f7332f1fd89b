//! One connection's loop: read what has come, hand it over, write what is answered.
//!
//! This is where a byte from the socket becomes a request, and a reply becomes bytes again:
//! [`Connection::poll`] moves the bytes, [`Connection::serve`] cuts them into batches.

mod deadlines;
#[cfg(test)]
mod tests;

pub(super) use deadlines::DRAIN_QUIET;

use std::fmt;
use std::future::poll_fn;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use arrayvec::ArrayVec;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::{Instant, Sleep, sleep_until};
use tokio_util::sync::CancellationToken;

use super::answers::{answer_malformed, answer_other, too_large};
use super::batch::{BATCH, Batch, MOVED, Op, Request};
use super::counters::Counters;
use super::greeting::{Greeting, Serves, greet};
use super::in_buffer::InBuffer;
use super::outbox::Outbox;
use super::pending::Ticket;
use super::{Inner, Service};
use crate::proto::message::decode_cache_req;
use crate::proto::{BodyError, Frame, FrameError, HEADER_LEN, Header, Kind, Message};
use crate::turn::Rest;

/// Unsent replies, in bytes, past which no further request is looked at: a peer that does not read
/// holds up itself and nobody else.
const OUT_HIGH: usize = 1 << 20;

/// Sent bytes at the front of the reply buffer that are worth moving the rest for.
const OUT_COMPACT: usize = 64 << 10;

/// Bytes of requests that a connection is served before all others that are ready have their turn: one
/// full receive buffer. A peer that sends faster than it is served would otherwise keep its thread to
/// itself; after so many bytes, some hundred microseconds of work, the change costs less than a hundredth.
const TURN: usize = 256 << 10;

/// A body that exceeds the limit by at most this is skipped, and the connection lives on. A longer
/// one is more likely noise than a mistake.
const MAX_SKIP: u64 = 16 << 20;

/// After the last byte is sent: how long, and how much, is still read, so that what the peer has
/// sent meanwhile does not make its kernel throw our last words away.
const LINGER: Duration = Duration::from_secs(1);
const LINGER_BYTES: usize = 4 << 20;

/// Why a connection ended.
#[derive(Debug)]
pub(super) enum End {
    /// The client closed it, and has all its answers.
    Closed,
    /// The transport failed.
    Io(io::Error),
    /// The client was told why and hung up on.
    Refused(&'static str),
    /// The client took no replies for too long.
    NotReading,
    /// The server is going away.
    Drained,
    /// No TLS came about.
    Tls(io::Error),
}

impl fmt::Display for End {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            End::Closed => f.write_str("closed by the client"),
            End::Io(error) => write!(f, "{error}"),
            End::Refused(why) => f.write_str(why),
            End::NotReading => f.write_str("the client does not read its replies"),
            End::Drained => f.write_str("drained"),
            End::Tls(error) => write!(f, "TLS: {error}"),
        }
    }
}

/// Since when a connection is asked to end, and why.
#[derive(Clone, Copy)]
struct Draining {
    since: Instant,
    why: &'static str,
}

impl Draining {
    fn now(why: &'static str) -> Self {
        Draining { since: Instant::now(), why }
    }
}

/// Where a connection stands.
enum Phase {
    /// No `Hello` yet.
    Greeting,
    /// Requests are served.
    Open(Serves),
    /// The last words are on their way; what still comes is thrown away.
    Closing { end: Option<End>, until: Instant, discarded: usize, shut: bool },
}

pub(super) struct Connection<'a, S, IO> {
    inner: &'a Inner<S>,
    io: IO,
    /// Its place among those who have not said Hello.
    ticket: Option<Ticket>,
    /// The peer talks without TLS to a server that has it.
    lacks_tls: bool,
    phase: Phase,
    input: InBuffer,
    out: Vec<u8>,
    /// Bytes at the start of `out` that are sent already.
    sent: usize,
    /// The transport keeps nothing of what was sent to itself, as TLS may.
    flushed: bool,
    outbox: Arc<Outbox>,
    /// Bytes of an oversized body still to be thrown away.
    skip: u64,
    /// The client will send no more.
    eof: bool,
    opened: Instant,
    last_read: Instant,
    /// Since when the peer has taken not one byte of the replies that wait for it.
    stalled_since: Option<Instant>,
    /// Since when the first unread bytes wait for the rest of their frame.
    partial_since: Option<Instant>,
    draining: Option<Draining>,
    /// The client was told that the service behind this connection is another one now.
    moved: bool,
    /// Others have their turn.
    rest: Rest,
    /// The connection is over.
    ended: Option<End>,
}

impl<'a, S: Service, IO: AsyncRead + AsyncWrite + Unpin> Connection<'a, S, IO> {
    /// A connection that begins now; `ticket` is given back when it has said a good Hello.
    pub(super) fn new(inner: &'a Inner<S>, io: IO, ticket: Option<Ticket>) -> Self {
        let now = Instant::now();
        Connection {
            inner,
            io,
            ticket,
            lacks_tls: false,
            phase: Phase::Greeting,
            input: InBuffer::new(),
            out: Vec::new(),
            sent: 0,
            flushed: true,
            outbox: Arc::new(Outbox::default()),
            skip: 0,
            eof: false,
            opened: now,
            last_read: now,
            stalled_since: None,
            partial_since: None,
            draining: None,
            moved: false,
            rest: Rest::default(),
            ended: None,
        }
    }

    /// The same, begun earlier: the time for the handshake is one, whatever comes before the Hello.
    pub(super) fn opened_at(self, opened: Instant) -> Self {
        Connection { opened, ..self }
    }

    /// The same, for a peer that should have begun with TLS: it is told so.
    pub(super) fn without_tls(self) -> Self {
        Connection { lacks_tls: true, ..self }
    }

    /// Serves the connection to its end.
    pub(super) async fn run(mut self, drain: CancellationToken) -> End {
        let mut drained = pin!(drain.cancelled_owned());
        let mut timer = pin!(sleep_until(self.opened));
        let end = poll_fn(|cx| {
            if self.draining.is_none() && drained.as_mut().poll(cx).is_ready() {
                self.go_away("the server is shutting down");
            }
            self.poll(cx, timer.as_mut())
        })
        .await;
        self.outbox.close();
        if let End::Closed = end {
            // A good end where the transport has one to say; all else is sent already.
            poll_fn(|cx| Poll::Ready(Pin::new(&mut self.io).poll_shutdown(cx).is_ready())).await;
        }
        end
    }

    fn poll(&mut self, cx: &mut Context<'_>, mut timer: Pin<&mut Sleep>) -> Poll<End> {
        ready!(self.rest.poll_over(cx));
        let mut served = 0;
        loop {
            if let Some(end) = self.ended.take() {
                return Poll::Ready(end);
            }
            // Registered before the look, so that a reply that comes after it is not missed.
            self.outbox.register(cx.waker());
            if self.outbox.is_disturbed() {
                self.look_again();
            }
            self.take_replies();
            if let Err(error) = self.flush(cx) {
                return Poll::Ready(End::Io(error));
            }
            if let Phase::Closing { .. } = self.phase {
                if let Poll::Ready(end) = self.linger(cx) {
                    return Poll::Ready(end);
                }
            } else {
                if served >= TURN {
                    if self.wait(cx, timer.as_mut()) {
                        return self.rest.begin(cx);
                    }
                    served = 0;
                    continue;
                }
                if self.serve(&mut served) {
                    continue;
                }
                if self.wants_input() {
                    match self.input.poll_fill(cx, &mut self.io) {
                        Poll::Ready(Ok(0)) => self.eof = true,
                        Poll::Ready(Ok(_)) => self.last_read = Instant::now(),
                        Poll::Ready(Err(error)) => return Poll::Ready(End::Io(error)),
                        Poll::Pending => {
                            if self.wait(cx, timer.as_mut()) {
                                return Poll::Pending;
                            }
                        }
                    }
                    continue;
                }
                // What we do not read cannot be late.
                self.partial_since = None;
                if self.eof && self.is_settled() {
                    return Poll::Ready(End::Closed);
                }
            }
            if self.wait(cx, timer.as_mut()) {
                return Poll::Pending;
            }
        }
    }

    /// Whether all that was asked is answered and sent.
    fn is_settled(&self) -> bool {
        self.outbox.is_drained() && self.is_sent()
    }

    fn is_sent(&self) -> bool {
        self.unsent() == 0 && self.flushed
    }

    fn unsent(&self) -> usize {
        self.out.len() - self.sent
    }

    fn wants_input(&self) -> bool {
        !self.eof && self.unsent() < OUT_HIGH && self.room() > 0
    }

    /// How many more requests may wait for a late answer.
    fn room(&self) -> usize {
        (self.inner.options.window as usize).saturating_sub(self.outbox.in_flight())
    }

    fn take_replies(&mut self) {
        if self.sent == self.out.len() {
            self.out.clear();
            self.sent = 0;
            // A burst's buffer is not kept for ever.
            if self.out.capacity() > OUT_HIGH * 2 {
                self.out = Vec::new();
            }
        } else if self.sent >= OUT_COMPACT && self.sent >= self.out.len() / 2 {
            // A peer that reads slowly but steadily may never have read all: what it has read goes.
            self.out.drain(..self.sent);
            self.sent = 0;
        }
        if !matches!(self.phase, Phase::Closing { .. }) {
            self.outbox.take(&mut self.out);
        }
    }

    /// Sends what there is, as far as the peer takes it.
    fn flush(&mut self, cx: &mut Context<'_>) -> io::Result<()> {
        let mut progress = false;
        while self.sent < self.out.len() {
            match Pin::new(&mut self.io).poll_write(cx, &self.out[self.sent..])? {
                Poll::Ready(0) => return Err(io::ErrorKind::WriteZero.into()),
                Poll::Ready(len) => {
                    self.sent += len;
                    progress = true;
                }
                Poll::Pending => break,
            }
        }
        if progress {
            self.flushed = false;
        }
        if !self.flushed && self.unsent() == 0 {
            self.flushed = Pin::new(&mut self.io).poll_flush(cx)?.is_ready();
        }
        if self.is_sent() {
            self.stalled_since = None;
        } else if progress || self.stalled_since.is_none() {
            self.stalled_since = Some(Instant::now());
        }
        Ok(())
    }

    /// Answers what is in the receive buffer, as far as caps and this turn allow. True when something was
    /// consumed, so that there may be something to send; `served` counts its bytes.
    fn serve(&mut self, served: &mut usize) -> bool {
        let mut progress = false;
        while !self.input.unread().is_empty() && self.unsent() < OUT_HIGH && *served < TURN {
            let unread = self.input.unread().len();
            let step = match self.phase {
                _ if self.skip > 0 => self.step_over(),
                Phase::Greeting => self.greet(),
                Phase::Open(serves) => self.serve_batch(serves),
                Phase::Closing { .. } => break,
            };
            *served += unread - self.input.unread().len();
            if !step {
                break;
            }
            progress = true;
        }
        progress
    }

    /// Throws away what has come of an oversized body.
    fn step_over(&mut self) -> bool {
        let len = self.skip.min(self.input.unread().len() as u64);
        self.input.consume(len as usize);
        self.skip -= len;
        if self.skip == 0 {
            self.partial_since = None;
        }
        true
    }

    fn greet(&mut self) -> bool {
        match greet(self.inner, self.lacks_tls, self.input.unread(), &mut self.out) {
            Greeting::NeedMore => false,
            Greeting::Welcomed { consumed, serves } => {
                self.input.consume(consumed);
                self.phase = Phase::Open(serves);
                if let Some(watchers) = self.inner.service.watchers() {
                    watchers.add(&self.outbox);
                    // The generation may have changed since it was looked at.
                    self.outbox.disturb();
                }
                self.ticket = None;
                if self.draining.is_some() {
                    // Its Hello was still on its way when all others were told.
                    Message::GoAway { text: "the server is shutting down" }
                        .encode(0, &mut self.out);
                }
                true
            }
            Greeting::Refused(why) => {
                if why == "a bad token" {
                    Counters::add(&self.inner.counters.unauthenticated, 1);
                }
                self.close(End::Refused(why));
                true
            }
        }
    }

    /// Serves one batch and the frame that ended it. False when there is no whole frame, or no
    /// room for another request in flight.
    fn serve_batch(&mut self, serves: Serves) -> bool {
        let limit = self.room().min(BATCH);
        let max_body = self.inner.options.max_body;
        let reads =
            serves.takes(Kind::CacheReq) && max_body as usize >= CACHE_READ_LEN - HEADER_LEN;
        if limit == 0 {
            return false;
        }
        let input = self.input.unread();
        let mut requests = ArrayVec::<Request<'_>, BATCH>::new();
        let mut at = 0;
        let stop = loop {
            if requests.len() == limit {
                break Stop::Full;
            }
            // A read of a cache is recognised in registers; a frame handed through memory costs as much
            // as all the rest of its decoding.
            if reads
                && let Some((frame, _)) = input[at..].split_first_chunk::<CACHE_READ_LEN>()
                && let Some(request) = cache_read(frame)
            {
                at += frame.len();
                requests.push(request);
                continue;
            }
            match Frame::decode(&input[at..], max_body) {
                Ok(Some(frame)) => {
                    at += frame.header.frame_len();
                    if !serves.takes(frame.header.kind) {
                        break Stop::Other(frame);
                    }
                    match decode_request(frame) {
                        Ok(request) => requests.push(request),
                        Err(error) => break Stop::Malformed(frame.header, error),
                    }
                }
                Ok(None) => break Stop::NeedMore(Header::decode(&input[at..])),
                Err(FrameError::TooLarge { header, .. }) => {
                    at += HEADER_LEN;
                    break Stop::TooLarge(header);
                }
            }
        };
        if !requests.is_empty() {
            Counters::add(&self.inner.counters.requests, requests.len() as u64);
            if serves.generation == self.inner.service.generation() {
                dispatch(self.inner, &requests, &mut self.out, &self.outbox, serves.generation);
            } else {
                // The `Welcome` of this connection is no longer true, so nothing is answered on it
                // that the client would hold to be that model's answer.
                move_on(&mut self.moved, &mut self.draining, &mut self.out);
                Batch::new(&requests, &mut self.out, &self.outbox, serves.generation).turn_away();
            }
        }
        drop(requests);
        let mut close = None;
        self.partial_since = self.partial_since.filter(|_| at == 0);
        match stop {
            Stop::Full => {}
            Stop::NeedMore(header) => {
                let needed = header.map_or(0, |header| header.frame_len());
                if at < input.len() {
                    // Counted from now and not from the last read: that may be long ago, when it
                    // was us who did not read.
                    self.partial_since = self.partial_since.or_else(|| Some(Instant::now()));
                }
                self.input.consume(at);
                self.input.make_room_for(needed);
                return at > 0;
            }
            Stop::Other(frame) => {
                answer_other(self.inner, serves, frame, &mut self.out, &self.outbox);
            }
            Stop::Malformed(header, error) => {
                Counters::add(&self.inner.counters.malformed, 1);
                answer_malformed(header, error, &mut self.out);
            }
            Stop::TooLarge(header) => {
                Counters::add(&self.inner.counters.malformed, 1);
                let limit = self.inner.options.max_body;
                let fatal = u64::from(header.body_len) > u64::from(limit) + MAX_SKIP;
                too_large(header, limit, fatal, &mut self.out);
                if fatal {
                    close = Some(End::Refused("a frame far too large"));
                } else {
                    self.skip = header.body_len.into();
                    self.partial_since = Some(self.last_read);
                }
            }
        }
        self.input.consume(at);
        if let Some(end) = close {
            self.close(end);
        }
        true
    }

    /// Tells the client if its service has become another one.
    fn look_again(&mut self) {
        if let Phase::Open(serves) = self.phase
            && serves.generation != self.inner.service.generation()
        {
            move_on(&mut self.moved, &mut self.draining, &mut self.out);
        }
    }

    fn go_away(&mut self, text: &'static str) {
        self.draining = Some(Draining::now(text));
        if matches!(self.phase, Phase::Open(_)) {
            Message::GoAway { text }.encode(0, &mut self.out);
        }
    }

    /// Begins the end: what is to be said is in `out` already.
    fn close(&mut self, end: End) {
        let until = Instant::now() + LINGER;
        self.phase = Phase::Closing { end: Some(end), until, discarded: 0, shut: false };
    }

    /// After the last words are sent: ends our half, and reads on for a moment.
    fn linger(&mut self, cx: &mut Context<'_>) -> Poll<End> {
        if !self.is_sent() {
            return Poll::Pending;
        }
        let Phase::Closing { end, discarded, shut, .. } = &mut self.phase else {
            unreachable!("only a closing connection lingers")
        };
        let mut done = || end.take().unwrap_or(End::Closed);
        if !*shut {
            match Pin::new(&mut self.io).poll_shutdown(cx) {
                Poll::Ready(Ok(())) => *shut = true,
                Poll::Ready(Err(_)) => return Poll::Ready(done()),
                Poll::Pending => return Poll::Pending,
            }
        }
        let mut scratch = [0; 4096];
        loop {
            let mut buf = ReadBuf::new(&mut scratch);
            match Pin::new(&mut self.io).poll_read(cx, &mut buf) {
                Poll::Ready(Ok(())) if !buf.filled().is_empty() => {
                    *discarded += buf.filled().len();
                    if *discarded > LINGER_BYTES {
                        return Poll::Ready(done());
                    }
                }
                Poll::Ready(_) => return Poll::Ready(done()),
                Poll::Pending => return Poll::Pending,
            }
        }
    }
}

/// Tells the client, once, to ask again on a new connection. (Not a method: `serve_batch` holds what
/// was read meanwhile.)
fn move_on(moved: &mut bool, draining: &mut Option<Draining>, out: &mut Vec<u8>) {
    if !std::mem::replace(moved, true) {
        draining.get_or_insert_with(|| Draining::now(MOVED));
        Message::GoAway { text: MOVED }.encode(0, out);
    }
}

/// Why a batch ended where it did.
enum Stop<'a> {
    Full,
    /// The rest is no whole frame; if its header is there, it tells how long it will be.
    NeedMore(Option<Header>),
    /// A frame that the connection answers itself.
    Other(Frame<'a>),
    Malformed(Header, BodyError),
    TooLarge(Header),
}

/// Bytes of the frame that reads a key: the smallest and by far the most frequent request.
const CACHE_READ_LEN: usize = HEADER_LEN + 8;

/// The request in `frame`, if it is a plain read of a key. What it is otherwise, [`decode_request`] says.
#[inline(always)]
fn cache_read(frame: &[u8; CACHE_READ_LEN]) -> Option<Request<'static>> {
    let Header { id, status: budget_ms, flags, kind, body_len } = Header::decode(frame)?;
    let (_, key) = frame.split_last_chunk()?;
    let plain = kind == Kind::CacheReq && flags == 0 && body_len == 8;
    plain.then(|| Request { id, op: Op::CacheRead { key: u64::from_le_bytes(*key) }, budget_ms })
}

fn decode_request(frame: Frame<'_>) -> Result<Request<'_>, BodyError> {
    let Header { id, status: budget_ms, flags, kind, .. } = frame.header;
    let op = match kind {
        Kind::CacheReq => match decode_cache_req(frame)? {
            Message::CacheWrite { key, value } => Op::CacheWrite { key, value },
            Message::CacheRead { key, .. } => Op::CacheRead { key },
            _ => unreachable!("a CacheReq is a read or a write"),
        },
        _ if flags != 0 => return Err(BodyError::UnknownFlags { flags }),
        _ => Op::Classify { image: frame.body },
    };
    Ok(Request { id, op, budget_ms })
}

/// Hands a batch to the service and makes up for what it leaves unanswered.
fn dispatch<S: Service>(
    inner: &Inner<S>,
    requests: &ArrayVec<Request<'_>, BATCH>,
    out: &mut Vec<u8>,
    outbox: &Arc<Outbox>,
    generation: u64,
) {
    let mut batch = Batch::new(requests, out, outbox, generation);
    if catch_unwind(AssertUnwindSafe(|| inner.service.handle(&mut batch))).is_err() {
        Counters::add(&inner.counters.panics, 1);
        tracing::error!("the service panicked; the requests of its batch get an internal error");
    }
    batch.finish();
}
