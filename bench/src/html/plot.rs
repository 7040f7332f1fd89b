//! A plot as SVG: axes with ticks, a grid, and curves laid over one another.

use std::fmt::Write;

use hdrhistogram::Histogram;

use super::Shown;
use crate::report::{Interval, Report, Summary};

/// Colours; further curves begin with the first one again, in a thinner line.
pub(super) const COLOURS: usize = 6;

/// Half of the width of a character of a label, at most: labels are 13 units high.
const HALF_A_CHARACTER: f64 = 4.1;

/// The mapping from values to positions on an axis.
#[derive(Clone, Debug)]
pub(super) struct Axis {
    /// Its title, with a unit if the ticks have none.
    pub(super) title: String,
    /// The values at both ends.
    pub(super) ends: (f64, f64),
    pub(super) log: bool,
    /// The lines of the grid and their labels.
    pub(super) ticks: Vec<(f64, String)>,
}

impl Axis {
    /// A linear axis from 0 with some five ticks.
    pub(super) fn linear(title: &str, largest: f64, label: impl Fn(f64) -> String) -> Self {
        let largest = if largest > 0.0 { largest } else { 1.0 };
        let rough = largest / 5.0;
        let power = 10f64.powf(rough.log10().floor());
        let step = [1.0, 2.0, 2.5, 5.0, 10.0].into_iter().map(|factor| factor * power);
        let step = step.into_iter().find(|&step| step >= rough).unwrap_or(power * 10.0);
        let count = (largest / step).ceil();
        // Of the step's own digits: three times 0.2 is not 0.6 to a computer.
        let places = (1.0 - power.log10()).clamp(0.0, 12.0) as usize;
        let round = |value: f64| format!("{value:.places$}").parse().unwrap_or(value);
        let ticks = (0..=count as u32).map(|i| round(f64::from(i) * step));
        let ticks = ticks.map(|value| (value, label(value))).collect();
        Axis { title: title.into(), ends: (0.0, count * step), log: false, ticks }
    }

    /// A logarithmic axis over all of these values, with a tick for each power of ten, or 1, 2 and
    /// 5 of each when that is few.
    pub(super) fn log(
        title: &str,
        least: f64,
        largest: f64,
        label: impl Fn(f64) -> String,
    ) -> Self {
        let least = if least > 0.0 { least } else { 1.0 };
        let largest = largest.max(least * 1.5);
        let few = (largest / least).log10() < 2.5;
        let mantissas: &[f64] = if few { &[1.0, 2.0, 5.0] } else { &[1.0] };
        let powers = least.log10().floor() as i32..=largest.log10().ceil() as i32;
        let all: Vec<f64> = powers
            .flat_map(|power| mantissas.iter().map(move |mantissa| mantissa * 10f64.powi(power)))
            .collect();
        let first = all.iter().rposition(|&value| value <= least).unwrap_or(0);
        let last = all.iter().position(|&value| value >= largest).unwrap_or(all.len() - 1);
        let ticks = all[first..=last].iter().map(|&value| (value, label(value))).collect();
        Axis { title: title.into(), ends: (all[first], all[last]), log: true, ticks }
    }

    /// Where on the axis `value` is, from 0 to 1.
    fn place(&self, value: f64) -> f64 {
        let (low, high) = self.ends;
        let place = if self.log {
            (value.max(low) / low).ln() / (high / low).ln()
        } else {
            (value - low) / (high - low)
        };
        place.clamp(0.0, 1.0)
    }
}

/// A line through points; where a value is missing it is interrupted.
#[derive(Clone, Debug)]
pub(super) struct Curve {
    /// Its run's number, which decides its colour and dashes.
    pub(super) run: usize,
    /// Drawn thinner: it goes with another one.
    pub(super) faint: bool,
    pub(super) points: Vec<(f64, Option<f64>)>,
}

/// A plot: a label for screen readers, two axes, and curves.
#[derive(Clone, Debug)]
pub(super) struct Plot {
    pub(super) label: String,
    pub(super) x: Axis,
    pub(super) y: Axis,
    pub(super) curves: Vec<Curve>,
}

impl Plot {
    /// The plot in two sizes, of which the style sheet shows the one that fits, under its legend.
    pub(super) fn html(&self, legend: &str) -> String {
        let (wide, narrow) = (self.svg("wide", 1000.0, 380.0), self.svg("narrow", 420.0, 330.0));
        format!("<div class=\"plot\">{legend}{wide}{narrow}</div>\n")
    }

    fn svg(&self, class: &str, width: f64, height: f64) -> String {
        let (left, right, top, bottom) = (72.0, 24.0, 34.0, 50.0);
        let (plot_width, plot_height) = (width - left - right, height - top - bottom);
        let x_of = |value: f64| left + self.x.place(value) * plot_width;
        let y_of = |value: f64| top + (1.0 - self.y.place(value)) * plot_height;
        let mut out = String::new();
        let label = escape(&self.label);
        let _ = write!(
            out,
            "<svg class=\"{class}\" viewBox=\"0 0 {width} {height}\" role=\"img\" \
             aria-label=\"{label}\">"
        );
        for (value, label) in &self.y.ticks {
            let (y, end, label) = (y_of(*value), width - right, escape(label));
            let _ = write!(
                out,
                "<path class=\"grid\" d=\"M{left:.1} {y:.1}H{end:.1}\"/><text x=\"{:.1}\" \
                 y=\"{:.1}\" text-anchor=\"end\">{label}</text>",
                left - 8.0,
                y + 4.5
            );
        }
        let floor = height - bottom;
        // A label that would touch the one before it is omitted.
        let mut taken_to = f64::NEG_INFINITY;
        for (value, label) in &self.x.ticks {
            let x = x_of(*value);
            let half = HALF_A_CHARACTER * label.chars().count() as f64 + 4.0;
            let _ = write!(out, "<path class=\"grid\" d=\"M{x:.1} {top:.1}V{floor:.1}\"/>");
            // The last label stays inside the picture.
            let x = x.min(width - half);
            if x - half >= taken_to {
                taken_to = x + half;
                let (y, label) = (floor + 19.0, escape(label));
                let _ = write!(
                    out,
                    "<text x=\"{x:.1}\" y=\"{y:.1}\" text-anchor=\"middle\">{label}</text>"
                );
            }
        }
        let (x_title, y_title) = (escape(&self.x.title), escape(&self.y.title));
        let _ = write!(
            out,
            "<text class=\"name\" x=\"{left:.1}\" y=\"18\">{y_title}</text><text class=\"name\" \
             x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"end\">{x_title}</text>",
            width - right,
            height - 10.0
        );
        for curve in &self.curves {
            let mut path = String::new();
            let mut drawing = false;
            for &(x, y) in &curve.points {
                let Some(y) = y else {
                    drawing = false;
                    continue;
                };
                let step = if drawing { 'L' } else { 'M' };
                let _ = write!(path, "{step}{:.1} {:.1}", x_of(x), y_of(y));
                drawing = true;
            }
            let (class, faint) = (class_of(curve.run), if curve.faint { " faint" } else { "" });
            let _ = write!(out, "<path class=\"curve {class}{faint}\" d=\"{path}\"/>");
        }
        out.push_str("</svg>");
        out
    }
}

/// The classes of a run's curve: colour and dashes, and once more with a thinner line when all
/// colours are used.
pub(super) fn class_of(run: usize) -> String {
    let again = if run < COLOURS { "" } else { " again" };
    format!("c{}{again}", run % COLOURS)
}

/// Text that is safe inside of elements and quoted attributes.
pub(super) fn escape(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '"' => out.push_str("&quot;"),
            _ => out.push(c),
        }
    }
    out
}

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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn axes_hold_all_values_between_round_ticks() {
        for largest in [0.0, 0.3, 0.8, 1.0, 1.25, 7.0, 4_412_345.0] {
            let axis = Axis::linear("x", largest, |value| value.to_string());
            assert!(axis.ticks.iter().all(|(_, label)| label.len() <= 7), "{:?}", axis.ticks);
            assert!((3..=8).contains(&axis.ticks.len()), "{largest}: {:?}", axis.ticks);
            assert!(axis.ends.1 >= largest && (axis.place(axis.ends.1) - 1.0).abs() < 1e-9);
        }
        for (least, largest) in [(14e3, 4e6), (1.0, 1.0), (0.0, 5.0), (37.0, 2e9)] {
            let axis = Axis::log("y", least, largest, |value| value.to_string());
            assert!(axis.ends.0 <= f64::max(least, 1.0) && axis.ends.1 >= largest, "{axis:?}");
            assert!((2..=12).contains(&axis.ticks.len()), "{axis:?}");
            assert_eq!(axis.place(axis.ends.0), 0.0);
        }
    }

    #[test]
    fn a_label_at_the_end_of_an_axis_is_not_cut() {
        let ticks = vec![(1.0, "0 %".to_owned()), (10.0, "99.99999 %".to_owned())];
        let x = Axis { title: "p".into(), ends: (1.0, 10.0), log: true, ticks };
        let y = Axis::linear("y", 1.0, |value| value.to_string());
        let html = Plot { label: "l".into(), x, y, curves: vec![] }.html("");
        let at = html.split("text-anchor=\"middle\">99.99999 %").next().unwrap();
        let at: f64 =
            at.rsplit("<text x=\"").next().unwrap().split('"').next().unwrap().parse().unwrap();
        assert!(at < 1000.0 - 10.0 * HALF_A_CHARACTER, "its middle is at {at} of 1000");
    }

    #[test]
    fn curves_are_interrupted_where_there_is_nothing() {
        let axis = || Axis::linear("<t>", 10.0, |value| value.to_string());
        let points = vec![(0.0, Some(1.0)), (1.0, Some(2.0)), (2.0, None), (3.0, Some(3.0))];
        let curves = vec![Curve { run: 7, faint: false, points }];
        let html = Plot { label: "a \"b\"".into(), x: axis(), y: axis(), curves }.html("");
        let path = html.split("curve c1 again\" d=\"").nth(1).unwrap().split('"').next().unwrap();
        assert_eq!((path.matches('M').count(), path.matches('L').count()), (2, 1), "{path}");
        assert!(html.contains("&lt;t&gt;") && html.contains("a &quot;b&quot;"));
        assert_eq!(html.matches("<svg").count(), 2);
    }
}
