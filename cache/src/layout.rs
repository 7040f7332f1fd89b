//! The bit layout of a bucket.
//!
//! A bucket has two cache lines of eight 64-bit words:
//!
//! ```text
//! line 0   word | tags 0 to 3 | value 0 | value 1 | value 2 | value 3
//! line 1   word | tags 4 to 7 | value 4 | value 5 | value 6 | value 7
//! ```
//!
//! An entry has a *slot* in the bucket: a line, and a *lane* in that line. A tag has 48 bits
//! ([`crate::hash`]). The tags of lanes 0 to 2 take the lower 48 bits of three words; the tag of
//! lane 3 takes the upper 16 bits of the same three words.
//!
//! The first word of a line:
//!
//! | bits           | content                                                            |
//! |----------------|--------------------------------------------------------------------|
//! | 0 – 11, 4 × 3  | state of each lane, see below                                      |
//! | 12             | whether a key whose home is this line is in the other line         |
//! | 13 – 15        | a hand: of the probation part in line 0, of the clock in line 1    |
//! | 16 – 31, 2 × 8 | ghosts: fingerprints of evicted keys, the newest lowest; 0 if none |
//! | 32 – 63        | sequence: odd while a writer changes the line                      |
//!
//! A state is 0 in a vacant lane, 2 or 3 on probation without or with a hit, and 4 to 7 in the main
//! part with 0 to 3 lives. A line has the ghosts of keys whose home it is.
//!
//! The lower halves of both words together are the bucket's [`Meta`](crate::eviction::Meta): line 0
//! in its lower half, line 1 in its upper half.

/// Lines in a bucket.
pub(crate) const LINES: usize = 2;
/// Entries in a line. The loom model has one: enough for one entry to keep and one to evict.
pub(crate) const LANES: usize = if cfg!(loom) { 1 } else { 4 };
/// Entries in a bucket.
pub(crate) const SLOTS: usize = LINES * LANES;

/// Words of a line that hold tags.
pub(crate) const TAG_WORDS: usize = if cfg!(loom) { 1 } else { 3 };

/// The lowest bit of the sequence. It is set while a writer changes the line.
pub(crate) const ODD: u64 = 1 << 32;
/// The bits of the sequence.
pub(crate) const SEQUENCE: u64 = !(ODD - 1);

/// Bits of a line's word below the sequence.
pub(crate) const HALF_BITS: usize = 32;
pub(crate) const HALF: u64 = (1 << HALF_BITS) - 1;

/// Distance in bits between the states of two lanes.
pub(crate) const STRIDE: usize = 3;
pub(crate) const STATE: u64 = 0b111;

pub(crate) const SPILLED: u64 = 1 << 12;

pub(crate) const HAND: u64 = 0b111;
pub(crate) const PROBATION_HAND: usize = 13;
pub(crate) const CLOCK_HAND: usize = HALF_BITS + 13;

/// Ghosts of a line.
pub(crate) const GHOSTS: usize = 2;
pub(crate) const GHOST_BITS: usize = 8;
pub(crate) const GHOST: u64 = (1 << GHOST_BITS) - 1;
/// The lowest bit of the ghosts in a half.
pub(crate) const GHOSTS_SHIFT: usize = 16;
pub(crate) const HALF_GHOSTS: u64 = HALF >> GHOSTS_SHIFT;

const _: () = assert!(1 << (STRIDE * LANES) <= SPILLED);
const _: () = assert!(SLOTS <= HAND as usize + 1);
const _: () = assert!(GHOSTS_SHIFT + GHOSTS * GHOST_BITS == HALF_BITS);
const _: () = assert!(ODD == HALF + 1);

/// The lowest bit of each lane's state in a line.
pub(crate) const LOWEST_IN_LINE: u64 = {
    let mut bits = 0;
    let mut lane = 0;
    while lane < LANES {
        bits |= 1 << (STRIDE * lane);
        lane += 1;
    }
    bits
};
/// The lowest bit of each slot's state.
pub(crate) const LOWEST: u64 = LOWEST_IN_LINE | LOWEST_IN_LINE << HALF_BITS;

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
