//! The order of requests over a population.

use std::sync::Arc;

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use rand_distr::{Distribution, Zipf};

use crate::zipf::{BATCH, MAX_TABLE, ZipfTable};

/// The order of requests over a population.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Access {
    /// All equally likely.
    Uniform,
    /// The one of rank `k` (its number plus one) with a likelihood that goes as `k^-exponent`.
    Zipf {
        /// 0 is uniform; 1 is Zipf's law; above, ever fewer are ever more popular.
        exponent: f64,
    },
    /// In order, repeatedly; each connection takes every n-th.
    Sequential,
    /// In order, each once; the run ends after the last.
    EachOnce,
}

/// An access pattern over a population, shared by the connections.
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
    /// The pattern over a population of `count`; `None` for none, and for an exponent that is
    /// negative or not a number.
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

#[cfg(test)]
mod tests {
    use super::*;

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
            // Single ranks within five standard deviations; all of them together by χ², whose mean
            // is 999 and whose standard deviation is √(2·999) = 45.
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
    fn chance_holds_its_odds_at_both_ends_and_between() {
        let mut draw = Pattern::new(Access::Uniform, 1).unwrap().draw(1, 0, 1);
        let mut count = |threshold| (0..10_000).filter(|_| draw.chance(threshold)).count();
        assert_eq!((count(0), count(1 << 32)), (0, 10_000));
        assert!((2284..2716).contains(&count(1 << 30)));
    }
}
