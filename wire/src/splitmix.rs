//! Non-cryptographic random numbers for jitter, sampling and tests.
//!
//! The generator is SplitMix64 (G. Steele, D. Lea and C. Flood, "Fast Splittable Pseudorandom
//! Number Generators", OOPSLA 2014). The label table has its own hash.

/// The increment of the state for each number: 2⁶⁴ over the golden ratio, made odd.
pub const STEP: u64 = 0x9E37_79B9_7F4A_7C15;

/// The number of a state: a bijection that scatters neighbouring states.
#[inline]
#[must_use]
pub const fn mix(mut bits: u64) -> u64 {
    bits = (bits ^ (bits >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    bits = (bits ^ (bits >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    bits ^ (bits >> 31)
}

/// A generator whose whole state is its seed, so that its sequence can be repeated.
#[derive(Clone, Debug)]
pub struct SplitMix64(pub u64);

impl SplitMix64 {
    /// The next number.
    #[inline]
    pub const fn number(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(STEP);
        mix(self.0)
    }

    /// A number below `bound`, which is at least 1. Its bias is below `bound` over 2⁶⁴.
    #[inline]
    pub const fn below(&mut self, bound: u64) -> u64 {
        self.number() % bound
    }

    /// An index into a slice of `len` elements, at least one.
    #[inline]
    pub const fn index(&mut self, len: usize) -> usize {
        self.below(len as u64) as usize
    }

    /// A number from 0 (included) to 1 (excluded), in steps of 2⁻⁵³.
    #[inline]
    pub const fn share(&mut self) -> f64 {
        (self.number() >> 11) as f64 / (1_u64 << 53) as f64
    }
}
