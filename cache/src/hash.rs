//! From a key to its bucket: the mixer and the handle that keeps what it computed.

/// A key together with its mixed hash, so that a caller can mix once, prefetch, and read later.
///
/// It is made by [`Hashed::new`] and belongs to no table: the bucket is computed from it by the table
/// that is asked.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Hashed {
    key: u64,
    hash: u64,
}

impl Hashed {
    /// Mixes `key`.
    #[inline]
    pub const fn new(key: u64) -> Self {
        Self { key, hash: mix(key) }
    }

    /// The key that was mixed.
    #[inline]
    pub const fn key(self) -> u64 {
        self.key
    }

    /// The bucket among `buckets`, by the high half of a product (Lemire, "Fast random integer
    /// generation in an interval", 2019): no division, and any count will do, not only powers of two.
    #[inline]
    pub(crate) const fn bucket(self, buckets: usize) -> usize {
        ((self.hash as u128 * buckets as u128) >> 64) as usize
    }

    /// The mixed hash itself.
    #[inline]
    pub(crate) const fn hash(self) -> u64 {
        self.hash
    }
}

/// A bijection of 64-bit words in which every input bit flips every output bit about half of the time:
/// foreign keys may be sequential, and the bucket is chosen by the highest bits alone.
///
/// Multipliers and shifts are variant 13 of David Stafford's "Better Bit Mixing" (2011). Zero, which
/// that mixer maps to itself, is moved away by the golden-ratio increment of SplitMix64.
#[inline]
const fn mix(key: u64) -> u64 {
    let mut x = key.wrapping_add(0x9e37_79b9_7f4a_7c15);
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

#[cfg(test)]
#[cfg(not(loom))]
mod tests {
    use super::*;

    #[test]
    #[cfg_attr(miri, ignore = "a matter of large numbers")]
    fn sequential_and_strided_keys_spread_evenly_over_buckets() {
        // A count that is no power of two; strides that a weak mixer would fold onto few buckets.
        const BUCKETS: usize = 1009;
        const PER_BUCKET: usize = 100;
        for stride in [1u64, 7, 64, 1 << 12, 1 << 32, 1 << 44] {
            let mut counts = [0usize; BUCKETS];
            for i in 0..(BUCKETS * PER_BUCKET) as u64 {
                counts[Hashed::new(i.wrapping_mul(stride)).bucket(BUCKETS)] += 1;
            }
            let chi2: f64 = counts
                .iter()
                .map(|&c| (c as f64 - PER_BUCKET as f64).powi(2) / PER_BUCKET as f64)
                .sum();
            // 1008 degrees of freedom: mean 1008, standard deviation 45; five of them allowed.
            assert!((783.0..1233.0).contains(&chi2), "stride {stride}: chi-squared {chi2}");
        }
    }

    #[test]
    fn the_mixer_can_be_undone_so_no_two_keys_share_a_hash() {
        fn unshift(mut x: u64, by: u32) -> u64 {
            let original = x;
            for _ in 0..64 / by + 1 {
                x = original ^ (x >> by);
            }
            x
        }
        fn inverse(odd: u64) -> u64 {
            // Newton's iteration doubles the correct bits each time, from three.
            (0..5).fold(odd, |x, _| x.wrapping_mul(2u64.wrapping_sub(odd.wrapping_mul(x))))
        }
        let unmix = |mut x: u64| {
            x = unshift(x, 31).wrapping_mul(inverse(0x94d0_49bb_1331_11eb));
            x = unshift(x, 27).wrapping_mul(inverse(0xbf58_476d_1ce4_e5b9));
            unshift(x, 30).wrapping_sub(0x9e37_79b9_7f4a_7c15)
        };
        for key in [0, 1, u64::MAX, 0x8000_0000_0000_0000].into_iter().chain(0..1000) {
            assert_eq!(unmix(mix(key)), key);
        }
    }
}
