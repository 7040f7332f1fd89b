//! Counters in stripes, so that threads rarely write to the same cache line.

use std::cell::Cell;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

/// Statistics of a table since its creation.
///
/// The counts are exact when no thread uses the table. Otherwise each is a recent value, and they
/// may differ slightly from each other.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Stats {
    /// Entries in the table.
    pub entries: u64,
    /// The most entries that the table can hold.
    pub capacity: u64,
    /// Bytes allocated for entries, filled or vacant.
    pub bytes: u64,
    /// Lookups that found their key.
    pub hits: u64,
    /// Lookups that did not find their key.
    pub misses: u64,
    /// Misses among them because writers occupied the bucket during all tries of the reader.
    pub kept_out: u64,
    /// Insertions, of new keys and of keys in the table.
    pub writes: u64,
    /// Entries that were evicted.
    pub evictions: u64,
}

/// Number of stripes. More threads share them, which costs time but no counts.
const STRIPES: usize = 32;

/// The counters of a thread, on two cache lines of their own: some machines fetch lines in pairs.
#[derive(Default)]
#[repr(align(128))]
pub(crate) struct Stripe {
    hits: AtomicU64,
    misses: AtomicU64,
    kept_out: AtomicU64,
    writes: AtomicU64,
    evictions: AtomicU64,
    added: AtomicU64,
    removed: AtomicU64,
}

/// All counters of a table.
#[derive(Default)]
pub(crate) struct Counters([Stripe; STRIPES]);

impl Counters {
    /// Adds lookups; a count of zero touches nothing.
    #[inline]
    pub(crate) fn lookups(&self, hits: u64, misses: u64, kept_out: u64) {
        let stripe = self.mine();
        for (counter, count) in
            [(&stripe.hits, hits), (&stripe.misses, misses), (&stripe.kept_out, kept_out)]
        {
            if count != 0 {
                counter.fetch_add(count, Ordering::Relaxed);
            }
        }
    }

    /// Counts a write, and whether it added or evicted an entry.
    #[inline]
    pub(crate) fn write(&self, added: bool, evicted: bool) {
        let stripe = self.mine();
        stripe.writes.fetch_add(1, Ordering::Relaxed);
        if added {
            stripe.added.fetch_add(1, Ordering::Relaxed);
        }
        if evicted {
            stripe.evictions.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Counts an entry from a snapshot, which may have evicted another.
    pub(crate) fn restored(&self, evicted: bool) {
        let stripe = self.mine();
        let counter = if evicted { &stripe.evictions } else { &stripe.added };
        counter.fetch_add(1, Ordering::Relaxed);
    }

    /// Counts removed entries.
    #[inline]
    pub(crate) fn removed(&self, entries: u64) {
        if entries != 0 {
            self.mine().removed.fetch_add(entries, Ordering::Relaxed);
        }
    }

    /// The sums of all stripes. `capacity` and `bytes` are zero.
    pub(crate) fn sum(&self) -> Stats {
        let mut stats = Stats::default();
        let (mut added, mut removed) = (0, 0);
        for stripe in &self.0 {
            stats.hits += stripe.hits.load(Ordering::Relaxed);
            stats.misses += stripe.misses.load(Ordering::Relaxed);
            stats.kept_out += stripe.kept_out.load(Ordering::Relaxed);
            stats.writes += stripe.writes.load(Ordering::Relaxed);
            stats.evictions += stripe.evictions.load(Ordering::Relaxed);
            added += stripe.added.load(Ordering::Relaxed);
            removed += stripe.removed.load(Ordering::Relaxed);
        }
        // The removal of an entry by one thread may be seen before its insertion by another.
        stats.entries = u64::saturating_sub(added, removed);
        stats
    }

    #[inline]
    fn mine(&self) -> &Stripe {
        static NEXT: AtomicUsize = AtomicUsize::new(0);
        thread_local! {
            static MINE: Cell<usize> = const { Cell::new(usize::MAX) };
        }
        let mut mine = MINE.get();
        if mine == usize::MAX {
            mine = NEXT.fetch_add(1, Ordering::Relaxed) % STRIPES;
            MINE.set(mine);
        }
        &self.0[mine % STRIPES]
    }
}
