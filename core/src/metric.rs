//! Descriptions of metrics: name, kind, unit, label for people, help text, and section.
//!
//! A crate describes its metrics with [`metrics!`](crate::metrics) and counts with plain atomics.
//! A service pairs each description with its value when a client asks. Only names and values are
//! sent, so a client shows the metrics of a newer server, too, under their names.

/// The kind of a metric.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A number that only grows while the process runs.
    Counter,
    /// A number that goes up and down.
    Gauge,
    /// A distribution of values since the start.
    Histogram,
    /// A short text.
    Text,
    /// A text for each of several equal things. The name of each ends in its number.
    Texts,
}

/// The unit of a metric's values.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unit {
    /// No unit, or a number of things.
    Count,
    /// Bytes.
    Bytes,
    /// Nanoseconds.
    Nanos,
    /// Microseconds.
    Micros,
    /// Milliseconds.
    Millis,
    /// A share in millionths: an upper bound with 95 % confidence.
    Bound,
}

impl Unit {
    /// The suffix of names in the protocol.
    fn suffix(self) -> &'static str {
        match self {
            Unit::Count | Unit::Bound => "",
            Unit::Bytes => "_bytes",
            Unit::Nanos => "_ns",
            Unit::Micros => "_us",
            Unit::Millis => "_ms",
        }
    }

    /// The suffix of names in Prometheus, which measures in seconds, bytes and ratios.
    fn base_suffix(self) -> &'static str {
        match self {
            Unit::Count => "",
            Unit::Bytes => "_bytes",
            Unit::Nanos | Unit::Micros | Unit::Millis => "_seconds",
            Unit::Bound => "_ratio",
        }
    }

    /// The number of these units in the unit of Prometheus.
    pub fn per_base(self) -> f64 {
        match self {
            Unit::Count | Unit::Bytes => 1.0,
            Unit::Nanos => 1e9,
            Unit::Micros | Unit::Bound => 1e6,
            Unit::Millis => 1e3,
        }
    }
}

/// A name that several metrics share in Prometheus, where a label keeps them apart.
#[derive(Debug, PartialEq, Eq)]
pub struct Family {
    /// The common name, without prefix, unit and `_total`.
    pub name: &'static str,
    /// The name of the label.
    pub label: &'static str,
    /// The meaning of all of them.
    pub help: &'static str,
}

/// The description of a metric.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Metric {
    /// The name in the protocol: snake_case, with the unit at its end.
    pub name: &'static str,
    /// The kind of its values.
    pub kind: Kind,
    /// Their unit.
    pub unit: Unit,
    /// A few words for a table.
    pub label: &'static str,
    /// The meaning in a sentence.
    pub help: &'static str,
    /// The heading of a table that it belongs to. Empty for values in the table's title.
    pub section: &'static str,
    /// The family in Prometheus, and the value of its label.
    pub family: Option<(&'static Family, &'static str)>,
    /// All values of a text that names a state.
    pub states: &'static [&'static str],
    /// The kind of thing that has a value each, and the label in Prometheus: `replica`. The names
    /// of the values are `name{replica="ADDRESS"}`.
    pub per: Option<&'static str>,
}

impl Metric {
    /// A metric without family, states and label. [`metrics!`](crate::metrics) is shorter.
    pub const fn new(
        name: &'static str,
        kind: Kind,
        unit: Unit,
        label: &'static str,
        help: &'static str,
        section: &'static str,
    ) -> Self {
        Metric { name, kind, unit, label, help, section, family: None, states: &[], per: None }
    }

    /// The same metric in a family of Prometheus.
    #[must_use]
    pub const fn of(mut self, family: &'static Family, value: &'static str) -> Self {
        self.family = Some((family, value));
        self
    }

    /// The same text, which is one of these.
    #[must_use]
    pub const fn states(mut self, states: &'static [&'static str]) -> Self {
        self.states = states;
        self
    }

    /// The same metric, with a value for each thing of this kind.
    #[must_use]
    pub const fn per(mut self, kind: &'static str) -> Self {
        self.per = Some(kind);
        self
    }

    /// The name of the value of one thing: `name{replica="ADDRESS"}`.
    pub fn name_of(&self, thing: &str) -> String {
        format!("{}{{{}=\"{thing}\"}}", self.name, self.per.unwrap_or("of"))
    }

    /// The thing in a name that [`name_of`](Self::name_of) has made.
    pub fn thing_in<'n>(&self, name: &'n str) -> Option<&'n str> {
        let labels = name.strip_prefix(self.name)?.strip_prefix('{')?.strip_suffix("\"}")?;
        labels.strip_prefix(self.per?)?.strip_prefix("=\"")
    }

    /// Whether a value of this name is one of this metric.
    pub fn has_name(&self, name: &str) -> bool {
        match self.kind {
            _ if self.per.is_some() => self.thing_in(name).is_some(),
            Kind::Texts => name
                .strip_prefix(self.name)
                .and_then(|rest| rest.strip_prefix('_'))
                .is_some_and(|n| !n.is_empty() && n.bytes().all(|byte| byte.is_ascii_digit())),
            _ => self.name == name,
        }
    }

    /// The name in Prometheus, without the prefix of the program. `_total` ends a counter's name.
    pub fn prometheus_name(&self) -> String {
        let base = match self.family {
            Some((family, _)) => family.name,
            None => self.name.strip_suffix(self.unit.suffix()).unwrap_or(self.name),
        };
        let total = if self.kind == Kind::Counter { "_total" } else { "" };
        format!("{base}{}{total}", self.unit.base_suffix())
    }
}

/// Describes the metrics of a crate, by the sections of a table: a constant for each, and
/// `METRICS`, the list of all.
///
/// ```
/// # #![allow(missing_docs)]
/// afterimage_core::metrics! {
///     "Pictures" {
///         DECODED = Counter("pictures_decoded", Count, "decoded", "Pictures decoded");
///         DECODE_TIME = Counter("decode_time_us", Micros, "time", "Time spent on decoding");
///     }
/// }
/// assert_eq!(METRICS, [DECODED, DECODE_TIME]);
/// assert_eq!(DECODE_TIME.prometheus_name(), "decode_time_seconds_total");
/// ```
#[macro_export]
macro_rules! metrics {
    ($($section:literal {
        $($const:ident = $kind:ident($name:literal, $unit:ident, $label:literal, $help:literal)
            $(.$with:ident($($arg:expr),*))*;)*
    })*) => {
        $($(
            #[doc = $help]
            pub const $const: $crate::Metric = $crate::Metric::new(
                $name,
                $crate::metric::Kind::$kind,
                $crate::metric::Unit::$unit,
                $label,
                $help,
                $section,
            )$(.$with($($arg),*))*;
        )*)*

        /// All metrics of this crate, in the order of a table.
        pub const METRICS: &[$crate::Metric] = &[$($($const,)*)*];
    };
}

#[cfg(test)]
mod tests {
    use super::*;

    const ANSWERS: Family = Family { name: "answers", label: "origin", help: "Answers" };

    #[test]
    fn a_name_of_a_thing_can_be_taken_apart() {
        let metric = Metric::new("in_flight", Kind::Gauge, Unit::Count, "", "", "").per("replica");
        let name = metric.name_of("[::1]:7402");
        assert_eq!(name, "in_flight{replica=\"[::1]:7402\"}");
        assert_eq!(metric.thing_in(&name), Some("[::1]:7402"));
        assert!(metric.has_name(&name));
        for other in ["in_flight", "in_flight{replica=\"", "in_flight{other=\"a\"}", "x"] {
            assert!(!metric.has_name(other), "{other}");
        }
    }

    #[test]
    fn a_prometheus_name_has_base_units_and_total() {
        let named = |name, kind, unit| Metric::new(name, kind, unit, "", "", "").prometheus_name();
        assert_eq!(named("hits", Kind::Counter, Unit::Count), "hits_total");
        assert_eq!(named("busy_us", Kind::Counter, Unit::Micros), "busy_seconds_total");
        assert_eq!(named("memory_bytes", Kind::Gauge, Unit::Bytes), "memory_bytes");
        assert_eq!(named("latency_ns", Kind::Histogram, Unit::Nanos), "latency_seconds");
        let hits = Metric::new("hits", Kind::Counter, Unit::Count, "", "", "").of(&ANSWERS, "hit");
        assert_eq!(hits.prometheus_name(), "answers_total");
    }

    #[test]
    fn numbered_texts_match_by_their_number() {
        let texts = Metric::new("replica", Kind::Texts, Unit::Count, "", "", "");
        assert!(texts.has_name("replica_12"));
        for other in ["replica", "replica_", "replica_x", "replicas_1", "replica_1x"] {
            assert!(!texts.has_name(other), "{other}");
        }
    }
}
