//! Counters of a server's connections. They are added to once a batch, never once a request.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use tokio::time::Instant;

use crate::proto::stats::Stats;
use crate::server::metrics;

#[derive(Debug)]
pub(super) struct Counters {
    started: Instant,
    pub(super) accepted: AtomicU64,
    pub(super) open: AtomicU64,
    pub(super) refused: AtomicU64,
    pub(super) evicted: AtomicU64,
    pub(super) tls_handshakes: AtomicU64,
    pub(super) tls_resumed: AtomicU64,
    pub(super) tls_failed: AtomicU64,
    pub(super) unauthenticated: AtomicU64,
    pub(super) requests: AtomicU64,
    pub(super) streams: AtomicU64,
    pub(super) malformed: AtomicU64,
    pub(super) panics: AtomicU64,
}

impl Default for Counters {
    fn default() -> Self {
        Counters {
            started: Instant::now(),
            accepted: AtomicU64::new(0),
            open: AtomicU64::new(0),
            refused: AtomicU64::new(0),
            evicted: AtomicU64::new(0),
            tls_handshakes: AtomicU64::new(0),
            tls_resumed: AtomicU64::new(0),
            tls_failed: AtomicU64::new(0),
            unauthenticated: AtomicU64::new(0),
            requests: AtomicU64::new(0),
            streams: AtomicU64::new(0),
            malformed: AtomicU64::new(0),
            panics: AtomicU64::new(0),
        }
    }
}

impl Counters {
    pub(super) fn add(counter: &AtomicU64, n: u64) {
        counter.fetch_add(n, Relaxed);
    }

    pub(super) fn sub(counter: &AtomicU64, n: u64) {
        counter.fetch_sub(n, Relaxed);
    }

    pub(super) fn stats(&self, tls: bool, stats: &mut Stats) {
        stats.counter(&metrics::UPTIME, self.started.elapsed().as_millis() as u64);
        stats.gauge(&metrics::OPEN, self.open.load(Relaxed));
        stats.counter(&metrics::ACCEPTED, self.accepted.load(Relaxed));
        stats.counter(&metrics::REFUSED, self.refused.load(Relaxed));
        stats.counter(&metrics::EVICTED, self.evicted.load(Relaxed));
        stats.counter(&metrics::UNAUTHENTICATED, self.unauthenticated.load(Relaxed));
        if tls {
            stats.counter(&metrics::TLS_HANDSHAKES, self.tls_handshakes.load(Relaxed));
            stats.counter(&metrics::TLS_RESUMED, self.tls_resumed.load(Relaxed));
            stats.counter(&metrics::TLS_FAILED, self.tls_failed.load(Relaxed));
        }
        stats.counter(&metrics::REQUESTS, self.requests.load(Relaxed));
        stats.counter(&metrics::STREAMS, self.streams.load(Relaxed));
        stats.counter(&metrics::MALFORMED, self.malformed.load(Relaxed));
        stats.counter(&metrics::PANICS, self.panics.load(Relaxed));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_described_metric_is_reported() {
        let mut stats = Stats::default();
        Counters::default().stats(true, &mut stats);
        let reported: Vec<&str> = stats.entries.iter().map(|(name, _)| name.as_str()).collect();
        // The answer to a StatsReq adds these two.
        let counted = metrics::METRICS.iter().filter(|metric| {
            ![metrics::SERVICE.name, metrics::VERSION.name].contains(&metric.name)
        });
        assert_eq!(reported, counted.map(|metric| metric.name).collect::<Vec<_>>());
    }
}
