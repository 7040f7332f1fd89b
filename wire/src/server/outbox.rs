//! Late replies of a connection, in a buffer that any thread may append to.

use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::task::Waker;
use std::time::Instant;

use afterimage_core::{
    Answer, ByteBudget, BytePermit, ClientId, Failure, Reply, Response, RowAnswer, Sink, Tenant,
    Wanted,
};
use atomic_waker::AtomicWaker;
use bytes::Bytes;

use super::memory::{BASE_REPLIES, LARGE_REPLY_COST, MAX_LARGE_REPLIES};
use crate::proto::header::MAX_LARGE_BODY;
use crate::proto::infer::{infer_resp_len, put_infer_resp};
use crate::proto::message::{Classification, put_bytes_resp, put_cache_resp, put_classify_resp};
use crate::proto::{Message, Snapshot, Status};
use crate::sched;

/// The replies of one connection that did not come within their batch.
#[derive(Debug)]
pub(super) struct Outbox {
    client: u64,
    /// The tenant of its client, known after the `Hello`.
    tenant: OnceLock<Tenant>,
    late: Mutex<Late>,
    /// Set under the buffer's lock. Replies to a closed connection are dropped.
    closed: AtomicBool,
    waker: AtomicWaker,
    /// Replies that are owed.
    in_flight: AtomicUsize,
    /// The service may have changed since the `Welcome`.
    disturbed: AtomicBool,
}

/// Replies that are not taken yet.
#[derive(Debug)]
struct Late {
    bytes: Vec<u8>,
    /// The part of the budget that large replies use until they are sent.
    large: BytePermit,
}

impl Default for Outbox {
    /// An outbox without a limit on large replies.
    fn default() -> Self {
        Outbox::new(&ByteBudget::new(usize::MAX))
    }
}

impl Outbox {
    /// The outbox of a connection whose large replies use `budget`.
    pub(super) fn new(budget: &ByteBudget) -> Self {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let large = budget.child(MAX_LARGE_REPLIES).take(0).expect("0 bytes are always free");
        Outbox {
            client: NEXT.fetch_add(1, Ordering::Relaxed),
            tenant: OnceLock::new(),
            late: Mutex::new(Late { bytes: Vec::new(), large }),
            closed: AtomicBool::new(false),
            waker: AtomicWaker::new(),
            in_flight: AtomicUsize::new(0),
            disturbed: AtomicBool::new(false),
        }
    }

    /// The number of the connection within the process, and its tenant.
    pub(super) fn client(&self) -> ClientId {
        ClientId { tenant: self.tenant.get().copied().unwrap_or_default(), number: self.client }
    }

    /// Sets the tenant of the client. It stays the same for the whole connection.
    pub(super) fn set_tenant(&self, tenant: Tenant) {
        let _first = self.tenant.set(tenant);
    }

    /// The duty to answer the request `id` later.
    pub(super) fn reply<T>(self: &Arc<Self>, id: u64) -> Reply<Result<T, Failure>>
    where
        T: Send + 'static,
        Outbox: Sink<Result<T, Failure>>,
    {
        self.in_flight.fetch_add(1, Ordering::Relaxed);
        Reply::new(Arc::<Outbox>::clone(self), id)
    }

    /// A closed connection wants no reply.
    fn still_wanted(&self) -> Wanted {
        if self.closed.load(Ordering::Relaxed) { Wanted::NoMore } else { Wanted::Always }
    }

    /// Replies that are owed. Acquire: a thread that sees a reply sent also finds it in the buffer.
    pub(super) fn in_flight(&self) -> usize {
        self.in_flight.load(Ordering::Acquire)
    }

    /// Whether no reply is owed and every reply is taken.
    pub(super) fn is_drained(&self) -> bool {
        // In this order: a reply counts as sent only after it is in the buffer.
        self.in_flight() == 0 && self.lock().bytes.is_empty()
    }

    /// Wakes this task when a reply arrives from now on.
    pub(super) fn register(&self, waker: &Waker) {
        self.waker.register(waker);
    }

    /// Makes the connection check whether its service has changed.
    pub(super) fn disturb(&self) {
        self.disturbed.store(true, Ordering::Release);
        self.waker.wake();
    }

    /// Whether [`disturb`](Self::disturb) was called since the last check.
    #[inline]
    pub(super) fn is_disturbed(&self) -> bool {
        // A plain load first: this runs at every wake-up and is seldom true.
        self.disturbed.load(Ordering::Relaxed) && self.disturbed.swap(false, Ordering::Acquire)
    }

    /// Moves the collected replies to the end of `out`, whose first `sent` bytes are sent.
    pub(super) fn take(&self, out: &mut Vec<u8>, sent: usize) {
        let mut late = self.lock();
        if out.is_empty() {
            std::mem::swap(&mut late.bytes, out);
        } else {
            out.append(&mut late.bytes);
        }
        if late.large.bytes() > 0 {
            let unsent = LARGE_REPLY_COST * (out.len() - sent);
            let held = late.large.bytes().min(unsent);
            late.large.resize(held);
        }
    }

    /// Frees the buffer of a burst, when all replies are sent.
    pub(super) fn release(&self) {
        let mut late = self.lock();
        late.bytes.shrink_to_fit();
        late.large.resize(0);
    }

    /// Drops all replies, now and later.
    pub(super) fn close(&self) {
        let mut late = self.lock();
        self.closed.store(true, Ordering::Relaxed);
        late.bytes = Vec::new();
        late.large.resize(0);
    }

    fn lock(&self) -> MutexGuard<'_, Late> {
        // Encoding a reply cannot leave half a frame behind, so a poisoned buffer is still whole.
        self.late.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Sends a reply with a body of `len` bytes, or an error if it is too large or there is no
    /// memory for it.
    fn send_large(&self, id: u64, len: usize, encode: impl FnOnce(&mut Vec<u8>)) {
        let too_large = || {
            let text = format!("the answer takes {len} bytes; the limit is {MAX_LARGE_BODY}");
            Failure::new(Status::TooLarge, text)
        };
        self.deliver_late(|late| {
            if len > MAX_LARGE_BODY as usize {
                put_failure(&mut late.bytes, id, &too_large());
            } else if late.make_room(len) {
                encode(&mut late.bytes);
            } else {
                let text = format!("no memory for an answer of {len} bytes; read replies first");
                put_failure(&mut late.bytes, id, &Failure::new(Status::Overloaded, text));
            }
        });
    }

    fn send(&self, encode: impl FnOnce(&mut Vec<u8>)) {
        self.deliver_late(|late| encode(&mut late.bytes));
    }

    #[inline]
    fn deliver_late(&self, put: impl FnOnce(&mut Late)) {
        {
            let mut late = self.lock();
            if !self.closed.load(Ordering::Relaxed) {
                put(&mut late);
            }
        }
        self.in_flight.fetch_sub(1, Ordering::Release);
        // Taken now, so that further replies under the same cork do not wake the connection again.
        if let Some(waker) = self.waker.take() {
            sched::wake(waker);
        }
    }
}

impl Late {
    /// Frees space for a reply of `len` bytes. A connection may always owe a few small ones.
    fn make_room(&mut self, len: usize) -> bool {
        self.bytes.len() + len <= BASE_REPLIES
            || self.large.resize(self.large.bytes() + LARGE_REPLY_COST * len)
    }
}

/// The duty to answer a read or a write of bytes; `None` for a write.
pub type BytesReply = Reply<Result<Option<Bytes>, Failure>>;

/// The duty to answer a cache read.
pub type ValueReply = Reply<Result<Option<i64>, Failure>>;

/// The duty to answer a `SnapshotReq`.
pub type SnapshotReply = Reply<Result<Snapshot, Failure>>;

/// Each outcome that a connection can get late. The token is the request's id.
macro_rules! late {
    ($($outcome:ty => $encode:expr;)*) => {$(
        impl Sink<Result<$outcome, Failure>> for Outbox {
            fn wanted(&self, _: u64, _: Instant) -> Wanted {
                self.still_wanted()
            }

            fn deliver(&self, id: u64, outcome: Result<$outcome, Failure>, _: Option<Instant>) {
                let encode: fn(&mut Vec<u8>, u64, $outcome) = $encode;
                self.send(|out| match outcome {
                    Ok(outcome) => encode(out, id, outcome),
                    Err(failure) => put_failure(out, id, &failure),
                });
            }
        }
    )*};
}

late! {
    RowAnswer => |out, id, RowAnswer { answer, origin, .. }| match answer {
        Answer::Label(label) => put_classify_resp(out, id, Classification { label, origin }),
        Answer::Bytes(_) => {
            let text = "the model answers with bytes; a ClassifyResp holds a label";
            put_failure(out, id, &Failure::new(Status::Unsupported, text));
        }
    };
    Option<i64> => |out, id, value| put_cache_resp(out, id, value);
    Snapshot => |out, id, snapshot| Message::SnapshotResp(snapshot).encode(id, out);
}

/// Each outcome that may be large, as `late`; the length of its body comes first.
macro_rules! large {
    ($($outcome:ty => $len:expr, $encode:expr;)*) => {$(
        impl Sink<Result<$outcome, Failure>> for Outbox {
            fn wanted(&self, _: u64, _: Instant) -> Wanted {
                self.still_wanted()
            }

            fn deliver(&self, id: u64, outcome: Result<$outcome, Failure>, _: Option<Instant>) {
                let len: fn(&$outcome) -> usize = $len;
                let encode: fn(&mut Vec<u8>, u64, &$outcome) = $encode;
                match outcome {
                    Ok(outcome) => {
                        self.send_large(id, len(&outcome), |out| encode(out, id, &outcome));
                    }
                    Err(failure) => self.send(|out| put_failure(out, id, &failure)),
                }
            }
        }
    )*};
}

large! {
    Option<Bytes> => |value| value.as_ref().map_or(0, Bytes::len),
        |out, id, value| put_bytes_resp(out, id, value.as_deref());
    Response => infer_resp_len, put_infer_resp;
}

fn put_failure(out: &mut Vec<u8>, id: u64, Failure { status, text, .. }: &Failure) {
    Message::Error { status: *status, text, connection: false }.encode(id, out);
}

#[cfg(test)]
mod tests {
    use std::task::Wake;

    use super::*;
    use crate::corked;
    use crate::proto::Frame;
    use crate::proto::message::Origin;

    fn frames(outbox: &Outbox) -> Vec<(u64, Status)> {
        let (mut bytes, mut found) = (Vec::new(), Vec::new());
        outbox.take(&mut bytes, 0);
        let mut rest = &bytes[..];
        while let Some(frame) = Frame::decode(rest, u32::MAX).unwrap() {
            found.push((frame.header.id, Status::from_code(frame.header.status)));
            rest = &rest[frame.header.frame_len()..];
        }
        found
    }

    #[test]
    fn a_reply_that_is_sent_is_one_frame() {
        let outbox = Arc::new(Outbox::default());
        let reply = outbox.reply(u64::MAX);
        assert_eq!(outbox.in_flight(), 1);
        reply.send(Ok(RowAnswer::label(3, Origin::Miss)));
        assert_eq!(outbox.in_flight(), 0);
        assert_eq!(frames(&outbox), [(u64::MAX, Status::None)]);
    }

    #[test]
    fn a_reply_that_is_dropped_is_an_error() {
        let outbox = Arc::new(Outbox::default());
        drop(outbox.reply::<RowAnswer>(0));
        assert_eq!(outbox.in_flight(), 0);
        assert_eq!(frames(&outbox), [(0, Status::Internal)]);
    }

    #[test]
    fn a_cork_wakes_each_connection_once() {
        struct Connection(AtomicUsize);
        impl Wake for Connection {
            fn wake(self: Arc<Self>) {
                self.0.fetch_add(1, Ordering::Relaxed);
            }
        }
        let outboxes = [Arc::new(Outbox::default()), Arc::new(Outbox::default())];
        let connections = outboxes.each_ref().map(|outbox| {
            let connection = Arc::new(Connection(AtomicUsize::new(0)));
            outbox.register(&Waker::from(Arc::clone(&connection)));
            connection
        });
        let wakes =
            || connections.each_ref().map(|connection| connection.0.load(Ordering::Relaxed));
        corked(|| {
            for id in 0..100 {
                for outbox in &outboxes {
                    outbox.reply::<Option<i64>>(id).send(Ok(None));
                }
            }
            assert_eq!(wakes(), [0, 0]);
        });
        assert_eq!(wakes(), [1, 1]);
        outboxes.iter().for_each(|outbox| assert_eq!(frames(outbox).len(), 100));
    }

    #[test]
    fn large_replies_use_the_budget_until_they_are_sent() {
        let budget = ByteBudget::new(LARGE_REPLY_COST * (1 << 20));
        let outbox = Arc::new(Outbox::new(&budget));
        let answer = |id, len| {
            outbox.reply::<Option<Bytes>>(id).send(Ok(Some(vec![7; len].into())));
        };
        answer(1, 700 << 10);
        answer(2, 700 << 10);
        answer(3, MAX_LARGE_BODY as usize + 1);
        let mut out = Vec::new();
        outbox.take(&mut out, 0);
        assert_eq!(budget.used(), LARGE_REPLY_COST * (700 << 10));
        let sent = out.len();
        outbox.take(&mut out, sent);
        assert_eq!(budget.used(), 0);
        let mut found = Vec::new();
        let mut rest = &out[..];
        while let Some(frame) = Frame::decode(rest, u32::MAX).unwrap() {
            found.push((frame.header.id, Status::from_code(frame.header.status)));
            rest = &rest[frame.header.frame_len()..];
        }
        assert_eq!(found, [(1, Status::None), (2, Status::Overloaded), (3, Status::TooLarge)]);
        answer(4, 700 << 10);
        outbox.close();
        assert_eq!(budget.used(), 0);
    }

    #[test]
    fn a_closed_outbox_keeps_nothing() {
        let outbox = Arc::new(Outbox::default());
        let reply = outbox.reply::<Option<i64>>(1);
        assert!(reply.is_wanted(Instant::now()));
        outbox.close();
        assert!(!reply.is_wanted(Instant::now()));
        reply.send(Ok(Some(1)));
        assert_eq!(outbox.in_flight(), 0);
        assert!(frames(&outbox).is_empty());
    }
}
