//! The label table: buckets, and operations on all of them.

use crate::bucket::{self, Read};
use crate::duel::Duel;
use crate::hash::Hashed;
use crate::layout::SLOTS;
use crate::memory::{Buckets, physical_bytes};
#[cfg(doc)]
use crate::populate_in_background;
use crate::stats::{Counters, Stats};
use std::fmt;
use std::io;
use thiserror::Error;

pub use crate::bucket::{Entry, Insert};

/// The size of a table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Capacity {
    /// Slots for this many entries and an eighth more, rounded up to whole buckets of eight. Of
    /// this many different keys about 90 % stay, and each takes less than 20 bytes. See [`Table`].
    Entries(u64),
    /// At most this many bytes. A bucket of eight entries takes 128 bytes; in a table of fewer than
    /// 524,288 entries 144 bytes.
    Bytes(u64),
}

impl fmt::Display for Capacity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Entries(entries) => write!(f, "{entries} entries"),
            Self::Bytes(bytes) => write!(f, "{bytes} bytes"),
        }
    }
}

/// Why a table was not created.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum TableError {
    /// The capacity is less than one entry, or less than one bucket.
    #[error("a table of {capacity} is too small; the least is 1 entry or 144 bytes")]
    TooSmall {
        /// The requested capacity.
        capacity: Capacity,
    },
    /// The capacity is more than the machine's memory.
    #[error("a table of {capacity} exceeds this machine's memory of {limit_bytes} bytes")]
    TooLarge {
        /// The requested capacity.
        capacity: Capacity,
        /// The machine's memory, or its address space if the memory is unknown.
        limit_bytes: u64,
    },
    /// The system refused the memory. Request less, or free some.
    #[error("cannot allocate {bytes} bytes for the table: {source}")]
    OutOfMemory {
        /// The requested bytes.
        bytes: u64,
        /// The error of the system.
        source: io::Error,
    },
}

/// The result of [`Table::read_near`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Near {
    /// The key's value, or `None` if it is not in the table.
    Known(Option<u64>),
    /// The key may be in the bucket's other line, which is being prefetched: call [`Table::read`].
    Far,
}

/// [`Capacity::Entries`] adds one slot for this many entries. With one for six, a table just filled
/// with that many keys would take more than 20 bytes per entry.
const SPARE_PART: u64 = 8;

/// A bounded concurrent hash table from `u64` to `u64`.
///
/// Every key and every value can be stored. All methods take `&self` and may be called from any
/// number of threads.
///
/// * A lookup returns a whole value that was written under the same key.
/// * A lookup that begins after [`insert`](Self::insert) returned finds the value, until it is
///   overwritten, removed, or evicted because its bucket was full.
/// * A lookup takes no lock and ends after a bounded number of steps. If a writer was in its bucket
///   at every try, which means that the writer lost its core within some twenty instructions, the
///   lookup reports a miss, and [`Stats::kept_out`] counts it.
///
/// ```
/// use afterimage_cache::{Capacity, Insert, Table};
///
/// let table = Table::new(Capacity::Entries(1_000_000))?;
/// assert_eq!(table.insert(7, 70), Insert::Inserted);
/// assert_eq!(table.get(7), Some(70));
/// assert_eq!(table.insert(7, 71), Insert::Updated { old: 70 });
///
/// // Many keys at once: their memory accesses overlap.
/// let mut values = [None; 3];
/// table.get_many(&[6, 7, 8], &mut values);
/// assert_eq!(values, [None, Some(71), None]);
///
/// assert!(table.remove(7));
/// assert_eq!(table.stats().hits, 2);
/// # Ok::<(), afterimage_cache::TableError>(())
/// ```
///
/// # Capacity
///
/// A key has one bucket, and some buckets fill before others: a table starts to evict before it is
/// full. Of *n* different keys 86 % stay in a table with *n* slots, 90 % with
/// [`Capacity::Entries`] of *n*, 97.6 % with 1.6 *n* slots and 99.2 % with 2 *n*. As more keys
/// follow, all slots fill.
pub struct Table {
    buckets: Buckets,
    /// Size of the buckets.
    bytes: u64,
    duel: Duel,
    counters: Counters,
}

impl Table {
    /// Reserves the memory of a table without touching it.
    ///
    /// # Errors
    ///
    /// [`TableError::TooSmall`]; [`TableError::TooLarge`] if the machine can never provide the
    /// memory; [`TableError::OutOfMemory`] if it cannot provide it now.
    pub fn new(capacity: Capacity) -> Result<Self, TableError> {
        let buckets = match capacity {
            // A number that overflows is too large in any case.
            Capacity::Entries(entries) => {
                entries.saturating_add(entries.div_ceil(SPARE_PART)).div_ceil(SLOTS as u64)
            }
            Capacity::Bytes(bytes) => Buckets::fitting(bytes),
        };
        if buckets == 0 {
            return Err(TableError::TooSmall { capacity });
        }
        let limit_bytes = physical_bytes().unwrap_or(isize::MAX as u64);
        let too_large = TableError::TooLarge { capacity, limit_bytes };
        let Some(bytes) = Buckets::bytes(buckets).filter(|&bytes| bytes <= limit_bytes) else {
            return Err(too_large);
        };
        let Ok(count) = usize::try_from(buckets) else {
            return Err(too_large);
        };
        let buckets =
            Buckets::zeroed(count).map_err(|source| TableError::OutOfMemory { bytes, source })?;
        Ok(Self { buckets, bytes, duel: Duel::new(count), counters: Counters::default() })
    }

    /// Lets the system allocate the table's memory now, instead of at the first write to each page.
    /// A page of 2 MiB takes a quarter of a millisecond, or two if the host of a virtual machine
    /// must allocate it, too. Other threads may use the table meanwhile. Calls `go_on` before each
    /// page, and stops when it returns false. See [`populate_in_background`]. A system with too
    /// little memory may end the process, as it may when the table fills.
    pub fn populate(&self, mut go_on: impl FnMut() -> bool) {
        self.buckets.populate(&mut go_on);
    }

    /// The number of slots: the most entries that the table can hold.
    pub fn capacity(&self) -> u64 {
        self.buckets.len() as u64 * SLOTS as u64
    }

    /// Bytes reserved for entries. Bytes that were never touched may not be in physical memory yet.
    pub fn memory_bytes(&self) -> u64 {
        self.bytes
    }

    /// The number of entries, exact while no thread writes.
    #[expect(clippy::len_without_is_empty, reason = "a cache's emptiness decides nothing")]
    pub fn len(&self) -> u64 {
        self.counters.sum().entries
    }

    /// Size and counters of the table.
    pub fn stats(&self) -> Stats {
        Stats { capacity: self.capacity(), bytes: self.memory_bytes(), ..self.counters.sum() }
    }

    /// The value of `key`, counted as a hit or a miss.
    #[inline]
    pub fn get(&self, key: u64) -> Option<u64> {
        let hashed = Hashed::new(key);
        let read = self.buckets.of(hashed).read(hashed);
        match read {
            Read::Hit(value) => {
                self.counters.lookups(1, 0, 0);
                Some(value)
            }
            Read::Miss | Read::KeptOut => {
                self.counters.lookups(0, 1, u64::from(read == Read::KeptOut));
                None
            }
        }
    }

    /// The value of a key that was mixed before. It is not counted: the caller counts many lookups
    /// at once with [`record_lookups`](Self::record_lookups).
    #[inline]
    pub fn read(&self, hashed: Hashed) -> Option<u64> {
        match self.buckets.of(hashed).read(hashed) {
            Read::Hit(value) => Some(value),
            Read::Miss => None,
            Read::KeptOut => {
                self.counters.lookups(0, 0, 1);
                None
            }
        }
    }

    /// Counts lookups by [`read`](Self::read) and [`read_near`](Self::read_near).
    #[inline]
    pub fn record_lookups(&self, hits: u64, misses: u64) {
        self.counters.lookups(hits, misses, 0);
    }

    /// As [`read`](Self::read), but only in the line of memory that [`prefetch`](Self::prefetch)
    /// requested, which nearly always suffices. If not, this prefetches the bucket's other line,
    /// and the caller should do other work before it calls [`read`](Self::read).
    #[inline]
    pub fn read_near(&self, hashed: Hashed) -> Near {
        let bucket = self.buckets.of(hashed);
        match bucket.read_near(hashed) {
            bucket::Near::Hit(value) => Near::Known(Some(value)),
            bucket::Near::Miss => Near::Known(None),
            bucket::Near::Spilled(_) | bucket::Near::Busy => {
                bucket.prefetch(1 - hashed.home());
                Near::Far
            }
        }
    }

    /// Prefetches the line that most likely contains the key, without waiting for it. A caller that
    /// prefetches some sixteen keys before it reads the first hides the latency of memory.
    #[inline]
    pub fn prefetch(&self, hashed: Hashed) {
        self.buckets.of(hashed).prefetch(hashed.home());
    }

    /// Prefetches the whole bucket, for a key that will be inserted.
    #[inline]
    pub fn prefetch_bucket(&self, hashed: Hashed) {
        let bucket = self.buckets.of(hashed);
        bucket.prefetch(0);
        bucket.prefetch(1);
    }

    /// Looks up many keys in any order: `values[i]` becomes the value of `keys[i]`. Buckets are
    /// prefetched in advance, so a table much larger than the processor's caches is nearly as fast
    /// as a small one.
    ///
    /// # Panics
    ///
    /// If the slices differ in length.
    pub fn get_many(&self, keys: &[u64], values: &mut [Option<u64>]) {
        assert_eq!(keys.len(), values.len(), "as many values as keys");
        // A ring of prefetched keys: each read is followed by one more prefetch, so the number of
        // memory accesses in flight stays at its maximum.
        let mut ring = [Hashed::default(); AHEAD];
        for (hashed, &key) in ring.iter_mut().zip(keys) {
            *hashed = Hashed::new(key);
            self.prefetch(*hashed);
        }
        // Keys that need the other line of their bucket are read later, when it has arrived.
        let mut far = [(0, Hashed::default()); AHEAD];
        let mut left = 0;
        let mut hits = 0;
        let mut settle = |values: &mut [Option<u64>], far: &[(usize, Hashed)]| {
            for &(at, hashed) in far {
                values[at] = self.read(hashed);
                hits += u64::from(values[at].is_some());
            }
        };
        let mut near_hits = 0;
        for at in 0..keys.len() {
            let next = &mut ring[at % AHEAD];
            let hashed = *next;
            if let Some(&key) = keys.get(at + AHEAD) {
                *next = Hashed::new(key);
                self.prefetch(*next);
            }
            match self.read_near(hashed) {
                Near::Known(value) => {
                    values[at] = value;
                    near_hits += u64::from(value.is_some());
                }
                Near::Far => {
                    far[left] = (at, hashed);
                    left += 1;
                    if left == AHEAD {
                        settle(values, &far);
                        left = 0;
                    }
                }
            }
        }
        settle(values, &far[..left]);
        hits += near_hits;
        self.counters.lookups(hits, keys.len() as u64 - hits, 0);
    }

    /// Stores `value` under `key`. If the bucket is full, another entry is evicted.
    pub fn insert(&self, key: u64, value: u64) -> Insert {
        let hashed = Hashed::new(key);
        self.insert_hashed(hashed, value)
    }

    /// As [`insert`](Self::insert), for a key that was mixed before.
    pub fn insert_hashed(&self, hashed: Hashed, value: u64) -> Insert {
        let index = hashed.bucket(self.buckets.len());
        let policy = self.duel.policy(index);
        let outcome = self.buckets.at(index).insert(hashed, value, policy);
        let evicted = matches!(outcome, Insert::Evicted { .. });
        if evicted {
            self.duel.evicted(index);
        }
        self.counters.write(matches!(outcome, Insert::Inserted), evicted);
        outcome
    }

    /// Removes `key`; returns whether it was in the table.
    pub fn remove(&self, key: u64) -> bool {
        self.remove_when(key, |_| true)
    }

    /// Removes `key` if its value is `expected`; returns whether it was removed.
    pub fn remove_if(&self, key: u64, expected: u64) -> bool {
        self.remove_when(key, |value| value == expected)
    }

    /// Removes all entries. An entry that is inserted meanwhile may stay.
    pub fn clear(&self) {
        for bucket in self.buckets.iter() {
            self.counters.removed(u64::from(bucket.clear()));
        }
    }

    /// All entries. Readers and writers may use the table meanwhile.
    ///
    /// Each bucket is copied as it was at one moment, so every pair was in the table, and no key
    /// occurs twice. An entry that stays in the table for the whole time occurs once; an entry that
    /// is inserted or removed meanwhile may be missing.
    pub fn entries(&self) -> impl Iterator<Item = Entry> + '_ {
        self.buckets.iter().flat_map(|bucket| {
            let (entries, count) = bucket.entries();
            entries.into_iter().take(count)
        })
    }

    /// Checks the invariants of the table, for tests.
    ///
    /// # Errors
    ///
    /// The broken invariant, and its bucket.
    pub fn validate(&self) -> Result<(), String> {
        let mut entries = 0;
        for (index, bucket) in self.buckets.iter().enumerate() {
            bucket.validate().map_err(|what| format!("bucket {index}: {what}"))?;
            let (found, count) = bucket.entries();
            entries += count as u64;
            for entry in &found[..count] {
                let home = Hashed::new(entry.key).bucket(self.buckets.len());
                if home != index {
                    return Err(format!(
                        "bucket {index}: key {:#x} belongs to bucket {home}",
                        entry.key
                    ));
                }
            }
        }
        let counted = self.len();
        if counted != entries {
            return Err(format!("{counted} entries counted, {entries} found"));
        }
        Ok(())
    }

    /// Stores an entry of a snapshot with its heat. `None` if the key is already in the table: the
    /// entry there stays. Not counted as a write.
    #[doc(hidden)]
    pub fn restore(&self, entry: Entry) -> Option<Insert> {
        let hashed = Hashed::new(entry.key);
        let index = hashed.bucket(self.buckets.len());
        let policy = self.duel.policy(index);
        let outcome = self.buckets.at(index).restore(hashed, entry.value, entry.heat, policy)?;
        self.counters.restored(matches!(outcome, Insert::Evicted { .. }));
        Some(outcome)
    }

    fn remove_when(&self, key: u64, condition: impl FnOnce(u64) -> bool) -> bool {
        let hashed = Hashed::new(key);
        let removed = self.buckets.of(hashed).remove_if(hashed, condition);
        self.counters.removed(u64::from(removed));
        removed
    }
}

impl fmt::Debug for Table {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Table").field("stats", &self.stats()).finish_non_exhaustive()
    }
}

/// Lookups in flight in [`Table::get_many`]: enough to hide the latency of memory, and few enough
/// that the processor's cache keeps each prefetched line until it is read.
const AHEAD: usize = 32;
