//! Who waits for an answer, and for how long: boarding a flight, and leaving it when the time is
//! over.

use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};

use afterimage_wire::Status;
use afterimage_wire::corked;
use afterimage_wire::server::{Batch, Later};
use tracing::Span;

use super::Shared;
use crate::flights::Join;
use crate::key::ImageHash;
use crate::sync;
use crate::upstream::{Classifier, Wanted};

/// How often the flights are searched for clients that wait no longer, while there are some that
/// will not wait for ever. A budget is kept to within this.
pub const SWEEP_EVERY: Duration = Duration::from_millis(10);

/// One request on a flight.
#[derive(Debug)]
pub(super) struct Waiter {
    pub(super) later: Later,
    pub(super) since: Instant,
    /// From the request's arrival to its answer; disabled unless somebody listens.
    pub(super) span: Span,
    /// When the client stops waiting, if it said so.
    deadline: Option<Instant>,
}

impl Waiter {
    fn is_late(&self, now: Instant) -> bool {
        self.deadline.is_some_and(|deadline| now >= deadline)
    }
}

impl<C: Classifier> Shared<C> {
    /// Puts request `i` on the flight of its image. True when it is the first there, and so the
    /// flight must be landed.
    pub(super) fn board(
        self: &Arc<Self>,
        batch: &mut Batch<'_>,
        i: usize,
        hash: ImageHash,
        since: Instant,
    ) -> bool {
        // Most are turned away here, without a token to wait with, and leave with the batch's other
        // replies.
        if self.flights.is_full() {
            self.turn_away(|text| batch.error(i, Status::Overloaded, text));
            return false;
        }
        let deadline = batch.requests()[i].deadline(since);
        let id = batch.requests()[i].id;
        let span = tracing::debug_span!("request", id);
        let waiter = Waiter { later: batch.later(i), since, span, deadline };
        let joined = self.flights.join(hash.identity(), waiter);
        if deadline.is_some() {
            self.keep_deadlines();
        }
        match joined {
            Join::First => true,
            Join::Joined => false,
            Join::Full(waiter) => {
                self.turn_away(|text| waiter.later.error(Status::Overloaded, text));
                false
            }
        }
    }

    fn turn_away(&self, reply: impl FnOnce(&str)) {
        self.counters.overloaded.fetch_add(1, Relaxed);
        reply(&format!("{} requests are waiting already", self.flights.waiting()));
    }

    /// For how long anybody waits on the flight of `hash`. When nobody does any more, the flight
    /// ends here: its call need not be made.
    pub(super) fn wanted(&self, hash: ImageHash, now: Instant) -> Wanted {
        let wanted = self.flights.land_unless(hash.identity(), |waiters| {
            let mut last = None;
            for waiter in waiters {
                let Some(deadline) = waiter.deadline else { return Some(Wanted::Always) };
                last = last.max(Some(deadline));
            }
            last.filter(|&last| last > now).map(Wanted::Until)
        });
        wanted.unwrap_or_else(|late| {
            self.counters.calls_dropped.fetch_add(1, Relaxed);
            late.into_iter().for_each(|waiter| self.expire(waiter, now));
            Wanted::NoMore
        })
    }

    /// Sees to it that budgets are kept: while anybody waits, a task of the runtime that serves the
    /// connections takes those off their flights who wait no longer. The calls go on.
    fn keep_deadlines(self: &Arc<Self>) {
        if !self.sweeping.start() {
            return;
        }
        let Ok(runtime) = tokio::runtime::Handle::try_current() else {
            return self.sweeping.abandon();
        };
        let shared = Arc::downgrade(self);
        runtime.spawn(async move {
            loop {
                tokio::time::sleep(SWEEP_EVERY).await;
                let Some(shared) = shared.upgrade() else { return };
                shared.sweep(sync::now());
                let needed = || shared.flights.waiting() > 0;
                if !needed() && shared.sweeping.stop(needed) {
                    return;
                }
            }
        });
    }

    fn sweep(&self, now: Instant) {
        let late = self.flights.disembark(|waiter| waiter.is_late(now));
        corked(|| late.into_iter().for_each(|waiter| self.expire(waiter, now)));
    }

    fn expire(&self, Waiter { later, since, span, .. }: Waiter, now: Instant) {
        self.counters.expired.fetch_add(1, Relaxed);
        span.in_scope(|| tracing::debug!(waited = ?(now - since), "its budget is spent"));
        let text = format!("no answer within the request's budget; {:?} passed", now - since);
        later.error(Status::DeadlineExceeded, &text);
    }
}
