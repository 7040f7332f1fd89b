//! One call to the pool: its place in the queue, its attempts at replicas, its retries and its
//! hedge.

use std::cell::Cell;
use std::fmt;
use std::mem::take;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};

use afterimage_core::{ClientId, Computed, Failure, ModelId, Refused, Reply, Rows, Status, Wanted};
use afterimage_wire::corked;
use arrayvec::ArrayVec;
use bytes::Bytes;
use tokio::sync::Notify;

use super::endpoint::{BatchLimit, Endpoint, EndpointError, Retry};
use super::health::Outcome;
use super::hedge::Ticket;
use super::{Pool, State};
use crate::request::Context;
use crate::sync;
use crate::upstream;

/// The most retries of a request. After three failures a fourth attempt is unlikely to succeed.
const RETRIES: usize = 2;

/// A call to the pool: one row, or several of a request.
pub(super) struct Call {
    rows: Rows<Bytes>,
    /// The number of each row in the request of the context.
    positions: Rows<u32>,
    pub(super) about: About,
    way: Mutex<Way>,
}

/// The request behind a call.
#[derive(Clone)]
pub(super) struct About {
    context: Option<Context>,
    /// The requested model.
    model: Arc<ModelId>,
    pub(super) client: ClientId,
    /// For logs.
    request_id: u64,
    /// When it began to wait.
    since: Instant,
}

/// The duty to answer one row.
type RowReply = Reply<Result<Computed, Failure>>;

/// The progress of a call.
struct Way {
    /// The replies of the rows; `None` after one was sent.
    replies: Rows<Option<RowReply>>,
    /// The numbers of the replicas that got the call.
    tried: ArrayVec<u64, { RETRIES + 1 }>,
    /// The number of attempts in flight.
    out: usize,
    /// The entry among the hedges, while the call waits for half of its time to be over.
    ticket: Option<Ticket>,
}

impl Way {
    fn is_answered(&self) -> bool {
        self.replies.iter().all(Option::is_none)
    }

    /// Takes all replies that are left.
    fn take(&mut self) -> Rows<RowReply> {
        self.replies.iter_mut().filter_map(Option::take).collect()
    }

    /// Does not count an attempt that had less time than the waiters that joined later: the replica
    /// may have been quick enough for them. An attempt that took no time counts, so that the
    /// attempts of a call end.
    fn forgive(&mut self, attempt: &Sent) {
        if sync::now() > attempt.sent
            && let Some(at) = self.tried.iter().rposition(|number| *number == attempt.number)
        {
            self.tried.remove(at);
        }
    }

    /// How long the call is wanted. Takes the replies of the rows that no request waits for.
    fn wanted(&mut self, now: Instant) -> (Wanted, Rows<RowReply>) {
        let (mut all, mut unwanted) = (Wanted::NoMore, Rows::new());
        for place in &mut self.replies {
            match place.as_ref().map_or(Wanted::NoMore, |reply| reply.wanted(now)) {
                Wanted::NoMore => unwanted.extend(place.take()),
                wanted => all = all.or(wanted),
            }
        }
        (all, unwanted)
    }
}

/// One attempt of a call at one replica. The holder owes its end: a dropped attempt fails.
pub struct Attempt(Option<Sent>);

struct Sent {
    pool: Arc<Pool>,
    call: Arc<Call>,
    /// The rows that are still wanted, if these are not all rows of the call.
    part: Option<Part>,
    number: u64,
    sent: Instant,
    timeout: Duration,
}

/// Some rows of a call, and their indexes in it.
struct Part {
    rows: Rows<Bytes>,
    positions: Rows<u32>,
    of: Vec<usize>,
}

impl Attempt {
    fn sent(&self) -> &Sent {
        self.0.as_ref().expect("only `end` and `drop` take it")
    }

    /// The rows, at least one, and not more than the endpoint's [`batch`](Endpoint::batch) allowed.
    pub fn rows(&self) -> &Rows<Bytes> {
        self.sent().rows()
    }

    /// The number of each row in the request of the context.
    pub fn positions(&self) -> &Rows<u32> {
        let sent = self.sent();
        sent.part.as_ref().map_or(&sent.call.positions, |part| &part.positions)
    }

    /// What the front end sent along with the request that asked first.
    pub fn context(&self) -> Option<&Context> {
        self.sent().call.about.context.as_ref()
    }

    /// The model whose answers are wanted. Those of another model are not used.
    pub fn model(&self) -> &Arc<ModelId> {
        &self.sent().call.about.model
    }

    /// The id of the request that asked first, for logs.
    pub fn request_id(&self) -> u64 {
        self.sent().call.about.request_id
    }

    /// The longest time for the attempt. The endpoint ends it then.
    pub fn timeout(&self) -> Duration {
        self.sent().timeout
    }

    /// Whether a row is still wanted. An endpoint that lets attempts wait asks this before it sends
    /// one, and drops an attempt that is not wanted. This says nothing about the replica's health.
    pub fn is_wanted(&self) -> bool {
        self.sent().is_wanted()
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
        let Some(sent) = self.0.take() else { return };
        let (text, outcome, retry) = match sent.is_wanted() {
            true => {
                let text = "the endpoint dropped the call without an answer";
                (text, Outcome::Failed, Retry::Budgeted)
            }
            false => ("no request waits for the answer", Outcome::CutShort, Retry::Never),
        };
        let (status, text, payload) = (Status::Internal, text.to_owned(), None);
        sent.end(Err(EndpointError { status, text, outcome, retry, payload }));
    }
}

impl fmt::Debug for Attempt {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Attempt").finish_non_exhaustive()
    }
}

impl Sent {
    fn rows(&self) -> &Rows<Bytes> {
        self.part.as_ref().map_or(&self.call.rows, |part| &part.rows)
    }

    fn is_wanted(&self) -> bool {
        let now = sync::now();
        let way = self.call.lock();
        way.replies.iter().flatten().any(|reply| reply.is_wanted(now))
    }

    fn end(self, result: Result<Computed, EndpointError>) {
        let rows = self.rows().len();
        let result = result.and_then(|computed| match computed.answers.len() {
            answers if answers == rows => Ok(computed),
            answers => Err(EndpointError {
                status: Status::UpstreamError,
                text: format!("the endpoint gave {answers} answers for {rows} rows"),
                outcome: Outcome::Failed,
                retry: Retry::Budgeted,
                payload: None,
            }),
        });
        Arc::clone(&self.pool).ended(&self, result);
    }

    /// Whether the timeout was shortened to the waiters' deadlines.
    fn cut_short(&self) -> bool {
        self.timeout < self.pool.options.timeout
    }
}

impl Call {
    /// A call of one row, with its reply.
    pub(super) fn of_row(call: upstream::Call, since: Instant) -> Arc<Call> {
        let upstream::Call { rows, positions, context, model, client, request_id, reply } = call;
        let about = About { context, model, client, request_id, since };
        let replies = Rows::from_buf([Some(reply)]);
        let way = Way { replies, tried: ArrayVec::new(), out: 0, ticket: None };
        Arc::new(Call { rows, positions, about, way: Mutex::new(way) })
    }

    /// Makes calls within `limit` of the rows of one call. Each row keeps a reply of its own.
    pub(super) fn divide(
        call: upstream::Call,
        limit: BatchLimit,
        since: Instant,
    ) -> Rows<Arc<Call>> {
        let (model, client, context) = (Arc::clone(&call.model), call.client, call.context.clone());
        let about = About { context, model, client, request_id: call.request_id, since };
        let rows = call.scatter().map(|call| {
            let upstream::Call { mut rows, mut positions, reply, .. } = call;
            let row = rows.pop().expect("a call has a row");
            (row, positions.pop().unwrap_or(0), reply)
        });
        about.calls(rows, limit)
    }

    /// Fails a call that has no place.
    pub(super) fn refuse(&self, text: String) {
        let replies = self.lock().take();
        fail(replies, &Failure::new(Status::Overloaded, text));
    }

    fn lock(&self) -> MutexGuard<'_, Way> {
        // Nothing panics half-way under this lock.
        self.way.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl About {
    /// Groups rows into calls within `limit`.
    fn calls(
        &self,
        rows: impl Iterator<Item = (Bytes, u32, RowReply)>,
        limit: BatchLimit,
    ) -> Rows<Arc<Call>> {
        let mut calls = Rows::new();
        let (mut group, mut positions, mut replies) = (Rows::new(), Rows::new(), Rows::new());
        let mut bytes = 0;
        for (row, position, reply) in rows {
            let is_full = group.len() >= limit.rows || bytes + row.len() > limit.bytes;
            if is_full && !group.is_empty() {
                let (group, positions) = (take(&mut group), take(&mut positions));
                calls.push(self.call(group, positions, take(&mut replies)));
                bytes = 0;
            }
            bytes += row.len();
            group.push(row);
            positions.push(position);
            replies.push(Some(reply));
        }
        if !group.is_empty() {
            calls.push(self.call(group, positions, replies));
        }
        calls
    }

    fn call(
        &self,
        rows: Rows<Bytes>,
        positions: Rows<u32>,
        replies: Rows<Option<RowReply>>,
    ) -> Arc<Call> {
        let way = Way { replies, tried: ArrayVec::new(), out: 0, ticket: None };
        Arc::new(Call { rows, positions, about: self.clone(), way: Mutex::new(way) })
    }
}

/// Answers each row with the same failure.
fn fail(replies: Rows<RowReply>, failure: &Failure) {
    for reply in replies {
        reply.send(Err(failure.clone()));
    }
}

impl Part {
    /// The rows of a call whose replies are left; `None` if that is all of them.
    fn of(call: &Call, way: &Way) -> Option<Part> {
        if way.replies.iter().all(Option::is_some) {
            return None;
        }
        let left = way.replies.iter().enumerate().filter(|(_, reply)| reply.is_some());
        let of: Vec<usize> = left.map(|(i, _)| i).collect();
        let rows = of.iter().map(|&i| call.rows[i].clone()).collect();
        let positions = of.iter().map(|&i| call.positions[i]).collect();
        Some(Part { rows, positions, of })
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
        if let Some(_sending) = Sending::start(self) {
            self.send_in_turn();
        }
    }

    fn send_in_turn(self: &Arc<Self>) {
        loop {
            let call = {
                let mut state = self.lock();
                if state.waiting.is_empty() || !state.has_place(self) {
                    return;
                }
                let Some(call) = state.waiting.pop() else { return };
                call
            };
            let waited = sync::now().saturating_duration_since(call.about.since);
            match waited < self.options.timeout {
                true => self.send(&call),
                false => call.refuse(format!("no classifier took the call within {waited:?}")),
            }
        }
    }

    /// Sends calls, as many as can be sent, and adds the others to the waiting ones.
    pub(super) fn queue(self: &Arc<Self>, calls: impl IntoIterator<Item = Arc<Call>>) {
        let sending = Sending::start(self);
        let mut refused = Rows::new();
        for call in calls {
            let mut state = self.lock();
            // A call that would be the only one in the queue need not pass through it.
            if sending.is_some() && state.waiting.is_empty() && state.has_place(self) {
                drop(state);
                self.send(&call);
            } else {
                refused.extend(state.waiting.push(call.about.client, call).err());
            }
        }
        if sending.is_some() {
            self.send_in_turn();
        }
        drop(sending);
        for Refused { item: call, waiting, limit } in refused {
            call.refuse(format!("{waiting} calls of this client wait; its limit is {limit} now"));
        }
    }

    /// Sends a call to the best replica.
    pub(super) fn send(self: &Arc<Self>, call: &Arc<Call>) {
        let now = sync::now();
        let mut way = call.lock();
        if way.tried.is_full() {
            // The hedge and a retry race; the other one was first.
            return;
        }
        let (wanted, unwanted) = way.wanted(now);
        let left = match wanted {
            Wanted::NoMore => {
                drop(way);
                return drop(unwanted);
            }
            Wanted::Always => None,
            Wanted::Until(deadline) => Some(deadline - now),
        };
        if self.exceeds_batch(call) {
            // A replica that takes fewer rows has connected since. An attempt in flight goes on.
            let replies = if way.out == 0 { take(&mut way.replies) } else { Rows::new() };
            drop(way);
            drop(unwanted);
            return self.divide_again(call, replies);
        }
        let part = Part::of(call, &way);
        let rows = part.as_ref().map_or(call.rows.len(), |part| part.rows.len());
        let timeout = left.map_or(self.options.timeout, |left| left.min(self.options.timeout));
        let Way { tried, out, ticket, .. } = &mut *way;
        if !tried.is_empty() {
            self.retries.fetch_add(1, Relaxed);
        }
        let model = &call.about.model;
        let (picked, silent) = {
            let mut state = self.lock();
            let silent = state.balance.eject_silent(now);
            let picked = state.pick(now, model, tried, rows);
            if let Ok((number, _)) = &picked {
                tried.push(*number);
                *out += 1;
                // With more time, the attempt itself ends before half of the time is over.
                let half = left.map(|left| left / 2).filter(|&half| half < self.options.timeout);
                if let Some(half) = half
                    && state.offers(model, tried)
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
            Err(_) if *out == 0 => way.take(),
            _ => Rows::new(),
        };
        drop(way);
        drop(unwanted);
        self.ejected(silent, "it owes answers and gives none");
        match picked {
            Ok((number, replica)) => {
                let (pool, call) = (Arc::clone(self), Arc::clone(call));
                replica.call(Attempt(Some(Sent { pool, call, part, number, sent: now, timeout })));
            }
            Err(failure) => fail(failed, &failure),
        }
    }

    /// Whether a replica takes fewer rows than the call has.
    fn exceeds_batch(&self, call: &Call) -> bool {
        call.rows.len() > 1 && call.rows.len() > self.lock().balance.batch(&call.about.model).rows
    }

    /// Sends the rows whose replies are left in calls of fewer rows.
    fn divide_again(self: &Arc<Self>, call: &Call, replies: Rows<Option<RowReply>>) {
        let limit = self.lock().balance.batch(&call.about.model);
        let rows = call.rows.iter().cloned().zip(call.positions.iter().copied());
        let rows = rows.zip(replies);
        let rows = rows.filter_map(|((row, position), reply)| Some((row, position, reply?)));
        self.queue(call.about.calls(rows, limit));
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
            if way.is_answered() {
                return;
            }
            let mut state = self.lock();
            if !state.offers(&call.about.model, &way.tried) {
                return;
            }
            if !state.budget.spend(call.rows.len()) {
                self.retries_denied.fetch_add(1, Relaxed);
                return;
            }
        }
        self.send(call);
    }

    /// Handles the end of an attempt.
    fn ended(self: &Arc<Self>, attempt: &Sent, result: Result<Computed, EndpointError>) {
        let (call, rows) = (&attempt.call, attempt.rows().len());
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
                state.balance.adapt_limit(attempt.number, took, rows);
            }
            state.balance.ended(now, attempt.number, about_it, rows)
        };
        let reason = result.as_ref().err().map_or("", |error| &error.text);
        self.ejected(ejected, reason);
        match result {
            Ok(computed) => self.answered(attempt, computed),
            Err(error) => {
                let again = match error.status {
                    // The timeout was that of the waiters at the start. A waiter with time left has
                    // joined since.
                    Status::DeadlineExceeded if attempt.cut_short() => {
                        call.lock().forgive(attempt);
                        Retry::Free
                    }
                    _ => error.retry,
                };
                self.again(call, again, error.into_failure());
            }
        }
        self.send_waiting();
    }

    fn answered(self: &Arc<Self>, attempt: &Sent, computed: Computed) {
        let call = &attempt.call;
        let mut way = call.lock();
        if way.is_answered() {
            return;
        }
        if call.about.model != computed.model {
            drop(way);
            // The answer of another model is not used. Another replica may have the right model.
            self.moved.fetch_add(1, Relaxed);
            return self.again(call, Retry::Free, Failure::model_changed());
        }
        let of = |i: usize| attempt.part.as_ref().map_or(i, |part| part.of[i]);
        let Computed { model, answers } = computed;
        let answers = answers.into_iter().enumerate();
        let answers = answers.filter_map(|(i, answer)| Some((way.replies[of(i)].take()?, answer)));
        let answers: Rows<_> = answers.collect();
        drop(way);
        corked(|| {
            for (reply, answer) in answers {
                let (model, answers) = (Arc::clone(&model), Rows::from_buf([answer]));
                reply.send(Ok(Computed { model, answers }));
            }
        });
    }

    /// Repeats a call at another replica if the error and the budget allow it. Otherwise the call
    /// fails, unless another attempt is in flight.
    fn again(self: &Arc<Self>, call: &Arc<Call>, again: Retry, failure: Failure) {
        let mut way = call.lock();
        if way.is_answered() {
            return;
        }
        tracing::debug!(id = call.about.request_id, %failure, "the classifier did not answer");
        let allowed = way.tried.len() <= RETRIES
            && match again {
                Retry::Never => false,
                Retry::Free => true,
                Retry::Budgeted => self.pays_for(call, &way.tried),
            };
        if allowed {
            drop(way);
            return self.send(call);
        }
        if way.out == 0 {
            let replies = way.take();
            drop(way);
            fail(replies, &failure);
        }
    }

    /// Whether another replica is available and the budget allows a retry.
    fn pays_for(&self, call: &Call, tried: &[u64]) -> bool {
        let mut state = self.lock();
        // A retry at the only replica spends no budget.
        let elsewhere = state.balance.offers(Some(&call.about.model), tried);
        let allowed = elsewhere && state.budget.spend(call.rows.len());
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
    /// Whether a replica has a place for a call.
    fn has_place(&self, pool: &Pool) -> bool {
        self.balance.has_place(pool.model.load().as_ref())
    }

    /// Chooses the replica for the next attempt.
    fn pick(
        &mut self,
        now: Instant,
        model: &Arc<ModelId>,
        tried: &[u64],
        rows: usize,
    ) -> Result<(u64, Arc<dyn Endpoint>), Failure> {
        let model = Some(model);
        if tried.is_empty() {
            self.budget.earn(rows);
        }
        let picked = self.balance.pick(now, model, tried, rows);
        if let Some(picked) = picked.or_else(|| self.balance.pick(now, model, &[], rows)) {
            return Ok(picked);
        }
        if self.balance.any_connected() {
            // No connected replica runs the model any more.
            return Err(Failure::model_changed());
        }
        // No replica is connected. The client of any replica reports the cause, or is just
        // reconnecting.
        self.balance.pick_any(now, tried, rows).ok_or_else(|| {
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
