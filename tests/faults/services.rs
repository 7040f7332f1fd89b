//! Services and requests that several of these tests share.

use std::sync::Arc;
use std::time::{Duration, Instant};

use afterimage_bench::workload::Population;
use afterimage_classifier::Model;
use afterimage_wire::Client;

use crate::common::talk::{stats, until_connected};
use crate::common::{Running, answered, until};

/// The longest that a test here may take.
pub(crate) const LIMIT: Duration = Duration::from_secs(60);

/// "At once", on a busy machine and without optimization: well before a classifier's timeout, five
/// seconds.
pub(crate) const AT_ONCE: Duration = Duration::from_secs(3);

/// "Within a second or two", on the same.
pub(crate) const SOON: Duration = Duration::from_secs(5);

/// A budget for lookups that a busy machine keeps, and that shows when it is waited for.
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

/// Asks about every image once, so that it is remembered.
pub(crate) async fn ask_about_all(client: &Client, population: &Population, labels: &[u16]) {
    for (i, &class) in labels.iter().enumerate() {
        assert_eq!(client.classify(population.image(i)).await.unwrap().label, class);
    }
}

/// Waits until the memo finds answers in its cache (again); gives the time it took.
pub(crate) async fn until_hits(cache: &Running, what: &str) -> Duration {
    let began = Instant::now();
    until(what, async || stats(cache.addr()).await.counter_value("hits") > 0).await;
    began.elapsed()
}
