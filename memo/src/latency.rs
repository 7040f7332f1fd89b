//! How long answers take, split by how they came about.

use crate::metrics;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use afterimage_wire::proto::message::Origin;
use afterimage_wire::proto::stats::Stats;
use hdrhistogram::Histogram;

/// Stripes; more threads than this share, which costs time and no counts.
const STRIPES: usize = 16;

/// The longest latency of a histogram: a minute. Longer ones count as this.
const MAX_NS: u64 = 60_000_000_000;

/// Three histograms of nanoseconds, of two significant digits: one per [`Origin`]. Each thread
/// records into a stripe of its own, once a batch.
#[derive(Debug)]
pub struct Latencies {
    stripes: Box<[Stripe]>,
}

#[derive(Debug)]
#[repr(align(128))]
struct Stripe(Mutex<Counts>);

#[derive(Debug)]
struct Counts {
    histograms: [Histogram<u64>; 3],
    /// Waiting time that lookups took.
    lookup_ns: u64,
    /// Time that hits saved.
    saved: CallCost,
}

/// The cost of a call to the classifier, which a hit saves.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CallCost {
    /// The time that its caller waits, queueing included.
    pub waiting_ns: u64,
    /// The time that it takes of the classifier. Calls in flight together share their time.
    pub work_ns: u64,
}

impl CallCost {
    fn add(&mut self, calls: u64, each: CallCost) {
        let add = |sum: &mut u64, ns: u64| *sum = sum.wrapping_add(calls.wrapping_mul(ns));
        add(&mut self.waiting_ns, each.waiting_ns);
        add(&mut self.work_ns, each.work_ns);
    }
}

impl Default for Latencies {
    fn default() -> Self {
        Latencies { stripes: (0..STRIPES).map(|_| Stripe(Mutex::new(Counts::empty()))).collect() }
    }
}

impl Latencies {
    /// Records `count` answers that each took `latency`.
    pub fn record(&self, origin: Origin, latency: Duration, count: u64) {
        let stripe = &self.stripes[own_stripe()].0;
        let mut counts = stripe.lock().unwrap_or_else(PoisonError::into_inner);
        counts.histograms[index(origin)].saturating_record_n(latency.as_nanos() as u64, count);
    }

    /// Records `lookups` that each took `took`, and `hits` of them that were answered by then; each
    /// hit saved a call.
    pub fn record_lookups(&self, lookups: u64, hits: u64, took: Duration, call: CallCost) {
        let took = took.as_nanos() as u64;
        let stripe = &self.stripes[own_stripe()].0;
        let mut counts = stripe.lock().unwrap_or_else(PoisonError::into_inner);
        counts.lookup_ns = counts.lookup_ns.wrapping_add(lookups.wrapping_mul(took));
        if hits > 0 {
            counts.saved.add(hits, call);
            counts.histograms[index(Origin::Hit)].saturating_record_n(took, hits);
        }
    }

    /// Records `hits` that each saved a call.
    pub fn record_saved(&self, hits: u64, call: CallCost) {
        let stripe = &self.stripes[own_stripe()].0;
        let mut counts = stripe.lock().unwrap_or_else(PoisonError::into_inner);
        counts.saved.add(hits, call);
    }

    /// Adds the three histograms to `stats`, and the cost and benefit of lookups.
    pub fn stats(&self, stats: &mut Stats) {
        let Counts { histograms: mut sum, mut lookup_ns, mut saved } = Counts::empty();
        for stripe in &self.stripes {
            let counts = stripe.0.lock().unwrap_or_else(PoisonError::into_inner);
            for (sum, part) in sum.iter_mut().zip(counts.histograms.iter()) {
                sum.add(part).expect("all have the same bounds");
            }
            lookup_ns = lookup_ns.wrapping_add(counts.lookup_ns);
            saved.add(1, counts.saved);
        }
        let buckets = |origin| {
            let recorded = sum[index(origin)].iter_recorded();
            recorded.map(|step| (step.value_iterated_to(), step.count_at_value()))
        };
        stats.counter(&metrics::LOOKUP_TIME, lookup_ns / 1000);
        stats.counter(&metrics::SAVED_TIME, saved.waiting_ns / 1000);
        stats.counter(&metrics::SAVED_CLASSIFIER_TIME, saved.work_ns / 1000);
        stats.histogram(&metrics::HIT_LATENCY, buckets(Origin::Hit));
        stats.histogram(&metrics::MISS_LATENCY, buckets(Origin::Miss));
        stats.histogram(&metrics::COALESCED_LATENCY, buckets(Origin::Coalesced));
    }
}

fn index(origin: Origin) -> usize {
    match origin {
        Origin::Hit => 0,
        Origin::Miss => 1,
        Origin::Coalesced => 2,
    }
}

impl Counts {
    fn empty() -> Self {
        let histograms = std::array::from_fn(|_| {
            Histogram::new_with_bounds(1, MAX_NS, 2).expect("the bounds are valid: 2 ≤ a minute")
        });
        Counts { histograms, lookup_ns: 0, saved: CallCost::default() }
    }
}

/// The stripe of the calling thread.
fn own_stripe() -> usize {
    static NEXT: AtomicUsize = AtomicUsize::new(0);
    thread_local! {
        static OWN: usize = NEXT.fetch_add(1, Ordering::Relaxed) % STRIPES;
    }
    OWN.with(|own| *own)
}

#[cfg(test)]
mod tests {
    use super::*;
    use afterimage_wire::proto::stats::Value;

    #[test]
    fn what_threads_record_is_summed_by_origin() {
        let latencies = Latencies::default();
        std::thread::scope(|scope| {
            for _ in 0..20 {
                scope.spawn(|| latencies.record(Origin::Hit, Duration::from_nanos(100), 5));
            }
        });
        latencies.record(Origin::Miss, Duration::from_secs(1000), 1);
        let mut stats = Stats::default();
        latencies.stats(&mut stats);
        assert_eq!(stats.get("hit_latency_ns"), Some(&Value::Histogram(vec![(100, 100)])));
        let Some(Value::Histogram(misses)) = stats.get("miss_latency_ns") else { panic!() };
        assert_eq!(misses.len(), 1);
        assert_eq!(stats.get("coalesced_latency_ns"), Some(&Value::Histogram(vec![])));
    }
}
