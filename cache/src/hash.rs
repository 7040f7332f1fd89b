//! From a key to its place: the mixer, the handle that keeps what it computed, and how little of it
//! has to be stored.
//!
//! The mixer is a bijection, so a hash stands for its key. The bucket is chosen by the hash's
//! highest bits, so the bucket's number is a part of the hash that need not be stored again: of `n`
//! buckets, number `i` holds just the hashes `h` with `⌊h·n / 2^64⌋ = i`, which are neighbours, at
//! most `⌈2^64 / n⌉` of them. From 2^16 buckets on those are at most 2^48, and of so many
//! neighbours no two have the same low 48 bits. These bits, the *tag*, are stored; [`Span::hash`]
//! finds the one hash in the bucket that has them. In a smaller table the 16 bits above the tag,
//! the *top*, are stored too, elsewhere. So two keys are never taken for each other.

/// Bits of a hash that every entry stores.
pub(crate) const TAG_BITS: u32 = 48;
/// A tag, all of whose bits are set.
pub(crate) const TAG: u64 = (1 << TAG_BITS) - 1;
/// From so many buckets on a tag is enough to tell a bucket's keys apart.
pub(crate) const TAGS_SUFFICE: usize = 1 << (u64::BITS - TAG_BITS);

/// A key, mixed, so that a caller can mix once, prefetch, and read later.
///
/// It is made by [`Hashed::new`] and belongs to no table: the bucket is computed from it by the
/// table that is asked.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Hashed(u64);

impl Hashed {
    /// Mixes `key`.
    #[inline]
    pub const fn new(key: u64) -> Self {
        Self(mix(key))
    }

    /// The key that was mixed.
    #[inline]
    pub const fn key(self) -> u64 {
        unmix(self.0)
    }

    /// A hash of which all bits were stored.
    #[inline]
    pub(crate) const fn from_parts(top: u64, tag: u64) -> Self {
        Self(top << TAG_BITS | tag)
    }

    /// The bucket among `buckets`, by the high half of a product (Lemire, "Fast random integer
    /// generation in an interval", 2019): no division, and any count will do, not only powers of
    /// two.
    #[inline]
    pub(crate) const fn bucket(self, buckets: usize) -> usize {
        ((self.0 as u128 * buckets as u128) >> 64) as usize
    }

    /// The line of the bucket where the key is looked for first, 0 or 1: by the lowest bit, which
    /// says nothing of the bucket.
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

/// The hashes that belong into one bucket of many.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Span {
    pub(crate) bucket: usize,
    pub(crate) buckets: usize,
}

impl Span {
    /// The hash in this span that has this tag. There is one at most if tags suffice.
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
/// time: foreign keys may be sequential, and the bucket is chosen by the highest bits alone.
///
/// Multipliers and shifts are variant 13 of David Stafford's "Better Bit Mixing" (2011). Zero,
/// which that mixer maps to itself, is moved away by the golden-ratio increment of SplitMix64.
#[inline]
const fn mix(key: u64) -> u64 {
    let mut x = key.wrapping_add(INCREMENT);
    x = (x ^ (x >> 30)).wrapping_mul(ODD_1);
    x = (x ^ (x >> 27)).wrapping_mul(ODD_2);
    x ^ (x >> 31)
}

/// [`mix`] undone, step by step. A shift by a third of the word or more is undone by two shifts.
#[inline]
const fn unmix(hash: u64) -> u64 {
    const INVERSE_1: u64 = inverse(ODD_1);
    const INVERSE_2: u64 = inverse(ODD_2);
    let mut x = (hash ^ (hash >> 31) ^ (hash >> 62)).wrapping_mul(INVERSE_2);
    x = (x ^ (x >> 27) ^ (x >> 54)).wrapping_mul(INVERSE_1);
    (x ^ (x >> 30) ^ (x >> 60)).wrapping_sub(INCREMENT)
}

/// The number whose product with `odd` is 1 modulo 2^64, by Newton's iteration, which doubles the
/// right bits each time; an odd number is its own inverse in three bits.
const fn inverse(odd: u64) -> u64 {
    let mut x = odd;
    let mut right_bits = 3;
    while right_bits < u64::BITS {
        x = x.wrapping_mul(2u64.wrapping_sub(odd.wrapping_mul(x)));
        right_bits *= 2;
    }
    x
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
        for key in [0, 1, u64::MAX, 0x8000_0000_0000_0000].into_iter().chain(0..1000) {
            assert_eq!(unmix(mix(key)), key);
            assert_eq!(mix(unmix(key)), key);
        }
    }

    /// Counts around the least that suffices, powers of two and their neighbours, odd ones, the
    /// largest.
    fn counts() -> impl Iterator<Item = usize> {
        let least = TAGS_SUFFICE;
        let odd =
            [least + 1, least + 3, 99_991, 1_000_003, 6_250_000, (1 << 31) - 1, (1 << 56) - 5];
        let powers = (16..57).map(|bits| 1usize << bits);
        powers.flat_map(|count| [count, count + 1, 2 * count - 1]).chain(odd)
    }

    #[test]
    fn bucket_and_tag_give_the_hash_back_whatever_the_number_of_buckets() {
        for buckets in counts() {
            let some = if cfg!(miri) { 3 } else { 50 };
            let of_key = (0..some).map(|n| Hashed::new(buckets as u64 ^ n));
            // The first and the last hash of some buckets, where the arithmetic would go wrong
            // first.
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
    fn fewer_buckets_would_not_do() {
        // The bound is sharp: with one bucket less, some bucket has two hashes of one tag.
        let buckets = TAGS_SUFFICE - 1;
        let (low, high) = (Hashed(0), Hashed::from_parts(1, 0));
        assert_eq!(low.bucket(buckets), high.bucket(buckets));
        assert_eq!(low.tag(), high.tag());
    }
}
