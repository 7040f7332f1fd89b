//! New images and keys: the misses of a workload with a hit ratio.

use std::time::{SystemTime, UNIX_EPOCH};

use super::Keys;
use super::population::mix;

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
        // The same connection of another run asks for other images.
        let stamped = |nonce| {
            let mut image = [0; STAMP_LEN];
            Fresh::new(0, nonce).stamp(&mut image);
            image
        };
        assert_ne!(stamped(1), stamped(2));
    }
}
