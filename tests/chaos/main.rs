//! Chaos: a cache, a classifier and a memo, each a process, are killed, stopped, drained and
//! started again, one after the other, under an open-loop load whose every answer is checked.
//!
//! ```text
//! cargo test --test chaos                                        # some seconds of it
//! CHAOS_SECONDS=600 cargo test --release --test chaos -- --nocapture
//! ```
//!
//! Counters that must be 0:
//!
//! * **wrong**: a label that the model of the connection's `Welcome` does not give for this image;
//! * **stale**: a hit after a confirmed flush, for an image that was not computed since;
//! * **lost**: a call without an outcome by its deadline (and [`LATE`]);
//! * **unexcused**: a call that failed, also when it was made again (`load.rs`), for no reason that
//!   its caller should accept. The memo was killed, stopped or drained: any error of a connection,
//!   and what a memo says that has just begun. The classifier was: an `upstream_…` error, for what
//!   is not remembered. The cache was: none at all. And nothing is excused that came due later than
//!   the recovery may take; the next incident begins later still.
//!
//! Recovery is counted from the moment at which the process listens again, or goes on, to the last
//! call that came due after it and failed; for a cache to the first answer that came from it.

#![allow(clippy::unwrap_used)]

#[path = "../common/mod.rs"]
mod common;
mod incidents;
mod load;
mod verdict;

use std::time::Duration;

use incidents::Deployment;

/// The duration without `CHAOS_SECONDS`.
const DEFAULT_SECONDS: u64 = 8;

/// The lateness of a call's outcome that a busy machine may cause.
const LATE: Duration = Duration::from_secs(3);

/// The longest recovery that passes without `CHAOS_RECOVERY_MS`: the promised second for an
/// optimized build. A busy machine takes longer and sets the variable.
const RECOVERY_LIMIT: Duration = Duration::from_secs(if cfg!(debug_assertions) { 3 } else { 1 });

/// A number out of the environment.
fn number(name: &str) -> Option<u64> {
    let text = std::env::var(name).ok()?;
    Some(text.parse().unwrap_or_else(|_| panic!("{name} is {text:?} and should be a number")))
}

#[test]
fn no_wrong_label_and_no_lost_request_under_chaos() {
    let seconds = number("CHAOS_SECONDS").unwrap_or(DEFAULT_SECONDS);
    let limit = number("CHAOS_RECOVERY_MS").map_or(RECOVERY_LIMIT, Duration::from_millis);
    let mut services = Deployment::start();
    let load = load::Load::start(services.memo_addr());
    load.until_warm();
    let incidents = services.run_incidents(Duration::from_secs(seconds), limit);
    // The last incident, too, has the time to recover from.
    load.until_it_remembers(limit + LATE);
    let (calls, flushes) = load.stop();
    drop(services);
    let verdict = verdict::Verdict::new(&incidents, &calls, &flushes, limit);
    println!("{verdict}");
    verdict.assert_good();
}
