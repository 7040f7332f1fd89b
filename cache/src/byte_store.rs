//! Values of any size in memory, bounded by bytes.
//!
//! [`ByteStore`] maps 128-bit keys, which are keyed hashes, to values of up to
//! [`max_value_bytes`](ByteStore::max_value_bytes). Eviction is quick_cache's: a CLOCK variant of
//! S3-FIFO (Yang et al., "FIFO queues are all you need for cache eviction", SOSP 2023) that keeps
//! values by their use and not by their order. The bound covers a value's bytes and the
//! [overhead](ENTRY_OVERHEAD_BYTES) of its entry.
//!
//! Eviction does not see sizes, so admission does: a full store admits a value that is larger than
//! the average with the probability average / size. A miss costs about the same for a small answer
//! as for a large one, and many small ones have room in the place of a large one.
//!
//! Keys and values have no meaning to the store. It reads no clock: time is an argument.

use std::fmt;
use std::hash::{BuildHasher, Hasher, RandomState};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

use afterimage_wire::splitmix::SplitMix64;
use bytes::Bytes;
use quick_cache::sync::Cache;
use quick_cache::{Lifecycle, OptionsBuilder, Weighter};

/// Bytes that an entry takes beside its value: key, times, the value's handle and allocation
/// header, and its share of the cache's own tables. A million values of 256 bytes take 107 bytes
/// each (`cache/benches/byte_store.rs`); this is the next multiple of 16, the allocator's unit.
pub const ENTRY_OVERHEAD_BYTES: usize = 112;

/// A shard holds at least this many values of the largest size, so that one of them does not
/// empty it.
const VALUES_PER_SHARD: u64 = 8;

/// The time at which a store is created, in the seconds of its entries. A snapshot's entries are
/// older than the store: this leaves them 34 years, and 102 years to come.
const STARTED_S: u32 = 1 << 30;

/// A store counts as full from this share of its capacity on, because shards fill unevenly.
const FULL_PERCENT: u64 = 90;

/// Inserts after which the average size is computed again. It takes a lock of every shard.
const AVERAGE_EVERY: u64 = 64;

/// More shards than this bring nothing on the machines that are common.
const MAX_SHARDS: u64 = 64;

/// Values of any size, by 128-bit keys.
///
/// ```
/// use std::time::{Duration, Instant};
/// use afterimage_cache::ByteStore;
///
/// let store = ByteStore::new(1 << 20, 1 << 16);
/// let now = Instant::now();
/// store.insert(7, "an answer".into(), Some(Duration::from_secs(60)), now);
/// assert_eq!(store.get(7, now).unwrap().value, "an answer");
/// assert!(store.get(7, now + Duration::from_secs(61)).is_none(), "its time is over");
/// ```
pub struct ByteStore {
    cache: Cache<u128, Entry, ByBytes, KeyHash, CountEvictions>,
    evicted: Arc<AtomicU64>,
    /// Bytes of an entry on average; [`u64::MAX`] while the store is not full.
    average_bytes: AtomicU64,
    max_value_bytes: usize,
    /// The moment of [`STARTED_S`].
    started: Instant,
    counters: Counters,
}

/// A value and its age.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stored {
    /// The value. A clone shares the bytes.
    pub value: Bytes,
    /// Time since it was inserted, in whole seconds.
    pub age: Duration,
}

/// The outcome of an [`insert`](ByteStore::insert).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Admission {
    /// The value is in the store, until eviction.
    Stored,
    /// The store is full and the value is larger than the average: it was not among those that are
    /// admitted by chance.
    Declined,
    /// The value is longer than [`max_value_bytes`](ByteStore::max_value_bytes).
    TooLarge,
}

/// Counters and sizes of a [`ByteStore`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct ByteStoreStats {
    /// Entries now.
    pub entries: u64,
    /// Bytes of all entries, overhead included.
    pub bytes: u64,
    /// The bound on `bytes`.
    pub capacity_bytes: u64,
    /// Lookups that found a value.
    pub hits: u64,
    /// Lookups that found none.
    pub misses: u64,
    /// Lookups that found an expired value; they count as misses too.
    pub expired: u64,
    /// Values inserted.
    pub inserted: u64,
    /// Values that a full store did not admit because of their size.
    pub declined: u64,
    /// Entries evicted to free space.
    pub evicted: u64,
    /// Values refused as too large.
    pub too_large: u64,
}

impl ByteStoreStats {
    /// The counts and sizes of two stores together.
    #[must_use]
    pub fn and(self, other: ByteStoreStats) -> ByteStoreStats {
        ByteStoreStats {
            entries: self.entries + other.entries,
            bytes: self.bytes + other.bytes,
            capacity_bytes: self.capacity_bytes + other.capacity_bytes,
            hits: self.hits + other.hits,
            misses: self.misses + other.misses,
            expired: self.expired + other.expired,
            inserted: self.inserted + other.inserted,
            declined: self.declined + other.declined,
            evicted: self.evicted + other.evicted,
            too_large: self.too_large + other.too_large,
        }
    }
}

#[derive(Debug, Default)]
struct Counters {
    hits: AtomicU64,
    misses: AtomicU64,
    expired: AtomicU64,
    inserted: AtomicU64,
    declined: AtomicU64,
    too_large: AtomicU64,
}

/// Age and remaining time to live of an entry in a snapshot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Timed {
    pub(crate) age_s: u64,
    /// `None` for a value that does not expire.
    pub(crate) left_s: Option<u64>,
}

#[derive(Clone)]
struct Entry {
    value: Bytes,
    inserted_at_s: u32,
    /// [`u32::MAX`] for never.
    expires_at_s: u32,
}

impl ByteStore {
    /// An empty store that holds at most `capacity_bytes`, overhead included. Values have at most
    /// `max_value_bytes`, and at most a quarter of the capacity.
    pub fn new(capacity_bytes: u64, max_value_bytes: usize) -> Self {
        let quarter = usize::try_from(capacity_bytes / 4).unwrap_or(usize::MAX);
        let max_value_bytes = max_value_bytes.min(quarter.saturating_sub(ENTRY_OVERHEAD_BYTES));
        let largest = (max_value_bytes + ENTRY_OVERHEAD_BYTES) as u64;
        let shards = (capacity_bytes / (largest * VALUES_PER_SHARD)).clamp(1, MAX_SHARDS);
        let shards = 1 << shards.ilog2();
        // Bounds the keys of evicted values that are kept: half as many.
        let items = (capacity_bytes / 1024).clamp(16, 1 << 24);
        let options = OptionsBuilder::new()
            .shards(shards)
            .weight_capacity(capacity_bytes)
            .estimated_items_capacity(items as usize)
            .build()
            .expect("capacity, shards and items are set");
        let evicted = Arc::new(AtomicU64::new(0));
        let lifecycle = CountEvictions(Arc::clone(&evicted));
        ByteStore {
            cache: Cache::with_options(options, ByBytes, KeyHash::random(), lifecycle),
            evicted,
            average_bytes: AtomicU64::new(u64::MAX),
            max_value_bytes,
            started: Instant::now(),
            counters: Counters::default(),
        }
    }

    /// Bytes that the largest value may have.
    pub fn max_value_bytes(&self) -> usize {
        self.max_value_bytes
    }

    /// The value of a key, if the store has one that is not expired at `now`.
    pub fn get(&self, key: u128, now: Instant) -> Option<Stored> {
        let Some(entry) = self.cache.get(&key) else {
            self.counters.misses.fetch_add(1, Relaxed);
            return None;
        };
        let now_s = self.seconds(now);
        if now_s >= entry.expires_at_s {
            self.cache.remove_if(&key, |found| found.expires_at_s <= now_s);
            self.counters.expired.fetch_add(1, Relaxed);
            self.counters.misses.fetch_add(1, Relaxed);
            return None;
        }
        self.counters.hits.fetch_add(1, Relaxed);
        let age = Duration::from_secs(now_s.saturating_sub(entry.inserted_at_s).into());
        Some(Stored { value: entry.value, age })
    }

    /// Stores a value, in place of an earlier one. It is found for `ttl`, to the second, and until
    /// it is evicted; without a `ttl` until it is evicted. A full store declines some large values
    /// of new keys.
    pub fn insert(
        &self,
        key: u128,
        value: Bytes,
        ttl: Option<Duration>,
        now: Instant,
    ) -> Admission {
        if value.len() > self.max_value_bytes {
            self.counters.too_large.fetch_add(1, Relaxed);
            // An earlier value of this key is no longer the latest one.
            self.cache.remove(&key);
            return Admission::TooLarge;
        }
        let inserted_at_s = self.seconds(now);
        let expires_at_s = match ttl {
            None => u32::MAX,
            Some(ttl) => seconds_after(inserted_at_s, ttl.as_secs().max(1)),
        };
        // An earlier value of this key is replaced, also by a larger one.
        if !self.admits(value.len()) && self.cache.peek(&key).is_none() {
            self.counters.declined.fetch_add(1, Relaxed);
            return Admission::Declined;
        }
        self.counters.inserted.fetch_add(1, Relaxed);
        self.cache.insert(key, Entry { value: compact(value), inserted_at_s, expires_at_s });
        Admission::Stored
    }

    /// Removes the value of a key. Returns whether there was one.
    pub fn remove(&self, key: u128) -> bool {
        self.cache.remove(&key).is_some()
    }

    /// Removes all values.
    pub fn clear(&self) {
        self.cache.clear();
    }

    /// Counters and sizes.
    pub fn stats(&self) -> ByteStoreStats {
        let Counters { hits, misses, expired, inserted, declined, too_large } = &self.counters;
        ByteStoreStats {
            entries: self.cache.len() as u64,
            bytes: self.cache.weight(),
            capacity_bytes: self.cache.capacity(),
            hits: hits.load(Relaxed),
            misses: misses.load(Relaxed),
            expired: expired.load(Relaxed),
            inserted: inserted.load(Relaxed),
            declined: declined.load(Relaxed),
            evicted: self.evicted.load(Relaxed),
            too_large: too_large.load(Relaxed),
        }
    }

    /// Whether a value of this length gets a place. Values up to the average size always do.
    fn admits(&self, len: usize) -> bool {
        let Counters { inserted, declined, .. } = &self.counters;
        let number = inserted.load(Relaxed) + declined.load(Relaxed);
        if number % AVERAGE_EVERY == 0 {
            let (bytes, entries) = (self.cache.weight(), self.cache.len() as u64);
            let is_full = bytes >= self.cache.capacity() / 100 * FULL_PERCENT;
            let average = bytes.checked_div(entries).filter(|_| is_full);
            self.average_bytes.store(average.unwrap_or(u64::MAX), Relaxed);
        }
        let (average, size) = (self.average_bytes.load(Relaxed), len + ENTRY_OVERHEAD_BYTES);
        size as u64 <= average || SplitMix64(number).share() * (size as f64) < average as f64
    }

    /// The entries that are not expired at `now`, in no particular order. An entry that stays for
    /// the whole iteration is among them. No lock is held between two of them.
    pub(crate) fn entries(&self, now: Instant) -> impl Iterator<Item = (u128, Bytes, Timed)> + '_ {
        let now_s = self.seconds(now);
        self.cache.iter().filter_map(move |(key, Entry { value, inserted_at_s, expires_at_s })| {
            let left_s = match expires_at_s {
                u32::MAX => None,
                expires if expires <= now_s => return None,
                expires => Some(u64::from(expires - now_s)),
            };
            let age_s = now_s.saturating_sub(inserted_at_s).into();
            Some((key, value, Timed { age_s, left_s }))
        })
    }

    /// Stores a value of a snapshot unless the store has one that was inserted later. Returns
    /// whether it was stored. The value must fit.
    pub(crate) fn restore(&self, key: u128, value: Bytes, times: Timed, now: Instant) -> bool {
        let now_s = self.seconds(now);
        let age_s = u32::try_from(times.age_s).unwrap_or(u32::MAX);
        let inserted_at_s = now_s.saturating_sub(age_s);
        if self.cache.peek(&key).is_some_and(|entry| entry.inserted_at_s > inserted_at_s) {
            return false;
        }
        let expires_at_s = match times.left_s {
            None => u32::MAX,
            Some(left) => seconds_after(now_s, left),
        };
        self.cache.insert(key, Entry { value, inserted_at_s, expires_at_s });
        true
    }

    fn seconds(&self, at: Instant) -> u32 {
        seconds_after(STARTED_S, at.saturating_duration_since(self.started).as_secs())
    }
}

impl fmt::Debug for ByteStore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ByteStore").field("stats", &self.stats()).finish_non_exhaustive()
    }
}

/// This many seconds after `at_s`. `u32::MAX` means never, and is not reached.
fn seconds_after(at_s: u32, seconds: u64) -> u32 {
    let seconds = u32::try_from(seconds).unwrap_or(u32::MAX);
    at_s.saturating_add(seconds).min(u32::MAX - 1)
}

/// The same bytes in a buffer that is hardly larger: a value may be a small part of what a
/// connection read, and would keep all of it.
fn compact(value: Bytes) -> Bytes {
    match value.try_into_mut() {
        Ok(buffer) if buffer.capacity() - buffer.len() <= buffer.len() / 8 => buffer.freeze(),
        Ok(buffer) => Bytes::copy_from_slice(&buffer),
        Err(shared) => Bytes::copy_from_slice(&shared),
    }
}

#[derive(Clone)]
struct ByBytes;

impl Weighter<u128, Entry> for ByBytes {
    fn weight(&self, _: &u128, entry: &Entry) -> u64 {
        (entry.value.len() + ENTRY_OVERHEAD_BYTES) as u64
    }
}

/// Secret numbers that are multiplied with a key's halves, so that a client that chooses its keys
/// cannot choose their hashes.
#[derive(Clone)]
struct KeyHash([u64; 2]);

impl KeyHash {
    fn random() -> Self {
        KeyHash([1u8, 2].map(|part| RandomState::new().hash_one(part)))
    }
}

impl BuildHasher for KeyHash {
    type Hasher = KeyHasher;

    fn build_hasher(&self) -> KeyHasher {
        KeyHasher { secret: self.0, hash: 0 }
    }
}

struct KeyHasher {
    secret: [u64; 2],
    hash: u64,
}

impl Hasher for KeyHasher {
    fn write(&mut self, bytes: &[u8]) {
        for &byte in bytes {
            self.hash = self.hash.rotate_left(8) ^ u64::from(byte);
        }
    }

    fn write_u128(&mut self, key: u128) {
        let [high, low] = [(key >> 64) as u64 ^ self.secret[0], key as u64 ^ self.secret[1]];
        let product = u128::from(high) * u128::from(low);
        self.hash = (product >> 64) as u64 ^ product as u64;
    }

    fn finish(&self) -> u64 {
        self.hash
    }
}

#[derive(Clone)]
struct CountEvictions(Arc<AtomicU64>);

impl Lifecycle<u128, Entry> for CountEvictions {
    type RequestState = ();

    fn on_evict(&self, (): &mut (), _: u128, _: Entry) {
        self.0.fetch_add(1, Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn value(len: usize, fill: u8) -> Bytes {
        vec![fill; len].into()
    }

    #[test]
    fn a_value_is_found_until_its_time_is_over() {
        let (store, now) = (ByteStore::new(1 << 20, 1 << 16), Instant::now());
        let later = |seconds| now + Duration::from_secs(seconds);
        store.insert(1, value(10, 1), Some(Duration::from_secs(10)), now);
        store.insert(2, value(10, 2), None, now);
        assert_eq!(store.get(1, later(9)).unwrap().age, Duration::from_secs(9));
        assert_eq!(store.get(1, later(11)), None);
        assert_eq!(store.stats().entries, 1, "an expired value is removed");
        assert_eq!(store.get(2, later(1 << 31)).unwrap().value, value(10, 2));
        let stats = store.stats();
        assert_eq!((stats.hits, stats.misses, stats.expired), (2, 1, 1));
    }

    #[test]
    fn a_time_to_live_below_a_second_counts_as_one() {
        let (store, now) = (ByteStore::new(1 << 20, 1 << 16), Instant::now());
        store.insert(1, value(1, 1), Some(Duration::ZERO), now);
        assert!(store.get(1, now).is_some());
        assert!(store.get(1, now + Duration::from_secs(2)).is_none());
    }

    #[test]
    fn the_latest_value_of_a_key_counts() {
        let (store, now) = (ByteStore::new(1 << 20, 1 << 16), Instant::now());
        store.insert(1, value(10, 1), None, now);
        store.insert(1, value(1000, 2), None, now);
        assert_eq!(store.get(1, now).unwrap().value, value(1000, 2));
        assert_eq!(store.insert(1, value(1 << 17, 3), None, now), Admission::TooLarge);
        assert_eq!(store.get(1, now), None, "an outdated value is not found");
        store.insert(1, value(1, 4), None, now);
        assert!(store.remove(1) && !store.remove(1));
    }

    #[test]
    fn bytes_stay_within_the_capacity_whatever_the_sizes() {
        let (store, now) = (ByteStore::new(1 << 20, usize::MAX), Instant::now());
        assert!(store.max_value_bytes() < 1 << 18);
        let mut state = 7u64;
        for key in 0..20_000u128 {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            let len = 1 << (state >> 60);
            store.insert(key, value(len + (state >> 40) as usize % len, key as u8), None, now);
            let stats = store.stats();
            assert!(stats.bytes <= stats.capacity_bytes, "{stats:?}");
        }
        assert!(store.stats().evicted > 0);
    }

    #[test]
    fn a_full_store_admits_large_values_seldom() {
        let (store, now) = (ByteStore::new(1 << 20, 1 << 16), Instant::now());
        for key in 0..2000 {
            assert_eq!(store.insert(key, value(900, 1), None, now), Admission::Stored);
        }
        let large = (10_000..10_200).map(|key| store.insert(key, value(40_000, 2), None, now));
        let admitted = large.filter(|&outcome| outcome == Admission::Stored).count();
        // About one in 40 at first, and more of them as the average grows.
        assert!((1..60).contains(&admitted), "{admitted} of 200");
        let stats = store.stats();
        assert_eq!(stats.declined, 200 - admitted as u64);
        assert!((1000..2000).any(|key| store.get(key, now).is_some()), "small values stay");
        let key = (0..2000).find(|&key| store.get(key, now).is_some()).unwrap();
        for _ in 0..100 {
            assert_eq!(store.insert(key, value(40_000, 3), None, now), Admission::Stored);
            assert_eq!(store.get(key, now).unwrap().value.len(), 40_000, "a new value replaces");
            store.insert(key, value(900, 4), None, now);
        }
    }

    #[test]
    fn a_part_of_a_large_buffer_does_not_keep_the_buffer() {
        let large = value(1 << 20, 9);
        let part = large.slice(100..110);
        let address = part.as_ptr();
        assert_ne!(compact(part).as_ptr(), address);
        let exact = value(1 << 20, 9);
        let address = exact.as_ptr();
        assert_eq!(compact(exact).as_ptr(), address, "a value of its own is not copied");
    }

    #[test]
    fn values_that_are_used_outlive_a_scan() {
        let (store, now) = (ByteStore::new(1 << 20, 1 << 12), Instant::now());
        for _ in 0..3 {
            for key in 0..100 {
                if store.get(key, now).is_none() {
                    store.insert(key, value(1000, 1), None, now);
                }
            }
        }
        for key in 1000..10_000 {
            store.insert(key, value(1000, 2), None, now);
        }
        let kept = (0..100).filter(|&key| store.get(key, now).is_some()).count();
        assert!(kept >= 90, "{kept} of 100");
    }
}
