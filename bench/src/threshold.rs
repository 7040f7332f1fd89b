//! Limits of a run, such as `p99>5ms`: a run for which it is true has failed.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use crate::format::{duration, number};
use crate::report::{Report, Summary};

/// A figure of a run, a comparison and a limit. A run for which it is true has failed.
#[derive(Clone, Debug, PartialEq)]
pub struct Threshold {
    metric: Metric,
    comparison: Comparison,
    limit: f64,
    text: String,
}

/// A figure that can be held against a limit. Latencies are in nanoseconds, from due.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Metric {
    /// The mean latency.
    Mean,
    /// Half the answers took no longer.
    P50,
    /// 90 % took no longer.
    P90,
    /// 99 % took no longer.
    P99,
    /// 99.9 % took no longer.
    P999,
    /// 99.99 % took no longer.
    P9999,
    /// None took longer.
    Max,
    /// Requests that failed, timed out, were lost or never sent.
    Errors,
    /// Requests a second.
    Throughput,
    /// The share of hits among the answers, from 0 to 1.
    HitRatio,
}

impl Metric {
    /// All of them.
    pub const ALL: [Metric; 10] = [
        Metric::Mean,
        Metric::P50,
        Metric::P90,
        Metric::P99,
        Metric::P999,
        Metric::P9999,
        Metric::Max,
        Metric::Errors,
        Metric::Throughput,
        Metric::HitRatio,
    ];

    /// Its name in a threshold.
    pub const fn name(self) -> &'static str {
        match self {
            Metric::Mean => "mean",
            Metric::P50 => "p50",
            Metric::P90 => "p90",
            Metric::P99 => "p99",
            Metric::P999 => "p99.9",
            Metric::P9999 => "p99.99",
            Metric::Max => "max",
            Metric::Errors => "errors",
            Metric::Throughput => "throughput",
            Metric::HitRatio => "hit-ratio",
        }
    }

    /// Its value in this report; `None` for a latency without an answer, and a ratio of nothing.
    pub fn of(self, report: &Report) -> Option<f64> {
        match self {
            Metric::Errors => {
                let Report { failed, timed_out, lost, skipped, .. } = report;
                let refused: u64 = report.errors.values().sum();
                Some((refused.max(*failed) + timed_out + lost + skipped) as f64)
            }
            Metric::Throughput => Some(report.throughput_per_s),
            Metric::HitRatio => report.hit_ratio,
            _ => self.of_summary(&report.latency_from_due),
        }
    }

    /// The latency of this name; `None` without an answer, and for other figures.
    pub(crate) fn of_summary(self, summary: &Summary) -> Option<f64> {
        let value = match self {
            Metric::Mean => summary.mean_ns,
            Metric::P50 => summary.p50_ns as f64,
            Metric::P90 => summary.p90_ns as f64,
            Metric::P99 => summary.p99_ns as f64,
            Metric::P999 => summary.p999_ns as f64,
            Metric::P9999 => summary.p9999_ns as f64,
            Metric::Max => summary.max_ns as f64,
            Metric::Errors | Metric::Throughput | Metric::HitRatio => return None,
        };
        (summary.count > 0).then_some(value)
    }

    /// Whether it is a time, in nanoseconds.
    pub const fn is_latency(self) -> bool {
        !matches!(self, Metric::Errors | Metric::Throughput | Metric::HitRatio)
    }

    /// A value of it, for people.
    pub fn show(self, value: f64) -> String {
        match self {
            Metric::HitRatio => format!("{:.2} %", value * 100.0),
            Metric::Errors => format!("{value}"),
            Metric::Throughput => format!("{}/s", number(value)),
            _ => duration(value as u64),
        }
    }

    fn parse_limit(self, text: &str) -> Option<f64> {
        let unit_at = text.find(|c: char| !(c.is_ascii_digit() || c == '.')).unwrap_or(text.len());
        let (number, unit) = text.split_at(unit_at);
        let number: f64 = number.parse().ok()?;
        let factor = match (self, unit.trim()) {
            (Metric::HitRatio, "%") => 0.01,
            (Metric::Throughput | Metric::Errors, "k") => 1e3,
            (Metric::Throughput | Metric::Errors, "M") => 1e6,
            (metric, "") if !metric.is_latency() => 1.0,
            (metric, "ns") if metric.is_latency() => 1.0,
            (metric, "us" | "µs") if metric.is_latency() => 1e3,
            (metric, "ms") if metric.is_latency() => 1e6,
            (metric, "s") if metric.is_latency() => 1e9,
            _ => return None,
        };
        Some(number * factor)
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Comparison {
    Above,
    AtLeast,
    Below,
    AtMost,
}

impl FromStr for Threshold {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let usage = || {
            let names = Metric::ALL.map(Metric::name).join(", ");
            format!(
                "{text:?} is not a threshold; expected for example p99>5ms, with one of {names}"
            )
        };
        let at = text.find(['<', '>']).ok_or_else(usage)?;
        let (name, rest) = text.split_at(at);
        let (comparison, limit) = match (rest.strip_prefix(">="), rest.strip_prefix("<=")) {
            (Some(limit), _) => (Comparison::AtLeast, limit),
            (_, Some(limit)) => (Comparison::AtMost, limit),
            _ if rest.starts_with('>') => (Comparison::Above, &rest[1..]),
            _ => (Comparison::Below, &rest[1..]),
        };
        let metric = Metric::ALL.into_iter().find(|metric| metric.name() == name.trim());
        let metric = metric.ok_or_else(usage)?;
        let limit = metric.parse_limit(limit.trim()).ok_or_else(|| {
            let unit = match metric {
                Metric::HitRatio => "a share (0.9) or per cent (90%)",
                Metric::Errors | Metric::Throughput => "a number (1000, 1k, 1M)",
                _ => "a time (250us, 5ms, 1s)",
            };
            format!("{text:?}: the limit of {} is {unit}", metric.name())
        })?;
        Ok(Threshold { metric, comparison, limit, text: text.to_owned() })
    }
}

impl Threshold {
    /// The latency `metric` may be so long, and no longer.
    pub fn latency_above(metric: Metric, limit: Duration) -> Self {
        let limit = limit.as_nanos() as f64;
        let text = format!("{}>{}", metric.name(), metric.show(limit));
        Threshold { metric, comparison: Comparison::Above, limit, text }
    }

    /// Says how the report breaks it, if it does. A latency of which there is none breaks every
    /// limit.
    pub fn broken_by(&self, report: &Report) -> Option<String> {
        let name = self.metric.name();
        let Some(value) = self.metric.of(report) else {
            return Some(format!("{self}: there is no {name}, because nothing was answered"));
        };
        let broken = match self.comparison {
            Comparison::Above => value > self.limit,
            Comparison::AtLeast => value >= self.limit,
            Comparison::Below => value < self.limit,
            Comparison::AtMost => value <= self.limit,
        };
        broken.then(|| format!("{self}: {name} is {}", self.metric.show(value)))
    }
}

impl fmt::Display for Threshold {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::tests::report;

    #[test]
    fn thresholds_are_broken_at_their_limit_and_not_before() {
        // 1000 answers of 1 ms but one of 500 ms; two failures; 501 a second; all hits.
        let report = report();
        for (text, broken) in [
            ("p99>5ms", false),
            ("p99>900us", true),
            ("p99.99 > 499 ms", true),
            ("max>1s", false),
            ("errors>=2", true),
            ("errors>2", false),
            ("throughput<0.5k", false),
            ("throughput<502", true),
            ("hit-ratio<100%", false),
            ("hit-ratio<=1", true),
            ("p50<500µs", false),
        ] {
            let threshold: Threshold = text.parse().unwrap();
            assert_eq!(threshold.broken_by(&report).is_some(), broken, "{text}");
        }
        let threshold: Threshold = "p99.99>1ms".parse().unwrap();
        let said = threshold.broken_by(&report).unwrap();
        assert!(said.starts_with("p99.99>1ms: p99.99 is 50") || said.contains("499"), "{said}");
    }

    #[test]
    fn without_an_answer_no_latency_is_good_enough() {
        let mut report = report();
        report.latency_from_due = Summary::default();
        let threshold: Threshold = "p99>9s".parse().unwrap();
        assert!(threshold.broken_by(&report).unwrap().contains("nothing was answered"));
    }

    #[test]
    fn says_what_a_threshold_is_made_of() {
        for (text, named) in [
            ("p99", "not a threshold"),
            ("p98>1ms", "p99.99"),
            ("p99>5", "a time"),
            ("hit-ratio<5ms", "a share"),
            ("throughput<fast", "a number"),
        ] {
            let error = text.parse::<Threshold>().unwrap_err();
            assert!(error.contains(named) && error.contains(text), "{error}");
        }
    }
}
