//! Populations of images or keys with their expected answers, and fresh images and keys, the misses
//! of a workload with a hit ratio.

use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{SystemTime, UNIX_EPOCH};

use afterimage_wire::splitmix;

/// The most images or keys in a population: they are numbered by a `u32`, two of which are
/// marks.
pub const MAX_POPULATION: usize = u32::MAX as usize - 1;

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

    /// The labels of the images, if known. A model may answer otherwise.
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
    /// Separates the key spaces of two runs: keys of two salts are equal by chance only.
    pub salt: u64,
}

impl Keys {
    /// The key of this number. Two numbers below 2³² never share one.
    #[inline]
    pub fn key(&self, index: u32) -> u64 {
        mix(u64::from(index).wrapping_add(self.salt))
    }

    /// A key that no number below 2³² has.
    #[inline]
    pub(crate) fn beyond(&self, number: u64) -> u64 {
        mix((number | 1 << 63).wrapping_add(self.salt))
    }

    /// The only value that this key is ever given.
    #[inline]
    pub fn value(&self, key: u64) -> i64 {
        mix(key ^ 0x5bf0_3635_dcd1_6e27).cast_signed()
    }
}

/// A bijection of 64 bits that scatters neighbours, and moves zero as well.
#[inline]
pub(super) fn mix(value: u64) -> u64 {
    splitmix::mix(value.wrapping_add(splitmix::STEP))
}

/// The expected answers of images: known labels, or the first answers.
///
/// Shared by all connections of a run; give the same one to two runs and they are checked against
/// each other.
#[derive(Debug)]
pub struct Answers(Vec<AtomicU32>);

/// Stands for "no answer yet" and is no label: labels have 16 bits.
const NO_ANSWER: u32 = u32::MAX;

impl Answers {
    /// For `count` images: the first answer for each is the expected one.
    pub fn first_come(count: usize) -> Self {
        Answers((0..count).map(|_| AtomicU32::new(NO_ANSWER)).collect())
    }

    /// The expected labels.
    pub fn known(labels: &[u16]) -> Self {
        Answers(labels.iter().map(|&label| AtomicU32::new(label.into())).collect())
    }

    /// The number of images that this can hold.
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

/// Bytes at the end of an image that make it another one.
pub(crate) const STAMP_LEN: usize = 8;

/// Bits of a number that count; those above name the connection.
const COUNT_BITS: u32 = 40;

/// Numbers that are unique to one connection of one run.
#[derive(Clone, Debug)]
pub(crate) struct Fresh {
    next: u64,
    /// Different in each run: a memo has stored the answers of the run before.
    nonce: u64,
}

impl Fresh {
    /// The numbers of connection `lane` of the run with this nonce.
    pub(crate) fn new(lane: u32, nonce: u64) -> Self {
        Fresh { next: u64::from(lane) << COUNT_BITS, nonce }
    }

    /// The nonce of a run that begins now.
    pub(crate) fn nonce() -> u64 {
        let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        mix(since.as_nanos() as u64)
    }

    fn next(&mut self) -> u64 {
        self.next += 1;
        self.next
    }

    /// A key that is in no population and is never written.
    #[inline]
    pub(crate) fn key(&mut self, keys: &Keys) -> u64 {
        keys.beyond(self.next())
    }

    /// Turns the image at the end of `frame`, of at least [`STAMP_LEN`] bytes, into a new one.
    #[inline]
    pub(crate) fn stamp(&mut self, frame: &mut [u8]) {
        let stamp = mix(self.nonce.wrapping_add(self.next())).to_le_bytes();
        if let Some(end) = frame.last_chunk_mut::<STAMP_LEN>() {
            for (byte, stamp) in end.iter_mut().zip(stamp) {
                *byte ^= stamp;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    #[test]
    fn keys_are_distinct_and_each_has_its_value() {
        let keys = Keys { count: 100_000, read_share: 1.0, salt: 3 };
        let distinct: HashSet<u64> = (0..keys.count).map(|i| keys.key(i)).collect();
        assert_eq!(distinct.len(), 100_000);
        let values: HashSet<i64> = distinct.iter().map(|&key| keys.value(key)).collect();
        assert_eq!(values.len(), 100_000);
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

    #[test]
    fn fresh_keys_and_images_never_repeat_one_another() {
        let keys = Keys { count: 1000, read_share: 1.0, salt: 7 };
        let mut seen: HashSet<u64> = (0..keys.count).map(|index| keys.key(index)).collect();
        let mut images = HashSet::new();
        for (lane, nonce) in [(0, 1), (1, 1), (2, 2)] {
            let mut fresh = Fresh::new(lane, nonce);
            for _ in 0..1000 {
                assert!(seen.insert(fresh.key(&keys)));
                let mut image = [5; 12];
                fresh.stamp(&mut image);
                assert_eq!(&image[..4], &[5; 4]);
                assert!(images.insert(image));
            }
        }
        // The same connection of another run requests other images.
        let stamped = |nonce| {
            let mut image = [0; STAMP_LEN];
            Fresh::new(0, nonce).stamp(&mut image);
            image
        };
        assert_ne!(stamped(1), stamped(2));
    }
}
