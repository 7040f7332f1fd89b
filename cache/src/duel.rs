//! The choice of the eviction policy at run time, by set dueling.
//!
//! *Set dueling* (Qureshi et al., "Adaptive insertion policies for high performance caching", ISCA
//! 2007) is known from processor caches. A few sample buckets always use one policy, a few others
//! always another, and all other buckets use the better of the two. Keys are spread evenly, so the
//! policy whose samples evict less often would miss less often everywhere. Only evictions are
//! counted, so lookups pay nothing.
//!
//! There are two contests. In the first, S3-FIFO competes with Clock1 while S3-FIFO leads: Clock1
//! is clearly better wherever S3-FIFO is bad, so a change is noticed soon. When S3-FIFO does not
//! lead, it competes with the leader of the second contest, Clock3 against Clock0, which runs only
//! then. Samples whose policy is not that of the other buckets cost hits, so they are few. The
//! leader has four times as many samples, which cost nothing; so chance affects mainly one side of
//! the comparison.

use crate::eviction::Policy;
use crate::layout::SLOTS;
use std::sync::atomic::{AtomicBool, AtomicI64, Ordering};

/// In the first contest, the least number of buckets per sample of the policy that does not lead.
const FIRST_EVERY_MIN: usize = 48;

/// The samples of the second contest, as a multiple of those of the first. A wrong choice costs
/// less there.
const SECOND_SHARE: usize = 2;

/// The samples of a side, as a multiple of the square root of the number of buckets, up to the
/// limit above. In a larger table they cost relatively less and are more reliable.
const SAMPLES_PER_ROOT: usize = 2;

/// The samples of the leader, as a multiple of those of the other side.
const LEADER: usize = 4;

/// In a table with fewer buckets there are too few samples, and all buckets use S3-FIFO.
const BUCKETS_MIN: usize = 16 * FIRST_EVERY_MIN;

/// The weight of an eviction in a sample of the side that does not lead.
const UNIT: i64 = 1 << 10;

/// The other side must evict less than the leader by one part in this many.
const MARGIN: i64 = 32;

/// The weight of an eviction in one of the leader's samples, which are more.
const LEADERS_UNIT: i64 = (UNIT - UNIT / MARGIN) / LEADER as i64;

/// The least number of evictions beyond the margin by which the leader loses the lead. It accounts
/// for the chance of which keys the samples get.
const LEAD_MIN: u64 = 40;

/// Further evictions that account for chance: the square root of this multiple of the evictions in
/// one turnover of the samples. During a scan both sides evict the same except for chance, whose
/// deviation in one turnover is the square root of 1.25 times these evictions.
const LEAD_TURNOVER: u64 = 2;

/// The state of both contests.
pub(crate) struct Duel {
    /// S3-FIFO against the clocks.
    first: Contest,
    /// Clock3 against Clock0.
    second: Contest,
}

impl Duel {
    /// Contests in a table with this many buckets. At first S3-FIFO leads, and Clock3 before
    /// Clock0.
    pub(crate) fn new(buckets: usize) -> Self {
        let samples = SAMPLES_PER_ROOT * buckets.isqrt();
        let second_every = (buckets / samples.max(1)).max(FIRST_EVERY_MIN) / SECOND_SHARE;
        let first_every = second_every * SECOND_SHARE;
        let quarter = first_every / LEADER;
        let first = [0, 1, quarter, 2 * quarter, 3 * quarter];
        let slots = |every| (SLOTS * (buckets / every)) as u64;
        let lead = |every| LEAD_MIN + (LEAD_TURNOVER * slots(every)).isqrt();
        let [first_lead, second_lead] = if buckets < BUCKETS_MIN {
            [0; 2]
        } else {
            // The sides of the second differ less, and a wrong choice matters less.
            [lead(first_every), lead(second_every) / 2]
        };
        let turnover = first.len() as u64 * slots(first_every);
        Self {
            first: Contest::new(first_every, first, first_lead, turnover),
            // The table is full when this contest begins.
            second: Contest::new(second_every, [2, 3, 4, 5, 6], second_lead, 0),
        }
    }

    /// The current policy of the bucket with this index.
    #[inline]
    pub(crate) fn policy(&self, index: usize) -> Policy {
        if !self.first.challenger_has(index) {
            Policy::S3Fifo
        } else if !self.first.challenger_leads() {
            Policy::Clock1
        } else if self.second.challenger_has(index) {
            Policy::Clock0
        } else {
            Policy::Clock3
        }
    }

    /// Counts an eviction in the bucket with this index.
    #[inline]
    pub(crate) fn evicted(&self, index: usize) {
        self.first.evicted(index);
        if self.first.challenger_leads() {
            self.second.evicted(index);
        }
    }
}

/// A contest between a policy and its challenger: Page's cumulative sum ("Continuous inspection
/// schemes", Biometrika 1954). Evictions of the leader are added, those of the other side are
/// subtracted, and a sum below zero becomes zero. So past successes of the leader do not delay a
/// change when the requests change.
#[repr(align(128))]
struct Contest {
    /// Whether the challenger leads. Rarely written and read with every eviction, so it is on
    /// another cache line than the sum.
    challenger_leads: AtomicBool,
    /// A sample is recognised by the remainder of its index by this number.
    every: usize,
    /// The remainders of the first side's sample, of the challenger's, and of the leader's
    /// additional samples.
    samples: [usize; 5],
    /// The sum at which the lead changes. 0 if there is no contest.
    limit: i64,
    score: Score,
}

#[repr(align(128))]
struct Score {
    sum: AtomicI64,
    /// Evictions that do not count yet: one turnover of the samples. While a table fills, only the
    /// buckets that filled first evict, which depends more on chance than on policies.
    ignored: AtomicI64,
}

impl Contest {
    fn new(every: usize, samples: [usize; 5], lead: u64, ignored: u64) -> Self {
        Self {
            challenger_leads: AtomicBool::new(false),
            every,
            samples,
            limit: lead as i64 * UNIT,
            score: Score { sum: AtomicI64::new(0), ignored: AtomicI64::new(ignored as i64) },
        }
    }

    #[inline]
    fn challenger_leads(&self) -> bool {
        self.challenger_leads.load(Ordering::Relaxed)
    }

    /// Whether the bucket with this index uses the challenger's policy.
    #[inline]
    fn challenger_has(&self, index: usize) -> bool {
        let leads = self.challenger_leads();
        leads != (self.limit != 0 && index % self.every == self.other(leads))
    }

    /// The remainder of the samples of the side that does not lead.
    #[inline]
    fn other(&self, challenger_leads: bool) -> usize {
        self.samples[usize::from(!challenger_leads)]
    }

    fn evicted(&self, index: usize) {
        if self.limit == 0 {
            return;
        }
        let sample = index % self.every;
        let leads = self.challenger_leads();
        let step = if sample == self.other(leads) {
            -UNIT
        } else if self.samples.contains(&sample) {
            LEADERS_UNIT
        } else {
            return;
        };
        let Score { sum, ignored } = &self.score;
        if ignored.load(Ordering::Relaxed) > 0 {
            ignored.fetch_sub(1, Ordering::Relaxed);
            return;
        }
        let new = sum.fetch_add(step, Ordering::Relaxed) + step;
        let turns = new > self.limit;
        if new >= 0 && !turns {
            return;
        }
        // If another thread was faster, it has done this, or the next eviction will.
        let ended = sum.compare_exchange(new, 0, Ordering::Relaxed, Ordering::Relaxed);
        if turns && ended.is_ok() {
            self.challenger_leads.store(!leads, Ordering::Relaxed);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BUCKETS: usize = 4800;
    /// Samples of the sides, and a bucket that is not a sample.
    const S3FIFO: usize = 48;
    const CHALLENGER: usize = 49;
    const CLOCK3: usize = 50;
    const CLOCK0: usize = 51;
    const OTHER: usize = 58;
    const QUARTER: usize = 12;

    #[test]
    #[cfg_attr(miri, ignore = "needs large numbers")]
    fn samples_keep_their_policy_and_the_others_take_the_best() {
        let duel = Duel::new(BUCKETS);
        let [s3fifo, clock1, clock0, clock3] =
            [Policy::S3Fifo, Policy::Clock1, Policy::Clock0, Policy::Clock3];
        let policies =
            || [S3FIFO, CHALLENGER, CLOCK3, CLOCK0, OTHER].map(|index| duel.policy(index));
        assert_eq!(policies(), [s3fifo, clock1, s3fifo, s3fifo, s3fifo]);
        // Evictions of each policy out of ten, and the policies that follow from them.
        for (of_s3fifo, of_clock3, of_clock0, expected) in [
            (10, 8, 9, [s3fifo, clock3, clock3, clock0, clock3]),
            (10, 8, 6, [s3fifo, clock0, clock3, clock0, clock0]),
            (10, 6, 8, [s3fifo, clock3, clock3, clock0, clock3]),
            (5, 8, 10, [s3fifo, clock1, s3fifo, s3fifo, s3fifo]),
        ] {
            for round in 0..20_000 {
                for index in 48..96 {
                    let share = match duel.policy(index) {
                        Policy::S3Fifo => of_s3fifo,
                        Policy::Clock3 => of_clock3,
                        Policy::Clock0 => of_clock0,
                        Policy::Clock1 => of_clock0.max(of_clock3),
                    };
                    if round % 10 < share {
                        duel.evicted(index);
                    }
                }
            }
            assert_eq!(policies(), expected, "{of_s3fifo} {of_clock3} {of_clock0}");
        }
    }

    /// Evictions of the first contest's leader, and as many of Clock1 except one in `saved`.
    fn rounds(duel: &Duel, rounds: usize, saved: usize) {
        for round in 0..rounds {
            for quarter in 0..4 {
                duel.evicted(S3FIFO + quarter * QUARTER);
            }
            if round % saved != 0 {
                duel.evicted(CHALLENGER);
            }
        }
    }

    /// The contests in a table that has been full for a while.
    fn full() -> Duel {
        let duel = Duel::new(BUCKETS);
        rounds(&duel, BUCKETS / FIRST_EVERY_MIN * SLOTS + 1, usize::MAX);
        duel
    }

    #[test]
    fn evictions_do_not_count_while_a_table_fills() {
        let duel = Duel::new(BUCKETS);
        for _ in 0..4000 {
            duel.evicted(S3FIFO);
        }
        assert_eq!(duel.policy(OTHER), Policy::S3Fifo);
        for _ in 0..400 {
            duel.evicted(S3FIFO);
        }
        assert_ne!(duel.policy(OTHER), Policy::S3Fifo);
    }

    #[test]
    #[cfg_attr(miri, ignore = "needs large numbers")]
    fn a_small_difference_changes_nothing() {
        // The challenger evicts 2 % less; or 10 % less, but of few evictions.
        for (count, saved) in [(100_000, 50), (700, 10)] {
            let duel = full();
            rounds(&duel, count, saved);
            assert_eq!(duel.policy(OTHER), Policy::S3Fifo);
        }
    }

    #[test]
    #[cfg_attr(miri, ignore = "needs large numbers")]
    fn a_long_lead_does_not_delay_a_change() {
        let duel = Duel::new(BUCKETS);
        // Clock1 saves nothing for a long time, then one eviction in four.
        rounds(&duel, 100_000, usize::MAX);
        rounds(&duel, 600, 4);
        assert_ne!(duel.policy(OTHER), Policy::S3Fifo);
    }

    #[test]
    fn a_few_clustered_evictions_change_nothing() {
        let duel = full();
        for _ in 0..300 {
            duel.evicted(S3FIFO);
        }
        assert_eq!(duel.policy(OTHER), Policy::S3Fifo);
    }

    #[test]
    fn larger_tables_have_relatively_fewer_samples() {
        let every = [BUCKETS_MIN, 12_500, 1_250_000].map(|buckets| Duel::new(buckets).first.every);
        assert_eq!(every, [48, 56, 558]);
        // No additional sample of the first contest's leader uses another policy.
        for buckets in [BUCKETS_MIN, 12_500, 30_000, 1_250_000] {
            let duel = Duel::new(buckets);
            let [_, _, extra @ ..] = duel.first.samples;
            assert!(extra.iter().all(|sample| ![2, 3].contains(&(sample % duel.second.every))));
        }
    }

    #[test]
    #[cfg_attr(miri, ignore = "needs large numbers")]
    fn a_small_table_uses_s3fifo_everywhere() {
        let duel = Duel::new(BUCKETS_MIN - 1);
        for _ in 0..100_000 {
            duel.evicted(0);
        }
        assert_eq!([0, 1, 2, 3, 4].map(|index| duel.policy(index)), [Policy::S3Fifo; 5]);
    }
}
