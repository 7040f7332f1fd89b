//! The table: buckets, and what is done with all of them.

use crate::bucket::{self, Read};
use crate::duel::Duel;
use crate::eviction::SLOTS;
use crate::hash::Hashed;
use crate::memory::{Buckets, physical_bytes};
#[cfg(doc)]
use crate::populate_in_background;
use crate::stats::{Counters, Stats};
use std::fmt;
use std::io;
use thiserror::Error;

pub use crate::bucket::{Entry, Insert};

/// How large a table is to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Capacity {
    /// Room for so many entries and an eighth more, rounded up to whole buckets of eight: of so
    /// many different keys nine in ten then stay, and an entry that does takes less than 20
    /// bytes. See [`Table`].
    Entries(u64),
    /// At most so many bytes, of which each eight entries take 128; in a table of less than 524,288
    /// entries 144.
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

/// Why there is no table.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum TableError {
    /// The capacity is less than one entry, or than the bytes of one bucket. Ask for more.
    #[error("a capacity of {capacity} holds nothing; the least is 1 entry or 144 bytes")]
    TooSmall {
        /// What was asked for.
        capacity: Capacity,
    },
    /// The capacity is more than the machine's memory. Ask for less.
    #[error("a capacity of {capacity} is more than this machine's {limit_bytes} bytes of memory")]
    TooLarge {
        /// What was asked for.
        capacity: Capacity,
        /// What the machine has, or what it can address where that is not known.
        limit_bytes: u64,
    },
    /// The system refused the memory. Ask for less, or free some.
    #[error("the system refused {bytes} bytes for the table: {source}")]
    OutOfMemory {
        /// What was asked of the system.
        bytes: u64,
        /// What it said.
        source: io::Error,
    },
}

/// What [`Table::read_near`] found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Near {
    /// The key's value, or that it is not there.
    Known(Option<u64>),
    /// It takes a look into the bucket's other line, which is on its way: ask [`Table::read`].
    Far,
}

/// [`Capacity::Entries`] takes one slot more for so many. With a sixth more, the table that so many
/// keys have just filled would take more than 20 bytes an entry.
const SPARE_PART: u64 = 8;

/// A bounded concurrent hash table from `u64` to `u64`.
///
/// Every key and every value can be stored. All methods take `&self` and may be called from any
/// number of threads.
///
/// * A value that is read under a key is one that was written under that key, whole.
/// * What [`insert`](Self::insert) wrote is there for every lookup that begins after it returned,
///   until it is overwritten, removed, or evicted because its bucket was full.
/// * A lookup takes no lock and ends after a bounded number of steps, whatever writers do. If
///   writers were in its bucket at each of its tries (which takes one that lost its core in the
///   middle of some twenty instructions), it reports a miss, and [`Stats::kept_out`] counts it.
///
/// # Capacity
///
/// A key can stand in one bucket only, and some buckets fill before others: a table starts to evict
/// before it is full. Of *n* different keys 86 % stay in a table with *n* slots, 90 % in one that
/// was made for *n* entries ([`Capacity::Entries`]), 97.6 % with 1.6 *n* slots and 99.2 % with 2
/// *n*. All slots come to be used as more keys follow.
pub struct Table {
    buckets: Buckets,
    /// What the buckets take.
    bytes: u64,
    duel: Duel,
    counters: Counters,
}

impl Table {
    /// Takes the memory for a table and touches none of it.
    ///
    /// # Errors
    ///
    /// [`TableError::TooSmall`], [`TableError::TooLarge`] for what can never be had here, and
    /// [`TableError::OutOfMemory`] for what cannot be had now.
    pub fn new(capacity: Capacity) -> Result<Self, TableError> {
        let buckets = match capacity {
            // What overflows here is too large all the same.
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

    /// Has the system give the table's memory now, rather than page by page to those who first
    /// write there: a page of 2 MiB takes it a quarter of a millisecond, and where a virtual
    /// machine's host must find the memory, two. Others may use the table meanwhile. `go_on` is
    /// asked before each such page whether to. See [`populate_in_background`].
    ///
    /// # Errors
    ///
    /// What the system says when it cannot: it is no Linux, or one older than 5.14. The table is as
    /// good as before. A system that has not that much memory may end the process, as it may
    /// when the table fills.
    pub fn populate(&self, mut go_on: impl FnMut() -> bool) -> io::Result<()> {
        self.buckets.populate(&mut go_on)
    }

    /// Entries that can be held, exactly: the number of slots.
    pub fn capacity(&self) -> u64 {
        self.buckets.len() as u64 * SLOTS as u64
    }

    /// Bytes taken for entries. Those that were never touched may not be in physical memory yet.
    pub fn memory_bytes(&self) -> u64 {
        self.bytes
    }

    /// Entries held, exact while nobody writes.
    #[expect(clippy::len_without_is_empty, reason = "a cache's emptiness decides nothing")]
    pub fn len(&self) -> u64 {
        self.counters.sum().entries
    }

    /// What the table holds and what has happened to it.
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

    /// The value of a key that was mixed before, without counting: callers count many lookups in
    /// one go, with [`record_lookups`](Self::record_lookups).
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

    /// Counts lookups that were made with [`read`](Self::read).
    #[inline]
    pub fn record_lookups(&self, hits: u64, misses: u64) {
        self.counters.lookups(hits, misses, 0);
    }

    /// As [`read`](Self::read), looking no further than into the line of memory that
    /// [`prefetch`](Self::prefetch) asked for. Nearly always that settles it; if not, the bucket's
    /// other line is asked for, and the caller does something else before it calls
    /// [`read`](Self::read).
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

    /// Asks the processor to bring the line near in which the key most likely stands, and does not
    /// wait for it. Prefetch some sixteen keys ahead of reading them, and the memory's latency
    /// is hidden.
    #[inline]
    pub fn prefetch(&self, hashed: Hashed) {
        self.buckets.of(hashed).prefetch(hashed.home());
    }

    /// As [`prefetch`](Self::prefetch), for a key that will be inserted: that takes the whole
    /// bucket.
    #[inline]
    pub fn prefetch_bucket(&self, hashed: Hashed) {
        let bucket = self.buckets.of(hashed);
        bucket.prefetch(0);
        bucket.prefetch(1);
    }

    /// Looks up many keys, in no particular order: `values[i]` becomes the value of `keys[i]`.
    /// Buckets are prefetched a window ahead, so a table much larger than the processor's
    /// caches is nearly as fast as a small one.
    ///
    /// # Panics
    ///
    /// If the slices are not of the same length.
    pub fn get_many(&self, keys: &[u64], values: &mut [Option<u64>]) {
        assert_eq!(keys.len(), values.len(), "as many values as keys");
        // A ring of the keys that are under way: each read makes room for one more prefetch, so
        // there are always as many memory accesses in flight as there may be.
        let mut ring = [Hashed::default(); AHEAD];
        for (hashed, &key) in ring.iter_mut().zip(keys) {
            *hashed = Hashed::new(key);
            self.prefetch(*hashed);
        }
        // Those that need their bucket's other line are left until it had time to come.
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
            let place = &mut ring[at % AHEAD];
            let hashed = *place;
            if let Some(&key) = keys.get(at + AHEAD) {
                *place = Hashed::new(key);
                self.prefetch(*place);
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

    /// Stores `value` under `key`. It always is stored; if the bucket is full, another entry
    /// leaves.
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

    /// Removes `key`; says whether it was there.
    pub fn remove(&self, key: u64) -> bool {
        self.remove_when(key, |_| true)
    }

    /// Removes `key` if its value is `expected`; says whether it did.
    pub fn remove_if(&self, key: u64, expected: u64) -> bool {
        self.remove_when(key, |value| value == expected)
    }

    /// Removes all entries. One that is inserted meanwhile may stay.
    pub fn clear(&self) {
        for bucket in self.buckets.iter() {
            self.counters.removed(u64::from(bucket.clear()));
        }
    }

    /// All entries, while readers and writers go on.
    ///
    /// Each bucket is copied as it stood at one moment, so every pair was in the table, and no key
    /// comes twice. An entry that stays for the whole time comes once; one that comes or goes
    /// may or may not.
    pub fn entries(&self) -> impl Iterator<Item = Entry> + '_ {
        self.buckets.iter().flat_map(|bucket| {
            let (entries, count) = bucket.entries();
            entries.into_iter().take(count)
        })
    }

    /// Checks what must hold inside the table, for tests.
    ///
    /// # Errors
    ///
    /// Says what does not hold, and in which bucket.
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
                        "bucket {index}: key {:#x} belongs into bucket {home}",
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

    /// Stores an entry with the heat that it had in a snapshot. `None` if its key is there already;
    /// what is there stays. Not counted among the writes.
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

/// Lookups in flight at once in [`Table::get_many`]: enough to cover the memory's latency, few
/// enough that no prefetched line is pushed out again before it is read.
const AHEAD: usize = 32;
