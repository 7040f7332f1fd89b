//! A deterministic simulation: clients, a memo, a cache and classifiers, the real ones, on virtual
//! time and over a network in memory that does all that a network can do wrong.
//!
//! A seed is a history: who asks what and when, and which faults happen (`history.rs`). It is
//! played on one thread (`play.rs`), with tokio's paused clock, over `network.rs`, where
//! `auditor.rs` reads along; `checks.rs` says what must hold in the end. The same seed gives the
//! same history, event for event.
//!
//! ```text
//! cargo test -p afterimage-memo --lib simulation                 # a few dozen histories
//! SIMULATION_SECONDS=30 …                                        # as many as there is time for
//! SIMULATION_SEED=17 … -- --nocapture                            # this one, event by event
//! ```
//!
//! It is a network of our own and not `turmoil`'s: the auditor needs every byte of every
//! connection, and the faults that find most here (a writer ahead of its reader, a segment that
//! ends inside a frame, a peer that is gone without a word, a stopped process) are those of
//! streams, where turmoil has messages; and a host of its needs a runtime of its own.

#![allow(clippy::unwrap_used)]

mod auditor;
mod checks;
mod classifier;
mod dice;
mod history;
mod network;
mod play;
mod trace;
mod world;

use std::time::{Duration, Instant};

use crate::plant::{self, Bug};
use history::{Settings, Weather};
use network::Host;
use play::{Report, play};

const MEMO: Host = 0;
const CACHE: Host = 1;
/// The first of the classifiers.
const CLASSIFIERS: Host = 2;
/// The first of the clients.
const CLIENTS: Host = CLASSIFIERS + MAX_CLASSIFIERS;

/// Classifiers that share the work at most.
const MAX_CLASSIFIERS: usize = 3;

/// Histories that are played when nobody says how many.
const HISTORIES: u64 = 48;

/// Histories that go wrong before the rest is not played.
const ENOUGH: usize = 8;

/// Within so many histories in which everything may happen a planted bug must be found.
const CATCH_WITHIN: usize = 100;

fn number(variable: &str) -> Option<u64> {
    let value = std::env::var(variable).ok()?;
    Some(value.parse().unwrap_or_else(|_| panic!("{variable}={value} is no number")))
}

/// What to say of a history that went wrong.
fn verdict(seed: u64, report: &Report) -> String {
    let mut text = format!("seed {seed} ({}):\n", report.digest);
    for complaint in report.complaints.iter().take(20) {
        text += &format!("    {complaint}\n");
    }
    text + &format!(
        "repeat it: SIMULATION_SEED={seed} cargo test -p afterimage-memo --lib simulation::every \
         -- --nocapture"
    )
}

#[test]
fn every_history_ends_well() {
    if let Some(seed) = number("SIMULATION_SEED") {
        let report = play(seed, true);
        assert!(report.complaints.is_empty(), "{}", verdict(seed, &report));
        return;
    }
    let began = Instant::now();
    let time = number("SIMULATION_SECONDS").map(Duration::from_secs);
    let (mut played, mut requests, mut answers, mut remembered, mut faults) = (0, 0, 0, 0, 0);
    let first = number("SIMULATION_FIRST").unwrap_or(0);
    let mut bad = Vec::new();
    while time.map_or(played < HISTORIES, |time| began.elapsed() < time) {
        let report = play(first + played, false);
        if !report.complaints.is_empty() {
            bad.push(verdict(first + played, &report));
            assert!(bad.len() < ENOUGH, "{}", bad.join("\n"));
        }
        played += 1;
        requests += report.requests;
        answers += report.answers;
        remembered += report.remembered;
        faults += report.faults;
    }
    assert!(bad.is_empty(), "{}", bad.join("\n"));
    println!(
        "{played} histories from seed {first} in {:.1?}: {requests} requests, {answers} answers, \
         {remembered} of them remembered, {faults} faults; nothing wrong",
        began.elapsed()
    );
    assert!(answers * 2 > requests && remembered * 4 > requests, "most of it should work");
}

#[test]
fn the_same_seed_gives_the_same_history_event_for_event() {
    for seed in 0..12 {
        let (one, two) = (play(seed, false), play(seed, false));
        assert_eq!(one.digest, two.digest, "seed {seed}");
        assert_ne!(one.digest, play(seed + 1, false).digest);
    }
}

/// Plays histories with a bug until the checks find it, by the sign that it should be found by.
fn is_caught(bug: Bug, sign: &str) {
    let stormy = (0..).filter(|&seed| Settings::of(seed).weather == Weather::Stormy);
    let found = |seed| play(seed, false).complaints.iter().any(|text| text.contains(sign));
    let caught = plant::with(Some(bug), || {
        stormy.take(CATCH_WITHIN).enumerate().find(|&(_, seed)| found(seed))
    });
    let Some((before, seed)) = caught else {
        panic!("{bug:?} went through {CATCH_WITHIN} histories");
    };
    println!("{bug:?} is caught after {} histories", before + 1);
    let without = play(seed, false);
    assert!(without.complaints.is_empty(), "without the bug, too: {}", verdict(seed, &without));
}

#[test]
fn a_skipped_tag_check_is_caught() {
    is_caught(Bug::SkipTagCheck, "a wrong label");
}

#[test]
fn a_forgotten_later_is_caught() {
    is_caught(Bug::ForgetLater, "have no reply");
}

#[test]
fn a_skipped_model_check_is_caught() {
    is_caught(Bug::SkipModelCheck, "a wrong label");
}

#[test]
fn a_deadline_that_nobody_keeps_is_caught() {
    is_caught(Bug::SkipSweep, "its budget was");
}

#[test]
fn a_failed_flight_that_does_not_land_is_caught() {
    is_caught(Bug::LeaveFailedFlight, "in the end");
}
