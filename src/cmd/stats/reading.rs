//! Two readings of a service's statistics, and the rates between them. The client computes rates
//! from two samples of the server's counters.

use afterimage_cache::metrics as cache;
use afterimage_memo::metrics as memo;
use afterimage_wire::proto::stats::{Quantiles, Stats, Value};
use afterimage_wire::server::metrics as server;

/// The statistics of a service at one moment.
#[derive(Clone, Debug)]
pub(super) struct Reading {
    pub(super) stats: Stats,
}

impl Reading {
    pub(super) fn new(stats: Stats) -> Self {
        Reading { stats }
    }

    /// A counter or a gauge.
    pub(super) fn number(&self, name: &str) -> Option<u64> {
        match self.stats.get(name)? {
            Value::Counter(value) => Some(*value),
            Value::Gauge(value) => Some(u64::try_from(*value).unwrap_or(0)),
            _ => None,
        }
    }

    pub(super) fn text(&self, name: &str) -> Option<&str> {
        match self.stats.get(name)? {
            Value::Text(text) => Some(text),
            _ => None,
        }
    }

    /// The share of lookups that hit. A coalesced answer is not a hit: it waits for the classifier.
    fn hit_ratio_since(&self, before: Option<&Reading>) -> Option<f64> {
        let count = |name| {
            let earlier = before.and_then(|before| before.number(name)).unwrap_or(0);
            self.number(name).unwrap_or(0).saturating_sub(earlier)
        };
        let hits = self.number(cache::HITS.name).map(|_| count(cache::HITS.name))?;
        let all = hits + count(cache::MISSES.name) + count(memo::COALESCED.name);
        (all > 0).then(|| hits as f64 / all as f64)
    }
}

/// A reading, and the one before it if it is comparable.
#[derive(Clone, Debug)]
pub(super) struct Interval {
    pub(super) now: Reading,
    before: Option<Reading>,
    seconds: f64,
}

impl Interval {
    /// Without rates.
    pub(super) fn single(now: Reading) -> Self {
        Interval { now, before: None, seconds: 0.0 }
    }

    /// The interval from one reading to the next, by the server's clock. After a restart of the
    /// server its counters begin at zero, and rates begin with the next reading.
    pub(super) fn between(before: Reading, now: Reading) -> Self {
        let uptime = |reading: &Reading| reading.number(server::UPTIME.name).unwrap_or(0);
        match uptime(&now).checked_sub(uptime(&before)) {
            Some(ms @ 1..) => Interval { now, before: Some(before), seconds: ms as f64 / 1000.0 },
            _ => Interval::single(now),
        }
    }

    /// Its length in seconds; `None` for a single reading.
    pub(super) fn seconds(&self) -> Option<f64> {
        self.before.as_ref().map(|_| self.seconds)
    }

    /// The rate of a counter per second.
    pub(super) fn rate(&self, name: &str) -> Option<f64> {
        let before = self.before.as_ref()?;
        let Some(Value::Counter(now)) = self.now.stats.get(name) else { return None };
        let grown = now.saturating_sub(before.number(name).unwrap_or(0));
        Some(grown as f64 / self.seconds)
    }

    /// The sum of several counters' rates.
    pub(super) fn rates(&self, names: &[&str]) -> Option<f64> {
        names.iter().filter_map(|name| self.rate(name)).reduce(|sum, rate| sum + rate)
    }

    /// The share of lookups that hit, since the server was started.
    pub(super) fn hit_ratio(&self) -> Option<f64> {
        self.now.hit_ratio_since(None)
    }

    /// The same of this interval alone.
    pub(super) fn recent_hit_ratio(&self) -> Option<f64> {
        self.now.hit_ratio_since(Some(self.before.as_ref()?))
    }

    /// The values that a histogram recorded in this interval, or all values without an earlier one.
    pub(super) fn recent(&self, name: &str) -> Option<Quantiles> {
        let Some(Value::Histogram(now)) = self.now.stats.get(name) else { return None };
        let before = self.before.as_ref().and_then(|before| before.stats.get(name));
        let Some(Value::Histogram(before)) = before else { return Some(Quantiles::of(now)) };
        let earlier = |bound: u64| match before.binary_search_by_key(&bound, |bucket| bucket.0) {
            Ok(at) => before[at].1,
            Err(_) => 0,
        };
        let grown: Vec<_> = now
            .iter()
            .map(|&(bound, count)| (bound, count.saturating_sub(earlier(bound))))
            .collect();
        Some(Quantiles::of(&grown))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    pub(in crate::cmd::stats) fn reading(
        uptime_ms: u64,
        hits: u64,
        buckets: &[(u64, u64)],
    ) -> Reading {
        let mut stats = Stats::default();
        stats.push("uptime_ms", Value::Counter(uptime_ms));
        stats.push("hits", Value::Counter(hits));
        stats.push("misses", Value::Counter(10));
        stats.push("entries", Value::Gauge(7));
        stats.entries.push(("hit_latency_ns".into(), Value::Histogram(buckets.to_vec())));
        Reading::new(stats)
    }

    #[test]
    fn rates_and_quantiles_cover_the_time_between_readings() {
        let before = reading(1000, 90, &[(10, 100)]);
        let now = reading(3000, 190, &[(10, 100), (20, 98), (500, 1), (900, 1)]);
        let interval = Interval::between(before, now);
        assert_eq!(interval.seconds(), Some(2.0));
        assert_eq!(interval.rate("hits"), Some(50.0));
        assert_eq!(interval.rate("entries"), None, "a gauge has no rate");
        assert_eq!(interval.rates(&["hits", "misses", "none"]), Some(50.0));
        assert_eq!(interval.hit_ratio(), Some(0.95));
        assert_eq!(interval.recent_hit_ratio(), Some(1.0));
        let recent = interval.recent("hit_latency_ns").unwrap();
        assert_eq!(recent, Quantiles { count: 100, p50: 20, p99: 500, p999: 900, max: 900 });
    }

    #[test]
    fn a_restarted_server_has_no_rates_yet() {
        let interval = Interval::between(reading(5000, 900, &[]), reading(100, 3, &[(10, 3)]));
        assert_eq!((interval.seconds(), interval.rate("hits")), (None, None));
        assert_eq!(interval.recent("hit_latency_ns").unwrap().count, 3);
        assert_eq!(interval.recent_hit_ratio(), None);
    }
}
