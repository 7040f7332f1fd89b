//! Metrics of every service: its identity, its connections and its requests. Connections add to the
//! counters once a batch, never once a request.

use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::Relaxed;

use tokio::time::Instant;

use crate::proto::stats::Stats;

afterimage_core::metrics! {
    "" {
        SERVICE = Text("service", Count, "service", "Kind of the service");
        VERSION = Text("version", Count, "version", "Program and version of the server");
        UPTIME = Counter("uptime_ms", Millis, "up", "Time since the service started");
    }
    "Connections" {
        OPEN = Gauge("connections_open", Count, "open", "Open connections");
        ACCEPTED = Counter("connections_accepted", Count, "accepted", "Connections accepted");
        REFUSED = Counter("connections_refused", Count, "refused: too many", "Connections refused because too many were open");
        EVICTED = Counter("connections_evicted", Count, "evicted before their handshake", "Connections closed before their handshake to make room");
        UNAUTHENTICATED = Counter("connections_unauthenticated", Count, "wrong or missing token", "Connections with a wrong or missing token");
        TLS_HANDSHAKES = Counter("tls_handshakes", Count, "TLS handshakes", "TLS handshakes completed");
        TLS_RESUMED = Counter("tls_resumed", Count, "TLS sessions resumed", "TLS handshakes that resumed a session");
        TLS_FAILED = Counter("tls_failed", Count, "TLS handshakes failed", "TLS handshakes failed");
        REQUESTS = Counter("requests", Count, "requests", "Requests received");
        STREAMS = Counter("streams", Count, "streams", "Streams opened");
        MALFORMED = Counter("malformed", Count, "malformed requests", "Malformed requests received");
        PANICS = Counter("panics", Count, "panics", "Batches of requests whose handling panicked");
    }
}

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
        stats.counter(&UPTIME, self.started.elapsed().as_millis() as u64);
        stats.gauge(&OPEN, self.open.load(Relaxed));
        stats.counter(&ACCEPTED, self.accepted.load(Relaxed));
        stats.counter(&REFUSED, self.refused.load(Relaxed));
        stats.counter(&EVICTED, self.evicted.load(Relaxed));
        stats.counter(&UNAUTHENTICATED, self.unauthenticated.load(Relaxed));
        if tls {
            stats.counter(&TLS_HANDSHAKES, self.tls_handshakes.load(Relaxed));
            stats.counter(&TLS_RESUMED, self.tls_resumed.load(Relaxed));
            stats.counter(&TLS_FAILED, self.tls_failed.load(Relaxed));
        }
        stats.counter(&REQUESTS, self.requests.load(Relaxed));
        stats.counter(&STREAMS, self.streams.load(Relaxed));
        stats.counter(&MALFORMED, self.malformed.load(Relaxed));
        stats.counter(&PANICS, self.panics.load(Relaxed));
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
        let counted =
            METRICS.iter().filter(|metric| ![SERVICE.name, VERSION.name].contains(&metric.name));
        assert_eq!(reported, counted.map(|metric| metric.name).collect::<Vec<_>>());
    }
}
