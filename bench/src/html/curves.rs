//! The figures of runs as curves over axes.

use hdrhistogram::Histogram;

use super::Shown;
use super::plot::{Axis, Curve, Plot};
use crate::report::{Interval, Report, Summary};

/// The last percentile of the curve, as a number of nines: beyond it are single requests.
const MOST_NINES: f64 = 7.0;

/// How often something is as rare as this: 1 for a half, 10 for the rarest tenth.
fn rarity(quantile: f64) -> f64 {
    1.0 / (1.0 - quantile).max(10f64.powf(-MOST_NINES))
}

/// Latency by percentile.
pub(super) fn percentiles(runs: &[Shown<'_>]) -> Option<Plot> {
    let curves: Vec<Curve> = runs
        .iter()
        .enumerate()
        .map(|(run, shown)| Curve { run, faint: false, points: percentile_points(shown.report) })
        .collect();
    percentile_plot("Latency at each percentile", curves)
}

fn percentile_plot(label: &str, curves: Vec<Curve>) -> Option<Plot> {
    let all = || curves.iter().flat_map(|curve| &curve.points);
    let values = || all().filter_map(|(_, ns)| *ns);
    let least = values().reduce(f64::min)?;
    let largest = values().reduce(f64::max)?;
    let rarest = all().map(|(x, _)| *x).fold(100.0, f64::max);
    let ticks = [0.0, 0.5, 0.9, 0.99, 0.999, 0.9999, 0.99999, 0.999_999, 0.999_999_9];
    let names =
        ["0 %", "50 %", "90 %", "99 %", "99.9 %", "99.99 %", "99.999 %", "99.9999 %", "99.99999 %"];
    let ticks: Vec<(f64, String)> = ticks
        .into_iter()
        .zip(names)
        .map(|(quantile, name)| (rarity(quantile), name.to_owned()))
        .filter(|(x, _)| *x <= rarest * 1.01)
        .collect();
    let x = Axis { title: "percentile".into(), ends: (1.0, rarest), log: true, ticks };
    let y = Axis::log("latency from due", least, largest, short_duration);
    Some(Plot { label: label.into(), x, y, curves })
}

/// Latency by percentile of each kind of answer, and the names of the curves. No plot when every
/// run has only one kind.
pub(super) fn by_outcome(runs: &[Shown<'_>]) -> (Option<Plot>, Vec<String>) {
    let (mut names, mut curves) = (Vec::new(), Vec::new());
    for shown in runs {
        for outcome in shown.outcomes() {
            let summary = &shown.report.outcomes[&outcome].from_due;
            let histogram = shown.report.histograms.get(&outcome).map(|all| &all.from_due);
            names.push(format!("{}, {}", shown.name, outcome.name()));
            curves.push(points(histogram, summary));
        }
    }
    let is_split = runs.iter().any(|shown| shown.outcomes().len() > 1);
    if !is_split || curves.len() > super::MAX_CURVES {
        return (None, names);
    }
    let curves = curves.into_iter().enumerate();
    let curves = curves.map(|(run, points)| Curve { run, faint: false, points }).collect();
    (percentile_plot("Latency of each kind of answer at each percentile", curves), names)
}

/// The curve from the whole histogram, or from the summary of a report without histograms.
fn percentile_points(report: &Report) -> Vec<(f64, Option<f64>)> {
    points(Some(&report.latencies().from_due), &report.latency_from_due)
}

fn points(histogram: Option<&Histogram<u64>>, summary: &Summary) -> Vec<(f64, Option<f64>)> {
    let Some(histogram) = histogram.filter(|histogram| !histogram.is_empty()) else {
        let Summary { count, p50_ns, p90_ns, p99_ns, p999_ns, p9999_ns, .. } = *summary;
        let known =
            [(0.5, p50_ns), (0.9, p90_ns), (0.99, p99_ns), (0.999, p999_ns), (0.9999, p9999_ns)];
        let known = known.into_iter().filter(|_| count > 0);
        return known.map(|(quantile, ns)| (rarity(quantile), Some(ns as f64))).collect();
    };
    let steps = histogram.iter_quantiles(8);
    // Percentiles beyond a single request are unknown.
    let rarest = (histogram.len() as f64).min(10f64.powf(MOST_NINES));
    let points = steps.map(|step| {
        (rarity(step.quantile_iterated_to()).min(rarest), Some(step.value_iterated_to() as f64))
    });
    points.collect()
}

/// The intervals that were measured in full.
fn whole_intervals(report: &Report) -> impl Iterator<Item = &Interval> {
    let end = report.measured_s * 1.001;
    report.timeline.iter().filter(move |interval| interval.start_s + interval.length_s <= end)
}

/// Median and 99th percentile of each interval.
pub(super) fn latency_over_time(runs: &[Shown<'_>]) -> Option<Plot> {
    let of = |run: usize, shown: &Shown<'_>, faint: bool| {
        let points = whole_intervals(shown.report).map(|interval| {
            let Summary { count, p50_ns, p99_ns, .. } = interval.from_due;
            let ns = if faint { p50_ns } else { p99_ns };
            (interval.start_s + interval.length_s / 2.0, (count > 0).then_some(ns as f64))
        });
        Curve { run, faint, points: points.collect() }
    };
    let curves: Vec<Curve> = runs
        .iter()
        .enumerate()
        .flat_map(|(run, shown)| [of(run, shown, true), of(run, shown, false)])
        .collect();
    let values = || curves.iter().flat_map(|curve| &curve.points).filter_map(|(_, ns)| *ns);
    let (least, largest) = (values().reduce(f64::min)?, values().reduce(f64::max)?);
    let y = Axis::log("latency from due", least, largest, short_duration);
    Some(Plot { label: "Latency over time".into(), x: seconds(runs)?, y, curves })
}

/// Requests a second of each interval.
pub(super) fn throughput_over_time(runs: &[Shown<'_>]) -> Option<Plot> {
    let curves: Vec<Curve> = runs
        .iter()
        .enumerate()
        .map(|(run, shown)| {
            let points = whole_intervals(shown.report).map(|interval| {
                let middle = interval.start_s + interval.length_s / 2.0;
                (middle, Some(interval.closed as f64 / interval.length_s))
            });
            Curve { run, faint: false, points: points.collect() }
        })
        .collect();
    let values = curves.iter().flat_map(|curve| &curve.points).filter_map(|(_, rate)| *rate);
    let y = Axis::linear("requests per second", values.reduce(f64::max)?, short_number);
    Some(Plot { label: "Throughput over time".into(), x: seconds(runs)?, y, curves })
}

/// An axis as long as the longest run; `None` when no run has a timeline.
fn seconds(runs: &[Shown<'_>]) -> Option<Axis> {
    let longest = runs.iter().filter(|shown| whole_intervals(shown.report).next().is_some());
    let longest = longest.map(|shown| shown.report.measured_s).reduce(f64::max)?;
    let mut axis = Axis::linear("seconds since the measurement began", longest, |s| format!("{s}"));
    axis.ends.1 = longest;
    axis.ticks.retain(|(at, _)| *at <= longest);
    Some(axis)
}

/// A time on an axis, where all values are round.
fn short_duration(ns: f64) -> String {
    match ns {
        ns if ns < 1e3 => format!("{ns} ns"),
        ns if ns < 1e6 => format!("{} µs", ns / 1e3),
        ns if ns < 1e9 => format!("{} ms", ns / 1e6),
        ns => format!("{} s", ns / 1e9),
    }
}

/// A number on an axis, where all values are round.
fn short_number(value: f64) -> String {
    match value {
        value if value < 1e3 => format!("{value}"),
        value if value < 1e6 => format!("{} k", value / 1e3),
        value => format!("{} M", value / 1e6),
    }
}
