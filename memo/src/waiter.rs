//! Waiters of flights, and what the rows of a batch have in common.

use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};

use afterimage_core::{ClientId, Failure, RowReply, Status};
use tracing::Span;

use crate::metrics::Counters;
use crate::models::{Entry, Space};
use crate::request::Context;
use crate::shares::Share;

/// What the rows of a batch have in common.
#[derive(Debug)]
pub(crate) struct Arrival<'a> {
    pub(crate) entry: &'a Arc<Entry>,
    pub(crate) space: &'a Arc<Space>,
    pub(crate) since: Instant,
    pub(crate) client: ClientId,
    /// Whether only an answer that is computed now will do.
    pub(crate) refreshes: bool,
    /// Whether to store the answers, and for how long.
    pub(crate) stores: bool,
    pub(crate) ttl: Option<Duration>,
    pub(crate) context: Option<&'a Context>,
    /// The bytes of the buffer that all rows are parts of, or 0.
    pub(crate) shared_len: usize,
}

/// The request behind a waiter.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Asker {
    pub(crate) id: u64,
    pub(crate) deadline: Option<Instant>,
}

/// One waiter of a flight.
#[derive(Debug)]
pub(crate) struct Waiter {
    pub(crate) reply: RowReply,
    /// When its request arrived.
    pub(crate) since: Instant,
    /// From the request's arrival to its answer; disabled unless a subscriber listens.
    pub(crate) span: Span,
    /// When the client stops waiting.
    pub(crate) deadline: Option<Instant>,
    /// Whether only an answer that is computed now will do.
    pub(crate) refreshes: bool,
    /// Its place in its client's share of all waiters.
    pub(crate) share: Share,
}

impl Waiter {
    /// Whether the waiter has left: its time is over, or its client is gone.
    pub(crate) fn has_left(&self, now: Instant) -> bool {
        self.deadline.is_some_and(|deadline| now >= deadline) || !self.reply.is_wanted(now)
    }

    /// Answers a waiter that has left its flight.
    pub(crate) fn leave(self, counters: &Counters, now: Instant) {
        let Waiter { reply, since, span, share, .. } = self;
        drop(share);
        let waited = now.saturating_duration_since(since);
        if reply.is_wanted(now) {
            counters.expired.fetch_add(1, Relaxed);
            span.in_scope(|| tracing::debug!(?waited, "the deadline has passed"));
        } else {
            counters.abandoned.fetch_add(1, Relaxed);
            span.in_scope(|| tracing::debug!(?waited, "the client disconnected"));
        }
        let text = format!("no answer before the request's deadline; {waited:?} passed");
        reply.send(Err(Failure::new(Status::DeadlineExceeded, text)));
    }
}
