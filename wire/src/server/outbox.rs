//! Late replies of a connection, in a buffer that any thread may append to.

use std::fmt;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::Waker;

use atomic_waker::AtomicWaker;

use crate::proto::message::{Classification, put_cache_resp, put_classify_resp};
use crate::proto::{Message, Snapshot, Status};
use crate::sched;

/// Replies that were not given within their batch.
#[derive(Debug, Default)]
pub(super) struct Outbox {
    buffer: Mutex<Buffer>,
    waker: AtomicWaker,
    /// `Later` tokens that are not spent.
    in_flight: AtomicUsize,
    /// The service may have changed since the `Welcome`.
    disturbed: AtomicBool,
}

#[derive(Debug, Default)]
struct Buffer {
    bytes: Vec<u8>,
    /// The connection has ended; replies are dropped.
    closed: bool,
}

impl Outbox {
    /// A token for one request.
    pub(super) fn later(self: &Arc<Self>, id: u64) -> Later {
        self.in_flight.fetch_add(1, Ordering::Relaxed);
        Later { outbox: Arc::clone(self), id, spent: false }
    }

    /// Tokens not yet spent. Acquire: a reader that sees a token spent also sees its reply.
    pub(super) fn in_flight(&self) -> usize {
        self.in_flight.load(Ordering::Acquire)
    }

    /// Whether every token is spent and every reply taken.
    pub(super) fn is_drained(&self) -> bool {
        // In this order: a token is spent after its reply is in the buffer.
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

    /// Moves the collected replies to the end of `out`.
    pub(super) fn take(&self, out: &mut Vec<u8>) {
        let mut buffer = self.lock();
        if out.is_empty() {
            std::mem::swap(&mut buffer.bytes, out);
        } else {
            out.append(&mut buffer.bytes);
        }
    }

    /// Drops all replies, now and later.
    pub(super) fn close(&self) {
        let mut buffer = self.lock();
        buffer.closed = true;
        buffer.bytes = Vec::new();
    }

    fn lock(&self) -> MutexGuard<'_, Buffer> {
        // Encoding a reply cannot leave half a frame behind, so a poisoned buffer is still whole.
        self.buffer.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn send(&self, encode: impl FnOnce(&mut Vec<u8>)) {
        {
            let mut buffer = self.lock();
            if !buffer.closed {
                encode(&mut buffer.bytes);
            }
        }
        self.in_flight.fetch_sub(1, Ordering::Release);
        // Taken now, so that further replies under the same cork do not wake the connection again.
        if let Some(waker) = self.waker.take() {
            sched::wake(waker);
        }
    }
}

/// The duty to answer one request later, from any thread.
///
/// It is spent by answering. If it is dropped unspent, it sends an internal error: the client gets
/// exactly one reply. After the connection has ended, the reply is dropped.
#[must_use = "dropping it answers with an internal error"]
pub struct Later {
    outbox: Arc<Outbox>,
    id: u64,
    spent: bool,
}

impl Later {
    /// The request's id, for logs.
    pub fn id(&self) -> u64 {
        self.id
    }

    /// Whether the connection has ended, so that the reply would be dropped.
    pub fn is_abandoned(&self) -> bool {
        self.outbox.lock().closed
    }

    /// Answers a `ClassifyReq`.
    pub fn label(self, label: Classification) {
        let id = self.id;
        self.spend(|out| put_classify_resp(out, id, label));
    }

    /// Answers a cache read.
    pub fn value(self, value: Option<i64>) {
        let id = self.id;
        self.spend(|out| put_cache_resp(out, id, value));
    }

    /// Answers a `SnapshotReq`.
    pub fn snapshot(self, snapshot: Snapshot) {
        let id = self.id;
        self.spend(|out| Message::SnapshotResp(snapshot).encode(id, out));
    }

    /// Answers with an error; `text` names the thing, the limit and the value.
    pub fn error(self, status: Status, text: &str) {
        let id = self.id;
        self.spend(|out| Message::Error { status, text, connection: false }.encode(id, out));
    }

    fn spend(mut self, encode: impl FnOnce(&mut Vec<u8>)) {
        self.spent = true;
        self.outbox.send(encode);
    }
}

impl Drop for Later {
    fn drop(&mut self) {
        if !self.spent {
            let (status, text) =
                (Status::Internal, "the service dropped the request without an answer");
            let error = Message::Error { status, text, connection: false };
            self.outbox.send(|out| error.encode(self.id, out));
        }
    }
}

impl fmt::Debug for Later {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Later").field("id", &self.id).finish_non_exhaustive()
    }
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
        outbox.take(&mut bytes);
        let mut rest = &bytes[..];
        while let Some(frame) = Frame::decode(rest, u32::MAX).unwrap() {
            found.push((frame.header.id, Status::from_code(frame.header.status)));
            rest = &rest[frame.header.frame_len()..];
        }
        found
    }

    #[test]
    fn a_spent_later_token_sends_its_reply_and_nothing_else() {
        let outbox = Arc::new(Outbox::default());
        let later = outbox.later(u64::MAX);
        assert_eq!(outbox.in_flight(), 1);
        later.label(Classification { label: 3, origin: Origin::Miss });
        assert_eq!(outbox.in_flight(), 0);
        assert_eq!(frames(&outbox), [(u64::MAX, Status::None)]);
    }

    #[test]
    fn a_dropped_later_token_sends_an_error() {
        let outbox = Arc::new(Outbox::default());
        drop(outbox.later(0));
        assert_eq!(outbox.in_flight(), 0);
        assert_eq!(frames(&outbox), [(0, Status::Internal)]);
    }

    #[test]
    fn a_cork_wakes_each_connection_once_in_any_order_of_replies() {
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
                outboxes.iter().for_each(|outbox| outbox.later(id).value(None));
            }
            assert_eq!(wakes(), [0, 0]);
        });
        assert_eq!(wakes(), [1, 1]);
        outboxes.iter().for_each(|outbox| assert_eq!(frames(outbox).len(), 100));
    }

    #[test]
    fn a_closed_outbox_keeps_nothing() {
        let outbox = Arc::new(Outbox::default());
        let later = outbox.later(1);
        outbox.close();
        assert!(later.is_abandoned());
        later.value(Some(1));
        assert_eq!(outbox.in_flight(), 0);
        assert!(frames(&outbox).is_empty());
    }
}
