//! Difference of two samples and its confidence interval, without an assumed distribution.
//!
//! Run times have long tails and outliers, so means and t-tests say little here. The Hodges–Lehmann
//! estimate is the median of all pairwise differences. Its confidence interval comes from the exact
//! distribution of the matching rank statistic. Hollander, Wolfe and Chicken, *Nonparametric
//! Statistical Methods*, 3rd edition (2014): sections 4.2 and 4.3 for two independent samples (Mann
//! and Whitney 1947, Lehmann 1963), 3.2 and 3.3 for pairs (Wilcoxon 1945, Tukey 1949). With ties
//! the intervals are a little too wide, never too narrow.

/// The confidence of the intervals.
pub const CONFIDENCE: f64 = 0.95;

/// A difference with its confidence interval.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Shift {
    /// The amount by which the second sample is larger than the first.
    pub estimate: f64,
    /// The interval that contains the true difference with at least [`CONFIDENCE`]; `None` if
    /// there are too few values.
    pub interval: Option<(f64, f64)>,
}

/// The amount by which `second` is larger than `first`. The samples are independent. `None` if one
/// is empty.
pub fn independent(first: &[f64], second: &[f64]) -> Option<Shift> {
    let differences = second.iter().flat_map(|b| first.iter().map(move |a| b - a)).collect();
    shift(differences, &mann_whitney(first.len(), second.len()))
}

/// The amount by which the second value of each pair is larger than the first. Disturbances affect
/// both values of a pair alike. `None` without a pair.
pub fn paired(pairs: &[(f64, f64)]) -> Option<Shift> {
    let differences: Vec<f64> = pairs.iter().map(|(a, b)| b - a).collect();
    let mut averages = Vec::new();
    for (i, one) in differences.iter().enumerate() {
        averages.extend(differences[i..].iter().map(|other| (one + other) / 2.0));
    }
    shift(averages, &signed_rank(pairs.len()))
}

/// The median of `values`, and the two values that enclose the true difference. `likelihoods` are
/// the probabilities of 0, 1, 2 … as the statistic if there is no difference.
fn shift(mut values: Vec<f64>, likelihoods: &[f64]) -> Option<Shift> {
    values.sort_by(f64::total_cmp);
    let last = values.len().checked_sub(1)?;
    let estimate = (values[last / 2] + values[last.div_ceil(2)]) / 2.0;
    // The largest number of values that can be cut off at each end.
    let (mut cut, mut tail) = (0, 0.0);
    for likelihood in likelihoods {
        tail += likelihood;
        if tail > (1.0 - CONFIDENCE) / 2.0 {
            break;
        }
        cut += 1;
    }
    let interval =
        (cut > 0 && 2 * cut <= values.len()).then(|| (values[cut - 1], values[values.len() - cut]));
    Some(Shift { estimate, interval })
}

/// The distribution of the number of pairs whose second value is larger, for samples of `m` and `n`
/// values from one distribution. Mann and Whitney's recurrence counts the choices of ranks that
/// give each number.
fn mann_whitney(m: usize, n: usize) -> Vec<f64> {
    // `ways[j]` is the distribution for i and j values, as probabilities, so that nothing
    // overflows. The largest of all values is one of the i values with probability i / (i + j), and
    // then counts j.
    let mut ways: Vec<Vec<f64>> = vec![vec![1.0]; n + 1];
    for i in 1..=m {
        let mut next: Vec<Vec<f64>> = vec![vec![1.0]];
        for j in 1..=n {
            let mut both = vec![0.0; i * j + 1];
            let share = i as f64 / (i + j) as f64;
            for (value, likelihood) in ways[j].iter().enumerate() {
                both[value + j] += share * likelihood;
            }
            for (value, likelihood) in next[j - 1].iter().enumerate() {
                both[value] += (1.0 - share) * likelihood;
            }
            next.push(both);
        }
        ways = next;
    }
    ways.pop().unwrap_or_default()
}

/// The distribution of the sum of the ranks of the positive values among `n` symmetric values.
fn signed_rank(n: usize) -> Vec<f64> {
    let mut likelihoods = vec![1.0];
    for rank in 1..=n {
        let mut next = vec![0.0; likelihoods.len() + rank];
        for (sum, likelihood) in likelihoods.iter().enumerate() {
            next[sum] += likelihood / 2.0;
            next[sum + rank] += likelihood / 2.0;
        }
        likelihoods = next;
    }
    likelihoods
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::{Rng, SeedableRng};
    use rand_chacha::ChaCha8Rng;

    /// The largest value whose tail is at most 2.5 %: what the tables of both tests give.
    fn critical(likelihoods: &[f64]) -> Option<usize> {
        let mut tail = 0.0;
        likelihoods
            .iter()
            .position(|likelihood| {
                tail += likelihood;
                tail > 0.025
            })?
            .checked_sub(1)
    }

    #[test]
    fn critical_values_are_those_of_the_published_tables() {
        // Two-sided 5 %: Mann and Whitney (1947); Wilcoxon's signed-rank table.
        for (m, n, value) in [(4, 4, 0), (5, 5, 2), (5, 8, 6), (10, 10, 23), (20, 20, 127)] {
            assert_eq!(critical(&mann_whitney(m, n)), Some(value), "{m}, {n}");
        }
        for (n, value) in [(6, 0), (7, 2), (10, 8), (15, 25), (20, 52)] {
            assert_eq!(critical(&signed_rank(n)), Some(value), "{n}");
        }
        assert_eq!(critical(&mann_whitney(3, 3)), None);
        assert_eq!(critical(&signed_rank(5)), None);
        for likelihoods in [mann_whitney(7, 11), signed_rank(13)] {
            assert!((likelihoods.iter().sum::<f64>() - 1.0).abs() < 1e-12);
        }
    }

    #[test]
    fn a_shift_is_estimated_and_too_few_values_give_no_interval() {
        let first = [1.0, 2.0, 3.0, 4.0, 5.0];
        let second = first.map(|value| value + 10.0);
        let found = independent(&first, &second).unwrap();
        assert_eq!(found.estimate, 10.0);
        let (low, high) = found.interval.unwrap();
        assert!(low < 10.0 && high > 10.0 && low > 5.0 && high < 15.0, "{low} to {high}");
        assert_eq!(independent(&first[..3], &second[..3]).unwrap().interval, None);
        assert_eq!(independent(&[], &second), None);
        // Pairs that drift together differ by the same each time.
        let pairs: Vec<(f64, f64)> = (0..6).map(|i| (f64::from(i), f64::from(i) + 1.0)).collect();
        let found = paired(&pairs).unwrap();
        assert_eq!((found.estimate, found.interval), (1.0, Some((1.0, 1.0))));
        assert_eq!(paired(&pairs[..5]).unwrap().interval, None);
        assert_eq!(paired(&[]), None);
    }

    #[test]
    fn the_intervals_hold_the_truth_as_often_as_they_say() {
        let mut rng = ChaCha8Rng::seed_from_u64(5);
        // Skewed, with a long tail, like latencies.
        let mut draw = || -((rng.next_u64() >> 11) as f64 / (1u64 << 53) as f64).max(1e-12).ln();
        let (mut held, mut held_paired) = (0, 0);
        const TRIALS: u32 = 1000;
        for _ in 0..TRIALS {
            let first: Vec<f64> = (0..8).map(|_| draw()).collect();
            let second: Vec<f64> = (0..8).map(|_| draw() + 0.5).collect();
            let holds = |shift: Option<Shift>| {
                let (low, high) = shift.unwrap().interval.unwrap();
                u32::from(low <= 0.5 && 0.5 <= high)
            };
            held += holds(independent(&first, &second));
            let pairs: Vec<_> = first.into_iter().zip(second).collect();
            held_paired += holds(paired(&pairs));
        }
        // 95 % or a little more, less four standard deviations.
        for held in [held, held_paired] {
            assert!(held >= 922, "{held} of {TRIALS}");
        }
    }
}
