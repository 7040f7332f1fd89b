//! What is asked, and in which order: populations of images or keys, and access patterns.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use rand_distr::{Distribution, Zipf};

use crate::zipf::{BATCH, MAX_TABLE, ZipfTable};

/// The most images or keys in a population: they are numbered by a `u32`.
pub const MAX_POPULATION: usize = u32::MAX as usize;

/// Images of one size, with or without labels.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Population {
    bytes: Vec<u8>,
    image_len: usize,
    labels: Option<Vec<u16>>,
}

/// Why bytes and labels are not a [`Population`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum PopulationError {
    /// No image at all, or images of no bytes. There is nothing to ask about.
    #[error("a population of {bytes} bytes in images of {image_len} bytes holds no image")]
    Empty {
        /// Bytes given.
        bytes: usize,
        /// Bytes in an image.
        image_len: usize,
    },
    /// The bytes do not divide into images. Check the image's length.
    #[error("{bytes} bytes do not divide into images of {image_len} bytes")]
    Ragged {
        /// Bytes given.
        bytes: usize,
        /// Bytes in an image.
        image_len: usize,
    },
    /// More or fewer labels than images.
    #[error("there are {labels} labels for {images} images")]
    Labels {
        /// Labels given.
        labels: usize,
        /// Images given.
        images: usize,
    },
    /// More than [`MAX_POPULATION`] images.
    #[error("a population of {images} images; the limit is {MAX_POPULATION}")]
    TooLarge {
        /// Images given.
        images: usize,
    },
}

impl Population {
    /// The images of `image_len` bytes that lie one after another in `bytes`, and a label for each.
    ///
    /// # Errors
    /// [`PopulationError`] when there is no image, a part of one, or not one label for each.
    pub fn new(
        bytes: Vec<u8>,
        image_len: usize,
        labels: Option<Vec<u16>>,
    ) -> Result<Self, PopulationError> {
        let len = bytes.len();
        if len == 0 || image_len == 0 {
            return Err(PopulationError::Empty { bytes: len, image_len });
        }
        if !len.is_multiple_of(image_len) {
            return Err(PopulationError::Ragged { bytes: len, image_len });
        }
        let images = len / image_len;
        if images > MAX_POPULATION {
            return Err(PopulationError::TooLarge { images });
        }
        if let Some(labels) = labels.as_ref().map(Vec::len).filter(|&labels| labels != images) {
            return Err(PopulationError::Labels { labels, images });
        }
        Ok(Population { bytes, image_len, labels })
    }

    /// How many images there are; never 0.
    #[allow(clippy::len_without_is_empty)]
    pub fn len(&self) -> usize {
        self.bytes.len() / self.image_len
    }

    /// Bytes in each image.
    pub fn image_len(&self) -> usize {
        self.image_len
    }

    /// All the images, one after another.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// The image of this number.
    ///
    /// # Panics
    /// When `index` is not below [`Population::len`].
    #[inline]
    pub fn image(&self, index: usize) -> &[u8] {
        &self.bytes[index * self.image_len..][..self.image_len]
    }

    /// What the images are said to show, if that is known. What a model answers may differ.
    pub fn labels(&self) -> Option<&[u16]> {
        self.labels.as_deref()
    }
}

/// Keys and the one value that each may have: both follow from the key's number, so that every
/// answer of a cache can be checked without remembering what was written.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Keys {
    /// How many keys there are.
    pub count: u32,
    /// The share of requests that read, from 0 to 1. The others write.
    pub read_share: f64,
    /// Tells the key spaces of two runs apart: two salts share no more than chance keys.
    pub salt: u64,
}

impl Keys {
    /// The key of this number. Two numbers below 2³² never share one.
    #[inline]
    pub fn key(&self, index: u32) -> u64 {
        mix(u64::from(index).wrapping_add(self.salt))
    }

    /// The only value that this key is ever given.
    #[inline]
    pub fn value(&self, key: u64) -> i64 {
        mix(key ^ 0x5bf0_3635_dcd1_6e27).cast_signed()
    }
}

/// A bijection of 64 bits that scatters neighbours: the finalizer of SplitMix64 (Steele, Lea and
/// Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014, figure 16).
#[inline]
fn mix(value: u64) -> u64 {
    let mut z = value.wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// In which order a population is asked about.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Access {
    /// Each one as likely as another.
    Uniform,
    /// The one of rank `k` (its number plus one) with a likelihood that goes as `k^-exponent`.
    Zipf {
        /// 0 is uniform; 1 is Zipf's law; above, ever fewer are ever more popular.
        exponent: f64,
    },
    /// One after another, over and over; each connection takes every n-th.
    Sequential,
    /// One after another, each once; the run ends when all have been asked about.
    EachOnce,
}

/// An access pattern over a population: what the orders of all connections have in common.
#[derive(Clone, Debug)]
pub(crate) struct Pattern {
    count: u32,
    access: Access,
    zipf: Option<ZipfKind>,
}

#[derive(Clone, Debug)]
enum ZipfKind {
    Table(Arc<ZipfTable>),
    Computed(Zipf<f64>),
}

/// The order of one connection: a stream of numbers below the population's size.
#[derive(Clone, Debug)]
pub(crate) struct Draw {
    rng: ChaCha8Rng,
    count: u32,
    order: Order,
}

#[derive(Clone, Debug)]
enum Order {
    Uniform,
    /// Looked up, some at a time; `next` is the first in `drawn` that was not handed out.
    Table {
        table: Arc<ZipfTable>,
        drawn: [u32; BATCH],
        next: usize,
    },
    Computed(Zipf<f64>),
    Stride {
        next: u64,
        stride: u64,
        wraps: bool,
    },
}

impl Pattern {
    /// The pattern over a population of `count`; `None` for none, and for an exponent that is negative
    /// or not a number.
    pub(crate) fn new(access: Access, count: u32) -> Option<Self> {
        let zipf = match access {
            Access::Zipf { exponent } => {
                let computed = Zipf::new(f64::from(count), exponent).ok()?;
                Some(if count <= MAX_TABLE {
                    ZipfKind::Table(Arc::new(ZipfTable::new(count, exponent)))
                } else {
                    ZipfKind::Computed(computed)
                })
            }
            _ => None,
        };
        (count > 0).then_some(Pattern { count, access, zipf })
    }

    /// [`Access::EachOnce`], which can be had of any population.
    pub(crate) fn each_once(count: u32) -> Self {
        Pattern { count, access: Access::EachOnce, zipf: None }
    }

    /// The order of connection `lane` of `lanes`.
    pub(crate) fn draw(&self, seed: u64, lane: u32, lanes: u32) -> Draw {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        rng.set_stream(lane.into());
        let wraps = self.access != Access::EachOnce;
        let order = match (self.access, &self.zipf) {
            (Access::Uniform, _) => Order::Uniform,
            (_, Some(ZipfKind::Table(table))) => {
                Order::Table { table: Arc::clone(table), drawn: [0; BATCH], next: BATCH }
            }
            (_, Some(ZipfKind::Computed(zipf))) => Order::Computed(*zipf),
            (_, None) => Order::Stride { next: lane.into(), stride: lanes.into(), wraps },
        };
        Draw { rng, count: self.count, order }
    }
}

impl Draw {
    /// The next number, or `None` when each has been drawn once.
    #[inline]
    pub(crate) fn next(&mut self) -> Option<u32> {
        match &mut self.order {
            Order::Uniform => {
                // Lemire's multiplication, without its rejection step: with 32 spare bits the
                // likelihoods of two numbers differ by less than one in 2³².
                let wide = u128::from(self.rng.next_u64()) * u128::from(self.count);
                Some((wide >> 64) as u32)
            }
            Order::Table { table, drawn, next } => {
                if *next == BATCH {
                    table.fill(&mut self.rng, drawn);
                    *next = 0;
                }
                *next += 1;
                Some(drawn[*next - 1])
            }
            Order::Computed(zipf) => {
                let rank = zipf.sample(&mut self.rng);
                Some((rank as u32).clamp(1, self.count) - 1)
            }
            Order::Stride { next, stride, wraps } => {
                if *next >= u64::from(self.count) {
                    if !*wraps {
                        return None;
                    }
                    *next %= u64::from(self.count);
                }
                let index = *next as u32;
                *next += *stride;
                Some(index)
            }
        }
    }

    /// True with likelihood `threshold` / 2³².
    #[inline]
    pub(crate) fn chance(&mut self, threshold: u64) -> bool {
        threshold > u64::from(u32::MAX) || u64::from(self.rng.next_u32()) < threshold
    }
}

/// The answers that images must get: the label known beforehand, or the first one that came.
///
/// Shared by all connections of a run; give the same one to two runs and they are checked against
/// each other.
#[derive(Debug)]
pub struct Answers(Vec<AtomicU32>);

/// Stands for "no answer yet" and is no label: labels have 16 bits.
const NO_ANSWER: u32 = u32::MAX;

impl Answers {
    /// For `count` images: whatever comes first for each is what must come from then on.
    pub fn first_come(count: usize) -> Self {
        Answers((0..count).map(|_| AtomicU32::new(NO_ANSWER)).collect())
    }

    /// The labels that must come.
    pub fn known(labels: &[u16]) -> Self {
        Answers(labels.iter().map(|&label| AtomicU32::new(label.into())).collect())
    }

    /// How many images this has room for.
    #[allow(clippy::len_without_is_empty)]
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// The answer that image `index` must get, once that is known.
    pub fn expected(&self, index: usize) -> Option<u16> {
        let label = self.0.get(index)?.load(Ordering::Relaxed);
        u16::try_from(label).ok()
    }

    /// Whether `class` is the right answer for image `index`; otherwise the right one.
    #[inline]
    pub(crate) fn check(&self, index: u32, class: u16) -> Result<(), u16> {
        let Some(cell) = self.0.get(index as usize) else {
            return Ok(());
        };
        let mut expected = cell.load(Ordering::Relaxed);
        if expected == NO_ANSWER {
            let first = cell.compare_exchange(
                NO_ANSWER,
                class.into(),
                Ordering::Relaxed,
                Ordering::Relaxed,
            );
            expected = first.err().unwrap_or(class.into());
        }
        if expected == u32::from(class) { Ok(()) } else { Err(expected as u16) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    fn draws(access: Access, count: u32, lane: u32, lanes: u32) -> impl Iterator<Item = u32> {
        let mut draw = Pattern::new(access, count).unwrap().draw(11, lane, lanes);
        std::iter::from_fn(move || draw.next())
    }

    #[test]
    fn zipf_frequencies_follow_the_law_looked_up_and_computed() {
        const SIZE: u32 = 1000;
        const DRAWS: u32 = 400_000;
        for (exponent, computed) in [(0.7, false), (1.0, false), (1.3, false), (1.0, true)] {
            let mut pattern = Pattern::new(Access::Zipf { exponent }, SIZE).unwrap();
            if computed {
                let zipf = Zipf::new(f64::from(SIZE), exponent).unwrap();
                pattern.zipf = Some(ZipfKind::Computed(zipf));
            }
            let mut draw = pattern.draw(11, 0, 1);
            let mut seen = [0u32; SIZE as usize];
            for _ in 0..DRAWS {
                seen[draw.next().unwrap() as usize] += 1;
            }
            let weight = |rank: u32| f64::from(rank).powf(-exponent);
            let total: f64 = (1..=SIZE).map(weight).sum();
            // Single ranks within five standard deviations; all of them together by χ², whose mean is
            // 999 and whose standard deviation is √(2·999) = 45.
            let mut chi_squared = 0.0;
            for rank in 1..=SIZE {
                let likelihood = weight(rank) / total;
                let expected = f64::from(DRAWS) * likelihood;
                let off = f64::from(seen[rank as usize - 1]) - expected;
                let deviation = (expected * (1.0 - likelihood)).sqrt();
                assert!(off.abs() < 5.0 * deviation, "s = {exponent}, rank {rank}: off by {off}");
                chi_squared += off * off / expected;
            }
            assert!((775.0..1225.0).contains(&chi_squared), "s = {exponent}: χ² = {chi_squared}");
        }
    }

    #[test]
    fn uniform_draws_are_even_and_stay_below_the_size() {
        let mut seen = [0u32; 100];
        for index in draws(Access::Uniform, 100, 0, 1).take(100_000) {
            seen[index as usize] += 1;
        }
        // Five standard deviations of a binomial with n = 100 000, p = 0.01.
        assert!(seen.iter().all(|count| (843..=1157).contains(count)), "{seen:?}");
    }

    #[test]
    fn connections_share_a_scan_and_go_on_for_ever() {
        let lane: Vec<u32> = draws(Access::Sequential, 7, 1, 3).take(7).collect();
        assert_eq!(lane, [1, 4, 0, 3, 6, 2, 5]);
    }

    #[test]
    fn each_once_ends_after_the_last() {
        let mut all: Vec<u32> = (0..4).flat_map(|l| draws(Access::EachOnce, 10, l, 4)).collect();
        all.sort_unstable();
        assert_eq!(all, (0..10).collect::<Vec<_>>());
    }

    #[test]
    fn keys_are_distinct_and_each_has_its_value() {
        let keys = Keys { count: 100_000, read_share: 1.0, salt: 3 };
        let distinct: HashSet<u64> = (0..keys.count).map(|i| keys.key(i)).collect();
        assert_eq!(distinct.len(), 100_000);
        let values: HashSet<i64> = distinct.iter().map(|&key| keys.value(key)).collect();
        assert_eq!(values.len(), 100_000);
    }

    #[test]
    fn chance_holds_its_odds_at_both_ends_and_between() {
        let mut draw = Pattern::new(Access::Uniform, 1).unwrap().draw(1, 0, 1);
        let mut count = |threshold| (0..10_000).filter(|_| draw.chance(threshold)).count();
        assert_eq!((count(0), count(1 << 32)), (0, 10_000));
        assert!((2284..2716).contains(&count(1 << 30)));
    }

    #[test]
    fn a_population_is_whole_images_with_a_label_each() {
        let ragged = Population::new(vec![0; 10], 4, None);
        assert_eq!(ragged, Err(PopulationError::Ragged { bytes: 10, image_len: 4 }));
        let short = Population::new(vec![0; 8], 4, Some(vec![1]));
        assert_eq!(short, Err(PopulationError::Labels { labels: 1, images: 2 }));
        assert!(matches!(Population::new(vec![], 4, None), Err(PopulationError::Empty { .. })));
        let whole = Population::new(vec![1, 2, 3, 4], 2, Some(vec![5, 6])).unwrap();
        assert_eq!((whole.len(), whole.image(1)), (2, &[3, 4][..]));
    }

    #[test]
    fn the_first_answer_binds_all_that_follow() {
        let answers = Answers::first_come(2);
        assert_eq!(answers.expected(0), None);
        assert_eq!(answers.check(0, 7), Ok(()));
        assert_eq!(answers.check(0, 7), Ok(()));
        assert_eq!(answers.check(0, 8), Err(7));
        assert_eq!(answers.check(1, u16::MAX), Ok(()));
        assert_eq!(answers.expected(1), Some(u16::MAX));
        assert_eq!(Answers::known(&[3]).check(0, 4), Err(3));
    }
}
