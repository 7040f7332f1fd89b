//! A cache line of a bucket: a word, and the tags and values of four entries. [`crate::layout`] has
//! its bits, [`crate::bucket`] the protocol of readers and writers.

use crate::hash::{Hashed, TAG, TAG_BITS};
use crate::layout::{LANES, STRIDE, TAG_WORDS};
use crate::sync::{AtomicU64, Ordering};

/// Bits of the last lane's tag that a word holds above its own tag.
const ABOVE_BITS: u32 = u64::BITS - TAG_BITS;
const ABOVE: u64 = (1 << ABOVE_BITS) - 1;
const _: () = assert!(3 * ABOVE_BITS == TAG_BITS);

/// See the [module](self).
#[cfg_attr(not(loom), repr(C, align(64)))]
#[derive(Default)]
pub(crate) struct Line {
    pub(crate) word: AtomicU64,
    tags: [AtomicU64; TAG_WORDS],
    values: [AtomicU64; LANES],
}

#[cfg(not(loom))]
const _: () = assert!(size_of::<Line>() == 64 && align_of::<Line>() == 64);

/// The tops of a line's entries, in a table that stores them: 16 bits each, lane 0 lowest.
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

    /// The value in `lane`. A lane out of range gives 0.
    #[inline(always)]
    pub(crate) fn value(&self, lane: usize) -> u64 {
        self.values.get(lane).map_or(0, |value| value.load(Ordering::Relaxed))
    }

    /// Stores an entry. Only the holder of the lock may call this.
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

/// The lanes among `lanes` whose top is that of `hashed`.
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

/// Stores a top. Only the holder of the lock may call this.
pub(crate) fn set_top(tops: &Tops, lane: usize, top: u64) {
    let shift = ABOVE_BITS as usize * lane;
    let others = tops.load(Ordering::Relaxed) & !(ABOVE << shift);
    tops.store(others | top << shift, Ordering::Relaxed);
}
