//! Which eviction policy suits the requests: found out by letting them work against each other.
//!
//! This is *set dueling* (Qureshi et al., "Adaptive insertion policies for high performance
//! caching", ISCA 2007), which processors do with their caches. A few buckets always use the one
//! policy, as many the other, whatever the rest does. Keys are spread evenly, so the policy whose
//! buckets evict less often would miss less often everywhere, and the rest uses it. Only evictions
//! are counted, so lookups know nothing of this.
//!
//! There are two contests. In the first one guarding stands against the others: while it leads
//! against lending, which wherever guarding is wrong is clearly better, so that this is soon
//! noticed; and against the leader of the second contest when it does not lead. The second,
//! following against weighing, is held only then. Samples that use another policy than the rest
//! cost hits, so they are few; the side that leads has four times as many, which cost nothing, so
//! that chance comes into the comparison from one side only.

use crate::eviction::{Policy, SLOTS};
use std::sync::atomic::{AtomicBool, AtomicI64, Ordering};

/// Among so many buckets, at most, one is a sample of the policy that does not lead, in the first
/// contest.
const FIRST_EVERY_MIN: usize = 48;

/// The second contest, which is held where a wrong choice costs less, has so many times as many
/// samples.
const SECOND_SHARE: usize = 2;

/// The samples of a side are so many times the root of the number of buckets, if that many may be:
/// the larger the table, the less they cost and the surer they are.
const SAMPLES_PER_ROOT: usize = 2;

/// How many times as many samples the leader has.
const LEADER: usize = 4;

/// Below so many buckets there are too few samples to say anything, and all buckets guard.
const BUCKETS_MIN: usize = 16 * FIRST_EVERY_MIN;

/// What an eviction counts in a sample of the side that does not lead.
const UNIT: i64 = 1 << 10;

/// The other side has to evict less by one part in so many before that speaks for it.
const MARGIN: i64 = 32;

/// What it counts in one of the leader's samples, which are more.
const LEADERS_UNIT: i64 = (UNIT - UNIT / MARGIN) / LEADER as i64;

/// By how many evictions beyond the margin the leader has to be worse, at least, to lose the lead.
/// This is for the luck of which keys the samples get.
const LEAD_MIN: u64 = 40;

/// More has to come for chance: the root of so many times the evictions of one turnover of the
/// samples. While a scan passes, both sides evict the same but for chance, whose deviation in one
/// turnover is the root of 1.25 times them.
const LEAD_TURNOVER: u64 = 2;

/// The state of both contests.
pub(crate) struct Duel {
    /// Guarding against the others.
    first: Contest,
    /// Following against weighing.
    second: Contest,
}

impl Duel {
    /// Contests in a table of so many buckets. Guarding leads until the contrary is shown, and
    /// following before weighing.
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
            // The second's sides differ less, and taking the wrong one matters less.
            [lead(first_every), lead(second_every) / 2]
        };
        let turnover = first.len() as u64 * slots(first_every);
        Self {
            first: Contest::new(first_every, first, first_lead, turnover),
            // The table is full when it begins.
            second: Contest::new(second_every, [2, 3, 4, 5, 6], second_lead, 0),
        }
    }

    /// The policy that the bucket with this index has to use now.
    #[inline]
    pub(crate) fn policy(&self, index: usize) -> Policy {
        if !self.first.challenger_has(index) {
            Policy::Guard
        } else if !self.first.challenger_leads() {
            Policy::Lend
        } else if self.second.challenger_has(index) {
            Policy::Weigh
        } else {
            Policy::Follow
        }
    }

    /// Takes note of an eviction in the bucket with this index.
    #[inline]
    pub(crate) fn evicted(&self, index: usize) {
        self.first.evicted(index);
        if self.first.challenger_leads() {
            self.second.evicted(index);
        }
    }
}

/// A contest between a policy and its challenger: Page's cumulative sum ("Continuous inspection
/// schemes", Biometrika 1954). What the leader evicts is added, what the other side evicts is
/// subtracted, and a sum below zero is zero, so nothing that spoke for the leader in the past
/// delays its end when requests change.
#[repr(align(128))]
struct Contest {
    /// Whether the challenger leads. Seldom written, and read with every eviction, so it
    /// stays away from the sum.
    challenger_leads: AtomicBool,
    /// Samples are told by the remainder of their index by this.
    every: usize,
    /// The remainders: of the first side's sample, of the challenger's, and of the leader's
    /// further ones.
    samples: [usize; 5],
    /// The sum at which the sides change places. 0 where there is no contest.
    limit: i64,
    score: Score,
}

#[repr(align(128))]
struct Score {
    sum: AtomicI64,
    /// Evictions that do not count yet: one turnover of the samples. While a table fills,
    /// evictions are those of the buckets that filled first, and say more of luck than of
    /// policies.
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

    /// Whether the bucket with this index does as the challenger does.
    #[inline]
    fn challenger_has(&self, index: usize) -> bool {
        let leads = self.challenger_leads();
        leads != (self.limit != 0 && index % self.every == self.other(leads))
    }

    /// The remainder that tells the samples of the side that does not lead.
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
        // If another thread was quicker, this has been done, or will be with the next eviction.
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
    /// Samples of the sides, and a bucket that is none.
    const GUARD: usize = 48;
    const CHALLENGER: usize = 49;
    const FOLLOW: usize = 50;
    const WEIGH: usize = 51;
    const OTHER: usize = 58;
    const QUARTER: usize = 12;

    #[test]
    #[cfg_attr(miri, ignore = "a matter of large numbers")]
    fn samples_keep_to_their_policy_and_the_others_take_the_best_one() {
        let duel = Duel::new(BUCKETS);
        let [guard, lend, weigh, follow] =
            [Policy::Guard, Policy::Lend, Policy::Weigh, Policy::Follow];
        let policies = || [GUARD, CHALLENGER, FOLLOW, WEIGH, OTHER].map(|index| duel.policy(index));
        assert_eq!(policies(), [guard, lend, guard, guard, guard]);
        // What each policy evicts, and what comes of it.
        for (of_guard, of_follow, of_weigh, expected) in [
            (10, 8, 9, [guard, follow, follow, weigh, follow]),
            (10, 8, 6, [guard, weigh, follow, weigh, weigh]),
            (10, 6, 8, [guard, follow, follow, weigh, follow]),
            (5, 8, 10, [guard, lend, guard, guard, guard]),
        ] {
            for round in 0..20_000 {
                for index in 48..96 {
                    let share = match duel.policy(index) {
                        Policy::Guard => of_guard,
                        Policy::Follow => of_follow,
                        Policy::Weigh => of_weigh,
                        Policy::Lend => of_weigh.max(of_follow),
                    };
                    if round % 10 < share {
                        duel.evicted(index);
                    }
                }
            }
            assert_eq!(policies(), expected, "{of_guard} {of_follow} {of_weigh}");
        }
    }

    /// Evictions of the leader in the first contest, and of lending but for one in `saved`.
    fn rounds(duel: &Duel, rounds: usize, saved: usize) {
        for round in 0..rounds {
            for quarter in 0..4 {
                duel.evicted(GUARD + quarter * QUARTER);
            }
            if round % saved != 0 {
                duel.evicted(CHALLENGER);
            }
        }
    }

    /// Duels in a table that has been full for a while.
    fn full() -> Duel {
        let duel = Duel::new(BUCKETS);
        rounds(&duel, BUCKETS / FIRST_EVERY_MIN * SLOTS + 1, usize::MAX);
        duel
    }

    #[test]
    fn what_is_evicted_while_a_table_fills_does_not_count() {
        let duel = Duel::new(BUCKETS);
        for _ in 0..4000 {
            duel.evicted(GUARD);
        }
        assert_eq!(duel.policy(OTHER), Policy::Guard);
        for _ in 0..400 {
            duel.evicted(GUARD);
        }
        assert_ne!(duel.policy(OTHER), Policy::Guard);
    }

    #[test]
    #[cfg_attr(miri, ignore = "a matter of large numbers")]
    fn a_small_difference_changes_nothing() {
        // 2 % less where the challenger is; and 10 %, but of few.
        for (count, saved) in [(100_000, 50), (700, 10)] {
            let duel = full();
            rounds(&duel, count, saved);
            assert_eq!(duel.policy(OTHER), Policy::Guard);
        }
    }

    #[test]
    #[cfg_attr(miri, ignore = "a matter of large numbers")]
    fn a_long_past_does_not_delay_a_change() {
        let duel = Duel::new(BUCKETS);
        // Lending saves nothing for long, then one in four.
        rounds(&duel, 100_000, usize::MAX);
        rounds(&duel, 600, 4);
        assert_ne!(duel.policy(OTHER), Policy::Guard);
    }

    #[test]
    fn a_few_clustered_evictions_change_nothing() {
        let duel = full();
        for _ in 0..300 {
            duel.evicted(GUARD);
        }
        assert_eq!(duel.policy(OTHER), Policy::Guard);
    }

    #[test]
    fn larger_tables_have_relatively_fewer_samples() {
        let every = [BUCKETS_MIN, 12_500, 1_250_000].map(|buckets| Duel::new(buckets).first.every);
        assert_eq!(every, [48, 56, 558]);
        // The extra samples of the first contest's leader are none of those that use another
        // policy.
        for buckets in [BUCKETS_MIN, 12_500, 30_000, 1_250_000] {
            let duel = Duel::new(buckets);
            let [_, _, extra @ ..] = duel.first.samples;
            assert!(extra.iter().all(|sample| ![2, 3].contains(&(sample % duel.second.every))));
        }
    }

    #[test]
    #[cfg_attr(miri, ignore = "a matter of large numbers")]
    fn a_small_table_guards_everywhere() {
        let duel = Duel::new(BUCKETS_MIN - 1);
        for _ in 0..100_000 {
            duel.evicted(0);
        }
        assert_eq!([0, 1, 2, 3, 4].map(|index| duel.policy(index)), [Policy::Guard; 5]);
    }
}
