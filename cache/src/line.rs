//! One cache line: four entries behind a sequence lock.
//!
//! ```text
//! word | tag 0 and 1/3 of tag 3 | tag 1 and 1/3 | tag 2 and 1/3 | value 0 | value 1 | value 2 | value 3
//! ```
//!
//! A tag is 48 bits ([`crate::hash`]); the fourth stands in the upper 16 bits of the three words of
//! the others. The word's upper half is the sequence, its lower half belongs to
//! [`crate::eviction`].

use crate::eviction::STRIDE;
use crate::hash::{Hashed, TAG, TAG_BITS};
use crate::sync::{AtomicU64, Ordering};

/// Entries in a line. A model needs one in each of two lines: one to keep and one to evict.
pub(crate) const LANES: usize = if cfg!(loom) { 1 } else { 4 };
const TAG_WORDS: usize = if cfg!(loom) { 1 } else { 3 };

/// Bits of a tag that a word holds above its own one.
const ABOVE_BITS: u32 = u64::BITS - TAG_BITS;
const ABOVE: u64 = (1 << ABOVE_BITS) - 1;
const _: () = assert!(3 * ABOVE_BITS == TAG_BITS);

/// See the [module](self).
#[cfg_attr(not(loom), repr(C, align(64)))]
pub(crate) struct Line {
    pub(crate) word: AtomicU64,
    tags: [AtomicU64; TAG_WORDS],
    values: [AtomicU64; LANES],
}

#[cfg(not(loom))]
const _: () = assert!(size_of::<Line>() == 64 && align_of::<Line>() == 64);

/// The tops of a line's entries, where a table stores them: 16 bits each, lane 0 lowest.
pub(crate) type Tops = AtomicU64;

impl Line {
    /// One bit for each lane with this tag, [`STRIDE`] apart, whether it is occupied or not.
    #[inline(always)]
    pub(crate) fn lanes_with(&self, tag: u64) -> u64 {
        let mut found = 0;
        let mut above = 0;
        for (lane, word) in self.tags.iter().enumerate() {
            let word = word.load(Ordering::Relaxed);
            found |= u64::from((word ^ tag) & TAG == 0) << (STRIDE * lane);
            above |= (word >> TAG_BITS) << (ABOVE_BITS as usize * lane);
        }
        if LANES > TAG_WORDS {
            found |= u64::from(above == tag) << (STRIDE * TAG_WORDS);
        }
        found
    }

    #[inline]
    pub(crate) fn tag(&self, lane: usize) -> u64 {
        if let Some(word) = self.tags.get(lane) {
            return word.load(Ordering::Relaxed) & TAG;
        }
        let above = self.tags.iter().rev().map(|word| word.load(Ordering::Relaxed) >> TAG_BITS);
        above.fold(0, |tag, above| tag << ABOVE_BITS | above)
    }

    /// The value in `lane`; of lanes that there are not, 0.
    #[inline(always)]
    pub(crate) fn value(&self, lane: usize) -> u64 {
        self.values.get(lane).map_or(0, |value| value.load(Ordering::Relaxed))
    }

    /// Stores an entry. Only for who holds the lock.
    pub(crate) fn set(&self, lane: usize, tag: u64, value: u64) {
        if let Some(word) = self.tags.get(lane) {
            let above = word.load(Ordering::Relaxed) & !TAG;
            word.store(above | tag, Ordering::Relaxed);
        } else {
            for (part, word) in self.tags.iter().enumerate() {
                let above = tag >> (ABOVE_BITS as usize * part) & ABOVE;
                let below = word.load(Ordering::Relaxed) & TAG;
                word.store(above << TAG_BITS | below, Ordering::Relaxed);
            }
        }
        self.set_value(lane, value);
    }

    #[inline]
    pub(crate) fn set_value(&self, lane: usize, value: u64) {
        self.values[lane].store(value, Ordering::Relaxed);
    }
}

/// Of some lanes those with this top.
#[inline]
pub(crate) fn lanes_with_top(tops: &Tops, hashed: Hashed, lanes: u64) -> u64 {
    let tops = tops.load(Ordering::Relaxed);
    (0..LANES).fold(0, |found, lane| {
        let is_it = tops >> (ABOVE_BITS as usize * lane) & ABOVE == hashed.top();
        found | (u64::from(is_it) << (STRIDE * lane) & lanes)
    })
}

pub(crate) fn top(tops: &Tops, lane: usize) -> u64 {
    tops.load(Ordering::Relaxed) >> (ABOVE_BITS as usize * lane) & ABOVE
}

/// Stores a top. Only for who holds the lock.
pub(crate) fn set_top(tops: &Tops, lane: usize, top: u64) {
    let shift = ABOVE_BITS as usize * lane;
    let others = tops.load(Ordering::Relaxed) & !(ABOVE << shift);
    tops.store(others | top << shift, Ordering::Relaxed);
}

#[cfg(all(test, loom))]
impl Line {
    /// An empty line. Those of a table are born from zeroed memory instead.
    pub(crate) fn new() -> Self {
        Self {
            word: AtomicU64::new(0),
            tags: std::array::from_fn(|_| AtomicU64::new(0)),
            values: std::array::from_fn(|_| AtomicU64::new(0)),
        }
    }
}
