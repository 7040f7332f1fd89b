//! Requests from bytes: [`Connection::serve`] cuts the receive buffer into batches.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::task::Waker;

use arrayvec::ArrayVec;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::time::Instant;

use super::{Connection, Phase, move_on};
use crate::proto::message::decode_cache_req;
use crate::proto::{BodyError, Frame, FrameError, HEADER_LEN, Header, Kind, Message};
use crate::server::answers::{
    answer_malformed, answer_no_memory, answer_other, answer_too_long, answer_unauthorized,
    too_large,
};
use crate::server::batch::{BATCH, Batch, Infer, Op, Request};
use crate::server::end::{End, Refusal};
use crate::server::greeting::{Greeting, Serves, greet};
use crate::server::metrics::Counters;
use crate::server::options::Rights;
use crate::server::outbox::Outbox;
use crate::server::service::Service;
use crate::server::shared::Shared;
use crate::server::streams::{Peer, too_long};

/// A body that exceeds the limit by at most this is skipped, and the connection stays open. A
/// larger one is more likely noise than a mistake.
const MAX_SKIP: u64 = 16 << 20;

impl<S: Service, IO: AsyncRead + AsyncWrite + Unpin> Connection<'_, S, IO> {
    /// Serves the receive buffer as far as limits and this turn allow. True if input was consumed,
    /// so that there may be replies to send. `left` is the rest of this turn, in bytes; `waker` is
    /// that of this connection's task.
    pub(super) fn serve(&mut self, left: &mut usize, waker: &Waker) -> bool {
        let mut progress = false;
        while !self.input.unread().is_empty() && *left > 0 && self.may_owe_more() {
            let unread = self.input.unread().len();
            let step = match self.phase {
                _ if self.skip > 0 => self.step_over(),
                Phase::Greeting => self.greet(),
                Phase::Open(serves) => self.serve_batch(serves, waker),
                Phase::Closing(_) => break,
            };
            *left = left.saturating_sub(unread - self.input.unread().len());
            if !step {
                break;
            }
            progress = true;
        }
        progress
    }

    /// Discards what has arrived of an oversized body.
    fn step_over(&mut self) -> bool {
        let len = self.skip.min(self.input.unread().len() as u64);
        self.input.consume(len as usize);
        self.skip -= len;
        if self.skip == 0 {
            self.times.partial_since = None;
        }
        true
    }

    /// Discards the body of a frame that is answered.
    fn skip_body(&mut self, header: Header) {
        self.skip = header.body_len.into();
        self.times.partial_since = (self.skip > 0).then_some(self.times.last_read);
    }

    /// Refuses an incomplete frame, because there is no memory for its rest.
    pub(super) fn refuse_partial(&mut self) {
        if let Phase::Open(_) = self.phase
            && self.skip == 0
            && let Some(header) = Header::decode(self.input.unread())
        {
            answer_no_memory(header, self.shared.buffers.limit(), &mut self.out);
            self.input.consume(HEADER_LEN);
            self.skip_body(header);
            self.step_over();
            self.input.shrink();
        }
    }

    fn greet(&mut self) -> bool {
        match greet(self.shared, self.lacks_tls, self.input.unread(), &mut self.out) {
            Greeting::NeedMore => false,
            Greeting::Welcomed { consumed, serves, tenant } => {
                self.input.consume(consumed);
                self.outbox.set_tenant(tenant);
                self.phase = Phase::Open(serves);
                if let Some(watchers) = self.shared.service.watchers() {
                    watchers.add(&self.outbox);
                    // The generation may have changed since `greet` read it.
                    self.outbox.disturb();
                }
                if let Some(place) = &mut self.place {
                    place.ticket = None;
                    place.slot.mark_active(self.times.last_read);
                }
                if self.times.draining.is_some() {
                    // The other connections got their GoAway while this `Hello` was on its way.
                    Message::GoAway { text: "the server is shutting down" }
                        .encode(0, &mut self.out);
                }
                true
            }
            Greeting::Refused(refusal) => {
                if refusal == Refusal::WrongToken {
                    Counters::add(&self.shared.counters.unauthenticated, 1);
                }
                self.close(End::Refused(refusal));
                true
            }
        }
    }

    /// Serves one batch and the frame that ended it. False if there is no whole frame, or if the
    /// window is full.
    fn serve_batch(&mut self, serves: Serves, waker: &Waker) -> bool {
        let limit = self.room().min(BATCH);
        let max_body = self.shared.options.max_body;
        if limit == 0 {
            return false;
        }
        let input = self.input.unread();
        let mut requests = ArrayVec::<Request<'_>, BATCH>::new();
        let (at, stop) = cut(input, serves, max_body, limit, &mut requests);
        if !requests.is_empty() {
            Counters::add(&self.shared.counters.requests, requests.len() as u64);
            if let Some(place) = &self.place {
                place.slot.mark_active(self.times.last_read);
            }
            if serves.generation == self.shared.service.generation() {
                dispatch(self.shared, &requests, &mut self.out, &self.outbox, serves);
            } else {
                // The `Welcome` of this connection no longer holds: the client would take an answer
                // for the old model's.
                move_on(&mut self.moved, &mut self.times, &mut self.out);
                let Serves { generation, rights, .. } = serves;
                Batch::new(&requests, &mut self.out, &self.outbox, generation, rights).turn_away();
            }
        }
        drop(requests);
        let mut close = None;
        self.times.partial_since = self.times.partial_since.filter(|_| at == 0);
        match stop {
            Stop::Full => {}
            // Its answer does not need the body, and the body must not fill the memory.
            Stop::NeedMore(Some(header))
                if serves.longest_body(header).is_some_and(|len| header.body_len > len) =>
            {
                if serves.takes_streams(header.kind) {
                    self.streams.malformed(self.shared, header, too_long(header), &mut self.out);
                } else {
                    answer_too_long(self.shared, serves, header, &mut self.out, &self.outbox);
                }
                self.input.consume(at + HEADER_LEN);
                self.skip_body(header);
                return true;
            }
            Stop::NeedMore(header) => {
                let needed = header.map_or(0, |header| header.frame_len());
                if at < input.len() {
                    // Counts from now, not from the last read: the server itself may have stopped
                    // reading long ago.
                    self.times.partial_since =
                        self.times.partial_since.or_else(|| Some(Instant::now()));
                }
                self.input.consume(at);
                self.input.make_room_for(needed);
                return at > 0;
            }
            Stop::Other(Frame { header, .. }) if serves.takes_alone(header.kind) => {
                self.input.consume(at - header.frame_len());
                self.serve_alone(serves, header);
                return true;
            }
            Stop::Other(frame) if serves.takes_streams(frame.header.kind) => {
                if let Some(place) = &self.place {
                    place.slot.mark_active(self.times.last_read);
                }
                let peer = Peer {
                    rights: serves.rights,
                    client: self.outbox.client(),
                    is_draining: self.times.draining.is_some(),
                    waker,
                };
                self.streams.receive(self.shared, peer, frame, &mut self.out);
            }
            Stop::Other(frame) => {
                answer_other(self.shared, serves, frame, &mut self.out, &self.outbox);
            }
            Stop::Malformed(header, error) => {
                Counters::add(&self.shared.counters.malformed, 1);
                answer_malformed(header, error, &mut self.out);
            }
            Stop::TooLarge(header) => {
                Counters::add(&self.shared.counters.malformed, 1);
                let limit = self.shared.options.max_body;
                let fatal = u64::from(header.body_len) > u64::from(limit) + MAX_SKIP;
                too_large(header, limit, fatal, &mut self.out);
                if fatal {
                    close = Some(End::Refused(Refusal::FrameTooLarge));
                } else {
                    self.skip_body(header);
                }
            }
        }
        self.input.consume(at);
        if let Some(end) = close {
            self.close(end);
        }
        true
    }
}

impl<S: Service, IO: AsyncRead + AsyncWrite + Unpin> Connection<'_, S, IO> {
    /// Serves the frame at the start of the receive buffer as a batch of its own.
    fn serve_alone(&mut self, serves: Serves, header: Header) {
        let len = header.frame_len();
        let owner = match header.kind {
            Kind::InferReq if header.body_len >= LARGE_BODY => self.input.detach(len),
            _ => None,
        };
        let bytes = match &owner {
            Some(frame) => frame,
            None => &self.input.unread()[..len],
        };
        match Message::decode(Frame { header, body: &bytes[HEADER_LEN..] }) {
            Err(error) => {
                Counters::add(&self.shared.counters.malformed, 1);
                answer_malformed(header, error, &mut self.out);
            }
            Ok(Message::ForgetReq(_) | Message::FlushReq { .. })
                if serves.rights == Rights::Use =>
            {
                answer_unauthorized(header, &mut self.out);
            }
            Ok(message) => {
                let infer;
                let op = match &message {
                    Message::BytesRead { key, .. } => Op::ReadBytes { key: *key },
                    Message::BytesWrite(write) => Op::WriteBytes(write),
                    Message::ForgetReq(forget) => Op::Forget(forget),
                    Message::FlushReq { model } => Op::Flush { model },
                    Message::InferReq(request) => {
                        infer = Infer::new(*request, owner.as_ref());
                        Op::Infer(&infer)
                    }
                    _ => unreachable!("`takes_alone` has no other kinds"),
                };
                let request = Request { id: header.id, op, budget_ms: header.status };
                let requests = ArrayVec::from_iter([request]);
                Counters::add(&self.shared.counters.requests, 1);
                if let Some(place) = &self.place {
                    place.slot.mark_active(self.times.last_read);
                }
                let Serves { generation, rights, .. } = serves;
                if generation == self.shared.service.generation() {
                    dispatch(self.shared, &requests, &mut self.out, &self.outbox, serves);
                } else {
                    move_on(&mut self.moved, &mut self.times, &mut self.out);
                    Batch::new(&requests, &mut self.out, &self.outbox, generation, rights)
                        .turn_away();
                }
            }
        }
        if owner.is_none() {
            self.input.consume(len);
        }
        self.times.partial_since = None;
    }
}

/// Bodies of at least this many bytes are not copied on their way to the service, if their frame
/// fills most of the receive buffer.
const LARGE_BODY: u32 = 16 << 10;

/// Why a batch ended.
enum Stop<'a> {
    Full,
    /// An incomplete frame, and its header if that is there.
    NeedMore(Option<Header>),
    /// A frame that the connection answers itself.
    Other(Frame<'a>),
    Malformed(Header, BodyError),
    TooLarge(Header),
}

/// Cuts up to `limit` requests off the front of `input`. Returns how many bytes they take, and why
/// the batch ended.
#[inline(always)]
fn cut<'a>(
    input: &'a [u8],
    serves: Serves,
    max_body: u32,
    limit: usize,
    requests: &mut ArrayVec<Request<'a>, BATCH>,
) -> (usize, Stop<'a>) {
    let reads = serves.takes(Kind::CacheReq) && max_body as usize >= CACHE_READ_LEN - HEADER_LEN;
    let mut at = 0;
    let stop = loop {
        if requests.len() == limit {
            break Stop::Full;
        }
        // A cache read is decoded in registers: passing a frame through memory costs as much as the
        // rest of its decoding.
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
    (at, stop)
}

/// Bytes of a cache read, the smallest and most frequent request.
const CACHE_READ_LEN: usize = HEADER_LEN + 8;

/// The request in `frame`, if it is a cache read without flags. [`decode_request`] handles the
/// rest.
#[inline(always)]
fn cache_read(frame: &[u8; CACHE_READ_LEN]) -> Option<Request<'static>> {
    /// The length of the body, the kind and the flags of such a read.
    const START: [u8; 6] = [8, 0, 0, 0, Kind::CacheReq.code(), 0];
    let (start, rest) = frame.split_first_chunk::<6>()?;
    let (budget_ms, rest) = rest.split_first_chunk()?;
    let (id, rest) = rest.split_first_chunk()?;
    let key = rest.first_chunk()?;
    // One comparison: to decode the kind alone needs a table.
    (start == &START).then(|| Request {
        id: u64::from_le_bytes(*id),
        op: Op::CacheRead { key: u64::from_le_bytes(*key) },
        budget_ms: u16::from_le_bytes(*budget_ms),
    })
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

/// Passes a batch to the service, and answers the requests that it leaves unanswered.
fn dispatch<S: Service>(
    shared: &Shared<S>,
    requests: &ArrayVec<Request<'_>, BATCH>,
    out: &mut Vec<u8>,
    outbox: &Arc<Outbox>,
    serves: Serves,
) {
    let Serves { generation, rights, .. } = serves;
    let mut batch = Batch::new(requests, out, outbox, generation, rights);
    if catch_unwind(AssertUnwindSafe(|| shared.service.handle(&mut batch))).is_err() {
        Counters::add(&shared.counters.panics, 1);
        tracing::error!("the service panicked; the requests of its batch get an internal error");
    }
    batch.finish();
}
