//! Calls in flight, and the waiters that share each: any number of equal rows make one call.

use std::collections::hash_map::Entry;
use std::sync::PoisonError;
use std::{fmt, mem};

use fxhash::FxHashMap;
use smallvec::{SmallVec, smallvec};

use crate::sync::{AtomicUsize, Mutex, MutexGuard, Ordering};

/// Locks that the table is split into: more than there are cores, so that they seldom meet. A model
/// check has two, so that threads meet in one and pass each other in two.
const SHARDS: usize = if cfg!(loom) { 2 } else { 64 };

/// The waiters of a flight, the first one first. Most flights have one.
pub type Waiters<W> = SmallVec<[W; 1]>;

/// The flights of some keys, and the waiters of each.
type Shard<W> = FxHashMap<u128, Waiters<W>>;

/// The calls in flight, each by the 128-bit hash of its row, with a limit on all waiters.
///
/// A flight begins with the first waiter that [joins](Flights::join) under a key, and ends with
/// [`complete`](Flights::complete). A waiter that joins in between is returned by that `complete`,
/// and by no other.
#[derive(Debug)]
pub struct Flights<W> {
    shards: Box<[Mutex<Shard<W>>]>,
    waiting: AtomicUsize,
    max_waiting: usize,
}

/// The result of joining.
#[derive(Debug)]
pub enum Join<'a, W> {
    /// The first waiter under this key. The permit is the duty to make the call.
    First(Permit<'a, W>),
    /// A call is in flight; its completion returns the waiter.
    Joined,
    /// Too many waiters already.
    Full(W),
}

/// The duty to complete a flight. Dropping it ends the flight and drops its waiters.
#[must_use = "dropping the permit ends the flight"]
pub struct Permit<'a, W> {
    flights: &'a Flights<W>,
    key: u128,
}

impl<W> Permit<'_, W> {
    /// Hands the duty on: from now on the caller completes the flight by its key.
    pub fn transfer(self) -> u128 {
        let key = self.key;
        mem::forget(self);
        key
    }
}

impl<W> Drop for Permit<'_, W> {
    fn drop(&mut self) {
        drop(self.flights.complete(self.key));
    }
}

impl<W> fmt::Debug for Permit<'_, W> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Permit").field("key", &self.key).finish_non_exhaustive()
    }
}

impl<W> Flights<W> {
    /// A table with at most `max_waiting` waiters.
    pub fn new(max_waiting: usize) -> Self {
        let shards = (0..SHARDS).map(|_| Mutex::new(Shard::default())).collect();
        Flights { shards, waiting: AtomicUsize::new(0), max_waiting }
    }

    /// Joins the flight under `key`, or begins it.
    pub fn join(&self, key: u128, waiter: W) -> Join<'_, W> {
        if self.waiting.fetch_add(1, Ordering::Relaxed) >= self.max_waiting {
            self.waiting.fetch_sub(1, Ordering::Relaxed);
            return Join::Full(waiter);
        }
        match self.shard(key).entry(key) {
            Entry::Occupied(mut flight) => {
                flight.get_mut().push(waiter);
                Join::Joined
            }
            Entry::Vacant(entry) => {
                entry.insert(smallvec![waiter]);
                Join::First(Permit { flights: self, key })
            }
        }
    }

    /// Ends the flight under `key` and returns its waiters, the first one first.
    pub fn complete(&self, key: u128) -> Waiters<W> {
        let waiters = self.shard(key).remove(&key).unwrap_or_default();
        self.waiting.fetch_sub(waiters.len(), Ordering::Relaxed);
        waiters
    }

    /// Ends the flight under `key`, unless `goes_on` returns a reason, given its waiters. A key
    /// without a flight is one that ended.
    ///
    /// # Errors
    /// The waiters, when the flight has ended.
    pub fn complete_unless<R>(
        &self,
        key: u128,
        goes_on: impl FnOnce(&[W]) -> Option<R>,
    ) -> Result<R, Waiters<W>> {
        let mut shard = self.shard(key);
        let Entry::Occupied(flight) = shard.entry(key) else { return Err(Waiters::new()) };
        if let Some(reason) = goes_on(flight.get()) {
            return Ok(reason);
        }
        let waiters = flight.remove();
        drop(shard);
        self.waiting.fetch_sub(waiters.len(), Ordering::Relaxed);
        Err(waiters)
    }

    /// Removes the waiters for which `leaves` returns true. Their flights go on, also without
    /// waiters.
    pub fn remove_if(&self, mut leaves: impl FnMut(&W) -> bool) -> Vec<W> {
        let mut gone = Vec::new();
        for shard in &self.shards {
            let mut shard = shard.lock().unwrap_or_else(PoisonError::into_inner);
            for waiters in shard.values_mut() {
                if waiters.iter().any(&mut leaves) {
                    for waiter in mem::take(waiters) {
                        match leaves(&waiter) {
                            true => gone.push(waiter),
                            false => waiters.push(waiter),
                        }
                    }
                }
            }
        }
        self.waiting.fetch_sub(gone.len(), Ordering::Relaxed);
        gone
    }

    /// Most waiters.
    pub fn limit(&self) -> usize {
        self.max_waiting
    }

    /// Whether one more would be too many.
    pub fn is_full(&self) -> bool {
        self.waiting() >= self.max_waiting
    }

    /// How many wait now.
    pub fn waiting(&self) -> usize {
        self.waiting.load(Ordering::Relaxed)
    }

    /// The number of calls in flight, including those without waiters.
    pub fn under_way(&self) -> usize {
        let shards = self.shards.iter();
        shards.map(|shard| shard.lock().unwrap_or_else(PoisonError::into_inner).len()).sum()
    }

    fn shard(&self, key: u128) -> MutexGuard<'_, Shard<W>> {
        // The high bits: the map inside the shard is free to use the low ones.
        let shard = &self.shards[(key >> 122) as usize % SHARDS];
        // Map operations do not panic half-way, so a poisoned map is still whole.
        shard.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;
    use std::panic::{AssertUnwindSafe, catch_unwind};
    use std::sync::Arc;

    /// Joins, and says whether that began a flight; its completion is the test's.
    fn begins<W: fmt::Debug>(flights: &Flights<W>, key: u128, waiter: W) -> bool {
        match flights.join(key, waiter) {
            Join::First(permit) => permit.transfer() == key,
            Join::Joined => false,
            Join::Full(waiter) => panic!("{waiter:?} was refused"),
        }
    }

    #[test]
    fn the_first_waiter_begins_the_flight_and_the_rest_join() {
        let flights = Flights::new(10);
        assert!(begins(&flights, 1, 'a'));
        assert!(!begins(&flights, 1, 'b'));
        assert!(begins(&flights, 2, 'c'));
        assert_eq!(flights.complete(1).as_slice(), ['a', 'b']);
        assert!(flights.complete(1).is_empty());
        assert!(begins(&flights, 1, 'd'));
        assert_eq!(flights.waiting(), 2);
    }

    #[test]
    fn a_waiter_above_the_limit_comes_back() {
        let flights = Flights::new(2);
        begins(&flights, 1, 'a');
        begins(&flights, 1, 'b');
        assert!(matches!(flights.join(1, 'c'), Join::Full('c')));
        assert!(matches!(flights.join(2, 'd'), Join::Full('d')));
        flights.complete(1);
        assert!(begins(&flights, 2, 'd'));
    }

    #[test]
    fn a_dropped_permit_ends_its_flight_and_drops_the_waiters() {
        let (flights, alive) = (Flights::new(10), Arc::new(()));
        let Join::First(permit) = flights.join(1, Arc::clone(&alive)) else { panic!("first") };
        assert!(!begins(&flights, 1, Arc::clone(&alive)));
        drop(permit);
        let unwound = catch_unwind(AssertUnwindSafe(|| {
            let _permit = flights.join(2, Arc::clone(&alive));
            panic!("planned");
        }));
        assert!(unwound.is_err());
        assert_eq!((flights.waiting(), flights.under_way()), (0, 0));
        assert_eq!(Arc::strong_count(&alive), 1, "no waiter is kept");
    }

    #[test]
    fn a_flight_goes_on_without_the_waiters_that_leave() {
        let flights = Flights::new(10);
        begins(&flights, 1, 'a');
        begins(&flights, 1, 'b');
        begins(&flights, 2, 'a');
        assert_eq!(flights.remove_if(|&waiter| waiter == 'a'), ['a', 'a']);
        assert_eq!(flights.waiting(), 1);
        assert!(!begins(&flights, 2, 'c'));
        assert_eq!(flights.complete(1).as_slice(), ['b']);
        assert_eq!(flights.complete(2).as_slice(), ['c']);
        assert_eq!((flights.waiting(), flights.under_way()), (0, 0));
    }

    #[test]
    fn a_flight_ends_when_no_waiter_gives_a_reason() {
        let flights = Flights::new(10);
        let first = |waiters: &[char]| waiters.first().copied();
        begins(&flights, 1, 'a');
        assert_eq!(flights.complete_unless(1, first), Ok('a'));
        assert_eq!(flights.complete_unless(1, |_| None::<()>), Err(smallvec!['a']));
        assert_eq!(flights.waiting(), 0);
        assert!(begins(&flights, 1, 'b'));
        flights.remove_if(|_| true);
        assert_eq!(flights.complete_unless(1, first), Err(smallvec![]));
        assert!(begins(&flights, 1, 'c'));
    }

    #[test]
    fn each_waiter_is_returned_once_whatever_the_threads() {
        let flights = Arc::new(Flights::new(usize::MAX));
        let threads: Vec<_> = (0..4)
            .map(|thread| {
                let flights = Arc::clone(&flights);
                std::thread::spawn(move || {
                    let mut completed = Vec::new();
                    for i in 0..10_000u32 {
                        if begins(&flights, u128::from(i % 3), (thread, i)) {
                            std::thread::yield_now();
                            completed.extend(flights.complete(u128::from(i % 3)));
                        }
                    }
                    completed
                })
            })
            .collect();
        let mut all: Vec<_> = threads.into_iter().flat_map(|t| t.join().unwrap()).collect();
        all.sort_unstable();
        let expected: Vec<_> = (0..4).flat_map(|t| (0..10_000u32).map(move |i| (t, i))).collect();
        assert_eq!(all, expected);
        assert_eq!(flights.waiting(), 0);
    }
}
