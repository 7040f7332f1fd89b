//! One row on its way to the upstream and back: the call, its waiters, and their answers.

use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use afterimage_core::{
    Answer, AnswerKind, BytePermit, Computed, Failure, Origin, RowAnswer,
    RowReply, Sink, Status, Wanted, Watch,
};
use afterimage_wire::corked;
use tracing::Span;

use crate::key::RowHash;
use crate::memo::Inner;
use crate::models::{Entry, Space};
use crate::shares::Share;
use crate::sync;

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
}

/// The call of one row: the sink of the upstream's reply.
pub(crate) struct Flight {
    pub(crate) inner: Arc<Inner>,
    pub(crate) entry: Arc<Entry>,
    pub(crate) space: Arc<Space>,
    pub(crate) hash: RowHash,
    /// Whether the flight ended before the upstream answered. Another one may have begun under its
    /// key.
    pub(crate) ended: AtomicBool,
    /// The first waiter: as long as it waits, the others need not be asked.
    pub(crate) first: Watch<Result<RowAnswer, Failure>>,
    pub(crate) first_deadline: Option<Instant>,
    /// When the call was made.
    pub(crate) called: Instant,
    pub(crate) stores: bool,
    pub(crate) ttl: Option<Duration>,
    /// The row's bytes in the budget of waiting rows. Given back before the waiters are answered,
    /// so that their next requests find the place free.
    pub(crate) waiting: Mutex<Option<(BytePermit, Share)>>,
}

impl std::fmt::Debug for Flight {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Flight").field("hash", &self.hash).finish_non_exhaustive()
    }
}

impl Inner {
    /// Why no further waiter is taken.
    pub(crate) fn full(&self) -> String {
        let (waiting, limit) = (self.flights.waiting(), self.flights.limit());
        let why = match self.flights.is_full() {
            true => "the limit is reached",
            false => "the share of this client is used up",
        };
        format!("{waiting} of {limit} requests are waiting: {why}")
    }

    pub(crate) fn overloaded(&self, reply: RowReply, text: String) {
        self.counters.overloaded.fetch_add(1, Relaxed);
        reply.send(Err(Failure::new(Status::Overloaded, text)));
    }

    /// The time until which the waiters of a flight wait. When all have left, the flight ends here:
    /// its call need not be made.
    fn wanted(&self, flight: &Flight, now: Instant) -> Wanted {
        if flight.ended.load(Relaxed) {
            return Wanted::NoMore;
        }
        let wanted = self.flights.complete_unless(flight.hash.identity(), |waiters| {
            let mut last = None;
            for waiter in waiters.iter().filter(|waiter| !waiter.has_left(now)) {
                let Some(deadline) = waiter.deadline else { return Some(Wanted::Always) };
                last = last.max(Some(deadline));
            }
            last.map(Wanted::Until)
        });
        wanted.unwrap_or_else(|left| {
            flight.ended.store(true, Relaxed);
            self.counters.calls_dropped.fetch_add(1, Relaxed);
            left.into_iter().for_each(|waiter| self.leave(waiter, now));
            Wanted::NoMore
        })
    }

    /// Answers a waiter that has left its flight.
    pub(crate) fn leave(&self, waiter: Waiter, now: Instant) {
        let Waiter { reply, since, span, share, .. } = waiter;
        drop(share);
        let waited = now.saturating_duration_since(since);
        if reply.is_wanted(now) {
            self.counters.expired.fetch_add(1, Relaxed);
            span.in_scope(|| tracing::debug!(?waited, "the deadline has passed"));
        } else {
            self.counters.abandoned.fetch_add(1, Relaxed);
            span.in_scope(|| tracing::debug!(?waited, "the client disconnected"));
        }
        let text = format!("no answer before the request's deadline; {waited:?} passed");
        reply.send(Err(Failure::new(Status::DeadlineExceeded, text)));
    }

    fn complete(&self, flight: &Flight, outcome: Result<Computed, Failure>, now: Instant) {
        let answer = outcome.and_then(|computed| flight.check(computed));
        // The store first: a request that arrives after the completion finds the answer there.
        if flight.stores
            && let Ok(answer) = &answer
        {
            self.counters.store_writes.fetch_add(1, Relaxed);
            self.store(&flight.space, flight.hash, answer, flight.ttl, now);
        }
        if flight.ended.load(Relaxed) {
            return;
        }
        let waiters = self.flights.complete(flight.hash.identity());
        match answer {
            Ok(answer) => {
                self.counters.misses.fetch_add(1, Relaxed);
                if waiters.len() > 1 {
                    self.counters.coalesced.fetch_add(waiters.len() as u64 - 1, Relaxed);
                }
                let mut origin = Origin::Miss;
                corked(|| {
                    for Waiter { reply, since, span, share, .. } in waiters {
                        drop(share);
                        let took = now.saturating_duration_since(since);
                        span.in_scope(|| tracing::debug!(?origin, ?took, "answered"));
                        self.latencies.record(origin, took, 1);
                        let answer = RowAnswer { answer: answer.clone(), origin, age: Duration::ZERO };
                        reply.send_at(Ok(answer), now);
                        origin = Origin::Coalesced;
                    }
                });
            }
            Err(failure) => {
                self.counters.call_failures.fetch_add(1, Relaxed);
                corked(|| {
                    for Waiter { reply, span, share, .. } in waiters {
                        drop(share);
                        span.in_scope(|| tracing::debug!(%failure, "failed"));
                        reply.send_at(Err(failure.clone()), now);
                    }
                });
            }
        }
    }
}

impl Flight {
    /// Refuses an answer of another model, and one that the model cannot have given.
    fn check(&self, computed: Computed) -> Result<Answer, Failure> {
        let Computed { model, mut answers } = computed;
        let asked = &self.space.model;
        // The model may have changed meanwhile. These are not its keys, and the waiters were told
        // of the other model: they must ask again.
        if !Arc::ptr_eq(&model, asked) && model != *asked {
            return Err(Failure::model_changed());
        }
        let corrupt = |text: String| Err(Failure::new(Status::UpstreamCorrupt, text));
        let (Some(answer), true) = (answers.pop(), answers.is_empty()) else {
            return corrupt("the upstream gave more or fewer answers than rows".to_owned());
        };
        let limit = self.entry.options.max_answer_bytes;
        match (asked.answers, &answer) {
            (AnswerKind::Label { classes }, Answer::Label(label))
                if u32::from(*label) >= classes =>
            {
                corrupt(format!(
                    "the classifier answered with label {label}; its model has {classes} classes"
                ))
            }
            (AnswerKind::Label { .. }, Answer::Label(_)) => Ok(answer),
            (AnswerKind::Bytes, Answer::Bytes(bytes)) if bytes.len() > limit => corrupt(format!(
                "the answer has {} bytes; the limit is {limit}",
                bytes.len()
            )),
            (AnswerKind::Bytes, Answer::Bytes(_)) => Ok(answer),
            (kind, _) => corrupt(format!("the answer is not of the model's kind, {kind:?}")),
        }
    }
}

impl Sink<Result<Computed, Failure>> for Flight {
    fn wanted(&self, _: u64, now: Instant) -> Wanted {
        self.inner.wanted(self, now)
    }

    fn is_wanted(&self, _: u64, now: Instant) -> bool {
        let first_waits = !self.ended.load(Relaxed)
            && self.first_deadline.is_none_or(|deadline| now < deadline)
            && self.first.is_wanted(now);
        first_waits || self.inner.wanted(self, now) != Wanted::NoMore
    }

    fn prefetch(&self, _: u64) {
        self.inner.stores.labels.prefetch_write(self.hash.store_key());
    }

    fn deliver(&self, _: u64, outcome: Result<Computed, Failure>, at: Option<Instant>) {
        let now = at.unwrap_or_else(sync::now);
        drop(self.waiting.lock().unwrap_or_else(PoisonError::into_inner).take());
        let took = outcome.is_ok().then(|| now.saturating_duration_since(self.called));
        self.inner.call_time.end(now, took);
        self.inner.complete(self, outcome, now);
    }
}
