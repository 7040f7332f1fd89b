//! Chaos: a cache, a classifier and a memo, each a process, are killed, stopped, drained and
//! started again, one after the other, under an open-loop load. Every answer is checked.
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
//! * **unexcused**: a call that failed, also when it was made again (`load`), for no reason that
//!   its caller should accept. The memo was killed, stopped or drained: any error of a connection,
//!   and what a memo says that has just begun. The classifier was: an `upstream_…` error, for what
//!   is not stored. The cache was: none at all. And nothing is excused that came due later than
//!   the recovery may take; the next incident begins later still.
//!
//! Recovery is counted from the moment at which the process listens again, or goes on, to the last
//! call that came due after it and failed; for a cache to the first answer that came from it.

#![allow(clippy::unwrap_used)]

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use rustix::process::Signal;
use tempfile::TempDir;

use crate::common::{Running, contrary_model, file, folder, text};

#[path = "../common/mod.rs"]
mod common;
mod load;
mod verdict;

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
    load.until_a_hit(limit + LATE);
    let (calls, flushes) = load.stop();
    drop(services);
    let verdict = verdict::Verdict::new(&incidents, &calls, &flushes, limit);
    println!("{verdict}");
    verdict.assert_good();
}

/// The service that an incident hits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Who {
    Cache,
    Classifier,
    Memo,
}

/// By what.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum What {
    /// SIGKILL, and another process on its port after a while.
    Killed,
    /// SIGSTOP, and SIGCONT after a while.
    Stopped,
    /// SIGTERM, and another process on its port as soon as that is free.
    Drained,
}

/// Something that happened.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Incident {
    pub(crate) who: Who,
    pub(crate) what: What,
    pub(crate) began: Instant,
    /// The process listens again, or goes on.
    pub(crate) over: Instant,
}

const WHO: [Who; 3] = [Who::Cache, Who::Classifier, Who::Memo];
const WHAT: [What; 3] = [What::Killed, What::Stopped, What::Drained];

/// How long it lasts, in turn: from shorter than a connection takes to be noticed to longer than a
/// lookup's budget, the backoff and the breaker's probes together.
const DOWN_MS: [u64; 5] = [20, 900, 100, 400, 1500];

/// After the time in which everything must have recovered from an incident: to see that it has, and
/// that it holds.
const CALM: Duration = Duration::from_millis(400);

/// Cache, classifier and memo.
pub(crate) struct Deployment {
    cache: Running,
    classifier: Running,
    memo: Running,
    /// The flags of classifiers with one model and with the other.
    models: [String; 2],
    _folder: TempDir,
}

impl Deployment {
    /// All three, as a user would start them: a secret that outlives the memo, all else by default.
    pub(crate) fn start() -> Deployment {
        let folder = folder();
        let secret = file(&folder, "secret", [5; 32]);
        let contrary = folder.path().join("contrary.safetensors");
        contrary_model().write(&contrary).expect("a model can be written");
        let cache = Running::start(&["cache", "--memory", "1MiB"]);
        let classifier = Running::start(&["classifier", "--model", "raw"]);
        let (at_cache, at_classifier) = (cache.place(), classifier.place());
        let memo = ["memo", "--store", &at_cache, "--classifier", &at_classifier];
        let memo = Running::start(&[&memo[..], &["--secret-file", &secret]].concat());
        let models = ["raw".to_owned(), text(contrary)];
        Deployment { cache, classifier, memo, models, _folder: folder }
    }

    /// Where the memo listens, all the time.
    pub(crate) fn memo_addr(&self) -> SocketAddr {
        self.memo.addr()
    }

    /// Lets one incident follow the other for so long, each when the one before must be over with
    /// all that came of it: every kind for every process in turn.
    pub(crate) fn run_incidents(&mut self, time: Duration, recovery: Duration) -> Vec<Incident> {
        let end = Instant::now() + time;
        let mut incidents = Vec::new();
        std::thread::sleep(recovery + CALM);
        while Instant::now() < end {
            incidents.push(self.happen(incidents.len()));
            std::thread::sleep(recovery + CALM);
        }
        incidents
    }

    fn happen(&mut self, number: usize) -> Incident {
        let (who, what) = (WHO[number % 3], WHAT[number / 3 % 3]);
        let down = Duration::from_millis(DOWN_MS[number % DOWN_MS.len()]);
        // Every other classifier that starts has the other model.
        let model = self.models[number / 6 % 2].clone();
        let process = match who {
            Who::Cache => &mut self.cache,
            Who::Classifier => &mut self.classifier,
            Who::Memo => &mut self.memo,
        };
        let restart = |process: &mut Running| match who {
            Who::Classifier => process.restart_as(&["classifier", "--model", &model]),
            _ => process.restart(),
        };
        let began = Instant::now();
        match what {
            What::Killed => {
                process.kill();
                std::thread::sleep(down);
                restart(process);
            }
            What::Stopped => {
                process.hang();
                std::thread::sleep(down);
                process.go_on();
            }
            What::Drained => {
                process.signal(Signal::TERM);
                process.wait();
                restart(process);
            }
        }
        Incident { who, what, began, over: Instant::now() }
    }
}
