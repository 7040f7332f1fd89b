//! Flights that a batch of rows has begun, from joining until their calls are made.

use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use afterimage_core::{
    ClientId, Computed, Failure, Origin, Reply, RowAnswer, RowReply, Rows, Sink, Status, Wanted,
    Watch,
};
use bytes::Bytes;

use crate::deadlines;
use crate::flight::Flight;
use crate::flights::Join;
use crate::inner::Inner;
use crate::key::RowHash;
use crate::metrics::Counters;
use crate::models::{Entry, Space};
use crate::request::Context;
use crate::shares::{Held, HeldBytes, RowBytes, Share};
use crate::sync;
use crate::upstream::Call;
use crate::waiter::{Arrival, Asker, Waiter};

/// Flights that this thread has begun with rows of one batch. Their calls are not made yet.
///
/// It owns the duty to complete them. Dropping it ends those that are left, and their waiters get
/// the outcome of a reply that was dropped.
#[derive(Debug)]
pub(crate) struct Begun {
    pub(crate) inner: Arc<Inner>,
    entry: Arc<Entry>,
    pub(crate) space: Arc<Space>,
    since: Instant,
    client: ClientId,
    refreshes: bool,
    stores: bool,
    ttl: Option<Duration>,
    context: Option<Context>,
    shared_len: usize,
    /// Places for the rows of the batch that have not joined yet.
    places: Option<Share>,
    /// The bytes of the rows here, and of those that have not joined yet.
    bytes: Option<HeldBytes>,
    rows: Vec<Started>,
}

/// The first row of a flight.
#[derive(Debug)]
struct Started {
    hash: RowHash,
    row: Bytes,
    /// The number of the row in its request.
    position: u32,
    first: Watch<Result<RowAnswer, Failure>>,
    asker: Asker,
    /// Whether the flight has still to be completed.
    owed: bool,
}

impl Begun {
    /// No flight yet, for rows of this batch.
    pub(crate) fn new(inner: &Arc<Inner>, arrival: &Arrival<'_>) -> Self {
        Begun {
            inner: Arc::clone(inner),
            entry: Arc::clone(arrival.entry),
            space: Arc::clone(arrival.space),
            since: arrival.since,
            client: arrival.client,
            refreshes: arrival.refreshes,
            stores: arrival.stores,
            ttl: arrival.ttl,
            context: arrival.context.cloned(),
            shared_len: arrival.shared_len,
            places: None,
            bytes: None,
            rows: Vec::new(),
        }
    }

    /// Takes the places and bytes of the rows that join next, given by their lengths, and memory
    /// for them. It costs far less than to do so for each row.
    pub(crate) fn reserve(&mut self, lens: impl ExactSizeIterator<Item = usize>) {
        self.rows.reserve(lens.len());
        let inner = &self.inner;
        if let Some(held) = inner.limits.take_all(self.client, lens, inner.flights.waiting()) {
            self.places = Some(held.places);
            self.hold(held.bytes);
        }
    }

    /// The place of a row of this length, whose bytes are held here from now on.
    ///
    /// # Errors
    /// Why the row cannot wait.
    #[inline]
    pub(crate) fn place(&mut self, len: usize) -> Result<Share, String> {
        match &mut self.places {
            Some(places) if places.amount() > 0 => Ok(places.split(1)),
            _ => self.place_alone(len),
        }
    }

    fn place_alone(&mut self, len: usize) -> Result<Share, String> {
        let inner = &self.inner;
        let waiting = inner.flights.waiting();
        let Held { places, bytes } = inner.limits.take(self.client, len, waiting)?;
        self.hold(bytes);
        Ok(places)
    }

    fn hold(&mut self, bytes: HeldBytes) {
        match &mut self.bytes {
            Some(held) => held.merge(bytes),
            None => self.bytes = Some(bytes),
        }
    }

    /// Puts a waiter with its place on the flight of its row. Returns whether the flight begins
    /// with it.
    pub(crate) fn join(
        &mut self,
        hash: RowHash,
        row: impl FnOnce() -> Bytes,
        row_len: usize,
        asker: Asker,
        reply: RowReply,
        share: Share,
    ) -> bool {
        let &mut Begun { ref inner, ref mut bytes, ref mut rows, since, refreshes, .. } = self;
        let first = reply.watch();
        // The front ends of the library number replies by rows; others send no context.
        let position = reply.token() as u32;
        let span = tracing::debug_span!("request", id = asker.id);
        
        let waiter = Waiter { reply, since, span, deadline: asker.deadline, refreshes, share };
        let joined = inner.flights.join(self.space.keys.flight(hash), waiter);
        if asker.deadline.is_some() {
            deadlines::keep(inner);
        }
        match joined {
            Join::First(permit) => {
                let row = row();
                let started = Started { hash, row, position, first, asker, owed: true };
                rows.push(started);
                // From here on this value owns the duty.
                permit.transfer();
                true
            }
            Join::Joined => {
                give_back(bytes, row_len);
                false
            }
            Join::Full(waiter) => {
                let text = inner.limits.full(inner.flights.waiting());
                refuse(&inner.counters, waiter.reply, text);
                give_back(bytes, row_len);
                false
            }
        }
    }

    /// Puts a waiter on the flight of a row, or answers it if it cannot wait. Returns whether the
    /// flight begins with it.
    pub(crate) fn wait(
        &mut self,
        hash: RowHash,
        row: &Bytes,
        asker: Asker,
        reply: RowReply,
    ) -> bool {
        match self.place(row.len()) {
            Ok(place) => self.join(hash, || row.clone(), row.len(), asker, reply, place),
            Err(text) => {
                refuse(&self.inner.counters, reply, text);
                false
            }
        }
    }

    /// The number of flights that began here, completed ones included.
    pub(crate) fn len(&self) -> usize {
        self.rows.len()
    }

    /// The hashes of their rows, in the order of the batch.
    pub(crate) fn hashes(&self) -> impl Iterator<Item = RowHash> {
        self.rows.iter().map(|started| started.hash)
    }

    /// The hash of the row of flight `i`.
    pub(crate) fn hash(&self, i: usize) -> RowHash {
        self.rows[i].hash
    }

    /// The row of flight `i`, and its number in its request.
    pub(crate) fn row(&self, i: usize) -> (u32, Bytes) {
        (self.rows[i].position, self.rows[i].row.clone())
    }

    /// The batch of the rows.
    pub(crate) fn arrival(&self) -> Arrival<'_> {
        let &Begun { since, client, refreshes, stores, ttl, shared_len, .. } = self;
        let (entry, space, context) = (&self.entry, &self.space, self.context.as_ref());
        Arrival { entry, space, since, client, refreshes, stores, ttl, context, shared_len }
    }

    /// Gives the bytes of rows back that have hits, before their waiters are answered: so the next
    /// requests of these find the bytes free.
    pub(crate) fn give_back(&mut self, hits: impl Iterator<Item = usize>) {
        if let Some(bytes) = &mut self.bytes {
            bytes.give_back(hits.filter_map(|i| Some(self.rows.get(i)?.row.len())));
        }
    }

    /// Takes the bytes of row `i` again, which is no hit after all.
    #[cold]
    pub(crate) fn take_back(&mut self, i: usize) {
        if let Some(bytes) = &mut self.bytes {
            bytes.regrow(self.rows[i].row.len());
        }
    }

    /// Completes flight `i` with an answer from the store, and makes no call for it. Returns the
    /// number of answered waiters of this batch. With a waiter that wants no stored answer, the
    /// flight goes on for all, and the result is `None`.
    pub(crate) fn complete_with_hit(
        &mut self,
        i: usize,
        hit: &RowAnswer,
        now: Instant,
    ) -> Option<u64> {
        let Begun { inner, rows, space, since: batch, .. } = self;
        let started = &mut rows[i];
        let refreshes = |waiters: &[Waiter]| waiters.iter().any(|waiter| waiter.refreshes);
        let goes_on = |waiters: &[Waiter]| refreshes(waiters).then_some(());
        let key = space.keys.flight(started.hash);
        let Err(waiters) = inner.flights.complete_unless(key, goes_on) else { return None };
        started.owed = false;
        let mut of_batch = 0;
        let answered = waiters.len() as u64;
        for Waiter { reply, since, span, share, .. } in waiters {
            drop(share);
            span.in_scope(|| tracing::trace!("a hit"));
            if since == *batch {
                of_batch += 1;
            } else {
                inner.latencies.record(Origin::Hit, now.saturating_duration_since(since), 1);
            }
            reply.send_at(Ok(hit.clone()), now);
        }
        inner.counters.hits.fetch_add(answered, Relaxed);
        Some(of_batch)
    }

    /// Completes the flight that began last with an answer from the store.
    #[cold]
    pub(crate) fn complete_last(&mut self, hit: &RowAnswer) {
        let now = sync::now();
        let last = self.len() - 1;
        self.give_back([last].into_iter());
        let answered = self.complete_with_hit(last, hit, now);
        if answered.is_none() {
            self.take_back(last);
        }
        let waited = now.saturating_duration_since(self.since);
        self.inner.latencies.record(Origin::Hit, waited, answered.unwrap_or(0));
    }

    /// Makes the calls of the flights that are left, each its own.
    pub(crate) fn call_each(mut self, now: Instant) {
        let calls = self.start(now);
        if !calls.is_empty() {
            self.inner.counters.calls.fetch_add(calls.len() as u64, Relaxed);
            self.entry.upstream.compute(calls);
        }
    }

    /// Makes one call for all flights that are left.
    pub(crate) fn call_together(mut self, now: Instant) {
        let calls = self.start(now);
        if calls.is_empty() {
            return;
        }
        self.inner.counters.calls.fetch_add(1, Relaxed);
        let calls = if calls.len() == 1 { calls } else { vec![merge(calls)] };
        self.entry.upstream.compute(calls);
    }

    /// The calls of the flights that are left, made now. Their replies own the duty.
    fn start(&mut self, now: Instant) -> Vec<Call> {
        let Begun { inner, entry, space, client, stores, ttl, context, bytes, shared_len, rows, .. } = self;
        let owed = || rows.iter().filter(|started| started.owed);
        let left = owed().count();
        // Rows that are most of a buffer keep it, and together count for it until the last of them
        // is done. Other rows are copied, so that the buffer is free.
        let len: usize = owed().map(|started| started.row.len()).sum();
        let is_shared = *shared_len > 0 && len >= *shared_len / 2;
        let shared = bytes.take_if(|_| is_shared).map(Arc::new);
        inner.call_time.start(left as u64, now);
        let mut calls = Vec::with_capacity(left);
        for started in rows.iter_mut().filter(|started| started.owed) {
            if *shared_len > 0 && !is_shared {
                started.row = Bytes::copy_from_slice(&started.row);
            }
            let own = bytes.as_mut().map(|bytes| bytes.split(started.row.len()));
            let bytes = own.map(RowBytes::Own);
            let bytes = bytes.or_else(|| shared.clone().map(RowBytes::Shared));
            let flight = Flight {
                inner: Arc::clone(inner),
                entry: Arc::clone(entry),
                space: Arc::clone(space),
                hash: started.hash,
                ended: AtomicBool::new(false),
                first: started.first.clone(),
                first_deadline: started.asker.deadline,
                called: now,
                stores: *stores,
                ttl: *ttl,
                bytes: Mutex::new(bytes),
            };
            let reply = Reply::new(Arc::new(flight), 0);
            started.owed = false;
            let rows = Rows::from_buf([std::mem::take(&mut started.row)]);
            let (model, request_id) = (Arc::clone(&space.model), started.asker.id);
            let positions = Rows::from_buf([started.position]);
            let (client, context) = (*client, context.clone());
            calls.push(Call { rows, positions, context, model, client, request_id, reply });
        }
        calls
    }
}

impl Drop for Begun {
    fn drop(&mut self) {
        for started in self.rows.iter().filter(|started| started.owed) {
            drop(self.inner.flights.complete(self.space.keys.flight(started.hash)));
        }
    }
}

fn give_back(bytes: &mut Option<HeldBytes>, len: usize) {
    if let Some(bytes) = bytes {
        bytes.give_back([len]);
    }
}

/// Answers a row that cannot wait.
fn refuse(counters: &Counters, reply: RowReply, text: String) {
    counters.overloaded.fetch_add(1, Relaxed);
    reply.send(Err(Failure::new(Status::Overloaded, text)));
}

/// Merges calls of one row each into one call, whose answers go to each in turn.
fn merge(calls: Vec<Call>) -> Call {
    let (mut rows, mut positions) = (Rows::new(), Rows::new());
    let mut replies = Vec::with_capacity(calls.len());
    let first = calls.first().expect("at least two calls");
    let (model, client) = (Arc::clone(&first.model), first.client);
    let (request_id, context) = (first.request_id, first.context.clone());
    for call in calls {
        rows.extend(call.rows);
        positions.extend(call.positions);
        replies.push(call.reply);
    }
    let watches = replies.iter().map(Reply::watch).collect();
    let merged = Merged { watches, replies: Mutex::new(replies) };
    let reply = Reply::new(Arc::new(merged), 0);
    Call { rows, positions, context, model, client, request_id, reply }
}

/// The replies of the rows of one call.
struct Merged {
    watches: Vec<Watch<Result<Computed, Failure>>>,
    replies: Mutex<Vec<Reply<Result<Computed, Failure>>>>,
}

impl Merged {
    fn take(&self) -> Vec<Reply<Result<Computed, Failure>>> {
        std::mem::take(&mut *self.replies.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

impl Sink<Result<Computed, Failure>> for Merged {
    fn wanted(&self, _: u64, now: Instant) -> Wanted {
        self.watches.iter().fold(Wanted::NoMore, |last, watch| match last {
            Wanted::Always => last,
            _ => last.or(watch.wanted(now)),
        })
    }

    fn is_wanted(&self, _: u64, now: Instant) -> bool {
        self.watches.iter().any(|watch| watch.is_wanted(now))
    }

    fn take_parts(&self, _: u64) -> Option<Vec<Reply<Result<Computed, Failure>>>> {
        Some(self.take())
    }

    fn deliver(&self, _: u64, outcome: Result<Computed, Failure>, at: Option<Instant>) {
        let replies = self.take();
        let at = at.unwrap_or_else(sync::now);
        let outcome = outcome.and_then(|computed| {
            let (answers, rows) = (computed.answers.len(), replies.len());
            let text = format!("the upstream gave {answers} answers for {rows} rows");
            let fits = answers == rows;
            fits.then_some(computed).ok_or_else(|| Failure::new(Status::UpstreamCorrupt, text))
        });
        match outcome {
            Ok(Computed { model, answers }) => {
                for (reply, answer) in replies.into_iter().zip(answers) {
                    let answers = Rows::from_buf([answer]);
                    reply.send_at(Ok(Computed { model: Arc::clone(&model), answers }), at);
                }
            }
            Err(failure) => {
                for reply in replies {
                    reply.send_at(Err(failure.clone()), at);
                }
            }
        }
    }
}
