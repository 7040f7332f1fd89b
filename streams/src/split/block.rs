//! Sixty-four bytes at once: a bit for each byte of a class.
//!
//! SSE2 is part of every x86-64 processor, so its instructions need no check. Other processors take
//! eight bytes at a time.

/// Bytes of a block.
pub(super) const BLOCK: usize = 64;

/// Sixty-four bytes.
pub(super) struct Block([Lane; LANES]);

impl Block {
    /// The block that begins at `at`, and the number of its bytes inside `input`. The bytes behind
    /// the end are zeros.
    #[inline]
    pub(super) fn load(input: &[u8], at: usize) -> (Self, usize) {
        let rest = &input[at..];
        match rest.first_chunk::<BLOCK>() {
            Some(bytes) => (Block::new(bytes), BLOCK),
            None => {
                let mut bytes = [0; BLOCK];
                bytes[..rest.len()].copy_from_slice(rest);
                (Block::new(&bytes), rest.len())
            }
        }
    }

    /// A bit for each byte that is `wanted`.
    #[inline]
    pub(super) fn equal(&self, wanted: u8) -> u64 {
        self.bits(|lane| lane_equal(lane, wanted))
    }

    /// A bit for each byte that is `wanted` once its bit 0x20 is set: `{` and `[` differ in it
    /// only, and so do `}` and `]`.
    #[inline]
    pub(super) fn equal_folded(&self, wanted: u8) -> u64 {
        self.bits(|lane| lane_equal_folded(lane, wanted))
    }

    #[inline]
    fn bits(&self, of: impl Fn(Lane) -> u64) -> u64 {
        let mut bits = 0;
        for (i, lane) in self.0.iter().enumerate() {
            bits |= of(*lane) << (i * (BLOCK / LANES));
        }
        bits
    }
}

#[inline]
fn word(bytes: &[u8; BLOCK], at: usize) -> u64 {
    let mut word = [0; 8];
    word.copy_from_slice(&bytes[at..at + 8]);
    u64::from_le_bytes(word)
}

#[cfg(target_arch = "x86_64")]
#[allow(unsafe_code, reason = "instructions of the processor")]
mod lanes {
    use std::arch::x86_64::{
        __m128i, _mm_cmpeq_epi8, _mm_movemask_epi8, _mm_or_si128, _mm_set_epi64x, _mm_set1_epi8,
    };

    use super::{BLOCK, Block, word};

    pub(super) type Lane = __m128i;
    pub(super) const LANES: usize = BLOCK / 16;

    impl Block {
        #[inline]
        pub(super) fn new(bytes: &[u8; BLOCK]) -> Self {
            Block(std::array::from_fn(|i| {
                let (low, high) = (word(bytes, 16 * i), word(bytes, 16 * i + 8));
                // SAFETY: every x86-64 processor has SSE2.
                unsafe { lane(low, high) }
            }))
        }
    }

    #[inline]
    pub(super) fn lane_equal(lane: Lane, wanted: u8) -> u64 {
        // SAFETY: every x86-64 processor has SSE2.
        unsafe { equal(lane, wanted) }
    }

    #[inline]
    pub(super) fn lane_equal_folded(lane: Lane, wanted: u8) -> u64 {
        // SAFETY: every x86-64 processor has SSE2.
        unsafe { equal_folded(lane, wanted) }
    }

    #[inline]
    #[target_feature(enable = "sse2")]
    fn lane(low: u64, high: u64) -> Lane {
        _mm_set_epi64x(high.cast_signed(), low.cast_signed())
    }

    #[inline]
    #[target_feature(enable = "sse2")]
    fn equal(lane: Lane, wanted: u8) -> u64 {
        let equal = _mm_cmpeq_epi8(lane, _mm_set1_epi8(wanted.cast_signed()));
        u64::from(_mm_movemask_epi8(equal).cast_unsigned())
    }

    #[inline]
    #[target_feature(enable = "sse2")]
    fn equal_folded(lane: Lane, wanted: u8) -> u64 {
        equal(_mm_or_si128(lane, _mm_set1_epi8(0x20)), wanted)
    }
}

#[cfg(not(target_arch = "x86_64"))]
mod lanes {
    use super::{BLOCK, Block, word};

    pub(super) type Lane = u64;
    pub(super) const LANES: usize = BLOCK / 8;

    const LOW: u64 = 0x0101_0101_0101_0101;
    const HIGH: u64 = LOW << 7;

    impl Block {
        #[inline]
        pub(super) fn new(bytes: &[u8; BLOCK]) -> Self {
            Block(std::array::from_fn(|i| word(bytes, 8 * i)))
        }
    }

    #[inline]
    pub(super) fn lane_equal(lane: Lane, wanted: u8) -> u64 {
        let differs = lane ^ (LOW * u64::from(wanted));
        // The high bit of each byte that is zero. No carry passes from one byte to the next.
        let zeros = !(((differs & !HIGH) + !HIGH) | differs) & HIGH;
        // Moves the eight high bits into one byte.
        (zeros >> 7).wrapping_mul(0x0102_0408_1020_4080) >> 56
    }

    #[inline]
    pub(super) fn lane_equal_folded(lane: Lane, wanted: u8) -> u64 {
        lane_equal(lane | (LOW << 5), wanted)
    }
}

use lanes::{LANES, Lane, lane_equal, lane_equal_folded};

/// Bit `i` is the parity of the bits up to and including `i`: with quotes as the bits, it is set
/// from an opening quote to the byte before the closing one.
#[inline]
pub(super) fn prefix_xor(mut bits: u64) -> u64 {
    for shift in [1, 2, 4, 8, 16, 32] {
        bits ^= bits << shift;
    }
    bits
}

/// The bits from `at` on; none if `at` is 64.
#[inline]
pub(super) fn from(at: usize) -> u64 {
    if at < BLOCK { u64::MAX << at } else { 0 }
}

/// The `len` lowest bits.
#[inline]
pub(super) fn below(len: usize) -> u64 {
    !from(len)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_block_has_a_bit_for_each_equal_byte() {
        let mut seed = 1_u64;
        for len in 0..200 {
            let mut bytes = Vec::new();
            for _ in 0..len {
                seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                bytes.push(b"[]{}\"\\,\n\0\x7b\x5b\xfb\xdb"[(seed >> 40) as usize % 13]);
            }
            for at in 0..len {
                let (block, inside) = Block::load(&bytes, at);
                assert_eq!(inside, (len - at).min(BLOCK));
                for wanted in *b"[]{}\"\\,\n" {
                    let bit = |i: usize| u64::from(bytes[at + i] == wanted) << i;
                    let expected = (0..inside).map(bit).fold(0, |all, bit| all | bit);
                    assert_eq!(block.equal(wanted), expected, "{wanted} at {at} of {len}");
                    let folded = wanted | 0x20;
                    let bit = |i: usize| u64::from(bytes[at + i] | 0x20 == folded) << i;
                    let expected = (0..inside).map(bit).fold(0, |all, bit| all | bit);
                    assert_eq!(block.equal_folded(folded) & below(inside), expected);
                }
            }
        }
    }
}
