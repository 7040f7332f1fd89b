//! Which eviction policy suits the requests: found out by letting them work against each other.
//!
//! This is *set dueling* (Qureshi et al., "Adaptive insertion policies for high performance caching", ISCA
//! 2007), which processors do with their caches. A few buckets always use the one policy, as many the other, whatever
//! the rest does. Keys are spread evenly, so the policy whose buckets evict less often
//! would miss less often everywhere, and the rest uses it. Only evictions are counted, so lookups
//! know nothing of this.
//!
//! There are two contests. In the first one guarding stands against the others: against weighing, the nearer one, whose
//! samples cost less, while guarding leads, and against the leader of the second contest when it does not. The second,
//! following against weighing, is held only then. Samples that
//! use another policy than the rest cost hits, so they are few; the side that leads has four times as many, which cost
//! nothing, so that chance comes into the comparison from one side only.

use crate::eviction::{Policy, SLOTS};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

/// Among so many buckets one is a sample of the policy that does not lead, in the first contest.
const FIRST_EVERY: usize = 48;
const _: () = assert!(FIRST_EVERY.is_multiple_of(SECOND_EVERY));
/// The same for the second one, which is held where a wrong choice costs less, and whose sides differ less.
const SECOND_EVERY: usize = 16;

/// How many times as many samples the leader has.
const LEADER: u64 = 4;

/// Below so many buckets there are too few samples to say anything, and all buckets guard.
const BUCKETS_MIN: usize = 16 * FIRST_EVERY;

/// The other side has to evict less by one part in so many before it is taken.
const MARGIN: u64 = 32;

/// And by so much that its square is so many variances: 3.5 standard deviations. The sides are compared after each
/// eviction, so chance has many a try: with 3 the table followed by mistake in two of thirty traces.
const VARIANCES: u64 = 12;

/// How many times as many evictions are counted as the samples of the side that does not lead have slots, before
/// half of them are forgotten.
const MEMORY: u64 = 4;

/// The state of both contests.
pub(crate) struct Duel {
    /// Guarding against the others.
    first: Contest,
    /// Following against weighing.
    second: Contest,
}

impl Duel {
    /// Contests in a table of so many buckets. Guarding leads until the contrary is shown, and following before
    /// weighing.
    pub(crate) fn new(buckets: usize) -> Self {
        let quarter = FIRST_EVERY / LEADER as usize;
        let first = [0, 1, quarter, 2 * quarter, 3 * quarter];
        let second = [2, 3, 4, 5, 6];
        let round = |every: usize| {
            if buckets < BUCKETS_MIN { 0 } else { (buckets / every) as u64 * SLOTS as u64 }
        };
        Self {
            first: Contest::new(FIRST_EVERY, first, round(FIRST_EVERY)),
            second: Contest::new(SECOND_EVERY, second, round(SECOND_EVERY)),
        }
    }

    /// The policy that the bucket with this index has to use now.
    #[inline]
    pub(crate) fn policy(&self, index: usize) -> Policy {
        if !self.first.challenger_has(index) {
            Policy::Guard
        } else if !self.first.challenger_leads() || self.second.challenger_has(index) {
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

/// A contest between a policy and its challenger.
#[repr(align(128))]
struct Contest {
    /// Whether the challenger leads. Seldom written, and read with every eviction, so it
    /// stays away from the counts.
    challenger_leads: AtomicBool,
    /// Samples are told by the remainder of their index by this.
    every: usize,
    /// The remainders: of the first side's sample, of the challenger's, and of the leader's further ones.
    samples: [usize; 5],
    /// Slots of the samples of the side that does not lead. 0 where there is no contest.
    round: u64,
    counts: Counts,
}

#[repr(align(128))]
struct Counts {
    /// Evictions in the samples of the side that leads (low half) and of the other (high half).
    evictions: AtomicU64,
}

impl Contest {
    fn new(every: usize, samples: [usize; 5], round: u64) -> Self {
        Self {
            challenger_leads: AtomicBool::new(false),
            every,
            samples,
            // The cap keeps each half far from overflowing into the other.
            round: round.min((1 << 30) / (MEMORY * LEADER)),
            counts: Counts { evictions: AtomicU64::new(0) },
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
        leads != (self.round != 0 && index % self.every == self.other(leads))
    }

    /// The remainder that tells the samples of the side that does not lead.
    #[inline]
    fn other(&self, challenger_leads: bool) -> usize {
        self.samples[usize::from(!challenger_leads)]
    }

    fn evicted(&self, index: usize) {
        if self.round == 0 {
            return;
        }
        let sample = index % self.every;
        let leads = self.challenger_leads();
        let one = if sample == self.other(leads) {
            1 << 32
        } else if self.samples.contains(&sample) {
            1
        } else {
            return;
        };
        let counts = self.counts.evictions.fetch_add(one, Ordering::Relaxed) + one;
        let (leader, other) = (counts & 0xffff_ffff, counts >> 32);
        let counted = other + leader / LEADER;
        // Evictions come in clusters while a table fills, so early counts say less than their number.
        let turns = counted >= self.round / 2 && is_clearly_less(other, leader);
        // Half of the past stays when there is too much of it; none when the sides change places.
        let kept = if turns {
            0
        } else if counted >= MEMORY * self.round {
            (leader / 2) | ((other / 2) << 32)
        } else {
            return;
        };
        // If another thread was quicker, this has been done, or will be with the next eviction.
        let ended = self.counts.evictions.compare_exchange(
            counts,
            kept,
            Ordering::Relaxed,
            Ordering::Relaxed,
        );
        if turns && ended.is_ok() {
            self.challenger_leads.store(!leads, Ordering::Relaxed);
        }
    }
}

/// Whether the evictions of the side that does not lead are fewer by what matters and is more than chance.
/// The variance of a count is the count.
fn is_clearly_less(other: u64, leader: u64) -> bool {
    let share = leader / LEADER;
    let less = share.saturating_sub(other);
    less > share / MARGIN && less * less > VARIANCES * (share / LEADER + other)
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

    #[test]
    #[cfg_attr(miri, ignore = "a matter of large numbers")]
    fn samples_keep_to_their_policy_and_the_others_take_the_best_one() {
        let duel = Duel::new(BUCKETS);
        let [guard, weigh, follow] = [Policy::Guard, Policy::Weigh, Policy::Follow];
        let policies = || [GUARD, CHALLENGER, FOLLOW, WEIGH, OTHER].map(|index| duel.policy(index));
        assert_eq!(policies(), [guard, weigh, guard, guard, guard]);
        // What each policy evicts, and what comes of it.
        for (of_guard, of_follow, of_weigh, expected) in [
            (10, 8, 9, [guard, follow, follow, weigh, follow]),
            (10, 8, 6, [guard, weigh, follow, weigh, weigh]),
            (10, 6, 8, [guard, follow, follow, weigh, follow]),
            (5, 8, 10, [guard, weigh, guard, guard, guard]),
        ] {
            for round in 0..20_000 {
                for index in 48..96 {
                    let share = match duel.policy(index) {
                        Policy::Guard => of_guard,
                        Policy::Follow => of_follow,
                        Policy::Weigh => of_weigh,
                    };
                    if round % 10 < share {
                        duel.evicted(index);
                    }
                }
            }
            assert_eq!(policies(), expected, "{of_guard} {of_follow} {of_weigh}");
        }
    }

    #[test]
    #[cfg_attr(miri, ignore = "a matter of large numbers")]
    fn a_small_difference_changes_nothing() {
        // 2 % less where the challenger is; and 10 %, but of few.
        for (rounds, every) in [(100_000, 50), (450, 10)] {
            let duel = Duel::new(BUCKETS);
            for round in 0..rounds {
                for index in [GUARD, GUARD + 12, GUARD + 24, GUARD + 36] {
                    duel.evicted(index);
                }
                if round % every != 0 {
                    duel.evicted(CHALLENGER);
                }
            }
            assert_eq!(duel.policy(OTHER), Policy::Guard);
        }
    }

    #[test]
    fn a_few_clustered_evictions_change_nothing() {
        let duel = Duel::new(BUCKETS);
        for _ in 0..1000 {
            duel.evicted(GUARD);
        }
        assert_eq!(duel.policy(OTHER), Policy::Guard);
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
