//! The choice of the entry that leaves a full bucket: pure functions on one 64-bit word.
//!
//! [`Policy::S3Fifo`] is S3-FIFO (Yang et al., "FIFO queues are all you need for cache eviction",
//! SOSP 2023), reduced to a bucket. A new entry is on *probation*. The next new entry evicts it,
//! unless it was hit before; then it is promoted to the *main* part. The main part is a clock: its
//! hand passes an entry with a hit three times before it evicts it. Each line keeps eight bits of
//! the last two evicted keys whose home it was (S3-FIFO's ghosts). A key that returns while its
//! ghost is there joins the main part at once. So a scan, whose keys come once, evicts only its own
//! entries, except for one key in 128, whose fingerprint equals a ghost's. (With four ghosts in one
//! list for both lines it would be one in 64, and scans would evict noticeably more.)
//!
//! S3-FIFO is best where the same keys stay popular, and slow where popularity moves. The other
//! policies are one clock over all eight entries, in which a hit gives three lives. They differ in
//! the lives of a new entry:
//!
//! * [`Policy::Clock0`] gives none. It is best where some of the new keys return and some do not.
//! * [`Policy::Clock3`] gives three, as a hit does, and so approximates LRU.
//! * [`Policy::Clock1`] gives one. It is nowhere the best, but much better than S3-FIFO wherever
//!   S3-FIFO is bad.
//!
//! [`crate::duel`] chooses among them at run time. [`crate::layout`] has the bits of the word.

use crate::hash::home_of;
use crate::layout::{
    CLOCK_HAND, GHOST, GHOST_BITS, GHOSTS, GHOSTS_SHIFT, HALF, HALF_BITS, HALF_GHOSTS, HAND, LINES,
    LOWEST, LOWEST_IN_LINE, PROBATION_HAND, SLOTS, SPILLED, STATE, STRIDE, place, slot,
};

/// The policy of a full bucket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Policy {
    /// S3-FIFO: protects popular entries against new ones.
    S3Fifo,
    /// A clock in which a new entry has no life until its first hit.
    Clock0,
    /// A clock in which a new entry survives one round of the hand.
    Clock1,
    /// A clock in which a new entry has three lives, as after a hit.
    Clock3,
}

/// The occupancy of a bucket and the state of its eviction. All bits zero is an empty bucket.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Meta(u64);

const PROBATION: u64 = 2;
const MAIN: u64 = 4;
/// In the main part; survives one round of the hand.
const PROMOTED: u64 = 5;
/// In the main part with three lives, as after a hit.
const HIT: u64 = 7;

/// The part of a bucket's [`Meta`] that is in one line.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Half(u64);

impl Half {
    /// The lower half of a line's word.
    #[inline(always)]
    pub(crate) const fn of(word: u64) -> Self {
        Self(word & HALF)
    }

    /// One bit for each lane that holds an entry, [`STRIDE`] apart.
    #[inline(always)]
    pub(crate) const fn occupied(self) -> u64 {
        (self.0 | self.0 >> 1 | self.0 >> 2) & LOWEST_IN_LINE
    }

    /// Whether a key whose home is this line is in the other line.
    #[inline(always)]
    pub(crate) const fn spilled(self) -> bool {
        self.0 & SPILLED != 0
    }

    /// The bits that a hit on an occupied `lane` changes; 0 if none, so that the reader need not
    /// write.
    #[inline(always)]
    pub(crate) const fn hit(self, lane: usize) -> u64 {
        let shift = STRIDE * lane;
        let state = self.0 >> shift & STATE;
        (hit(state) ^ state) << shift
    }
}

/// The state after a hit. A second hit changes nothing, so it costs the reader no write.
#[inline(always)]
const fn hit(state: u64) -> u64 {
    // 3 from a state on probation, 7 from a state in the main part.
    state | 1 | (state >> 1 & 2)
}

impl Meta {
    /// Combines the words of both lines.
    #[inline]
    pub(crate) const fn of(words: [u64; LINES]) -> Self {
        Self(words[0] & HALF | words[1] << HALF_BITS)
    }

    /// The half for a line's word.
    #[inline]
    pub(crate) const fn half(self, line: usize) -> u64 {
        self.0 >> (HALF_BITS * line) & HALF
    }

    /// Whether `slot` holds an entry.
    #[inline]
    pub(crate) const fn holds(self, slot: usize) -> bool {
        self.state(slot) != 0
    }

    /// The number of slots that hold an entry.
    pub(crate) const fn entries(self) -> u32 {
        self.occupied().count_ones()
    }

    /// Marks a hit on an occupied `slot`.
    #[inline]
    pub(crate) fn hit(&mut self, slot: usize) {
        self.set_state(slot, hit(self.state(slot)));
    }

    /// A vacant slot, preferably in this line.
    #[inline]
    pub(crate) fn vacant(self, line: usize) -> Option<usize> {
        let vacant = !self.occupied() & LOWEST;
        [line, 1 - line].into_iter().find_map(|line| {
            let lanes = vacant >> (HALF_BITS * line) & HALF;
            (lanes != 0).then(|| slot(line, lanes.trailing_zeros() as usize / STRIDE))
        })
    }

    /// Puts a new entry into `slot`. The hash of its key is `hash`.
    #[inline]
    pub(crate) fn fill(&mut self, slot: usize, hash: u64, policy: Policy) {
        let returned = self.forget(hash);
        let state = match policy {
            Policy::S3Fifo if returned => MAIN,
            Policy::Clock0 | Policy::Clock1 if returned => HIT,
            Policy::S3Fifo | Policy::Clock0 => PROBATION,
            Policy::Clock1 => PROMOTED,
            Policy::Clock3 => HIT,
        };
        self.set_state(slot, state);
    }

    /// Empties `slot`.
    #[inline]
    pub(crate) fn empty(&mut self, slot: usize) {
        self.set_state(slot, 0);
    }

    /// Moves the state of the entry in slot `from` to slot `to`.
    #[inline]
    pub(crate) fn relocate(&mut self, from: usize, to: usize) {
        self.set_state(to, self.state(from));
        self.set_state(from, 0);
    }

    /// Sets whether a key whose home is `line` is in the other line.
    #[inline]
    pub(crate) fn set_spilled(&mut self, line: usize, spilled: bool) {
        let bit = SPILLED << (HALF_BITS * line);
        self.0 = if spilled { self.0 | bit } else { self.0 & !bit };
    }

    /// Chooses the slot whose entry leaves a full bucket, and takes lives from other entries as the
    /// policy demands. The caller records the evicted key with [`Meta::remember`] and fills the
    /// slot again.
    ///
    /// A hand stops at a slot at most six times, so this ends after at most 48 steps or so.
    pub(crate) fn victim(&mut self, policy: Policy) -> usize {
        debug_assert_eq!(self.occupied(), LOWEST);
        if policy != Policy::S3Fifo {
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

    /// The clock: takes the first entry without lives, and takes one life from each entry before
    /// it. An entry on probation with a hit goes to the main part in the state `promoted`.
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

    /// Records the key of an evicted entry as a ghost.
    #[inline]
    pub(crate) fn remember(&mut self, hash: u64) {
        let line = home_of(hash);
        self.set_ghosts(line, self.ghosts(line) << GHOST_BITS | fingerprint(hash));
    }

    /// The value of the entry in an occupied `slot`, from 0 to [`Meta::HEAT_MAX`].
    #[inline]
    pub(crate) const fn heat(self, slot: usize) -> u8 {
        self.state(slot).saturating_sub(PROBATION) as u8
    }

    /// The highest heat.
    pub(crate) const HEAT_MAX: u8 = (STATE - PROBATION) as u8;

    /// Sets the heat of the entry in `slot` to that in a snapshot.
    #[inline]
    pub(crate) fn set_heat(&mut self, slot: usize, heat: u8) {
        self.set_state(slot, PROBATION + u64::from(heat.min(Self::HEAT_MAX)));
    }

    /// Checks the word.
    pub(crate) fn validate(self) -> Result<(), &'static str> {
        if (0..SLOTS).any(|slot| self.state(slot) == 1) {
            return Err("a slot has an invalid state");
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

    /// Moves a hand on; returns the slot that it pointed to.
    fn advance(&mut self, hand: usize) -> usize {
        // The hand is in range in every word that this module wrote. The remainder bounds it in
        // any other.
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

    /// Removes the ghost of the key with this hash; returns whether there was one.
    #[inline]
    fn forget(&mut self, hash: u64) -> bool {
        let line = home_of(hash);
        let ghosts = self.ghosts(line);
        for at in 0..GHOSTS {
            let shift = GHOST_BITS * at;
            if ghosts >> shift & GHOST == fingerprint(hash) {
                // Older ghosts close the gap.
                let newer = ghosts & ((1 << shift) - 1);
                let older = ghosts >> shift >> GHOST_BITS << shift;
                self.set_ghosts(line, newer | older);
                return true;
            }
        }
        false
    }
}

/// The fingerprint of a hash in a ghost, never 0: its lowest bits except the home bit, which all
/// ghosts of a line share. The highest bits choose the bucket, so all its keys share them, too.
#[inline]
fn fingerprint(hash: u64) -> u64 {
    (hash >> 1 & GHOST).max(1)
}

#[cfg(all(test, not(loom)))]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    const POLICIES: [Policy; 4] = [Policy::S3Fifo, Policy::Clock0, Policy::Clock1, Policy::Clock3];

    /// A full bucket of entries without hits. Their hashes are 2, 4 and so on; their home is line
    /// 0.
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
    fn vacant_slots_of_the_home_line_are_taken_first() {
        let mut meta = Meta::default();
        let mut order = Vec::new();
        while let Some(slot) = meta.vacant(1) {
            meta.fill(slot, 7, Policy::S3Fifo);
            order.push(slot);
        }
        assert_eq!(order, [4, 5, 6, 7, 0, 1, 2, 3]);
        meta.empty(6);
        meta.empty(2);
        assert_eq!([meta.vacant(0), meta.vacant(1)], [Some(2), Some(6)]);
    }

    #[test]
    fn s3fifo_evicts_new_entries_in_order() {
        let mut meta = full(Policy::S3Fifo);
        let order: Vec<usize> =
            (0..16).map(|n| replace(&mut meta, Policy::S3Fifo, 40 + n, 80 + n)).collect();
        assert_eq!(order, [0, 1, 2, 3, 4, 5, 6, 7, 0, 1, 2, 3, 4, 5, 6, 7]);
    }

    #[test]
    fn a_hit_on_probation_protects_against_a_scan() {
        let mut meta = full(Policy::S3Fifo);
        for slot in 0..7 {
            meta.hit(slot);
        }
        for n in 0..100 {
            assert_eq!(replace(&mut meta, Policy::S3Fifo, n, 120 + n), 7);
        }
        assert!((0..7).all(|slot| meta.heat(slot) >= 2));
    }

    #[test]
    fn a_key_that_returns_soon_joins_the_main_part() {
        let mut meta = full(Policy::S3Fifo);
        assert_eq!(replace(&mut meta, Policy::S3Fifo, 1, 50), 0);
        assert_eq!(meta.heat(0), 0);
        replace(&mut meta, Policy::S3Fifo, 60, 70);
        let slot = meta.victim(Policy::S3Fifo);
        meta.fill(slot, 2, Policy::S3Fifo);
        assert_eq!(meta.heat(slot), 2, "the second newest key has a ghost");
        meta.empty(slot);
        meta.fill(slot, 2, Policy::S3Fifo);
        assert_eq!(meta.heat(slot), 0, "a ghost is used once");
    }

    #[test]
    fn each_line_has_ghosts_of_its_last_two_keys() {
        for line in 0..2 {
            // The lowest bit of a hash is the home.
            let of = |key: u64| 2 * key + line;
            for forgotten in 11..13 {
                let mut meta = Meta::default();
                for key in [10, 11, 12] {
                    meta.remember(of(key));
                }
                assert!(!meta.forget(of(10)), "two newer keys followed");
                assert!(!meta.forget(of(forgotten) ^ 1), "a key of the other line");
                assert!(meta.forget(of(forgotten)));
                assert!(!meta.forget(of(forgotten)));
                assert!(meta.forget(of(11 + 12 - forgotten)), "without {forgotten}");
                assert_eq!(meta, Meta::default());
            }
        }
    }

    #[test]
    fn clock0_passes_three_times_over_entries_with_a_hit() {
        let mut meta = full(Policy::Clock0);
        for slot in [0, 1, 4] {
            meta.hit(slot);
            meta.hit(slot);
        }
        // Entries with a hit lose their three lives while the others are evicted in turn.
        let order: Vec<usize> =
            (0..20).map(|n| replace(&mut meta, Policy::Clock0, 10 + n, 40 + n)).collect();
        assert_eq!(order, [2, 3, 5, 6, 7, 2, 3, 5, 6, 7, 2, 3, 5, 6, 7, 2, 3, 5, 6, 7]);
        assert_eq!(replace(&mut meta, Policy::Clock0, 1, 2), 0);
    }

    #[test]
    fn clock1_evicts_after_one_round_without_a_hit() {
        let mut meta = full(Policy::Clock1);
        meta.hit(3);
        let order: Vec<usize> =
            (0..8).map(|n| replace(&mut meta, Policy::Clock1, 10 + n, 40 + n)).collect();
        // After one round of the hand the first new entry can be evicted.
        assert_eq!(order, [0, 1, 2, 4, 5, 6, 7, 0]);
    }

    #[test]
    fn clock3_evicts_the_least_recently_used() {
        let mut meta = full(Policy::Clock3);
        // All are new, so all lose their lives, and the first one is evicted first.
        assert_eq!(replace(&mut meta, Policy::Clock3, 1, 21), 0);
        meta.hit(1);
        meta.hit(5);
        let order: Vec<usize> =
            (0..7).map(|n| replace(&mut meta, Policy::Clock3, 10 + n, 40 + n)).collect();
        assert_eq!(order, [2, 3, 4, 6, 7, 1, 5]);
    }

    #[test]
    fn a_reader_marks_a_hit_as_a_writer_does() {
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
    fn every_policy_ends_for_any_word() {
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
