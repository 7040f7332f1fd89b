//! Which entry of a full bucket has to go: a pure function on one 64-bit word.
//!
//! The policy is S3-FIFO (Yang et al., "FIFO queues are all you need for cache eviction", SOSP 2023) cut
//! down to a bucket. A new entry stands on *probation*; the next new entry pushes it out, unless it was
//! hit meanwhile, in which case it is promoted to the *main* part. The main part is a clock: entries that
//! were hit are passed over, at the price of one hit each. The bucket remembers eight bits of each of the
//! last few keys that it evicted; one that returns while it is remembered goes to the main part at once.
//! So a scan, whose keys come once, only ever pushes out its own predecessors.
//!
//! | bits                  | what |
//! |-----------------------|------|
//! | `SLOTS` × 1           | occupied |
//! | `SLOTS` × 1           | in the main part (else on probation) |
//! | `SLOTS` × 2           | hits since the hand last passed, saturating at 3 |
//! | 3, from bit 28        | the clock's hand |
//! | 4 × 8, from bit 32    | fingerprints of evicted keys, the newest lowest |

use crate::bucket::SLOTS;

/// One bit for each slot.
const ALL: u64 = (1 << SLOTS) - 1;
const MAIN_SHIFT: usize = SLOTS;
const HITS_SHIFT: usize = 2 * SLOTS;
const HITS_MAX: u64 = 3;
const HAND_SHIFT: usize = 28;
const HAND_MASK: u64 = 0b111;
const GHOST_SHIFT: usize = 32;
const GHOSTS: usize = 4;

const _: () = assert!(HITS_SHIFT + 2 * SLOTS <= HAND_SHIFT);
const _: () = assert!(SLOTS <= HAND_MASK as usize);
const _: () = assert!(GHOST_SHIFT + 8 * GHOSTS == 64);

/// A bucket's occupancy and the state of its eviction. All bits zero is an empty bucket.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Meta(pub(crate) u64);

impl Meta {
    /// One bit for each slot that holds an entry.
    #[inline]
    pub(crate) const fn occupied(self) -> u64 {
        self.0 & ALL
    }

    /// The word after a hit on `slot`, or `None` where nothing would change: a reader then writes nothing.
    #[inline]
    pub(crate) const fn hit(self, slot: usize) -> Option<Self> {
        if self.hits(slot) == HITS_MAX {
            return None;
        }
        Some(Self(self.0 + (1 << (HITS_SHIFT + 2 * slot))))
    }

    /// A slot that holds nothing.
    #[inline]
    pub(crate) const fn vacant(self) -> Option<usize> {
        let slot = self.occupied().trailing_ones() as usize;
        if slot < SLOTS { Some(slot) } else { None }
    }

    /// Puts a new entry, whose key has `fingerprint`, into a vacant `slot`.
    #[inline]
    pub(crate) fn fill(&mut self, slot: usize, fingerprint: u8) {
        debug_assert_eq!(self.occupied() & (1 << slot), 0);
        self.0 |= 1 << slot;
        if self.forget(fingerprint) {
            self.0 |= 1 << (MAIN_SHIFT + slot);
        }
    }

    /// Empties `slot`, leaving nothing of its past.
    #[inline]
    pub(crate) fn empty(&mut self, slot: usize) {
        self.0 &= !(1 << slot | 1 << (MAIN_SHIFT + slot) | HITS_MAX << (HITS_SHIFT + 2 * slot));
    }

    /// Chooses the slot whose entry leaves a full bucket and ages the others as the choice demands. The
    /// caller empties it, and says with [`Meta::remember`] whose it was.
    ///
    /// Ends after at most `SLOTS` promotions and 3 × `SLOTS` + 1 steps of the hand.
    pub(crate) fn victim(&mut self) -> usize {
        debug_assert_eq!(self.occupied(), ALL);
        let mut probation = !(self.0 >> MAIN_SHIFT) & ALL;
        while probation != 0 {
            let slot = probation.trailing_zeros() as usize;
            if self.hits(slot) == 0 {
                return slot;
            }
            self.0 &= !(HITS_MAX << (HITS_SHIFT + 2 * slot));
            self.0 |= 1 << (MAIN_SHIFT + slot);
            probation &= probation - 1;
        }
        let mut hand = (self.0 >> HAND_SHIFT & HAND_MASK) as usize % SLOTS;
        while self.hits(hand) != 0 {
            self.0 -= 1 << (HITS_SHIFT + 2 * hand);
            hand = (hand + 1) % SLOTS;
        }
        let next = ((hand + 1) % SLOTS) as u64;
        self.0 = self.0 & !(HAND_MASK << HAND_SHIFT) | next << HAND_SHIFT;
        hand
    }

    /// Remembers the key of an evicted entry by its `fingerprint`.
    #[inline]
    pub(crate) fn remember(&mut self, fingerprint: u8) {
        let ghosts = (self.0 >> GHOST_SHIFT) << 8 | u64::from(fingerprint);
        self.0 = self.0 & ((1 << GHOST_SHIFT) - 1) | ghosts << GHOST_SHIFT;
    }

    /// How much an entry is worth keeping, from 0 to [`Meta::HEAT_MAX`]; what a snapshot keeps of it.
    #[inline]
    pub(crate) const fn heat(self, slot: usize) -> u8 {
        let main = self.0 >> (MAIN_SHIFT + slot) & 1;
        (main * (HITS_MAX + 1) + self.hits(slot)) as u8
    }

    /// The highest heat.
    pub(crate) const HEAT_MAX: u8 = 7;

    /// Gives the entry in `slot` a heat that a snapshot kept.
    #[inline]
    pub(crate) fn set_heat(&mut self, slot: usize, heat: u8) {
        let heat = u64::from(heat.min(Self::HEAT_MAX));
        self.empty(slot);
        self.0 |= 1 << slot
            | heat >> 2 << (MAIN_SHIFT + slot)
            | (heat & HITS_MAX) << (HITS_SHIFT + 2 * slot);
    }

    /// What is wrong with the word, if anything.
    pub(crate) fn validate(self) -> Result<(), &'static str> {
        for slot in 0..SLOTS {
            let occupied = self.0 >> slot & 1 == 1;
            if !occupied && self.heat(slot) != 0 {
                return Err("a vacant slot has eviction bits");
            }
        }
        if (self.0 >> HAND_SHIFT & HAND_MASK) as usize >= SLOTS {
            return Err("the hand points past the last slot");
        }
        Ok(())
    }

    #[inline]
    const fn hits(self, slot: usize) -> u64 {
        self.0 >> (HITS_SHIFT + 2 * slot) & HITS_MAX
    }

    /// Whether `fingerprint` is remembered; if so it is no longer.
    #[inline]
    fn forget(&mut self, fingerprint: u8) -> bool {
        let mut ghosts = ((self.0 >> GHOST_SHIFT) as u32).to_le_bytes();
        let Some(at) = ghosts.iter().position(|&g| g == fingerprint) else {
            return false;
        };
        ghosts.copy_within(at + 1.., at);
        ghosts[GHOSTS - 1] = 0;
        self.0 = self.0 & ((1 << GHOST_SHIFT) - 1)
            | u64::from(u32::from_le_bytes(ghosts)) << GHOST_SHIFT;
        true
    }
}
