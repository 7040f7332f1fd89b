//! Batches of requests as a service sees them: still in the receive buffer, each to be answered.

use std::fmt;
use std::ops::Deref;
use std::sync::Arc;
use std::time::{Duration, Instant};

use afterimage_core::{ClientId, Failure, Reply, Response, RowReply, Sink};
use arrayvec::ArrayVec;
use bytes::Bytes;

use super::options::Rights;
use super::outbox::{BytesReply, Outbox, ValueReply};
use crate::proto::message::{
    BytesKey, BytesWrite, Classification, Forget, put_cache_resp, put_classify_resp,
};
use crate::proto::{InferReq, Message, Status};

/// Requests in the largest batch. Enough for a service to prefetch its lookups, and the bitmap of
/// answered requests still fits one register.
pub const BATCH: usize = u64::BITS as usize;

/// One request. Its image is still in the receive buffer.
#[derive(Clone, Copy, Debug)]
pub struct Request<'a> {
    /// The client's id; the reply carries it back.
    pub id: u64,
    /// The operation.
    pub op: Op<'a>,
    /// The client's time budget in milliseconds, 0 for none.
    pub budget_ms: u16,
}

impl Request<'_> {
    /// How long the client waits, if it is stated.
    pub fn budget(&self) -> Option<Duration> {
        (self.budget_ms != 0).then(|| Duration::from_millis(self.budget_ms.into()))
    }

    /// When the client stops waiting, if it is stated, for a request that arrived at `since`.
    pub fn deadline(&self, since: Instant) -> Option<Instant> {
        self.budget().map(|budget| since + budget)
    }
}

/// The operation of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Op<'a> {
    /// Read the value of a key.
    CacheRead {
        /// The key.
        key: u64,
    },
    /// Store a value; there is no reply.
    CacheWrite {
        /// The key.
        key: u64,
        /// The value.
        value: i64,
    },
    /// Classify an image.
    Classify {
        /// The image's bytes, of any length.
        image: &'a [u8],
    },
    /// Read the bytes of a key: [`Batch::bytes`], [`Batch::bytes_reply`].
    ReadBytes {
        /// The key.
        key: BytesKey,
    },
    /// Store bytes under a key. The reply is [`Batch::stored`]. The value is in the receive buffer;
    /// a service that keeps it makes a copy of its exact length.
    WriteBytes(&'a BytesWrite<'a>),
    /// Answer rows with a model: [`Batch::response_reply`].
    Infer(&'a Infer<'a>),
    /// Delete the stored answer of one row: [`Batch::forgotten`].
    Forget(&'a Forget<'a>),
    /// Delete all stored answers of a model: [`Batch::flushed`].
    Flush {
        /// The model's name; empty for all models.
        model: &'a str,
    },
}

// Requests pass through memory on the hot path. The rare operations are behind references, so that
// they do not make it larger.
const _: () = assert!(size_of::<Request<'_>>() == 40);

/// Rows to answer with a model.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Infer<'a> {
    request: InferReq<'a>,
    /// The memory that holds the rows, if the connection has given it away.
    owner: Option<&'a Bytes>,
}

impl<'a> Infer<'a> {
    pub(super) fn new(request: InferReq<'a>, owner: Option<&'a Bytes>) -> Self {
        Infer { request, owner }
    }

    /// The rows as values of their own. A row that fills at least half of a large body is not
    /// copied: it shares the memory that it was received in, at most four times its length. So a
    /// service that limits the bytes of the rows that wait limits their memory, too.
    ///
    /// A service that accounts for the memory that all rows share uses
    /// [`shared_rows`](Self::shared_rows).
    pub fn rows(&self) -> impl ExactSizeIterator<Item = Bytes> + use<'a> {
        let owner = self.owner;
        self.request.rows.iter().map(move |row| match owner {
            Some(owner) if row.len() >= owner.len() / 2 => owner.slice_ref(row),
            _ => Bytes::copy_from_slice(row),
        })
    }
}

impl<'a> Infer<'a> {
    /// The rows of a large body without a copy, and the number of bytes of the buffer that each of
    /// them keeps in memory. `None` for a small body.
    pub fn shared_rows(&self) -> Option<(impl ExactSizeIterator<Item = Bytes> + use<'a>, usize)> {
        let owner = self.owner?;
        Some((self.request.rows.iter().map(|row| owner.slice_ref(row)), owner.len()))
    }
}

impl<'a> Deref for Infer<'a> {
    type Target = InferReq<'a>;

    fn deref(&self) -> &InferReq<'a> {
        &self.request
    }
}

/// Reason given to clients when the service has changed its identity.
pub(super) const MOVED: &str = "the model has changed";

/// Up to [`BATCH`] requests in the order of their arrival, and the buffer for their replies.
///
/// Requests are answered by index. A second answer to a request is dropped. A request without an
/// answer gets an internal error after [`Service::handle`](super::Service::handle) returns.
pub struct Batch<'a> {
    requests: &'a [Request<'a>],
    out: &'a mut Vec<u8>,
    outbox: &'a Arc<Outbox>,
    generation: u64,
    rights: Rights,
    /// A bit for each request that needs no further reply.
    settled: u64,
}

impl<'a> Batch<'a> {
    pub(super) fn new(
        requests: &'a ArrayVec<Request<'a>, BATCH>,
        out: &'a mut Vec<u8>,
        outbox: &'a Arc<Outbox>,
        generation: u64,
        rights: Rights,
    ) -> Self {
        let mut settled = 0;
        for (i, request) in requests.iter().enumerate() {
            settled |= u64::from(matches!(request.op, Op::CacheWrite { .. })) << i;
        }
        Batch { requests, out, outbox, generation, rights, settled }
    }

    /// The requests. The slice outlives the borrow of the batch, so that a loop over it can answer.
    #[inline]
    pub fn requests(&self) -> &'a [Request<'a>] {
        self.requests
    }

    /// The [`generation`](super::Service::generation) that the `Welcome` of this connection stated.
    /// A service that has changed since must not answer for its old identity: see
    /// [`turn_away`](Self::turn_away).
    #[inline]
    pub fn generation(&self) -> u64 {
        self.generation
    }

    /// Whether the client has admin rights. Requests that change what other clients get, such as
    /// deleting answers, need them; a client without them gets [`Status::Unauthorized`].
    #[inline]
    pub fn is_admin(&self) -> bool {
        self.rights == Rights::Admin
    }

    /// Makes the client repeat all unanswered requests on a new connection.
    pub fn turn_away(&mut self) {
        for index in 0..self.requests.len() {
            self.error(index, Status::ShuttingDown, MOVED);
        }
    }

    /// Answers request `index` of a cache service with a value.
    ///
    /// # Panics
    /// When there is no such request.
    #[inline]
    pub fn value(&mut self, index: usize, value: Option<i64>) {
        if self.settle(index) {
            put_cache_resp(self.out, self.requests[index].id, value);
        }
    }

    /// Answers request `index` with a label.
    ///
    /// # Panics
    /// When there is no such request.
    #[inline]
    pub fn label(&mut self, index: usize, label: Classification) {
        if self.settle(index) {
            put_classify_resp(self.out, self.requests[index].id, label);
        }
    }

    /// Answers the [`Op::ReadBytes`] at `index`.
    ///
    /// # Panics
    /// When there is no such request.
    pub fn bytes(&mut self, index: usize, value: Option<Bytes>) {
        // Through the outbox, because it counts the bytes of large replies.
        self.bytes_reply(index).send(Ok(value));
    }

    /// Answers the [`Op::WriteBytes`] at `index`: the value is stored, or the service is free to
    /// drop it.
    ///
    /// # Panics
    /// When there is no such request.
    pub fn stored(&mut self, index: usize) {
        self.bytes(index, None);
    }

    /// Answers the [`Op::Forget`] at `index` with the number of deleted answers.
    ///
    /// # Panics
    /// When there is no such request.
    pub fn forgotten(&mut self, index: usize, count: u64) {
        if self.settle(index) {
            Message::ForgetResp { count }.encode(self.requests[index].id, self.out);
        }
    }

    /// Answers the [`Op::Flush`] at `index`.
    ///
    /// # Panics
    /// When there is no such request.
    pub fn flushed(&mut self, index: usize) {
        if self.settle(index) {
            Message::FlushResp.encode(self.requests[index].id, self.out);
        }
    }

    /// Answers request `index` with an error; `text` names the thing, the limit and the value.
    ///
    /// # Panics
    /// When there is no such request.
    pub fn error(&mut self, index: usize, status: Status, text: &str) {
        if self.settle(index) {
            let error = Message::Error { status, text, connection: false };
            error.encode(self.requests[index].id, self.out);
        }
    }

    /// Takes the duty to answer the `ClassifyReq` at `index` out of the batch. The reply to a
    /// request that is answered already leads nowhere.
    ///
    /// # Panics
    /// When there is no such request.
    #[inline]
    pub fn row_reply(&mut self, index: usize) -> RowReply {
        self.reply(index)
    }

    /// Takes the duty to answer the cache read at `index`, as [`row_reply`](Self::row_reply).
    ///
    /// # Panics
    /// When there is no such request.
    pub fn value_reply(&mut self, index: usize) -> ValueReply {
        self.reply(index)
    }

    /// Takes the duty to answer the [`Op::ReadBytes`] at `index`, as
    /// [`row_reply`](Self::row_reply).
    ///
    /// # Panics
    /// When there is no such request.
    pub fn bytes_reply(&mut self, index: usize) -> BytesReply {
        self.reply(index)
    }

    /// Takes the duty to answer the [`Op::Infer`] at `index`, as [`row_reply`](Self::row_reply).
    ///
    /// # Panics
    /// When there is no such request.
    pub fn response_reply(&mut self, index: usize) -> Reply<Result<Response, Failure>> {
        self.reply(index)
    }

    #[inline]
    fn reply<T>(&mut self, index: usize) -> Reply<Result<T, Failure>>
    where
        T: Send + 'static,
        Outbox: Sink<Result<T, Failure>>,
    {
        if self.settle(index) {
            self.outbox.reply(self.requests[index].id)
        } else {
            let nowhere = Arc::new(Outbox::default());
            nowhere.close();
            nowhere.reply(self.requests[index].id)
        }
    }

    /// The connection that sent the requests: a number of its own within the process.
    pub fn client(&self) -> ClientId {
        self.outbox.client()
    }

    /// Marks `index` as answered; false when it was already.
    #[inline]
    fn settle(&mut self, index: usize) -> bool {
        assert!(index < self.requests.len(), "request {index} of {}", self.requests.len());
        let bit = 1 << index;
        let fresh = self.settled & bit == 0;
        self.settled |= bit;
        fresh
    }

    /// Answers what the service left unanswered.
    pub(super) fn finish(mut self) {
        while self.settled.trailing_ones() < self.requests.len() as u32 {
            let index = self.settled.trailing_ones() as usize;
            self.error(index, Status::Internal, "the service gave no answer");
        }
    }
}

impl fmt::Debug for Batch<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Batch").field("requests", &self.requests).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::proto::{Frame, Kind};

    fn requests(n: u64) -> ArrayVec<Request<'static>, BATCH> {
        (0..n).map(|id| Request { id, op: Op::CacheRead { key: id }, budget_ms: 0 }).collect()
    }

    fn replies(bytes: &[u8]) -> Vec<(u64, Kind)> {
        let (mut rest, mut found) = (bytes, Vec::new());
        while let Some(frame) = Frame::decode(rest, u32::MAX).unwrap() {
            found.push((frame.header.id, frame.header.kind));
            rest = &rest[frame.header.frame_len()..];
        }
        found
    }

    #[test]
    fn every_request_gets_exactly_one_reply() {
        let (requests, outbox) = (requests(BATCH as u64), Arc::new(Outbox::default()));
        let mut out = Vec::new();
        let mut batch = Batch::new(&requests, &mut out, &outbox, 0, Rights::Use);
        for index in 0..BATCH - 1 {
            batch.value(index, None);
            batch.value(index, Some(1));
        }
        batch.value_reply(0).send(Ok(None));
        batch.finish();
        let replies = replies(&out);
        assert_eq!(replies.len(), BATCH);
        assert_eq!(replies[BATCH - 1], (BATCH as u64 - 1, Kind::Error));
        assert_eq!(outbox.in_flight(), 0);
    }

    #[test]
    fn a_write_needs_no_reply_and_gets_none() {
        let mut requests = requests(2);
        requests[0].op = Op::CacheWrite { key: 1, value: 2 };
        let (mut out, outbox) = (Vec::new(), Arc::new(Outbox::default()));
        let mut batch = Batch::new(&requests, &mut out, &outbox, 0, Rights::Use);
        batch.value(0, Some(1));
        batch.value(1, Some(1));
        batch.finish();
        assert_eq!(replies(&out), [(1, Kind::CacheResp)]);
    }
}
