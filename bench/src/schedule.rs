//! When requests are due: the arrivals of an open loop, in nanoseconds since the run's epoch.

use afterimage_wire::splitmix::STEP;
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use rand_distr::{Distribution, Exp1};

use crate::plan::Arrivals;

/// The arrivals on one connection, independent of sending.
#[derive(Clone, Debug)]
pub(crate) struct Schedule {
    start_ns: u64,
    /// Nanoseconds between two arrivals on this connection, on average.
    gap_ns: f64,
    /// The next arrival, in nanoseconds after the start. A sum of gaps in an `f64`, exact to below
    /// a nanosecond for the first hundred days.
    next_ns: f64,
    poisson: Option<ChaCha8Rng>,
}

impl Schedule {
    /// The arrivals of connection `lane` of `lanes`, which share `rate` requests a second.
    pub(crate) fn new(
        rate: f64,
        arrivals: Arrivals,
        start_ns: u64,
        seed: u64,
        lane: u32,
        lanes: u32,
    ) -> Self {
        let shared_gap_ns = 1e9 / rate;
        let gap_ns = shared_gap_ns * f64::from(lanes);
        let mut schedule = Schedule {
            start_ns,
            gap_ns,
            // Together, the connections of a constant schedule make one even stream.
            next_ns: shared_gap_ns * f64::from(lane),
            poisson: None,
        };
        if arrivals == Arrivals::Poisson {
            // Another key than the workload's: order and times are independent.
            let mut rng = ChaCha8Rng::seed_from_u64(seed ^ STEP);
            rng.set_stream(lane.into());
            schedule.poisson = Some(rng);
            schedule.next_ns = 0.0;
            schedule.advance();
        }
        schedule
    }

    /// When the next request is due.
    #[inline]
    pub(crate) fn due(&self) -> u64 {
        self.start_ns + self.next_ns as u64
    }

    /// Continues to the request after it.
    #[inline]
    pub(crate) fn advance(&mut self) {
        let gaps: f64 = match &mut self.poisson {
            Some(rng) => Exp1.sample(rng),
            None => 1.0,
        };
        self.next_ns += self.gap_ns * gaps;
    }

    /// How many requests are due before `end_ns` from here on.
    pub(crate) fn count_before(mut self, end_ns: u64) -> u64 {
        let mut count = 0;
        while self.due() < end_ns {
            self.advance();
            count += 1;
        }
        count
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn constant_arrivals_of_several_connections_interleave_evenly() {
        let mut all = Vec::new();
        for lane in 0..4 {
            let mut schedule = Schedule::new(1e6, Arrivals::Constant, 500, 1, lane, 4);
            for _ in 0..25 {
                all.push(schedule.due());
                schedule.advance();
            }
        }
        all.sort_unstable();
        let expected: Vec<u64> = (0..100).map(|i| 500 + i * 1000).collect();
        assert_eq!(all, expected);
    }

    #[test]
    fn poisson_arrivals_have_the_rate_and_spread_of_theory() {
        let second = 1_000_000_000;
        // Arrivals in each of 400 windows of 10 ms at 10 000/s: mean 100, variance 100.
        let mut schedule = Schedule::new(10_000.0, Arrivals::Poisson, 0, 42, 0, 1);
        let mut windows = [0f64; 400];
        while schedule.due() < 4 * second {
            windows[(schedule.due() / 10_000_000) as usize] += 1.0;
            schedule.advance();
        }
        let mean = windows.iter().sum::<f64>() / 400.0;
        let variance = windows.iter().map(|n| (n - mean) * (n - mean)).sum::<f64>() / 399.0;
        // Five standard errors: 100/√(100·400) = 0.5 and 100·√(2/399) = 7.1.
        assert!((97.5..102.5).contains(&mean), "mean {mean}");
        assert!((64.0..136.0).contains(&variance), "variance {variance}");
    }

    #[test]
    fn counts_what_is_due_before_the_end() {
        let schedule = Schedule::new(1000.0, Arrivals::Constant, 7, 1, 0, 1);
        assert_eq!(schedule.clone().count_before(7), 0);
        assert_eq!(schedule.clone().count_before(8), 1);
        assert_eq!(schedule.count_before(7 + 1_000_000_000), 1000);
    }
}
