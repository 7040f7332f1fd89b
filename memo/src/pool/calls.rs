//! One call to the pool: its place in the queue, its attempts at replicas, its retries and its
//! hedge.

use std::cell::Cell;
use std::fmt;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};

use afterimage_core::{Computed, Failure, ModelId, Reply, Rows, Status, Wanted};
use arrayvec::ArrayVec;
use bytes::Bytes;
use tokio::sync::Notify;

use super::endpoint::{Endpoint, EndpointError, Retry};
use super::health::Outcome;
use super::hedge::Ticket;
use super::{Pool, State};
use crate::sync;
use crate::upstream;

/// The most retries of a request. After three failures a fourth attempt is unlikely to succeed.
const RETRIES: usize = 2;

/// A call to the pool.
pub(super) struct Call {
    rows: Rows<Bytes>,
    /// The requested model.
    model: Arc<ModelId>,
    /// For logs.
    request_id: u64,
    /// When it began to wait.
    since: Instant,
    way: Mutex<Way>,
}

/// The progress of a call.
struct Way {
    /// `None` after the reply was sent.
    reply: Option<Reply<Result<Computed, Failure>>>,
    /// The numbers of the replicas that got the call.
    tried: ArrayVec<u64, { RETRIES + 1 }>,
    /// The number of attempts in flight.
    out: usize,
    /// The entry among the hedges, while the call waits for half of its time to be over.
    ticket: Option<Ticket>,
}

/// One attempt of a call at one replica. The holder owes its end: a dropped attempt fails.
pub struct Attempt(Option<Sent>);

struct Sent {
    pool: Arc<Pool>,
    call: Arc<Call>,
    number: u64,
    sent: Instant,
    timeout: Duration,
}

impl Attempt {
    fn sent(&self) -> &Sent {
        self.0.as_ref().expect("only `end` and `drop` take it")
    }

    /// The rows, at least one. Now the pool sends each row as a call of its own.
    pub fn rows(&self) -> &Rows<Bytes> {
        &self.sent().call.rows
    }

    /// The model whose answers are wanted. Those of another model are not used.
    pub fn model(&self) -> &Arc<ModelId> {
        &self.sent().call.model
    }

    /// The id of the request that asked first, for logs.
    pub fn request_id(&self) -> u64 {
        self.sent().call.request_id
    }

    /// The longest time for the attempt. The endpoint ends it then.
    pub fn timeout(&self) -> Duration {
        self.sent().timeout
    }

    /// Ends the attempt, with one answer for each row in order, or with an error. Runs the waiters'
    /// replies, so the caller must hold no lock that they take.
    pub fn end(mut self, result: Result<Computed, EndpointError>) {
        if let Some(sent) = self.0.take() {
            sent.end(result);
        }
    }
}

impl Drop for Attempt {
    fn drop(&mut self) {
        if let Some(sent) = self.0.take() {
            sent.end(Err(EndpointError {
                status: Status::Internal,
                text: "the endpoint dropped the call without an answer".to_owned(),
                outcome: Outcome::Failed,
                retry: Retry::Budgeted,
            }));
        }
    }
}

impl fmt::Debug for Attempt {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Attempt").finish_non_exhaustive()
    }
}

impl Sent {
    fn end(self, result: Result<Computed, EndpointError>) {
        let rows = self.call.rows.len();
        let result = result.and_then(|computed| match computed.answers.len() {
            answers if answers == rows => Ok(computed),
            answers => Err(EndpointError {
                status: Status::UpstreamError,
                text: format!("the endpoint gave {answers} answers for {rows} rows"),
                outcome: Outcome::Failed,
                retry: Retry::Budgeted,
            }),
        });
        self.pool.ended(&self.call, &self, result);
    }

    /// Whether the timeout was shortened to the waiters' deadlines.
    fn cut_short(&self) -> bool {
        self.timeout < self.pool.options.timeout
    }
}

impl Call {
    pub(super) fn new(call: upstream::Call, since: Instant) -> Arc<Self> {
        let upstream::Call { rows, model, request_id, reply, .. } = call;
        let (reply, tried) = (Some(reply), ArrayVec::new());
        let way = Mutex::new(Way { reply, tried, out: 0, ticket: None });
        Arc::new(Call { rows, model, request_id, since, way })
    }

    /// Fails a call that has no place.
    pub(super) fn refuse(&self, text: String) {
        let reply = self.lock().reply.take();
        if let Some(reply) = reply {
            reply.send(Err(Failure::new(Status::Overloaded, text)));
        }
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
    /// Sends the calls that wait, of clients in turn, while replicas have places.
    pub(super) fn send_waiting(self: &Arc<Self>) {
        // An attempt that fails at once ends inside of `send`. The loop that called `send` goes on
        // with the next call, so this one need not, and the stack stays flat.
        let Some(_sending) = Sending::start(self) else { return };
        loop {
            let call = {
                let mut state = self.lock();
                let model = self.model.load();
                if !state.balance.has_place(model.as_ref()) {
                    return;
                }
                let Some(call) = state.waiting.pop() else { return };
                call
            };
            let waited = sync::now().saturating_duration_since(call.since);
            match waited < self.options.timeout {
                true => self.send(&call),
                false => call.refuse(format!("no classifier had a place for {waited:?}")),
            }
        }
    }

    /// Sends a call to the best replica.
    pub(super) fn send(self: &Arc<Self>, call: &Arc<Call>) {
        let now = sync::now();
        let mut way = call.lock();
        let Way { reply: Some(reply), tried, out, ticket } = &mut *way else { return };
        if tried.is_full() {
            // The hedge and a retry race; the other one was first.
            return;
        }
        let left = match reply.wanted(now) {
            Wanted::NoMore => {
                let unwanted = way.reply.take();
                drop(way);
                return drop(unwanted);
            }
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
            let picked = state.pick(now, &call.model, tried);
            if let Ok((number, _)) = &picked {
                tried.push(*number);
                *out += 1;
                // With more time, the attempt itself ends before half of the time is over.
                let half = left.map(|left| left / 2).filter(|&half| half < self.options.timeout);
                if let Some(half) = half
                    && state.offers(&call.model, tried)
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
                let (pool, call) = (Arc::clone(self), Arc::clone(call));
                replica.call(Attempt(Some(Sent { pool, call, number, sent: now, timeout })));
            }
            Err(failure) => {
                if let Some(reply) = failed {
                    reply.send(Err(failure));
                }
            }
        }
    }

    /// Hedges each call when half of its time is over. Ends with the pool.
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

    /// Sends a call to a second replica if the budget allows it. The first attempt continues and
    /// the first answer wins, so a slow replica loses nothing.
    fn hedge(self: &Arc<Self>, call: &Arc<Call>) {
        {
            let mut way = call.lock();
            way.ticket = None;
            if way.reply.is_none() {
                return;
            }
            let mut state = self.lock();
            if !state.offers(&call.model, &way.tried) {
                return;
            }
            if !state.budget.spend() {
                self.retries_denied.fetch_add(1, Relaxed);
                return;
            }
        }
        self.send(call);
    }

    /// Handles the end of an attempt.
    fn ended(
        self: &Arc<Self>,
        call: &Arc<Call>,
        attempt: &Sent,
        result: Result<Computed, EndpointError>,
    ) {
        let about_it = match &result {
            Ok(_) => Outcome::Answered,
            Err(error) => match error.outcome {
                Outcome::TimedOut if attempt.cut_short() => Outcome::CutShort,
                outcome => outcome,
            },
        };
        let ejected = {
            let mut way = call.lock();
            let mut state = self.lock();
            way.out -= 1;
            if let Some(ticket) = way.ticket.take() {
                state.hedges.remove(ticket);
            }
            let now = sync::now();
            if matches!(about_it, Outcome::Answered) && !state.waiting.is_empty() {
                let took = now.saturating_duration_since(attempt.sent);
                state.balance.adapt_limit(attempt.number, took);
            }
            state.balance.ended(now, attempt.number, about_it)
        };
        let reason = result.as_ref().err().map_or("", |error| &error.text);
        self.ejected(ejected, reason);
        match result {
            Ok(computed) => self.answered(call, computed),
            Err(error) => {
                let again = match error.status {
                    // The timeout was that of the waiters at the start. A waiter with time left has
                    // joined since.
                    Status::DeadlineExceeded if attempt.cut_short() => Retry::Free,
                    _ => error.retry,
                };
                self.again(call, again, error.into_failure());
            }
        }
        self.send_waiting();
    }

    fn answered(self: &Arc<Self>, call: &Arc<Call>, computed: Computed) {
        let mut way = call.lock();
        if way.reply.is_none() {
            return;
        }
        if call.model != computed.model {
            drop(way);
            // The answer of another model is not used. Another replica may have the right model.
            self.moved.fetch_add(1, Relaxed);
            return self.again(call, Retry::Free, Failure::model_changed());
        }
        let reply = way.reply.take();
        drop(way);
        if let Some(reply) = reply {
            reply.send(Ok(computed));
        }
    }

    /// Repeats a call at another replica if the error and the budget allow it. Otherwise the call
    /// fails, unless another attempt is in flight.
    fn again(self: &Arc<Self>, call: &Arc<Call>, again: Retry, failure: Failure) {
        let mut way = call.lock();
        if way.reply.is_none() {
            return;
        }
        tracing::debug!(id = call.request_id, %failure, "the classifier did not answer");
        let allowed = way.tried.len() <= RETRIES
            && match again {
                Retry::Never => false,
                Retry::Free => true,
                Retry::Budgeted => self.pays_for(&call.model, &way.tried),
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

    /// Whether another replica is available and the budget allows a retry.
    fn pays_for(&self, model: &Arc<ModelId>, tried: &[u64]) -> bool {
        let mut state = self.lock();
        // A retry at the only replica spends no budget.
        let elsewhere = state.balance.offers(Some(model), tried);
        let allowed = elsewhere && state.budget.spend();
        if elsewhere && !allowed {
            self.retries_denied.fetch_add(1, Relaxed);
        }
        allowed
    }
}

/// Marks that this thread sends the waiting calls of a pool.
struct Sending {
    before: *const Pool,
}

thread_local! {
    /// The pool whose waiting calls this thread sends.
    static SENDING: Cell<*const Pool> = const { Cell::new(std::ptr::null()) };
}

impl Sending {
    /// `None` when this thread does so already.
    fn start(pool: &Arc<Pool>) -> Option<Self> {
        let before = SENDING.replace(Arc::as_ptr(pool));
        (before != Arc::as_ptr(pool)).then_some(Sending { before })
    }
}

impl Drop for Sending {
    fn drop(&mut self) {
        SENDING.set(self.before);
    }
}

impl State {
    /// Chooses the replica for the next attempt.
    fn pick(
        &mut self,
        now: Instant,
        model: &Arc<ModelId>,
        tried: &[u64],
    ) -> Result<(u64, Arc<dyn Endpoint>), Failure> {
        let model = Some(model);
        if tried.is_empty() {
            self.budget.earn();
        }
        let picked = self.balance.pick(now, model, tried);
        if let Some(picked) = picked.or_else(|| self.balance.pick(now, model, &[])) {
            return Ok(picked);
        }
        if self.balance.any_connected() {
            // No connected replica runs the model any more.
            return Err(Failure::model_changed());
        }
        // No replica is connected. The client of any replica reports the cause, or is just
        // reconnecting.
        self.balance.pick_any(now, tried).ok_or_else(|| {
            let text = match &self.unresolved {
                Some(_) => "cannot connect to the classifier: the name lookup failed",
                None => "there is no classifier yet",
            };
            Failure::new(Status::UpstreamCrashed, text)
        })
    }

    /// Whether another healthy replica could get the call.
    fn offers(&self, model: &Arc<ModelId>, tried: &[u64]) -> bool {
        tried.len() <= RETRIES && self.balance.offers_healthy(Some(model), tried)
    }
}
