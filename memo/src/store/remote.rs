//! A store over the network: a [`Backend`] behind a bound on lookups in flight, a lookup budget and
//! a breaker.
//!
//! A burst of requests fills the queue here and not the connection. So the budget counts only the
//! time that the store takes, and a full queue says nothing about the store's health.

use std::collections::{BTreeMap, VecDeque};
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use afterimage_wire::corked;
use afterimage_wire::proto::stats::Stats;
use afterimage_wire::text::Escaped;

use super::{Backend, Entries, Keep, OfLabels};
use crate::metrics;
use crate::breaker::Breaker;
use crate::single_task::SingleTask;
use crate::sync;

/// Keys that may wait in the queue. Further keys are misses at once.
const MAX_QUEUED_KEYS: usize = 65_536;

/// The limit that a backend gets for a lookup. It is far above the budget: a connection that has
/// not answered by then is lost.
const LOST_AFTER: Duration = Duration::from_secs(1);

/// Rounds of the clock task before a lookup expires. The runtime polls connections between two
/// rounds, so that a busy memo reads a reply that has arrived before it gives up.
const MIN_ROUNDS: u64 = 3;

/// Budgets of a lookup in a burst, when at least half of [`StoreOptions::max_in_flight`] is in use.
/// Then requests wait longer than one budget for each other, and a short pause of the store's
/// process or of the memo's is not worth a call for every key in flight.
const BUDGETS_IN_A_BURST: u32 = 8;

/// The shortest interval between two rounds: the resolution of the runtime's timer.
const SHORTEST_ROUND: Duration = Duration::from_millis(1);

/// Limits for a remote store.
#[derive(Clone, Copy, Debug)]
pub struct StoreOptions {
    /// The time that the store may take for a lookup, from its write to the connection. After that
    /// it is a miss. The default, 2 ms, is some forty times a round trip within a data centre. In a
    /// burst it is eight times as long.
    pub lookup_budget: Duration,
    /// Keys in flight at once. The store must answer so many within the budget. The default is
    /// 1,024, which Redis answers in about a millisecond; one lookup of more keys is sent alone.
    pub max_in_flight: usize,
    /// The time that a lookup may wait for its turn. After that it is a miss, but not a failure of
    /// the store. The default is 200 ms.
    pub max_queue_wait: Duration,
    /// Failures in a row after which requests bypass the store. Lookups in flight together fail as
    /// one. The default is 5.
    pub breaker_threshold: u32,
    /// The interval between two probes of a store that requests bypass. The default is 100 ms.
    pub probe_every: Duration,
}

impl Default for StoreOptions {
    fn default() -> Self {
        StoreOptions {
            lookup_budget: Duration::from_millis(2),
            max_in_flight: 1024,
            max_queue_wait: Duration::from_millis(200),
            breaker_threshold: 5,
            probe_every: Duration::from_millis(100),
        }
    }
}

impl StoreOptions {
    /// The defaults for a store of bytes. A value of 16 MiB takes 13 ms on a network of 10 Gbit/s:
    /// the lookup budget is 20 ms, and at most 64 keys are in flight.
    pub fn for_bytes() -> Self {
        let lookup_budget = Duration::from_millis(20);
        StoreOptions { lookup_budget, max_in_flight: 64, ..StoreOptions::default() }
    }
}

/// A backend with limits. See the module. A clone is the same store.
#[derive(Debug)]
pub struct RemoteStore<E: Entries = OfLabels> {
    inner: Arc<Inner<E>>,
}

impl<E: Entries> Clone for RemoteStore<E> {
    fn clone(&self) -> Self {
        RemoteStore { inner: Arc::clone(&self.inner) }
    }
}

#[derive(Debug)]
struct Inner<E: Entries> {
    backend: Box<dyn Backend<E>>,
    options: StoreOptions,
    address: String,
    breaker: Breaker,
    lookups: Mutex<Lookups<E>>,
    /// Whether the task that keeps time runs.
    clock: SingleTask,
    counters: Counters,
}

/// Counters of keys.
#[derive(Debug, Default)]
struct Counters {
    lookups: AtomicU64,
    failed: AtomicU64,
    bypassed: AtomicU64,
    unsent: AtomicU64,
}

/// The values of a lookup's keys, or `None` for no answer.
type Values<E> = Option<Vec<Option<<E as Entries>::Value>>>;

/// Gets the values, and the time that the store took.
type Then<E> = Box<dyn FnOnce(Values<E>, Duration) + Send>;

/// The lookups that have not ended.
struct Lookups<E: Entries> {
    /// In the order of their writes.
    in_flight: BTreeMap<u64, InFlight<E>>,
    keys_in_flight: usize,
    queue: VecDeque<Queued<E>>,
    keys_queued: usize,
    last_id: u64,
    /// One thread hands queued lookups to the backend at a time.
    is_sending: bool,
    /// Rounds of the clock task so far.
    round: u64,
    last_failure: Option<Instant>,
}

struct InFlight<E: Entries> {
    keys: usize,
    /// When the backend got it.
    handed: Instant,
    /// When it was written to the connection, as far as is known.
    written: Instant,
    /// The round in which it was written.
    round: u64,
    /// Whether it was written in a burst.
    is_burst: bool,
    then: Then<E>,
}

struct Queued<E: Entries> {
    keys: Vec<E::Key>,
    since: Instant,
    then: Then<E>,
}

/// A lookup that has ended, and whose callback runs after the lock is released.
struct Ended<E: Entries> {
    then: Then<E>,
    values: Values<E>,
    took: Duration,
}

impl<E: Entries> RemoteStore<E> {
    /// A store in `backend`.
    pub fn new(backend: impl Backend<E>, options: StoreOptions) -> Self {
        let inner = Inner {
            address: backend.address().to_owned(),
            backend: Box::new(backend),
            options,
            breaker: Breaker::new(options.breaker_threshold, options.probe_every, sync::now()),
            lookups: Mutex::new(Lookups::new()),
            clock: SingleTask::new(),
            counters: Counters::default(),
        };
        RemoteStore { inner: Arc::new(inner) }
    }

    /// Looks `keys` up. `then` is called once, on any thread: with as many values as keys, or with
    /// `None` if the store gave no answer, and with the time that the store took.
    ///
    /// The lookup ends within the queue wait and the budget, if a tokio runtime with time runs
    /// here. Outside of one, the backend alone ends it. A lookup of more than
    /// [`Entries::KEYS_AT_ONCE`] keys is split, and fails as a whole.
    pub fn lookup(
        &self,
        keys: &[E::Key],
        then: impl FnOnce(Option<Vec<Option<E::Value>>>, Duration) + Send + 'static,
    ) {
        if keys.len() <= E::KEYS_AT_ONCE {
            return self.inner.lookup(keys, Box::new(then));
        }
        let parts = keys.chunks(E::KEYS_AT_ONCE);
        let joined = Arc::new(Joined::<E>::new(parts.len(), Box::new(then)));
        for (i, part) in parts.enumerate() {
            let joined = Arc::clone(&joined);
            let then = move |values, took| joined.ended(i, values, took);
            self.inner.lookup(part, Box::new(then));
        }
    }

    /// Sends a value on its way, unless the breaker is open.
    pub fn write(&self, key: E::Key, value: E::Value, keep: Keep) {
        if !self.inner.breaker.is_open() {
            self.inner.backend.set(key, value, keep);
        }
    }

    /// Whether the breaker is open: no request waits for the store until a probe succeeds.
    pub(crate) fn is_bypassed(&self) -> bool {
        self.inner.breaker.is_open()
    }

    /// Adds what the store counts to `stats`.
    pub fn stats(&self, stats: &mut Stats) {
        stats.text(&metrics::STORE, self.name());
        self.counts().report(stats);
    }

    /// The backend's name in statistics.
    pub(super) fn name(&self) -> &'static str {
        self.inner.backend.name()
    }

    /// What only the backend counts.
    pub(super) fn report(&self, stats: &mut Stats) {
        self.inner.backend.report(stats);
    }

    /// The present counts.
    pub(super) fn counts(&self) -> Counts {
        let Inner { backend, breaker, counters, .. } = &*self.inner;
        let lookups = self.inner.lock();
        Counts {
            is_connected: backend.is_connected(),
            is_bypassed: breaker.is_open(),
            times_bypassed: breaker.times_opened(),
            writes_failed: backend.writes_failed(),
            lookups: counters.lookups.load(Relaxed),
            failed: counters.failed.load(Relaxed),
            bypassed: counters.bypassed.load(Relaxed),
            unsent: counters.unsent.load(Relaxed),
            in_flight: lookups.keys_in_flight as u64,
            queued: lookups.keys_queued as u64,
        }
    }
}

/// The state of a store, or of the stores of labels and of bytes together, and what they count.
#[derive(Clone, Copy)]
pub(super) struct Counts {
    is_connected: bool,
    is_bypassed: bool,
    times_bypassed: u64,
    writes_failed: u64,
    lookups: u64,
    failed: u64,
    bypassed: u64,
    unsent: u64,
    in_flight: u64,
    queued: u64,
}

impl Counts {
    /// Both together.
    pub(super) fn and(self, other: Counts) -> Counts {
        Counts {
            is_connected: self.is_connected && other.is_connected,
            is_bypassed: self.is_bypassed || other.is_bypassed,
            times_bypassed: self.times_bypassed + other.times_bypassed,
            writes_failed: self.writes_failed + other.writes_failed,
            lookups: self.lookups + other.lookups,
            failed: self.failed + other.failed,
            bypassed: self.bypassed + other.bypassed,
            unsent: self.unsent + other.unsent,
            in_flight: self.in_flight + other.in_flight,
            queued: self.queued + other.queued,
        }
    }

    pub(super) fn report(self, stats: &mut Stats) {
        stats.text(&metrics::STORE_CONNECTED, if self.is_connected { "yes" } else { "no" });
        stats.text(&metrics::STORE_BREAKER, if self.is_bypassed { "open" } else { "closed" });
        stats.counter(&metrics::STORE_BREAKER_OPENED, self.times_bypassed);
        stats.counter(&metrics::STORE_WRITES_FAILED, self.writes_failed);
        stats.counter(&metrics::STORE_LOOKUPS, self.lookups);
        stats.counter(&metrics::STORE_LOOKUPS_FAILED, self.failed);
        stats.counter(&metrics::STORE_LOOKUPS_BYPASSED, self.bypassed);
        stats.counter(&metrics::STORE_LOOKUPS_UNSENT, self.unsent);
        stats.gauge(&metrics::STORE_LOOKUPS_IN_FLIGHT, self.in_flight);
        stats.gauge(&metrics::STORE_LOOKUPS_QUEUED, self.queued);
    }
}

/// The parts of a lookup that was split.
struct Joined<E: Entries>(Mutex<Parts<E>>);

struct Parts<E: Entries> {
    values: Vec<Values<E>>,
    missing: usize,
    took: Duration,
    then: Option<Then<E>>,
}

impl<E: Entries> Joined<E> {
    fn new(parts: usize, then: Then<E>) -> Self {
        let values = std::iter::repeat_with(|| None).take(parts).collect();
        let (missing, took) = (parts, Duration::ZERO);
        Joined(Mutex::new(Parts { values, missing, took, then: Some(then) }))
    }

    fn ended(&self, part: usize, values: Values<E>, took: Duration) {
        let mut parts = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        parts.values[part] = values;
        parts.missing -= 1;
        parts.took = parts.took.max(took);
        if parts.missing == 0
            && let Some(then) = parts.then.take()
        {
            let (values, took) = (std::mem::take(&mut parts.values), parts.took);
            drop(parts);
            let values: Option<Vec<_>> = values.into_iter().collect();
            then(values.map(|values| values.into_iter().flatten().collect()), took);
        }
    }
}

impl<E: Entries> Inner<E> {
    fn lock(&self) -> MutexGuard<'_, Lookups<E>> {
        self.lookups.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn lookup(self: &Arc<Self>, keys: &[E::Key], then: Then<E>) {
        let now = sync::now();
        let len = keys.len() as u64;
        if !self.breaker.allows(now) {
            self.counters.bypassed.fetch_add(len, Relaxed);
            return then(None, Duration::ZERO);
        }
        let mut lookups = self.lock();
        if lookups.queue.is_empty() && lookups.fits(keys.len(), &self.options) {
            let id = lookups.start(keys.len(), then, &self.options, now);
            drop(lookups);
            self.hand_over(id, keys);
        } else if lookups.queue.is_empty() || lookups.keys_queued + keys.len() <= MAX_QUEUED_KEYS {
            lookups.keys_queued += keys.len();
            lookups.queue.push_back(Queued { keys: keys.to_vec(), since: now, then });
            drop(lookups);
            self.send();
        } else {
            drop(lookups);
            self.counters.unsent.fetch_add(len, Relaxed);
            return then(None, Duration::ZERO);
        }
        self.keep_time();
    }

    /// Hands queued lookups to the backend, as far as the bound on keys in flight allows.
    fn send(self: &Arc<Self>) {
        // A backend may end a lookup before `get_many` returns, which leads back to here. Then the
        // flag is set, and this loop goes on with the next lookup.
        loop {
            let next = self.lock().next(&self.options);
            let Some((id, keys)) = next else { return };
            let _sending = Sending(self);
            self.hand_over(id, &keys);
        }
    }

    /// Hands a lookup that is in flight to the backend.
    fn hand_over(self: &Arc<Self>, id: u64, keys: &[E::Key]) {
        self.counters.lookups.fetch_add(keys.len() as u64, Relaxed);
        let mut pending = Pending { inner: Arc::clone(self), id, ended: false };
        let limit = LOST_AFTER.max(self.options.lookup_budget * BUDGETS_IN_A_BURST);
        self.backend.get_many(keys, limit, Box::new(move |values| pending.end(values)));
    }

    /// The backend's answer. An answer to a lookup that has expired is ignored.
    fn end(self: &Arc<Self>, id: u64, values: Values<E>) {
        let now = sync::now();
        let mut ended = Vec::new();
        let mut lookups = self.lock();
        let Some(lookup) = lookups.take(id) else { return };
        let values = values.filter(|values| values.len() == lookup.keys);
        if values.is_none() {
            ended = self.failed(&mut lookups, &lookup, now);
        } else if self.breaker.succeeded() {
            tracing::info!(server = self.address, "the store answers again");
        }
        let is_queue_empty = lookups.queue.is_empty();
        drop(lookups);
        ended.push(Ended { then: lookup.then, values, took: now - lookup.written });
        run(ended);
        // A lookup that joins the queue later is sent by its own thread.
        if !is_queue_empty {
            self.send();
        }
    }

    /// Records a failed lookup. If it opens the breaker, no queued lookup waits any longer.
    fn failed(
        &self,
        lookups: &mut Lookups<E>,
        lookup: &InFlight<E>,
        now: Instant,
    ) -> Vec<Ended<E>> {
        self.counters.failed.fetch_add(lookup.keys as u64, Relaxed);
        // A store that pauses once fails all lookups in flight. That is one failure, not many.
        if lookups.last_failure.is_some_and(|last| lookup.written < last) {
            return Vec::new();
        }
        lookups.last_failure = Some(now);
        if !self.breaker.failed(now) {
            return Vec::new();
        }
        match self.backend.cause() {
            Some(cause) => tracing::warn!(
                server = self.address,
                cause = %Escaped(cause),
                "the store does not answer; requests bypass it until a probe succeeds"
            ),
            None => tracing::warn!(
                server = self.address,
                "the store does not answer; requests bypass it until a probe succeeds"
            ),
        }
        self.counters.bypassed.fetch_add(lookups.keys_queued as u64, Relaxed);
        lookups.keys_queued = 0;
        lookups.queue.drain(..).map(Ended::unsent).collect()
    }

    /// One round of the clock task: ends the lookups that have taken too long.
    fn expire(self: &Arc<Self>, now: Instant) {
        let StoreOptions { lookup_budget, max_queue_wait, .. } = self.options;
        let mut ended = Vec::new();
        let mut lookups = self.lock();
        lookups.round += 1;
        if self.backend.is_writing() {
            // The task that writes to the connection waits for a turn in this busy process.
            lookups.restart_budgets(now, max_queue_wait);
        }
        let late = lookups.late(&self.options, now);
        for &id in &late {
            let Some(lookup) = lookups.take(id) else { continue };
            ended.extend(self.failed(&mut lookups, &lookup, now));
            let took = now - lookup.written;
            ended.push(Ended { then: lookup.then, values: None, took });
        }
        while let Some(first) = lookups.queue.front()
            && now.saturating_duration_since(first.since) >= max_queue_wait
            && let Some(queued) = lookups.queue.pop_front()
        {
            lookups.keys_queued -= queued.keys.len();
            self.counters.unsent.fetch_add(queued.keys.len() as u64, Relaxed);
            ended.push(Ended::unsent(queued));
        }
        drop(lookups);
        if !late.is_empty() {
            self.backend.is_late(lookup_budget);
        }
        run(ended);
        self.send();
    }

    /// Starts the clock task, unless it runs. It ends when no lookup is left.
    fn keep_time(self: &Arc<Self>) {
        if !self.clock.start() {
            return;
        }
        let Ok(runtime) = tokio::runtime::Handle::try_current() else {
            return self.clock.abandon();
        };
        let inner = Arc::clone(self);
        let StoreOptions { lookup_budget, max_queue_wait, .. } = self.options;
        let interval = (lookup_budget.min(max_queue_wait) / 4).max(SHORTEST_ROUND);
        runtime.spawn(async move {
            loop {
                tokio::time::sleep(interval).await;
                inner.expire(sync::now());
                let remain = || !inner.lock().is_empty();
                if !remain() && inner.clock.stop(remain) {
                    return;
                }
            }
        });
    }
}

impl<E: Entries> Lookups<E> {
    fn new() -> Self {
        Lookups {
            in_flight: BTreeMap::new(),
            keys_in_flight: 0,
            queue: VecDeque::new(),
            keys_queued: 0,
            last_id: 0,
            is_sending: false,
            round: 0,
            last_failure: None,
        }
    }

    fn is_empty(&self) -> bool {
        self.in_flight.is_empty() && self.queue.is_empty()
    }

    /// Moves the oldest queued lookup into flight, if it fits and no other thread is sending.
    fn next(&mut self, options: &StoreOptions) -> Option<(u64, Vec<E::Key>)> {
        let len = self.queue.front()?.keys.len();
        if self.is_sending || !self.fits(len, options) {
            return None;
        }
        let Queued { keys, then, .. } = self.queue.pop_front()?;
        self.keys_queued -= len;
        self.is_sending = true;
        Some((self.start(len, then, options, sync::now()), keys))
    }

    /// Whether so many more keys may be in flight. A lookup of more than the bound goes alone.
    fn fits(&self, keys: usize, options: &StoreOptions) -> bool {
        self.keys_in_flight == 0 || self.keys_in_flight + keys <= options.max_in_flight
    }

    /// Adds a lookup that is handed to the backend now, and returns its id.
    fn start(
        &mut self,
        keys: usize,
        then: Then<E>,
        options: &StoreOptions,
        now: Instant,
    ) -> u64 {
        self.keys_in_flight += keys;
        self.last_id += 1;
        let (round, is_burst) = (self.round, self.is_burst(options));
        let lookup = InFlight { keys, handed: now, written: now, round, is_burst, then };
        self.in_flight.insert(self.last_id, lookup);
        self.last_id
    }

    fn is_burst(&self, options: &StoreOptions) -> bool {
        self.keys_in_flight >= options.max_in_flight / 2 || !self.queue.is_empty()
    }

    /// Restarts the budgets of lookups that may not be written yet. A lookup that was handed to the
    /// backend longer than `limit` ago keeps its budget: the connection accepts no bytes.
    fn restart_budgets(&mut self, now: Instant, limit: Duration) {
        for lookup in self.in_flight.values_mut() {
            if now.saturating_duration_since(lookup.handed) < limit {
                (lookup.written, lookup.round) = (now, self.round);
            }
        }
    }

    /// The lookups that have used up their budget.
    fn late(&self, options: &StoreOptions, now: Instant) -> Vec<u64> {
        let is_burst = self.is_burst(options);
        let is_late = |lookup: &InFlight<E>| {
            let budgets = if is_burst || lookup.is_burst { BUDGETS_IN_A_BURST } else { 1 };
            now.saturating_duration_since(lookup.written) >= options.lookup_budget * budgets
                && self.round - lookup.round >= MIN_ROUNDS
        };
        self.in_flight.iter().filter(|(_, lookup)| is_late(lookup)).map(|(&id, _)| id).collect()
    }

    fn take(&mut self, id: u64) -> Option<InFlight<E>> {
        let lookup = self.in_flight.remove(&id)?;
        self.keys_in_flight -= lookup.keys;
        Some(lookup)
    }
}

impl<E: Entries> std::fmt::Debug for Lookups<E> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Lookups")
            .field("keys_in_flight", &self.keys_in_flight)
            .field("keys_queued", &self.keys_queued)
            .finish_non_exhaustive()
    }
}

/// Clears [`Lookups::is_sending`].
struct Sending<'a, E: Entries>(&'a Inner<E>);

impl<E: Entries> Drop for Sending<'_, E> {
    fn drop(&mut self) {
        self.0.lock().is_sending = false;
    }
}

/// A lookup that the backend has. It ends once, without values if the backend drops it.
struct Pending<E: Entries> {
    inner: Arc<Inner<E>>,
    id: u64,
    ended: bool,
}

impl<E: Entries> Pending<E> {
    fn end(&mut self, values: Values<E>) {
        if !std::mem::replace(&mut self.ended, true) {
            self.inner.end(self.id, values);
        }
    }
}

impl<E: Entries> Drop for Pending<E> {
    fn drop(&mut self) {
        self.end(None);
    }
}

impl<E: Entries> Ended<E> {
    fn unsent(queued: Queued<E>) -> Self {
        Ended { then: queued.then, values: None, took: Duration::ZERO }
    }
}

fn run<E: Entries>(ended: Vec<Ended<E>>) {
    corked(|| ended.into_iter().for_each(|ended| (ended.then)(ended.values, ended.took)));
}
