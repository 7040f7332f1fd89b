//! Which entry of a full bucket has to go: a pure function on one 64-bit word.
//!
//! The *guarding* policy is S3-FIFO (Yang et al., "FIFO queues are all you need for cache
//! eviction", SOSP 2023) cut down to a bucket. A new entry stands on *probation*; the next new
//! entry pushes it out, unless it was hit meanwhile, in which case it is promoted to the *main*
//! part. The main part is a clock: entries that were hit are passed over three times. Each line
//! remembers eight bits of each of the last two keys evicted whose home it was; one that returns
//! while it is remembered goes to the main part at once. So a scan, whose keys come once, only ever
//! pushes out its own predecessors, but for those that are taken for a remembered key: one in 128.
//! (Four in one list, compared with every key, would be one in 64, and a scan would be felt.)
//!
//! What makes it good at popularity that lasts makes it slow where popularity moves on. The other
//! policies are one clock over all entries, whose hand passes three times over what was hit. They
//! differ in what is new. The *weighing* one lets it go at the hand's first coming if it was not
//! hit by then; it is best where some of what is new will be asked for again, and some will not.
//! The *following* one treats it as if it had been hit, which comes nearest to evicting what was
//! not used for longest. The *lending* one passes over it once: nowhere the best, and
//! wherever guarding is wrong much better than that. Which of them a table uses is found out while
//! it runs, by [`crate::duel`].
//!
//! The word is made of one half for each line of the bucket, low half for line 0, so that a reader
//! marks a hit in the line where it found it:
//!
//! | bits of a half | what |
//! |----------------|------|
//! | 0 – 11, 4 × 3  | each entry's state: 0 vacant; 2, 3 on probation, not hit and hit; 4 – 7 main, to be passed over 0 – 3 times |
//! | 12             | whether a key that is looked for in this line first stands in the other one |
//! | 13 – 15        | a hand: in the low half that of the probation, in the high half the clock's |
//! | 16 – 31, 2 × 8 | fingerprints of evicted keys whose home is this line, the newest lowest; 0 for none |

use crate::hash::home_of;
use crate::line::LANES;

/// Lines in a bucket.
pub(crate) const LINES: usize = 2;
/// Entries in a bucket.
pub(crate) const SLOTS: usize = LINES * LANES;

/// How a full bucket chooses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Policy {
    /// Keeps what proved popular against what is new.
    Guard,
    /// Lets what is new prove itself until the clock's hand comes.
    Weigh,
    /// Lets it prove itself once around the clock.
    Lend,
    /// Keeps what was used lately.
    Follow,
}

/// A bucket's occupancy and the state of its eviction. All bits zero is an empty bucket.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Meta(u64);

/// Bits from one lane's state to the next one's.
pub(crate) const STRIDE: usize = 3;
const STATE: u64 = 0b111;
const PROBATION: u64 = 2;
const MAIN: u64 = 4;
/// In the main part, to be passed over once.
const PROMOTED: u64 = 5;
/// What a hit makes of a state in the main part: to be passed over three times.
const HIT: u64 = 7;

const HALF_BITS: usize = 32;
const HALF: u64 = (1 << HALF_BITS) - 1;
const SPILLED: u64 = 1 << 12;

const HAND: u64 = 0b111;
const PROBATION_HAND: usize = 13;
const CLOCK_HAND: usize = HALF_BITS + 13;

/// Evicted keys that a line remembers.
const GHOSTS: usize = 2;
const GHOST_BITS: usize = 8;
const GHOST: u64 = (1 << GHOST_BITS) - 1;
/// The lowest bit of a half's ghosts.
const GHOSTS_SHIFT: usize = 16;
const HALF_GHOSTS: u64 = HALF >> GHOSTS_SHIFT;

const _: () = assert!(1 << (STRIDE * LANES) <= SPILLED);
const _: () = assert!(SLOTS <= HAND as usize + 1);
const _: () = assert!(GHOSTS_SHIFT + GHOSTS * GHOST_BITS == HALF_BITS);

/// The lowest bit of each lane's state in a line.
const LOWEST_IN_LINE: u64 = {
    let mut bits = 0;
    let mut lane = 0;
    while lane < LANES {
        bits |= 1 << (STRIDE * lane);
        lane += 1;
    }
    bits
};
/// The lowest bit of each slot's state.
const LOWEST: u64 = LOWEST_IN_LINE | LOWEST_IN_LINE << HALF_BITS;

/// The slot of a lane in a line.
#[inline]
pub(crate) const fn slot(line: usize, lane: usize) -> usize {
    line * LANES + lane
}

/// The line and the lane of a slot.
#[inline]
pub(crate) const fn place(slot: usize) -> (usize, usize) {
    (slot / LANES, slot % LANES)
}

/// The half of one line.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Half(u64);

impl Half {
    /// The half that stands in the lower half of a line's word.
    #[inline(always)]
    pub(crate) const fn of(word: u64) -> Self {
        Self(word & HALF)
    }

    /// One bit for each lane that holds an entry, [`STRIDE`] apart.
    #[inline(always)]
    pub(crate) const fn occupied(self) -> u64 {
        (self.0 | self.0 >> 1 | self.0 >> 2) & LOWEST_IN_LINE
    }

    /// Whether a key that is looked for here first stands in the other line.
    #[inline(always)]
    pub(crate) const fn spilled(self) -> bool {
        self.0 & SPILLED != 0
    }

    /// What a hit on an occupied `lane` adds to the word; 0 where nothing would change: a reader
    /// then writes nothing.
    #[inline(always)]
    pub(crate) const fn hit(self, lane: usize) -> u64 {
        let shift = STRIDE * lane;
        let state = self.0 >> shift & STATE;
        (hit(state) ^ state) << shift
    }
}

/// The state after a hit. One mark says all there is to say: a second one costs a reader nothing.
#[inline(always)]
const fn hit(state: u64) -> u64 {
    // 3 from a state on probation, 7 from one in the main part.
    state | 1 | (state >> 1 & 2)
}

impl Meta {
    /// From the words of both lines.
    #[inline]
    pub(crate) const fn of(words: [u64; LINES]) -> Self {
        Self(words[0] & HALF | words[1] << HALF_BITS)
    }

    /// What belongs into a line's word.
    #[inline]
    pub(crate) const fn half(self, line: usize) -> u64 {
        self.0 >> (HALF_BITS * line) & HALF
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

    /// Marks a hit on an occupied `slot`.
    #[inline]
    pub(crate) fn hit(&mut self, slot: usize) {
        self.set_state(slot, hit(self.state(slot)));
    }

    /// A slot that holds nothing, in this line if there is one there.
    #[inline]
    pub(crate) fn vacant(self, line: usize) -> Option<usize> {
        let vacant = !self.occupied() & LOWEST;
        [line, 1 - line].into_iter().find_map(|line| {
            let lanes = vacant >> (HALF_BITS * line) & HALF;
            (lanes != 0).then(|| slot(line, lanes.trailing_zeros() as usize / STRIDE))
        })
    }

    /// Puts a new entry, the hash of whose key is `hash`, into `slot`.
    #[inline]
    pub(crate) fn fill(&mut self, slot: usize, hash: u64, policy: Policy) {
        let returned = self.forget(hash);
        let state = match policy {
            Policy::Guard if returned => MAIN,
            Policy::Weigh | Policy::Lend if returned => HIT,
            Policy::Guard | Policy::Weigh => PROBATION,
            Policy::Lend => PROMOTED,
            Policy::Follow => HIT,
        };
        self.set_state(slot, state);
    }

    /// Empties `slot`, leaving nothing of its past.
    #[inline]
    pub(crate) fn empty(&mut self, slot: usize) {
        self.set_state(slot, 0);
    }

    /// Moves what is known of the entry in slot `from` to slot `to`.
    #[inline]
    pub(crate) fn relocate(&mut self, from: usize, to: usize) {
        self.set_state(to, self.state(from));
        self.set_state(from, 0);
    }

    /// Says of a line whether a key that is looked for there first stands in the other one.
    #[inline]
    pub(crate) fn set_spilled(&mut self, line: usize, spilled: bool) {
        let bit = SPILLED << (HALF_BITS * line);
        self.0 = if spilled { self.0 | bit } else { self.0 & !bit };
    }

    /// Chooses the slot whose entry leaves a full bucket, and ages others as the choice demands.
    /// The caller says with [`Meta::remember`] whose it was, and fills it again.
    ///
    /// A hand stops at a slot at most six times, so this ends after some 48 steps at worst.
    pub(crate) fn victim(&mut self, policy: Policy) -> usize {
        debug_assert_eq!(self.occupied(), LOWEST);
        if policy != Policy::Guard {
            return self.clock(HIT);
        }
        while self.any_on_probation() {
            let slot = self.advance(PROBATION_HAND);
            match self.state(slot) {
                PROBATION => return slot,
                MAIN.. => {}
                _ => self.set_state(slot, PROMOTED),
            }
        }
        self.clock(PROMOTED)
    }

    /// The clock: takes what was not hit, passes over the rest at the price of one life each. What
    /// was hit on probation goes to the main part in the state `promoted`.
    fn clock(&mut self, promoted: u64) -> usize {
        loop {
            let slot = self.advance(CLOCK_HAND);
            match self.state(slot) {
                PROBATION | MAIN => return slot,
                state if state > MAIN => self.set_state(slot, state - 1),
                _ => self.set_state(slot, promoted),
            }
        }
    }

    /// Remembers the key of an evicted entry, whose hash is `hash`.
    #[inline]
    pub(crate) fn remember(&mut self, hash: u64) {
        let line = home_of(hash);
        self.set_ghosts(line, self.ghosts(line) << GHOST_BITS | fingerprint(hash));
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
        for hand in [PROBATION_HAND, CLOCK_HAND] {
            if (self.0 >> hand & HAND) as usize >= SLOTS {
                return Err("a hand points past the last slot");
            }
        }
        Ok(())
    }

    /// The lowest bit of the state of each slot that holds an entry.
    const fn occupied(self) -> u64 {
        (self.0 | self.0 >> 1 | self.0 >> 2) & LOWEST
    }

    #[inline]
    const fn shift(slot: usize) -> usize {
        let (line, lane) = place(slot);
        HALF_BITS * line + STRIDE * lane
    }

    #[inline]
    const fn state(self, slot: usize) -> u64 {
        self.0 >> Self::shift(slot) & STATE
    }

    #[inline]
    fn set_state(&mut self, slot: usize, state: u64) {
        let shift = Self::shift(slot);
        self.0 = self.0 & !(STATE << shift) | state << shift;
    }

    /// Whether any slot is in state 2 or 3: the middle bit without the high one.
    fn any_on_probation(self) -> bool {
        (self.0 >> 1 & !(self.0 >> 2)) & LOWEST != 0
    }

    /// The slot that a hand points to; the hand moves on.
    fn advance(&mut self, hand: usize) -> usize {
        // A word that only this module writes is in range already; the remainder keeps a wrong one
        // so.
        let slot = (self.0 >> hand & HAND) as usize % SLOTS;
        let next = ((slot + 1) % SLOTS) as u64;
        self.0 = self.0 & !(HAND << hand) | next << hand;
        slot
    }

    /// The ghosts of a line, the newest lowest.
    #[inline]
    const fn ghosts(self, line: usize) -> u64 {
        self.0 >> (HALF_BITS * line + GHOSTS_SHIFT) & HALF_GHOSTS
    }

    #[inline]
    fn set_ghosts(&mut self, line: usize, ghosts: u64) {
        let shift = HALF_BITS * line + GHOSTS_SHIFT;
        self.0 = self.0 & !(HALF_GHOSTS << shift) | (ghosts & HALF_GHOSTS) << shift;
    }

    /// Whether the key with this hash is remembered; if so it is no longer.
    #[inline]
    fn forget(&mut self, hash: u64) -> bool {
        let line = home_of(hash);
        let ghosts = self.ghosts(line);
        for at in 0..GHOSTS {
            let shift = GHOST_BITS * at;
            if ghosts >> shift & GHOST == fingerprint(hash) {
                // Older ones close the gap.
                let newer = ghosts & ((1 << shift) - 1);
                let older = ghosts >> shift >> GHOST_BITS << shift;
                self.set_ghosts(line, newer | older);
                return true;
            }
        }
        false
    }
}

/// What is remembered of a hash: its lowest bits but the one that chooses the line and so the list,
/// since the bucket is chosen by the highest. Never 0.
#[inline]
fn fingerprint(hash: u64) -> u64 {
    (hash >> 1 & GHOST).max(1)
}

#[cfg(test)]
#[cfg(not(loom))]
mod tests {
    use super::*;

    const POLICIES: [Policy; 4] = [Policy::Guard, Policy::Weigh, Policy::Lend, Policy::Follow];

    /// A full bucket of unhit entries with hashes 2, 4 and so on, which look for line 0 first.
    fn full(policy: Policy) -> Meta {
        let mut meta = Meta::default();
        for hash in 1..=SLOTS as u64 {
            let slot = meta.vacant(0).unwrap();
            meta.fill(slot, 2 * hash, policy);
        }
        assert_eq!(meta.vacant(0), None);
        meta
    }

    fn replace(meta: &mut Meta, policy: Policy, old: u64, new: u64) -> usize {
        let slot = meta.victim(policy);
        meta.remember(2 * old);
        meta.fill(slot, 2 * new, policy);
        meta.validate().unwrap();
        slot
    }

    #[test]
    fn vacant_slots_of_the_own_line_are_taken_first() {
        let mut meta = Meta::default();
        let mut order = Vec::new();
        while let Some(slot) = meta.vacant(1) {
            meta.fill(slot, 7, Policy::Guard);
            order.push(slot);
        }
        assert_eq!(order, [4, 5, 6, 7, 0, 1, 2, 3]);
        meta.empty(6);
        meta.empty(2);
        assert_eq!([meta.vacant(0), meta.vacant(1)], [Some(2), Some(6)]);
    }

    #[test]
    fn guarded_newcomers_push_each_other_out_in_order() {
        let mut meta = full(Policy::Guard);
        let order: Vec<usize> =
            (0..16).map(|n| replace(&mut meta, Policy::Guard, 40 + n, 80 + n)).collect();
        assert_eq!(order, [0, 1, 2, 3, 4, 5, 6, 7, 0, 1, 2, 3, 4, 5, 6, 7]);
    }

    #[test]
    fn a_hit_on_probation_promotes_and_a_scan_then_passes_by() {
        let mut meta = full(Policy::Guard);
        for slot in 0..7 {
            meta.hit(slot);
        }
        for n in 0..100 {
            assert_eq!(replace(&mut meta, Policy::Guard, n, 120 + n), 7);
        }
        assert!((0..7).all(|slot| meta.heat(slot) >= 2));
    }

    #[test]
    fn a_key_that_returns_soon_goes_to_the_main_part() {
        let mut meta = full(Policy::Guard);
        assert_eq!(replace(&mut meta, Policy::Guard, 1, 50), 0);
        assert_eq!(meta.heat(0), 0);
        replace(&mut meta, Policy::Guard, 60, 70);
        let slot = meta.victim(Policy::Guard);
        meta.fill(slot, 2, Policy::Guard);
        assert_eq!(meta.heat(slot), 2, "the second newest is remembered");
        meta.empty(slot);
        meta.fill(slot, 2, Policy::Guard);
        assert_eq!(meta.heat(slot), 0, "it is remembered once");
    }

    #[test]
    fn each_line_remembers_the_last_two_keys_of_its_own() {
        for line in 0..2 {
            // Twelve bits of a hash, of which the lowest is the home.
            let of = |key: u64| 2 * key + line;
            for forgotten in 11..13 {
                let mut meta = Meta::default();
                for key in [10, 11, 12] {
                    meta.remember(of(key));
                }
                assert!(!meta.forget(of(10)), "two newer ones came");
                assert!(!meta.forget(of(forgotten) ^ 1), "a key of the other line");
                assert!(meta.forget(of(forgotten)));
                assert!(!meta.forget(of(forgotten)));
                assert!(meta.forget(of(11 + 12 - forgotten)), "without {forgotten}");
                assert_eq!(meta, Meta::default());
            }
        }
    }

    #[test]
    fn weighing_takes_what_was_not_hit_and_passes_three_times_over_what_was() {
        let mut meta = full(Policy::Weigh);
        for slot in [0, 1, 4] {
            meta.hit(slot);
            meta.hit(slot);
        }
        // The hit ones lose their three lives while the others, never hit, go each time.
        let order: Vec<usize> =
            (0..20).map(|n| replace(&mut meta, Policy::Weigh, 10 + n, 40 + n)).collect();
        assert_eq!(order, [2, 3, 5, 6, 7, 2, 3, 5, 6, 7, 2, 3, 5, 6, 7, 2, 3, 5, 6, 7]);
        assert_eq!(replace(&mut meta, Policy::Weigh, 1, 2), 0);
    }

    #[test]
    fn lending_takes_what_was_not_hit_within_a_round_of_the_hand() {
        let mut meta = full(Policy::Lend);
        meta.hit(3);
        let order: Vec<usize> =
            (0..8).map(|n| replace(&mut meta, Policy::Lend, 10 + n, 40 + n)).collect();
        // The hand has been everywhere once; then what came meanwhile has its turn.
        assert_eq!(order, [0, 1, 2, 4, 5, 6, 7, 0]);
    }

    #[test]
    fn following_takes_whatever_was_not_hit_for_longest() {
        let mut meta = full(Policy::Follow);
        // All are new, so all lose their lives, and the first one goes first.
        assert_eq!(replace(&mut meta, Policy::Follow, 1, 21), 0);
        meta.hit(1);
        meta.hit(5);
        let order: Vec<usize> =
            (0..7).map(|n| replace(&mut meta, Policy::Follow, 10 + n, 40 + n)).collect();
        assert_eq!(order, [2, 3, 4, 6, 7, 1, 5]);
    }

    #[test]
    fn a_reader_marks_what_a_writer_would() {
        for policy in POLICIES {
            for slot in 0..SLOTS {
                let mut meta = full(policy);
                meta.victim(policy);
                let (line, lane) = place(slot);
                let half = Half::of(meta.half(line));
                let marked = half.0 | half.hit(lane);
                assert_eq!(Half::of(marked).hit(lane), 0, "a second mark changes nothing");
                meta.hit(slot);
                assert_eq!(meta.half(line), marked);
            }
        }
    }

    #[test]
    fn every_policy_ends_whatever_the_word() {
        let mut word = 1u64;
        for _ in 0..if cfg!(miri) { 100 } else { 100_000 } {
            word = word.wrapping_mul(0xd134_2543_de82_ef95).wrapping_add(1);
            for policy in POLICIES {
                let mut meta = Meta(word);
                for slot in 0..SLOTS {
                    if meta.state(slot) < PROBATION {
                        meta.set_state(slot, PROBATION);
                    }
                }
                assert!(meta.victim(policy) < SLOTS);
                meta.validate().unwrap();
            }
        }
    }
}
