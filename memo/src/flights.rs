//! Calls in flight and their waiters: any number of identical requests make one call.

use std::collections::hash_map::Entry;
use std::mem;
use std::sync::PoisonError;

use fxhash::FxHashMap;
use smallvec::{SmallVec, smallvec};

use crate::sync::{AtomicUsize, Mutex, MutexGuard, Ordering};

/// Locks that the table is split into: more than there are cores, so that they seldom meet. A model
/// check has two, so that threads meet in one and pass each other in two.
const SHARDS: usize = if cfg!(loom) { 2 } else { 64 };

/// Those on a flight, the first one first. Most flights have one.
pub type Waiters<W> = SmallVec<[W; 1]>;

/// The flights of some keys, and the waiters of each.
type Shard<W> = FxHashMap<u128, Waiters<W>>;

/// The calls in flight, each by the 128-bit hash of its input, with a limit on all waiters.
///
/// A flight begins with the first to [`join`](Flights::join) under a key and ends with
/// [`land`](Flights::land). That `land` returns every waiter that joined in between.
#[derive(Debug)]
pub struct Flights<W> {
    shards: Box<[Mutex<Shard<W>>]>,
    waiting: AtomicUsize,
    max_waiting: usize,
}

/// What became of a request to join.
#[derive(Debug, PartialEq, Eq)]
pub enum Join<W> {
    /// The first under this key: the caller must make the call and `land` the flight.
    First,
    /// There is a call under way; its `land` will hand the waiter out.
    Joined,
    /// Too many wait already.
    Full(W),
}

impl<W> Flights<W> {
    /// A table in which at most `max_waiting` wait.
    pub fn new(max_waiting: usize) -> Self {
        let shards = (0..SHARDS).map(|_| Mutex::new(Shard::default())).collect();
        Flights { shards, waiting: AtomicUsize::new(0), max_waiting }
    }

    /// Joins the flight under `key`, or begins it.
    pub fn join(&self, key: u128, waiter: W) -> Join<W> {
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
                Join::First
            }
        }
    }

    /// Ends the flight under `key` and returns its waiters, in the order in which they joined.
    pub fn land(&self, key: u128) -> Waiters<W> {
        let waiters = self.shard(key).remove(&key).unwrap_or_default();
        self.waiting.fetch_sub(waiters.len(), Ordering::Relaxed);
        waiters
    }

    /// Ends the flight under `key` and returns its waiters as the error, unless `stays` returns a
    /// reason to go on, which is then the result. A key without a flight counts as ended.
    ///
    /// # Errors
    /// The waiters, if the flight has ended.
    pub fn land_unless<R>(
        &self,
        key: u128,
        stays: impl FnOnce(&[W]) -> Option<R>,
    ) -> Result<R, Waiters<W>> {
        let mut shard = self.shard(key);
        if let Some(reason) = shard.get(&key).and_then(|waiters| stays(waiters)) {
            return Ok(reason);
        }
        let waiters = shard.remove(&key).unwrap_or_default();
        self.waiting.fetch_sub(waiters.len(), Ordering::Relaxed);
        Err(waiters)
    }

    /// Removes every waiter for which `leaves` returns true. Flights stay, possibly empty.
    pub fn disembark(&self, mut leaves: impl FnMut(&W) -> bool) -> Vec<W> {
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
    use std::sync::Arc;

    #[test]
    fn the_first_owes_the_call_and_the_rest_join_it() {
        let flights = Flights::new(10);
        assert_eq!(flights.join(1, 'a'), Join::First);
        assert_eq!(flights.join(1, 'b'), Join::Joined);
        assert_eq!(flights.join(2, 'c'), Join::First);
        assert_eq!(flights.land(1).as_slice(), ['a', 'b']);
        assert!(flights.land(1).is_empty());
        assert_eq!(flights.join(1, 'd'), Join::First);
        assert_eq!(flights.waiting(), 2);
    }

    #[test]
    fn past_the_cap_the_waiter_comes_back_and_room_returns_with_a_landing() {
        let flights = Flights::new(2);
        flights.join(1, 'a');
        flights.join(1, 'b');
        assert_eq!(flights.join(1, 'c'), Join::Full('c'));
        assert_eq!(flights.join(2, 'd'), Join::Full('d'));
        flights.land(1);
        assert_eq!(flights.join(2, 'd'), Join::First);
    }

    #[test]
    fn who_disembarks_is_handed_out_and_the_flight_goes_on_without_him() {
        let flights = Flights::new(10);
        flights.join(1, 'a');
        flights.join(1, 'b');
        flights.join(2, 'a');
        assert_eq!(flights.disembark(|&waiter| waiter == 'a'), ['a', 'a']);
        assert_eq!(flights.waiting(), 1);
        assert_eq!(flights.join(2, 'c'), Join::Joined);
        assert_eq!(flights.land(1).as_slice(), ['b']);
        assert_eq!(flights.land(2).as_slice(), ['c']);
        assert_eq!((flights.waiting(), flights.under_way()), (0, 0));
    }

    #[test]
    fn a_flight_that_nobody_is_for_ends_and_the_next_one_under_its_key_is_another() {
        let flights = Flights::new(10);
        flights.join(1, 'a');
        assert_eq!(flights.land_unless(1, |waiters| waiters.first().copied()), Ok('a'));
        assert_eq!(flights.land_unless(1, |_| None::<()>), Err(smallvec!['a']));
        assert_eq!(flights.waiting(), 0);
        assert_eq!(flights.join(1, 'b'), Join::First);
        flights.disembark(|_| true);
        assert_eq!(flights.land_unless(1, |waiters| waiters.first().copied()), Err(smallvec![]));
        assert_eq!(flights.join(1, 'c'), Join::First);
    }

    #[test]
    fn whoever_joins_from_whatever_thread_is_handed_out_once() {
        let flights = Arc::new(Flights::new(usize::MAX));
        let threads: Vec<_> = (0..4)
            .map(|thread| {
                let flights = Arc::clone(&flights);
                std::thread::spawn(move || {
                    let mut landed = Vec::new();
                    for i in 0..10_000u32 {
                        if flights.join(u128::from(i % 3), (thread, i)) == Join::First {
                            std::thread::yield_now();
                            landed.extend(flights.land(u128::from(i % 3)));
                        }
                    }
                    landed
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
