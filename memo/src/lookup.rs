//! Lookups of a batch of rows in the store, and the flights of the misses.
//!
//! With a store in this process, hits are answered where they are read: no task and no allocation
//! stands between a request and its stored answer. With a store across the network, every row joins
//! a flight first, so that equal rows share the lookup, too.

use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};

use afterimage_cache::{ByteStore, Hashed, Table};
use afterimage_core::{Answer, AnswerKind, Failure, Origin, RowAnswer, RowReply, Status};
use afterimage_wire::corked;
use arrayvec::ArrayVec;
use bytes::Bytes;
use smallvec::SmallVec;

use crate::audit::Audit;
use crate::bypass::Decision;
use crate::begun::{Arrival, Asker, Begun};
use crate::epoch::{self, EpochEntry};
use crate::key::{FORGOTTEN, RowHash, Timed};
use crate::memo::Inner;
use crate::models::Space;
use crate::store::{Entries, OfBytes, OfLabels, RemoteStore, Store, StoreOfBytes, Stores};
use crate::sync;

/// Rows that are looked up together: enough to cover the latency of memory.
pub(crate) const LOOKUPS: usize = 64;

/// A batch's own way to answer a row now, and to take the duty to answer it later.
pub(crate) trait Front {
    /// The request of row `i`, which arrived at `since`.
    fn asker(&self, i: usize, since: Instant) -> Asker;

    /// Answers row `i` with a stored label.
    fn hit(&mut self, i: usize, label: u16);

    /// Answers row `i` with a failure.
    fn fail(&mut self, i: usize, failure: &Failure);

    /// Takes the duty to answer row `i`.
    fn reply(&mut self, i: usize) -> RowReply;
}

/// A row of a batch: borrowed from a receive buffer, or owned already.
pub(crate) trait Row {
    /// The row's bytes.
    fn bytes(&self) -> &[u8];

    /// The row as a value of its own.
    fn to_bytes(&self) -> Bytes;
}

impl Row for &[u8] {
    fn bytes(&self) -> &[u8] {
        self
    }

    fn to_bytes(&self) -> Bytes {
        Bytes::copy_from_slice(self)
    }
}

impl Row for Bytes {
    fn bytes(&self) -> &[u8] {
        self
    }

    fn to_bytes(&self) -> Bytes {
        self.clone()
    }
}

/// A kind of entries as the answers of rows.
trait Looked: Entries {
    /// The key of a row's entry.
    fn key(hash: RowHash) -> Self::Key;

    /// The key of an epoch's entry.
    fn epoch_key(entry: EpochEntry) -> Self::Key;

    /// The sealed epoch in the value of its entry.
    fn epoch(value: Self::Value) -> Option<i64>;

    /// The answer in the value of a row's entry.
    fn open(space: &Space, hash: RowHash, value: Self::Value, now: Instant) -> Opened;
}

/// What a stored value contains.
enum Opened {
    /// A hit.
    Answer(RowAnswer),
    /// A deleted or expired answer.
    Nothing,
    /// A value with a wrong seal.
    Forged,
}

impl Looked for OfLabels {
    fn key(hash: RowHash) -> u64 {
        hash.store_key()
    }

    fn epoch_key(entry: EpochEntry) -> u64 {
        entry.store_key()
    }

    fn epoch(value: i64) -> Option<i64> {
        Some(value)
    }

    fn open(space: &Space, hash: RowHash, value: i64, now: Instant) -> Opened {
        let hit = |label| Opened::Answer(RowAnswer::label(label, Origin::Hit));
        match space.keys.open(hash, value) {
            Some(label) => hit(label),
            None if value == FORGOTTEN => Opened::Nothing,
            None => match space.keys.open_timed(hash, value, sync::unix_s(now)) {
                Timed::Label(label) => hit(label),
                Timed::Expired => Opened::Nothing,
                Timed::Forged => Opened::Forged,
            },
        }
    }
}

impl Looked for OfBytes {
    fn key(hash: RowHash) -> u128 {
        hash.identity()
    }

    fn epoch_key(entry: EpochEntry) -> u128 {
        entry.identity()
    }

    fn epoch(value: Bytes) -> Option<i64> {
        epoch::value_of(&value)
    }

    fn open(space: &Space, hash: RowHash, value: Bytes, now: Instant) -> Opened {
        // An empty value stands for a deleted answer.
        if value.is_empty() {
            return Opened::Nothing;
        }
        let Some((answer, lifetime)) = space.keys.open_bytes(hash, &value) else {
            return Opened::Forged;
        };
        let Some(age) = lifetime.age(sync::unix_s(now)) else { return Opened::Nothing };
        let answer = Answer::Bytes(answer);
        Opened::Answer(RowAnswer { answer, origin: Origin::Hit, age })
    }
}

/// Rows to look up, each with its index in the batch and its hash.
pub(crate) type Lookups<R> = ArrayVec<(usize, RowHash, R), LOOKUPS>;

impl Inner {
    /// Answers the hits of a batch of rows that have labels, and adds the flights of the misses to
    /// `begun`. With a remote store, every row is a miss until [`finish`](Self::finish).
    pub(crate) fn look_up_labels<R: Row>(
        self: &Arc<Self>,
        arrival: &Arrival<'_>,
        front: &mut impl Front,
        rows: Lookups<R>,
        looks: bool,
        begun: &mut Option<Begun>,
    ) {
        match &self.stores.labels {
            Store::Embedded(table, _) if looks => {
                self.look_here(arrival, front, rows, table, begun);
            }
            _ => self.begin_all(arrival, front, rows, begun),
        }
    }

    /// Makes the calls of the flights that a batch has begun. With a store across the network, one
    /// lookup for all of them comes first, and calls are made for its misses only.
    pub(crate) fn finish(
        self: &Arc<Self>,
        begun: Begun,
        looks: bool,
        call: fn(Begun, Instant),
    ) {
        let stores = Arc::clone(&begun.space.stores);
        let Stores { labels, bytes } = &*stores;
        match (begun.space.model.answers, labels, bytes) {
            (AnswerKind::Label { .. }, Store::Remote(remote), _) if looks => {
                self.look_there(begun, remote, call);
            }
            (AnswerKind::Bytes, _, StoreOfBytes::Remote(remote)) if looks => {
                self.look_there(begun, remote, call);
            }
            _ => {
                let since = begun.arrival().since;
                call(begun, since);
            }
        }
    }

    fn look_here<R: Row>(
        self: &Arc<Self>,
        arrival: &Arrival<'_>,
        front: &mut impl Front,
        rows: Lookups<R>,
        table: &Table,
        begun: &mut Option<Begun>,
    ) {
        let mut hashed = ArrayVec::<Hashed, LOOKUPS>::new();
        for (_, hash, _) in &rows {
            let key = Hashed::new(hash.store_key());
            table.prefetch(key);
            hashed.push(key);
        }
        if arrival.space.is_due(arrival.since) {
            self.keep_epoch(arrival);
        }
        let (mut hits, mut misses) = (0, Lookups::new());
        let mut missed = ArrayVec::<Hashed, LOOKUPS>::new();
        for ((i, hash, row), key) in rows.into_iter().zip(hashed) {
            let value = table.read(key).map(u64::cast_signed);
            match self.open(arrival.space, hash, value, arrival.since) {
                Some(label) => {
                    hits += 1;
                    front.hit(i, label);
                    if let Some(audit) = self.due_audit() {
                        let label = Answer::Label(label);
                        self.audit_hit(audit, arrival, hash, label, (i as u32, row.to_bytes()));
                    }
                }
                None => {
                    missed.push(key);
                    misses.push((i, hash, row));
                }
            }
        }
        let lookups = hits + misses.len() as u64;
        table.record_lookups(hits, misses.len() as u64);
        if hits > 0 {
            self.counters.hits.fetch_add(hits, Relaxed);
        }
        let took = sync::now() - arrival.since;
        self.latencies.record_lookups(lookups, hits, took, self.call_time.cost());
        if misses.is_empty() {
            return;
        }
        let begun = begun.get_or_insert_with(|| Begun::new(self, arrival));
        begun.reserve(misses.len());
        for ((i, hash, row), key) in misses.into_iter().zip(missed) {
            if !self.begin(arrival, front, i, hash, &row, begun) {
                continue;
            }
            // A flight under this key may have completed between the lookup and the join. It wrote
            // before it completed, so a second lookup settles it: requests that overlap never make
            // two calls.
            let Some(value) = table.read(key).map(u64::cast_signed) else { continue };
            let opened = OfLabels::open(arrival.space, hash, value, arrival.since);
            if let Opened::Answer(hit) = opened {
                self.hit_of_last(begun, &hit);
            }
        }
    }

    /// Looks the rows of flights up in a store across the network, and makes the calls of the
    /// misses.
    fn look_there<E: Looked>(
        self: &Arc<Self>,
        mut begun: Begun,
        store: &RemoteStore<E>,
        call: fn(Begun, Instant),
    ) {
        let Arrival { space, since, .. } = begun.arrival();
        let lookups = begun.len() as u64;
        if lookups == 0 {
            return;
        }
        let looks = self.bypass.as_ref().is_none_or(|bypass| bypass.looks(since, lookups));
        if !looks {
            return call(begun, since);
        }
        let is_due = space.is_due(since);
        // A lookup that probes a store that requests bypass brings no epoch, and no hits.
        let is_bypassed = store.is_bypassed();
        let reads_epoch = is_due && !is_bypassed;
        let epoch_keys = [space.epochs.floor, space.epochs.own].map(E::epoch_key);
        let epoch_keys = epoch_keys.into_iter().filter(|_| reads_epoch);
        // The epochs come last: the values before them were read while they were in force.
        let keys: SmallVec<[E::Key; LOOKUPS + 2]> =
            begun.hashes().map(E::key).chain(epoch_keys).collect();
        let (inner, own) = (Arc::clone(self), store.clone());
        store.lookup(&keys, move |values, took| {
            let now = sync::now();
            let mut values = values.unwrap_or_default();
            if reads_epoch && let (Some(own), Some(floor)) = (values.pop(), values.pop()) {
                let found = begun.space.epochs.open(own.and_then(E::epoch), floor.and_then(E::epoch));
                if !begun.arrival().entry.keys.observe(&begun.space, found, now) {
                    values.clear();
                }
            } else if is_due {
                values.clear();
            }
            let (mut hits, mut answered) = (0, 0);
            corked(|| {
                for (i, value) in values.into_iter().enumerate() {
                    let (hash, Some(value)) = (begun.hash(i), value) else { continue };
                    let hit = match E::open(&begun.space, hash, value, now) {
                        Opened::Answer(hit) => hit,
                        Opened::Nothing => continue,
                        Opened::Forged => {
                            inner.reject();
                            continue;
                        }
                    };
                    let Some(waiters) = begun.complete_with_hit(i, &hit, now) else { continue };
                    hits += 1;
                    answered += waiters;
                    if let Some(audit) = inner.due_audit() {
                        let row = begun.row(i);
                        inner.audit_hit(audit, &begun.arrival(), hash, hit.answer, row);
                    }
                }
            });
            if answered > 0 {
                let waited = now.saturating_duration_since(since);
                inner.latencies.record(Origin::Hit, waited, answered);
            }
            // The wait in the memo's own queue is not a cost of the store.
            inner.looked(now, lookups, hits, took, own.is_bypassed());
            call(begun, now);
        });
    }

    /// Answers the hits of a request for answers of bytes, and adds the flights of the misses to
    /// `begun`. With a remote store, every row is a miss until [`finish`](Self::finish).
    pub(crate) fn look_up_bytes(
        self: &Arc<Self>,
        arrival: &Arrival<'_>,
        rows: Vec<(RowReply, RowHash, Bytes)>,
        store: &StoreOfBytes,
        asker: Asker,
        looks: bool,
        begun: &mut Option<Begun>,
    ) {
        if let StoreOfBytes::Embedded(store) = store {
            return self.look_here_for_bytes(arrival, rows, store, asker, looks, begun);
        }
        let begun = begun.get_or_insert_with(|| Begun::new(self, arrival));
        begun.reserve(rows.len());
        for (reply, hash, row) in rows {
            let len = row.len();
            begun.join(hash, || row, len, asker, reply);
        }
    }

    fn look_here_for_bytes(
        self: &Arc<Self>,
        arrival: &Arrival<'_>,
        replies: Vec<(RowReply, RowHash, Bytes)>,
        store: &ByteStore,
        asker: Asker,
        looks: bool,
        begun: &mut Option<Begun>,
    ) {
        let (lookups, mut hits) = (replies.len() as u64, 0);
        if arrival.space.is_due(arrival.since) {
            self.keep_epoch(arrival);
        }
        for (reply, hash, row) in replies {
            if looks && let Some(hit) = self.stored_bytes(arrival, hash, store) {
                hits += 1;
                if let Some(audit) = self.due_audit() {
                    let row = (reply.token() as u32, row);
                    self.audit_hit(audit, arrival, hash, hit.answer.clone(), row);
                }
                reply.send(Ok(hit));
                continue;
            }
            let len = row.len();
            let begun = begun.get_or_insert_with(|| Begun::new(self, arrival));
            if !begun.join(hash, || row, len, asker, reply) || !looks {
                continue;
            }
            // As with labels: a flight may have completed between the lookup and the join.
            if let Some(hit) = self.stored_bytes(arrival, hash, store) {
                self.hit_of_last(begun, &hit);
            }
        }
        self.counters.hits.fetch_add(hits, Relaxed);
        let took = sync::now() - arrival.since;
        if looks {
            self.latencies.record_lookups(lookups, hits, took, self.call_time.cost());
        }
    }

    /// Reads the epoch in a store in this process, so that it is not evicted.
    #[cold]
    fn keep_epoch(&self, arrival: &Arrival<'_>) {
        let Arrival { entry, space, since, .. } = arrival;
        if let Some(found) = space.stores.epochs_here(space.epochs) {
            entry.keys.observe(space, found, *since);
        }
    }

    /// Answers the flight that began last from the store.
    #[cold]
    fn hit_of_last(&self, begun: &mut Begun, hit: &RowAnswer) {
        let now = sync::now();
        let answered = begun.complete_with_hit(begun.len() - 1, hit, now).unwrap_or(0);
        let waited = now.saturating_duration_since(begun.arrival().since);
        self.latencies.record(Origin::Hit, waited, answered);
    }

    fn stored_bytes(
        &self,
        arrival: &Arrival<'_>,
        hash: RowHash,
        store: &ByteStore,
    ) -> Option<RowAnswer> {
        let stored = store.get(hash.identity(), arrival.since)?;
        let Some((answer, lifetime)) = arrival.space.keys.open_bytes(hash, &stored.value) else {
            self.reject();
            return None;
        };
        // The store keeps the time to live, too. The sealed one counts if a snapshot was changed.
        if lifetime.is_limited() {
            lifetime.age(sync::unix_s(arrival.since))?;
        }
        let answer = Answer::Bytes(answer);
        Some(RowAnswer { answer, origin: Origin::Hit, age: stored.age })
    }

    /// Joins the flight of every row, and adds those that begin to `begun`.
    fn begin_all<R: Row>(
        self: &Arc<Self>,
        arrival: &Arrival<'_>,
        front: &mut impl Front,
        rows: Lookups<R>,
        begun: &mut Option<Begun>,
    ) {
        if rows.is_empty() {
            return;
        }
        let begun = begun.get_or_insert_with(|| Begun::new(self, arrival));
        begun.reserve(rows.len());
        for (i, hash, row) in rows {
            self.begin(arrival, front, i, hash, &row, begun);
        }
    }

    /// Joins the flight of row `i`. Returns whether it begins with it.
    fn begin<R: Row>(
        &self,
        arrival: &Arrival<'_>,
        front: &mut impl Front,
        i: usize,
        hash: RowHash,
        row: &R,
        begun: &mut Begun,
    ) -> bool {
        // Most refusals happen here, without a reply to wait with: they leave with the batch's
        // other answers.
        let waiting = self.flights.waiting();
        if self.flights.is_full() || !self.shares.admits(arrival.client, 1, waiting) {
            self.counters.overloaded.fetch_add(1, Relaxed);
            front.fail(i, &Failure::new(Status::Overloaded, self.full()));
            return false;
        }
        let (asker, reply) = (front.asker(i, arrival.since), front.reply(i));
        begun.join(hash, || row.to_bytes(), row.bytes().len(), asker, reply)
    }

    /// Records the cost of lookups across the network, and what their hits saved.
    fn looked(&self, now: Instant, lookups: u64, hits: u64, took: Duration, is_bypassed: bool) {
        let call = self.call_time.cost();
        // The latencies of hits are recorded where they are answered.
        self.latencies.record_lookups(lookups, 0, took, call);
        self.latencies.record_saved(hits, call);
        let Some(bypass) = &self.bypass else { return };
        // A store that does not answer costs no time, and its worth is not known. The breaker
        // notices its return far sooner than a probe of the bypass would.
        if is_bypassed {
            return;
        }
        let cost_ns = lookups.saturating_mul(took.as_nanos() as u64);
        match bypass.record(now, lookups, cost_ns, hits.saturating_mul(call.waiting_ns)) {
            Some(Decision::Bypass) => tracing::warn!(
                "lookups in the store take more time than hits save: bypassing the store, with \
                 periodic probes"
            ),
            Some(Decision::Look) => tracing::info!("lookups in the store save time again"),
            None => {}
        }
    }

    /// The label in a stored value. A value with another seal counts as none.
    #[inline]
    fn open(
        &self,
        space: &Space,
        hash: RowHash,
        value: Option<i64>,
        now: Instant,
    ) -> Option<u16> {
        let value = value?;
        space.keys.open(hash, value).or_else(|| self.open_timed(space, hash, value, now))
    }

    /// The label in a stored value that may have a time to live.
    #[inline(never)]
    fn open_timed(&self, space: &Space, hash: RowHash, value: i64, now: Instant) -> Option<u16> {
        match OfLabels::open(space, hash, value, now) {
            Opened::Answer(hit) => hit.answer.label(),
            Opened::Nothing => None,
            Opened::Forged => {
                self.reject();
                None
            }
        }
    }

    /// Counts a stored answer whose seal is wrong. Many of them mean an attack, or memos with
    /// different secrets on one store.
    #[cold]
    fn reject(&self) {
        self.counters.rejected_tags.fetch_add(1, Relaxed);
        if let Some(count) = self.rejections.count(1, Instant::now()) {
            tracing::warn!(
                count,
                "ignored stored answers with a wrong seal; do all memos have one --secret-file?"
            );
        }
    }

    /// The audit, if this hit is one of the sample.
    #[inline]
    fn due_audit(&self) -> Option<&Audit> {
        self.audit.as_ref().filter(|audit| audit.is_due())
    }
}
