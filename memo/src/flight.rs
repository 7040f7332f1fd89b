//! One row on its way to the upstream and back: the call, and the answers of its waiters.

use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use afterimage_core::{
    Answer, AnswerKind, Computed, Failure, Origin, RowAnswer, Sink, Status, Wanted, Watch,
};
use afterimage_wire::corked;

use crate::inner::Inner;
use crate::key::RowHash;
use crate::models::{Entry, Space};
use crate::shares::RowBytes;
use crate::sync;
use crate::waiter::Waiter;

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
    /// The row's bytes in the limit of waiting rows. Given back before the waiters are answered, so
    /// that their next requests find them free.
    pub(crate) bytes: Mutex<Option<RowBytes>>,
}

impl std::fmt::Debug for Flight {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Flight").field("hash", &self.hash).finish_non_exhaustive()
    }
}

impl Flight {
    /// The time until which the waiters of the flight wait. When all have left, the flight ends
    /// here: its call need not be made.
    fn wanted_until(&self, now: Instant) -> Wanted {
        if self.ended.load(Relaxed) {
            return Wanted::NoMore;
        }
        let Inner { flights, counters, .. } = &*self.inner;
        let wanted = flights.complete_unless(self.space.keys.flight(self.hash), |waiters| {
            let mut last = None;
            for waiter in waiters.iter().filter(|waiter| !waiter.has_left(now)) {
                let Some(deadline) = waiter.deadline else { return Some(Wanted::Always) };
                last = last.max(Some(deadline));
            }
            last.map(Wanted::Until)
        });
        wanted.unwrap_or_else(|left| {
            self.ended.store(true, Relaxed);
            counters.calls_dropped.fetch_add(1, Relaxed);
            left.into_iter().for_each(|waiter| waiter.leave(counters, now));
            Wanted::NoMore
        })
    }

    fn complete(&self, outcome: Result<Computed, Failure>, now: Instant) {
        let Inner { flights, counters, latencies, .. } = &*self.inner;
        let answer = outcome.and_then(|computed| self.check(computed));
        // The store first: a request that arrives after the completion finds the answer there.
        if self.stores
            && let Ok(answer) = &answer
        {
            counters.store_writes.fetch_add(1, Relaxed);
            self.space.stores.write(&self.space.keys, self.hash, answer, self.ttl, now);
        }
        if self.ended.load(Relaxed) {
            return;
        }
        let waiters = flights.complete(self.space.keys.flight(self.hash));
        match answer {
            Ok(answer) => {
                counters.misses.fetch_add(1, Relaxed);
                if waiters.len() > 1 {
                    counters.coalesced.fetch_add(waiters.len() as u64 - 1, Relaxed);
                }
                let mut origin = Origin::Miss;
                corked(|| {
                    for Waiter { reply, since, span, share, .. } in waiters {
                        drop(share);
                        let took = now.saturating_duration_since(since);
                        span.in_scope(|| tracing::debug!(?origin, ?took, "answered"));
                        latencies.record(origin, took, 1);
                        let (answer, age) = (answer.clone(), Duration::ZERO);
                        reply.send_at(Ok(RowAnswer { answer, origin, age }), now);
                        origin = Origin::Coalesced;
                    }
                });
            }
            Err(failure) => {
                counters.call_failures.fetch_add(1, Relaxed);
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
        self.wanted_until(now)
    }

    fn is_wanted(&self, _: u64, now: Instant) -> bool {
        let first_waits = !self.ended.load(Relaxed)
            && self.first_deadline.is_none_or(|deadline| now < deadline)
            && self.first.is_wanted(now);
        first_waits || self.wanted_until(now) != Wanted::NoMore
    }

    fn prefetch(&self, _: u64) {
        self.space.stores.labels.prefetch_write(self.hash.store_key());
    }

    fn deliver(&self, _: u64, outcome: Result<Computed, Failure>, at: Option<Instant>) {
        let now = at.unwrap_or_else(sync::now);
        let bytes = self.bytes.lock().unwrap_or_else(PoisonError::into_inner).take();
        bytes.into_iter().for_each(RowBytes::release);
        let took = outcome.is_ok().then(|| now.saturating_duration_since(self.called));
        self.inner.call_time.end(now, took);
        self.complete(outcome, now);
    }
}
