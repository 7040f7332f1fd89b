//! Counters that threads do not fight over.

use std::cell::Cell;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

/// What a table holds and what has happened to it since it was made.
///
/// The counts are exact once the threads that use the table are still; while they are not, each is
/// a value that it had a moment ago, and they need not fit each other to the last digit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Stats {
    /// Entries held now.
    pub entries: u64,
    /// Entries that can be held.
    pub capacity: u64,
    /// Bytes taken for entries, whether filled or not.
    pub bytes: u64,
    /// Lookups that found their key.
    pub hits: u64,
    /// Lookups that did not.
    pub misses: u64,
    /// Among the misses, those where writers kept the reader out of the bucket for too long.
    pub kept_out: u64,
    /// Insertions, of new keys and of known ones.
    pub writes: u64,
    /// Entries that had to go to make room.
    pub evictions: u64,
}

/// Stripes; more threads than this share, which costs time and no counts.
const STRIPES: usize = 32;

/// One thread's counters, on cache lines of their own (two, since some machines fetch lines in
/// pairs).
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

    /// Adds one write, which added and evicted so many entries.
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

    /// Adds an entry that came from a snapshot, and evicted another one or did not.
    pub(crate) fn restored(&self, evicted: bool) {
        let stripe = self.mine();
        let counter = if evicted { &stripe.evictions } else { &stripe.added };
        counter.fetch_add(1, Ordering::Relaxed);
    }

    /// Adds entries that were removed.
    #[inline]
    pub(crate) fn removed(&self, entries: u64) {
        if entries != 0 {
            self.mine().removed.fetch_add(entries, Ordering::Relaxed);
        }
    }

    /// The sums; `capacity` and `bytes` are left at zero.
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
        // One thread's removal may be seen before another's insertion of the same entry.
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
