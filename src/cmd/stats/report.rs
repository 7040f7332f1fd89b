//! A service's statistics at one moment: a table for people, and JSON for programs.

use std::fmt::Write as _;

use afterimage_cache::metrics as cache;
use afterimage_classifier::metrics as engine;
use afterimage_core::metric::{Kind, Unit};
use afterimage_memo::metrics as memo;
use afterimage_wire::proto::stats::{Quantiles, Value};
use afterimage_wire::server::metrics as server;
use afterimage_wire::text::escape_text;
use serde_json::{Map, json};

use super::catalog::{self, SECTIONS};
use super::reading::Interval;
use crate::format::{long_time, nanos, percent, short};
use crate::metrics;

/// Columns of the labels, and of the values after them.
const LABEL: usize = 34;
const VALUE: usize = 14;

/// A table for people: hit ratio and savings first, then sections. Zeros are hidden.
pub(super) fn text(server: &str, interval: &Interval) -> String {
    let now = &interval.now;
    let uptime = now.number(server::UPTIME.name).unwrap_or(0);
    let mut out = format!(
        "{} {server}, up {} ({})\n",
        escape_text(now.text(server::SERVICE.name).unwrap_or("service")),
        catalog::with_unit(Unit::Millis, uptime),
        escape_text(now.text(server::VERSION.name).unwrap_or("unknown version")),
    );
    out.push('\n');
    if let Some(ratio) = interval.hit_ratio() {
        let recent = interval.recent_hit_ratio().zip(interval.seconds());
        let recent = recent.map(|(recent, seconds)| {
            let time = long_time(std::time::Duration::from_secs_f64(seconds));
            format!("last {time}: {}", percent(recent))
        });
        row(&mut out, "hit ratio", &percent(ratio), recent);
    }
    for section in SECTIONS {
        let mut rows = String::new();
        for metric in metrics::all().filter(|metric| metric.section == section) {
            // The section's title shows a text without number, and a text for each replica has all
            // that is known of it.
            if metric.kind == Kind::Text || metric.per.is_some() {
                continue;
            }
            for (name, value) in now.stats.entries.iter().filter(|(name, _)| metric.has_name(name))
            {
                let Some(shown) = catalog::show(name, value) else { continue };
                row(&mut rows, &catalog::label(name), &shown, remark(name, interval));
            }
        }
        let kind = kind(section, interval);
        if rows.is_empty() && kind.is_empty() {
            continue;
        }
        match section {
            // These belong to the hit ratio above them.
            "Time" => out.push_str(&rows),
            section => {
                let _ = write!(out, "\n{section}{kind}\n{rows}");
            }
        }
        if section == "Answers" {
            out.push_str(&latencies(interval));
        }
    }
    let mut rest = String::new();
    for (name, value) in &now.stats.entries {
        if metrics::find(name).is_none()
            && let Some(shown) = catalog::show(name, value)
        {
            row(&mut rest, &catalog::label(name), &shown, remark(name, interval));
        }
    }
    if !rest.is_empty() {
        let _ = write!(out, "\nOther\n{rest}");
    }
    // A service without lookups has no lines below the title.
    out.replacen("\n\n\n", "\n\n", 1)
}

/// A line of a label and a value, with a remark behind them.
fn row(out: &mut String, label: &str, value: &str, remark: Option<String>) {
    let remark = remark.map(|remark| format!("  {remark}")).unwrap_or_default();
    let line = format!("  {label:<LABEL$}{value:<VALUE$}{remark}");
    let _ = writeln!(out, "{}", line.trim_end());
}

/// The remark behind a value: the rate of a counter, or a share.
fn remark(name: &str, interval: &Interval) -> Option<String> {
    let number = |name| interval.now.number(name);
    let share = |part: u64, whole: u64| (whole > 0).then(|| part as f64 / whole as f64);
    if name == cache::ENTRIES.name || name == memo::STORE_ENTRIES.name {
        let is_own = name == cache::ENTRIES.name;
        let capacity = if is_own { cache::CAPACITY } else { memo::STORE_CAPACITY };
        return share(number(name)?, number(capacity.name)?)
            .map(|share| format!("{} full", percent(share)));
    }
    if name == engine::BATCHES.name {
        return share(number(engine::SCORED.name)?, number(name)?)
            .map(|size| format!("mean size {size:.1}"));
    }
    if name == engine::BUSY.name {
        return interval.rate(name).map(|rate| format!("{:.2} cores busy", rate / 1e6));
    }
    if metrics::find(name).is_some_and(|metric| metric.unit != Unit::Count) {
        return None;
    }
    interval.rate(name).filter(|&rate| rate > 0.0).map(|rate| format!("{}/s", short(rate)))
}

/// The state of the store or of the classifier, behind its section's title.
fn kind(section: &str, interval: &Interval) -> String {
    let text = |name: &str| Some(escape_text(interval.now.text(name)?).into_owned());
    let states: Vec<String> = match section {
        "Store" => {
            let connected =
                text(memo::STORE_CONNECTED.name).map(|connected| match connected.as_str() {
                    "yes" => "connected".to_owned(),
                    _ => "not connected".to_owned(),
                });
            let breaker =
                text(memo::STORE_BREAKER.name).map(|state| format!("circuit breaker {state}"));
            let bypass = text(memo::AUTO_BYPASS.name).map(|state| format!("auto-bypass: {state}"));
            [text(memo::STORE.name), connected, breaker, bypass].into_iter().flatten().collect()
        }
        "Classifier" => text(memo::CLASSIFIER.name).into_iter().collect(),
        _ => Vec::new(),
    };
    if states.is_empty() { String::new() } else { format!(": {}", states.join(", ")) }
}

/// The latencies of answers since the start, by origin.
fn latencies(interval: &Interval) -> String {
    let mut rows = String::new();
    for (label, name) in [
        ("hits", memo::HIT_LATENCY.name),
        ("misses", memo::MISS_LATENCY.name),
        ("coalesced", memo::COALESCED_LATENCY.name),
    ] {
        let Some(Value::Histogram(buckets)) = interval.now.stats.get(name) else { continue };
        let Quantiles { count, p50, p99, p999, max } = Quantiles::of(buckets);
        if count == 0 {
            continue;
        }
        let [p50, p99, p999, max] = [p50, p99, p999, max].map(nanos);
        let _ = writeln!(rows, "  {label:<LABEL$}{p50:<VALUE$}{p99:<VALUE$}{p999:<VALUE$}{max}");
    }
    if rows.is_empty() {
        return rows;
    }
    let head = "Latency";
    let width = LABEL + 2;
    format!("\n{head:<width$}{:<VALUE$}{:<VALUE$}{:<VALUE$}max\n{rows}", "p50", "p99", "p99.9")
}

/// JSON for programs: the service's values under `values`, rates of counters under `per_second`,
/// the histograms of the interval under `recent`.
pub(super) fn json(server: &str, interval: &Interval) -> serde_json::Value {
    let (mut values, mut rates, mut recent) = (Map::new(), Map::new(), Map::new());
    for (name, value) in &interval.now.stats.entries {
        // Names are unique; a faulty server's second value is ignored.
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
        if let Some(rate) = interval.rate(name).filter(|_| name != server::UPTIME.name) {
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

#[cfg(test)]
mod tests {
    use afterimage_wire::proto::stats::Stats;

    use super::super::reading::Reading;
    use super::*;

    #[test]
    fn the_table_shows_hit_ratio_and_savings_first() {
        let memo = |seconds: u64| {
            let mut stats = Stats::default();
            stats.push("service", Value::Text("memo".into()));
            stats.push("version", Value::Text("afterimage/0.1.0".into()));
            stats.push("uptime_ms", Value::Counter(seconds * 1000));
            stats.push("hits", Value::Counter(990 * seconds));
            stats.push("misses", Value::Counter(10 * seconds));
            stats.push("coalesced", Value::Counter(0));
            stats.push("saved_time_us", Value::Counter(1_114_229_391));
            stats.push("saved_classifier_time_us", Value::Counter(123_000_000));
            stats.push("store", Value::Text("embedded".into()));
            stats.push("store_entries", Value::Gauge(250));
            stats.push("store_capacity", Value::Gauge(1000));
            stats.push("store_memory_bytes", Value::Gauge(8 << 20));
            stats.push("rejected_tags", Value::Counter(0));
            stats.push("a_new_counter", Value::Counter(7));
            stats.push("a_new_text", Value::Text("\x1b[2J".into()));
            stats.entries.push(("hit_latency_ns".into(), Value::Histogram(vec![(1250, 990)])));
            Reading::new(stats)
        };
        let found = text("127.0.0.1:7400", &Interval::between(memo(8), memo(10)));
        let expected = "\
memo 127.0.0.1:7400, up 10 s (afterimage/0.1.0)

  hit ratio                         99.00 %         last 2.0 s: 99.00 %
  waiting time saved                18 min 34 s
  classifier time saved             2 min 3 s

Answers
  hits                              9,900           990/s
  misses                            100             10/s

Latency                             p50           p99           p99.9         max
  hits                              1.25 µs       1.25 µs       1.25 µs       1.25 µs

Store: embedded

Label table
  entries                           250             25.00 % full
  capacity                          1,000
  memory                            8.0 MiB

Other
  a new counter                     7
  a new text                        \\u{1b}[2J
";
        assert_eq!(found, expected, "found:\n{found}");
    }
}
