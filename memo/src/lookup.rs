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

use crate::audit::audit_hit;
use crate::bypass::Decision;
use crate::begun::Begun;
use crate::epoch::{self, EpochEntry};
use crate::inner::Inner;
use crate::key::{FORGOTTEN, RowHash, Timed};
use crate::models::Space;
use crate::store::{Entries, OfBytes, OfLabels, RemoteStore, Store, StoreOfBytes, Stores};
use crate::sync;
use crate::waiter::{Arrival, Asker};

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

/// The lookup of one batch of rows: it answers the hits, and collects the flights of the misses.
pub(crate) struct Lookup<'a> {
    inner: &'a Arc<Inner>,
    arrival: &'a Arrival<'a>,
    /// Whether stored answers are wanted.
    looks: bool,
    /// The flights of the rows so far. With a remote store, every row has one until
    /// [`finish`](Self::finish).
    begun: Option<Begun>,
}

impl<'a> Lookup<'a> {
    /// A lookup for the rows of a batch.
    pub(crate) fn new(inner: &'a Arc<Inner>, arrival: &'a Arrival<'a>, looks: bool) -> Self {
        Lookup { inner, arrival, looks, begun: None }
    }

    /// Looks rows up that have labels.
    pub(crate) fn labels<R: Row>(&mut self, front: &mut impl Front, rows: Lookups<R>) {
        match &self.arrival.space.stores.labels {
            Store::Embedded(table, _) if self.looks => self.look_here(front, rows, table),
            _ => self.begin_all(front, rows),
        }
    }

    /// Looks rows up that have answers of bytes.
    pub(crate) fn bytes(&mut self, rows: &[Bytes], replies: Vec<RowReply>, asker: Asker) {
        let keys = &self.arrival.space.keys;
        let lens = rows.iter().map(Bytes::len);
        let rows = rows.iter().map(|row| (row, keys.hash(row))).zip(replies);
        if let StoreOfBytes::Embedded(store) = &self.arrival.space.stores.bytes
            && self.looks
        {
            return self.look_here_for_bytes(rows, store, asker);
        }
        let begun = self.begun.get_or_insert_with(|| Begun::new(self.inner, self.arrival));
        begun.reserve(lens);
        for ((row, hash), reply) in rows {
            begun.wait(hash, row, asker, reply);
        }
    }

    /// Makes the calls of the flights that the batch has begun. With a store across the network,
    /// one lookup for all of them comes first, and calls are made for its misses only.
    pub(crate) fn finish(self, call: fn(Begun, Instant)) {
        let Lookup { arrival, looks, begun: Some(begun), .. } = self else { return };
        let Stores { labels, bytes } = &*arrival.space.stores;
        match (begun.space.model.answers, labels, bytes) {
            (AnswerKind::Label { .. }, Store::Remote(remote), _) if looks => {
                Remote::look(begun, remote, call);
            }
            (AnswerKind::Bytes, _, StoreOfBytes::Remote(remote)) if looks => {
                Remote::look(begun, remote, call);
            }
            _ => {
                let since = begun.arrival().since;
                call(begun, since);
            }
        }
    }

    fn look_here<R: Row>(&mut self, front: &mut impl Front, rows: Lookups<R>, table: &Table) {
        let (inner, arrival) = (self.inner, self.arrival);
        let mut hashed = ArrayVec::<Hashed, LOOKUPS>::new();
        for (_, hash, _) in &rows {
            let key = Hashed::new(hash.store_key());
            table.prefetch(key);
            hashed.push(key);
        }
        self.keep_epoch();
        let (mut hits, mut misses) = (0, Lookups::new());
        let mut missed = ArrayVec::<Hashed, LOOKUPS>::new();
        for ((i, hash, row), key) in rows.into_iter().zip(hashed) {
            let value = table.read(key).map(u64::cast_signed);
            match open(inner, arrival, hash, value) {
                Some(label) => {
                    hits += 1;
                    front.hit(i, label);
                    let stored = || Answer::Label(label);
                    audit_hit(inner.audit.as_ref(), arrival, hash, stored, || (i as u32, row.to_bytes()));
                }
                None => {
                    missed.push(key);
                    misses.push((i, hash, row));
                }
            }
        }
        table.record_lookups(hits, misses.len() as u64);
        self.record(hits + misses.len() as u64, hits);
        if misses.is_empty() {
            return;
        }
        let begun = self.begun.get_or_insert_with(|| Begun::new(inner, arrival));
        begun.reserve(misses.iter().map(|(.., row)| row.bytes().len()));
        for ((i, hash, row), key) in misses.into_iter().zip(missed) {
            if !begin(begun, front, i, hash, &row) {
                continue;
            }
            // A flight under this key may have completed between the lookup and the join. It wrote
            // before it completed, so a second lookup settles it: requests that overlap never make
            // two calls.
            let Some(value) = table.read(key).map(u64::cast_signed) else { continue };
            let opened = OfLabels::open(arrival.space, hash, value, arrival.since);
            if let Opened::Answer(hit) = opened {
                begun.complete_last(&hit);
            }
        }
    }

    fn look_here_for_bytes<'r>(
        &mut self,
        rows: impl ExactSizeIterator<Item = ((&'r Bytes, RowHash), RowReply)>,
        store: &ByteStore,
        asker: Asker,
    ) {
        let (inner, arrival) = (self.inner, self.arrival);
        let (lookups, mut hits) = (rows.len() as u64, 0);
        self.keep_epoch();
        for ((row, hash), reply) in rows {
            if let Some(hit) = stored_bytes(inner, arrival, hash, store) {
                hits += 1;
                let row = || (reply.token() as u32, row.clone());
                audit_hit(inner.audit.as_ref(), arrival, hash, || hit.answer.clone(), row);
                reply.send(Ok(hit));
                continue;
            }
            let begun = self.begun.get_or_insert_with(|| Begun::new(inner, arrival));
            if begun.wait(hash, row, asker, reply)
                // As with labels: a flight may have completed between the lookup and the join.
                && let Some(hit) = stored_bytes(inner, arrival, hash, store)
            {
                begun.complete_last(&hit);
            }
        }
        self.record(lookups, hits);
    }

    /// Records lookups in this process that end now.
    fn record(&self, lookups: u64, hits: u64) {
        let Inner { counters, latencies, call_time, .. } = &**self.inner;
        if hits > 0 {
            counters.hits.fetch_add(hits, Relaxed);
        }
        let took = sync::now() - self.arrival.since;
        latencies.record_lookups(lookups, hits, took, call_time.cost());
    }

    /// Reads the epoch in a store in this process, if it is due, so that it is not evicted.
    #[inline]
    fn keep_epoch(&self) {
        if self.arrival.space.is_due(self.arrival.since) {
            self.read_epoch_here();
        }
    }

    #[cold]
    fn read_epoch_here(&self) {
        let Arrival { entry, space, since, .. } = self.arrival;
        if let Some(found) = space.stores.epochs_here(space.epochs) {
            entry.keys.observe(space, found, *since);
        }
    }

    /// Joins the flight of every row.
    fn begin_all<R: Row>(&mut self, front: &mut impl Front, rows: Lookups<R>) {
        if rows.is_empty() {
            return;
        }
        let begun = self.begun.get_or_insert_with(|| Begun::new(self.inner, self.arrival));
        begun.reserve(rows.iter().map(|(.., row)| row.bytes().len()));
        for (i, hash, row) in rows {
            begin(begun, front, i, hash, &row);
        }
    }
}

/// Joins the flight of row `i`. Returns whether it begins with it.
fn begin<R: Row>(
    begun: &mut Begun,
    front: &mut impl Front,
    i: usize,
    hash: RowHash,
    row: &R,
) -> bool {
    let len = row.bytes().len();
    match begun.place(len) {
        Ok(place) => {
            let (asker, reply) = (front.asker(i, begun.arrival().since), front.reply(i));
            begun.join(hash, || row.to_bytes(), len, asker, reply, place)
        }
        // A refusal needs no reply to wait with: it leaves with the batch's other answers.
        Err(text) => {
            begun.inner.counters.overloaded.fetch_add(1, Relaxed);
            front.fail(i, &Failure::new(Status::Overloaded, text));
            false
        }
    }
}

/// The label in a stored value. A value with another seal counts as none.
#[inline]
fn open(inner: &Inner, arrival: &Arrival<'_>, hash: RowHash, value: Option<i64>) -> Option<u16> {
    let value = value?;
    arrival.space.keys.open(hash, value).or_else(|| open_timed(inner, arrival, hash, value))
}

/// The label in a stored value that may have a time to live.
#[inline(never)]
fn open_timed(inner: &Inner, arrival: &Arrival<'_>, hash: RowHash, value: i64) -> Option<u16> {
    match OfLabels::open(arrival.space, hash, value, arrival.since) {
        Opened::Answer(hit) => hit.answer.label(),
        Opened::Nothing => None,
        Opened::Forged => {
            inner.counters.rejections.add();
            None
        }
    }
}

/// The stored answer of bytes to a row, if its seal and its age are good.
fn stored_bytes(
    inner: &Inner,
    arrival: &Arrival<'_>,
    hash: RowHash,
    store: &ByteStore,
) -> Option<RowAnswer> {
    let stored = store.get(hash.identity(), arrival.since)?;
    let Some((answer, lifetime)) = arrival.space.keys.open_bytes(hash, &stored.value) else {
        inner.counters.rejections.add();
        return None;
    };
    // The store keeps the time to live, too. The sealed one counts if a snapshot was changed.
    if lifetime.is_limited() {
        lifetime.age(sync::unix_s(arrival.since))?;
    }
    let answer = Answer::Bytes(answer);
    Some(RowAnswer { answer, origin: Origin::Hit, age: stored.age })
}

/// A lookup of the rows of some flights in a store across the network.
struct Remote<E: Entries> {
    begun: Begun,
    store: RemoteStore<E>,
    lookups: u64,
    /// Whether the epochs are the last two of the keys.
    reads_epoch: bool,
    /// Whether only values that come with the present epoch count.
    is_due: bool,
    call: fn(Begun, Instant),
}

impl<E: Looked> Remote<E> {
    /// Looks the rows up, and makes the calls of the misses.
    fn look(begun: Begun, store: &RemoteStore<E>, call: fn(Begun, Instant)) {
        let Arrival { space, since, .. } = begun.arrival();
        let lookups = begun.len() as u64;
        if lookups == 0 {
            return;
        }
        let bypass = begun.inner.bypass.as_ref();
        if !bypass.is_none_or(|bypass| bypass.looks(since, lookups)) {
            return call(begun, since);
        }
        let is_due = space.is_due(since);
        // A lookup that probes a store that requests bypass brings no epoch, and no hits.
        let reads_epoch = is_due && !store.is_bypassed();
        let epoch_keys = [space.epochs.floor, space.epochs.own].map(E::epoch_key);
        let epoch_keys = epoch_keys.into_iter().filter(|_| reads_epoch);
        // The epochs come last: the values before them were read while they were in force.
        let keys: SmallVec<[E::Key; LOOKUPS + 2]> =
            begun.hashes().map(E::key).chain(epoch_keys).collect();
        let lookup =
            Remote { begun, store: store.clone(), lookups, reads_epoch, is_due, call };
        store.lookup(&keys, move |values, took| lookup.end(values, took));
    }

    /// Takes the values; `None` if the store has not answered.
    fn end(mut self, values: Option<Vec<Option<E::Value>>>, took: Duration) {
        let now = sync::now();
        let mut values = values.unwrap_or_default();
        let begun = &mut self.begun;
        if self.reads_epoch && let (Some(own), Some(floor)) = (values.pop(), values.pop()) {
            let (own, floor) = (own.and_then(E::epoch), floor.and_then(E::epoch));
            let found = begun.space.epochs.open(own, floor);
            if !begun.arrival().entry.keys.observe(&begun.space, found, now) {
                values.clear();
            }
        } else if self.is_due {
            values.clear();
        }
        // Almost every value is a hit.
        let found = values.iter().enumerate().filter(|(_, value)| value.is_some());
        begun.give_back(found.map(|(i, _)| i));
        let (mut hits, mut answered) = (0, 0);
        corked(|| {
            for (i, value) in values.into_iter().enumerate() {
                let (hash, Some(value)) = (begun.hash(i), value) else { continue };
                let hit = match E::open(&begun.space, hash, value, now) {
                    Opened::Answer(hit) => hit,
                    Opened::Nothing => {
                        begun.take_back(i);
                        continue;
                    }
                    Opened::Forged => {
                        begun.take_back(i);
                        begun.inner.counters.rejections.add();
                        continue;
                    }
                };
                let Some(waiters) = begun.complete_with_hit(i, &hit, now) else {
                    begun.take_back(i);
                    continue;
                };
                hits += 1;
                answered += waiters;
                let (begun, stored) = (&*begun, || hit.answer.clone());
                audit_hit(begun.inner.audit.as_ref(), &begun.arrival(), hash, stored, || begun.row(i));
            }
        });
        if answered > 0 {
            let waited = now.saturating_duration_since(begun.arrival().since);
            begun.inner.latencies.record(Origin::Hit, waited, answered);
        }
        self.record(now, hits, took);
        (self.call)(self.begun, now);
    }

    /// Records the cost of the lookups, and what their hits saved. The wait in the memo's own queue
    /// is not a cost of the store.
    fn record(&self, now: Instant, hits: u64, took: Duration) {
        let Inner { latencies, call_time, bypass, .. } = &*self.begun.inner;
        let call = call_time.cost();
        // The latencies of hits are recorded where they are answered.
        latencies.record_lookups(self.lookups, 0, took, call);
        latencies.record_saved(hits, call);
        let Some(bypass) = bypass else { return };
        // A store that does not answer costs no time, and its worth is not known. The breaker
        // notices its return far sooner than a probe of the bypass would.
        if self.store.is_bypassed() {
            return;
        }
        let cost_ns = self.lookups.saturating_mul(took.as_nanos() as u64);
        match bypass.record(now, self.lookups, cost_ns, hits.saturating_mul(call.waiting_ns)) {
            Some(Decision::Bypass) => tracing::warn!(
                "lookups in the store take more time than hits save: bypassing the store, with \
                 periodic probes"
            ),
            Some(Decision::Look) => tracing::info!("lookups in the store save time again"),
            None => {}
        }
    }
}
