//! One look at a service, as text for people and as JSON for programs.

use std::fmt::Write as _;

use afterimage_wire::proto::stats::Value;
use serde_json::{Map, json};

use super::reading::{Interval, Quantiles};
use crate::format::{percent, short};

/// A line for everything that the service tells, in its order; behind counters what they grew by in
/// a second.
pub(super) fn text(interval: &Interval) -> String {
    let mut out = String::new();
    let mut line = |name: &str, value: String, rate: Option<String>| {
        let rate = rate.map(|rate| format!("  {rate}")).unwrap_or_default();
        let _ = writeln!(out, "{}", format!("{name:<28} {value:<20}{rate}").trim_end());
    };
    for (name, value) in &interval.now.stats.entries {
        match value {
            Value::Counter(value) => {
                let rate = interval.rate(name).filter(|&rate| rate > 0.0 && name != "uptime_ms");
                line(name, value.to_string(), rate.map(|rate| format!("{}/s", short(rate))));
            }
            Value::Gauge(value) => line(name, value.to_string(), None),
            Value::Text(text) => line(name, text.clone(), None),
            Value::Histogram(buckets) => line(name, of_histogram(&Quantiles::of(buckets)), None),
            _ => line(name, "(of a type that this version does not know)".into(), None),
        }
    }
    if let Some(ratio) = interval.hit_ratio() {
        let recent = interval.recent_hit_ratio().map(|recent| format!("now {}", percent(recent)));
        line("hit_ratio", percent(ratio), recent);
    }
    out
}

fn of_histogram(quantiles: &Quantiles) -> String {
    let Quantiles { count, p50, p99, p999, .. } = quantiles;
    match count {
        0 => "none yet".into(),
        _ => format!("p50 {p50}  p99 {p99}  p99.9 {p999}  ({count} of them)"),
    }
}

/// The same for programs: what the service tells under `values`, what its counters grew by in a
/// second under `per_second`, what its histograms took up in the interval under `recent`.
pub(super) fn json(server: &str, interval: &Interval) -> serde_json::Value {
    let (mut values, mut rates, mut recent) = (Map::new(), Map::new(), Map::new());
    for (name, value) in &interval.now.stats.entries {
        // Of two of one name the first counts.
        if values.contains_key(name) {
            continue;
        }
        let found = match value {
            Value::Counter(value) => json!(value),
            Value::Gauge(value) => json!(value),
            Value::Text(text) => json!(text),
            Value::Histogram(buckets) => quantiles_json(&Quantiles::of(buckets)),
            _ => continue,
        };
        values.insert(name.clone(), found);
        if let Some(rate) = interval.rate(name).filter(|_| name != "uptime_ms") {
            rates.insert(name.clone(), json!(rate));
        }
        if let (Some(_), Some(quantiles)) = (interval.seconds(), interval.recent(name)) {
            recent.insert(name.clone(), quantiles_json(&quantiles));
        }
    }
    json!({
        "server": server,
        "interval_s": interval.seconds(),
        "values": values,
        "per_second": rates,
        "recent": recent,
        "hit_ratio": interval.hit_ratio(),
        "recent_hit_ratio": interval.recent_hit_ratio(),
    })
}

fn quantiles_json(quantiles: &Quantiles) -> serde_json::Value {
    let Quantiles { count, p50, p99, p999, max } = quantiles;
    json!({"count": count, "p50": p50, "p99": p99, "p999": p999, "max": max})
}
