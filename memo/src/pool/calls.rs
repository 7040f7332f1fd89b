//! A request's way: to a replica, to another one when that fails or takes too long, and back.

use std::fmt;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Instant;

use afterimage_wire::CallError;
use afterimage_wire::client::Report;
use afterimage_wire::proto::message::Classification;
use afterimage_wire::proto::{Status, Welcome};
use afterimage_wire::text::Escaped;
use arrayvec::ArrayVec;
use tokio::sync::Notify;

use super::endpoint::Endpoint;
use super::endpoint::{ErrorClass, Retry, failure};
use super::health::Outcome;
use super::hedge::Ticket;
use super::{Pool, State};
use crate::sync;
use crate::upstream::{Answer, Failure, Job, Reply, Wanted};

/// The most retries of a request. After three failures a fourth attempt is unlikely to succeed.
const RETRIES: usize = 2;

/// A request on its way.
pub(super) struct Call {
    image: Arc<[u8]>,
    way: Mutex<Way>,
}

/// How far it has come.
struct Way {
    /// `None` when it is spent.
    reply: Option<Reply>,
    /// The numbers of the replicas that were asked.
    tried: ArrayVec<u64, { RETRIES + 1 }>,
    /// How many of them may still answer.
    out: usize,
    /// Where it waits for half of its time to be over.
    ticket: Option<Ticket>,
}

/// One replica being asked.
struct Attempt {
    number: u64,
    replica: Arc<Endpoint>,
    /// Its timeout was shortened to the waiters' deadlines.
    cut_short: bool,
}

impl Call {
    pub(super) fn new(Job { image, reply }: Job) -> Arc<Self> {
        let (reply, tried) = (Some(reply), ArrayVec::new());
        let way = Mutex::new(Way { reply, tried, out: 0, ticket: None });
        Arc::new(Call { image: image.into(), way })
    }

    fn lock(&self) -> MutexGuard<'_, Way> {
        // Nothing panics half-way under this lock.
        self.way.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl fmt::Debug for Call {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Call").finish_non_exhaustive()
    }
}

/// Locks are taken in this order: a call's, then the pool's.
impl Pool {
    /// Sends a request to the replica that suits it best.
    pub(super) fn send(self: &Arc<Self>, call: &Arc<Call>) {
        let now = sync::now();
        let mut way = call.lock();
        let Way { reply: Some(reply), tried, out, ticket } = &mut *way else { return };
        if tried.is_full() {
            // Its time was half over and an attempt failed at the same moment: one of them was
            // first.
            return;
        }
        let left = match reply.wanted(now) {
            Wanted::NoMore => return,
            Wanted::Always => None,
            Wanted::Until(deadline) => Some(deadline - now),
        };
        let timeout = left.map_or(self.options.timeout, |left| left.min(self.options.timeout));
        if !tried.is_empty() {
            self.retries.fetch_add(1, Relaxed);
        }
        let (picked, silent) = {
            let mut state = self.lock();
            let silent = state.balance.eject_silent(now);
            let picked = state.pick(now, reply, tried);
            if let Ok((number, _)) = &picked {
                tried.push(*number);
                *out += 1;
                // With more time than that the attempt itself ends before half of it is over.
                let half = left.map(|left| left / 2).filter(|&half| half < self.options.timeout);
                if let Some(half) = half
                    && state.offers(reply, tried)
                {
                    *ticket = Some(state.hedges.add(now + half, call));
                    if state.hedges.needs_earlier_wake() {
                        self.hedge_wake.notify_one();
                    }
                }
            }
            (picked, silent)
        };
        let failed = match &picked {
            Err(_) if *out == 0 => way.reply.take(),
            _ => None,
        };
        drop(way);
        self.ejected(silent, "it owes answers and gives none");
        match picked {
            Ok((number, replica)) => {
                let cut_short = timeout < self.options.timeout;
                let (pool, call) = (Arc::clone(self), Arc::clone(call));
                let attempt = Attempt { number, replica: Arc::clone(&replica), cut_short };
                let image = Arc::clone(&call.image);
                replica.client.submit_classify(&image, timeout, move |outcome| {
                    pool.ended(&call, &attempt, outcome);
                });
            }
            Err(failure) => {
                if let Some(reply) = failed {
                    reply.send(Err(failure));
                }
            }
        }
    }

    /// Asks elsewhere, too, what is half-way through its time, for as long as the pool lives.
    pub(super) async fn run_hedges(pool: Weak<Pool>, hedge_wake: Arc<Notify>) {
        loop {
            let next = {
                let Some(pool) = pool.upgrade() else { return };
                let now = sync::now();
                while let Some(call) = pool.take_due(now) {
                    pool.hedge(&call);
                }
                pool.lock().hedges.arm()
            };
            let pressed = hedge_wake.notified();
            match next {
                None => pressed.await,
                Some(next) => tokio::select! {
                    biased;
                    () = pressed => {}
                    () = tokio::time::sleep_until(next.into()) => {}
                },
            }
        }
    }

    fn take_due(&self, now: Instant) -> Option<Arc<Call>> {
        self.lock().hedges.take_due(now)
    }

    /// Half of a request's time is over and no answer has come: another replica is asked, too, as
    /// far as the budget goes. Whoever answers first is believed, so that one that is slow and
    /// not dead loses nothing.
    fn hedge(self: &Arc<Self>, call: &Arc<Call>) {
        {
            let mut way = call.lock();
            way.ticket = None;
            let Some(reply) = &way.reply else { return };
            let mut state = self.lock();
            if !state.offers(reply, &way.tried) {
                return;
            }
            if !state.budget.spend() {
                self.retries_denied.fetch_add(1, Relaxed);
                return;
            }
        }
        self.send(call);
    }

    /// A replica has answered, or failed to.
    fn ended(
        self: &Arc<Self>,
        call: &Arc<Call>,
        attempt: &Attempt,
        outcome: Result<(Classification, Arc<Welcome>), CallError>,
    ) {
        let verdict = match &outcome {
            Ok(_) => ErrorClass { outcome: Outcome::Answered, again: Retry::Never },
            Err(error) => ErrorClass::of(error),
        };
        let about_it = match verdict.outcome {
            Outcome::TimedOut if attempt.cut_short => Outcome::CutShort,
            outcome => outcome,
        };
        let ejected = {
            let mut way = call.lock();
            let mut state = self.lock();
            way.out -= 1;
            if let Some(ticket) = way.ticket.take() {
                state.hedges.remove(ticket);
            }
            state.balance.ended(sync::now(), attempt.number, about_it)
        };
        let reason = outcome.as_ref().err().map(|error| Escaped(Report(error)).to_string());
        let reason = reason.unwrap_or_default();
        self.ejected(ejected, &reason);
        match outcome {
            Ok((label, welcome)) => self.answered(call, &attempt.replica, label, &welcome),
            Err(error) => {
                let again = match error.status() {
                    // Its time was that of those who waited then. If somebody waits still, he came
                    // later.
                    Status::DeadlineExceeded if attempt.cut_short => Retry::Free,
                    _ => verdict.again,
                };
                self.again(call, again, failure(&error));
            }
        }
    }

    fn answered(
        self: &Arc<Self>,
        call: &Arc<Call>,
        replica: &Endpoint,
        label: Classification,
        welcome: &Arc<Welcome>,
    ) {
        let model = replica.model_of(welcome);
        let mut way = call.lock();
        let Some(reply) = &way.reply else { return };
        let is_asked_for = reply.model().is_none_or(|asked| *asked == model);
        if !is_asked_for {
            drop(way);
            // The answer of another model is not used. Another replica may have the right model.
            self.moved.fetch_add(1, Relaxed);
            return self.again(call, Retry::Free, Failure::model_changed());
        }
        let reply = way.reply.take();
        drop(way);
        if let Some(reply) = reply {
            reply.send(Ok(Answer { label: label.label, model }));
        }
    }

    /// Asks another replica, if that is worth while and the budget allows it; fails if it is not,
    /// and nobody else may still answer.
    fn again(self: &Arc<Self>, call: &Arc<Call>, again: Retry, failure: Failure) {
        let mut way = call.lock();
        let Some(reply) = &way.reply else { return };
        tracing::debug!(id = reply.request_id(), %failure, "the classifier did not answer");
        let allowed = way.tried.len() <= RETRIES
            && match again {
                Retry::Never => false,
                Retry::Free => true,
                Retry::Budgeted => self.pays_for(reply, &way.tried),
            };
        if allowed {
            drop(way);
            return self.send(call);
        }
        if way.out == 0
            && let Some(reply) = way.reply.take()
        {
            drop(way);
            reply.send(Err(failure));
        }
    }

    /// Whether there is another replica to ask, and the budget allows it.
    fn pays_for(&self, reply: &Reply, tried: &[u64]) -> bool {
        let mut state = self.lock();
        // With no other replica to ask, the retry spends no budget.
        let elsewhere = state.balance.offers(reply.model(), tried);
        let allowed = elsewhere && state.budget.spend();
        if elsewhere && !allowed {
            self.retries_denied.fetch_add(1, Relaxed);
        }
        allowed
    }
}

impl State {
    /// Where a request goes next.
    fn pick(
        &mut self,
        now: Instant,
        reply: &Reply,
        tried: &[u64],
    ) -> Result<(u64, Arc<Endpoint>), Failure> {
        let model = reply.model();
        if tried.is_empty() {
            self.budget.earn();
        }
        let picked = self.balance.pick(now, model, tried);
        if let Some(picked) = picked.or_else(|| self.balance.pick(now, model, &[])) {
            return Ok(picked);
        }
        if self.balance.any_connected() {
            // The model has gone with the last replica that had it.
            return Err(Failure::model_changed());
        }
        // Nobody is there: who is asked says why, or is just changing to a new connection.
        self.balance.pick_any(now, tried).ok_or_else(|| Failure {
            status: Status::UpstreamCrashed,
            text: self.unresolved.clone().unwrap_or_else(|| "there is no classifier yet".into()),
        })
    }

    /// Whether a replica that is well could be asked, too.
    fn offers(&self, reply: &Reply, tried: &[u64]) -> bool {
        tried.len() <= RETRIES && self.balance.offers_well(reply.model(), tried)
    }
}
