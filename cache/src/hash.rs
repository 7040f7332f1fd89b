//! The hash of a key, and the part of it that a table stores.
//!
//! The mixer is a bijection, so a hash identifies its key. Its highest bits choose the bucket, and
//! need not be stored again: of `n` buckets, bucket `i` contains exactly the hashes `h` with
//! `⌊h·n / 2^64⌋ = i`. These are at most `⌈2^64 / n⌉` consecutive numbers. With 2^16 buckets or
//! more they are at most 2^48 numbers, no two of which have the same low 48 bits. These bits, the
//! *tag*, are stored; [`Span::hash`] computes the one hash of the bucket with this tag. A smaller
//! table also stores the 16 bits above the tag, the *top*, in separate memory. So two keys are
//! never confused.

/// Bits of a hash that every entry stores.
pub(crate) const TAG_BITS: u32 = 48;
/// The tag with all bits set.
pub(crate) const TAG: u64 = (1 << TAG_BITS) - 1;
/// The least number of buckets for which tags distinguish all keys of a bucket.
pub(crate) const TAGS_SUFFICE: usize = 1 << (u64::BITS - TAG_BITS);

/// The hash of a key. With it a caller can prefetch first and read later, and mixes the key once.
///
/// It does not depend on a table: each table computes its bucket from it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Hashed(u64);

impl Hashed {
    /// Mixes `key`.
    #[inline]
    pub const fn new(key: u64) -> Self {
        Self(mix(key))
    }

    /// The key.
    #[inline]
    pub const fn key(self) -> u64 {
        unmix(self.0)
    }

    /// Combines the parts that a table stores.
    #[inline]
    pub(crate) const fn from_parts(top: u64, tag: u64) -> Self {
        Self(top << TAG_BITS | tag)
    }

    /// The bucket among `buckets`: the high half of a product (Lemire, "Fast random integer
    /// generation in an interval", 2019). It needs no division and works for any count, not only
    /// for powers of two.
    #[inline]
    pub(crate) const fn bucket(self, buckets: usize) -> usize {
        ((self.0 as u128 * buckets as u128) >> 64) as usize
    }

    /// The line of the bucket in which the key is looked up first, 0 or 1. The lowest bit does not
    /// depend on the bucket.
    #[inline]
    pub(crate) const fn home(self) -> usize {
        home_of(self.0)
    }

    /// The lowest 48 bits.
    #[inline]
    pub(crate) const fn tag(self) -> u64 {
        self.0 & TAG
    }

    /// The highest 16 bits.
    #[inline]
    pub(crate) const fn top(self) -> u64 {
        self.0 >> TAG_BITS
    }

    /// The mixed hash itself.
    #[inline]
    pub(crate) const fn hash(self) -> u64 {
        self.0
    }
}

/// [`Hashed::home`] of any hash with this tag.
#[inline]
pub(crate) const fn home_of(tag: u64) -> usize {
    (tag & 1) as usize
}

/// The hashes that belong to one bucket.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Span {
    pub(crate) bucket: usize,
    pub(crate) buckets: usize,
}

impl Span {
    /// The hash in this span with this tag. There is at most one if tags suffice.
    pub(crate) fn hash(self, tag: u64) -> Hashed {
        // The least h with h·n ≥ i·2^64; it is below 2^64 because i is below n.
        let first = ((self.bucket as u128) << 64).div_ceil(self.buckets as u128) as u64;
        Hashed(first.wrapping_add(tag.wrapping_sub(first) & TAG))
    }
}

const ODD_1: u64 = 0xbf58_476d_1ce4_e5b9;
const ODD_2: u64 = 0x94d0_49bb_1331_11eb;
const INCREMENT: u64 = 0x9e37_79b9_7f4a_7c15;

/// A bijection of 64-bit words in which every input bit flips every output bit about half of the
/// time. Keys may be sequential, and the highest bits alone choose the bucket.
///
/// Multipliers and shifts are variant 13 of David Stafford's "Better Bit Mixing" (2011). That mixer
/// maps zero to itself; the golden-ratio increment of SplitMix64 avoids this.
#[inline]
const fn mix(key: u64) -> u64 {
    let mut x = key.wrapping_add(INCREMENT);
    x = (x ^ (x >> 30)).wrapping_mul(ODD_1);
    x = (x ^ (x >> 27)).wrapping_mul(ODD_2);
    x ^ (x >> 31)
}

/// The inverse of [`mix`], step by step. Two shifts undo a shift by a third of the word or more.
#[inline]
const fn unmix(hash: u64) -> u64 {
    const INVERSE_1: u64 = inverse(ODD_1);
    const INVERSE_2: u64 = inverse(ODD_2);
    let mut x = (hash ^ (hash >> 31) ^ (hash >> 62)).wrapping_mul(INVERSE_2);
    x = (x ^ (x >> 27) ^ (x >> 54)).wrapping_mul(INVERSE_1);
    (x ^ (x >> 30) ^ (x >> 60)).wrapping_sub(INCREMENT)
}

/// The number whose product with `odd` is 1 modulo 2^64. Newton's iteration doubles the number of
/// correct bits each time; an odd number is its own inverse in three bits.
const fn inverse(odd: u64) -> u64 {
    let mut x = odd;
    let mut right_bits = 3;
    while right_bits < u64::BITS {
        x = x.wrapping_mul(2u64.wrapping_sub(odd.wrapping_mul(x)));
        right_bits *= 2;
    }
    x
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    #[test]
    #[cfg_attr(miri, ignore = "needs large numbers")]
    fn sequential_and_strided_keys_spread_evenly_over_buckets() {
        // The count is not a power of two. A weak mixer would put these strides into few buckets.
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
            // 1008 degrees of freedom: mean 1008, standard deviation 45. Five of them are allowed.
            assert!((783.0..1233.0).contains(&chi2), "stride {stride}: chi-squared {chi2}");
        }
    }

    #[test]
    fn unmix_inverts_mix() {
        for key in [0, 1, u64::MAX, 0x8000_0000_0000_0000].into_iter().chain(0..1000) {
            assert_eq!(unmix(mix(key)), key);
            assert_eq!(mix(unmix(key)), key);
        }
    }

    /// Counts near the least that suffices, powers of two and their neighbours, odd numbers, and
    /// the largest.
    fn counts() -> impl Iterator<Item = usize> {
        let least = TAGS_SUFFICE;
        let odd =
            [least + 1, least + 3, 99_991, 1_000_003, 6_250_000, (1 << 31) - 1, (1 << 56) - 5];
        let powers = (16..57).map(|bits| 1usize << bits);
        powers.flat_map(|count| [count, count + 1, 2 * count - 1]).chain(odd)
    }

    #[test]
    fn bucket_and_tag_give_the_hash_for_any_number_of_buckets() {
        for buckets in counts() {
            let some = if cfg!(miri) { 3 } else { 50 };
            let of_key = (0..some).map(|n| Hashed::new(buckets as u64 ^ n));
            // The first and the last hash of some buckets, where wrong arithmetic shows first.
            let edges = (0..some).flat_map(|n| {
                let bucket = mix(n) as usize % buckets;
                let first = ((bucket as u128) << 64).div_ceil(buckets as u128) as u64;
                [first, first.wrapping_sub(1), first.wrapping_add((1 << 48) - 1), 0, u64::MAX]
            });
            for hashed in of_key.chain(edges.map(Hashed)) {
                let span = Span { bucket: hashed.bucket(buckets), buckets };
                assert_eq!(span.hash(hashed.tag()), hashed, "{buckets} buckets");
            }
        }
    }

    #[test]
    fn one_bucket_less_makes_tags_ambiguous() {
        // The bound is sharp: with one bucket less, some bucket has two hashes with the same tag.
        let buckets = TAGS_SUFFICE - 1;
        let (low, high) = (Hashed(0), Hashed::from_parts(1, 0));
        assert_eq!(low.bucket(buckets), high.bucket(buckets));
        assert_eq!(low.tag(), high.tag());
    }
}
