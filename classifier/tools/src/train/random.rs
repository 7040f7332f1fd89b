//! Random numbers that are the same on every machine: ChaCha8 keyed with the seed and the purpose,
//! and a few distributions. They are implemented here, so that a new version of a library does not
//! change a model.

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};

pub struct Random(ChaCha8Rng);

impl Random {
    /// Numbers for one purpose. Each purpose, and each place within it, has its own stream, so that
    /// work can be divided among threads in any way.
    pub fn new(seed: u64, purpose: &[u8; 8], place: u64) -> Self {
        let mut key = [0; 32];
        key[..8].copy_from_slice(&seed.to_le_bytes());
        key[8..16].copy_from_slice(purpose);
        key[16..24].copy_from_slice(&place.to_le_bytes());
        Self(ChaCha8Rng::from_seed(key))
    }

    /// A whole number from 0 to `bound - 1`. Its bias is below `bound / 2⁶⁴`.
    pub fn below(&mut self, bound: usize) -> usize {
        ((u128::from(self.0.next_u64()) * bound as u128) >> 64) as usize
    }

    /// A number from 0 to 1, without 1, with 24 random bits.
    pub fn uniform(&mut self) -> f64 {
        f64::from(self.0.next_u32() >> 8) / f64::from(1 << 24)
    }

    /// A number from −1 to 1, without 1.
    pub fn symmetric(&mut self) -> f64 {
        2.0 * self.uniform() - 1.0
    }

    /// An almost normally distributed number within ±6: the sum of twelve uniform numbers (Irwin
    /// and Hall, 1927). It needs no logarithm.
    pub fn normal(&mut self) -> f64 {
        (0..12).map(|_| self.uniform()).sum::<f64>() - 6.0
    }

    /// The numbers from 0 to `len - 1` in random order (the Fisher–Yates shuffle).
    pub fn permutation(&mut self, len: usize) -> Vec<u32> {
        let mut order: Vec<u32> = (0..len as u32).collect();
        for i in (1..len).rev() {
            order.swap(i, self.below(i + 1));
        }
        order
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn permutations_are_complete_and_depend_on_all_arguments() {
        let order = Random::new(1, b"a test..", 0).permutation(1000);
        let mut sorted = order.clone();
        sorted.sort_unstable();
        assert!(sorted.into_iter().eq(0..1000));
        assert_eq!(order, Random::new(1, b"a test..", 0).permutation(1000));
        for mut other in [
            Random::new(2, b"a test..", 0),
            Random::new(1, b"another.", 0),
            Random::new(1, b"a test..", 1),
        ] {
            assert_ne!(order, other.permutation(1000));
        }
    }

    #[test]
    fn normal_numbers_have_mean_zero_and_variance_one() {
        let mut random = Random::new(7, b"a test..", 0);
        let numbers: Vec<f64> = (0..100_000).map(|_| random.normal()).collect();
        let mean = numbers.iter().sum::<f64>() / 1e5;
        let square = numbers.iter().map(|x| x * x).sum::<f64>() / 1e5;
        let beyond_two = numbers.iter().filter(|x| x.abs() > 2.0).count();
        assert!(mean.abs() < 0.015 && (square - 1.0).abs() < 0.025, "{mean} {square}");
        assert!((4300..4800).contains(&beyond_two), "{beyond_two}");
    }

    #[test]
    fn numbers_below_a_bound_reach_all_of_it_evenly() {
        let mut random = Random::new(7, b"a test..", 0);
        let mut counts = [0; 7];
        for _ in 0..70_000 {
            counts[random.below(7)] += 1;
        }
        // Six standard deviations of a binomial count are 556.
        assert!(counts.iter().all(|count: &i32| (count - 10_000).abs() < 556), "{counts:?}");
    }
}
