//! Comparison of two servers: the change of each figure, and its confidence interval.

use std::fmt;

use crate::record::{Record, Run};
use crate::stats::{self, CONFIDENCE, Shift};
use crate::threshold::Metric;

/// The compared figures.
pub const METRICS: [Metric; 4] = [Metric::Throughput, Metric::P50, Metric::P99, Metric::P999];

/// One figure of two servers.
#[derive(Clone, Debug, PartialEq)]
pub struct Comparison {
    /// Which figure.
    pub metric: Metric,
    /// Their names.
    pub names: [String; 2],
    /// The number of repeats of each.
    pub repeats: [usize; 2],
    /// The median of each one's repeats.
    pub medians: [f64; 2],
    /// The second over the first, less 1: 0.1 for 10 % more. An estimate from all repeats, not the
    /// ratio of the medians.
    pub change: f64,
    /// The confidence interval of the change; `None` with too few repeats.
    pub interval: Option<(f64, f64)>,
}

/// The result of a comparison.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// The second is better than the first.
    Better,
    /// It is worse.
    Worse,
    /// The interval contains 0.
    NoDifference,
    /// Too few repeats for an interval.
    TooFewRepeats,
}

impl Comparison {
    /// Compares one figure of the repeats of two runs. `paired` says that the n-th repeats of both
    /// were made one after the other, so that what disturbed one disturbed the other. `None`
    /// when one has no such figure, or it is 0, or pairs are missing.
    pub fn new(metric: Metric, first: &[&Run], second: &[&Run], paired: bool) -> Option<Self> {
        let values = |runs: &[&Run]| -> Option<Vec<f64>> {
            let values = runs.iter().map(|run| metric.of(&run.report).filter(|&value| value > 0.0));
            values.collect::<Option<Vec<f64>>>().filter(|values| !values.is_empty())
        };
        let (a, b) = (values(first)?, values(second)?);
        // Figures of time and rate differ by factors: a shift of the logarithm is one.
        let logs = |values: &[f64]| values.iter().map(|value| value.ln()).collect::<Vec<_>>();
        let shift = if paired {
            let pairs: Vec<_> = logs(&a).into_iter().zip(logs(&b)).collect();
            (a.len() == b.len()).then(|| stats::paired(&pairs))?
        } else {
            stats::independent(&logs(&a), &logs(&b))
        };
        let Shift { estimate, interval } = shift?;
        let name = |runs: &[&Run]| runs.first().map(|run| run.name.clone()).unwrap_or_default();
        Some(Comparison {
            metric,
            names: [name(first), name(second)],
            repeats: [a.len(), b.len()],
            medians: [median(a), median(b)],
            change: estimate.exp_m1(),
            interval: interval.map(|(low, high)| (low.exp_m1(), high.exp_m1())),
        })
    }

    /// Whether the second is better: more a second, or less time.
    pub fn verdict(&self) -> Verdict {
        let Some((low, high)) = self.interval else { return Verdict::TooFewRepeats };
        let more_is_better = matches!(self.metric, Metric::Throughput | Metric::HitRatio);
        if low <= 0.0 && high >= 0.0 {
            Verdict::NoDifference
        } else if (low > 0.0) == more_is_better {
            Verdict::Better
        } else {
            Verdict::Worse
        }
    }
}

pub(crate) fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    let last = values.len() - 1;
    (values[last / 2] + values[last.div_ceil(2)]) / 2.0
}

/// A change in percent, with its sign.
pub(crate) fn percent(change: f64) -> String {
    format!("{:+.1} %", change * 100.0)
}

impl fmt::Display for Comparison {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b] = self.medians.map(|median| self.metric.show(median));
        write!(f, "{:<11}{a:>14}{b:>14}{:>10}  ", self.metric.name(), percent(self.change))?;
        match self.interval {
            Some((low, high)) => {
                let confidence = CONFIDENCE * 100.0;
                let range = format!("{} to {}", percent(low), percent(high));
                write!(f, "{confidence:.0} %: {range:<22}")?;
            }
            None => write!(f, "{:<27}", "")?,
        }
        f.write_str(self.verdict().name())
    }
}

impl Verdict {
    /// In words.
    pub fn name(self) -> &'static str {
        match self {
            Verdict::Better => "better",
            Verdict::Worse => "worse",
            Verdict::NoDifference => "no difference shown",
            Verdict::TooFewRepeats => "too few repeats to tell",
        }
    }
}

/// The runs of each name, in the order in which the names first come.
pub fn by_name(runs: &[Run]) -> Vec<(&str, Vec<&Run>)> {
    let mut names: Vec<(&str, Vec<&Run>)> = Vec::new();
    for run in runs {
        match names.iter_mut().find(|(name, _)| *name == run.name) {
            Some((_, runs)) => runs.push(run),
            None => names.push((&run.name, vec![run])),
        }
    }
    names
}

/// The run with the median throughput, of at least one.
pub(crate) fn middle(mut runs: Vec<&Run>) -> &Run {
    runs.sort_by(|a, b| a.report.throughput_per_s.total_cmp(&b.report.throughput_per_s));
    runs.swap_remove(runs.len() / 2)
}

/// Compares the runs that have the same names in both records, or the only ones that each has, by
/// all [`METRICS`].
pub fn between<'a>(a: &'a Record, b: &Record) -> Vec<(&'a str, Vec<Comparison>)> {
    let (ours, theirs) = (by_name(&a.runs), by_name(&b.runs));
    let single = ours.len() == 1 && theirs.len() == 1;
    let mut found = Vec::new();
    for (name, first) in ours {
        let other = theirs.iter().find(|(other, _)| single || *other == name);
        let Some((_, second)) = other else { continue };
        found.push((name, all_metrics(&first, second, false)));
    }
    found
}

/// Compares the runs of two names in one record, by all [`METRICS`]: in pairs, if they were
/// measured in turn. `None` when there are not two names.
pub fn within(record: &Record) -> Option<Vec<Comparison>> {
    let names = by_name(&record.runs);
    let [(_, first), (_, second)] = &names[..] else { return None };
    let (rounds, rest) = record.runs.as_chunks::<2>();
    let paired = rest.is_empty() && rounds.iter().all(|[one, other]| one.name != other.name);
    Some(all_metrics(first, second, paired))
}

fn all_metrics(first: &[&Run], second: &[&Run], paired: bool) -> Vec<Comparison> {
    METRICS.iter().filter_map(|&metric| Comparison::new(metric, first, second, paired)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::tests::report;

    fn runs(name: &str, rates: &[f64], p99_ms: f64) -> Vec<Run> {
        let run = |&rate| {
            let mut report = report();
            report.throughput_per_s = rate;
            report.latency_from_due.p99_ns = (p99_ms * 1e6) as u64;
            Run { name: name.into(), report }
        };
        rates.iter().map(run).collect()
    }

    fn compare(metric: Metric, a: &[Run], b: &[Run], paired: bool) -> Comparison {
        let (a, b): (Vec<&Run>, Vec<&Run>) = (a.iter().collect(), b.iter().collect());
        Comparison::new(metric, &a, &b, paired).unwrap()
    }

    #[test]
    fn finds_a_tenth_more_and_knows_which_direction_is_better() {
        let rates = [100.0, 101.0, 99.0, 102.0, 98.0, 100.5];
        let a = runs("a", &rates, 1.0);
        let b = runs("b", &rates.map(|rate| rate * 1.1), 1.1);
        let rate = compare(Metric::Throughput, &a, &b, false);
        assert!((rate.change - 0.1).abs() < 0.01, "{rate}");
        assert_eq!(rate.verdict(), Verdict::Better);
        let p99 = compare(Metric::P99, &a, &b, false);
        assert_eq!(p99.verdict(), Verdict::Worse);
        assert!(p99.to_string().contains("+10.0 %") && p99.to_string().contains("worse"), "{p99}");
        assert_eq!(compare(Metric::P99, &b, &a, false).verdict(), Verdict::Better);
    }

    #[test]
    fn pairs_find_what_a_drift_hides() {
        // Both double over the run; the second is always 5 % faster.
        let rates: Vec<f64> = (0..8).map(|i| 100.0 * (1.0 + f64::from(i) / 8.0)).collect();
        let faster: Vec<f64> = rates.iter().map(|rate| rate * 1.05).collect();
        let (a, b) = (runs("a", &rates, 1.0), runs("b", &faster, 1.0));
        assert_eq!(compare(Metric::Throughput, &a, &b, false).verdict(), Verdict::NoDifference);
        let paired = compare(Metric::Throughput, &a, &b, true);
        assert_eq!(paired.verdict(), Verdict::Better);
        assert!((paired.change - 0.05).abs() < 1e-9);
    }

    #[test]
    fn equal_runs_do_not_differ_and_single_runs_prove_nothing() {
        let a = runs("a", &[100.0, 101.0, 99.0, 102.0, 98.0], 1.0);
        assert_eq!(compare(Metric::Throughput, &a, &a, false).verdict(), Verdict::NoDifference);
        let few = compare(Metric::Throughput, &a[..1], &a[..1], false);
        assert_eq!(few.verdict(), Verdict::TooFewRepeats);
        assert!(few.to_string().contains("too few repeats"));
        assert_eq!(few.repeats, [1, 1]);
        assert!(Comparison::new(Metric::Errors, &[], &[&a[0]], false).is_none());
        assert!(Comparison::new(Metric::P99, &[&a[0]], &[&a[0], &a[1]], true).is_none());
    }

    #[test]
    fn runs_are_grouped_by_their_names() {
        let all =
            [runs("a", &[1.0], 1.0), runs("b", &[2.0, 3.0], 1.0), runs("a", &[4.0], 1.0)].concat();
        let groups = by_name(&all);
        let shape: Vec<_> = groups.iter().map(|(name, runs)| (*name, runs.len())).collect();
        assert_eq!(shape, [("a", 2), ("b", 2)]);
    }
}
