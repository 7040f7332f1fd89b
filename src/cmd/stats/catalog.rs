//! Metrics and their values as text for people.

use std::time::Duration;

use afterimage_core::Metric;
use afterimage_core::metric::{Kind, Unit};
use afterimage_wire::proto::stats::Value;
use afterimage_wire::text::escape_text;

use crate::args::Size;
use crate::format::{grouped, long_time, nanos, percent};
use crate::metrics::find;

/// The sections of a report. Latencies have a table of their own.
pub(crate) const SECTIONS: [&str; 13] = [
    "Time",
    "Answers",
    "Store",
    "Label table",
    "Byte store",
    "Disk",
    "Snapshot",
    "Classifier",
    "Proxy",
    "Jobs",
    "Streams",
    "Audit of hits",
    "Connections",
];

/// A number with its unit.
pub(super) fn with_unit(unit: Unit, number: u64) -> String {
    match unit {
        Unit::Count => grouped(number),
        Unit::Bytes => Size(number).to_string(),
        Unit::Nanos => nanos(number),
        Unit::Micros => long_time(Duration::from_micros(number)),
        Unit::Millis => long_time(Duration::from_millis(number)),
        Unit::Bound => format!("below {} (95 % confidence)", percent(number as f64 / 1e6)),
    }
}

/// The label of a statistic, known or not.
pub(super) fn label(name: &str) -> String {
    match find(name) {
        Some(Metric { kind: Kind::Texts, label, .. }) => {
            format!("{label} {}", name.rsplit_once('_').map_or("", |(_, number)| number))
        }
        Some(metric) => match metric.thing_in(name) {
            Some(thing) => format!("{}: {}", metric.label, escape_text(thing)),
            None => metric.label.to_owned(),
        },
        None => escape_text(&name.replace('_', " ")).into_owned(),
    }
}

/// A counter, gauge or text for people; `None` for zero and for a histogram.
pub(super) fn show(name: &str, value: &Value) -> Option<String> {
    let unit = find(name).map_or(Unit::Count, |metric| metric.unit);
    match value {
        Value::Counter(number) => (*number > 0).then(|| with_unit(unit, *number)),
        Value::Gauge(number) => match u64::try_from(*number) {
            Ok(0) => None,
            Ok(number) => Some(with_unit(unit, number)),
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
        assert_eq!(label("classifier_12"), "replica 12");
    }
}
