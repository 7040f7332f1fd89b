//! Which eviction policy suits the requests: found out by letting both work.
//!
//! This is *set dueling* (Qureshi et al., "Adaptive insertion policies for high performance caching", ISCA
//! 2007), which processors do with their caches. One bucket in 32 always guards and one in 32 always
//! follows, whatever the others do. Keys are spread evenly, so the policy whose buckets evict less often
//! would miss less often everywhere, and the other buckets use it. Only evictions are counted, so lookups
//! know nothing of this.

use crate::bucket::SLOTS;
use crate::eviction::Policy;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

/// Among so many buckets one guards and one follows.
const SAMPLE_EVERY: usize = 32;

/// Below so many buckets there are too few samples to say anything, and all buckets guard.
const BUCKETS_MIN: usize = 16 * SAMPLE_EVERY;

/// The other policy has to evict less by one part in so many before it is taken: samples differ by chance.
const MARGIN: u64 = 32;

/// The state of the contest.
#[repr(align(128))]
pub(crate) struct Duel {
    /// Whether buckets that are no samples follow. Seldom written, and read with every eviction, so it
    /// stays away from the counts.
    follow: AtomicBool,
    /// Evictions that end a round: as many as the samples have slots. 0 where there is no contest.
    round: u64,
    counts: Counts,
}

#[repr(align(128))]
struct Counts {
    /// Evictions in samples that guard (low half) and that follow (high half).
    evictions: AtomicU64,
}

impl Duel {
    /// A contest in a table of so many buckets. Guarding leads until the contrary is shown.
    pub(crate) fn new(buckets: usize) -> Self {
        let samples = 2 * (buckets / SAMPLE_EVERY) as u64;
        let round = if buckets < BUCKETS_MIN { 0 } else { samples * SLOTS as u64 };
        Self {
            follow: AtomicBool::new(false),
            // The cap keeps each half far from overflowing into the other.
            round: round.min(1 << 30),
            counts: Counts { evictions: AtomicU64::new(0) },
        }
    }

    /// The policy that the bucket with this index has to use now.
    #[inline]
    pub(crate) fn policy(&self, index: usize) -> Policy {
        match Self::sample(index) {
            Some(policy) if self.round != 0 => policy,
            _ if self.follow.load(Ordering::Relaxed) => Policy::Follow,
            _ => Policy::Guard,
        }
    }

    /// Takes note of an eviction in the bucket with this index.
    #[inline]
    pub(crate) fn evicted(&self, index: usize) {
        if self.round != 0
            && let Some(policy) = Self::sample(index)
        {
            self.count(policy);
        }
    }

    #[inline]
    fn sample(index: usize) -> Option<Policy> {
        match index % SAMPLE_EVERY {
            0 => Some(Policy::Guard),
            1 => Some(Policy::Follow),
            _ => None,
        }
    }

    fn count(&self, policy: Policy) {
        let one = if policy == Policy::Guard { 1 } else { 1 << 32 };
        let counts = self.counts.evictions.fetch_add(one, Ordering::Relaxed) + one;
        let (guard, follow) = (counts & 0xffff_ffff, counts >> 32);
        if guard + follow < self.round {
            return;
        }
        // Half of the past stays. If another thread was quicker, it ends the round, or the next one does.
        let halved = (guard / 2) | ((follow / 2) << 32);
        let ended = self.counts.evictions.compare_exchange(
            counts,
            halved,
            Ordering::Relaxed,
            Ordering::Relaxed,
        );
        if ended.is_err() {
            return;
        }
        let follows = self.follow.load(Ordering::Relaxed);
        let (current, other) = if follows { (follow, guard) } else { (guard, follow) };
        if other + current / MARGIN < current {
            self.follow.store(!follows, Ordering::Relaxed);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BUCKETS: usize = 3200;

    fn evictions(duel: &Duel, index: usize, times: usize) {
        for _ in 0..times {
            duel.evicted(index);
        }
    }

    #[test]
    fn samples_keep_to_their_policy_and_the_others_take_the_better_one() {
        let duel = Duel::new(BUCKETS);
        assert_eq!(duel.policy(2), Policy::Guard);
        for _ in 0..3 {
            evictions(&duel, 32, 1000);
            evictions(&duel, 33, 500);
        }
        assert_eq!(duel.policy(2), Policy::Follow);
        assert_eq!([duel.policy(64), duel.policy(65)], [Policy::Guard, Policy::Follow]);
        for _ in 0..6 {
            evictions(&duel, 32, 500);
            evictions(&duel, 33, 1000);
        }
        assert_eq!(duel.policy(2), Policy::Guard);
    }

    #[test]
    fn a_small_difference_changes_nothing() {
        let duel = Duel::new(BUCKETS);
        // 2 % more where buckets guard.
        for n in 0..100_000 {
            evictions(&duel, 0, if n % 50 == 0 { 2 } else { 1 });
            evictions(&duel, 1, 1);
        }
        assert_eq!(duel.policy(2), Policy::Guard);
    }

    #[test]
    fn a_small_table_guards_everywhere() {
        let duel = Duel::new(BUCKETS_MIN - 1);
        evictions(&duel, 0, 100_000);
        assert_eq!([0, 1, 2].map(|index| duel.policy(index)), [Policy::Guard; 3]);
    }
}
