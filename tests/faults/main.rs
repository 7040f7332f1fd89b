//! Processes that die, hang and restart under load: the promises of `docs/reliability.md`, checked
//! with real processes over real sockets.

#![allow(clippy::unwrap_used)]

mod cache;
mod classifier;
#[path = "../common/mod.rs"]
mod common;

use std::sync::Arc;
use std::time::{Duration, Instant};

use afterimage_bench::workload::Population;
use afterimage_classifier::Model;
use afterimage_wire::Client;

use common::talk::{stats, until_connected};
use common::{Running, answered, until};

/// The time limit of a test.
pub(crate) const LIMIT: Duration = Duration::from_secs(60);

/// "At once" on a busy machine without optimization: well below a classifier's timeout of five
/// seconds.
pub(crate) const AT_ONCE: Duration = Duration::from_secs(3);

/// "Within a second or two" on the same machine.
pub(crate) const SOON: Duration = Duration::from_secs(5);

/// A budget for lookups that a busy machine keeps. It is long enough to notice a wait for it.
pub(crate) const BUDGET: Duration = Duration::from_millis(250);

pub(crate) fn start_cache() -> Running {
    Running::start(&["cache", "--memory", "8MiB"])
}

pub(crate) fn start_classifier() -> Running {
    Running::start(&["classifier", "--model", "raw"])
}

pub(crate) async fn start_memo(flags: &[&str]) -> Running {
    let memory: &[&str] = if flags.contains(&"--entries") { &[] } else { &["--memory", "8MiB"] };
    let memo = Running::start(&[&["memo", "--model", "raw"], memory, flags].concat());
    until_connected(memo.addr()).await;
    memo
}

/// A memo in front of this cache, with a classifier of its own.
pub(crate) async fn start_memo_with_cache(cache: &Running) -> Running {
    let budget = format!("{}ms", BUDGET.as_millis());
    start_memo(&["--store", &cache.place(), "--lookup-budget", &budget]).await
}

pub(crate) fn digits(seed: u64, count: usize) -> (Arc<Population>, Vec<u16>) {
    let (population, labels) = answered(seed, count, &Model::raw());
    (Arc::new(population), labels)
}

/// Sends every image once, so that its answer is stored.
pub(crate) async fn ask_about_all(client: &Client, population: &Population, labels: &[u16]) {
    for (i, &class) in labels.iter().enumerate() {
        assert_eq!(client.classify(population.image(i)).await.unwrap().label, class);
    }
}

/// Waits until the memo has hits in its cache service, and returns the time it took.
pub(crate) async fn until_hits(cache: &Running, what: &str) -> Duration {
    let began = Instant::now();
    until(what, async || stats(cache.addr()).await.counter_value("hits") > 0).await;
    began.elapsed()
}
