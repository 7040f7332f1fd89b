//! The statistics that services report: group, label and unit of each name, for people.

use std::time::Duration;

use afterimage_wire::proto::stats::Value;
use afterimage_wire::text::escape_text;

use crate::args::Size;
use crate::format::{grouped, long_time, percent};

/// How a number is shown.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Unit {
    Count,
    Bytes,
    Micros,
    Millis,
    /// A share in millionths: an upper bound with 95 % confidence.
    Bound,
}

impl Unit {
    pub(super) fn show(self, number: u64) -> String {
        match self {
            Unit::Count => grouped(number),
            Unit::Bytes => Size(number).to_string(),
            Unit::Micros => long_time(Duration::from_micros(number)),
            Unit::Millis => long_time(Duration::from_millis(number)),
            Unit::Bound => format!("below {} (95 % confidence)", percent(number as f64 / 1e6)),
        }
    }
}

/// A statistic: its name in the protocol, its label for people, and its unit.
#[derive(Clone, Copy, Debug)]
pub(super) struct Metric {
    pub(super) name: &'static str,
    pub(super) label: &'static str,
    pub(super) unit: Unit,
}

const fn metric(name: &'static str, label: &'static str, unit: Unit) -> Metric {
    Metric { name, label, unit }
}

const fn count(name: &'static str, label: &'static str) -> Metric {
    metric(name, label, Unit::Count)
}

/// All groups in the order of a report.
pub(super) const GROUPS: &[(&str, &[Metric])] = &[
    (
        "Time",
        &[
            metric("saved_time_us", "waiting time saved", Unit::Micros),
            metric("saved_classifier_time_us", "classifier time saved", Unit::Micros),
            metric("lookup_time_us", "time spent on lookups", Unit::Micros),
        ],
    ),
    (
        "Answers",
        &[
            count("hits", "hits"),
            count("misses", "misses"),
            count("coalesced", "coalesced"),
            count("waiting", "in flight"),
            metric("waiting_bytes", "in flight, bytes", Unit::Bytes),
            count("overloaded", "refused: overloaded"),
            count("expired", "deadline exceeded"),
            count("abandoned", "client gone before the answer"),
            count("bad_inputs", "refused: invalid input"),
        ],
    ),
    (
        "Store",
        &[
            count("store_writes", "answers stored"),
            count("store_writes_failed", "writes failed"),
            count("store_lookups", "lookups"),
            count("store_lookups_failed", "lookups failed"),
            count("store_lookups_bypassed", "lookups skipped, store away"),
            count("auto_bypassed", "lookups skipped, not worth it"),
            count("store_breaker_opened", "circuit breaker opened"),
            count("rejected_tags", "entries with a wrong seal"),
        ],
    ),
    (
        "Label table",
        &[
            count("entries", "entries"),
            count("store_entries", "entries"),
            count("capacity", "capacity"),
            count("store_capacity", "capacity"),
            metric("memory_bytes", "memory", Unit::Bytes),
            metric("store_memory_bytes", "memory", Unit::Bytes),
            count("writes", "writes"),
            count("evictions", "evictions"),
            count("store_evictions", "evictions"),
        ],
    ),
    (
        "Snapshot",
        &[
            metric("snapshot_age_ms", "age", Unit::Millis),
            count("snapshot_entries", "entries"),
            metric("snapshot_bytes", "size", Unit::Bytes),
            metric("snapshot_took_ms", "time to write", Unit::Millis),
            count("snapshot_running", "being written"),
            count("snapshots_written", "written"),
            count("snapshots_failed", "failed"),
        ],
    ),
    (
        "Classifier",
        &[
            count("classifiers", "replicas"),
            count("classifiers_connected", "replicas connected"),
            count("classifier_calls", "calls"),
            count("classifier_calls_waiting", "calls waiting for a place"),
            count("classifier_failures", "calls failed"),
            count("classifier_calls_dropped", "calls dropped, no waiter left"),
            count("classifier_retries", "retries"),
            count("classifier_retries_denied", "retries denied by the budget"),
            count("classifier_ejections", "replicas ejected"),
            count("classifier_answers_of_other_models", "answers of another model"),
            count("models_met", "models met"),
            count("engine_scored", "images classified"),
            count("engine_batches", "batches"),
            count("engine_queued", "queued"),
            metric("engine_busy_us", "compute time", Unit::Micros),
            count("engine_overloaded", "refused: queue full"),
            count("engine_expired", "deadline exceeded in the queue"),
            count("engine_abandoned", "client gone, not scored"),
            count("engine_panicked", "panics"),
        ],
    ),
    (
        "Audit of hits",
        &[
            count("audits", "hits re-checked"),
            count("audits_disagreed", "mismatches"),
            metric("audit_wrong_hits_ppm_below", "wrong hits", Unit::Bound),
            count("audits_skipped", "checks skipped, classifier busy"),
            count("audits_failed", "checks failed"),
        ],
    ),
    (
        "Connections",
        &[
            count("connections_open", "open"),
            count("connections_accepted", "accepted"),
            count("connections_refused", "refused: too many"),
            count("connections_evicted", "evicted before their handshake"),
            count("connections_unauthenticated", "wrong or missing token"),
            count("tls_handshakes", "TLS handshakes"),
            count("tls_resumed", "TLS sessions resumed"),
            count("tls_failed", "TLS handshakes failed"),
            count("requests", "requests"),
            count("malformed", "malformed requests"),
            count("panics", "panics"),
        ],
    ),
];

/// The metric of this name.
pub(super) fn find(name: &str) -> Option<&'static Metric> {
    GROUPS.iter().flat_map(|(_, metrics)| *metrics).find(|metric| metric.name == name)
}

/// The label of a statistic, known or not.
pub(super) fn label(name: &str) -> String {
    match find(name) {
        Some(metric) => metric.label.to_owned(),
        None => escape_text(&name.replace('_', " ")).into_owned(),
    }
}

/// A counter, gauge or text for people; `None` for zero and for a histogram.
pub(super) fn show(name: &str, value: &Value) -> Option<String> {
    let unit = find(name).map_or(Unit::Count, |metric| metric.unit);
    match value {
        Value::Counter(number) => (*number > 0).then(|| unit.show(*number)),
        Value::Gauge(number) => match u64::try_from(*number) {
            Ok(0) => None,
            Ok(number) => Some(unit.show(number)),
            Err(_) => Some(number.to_string()),
        },
        Value::Text(text) => Some(escape_text(text).into_owned()),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_have_the_units_that_people_read() {
        for (name, number, shown) in [
            ("saved_time_us", 1_114_229_391, "18 min 34 s"),
            ("store_memory_bytes", 256 << 20, "256.0 MiB"),
            ("hits", 1_234_567, "1,234,567"),
            ("audit_wrong_hits_ppm_below", 282, "below 0.03 % (95 % confidence)"),
            ("a_new_counter", 1000, "1,000"),
        ] {
            assert_eq!(show(name, &Value::Counter(number)).as_deref(), Some(shown), "{name}");
            assert_eq!(show(name, &Value::Counter(0)), None, "{name}: zeros are hidden");
        }
        assert_eq!(label("a_new_counter"), "a new counter");
        assert_eq!(label("models_met"), "models met");
    }

    #[test]
    fn every_name_stands_once() {
        let mut names: Vec<&str> =
            GROUPS.iter().flat_map(|(_, metrics)| *metrics).map(|metric| metric.name).collect();
        let all = names.len();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), all);
    }
}
