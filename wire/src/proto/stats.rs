//! The body of `StatsResp`: named, self-describing values, so that a client can print values that
//! it does not know.

use afterimage_core::Metric;
use afterimage_core::metric::Kind;
use bytes::BufMut;

use super::BodyError;
use super::body::Reader;

/// Bytes in the largest body: the default limit of clients. Entries beyond it are dropped.
const MAX_BODY: usize = super::header::DEFAULT_MAX_BODY as usize;

/// Entries in the largest `StatsResp`: ten times what the largest service sends.
pub const MAX_ENTRIES: usize = 4096;

/// A service's statistics, in the order in which they are printed.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Stats {
    /// Pairs of name and value. Names are snake_case with their unit at the end. The name of one
    /// thing's value has a label: `replica_in_flight{replica="10.0.0.7:7402"}`.
    pub entries: Vec<(String, Value)>,
}

/// The value of one entry.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub enum Value {
    /// A number that only grows while the server runs.
    Counter(u64),
    /// A number that goes up and down.
    Gauge(i64),
    /// A short text.
    Text(String),
    /// Pairs of a bucket's upper bound and the number of values in it; bounds ascend.
    Histogram(Vec<(u64, u64)>),
    /// A type of a newer server, skipped by its length.
    Unknown(u8),
}

impl Value {
    fn code(&self) -> u8 {
        match self {
            Value::Counter(_) => 1,
            Value::Gauge(_) => 2,
            Value::Text(_) => 3,
            Value::Histogram(_) => 4,
            Value::Unknown(code) => *code,
        }
    }
}

/// Quantiles of a histogram.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Quantiles {
    /// Values in the histogram.
    pub count: u64,
    /// The median.
    pub p50: u64,
    /// 99 % of the values are at most this.
    pub p99: u64,
    /// 99.9 % of the values are at most this.
    pub p999: u64,
    /// The highest bucket's bound.
    pub max: u64,
}

impl Quantiles {
    /// Quantiles of buckets, given as upper bound and count with ascending bounds. A value counts
    /// as its bucket's bound.
    pub fn of(buckets: &[(u64, u64)]) -> Self {
        let count = buckets.iter().fold(0u64, |sum, &(_, count)| sum.saturating_add(count));
        let quantile = |share: f64| {
            let rank = ((count as f64 * share).ceil() as u64).clamp(1, count.max(1));
            let mut seen = 0u64;
            let found = buckets.iter().find(|&&(_, count)| {
                seen = seen.saturating_add(count);
                seen >= rank
            });
            found.map_or(0, |&(bound, _)| bound)
        };
        let max = buckets.iter().rev().find(|bucket| bucket.1 > 0).map_or(0, |bucket| bucket.0);
        Quantiles { count, p50: quantile(0.5), p99: quantile(0.99), p999: quantile(0.999), max }
    }
}

impl Stats {
    /// Adds the value of a counter.
    pub fn counter(&mut self, metric: &Metric, value: u64) {
        debug_assert_eq!(metric.kind, Kind::Counter, "{}", metric.name);
        self.push(metric.name, Value::Counter(value));
    }

    /// Adds the value of a gauge; values above `i64::MAX` are capped.
    pub fn gauge(&mut self, metric: &Metric, value: u64) {
        debug_assert_eq!(metric.kind, Kind::Gauge, "{}", metric.name);
        self.push(metric.name, Value::Gauge(i64::try_from(value).unwrap_or(i64::MAX)));
    }

    /// Adds a text.
    pub fn text(&mut self, metric: &Metric, value: impl Into<String>) {
        let value = value.into();
        debug_assert_eq!(metric.kind, Kind::Text, "{}", metric.name);
        debug_assert!(
            metric.states.is_empty() || metric.states.contains(&value.as_str()),
            "{} is {value:?}, which is not one of its states",
            metric.name
        );
        self.push(metric.name, Value::Text(value));
    }

    /// Adds the value of a counter or a gauge for one of several things, such as a replica.
    pub fn of(&mut self, metric: &Metric, thing: &str, value: u64) {
        debug_assert!(metric.per.is_some(), "{} has one value", metric.name);
        let value = match metric.kind {
            Kind::Counter => Value::Counter(value),
            _ => Value::Gauge(i64::try_from(value).unwrap_or(i64::MAX)),
        };
        let name = metric.name_of(thing);
        // A name has one byte for its length.
        if name.len() <= u8::MAX.into() {
            self.push(&name, value);
        }
    }

    /// Adds the text of the thing with this number.
    pub fn texts(&mut self, metric: &Metric, number: usize, value: impl Into<String>) {
        debug_assert_eq!(metric.kind, Kind::Texts, "{}", metric.name);
        self.push(&format!("{}_{number}", metric.name), Value::Text(value.into()));
    }

    /// Adds a histogram's occupied buckets: upper bounds, which ascend, and counts.
    pub fn histogram(&mut self, metric: &Metric, buckets: impl Iterator<Item = (u64, u64)>) {
        debug_assert_eq!(metric.kind, Kind::Histogram, "{}", metric.name);
        self.push(metric.name, Value::Histogram(buckets.collect()));
    }

    /// Adds a value that was received under this name. A service describes its values by a
    /// [`Metric`].
    pub fn push(&mut self, name: &str, value: Value) {
        debug_assert!(name.len() <= u8::MAX.into(), "a name fits its length byte");
        self.entries.push((name.to_owned(), value));
    }

    /// Adds the statistics of another part of the service. Counters and gauges of one name are
    /// summed. Of two texts, the first in alphabetical order stays: `no` before `yes`.
    pub fn merge(&mut self, other: Stats) {
        for (name, value) in other.entries {
            let known = self.entries.iter_mut().find(|(known, _)| *known == name);
            match (known.map(|(_, known)| known), value) {
                (Some(Value::Counter(sum)), Value::Counter(more)) => {
                    *sum = sum.saturating_add(more)
                }
                (Some(Value::Gauge(sum)), Value::Gauge(more)) => *sum = sum.saturating_add(more),
                (Some(Value::Text(first)), Value::Text(other)) if other < *first => *first = other,
                (Some(_), _) => {}
                (None, value) => self.entries.push((name, value)),
            }
        }
    }

    /// The value of this name, if there is one.
    pub fn get(&self, name: &str) -> Option<&Value> {
        self.entries.iter().find(|(entry, _)| entry == name).map(|(_, value)| value)
    }

    /// The counter of this name, or 0.
    pub fn counter_value(&self, name: &str) -> u64 {
        match self.get(name) {
            Some(Value::Counter(value)) => *value,
            _ => 0,
        }
    }

    pub(super) fn encode(&self, out: &mut Vec<u8>) {
        for (name, value) in self.entries.iter().take(MAX_ENTRIES) {
            let (name, before) = (super::body::truncate(name, u8::MAX.into()), out.len());
            out.put_u8(value.code());
            out.put_u8(name.len() as u8);
            out.put_slice(name.as_bytes());
            let len_at = out.len();
            out.put_u32_le(0);
            match value {
                Value::Counter(value) => out.put_u64_le(*value),
                Value::Gauge(value) => out.put_i64_le(*value),
                Value::Text(text) => out.put_slice(text.as_bytes()),
                Value::Histogram(buckets) => {
                    for (bound, count) in buckets {
                        out.put_u64_le(*bound);
                        out.put_u64_le(*count);
                    }
                }
                Value::Unknown(_) => {}
            }
            let len = (out.len() - len_at - size_of::<u32>()) as u32;
            out[len_at..len_at + size_of::<u32>()].copy_from_slice(&len.to_le_bytes());
            if out.len() > MAX_BODY {
                out.truncate(before);
                break;
            }
        }
    }

    pub(super) fn decode(body: &[u8]) -> Result<Self, BodyError> {
        let mut reader = Reader::new(body);
        let mut stats = Stats::default();
        while !reader.is_empty() {
            if stats.entries.len() == MAX_ENTRIES {
                let limit = MAX_ENTRIES as u64;
                return Err(BodyError::OutOfRange {
                    field: "number of entries",
                    value: limit + 1,
                    limit,
                });
            }
            let code = reader.u8("entry type")?;
            let name_len = reader.u8("entry name length")?;
            let name = reader.text(name_len.into(), "entry name")?.to_owned();
            let len = reader.u32("entry length")?;
            let mut payload = Reader::new(reader.bytes(len as usize, "entry")?);
            let value = match code {
                1 => Value::Counter(payload.u64("counter")?),
                2 => Value::Gauge(payload.i64("gauge")?),
                3 => Value::Text(payload.text(len as usize, "text")?.to_owned()),
                4 => {
                    let mut buckets = Vec::new();
                    while !payload.is_empty() {
                        buckets.push((payload.u64("bucket bound")?, payload.u64("bucket count")?));
                    }
                    Value::Histogram(buckets)
                }
                other => {
                    payload.bytes(len as usize, "entry")?;
                    Value::Unknown(other)
                }
            };
            payload.finish()?;
            stats.entries.push((name, value));
        }
        Ok(stats)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    afterimage_core::metrics! {
        "" {
            HITS = Counter("hits", Count, "hits", "Hits");
            ENTRIES = Gauge("entries", Count, "entries", "Entries");
            NAME = Text("name", Count, "name", "Name");
            LATENCY = Histogram("latency_ns", Nanos, "latency", "Latency");
        }
    }

    fn sample() -> Stats {
        let mut stats = Stats::default();
        stats.counter(&HITS, u64::MAX);
        stats.gauge(&ENTRIES, u64::MAX);
        stats.text(&NAME, "é");
        stats.histogram(&LATENCY, [(10, 3), (1007, 1)].into_iter());
        stats
    }

    #[test]
    fn survives_the_way_there_and_back() {
        let stats = sample();
        let mut body = Vec::new();
        stats.encode(&mut body);
        assert_eq!(Stats::decode(&body), Ok(stats.clone()));
        assert_eq!(stats.counter_value("hits"), u64::MAX);
        assert_eq!(stats.get("entries"), Some(&Value::Gauge(i64::MAX)));
        assert!(matches!(stats.get("latency_ns"), Some(Value::Histogram(b)) if b[0] == (10, 3)));
    }

    #[test]
    fn rejects_every_truncation() {
        let mut body = Vec::new();
        sample().encode(&mut body);
        let ends: Vec<usize> = (0..=4)
            .map(|n| {
                let mut prefix = Vec::new();
                Stats { entries: sample().entries[..n].to_vec() }.encode(&mut prefix);
                prefix.len()
            })
            .collect();
        for cut in 0..body.len() {
            assert_eq!(Stats::decode(&body[..cut]).is_ok(), ends.contains(&cut), "cut at {cut}");
        }
    }

    #[test]
    fn a_body_never_exceeds_what_a_client_takes() {
        let mut stats = sample();
        stats.text(&NAME, "x".repeat(MAX_BODY));
        stats.counter(&HITS, 1);
        let mut body = Vec::new();
        stats.encode(&mut body);
        assert_eq!(Stats::decode(&body), Ok(sample()));
    }

    #[test]
    fn parts_of_a_service_are_merged_by_name() {
        let mut stats = sample();
        let count = stats.entries.len();
        stats.merge(Stats {
            entries: vec![
                ("entries".into(), Value::Gauge(-1)),
                ("hits".into(), Value::Counter(1)),
                ("connected".into(), Value::Text("yes".into())),
            ],
        });
        stats.merge(Stats { entries: vec![("connected".into(), Value::Text("no".into()))] });
        assert_eq!(stats.entries.len(), count + 1);
        assert_eq!(stats.get("entries"), Some(&Value::Gauge(i64::MAX - 1)));
        assert_eq!(stats.counter_value("hits"), u64::MAX);
        assert_eq!(stats.get("connected"), Some(&Value::Text("no".into())));
    }

    #[test]
    fn steps_over_a_type_of_a_newer_server() {
        let body =
            [9, 1, b'x', 3, 0, 0, 0, 1, 2, 3, 1, 1, b'y', 8, 0, 0, 0, 5, 0, 0, 0, 0, 0, 0, 0];
        let stats = Stats::decode(&body).unwrap();
        assert_eq!(stats.get("x"), Some(&Value::Unknown(9)));
        assert_eq!(stats.counter_value("y"), 5);
    }

    #[test]
    fn an_empty_histogram_has_zero_quantiles() {
        assert_eq!(Quantiles::of(&[]), Quantiles::default());
        assert_eq!(Quantiles::of(&[(5, 0)]).p50, 0);
        assert_eq!(Quantiles::of(&[(5, 1)]).p999, 5);
    }
}
