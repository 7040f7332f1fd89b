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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_match_the_reference() {
        // The first numbers of the reference implementation with the state 1234567.
        let mut random = SplitMix64(1_234_567);
        let numbers = [(); 3].map(|()| random.number());
        assert_eq!(
            numbers,
            [6_457_827_717_110_365_317, 3_203_168_211_198_807_973, 9_817_491_932_198_370_423]
        );
    }

    #[test]
    fn numbers_stay_within_their_bounds() {
        let mut random = SplitMix64(7);
        let mut seen = [0; 10];
        for _ in 0..10_000 {
            seen[random.index(10)] += 1;
            assert!((0.0..1.0).contains(&random.share()) && random.below(3) < 3);
        }
        assert!(seen.iter().all(|&count| count > 800), "{seen:?}");
    }
}
