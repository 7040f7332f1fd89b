//! Which entry of a full bucket has to go: a pure function on one 64-bit word.
//!
//! The *guarding* policy is S3-FIFO (Yang et al., "FIFO queues are all you need for cache eviction", SOSP
//! 2023) cut down to a bucket. A new entry stands on *probation*; the next new entry pushes it out, unless
//! it was hit meanwhile, in which case it is promoted to the *main* part. The main part is a clock: entries
//! that were hit are passed over, at the price of one hit each. The bucket remembers nine bits of each of
//! the last four keys that it evicted; one that returns while it is remembered goes to the main part at
//! once. So a scan, whose keys come once, only ever pushes out its own predecessors.
//!
//! What makes it good at popularity that lasts makes it slow where popularity moves on. There the
//! *following* policy is better: every entry is in the main part from the start, and its turn comes once
//! around the clock, whatever it was hit before. Which of the two a table uses is found out while it runs,
//! by [`crate::duel`].
//!
//! | bits               | what |
//! |--------------------|------|
//! | 0 – 20, 7 × 3      | each slot's state: 0 vacant; 2, 3 on probation, not hit and hit; 4 – 7 main, hit 0 – 3 times |
//! | 21 – 23            | the hand of the probation, so that it is a queue |
//! | 24 – 26            | the hand of the main part |
//! | 28 – 63, 4 × 9     | fingerprints of evicted keys, the newest lowest; 0 for none |

use crate::bucket::SLOTS;

/// How a full bucket chooses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Policy {
    /// Keeps what proved popular against what is new.
    Guard,
    /// Keeps what was used lately.
    Follow,
}

/// A bucket's occupancy and the state of its eviction. All bits zero is an empty bucket.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Meta(pub(crate) u64);

/// Bits from one slot's state to the next one's.
pub(crate) const STRIDE: usize = 3;
const STATE: u64 = 0b111;
const PROBATION: u64 = 2;
const MAIN: u64 = 4;
/// The bits of a state that count hits; when all are set, no more are counted.
const HITS: u64 = 0b11;

const PROBATION_HAND: usize = 21;
const MAIN_HAND: usize = 24;
const HAND: u64 = 0b111;

const GHOSTS: usize = 4;
const GHOST_BITS: usize = 9;
const GHOST: u64 = (1 << GHOST_BITS) - 1;
const GHOSTS_SHIFT: usize = 28;

const _: () = assert!(STRIDE * SLOTS <= PROBATION_HAND);
const _: () = assert!(SLOTS <= HAND as usize);
const _: () = assert!(GHOSTS_SHIFT + GHOSTS * GHOST_BITS == 64);

/// The lowest bit of each slot's state.
const LOWEST: u64 = {
    let mut bits = 0;
    let mut slot = 0;
    while slot < SLOTS {
        bits |= 1 << (STRIDE * slot);
        slot += 1;
    }
    bits
};

impl Meta {
    /// One bit for each slot that holds an entry, [`STRIDE`] apart.
    #[inline]
    pub(crate) const fn occupied(self) -> u64 {
        (self.0 | self.0 >> 1 | self.0 >> 2) & LOWEST
    }

    /// Whether `slot` holds an entry.
    #[inline]
    pub(crate) const fn holds(self, slot: usize) -> bool {
        self.state(slot) != 0
    }

    /// How many slots hold an entry.
    pub(crate) const fn entries(self) -> u32 {
        self.occupied().count_ones()
    }

    /// The word after a hit on an occupied `slot`, or `None` where nothing would change: a reader then
    /// writes nothing.
    #[inline]
    pub(crate) const fn hit(self, slot: usize) -> Option<Self> {
        if self.state(slot) & HITS == HITS {
            return None;
        }
        Some(Self(self.0 + (1 << (STRIDE * slot))))
    }

    /// A slot that holds nothing.
    #[inline]
    pub(crate) const fn vacant(self) -> Option<usize> {
        let vacant = !self.occupied() & LOWEST;
        if vacant == 0 { None } else { Some(vacant.trailing_zeros() as usize / STRIDE) }
    }

    /// Puts a new entry, the hash of whose key is `hash`, into `slot`.
    #[inline]
    pub(crate) fn fill(&mut self, slot: usize, hash: u64, policy: Policy) {
        let returned = self.forget(fingerprint(hash));
        let main = returned || policy == Policy::Follow;
        self.set_state(slot, if main { MAIN } else { PROBATION });
    }

    /// Empties `slot`, leaving nothing of its past.
    #[inline]
    pub(crate) fn empty(&mut self, slot: usize) {
        self.set_state(slot, 0);
    }

    /// Chooses the slot whose entry leaves a full bucket, and ages others as the choice demands. The caller
    /// says with [`Meta::remember`] whose it was, and fills it again.
    ///
    /// A hand stops at a slot at most four times, so this ends after some 28 steps at worst.
    pub(crate) fn victim(&mut self, policy: Policy) -> usize {
        debug_assert_eq!(self.occupied(), LOWEST);
        if policy == Policy::Follow {
            loop {
                let slot = self.advance(MAIN_HAND);
                let state = self.state(slot);
                // An unhit state is the same without its hits; a hit one loses them.
                let unhit = if state >= MAIN { MAIN } else { PROBATION };
                if state == unhit {
                    return slot;
                }
                self.set_state(slot, unhit);
            }
        }
        while self.any_on_probation() {
            let slot = self.advance(PROBATION_HAND);
            match self.state(slot) {
                PROBATION => return slot,
                MAIN.. => {}
                _ => self.set_state(slot, MAIN),
            }
        }
        loop {
            let slot = self.advance(MAIN_HAND);
            if self.state(slot) == MAIN {
                return slot;
            }
            self.set_state(slot, self.state(slot) - 1);
        }
    }

    /// Remembers the key of an evicted entry, whose hash is `hash`.
    #[inline]
    pub(crate) fn remember(&mut self, hash: u64) {
        self.set_ghosts((self.0 >> GHOSTS_SHIFT) << GHOST_BITS | fingerprint(hash));
    }

    /// How much the entry in an occupied `slot` is worth keeping, from 0 to [`Meta::HEAT_MAX`].
    #[inline]
    pub(crate) const fn heat(self, slot: usize) -> u8 {
        self.state(slot).saturating_sub(PROBATION) as u8
    }

    /// The highest heat.
    pub(crate) const HEAT_MAX: u8 = (STATE - PROBATION) as u8;

    /// Gives the entry in `slot` a heat that a snapshot kept.
    #[inline]
    pub(crate) fn set_heat(&mut self, slot: usize, heat: u8) {
        self.set_state(slot, PROBATION + u64::from(heat.min(Self::HEAT_MAX)));
    }

    /// What is wrong with the word, if anything.
    pub(crate) fn validate(self) -> Result<(), &'static str> {
        if (0..SLOTS).any(|slot| self.state(slot) == 1) {
            return Err("a slot is in a state that there is not");
        }
        for hand in [PROBATION_HAND, MAIN_HAND] {
            if (self.0 >> hand & HAND) as usize >= SLOTS {
                return Err("a hand points past the last slot");
            }
        }
        Ok(())
    }

    #[inline]
    const fn state(self, slot: usize) -> u64 {
        self.0 >> (STRIDE * slot) & STATE
    }

    #[inline]
    fn set_state(&mut self, slot: usize, state: u64) {
        let shift = STRIDE * slot;
        self.0 = self.0 & !(STATE << shift) | state << shift;
    }

    /// Whether any slot is in state 2 or 3: the middle bit without the high one.
    fn any_on_probation(self) -> bool {
        (self.0 >> 1 & !(self.0 >> 2)) & LOWEST != 0
    }

    /// The slot that a hand points to; the hand moves on.
    fn advance(&mut self, hand: usize) -> usize {
        // A word that only this module writes is in range already; the remainder keeps a wrong one so.
        let slot = (self.0 >> hand & HAND) as usize % SLOTS;
        let next = ((slot + 1) % SLOTS) as u64;
        self.0 = self.0 & !(HAND << hand) | next << hand;
        slot
    }

    fn set_ghosts(&mut self, ghosts: u64) {
        self.0 = self.0 & ((1 << GHOSTS_SHIFT) - 1) | ghosts << GHOSTS_SHIFT;
    }

    /// Whether `fingerprint` is remembered; if so it is no longer.
    #[inline]
    fn forget(&mut self, fingerprint: u64) -> bool {
        let ghosts = self.0 >> GHOSTS_SHIFT;
        for at in 0..GHOSTS {
            let shift = GHOST_BITS * at;
            if ghosts >> shift & GHOST == fingerprint {
                // Older ones close the gap.
                let newer = ghosts & ((1 << shift) - 1);
                let older = ghosts >> shift >> GHOST_BITS << shift;
                self.set_ghosts(newer | older);
                return true;
            }
        }
        false
    }
}

/// What is remembered of a hash: its lowest bits, since the bucket is chosen by the highest. Never 0.
#[inline]
fn fingerprint(hash: u64) -> u64 {
    (hash & GHOST).max(1)
}

#[cfg(test)]
#[cfg(not(loom))]
mod tests {
    use super::*;

    /// A full bucket of unhit entries with hashes 1 to 7.
    fn full(policy: Policy) -> Meta {
        let mut meta = Meta::default();
        for hash in 1..=SLOTS as u64 {
            let slot = meta.vacant().unwrap();
            meta.fill(slot, hash, policy);
        }
        assert_eq!(meta.vacant(), None);
        meta
    }

    fn replace(meta: &mut Meta, policy: Policy, old: u64, new: u64) -> usize {
        let slot = meta.victim(policy);
        meta.remember(old);
        meta.fill(slot, new, policy);
        meta.validate().unwrap();
        slot
    }

    #[test]
    fn guarded_newcomers_push_each_other_out_in_order() {
        let mut meta = full(Policy::Guard);
        let order: Vec<usize> =
            (0..14).map(|n| replace(&mut meta, Policy::Guard, 100 + n, 200 + n)).collect();
        assert_eq!(order, [0, 1, 2, 3, 4, 5, 6, 0, 1, 2, 3, 4, 5, 6]);
    }

    #[test]
    fn a_hit_on_probation_promotes_and_a_scan_then_passes_by() {
        let mut meta = full(Policy::Guard);
        for slot in 0..6 {
            meta = meta.hit(slot).unwrap();
        }
        for n in 0..100 {
            assert_eq!(replace(&mut meta, Policy::Guard, 100 + n, 300 + n), 6);
        }
        assert!((0..6).all(|slot| meta.heat(slot) >= 2));
    }

    #[test]
    fn a_key_that_returns_soon_goes_to_the_main_part() {
        let mut meta = full(Policy::Guard);
        assert_eq!(replace(&mut meta, Policy::Guard, 1, 50), 0);
        assert_eq!(meta.heat(0), 0);
        for newer in 0..3 {
            replace(&mut meta, Policy::Guard, 60 + newer, 70 + newer);
        }
        let slot = meta.victim(Policy::Guard);
        meta.fill(slot, 1, Policy::Guard);
        assert_eq!(meta.heat(slot), 2, "the fourth newest is remembered");
        meta.empty(slot);
        meta.fill(slot, 1, Policy::Guard);
        assert_eq!(meta.heat(slot), 0, "it is remembered once");
    }

    #[test]
    fn forgetting_one_ghost_keeps_the_others_in_order() {
        for forgotten in 0..4u64 {
            let mut meta = Meta::default();
            for hash in [10, 11, 12, 13] {
                meta.remember(hash);
            }
            assert!(meta.forget(10 + forgotten));
            assert!(!meta.forget(10 + forgotten));
            for kept in (10..14).filter(|&hash| hash != 10 + forgotten) {
                assert!(meta.forget(kept), "{kept} without {forgotten}");
            }
            assert_eq!(meta, Meta::default());
        }
    }

    #[test]
    fn following_takes_whatever_was_not_hit_since_the_last_round() {
        let mut meta = full(Policy::Follow);
        for slot in [0, 1, 4] {
            for _ in 0..3 {
                meta = meta.hit(slot).unwrap();
            }
            assert_eq!(meta.hit(slot), None, "hits are counted up to three");
        }
        let order: Vec<usize> =
            (0..7).map(|n| replace(&mut meta, Policy::Follow, 100 + n, 200 + n)).collect();
        assert_eq!(order, [2, 3, 5, 6, 0, 1, 2]);
    }

    #[test]
    fn either_policy_ends_whatever_the_word() {
        let mut word = 1u64;
        for _ in 0..if cfg!(miri) { 100 } else { 100_000 } {
            word = word.wrapping_mul(0xd134_2543_de82_ef95).wrapping_add(1);
            for policy in [Policy::Guard, Policy::Follow] {
                let mut meta = Meta(word);
                for slot in 0..SLOTS {
                    if meta.state(slot) < PROBATION {
                        meta.set_state(slot, PROBATION);
                    }
                }
                assert!(meta.victim(policy) < SLOTS);
                assert!(meta.validate().is_ok() || Meta(word).validate().is_err());
            }
        }
    }
}
