//! Shared parts of the peers' servers and loads.

use std::cell::RefCell;
use std::sync::Arc;
use std::time::{Duration, Instant};

use afterimage_bench::workload::Population;
use hdrhistogram::Histogram;
use tokio::task::{JoinHandle, LocalSet};

/// The gRPC messages and the two ends of the service.
pub mod classify {
    tonic::include_proto!("classify");
}

/// Drawn digits that the loads ask about.
pub const IMAGES: usize = 10_000;

/// How long a load runs before its answers count.
pub const WARMUP: Duration = Duration::from_millis(300);

/// The longest latency of a histogram. Longer ones count as this.
const HOUR_NS: u64 = 3_600_000_000_000;

/// The digits, alike in every load.
pub fn images() -> Arc<Population> {
    Arc::new(Population::drawn(1, IMAGES))
}

/// What one load thread has seen: latencies from sent, and answers that were not the first for
/// their image.
pub struct Seen {
    latencies: Histogram<u64>,
    labels: Vec<Option<u16>>,
    /// Images without an answer yet, if the load goes on until all have one.
    missing: usize,
    hits: u64,
    wrong: u64,
    began: Instant,
    warmup: Duration,
}

impl Seen {
    /// Answers within `warmup` are checked and not counted. With `all` the warm-up lasts until each
    /// image was answered.
    pub fn new(warmup: Duration, all: bool) -> Self {
        Seen {
            latencies: Histogram::new_with_bounds(1, HOUR_NS, 3).expect("constants that it allows"),
            labels: vec![None; IMAGES],
            missing: if all { IMAGES } else { 0 },
            hits: 0,
            wrong: 0,
            began: Instant::now(),
            warmup,
        }
    }

    /// Notes an answer.
    pub fn answer(&mut self, image: usize, label: u16, memoized: bool, sent: Instant) {
        if self.labels[image].is_none() {
            self.missing = self.missing.saturating_sub(1);
        }
        let expected = *self.labels[image].get_or_insert(label);
        self.wrong += u64::from(label != expected);
        if self.began.elapsed() >= self.warmup {
            self.hits += u64::from(memoized);
            self.latencies.saturating_record(sent.elapsed().as_nanos() as u64);
        }
    }

    /// Whether `measure` after the warm-up is over.
    pub fn is_over(&self, measure: Duration) -> bool {
        self.missing == 0 && self.began.elapsed() >= self.warmup + measure
    }

    /// Prints what was seen, in one line of JSON.
    pub fn print(&self, labels: bool) {
        let seconds = self.began.elapsed().saturating_sub(self.warmup).as_secs_f64();
        let at = |quantile| self.latencies.value_at_quantile(quantile);
        let count = self.latencies.len();
        let mut line = serde_json::json!({
            "throughput_per_s": count as f64 / seconds,
            "count": count,
            "hits": self.hits,
            "wrong": self.wrong,
            "p50_ns": at(0.5),
            "p99_ns": at(0.99),
            "p999_ns": at(0.999),
        });
        if labels {
            line["labels"] = serde_json::json!(self.labels);
        }
        println!("{line}");
    }
}

/// Runs the tasks of a load to their end, and prints what they have seen.
pub async fn finish(
    local: LocalSet,
    tasks: Vec<JoinHandle<anyhow::Result<()>>>,
    seen: &RefCell<Seen>,
    labels: bool,
) -> anyhow::Result<()> {
    let all = async {
        for task in tasks {
            task.await??;
        }
        anyhow::Ok(())
    };
    local.run_until(all).await?;
    seen.borrow().print(labels);
    Ok(())
}
