//! Statistics as text for Prometheus (exposition format 0.0.4).
//!
//! Names begin with `afterimage_`. Times are in seconds and sizes in bytes, counters end in
//! `_total`, and each series has the label `service`. A text becomes a series of value 1 with the
//! text as a label. A value of one replica has the label `replica`; the texts of replicas, which
//! change with every call, are not exported.

use std::collections::HashSet;
use std::fmt::{Display, Write as _};

use afterimage_core::Metric;
use afterimage_core::metric::{Kind, Unit};

use crate::proto::stats::{Stats, Value};
use crate::server::metrics;
use crate::text::escape_text;

/// Statistics of the services of one process as text. `describe` finds the metric of a name; a
/// value without description keeps its name and has no help text.
///
/// ```
/// use afterimage_wire::prometheus;
/// use afterimage_wire::proto::stats::Stats;
/// use afterimage_wire::server::metrics::{METRICS, REQUESTS, SERVICE};
///
/// let mut stats = Stats::default();
/// stats.text(&SERVICE, "cache");
/// stats.counter(&REQUESTS, 7);
/// let describe = |name: &str| METRICS.iter().find(|metric| metric.has_name(name));
/// let text = prometheus::text(&[stats], describe);
/// assert!(text.ends_with("\nafterimage_requests_total{service=\"cache\"} 7\n"));
/// ```
pub fn text<'m>(services: &[Stats], describe: impl Fn(&str) -> Option<&'m Metric>) -> String {
    let mut page = Page::default();
    for stats in services {
        let service = match stats.get(metrics::SERVICE.name) {
            Some(Value::Text(service)) => service,
            _ => "",
        };
        for (name, value) in stats.entries.iter().filter(|(name, _)| name != metrics::SERVICE.name)
        {
            page.add(service, name, value, describe(name));
        }
    }
    page.text()
}

/// The families of a page in the order of their first series.
#[derive(Default)]
struct Page {
    families: Vec<Family>,
    /// A series must not occur twice. The first one counts.
    seen: HashSet<String>,
}

/// The series of one name.
struct Family {
    name: String,
    help: Option<&'static str>,
    kind: &'static str,
    lines: String,
}

impl Page {
    fn add(&mut self, service: &str, name: &str, value: &Value, metric: Option<&Metric>) {
        let described = metric.filter(|metric| is_of_kind(value, metric.kind));
        let unit = described.map_or(Unit::Count, |metric| metric.unit);
        let kind = match value {
            Value::Counter(_) => "counter",
            Value::Gauge(_) | Value::Text(_) => "gauge",
            Value::Histogram(_) => "histogram",
            Value::Unknown(_) => return,
        };
        let mut labels = format!("service=\"{}\"", escaped(service));
        if let Some((family, value)) = described.and_then(|metric| metric.family) {
            let _ = write!(labels, ",{}=\"{value}\"", family.label);
        }
        if let Some(metric) = described
            && let (Some(label), Some(thing)) = (metric.per, metric.thing_in(name))
        {
            let _ = write!(labels, ",{label}=\"{}\"", escaped(thing));
        }
        let base = match (described, value) {
            (Some(metric), Value::Text(_)) if metric.states.is_empty() => format!("{name}_info"),
            (Some(metric), _) => metric.prometheus_name(),
            (None, Value::Counter(_)) => format!("{name}_total"),
            (None, _) => name.to_owned(),
        };
        let family = format!("afterimage_{}", valid(&base));
        if !self.seen.insert(format!("{family}{{{labels}}}")) {
            return;
        }
        let mut lines = String::new();
        let mut line = |suffix: &str, more: &str, value: &dyn Display| {
            let _ = writeln!(lines, "{family}{suffix}{{{labels}{more}}} {value}");
        };
        match (value, described) {
            (Value::Counter(value), _) => line("", "", &scaled(*value as f64, unit)),
            (Value::Gauge(value), _) => line("", "", &scaled(*value as f64, unit)),
            (Value::Histogram(buckets), _) => histogram(buckets, unit, line),
            (Value::Text(text), Some(Metric { kind: Kind::Text, states: [], .. })) => {
                line("", &format!(",{name}=\"{}\"", escaped(text)), &1);
            }
            (Value::Text(text), Some(Metric { kind: Kind::Text, states, .. })) => {
                for state in *states {
                    line("", &format!(",state=\"{state}\""), &u8::from(text == state));
                }
            }
            (Value::Text(_) | Value::Unknown(_), _) => return,
        }
        let help = described.map(|metric| metric.family.map_or(metric.help, |(f, _)| f.help));
        match self.families.iter_mut().find(|found| found.name == family) {
            Some(found) if found.kind == kind => found.lines.push_str(&lines),
            Some(_) => {}
            None => self.families.push(Family { name: family, help, kind, lines }),
        }
    }

    fn text(&self) -> String {
        let mut out = String::new();
        for Family { name, help, kind, lines } in &self.families {
            if let Some(help) = help {
                let _ = writeln!(out, "# HELP {name} {help}");
            }
            let _ = write!(out, "# TYPE {name} {kind}\n{lines}");
        }
        out
    }
}

fn is_of_kind(value: &Value, kind: Kind) -> bool {
    match value {
        Value::Counter(_) => kind == Kind::Counter,
        Value::Gauge(_) => kind == Kind::Gauge,
        Value::Text(_) => matches!(kind, Kind::Text | Kind::Texts),
        Value::Histogram(_) => kind == Kind::Histogram,
        Value::Unknown(_) => false,
    }
}

/// Writes buckets with bounds of 1, 2.5 and 5 times a power of ten.
///
/// The server's buckets have two significant digits and are counted by their upper bound. So a
/// bucket's count is that of values at most 1 % below its bound, and the sum is at most 1 % too
/// high. Both only grow, as Prometheus requires.
fn histogram(buckets: &[(u64, u64)], unit: Unit, mut line: impl FnMut(&str, &str, &dyn Display)) {
    /// From 100 ns to 50 s.
    const DECADES: std::ops::RangeInclusive<u32> = 2..=10;
    let (mut count, mut sum, mut next) = (0u64, 0.0, buckets.iter().peekable());
    for tenths in DECADES.flat_map(|power| [10, 25, 50].map(|tenths| tenths * 10u64.pow(power - 1)))
    {
        while let Some(&(bound, more)) = next.next_if(|(bound, _)| *bound <= tenths) {
            count = count.saturating_add(more);
            sum += bound as f64 * more as f64;
        }
        line("_bucket", &format!(",le=\"{}\"", scaled(tenths as f64, unit)), &count);
    }
    for &(bound, more) in next {
        count = count.saturating_add(more);
        sum += bound as f64 * more as f64;
    }
    line("_bucket", ",le=\"+Inf\"", &count);
    line("_sum", "", &scaled(sum, unit));
    line("_count", "", &count);
}

/// A value in the unit of Prometheus.
fn scaled(value: f64, unit: Unit) -> f64 {
    value / unit.per_base()
}

/// A name in which other characters than letters, digits and `_` are replaced.
fn valid(name: &str) -> String {
    name.chars().map(|c| if c.is_ascii_alphanumeric() { c } else { '_' }).collect()
}

/// The value of a label between its quotes. It can be a peer's text, and people read it, too.
fn escaped(text: &str) -> String {
    escape_text(text).replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    const RESULTS: afterimage_core::metric::Family =
        afterimage_core::metric::Family { name: "lookups", label: "result", help: "Lookups" };

    afterimage_core::metrics! {
        "" {
            HITS = Counter("hits", Count, "hits", "Hits").of(&RESULTS, "hit");
            MISSES = Counter("misses", Count, "misses", "Misses").of(&RESULTS, "miss");
            BUSY = Counter("busy_us", Micros, "busy", "Time busy");
            BREAKER = Text("breaker", Count, "breaker", "State").states(&["closed", "open"]);
            STORE = Text("store", Count, "store", "Kind of the store");
            IN_FLIGHT = Gauge("in_flight", Count, "in flight", "Rows in flight").per("replica");
            REPLICA = Texts("replica", Count, "replica", "State of a replica");
            LATENCY = Histogram("latency_ns", Nanos, "latency", "Latency");
        }
    }

    fn shown(services: &[Stats]) -> String {
        text(services, |name| METRICS.iter().find(|metric| metric.has_name(name)))
    }

    #[test]
    fn metrics_have_base_units_families_and_labels() {
        let mut stats = Stats::default();
        stats.text(&metrics::SERVICE, "memo");
        stats.counter(&HITS, 9);
        stats.counter(&BUSY, 1_500_000);
        stats.counter(&MISSES, 1);
        stats.counter(&MISSES, 2);
        stats.text(&BREAKER, "open");
        stats.text(&STORE, "a \"b\"\\\n\x1b[2J\u{202e}");
        stats.texts(&REPLICA, 1, "127.0.0.1:1: well");
        stats.of(&IN_FLIGHT, "127.0.0.1:1", 3);
        stats.of(&IN_FLIGHT, "a\"}\n", 4);
        stats.push("a-new.counter", Value::Counter(3));
        stats.push("busy_us", Value::Gauge(4));
        let mut other = Stats::default();
        other.text(&metrics::SERVICE, "cache");
        other.counter(&HITS, 5);
        assert_eq!(
            shown(&[stats, other]),
            r#"# HELP afterimage_lookups_total Lookups
# TYPE afterimage_lookups_total counter
afterimage_lookups_total{service="memo",result="hit"} 9
afterimage_lookups_total{service="memo",result="miss"} 1
afterimage_lookups_total{service="cache",result="hit"} 5
# HELP afterimage_busy_seconds_total Time busy
# TYPE afterimage_busy_seconds_total counter
afterimage_busy_seconds_total{service="memo"} 1.5
# HELP afterimage_breaker State
# TYPE afterimage_breaker gauge
afterimage_breaker{service="memo",state="closed"} 0
afterimage_breaker{service="memo",state="open"} 1
# HELP afterimage_store_info Kind of the store
# TYPE afterimage_store_info gauge
afterimage_store_info{service="memo",store="a \"b\"\\\\n\\u{1b}[2J\\u{202e}"} 1
# HELP afterimage_in_flight Rows in flight
# TYPE afterimage_in_flight gauge
afterimage_in_flight{service="memo",replica="127.0.0.1:1"} 3
afterimage_in_flight{service="memo",replica="a\"}\\n"} 4
# TYPE afterimage_a_new_counter_total counter
afterimage_a_new_counter_total{service="memo"} 3
# TYPE afterimage_busy_us gauge
afterimage_busy_us{service="memo"} 4
"#
        );
    }

    #[test]
    fn a_histogram_is_cumulative_with_fixed_bounds() {
        let mut stats = Stats::default();
        stats.histogram(&LATENCY, [(100, 2), (101, 3), (70_000_000_000, 1)].into_iter());
        let shown = shown(&[stats]);
        let value = |series: &str| {
            let line = shown.lines().find_map(|line| line.strip_prefix(series));
            line.unwrap_or_else(|| panic!("{series}: {shown}")).trim().to_owned()
        };
        let bucket =
            |le| value(&format!("afterimage_latency_seconds_bucket{{service=\"\",le=\"{le}\"}}"));
        assert_eq!(bucket("0.0000001"), "2");
        assert_eq!(bucket("0.00000025"), "5");
        assert_eq!(bucket("50"), "5");
        assert_eq!(bucket("+Inf"), "6");
        assert_eq!(value("afterimage_latency_seconds_count{service=\"\"}"), "6");
        assert_eq!(value("afterimage_latency_seconds_sum{service=\"\"}"), "70.000000503");
        assert!(shown.contains("# TYPE afterimage_latency_seconds histogram\n"), "{shown}");
    }
}
