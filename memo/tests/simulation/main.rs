//! A deterministic simulation: the real clients, memo, cache and classifiers on virtual time, over
//! a network in memory with all faults of a network.
//!
//! A seed determines a history: the requests, their times and the faults (`history.rs`). `play.rs`
//! plays it on one thread with tokio's paused clock. `network.rs` transports the bytes,
//! `auditor.rs` reads all connections, and `checks.rs` has the conditions for the end. The same
//! seed gives the same history, event by event.
//!
//! ```text
//! cargo test -p afterimage-memo --test simulation               # a few dozen histories
//! SIMULATION_SECONDS=30 …                                        # as many as there is time for
//! SIMULATION_HISTORIES=1500 …                                    # at most this number
//! SIMULATION_SEED=17 … -- --nocapture                            # this one, event by event
//! ```
//!
//! The network is our own and not `turmoil`'s, because the auditor needs every byte of every
//! connection. The faults that find most here are faults of streams: a writer ahead of its reader,
//! a segment that ends inside a frame, a peer that disappears without a reset, a stopped process.
//! turmoil has messages instead, and each of its hosts needs a runtime.

#![allow(clippy::unwrap_used)]

mod auditor;
mod checks;
mod classifier;
mod determinism;
mod doubles;
mod history;
mod models;
mod network;
mod play;
mod rows;
mod world;

use std::time::{Duration, Instant};

use doubles::Defect;
use history::Settings;
use network::Host;
use play::{Report, play};

const MEMO: Host = 0;
const CACHE: Host = 1;
/// The first of the classifiers.
const CLASSIFIERS: Host = 2;
/// The first of the clients.
const CLIENTS: Host = CLASSIFIERS + MAX_CLASSIFIERS;

/// The most classifiers that share the work.
const MAX_CLASSIFIERS: usize = 3;

/// The number of histories without `SIMULATION_SECONDS` and `SIMULATION_HISTORIES`.
const HISTORIES: u64 = 48;

/// The number of failed histories after which the run stops.
const ENOUGH: usize = 8;

/// A planted defect must be found within this number of stormy histories.
const CATCH_WITHIN: usize = 100;

/// Histories that show that a defect is harmless.
const HARMLESS: usize = 20;

fn number(variable: &str) -> Option<u64> {
    let value = std::env::var(variable).ok()?;
    Some(value.parse().unwrap_or_else(|_| panic!("{variable}={value} is no number")))
}

/// The report of a failed history.
fn verdict(seed: u64, report: &Report) -> String {
    let mut text = format!("seed {seed} ({}):\n", report.digest);
    for complaint in report.complaints.iter().take(20) {
        text += &format!("    {complaint}\n");
    }
    text + &format!(
        "repeat it: SIMULATION_SEED={seed} cargo test -p afterimage-memo --test simulation every \
         -- --nocapture"
    )
}

#[test]
fn every_history_ends_well() {
    if let Some(seed) = number("SIMULATION_SEED") {
        let report = play(seed, None, true);
        assert!(report.complaints.is_empty(), "{}", verdict(seed, &report));
        return;
    }
    let began = Instant::now();
    let time = number("SIMULATION_SECONDS").map(Duration::from_secs);
    let (mut played, mut requests, mut answers, mut hits, mut faults) = (0, 0, 0, 0, 0);
    let first = number("SIMULATION_FIRST").unwrap_or(0);
    let unlimited = if time.is_some() { u64::MAX } else { HISTORIES };
    let histories = number("SIMULATION_HISTORIES").unwrap_or(unlimited);
    let mut bad = Vec::new();
    while played < histories && time.is_none_or(|time| began.elapsed() < time) {
        let report = play(first + played, None, false);
        if !report.complaints.is_empty() {
            bad.push(verdict(first + played, &report));
            assert!(bad.len() < ENOUGH, "{}", bad.join("\n"));
        }
        played += 1;
        requests += report.requests;
        answers += report.answers;
        hits += report.hits;
        faults += report.faults;
    }
    assert!(bad.is_empty(), "{}", bad.join("\n"));
    println!(
        "{played} histories from seed {first} in {:.1?}: {requests} requests, {answers} answers, \
         {hits} of them hits, {faults} faults; nothing wrong",
        began.elapsed()
    );
    assert!(answers * 2 > requests && hits * 4 > requests, "most of it should work");
}

#[test]
fn the_same_seed_gives_the_same_history_event_for_event() {
    for seed in 0..12 {
        let (one, two) = (play(seed, None, false), play(seed, None, false));
        assert_eq!(one.digest, two.digest, "seed {seed}");
        assert_ne!(one.digest, play(seed + 1, None, false).digest);
    }
}

/// Plays histories with a defect until a check finds it: the check whose complaint contains `sign`.
fn is_caught(defect: Defect, sign: &str) {
    let meets = |settings: &Settings| settings.remote_cache || !defect.is_of_store();
    let seeds = (0..).filter(|&seed| meets(&Settings::of(seed))).take(CATCH_WITHIN);
    let found = |seed: u64| {
        play(seed, Some(defect), false).complaints.iter().any(|text| text.contains(sign))
    };
    let Some((before, seed)) = seeds.enumerate().find(|&(_, seed)| found(seed)) else {
        panic!("no check found {defect:?} in {CATCH_WITHIN} histories");
    };
    println!("{defect:?} is caught in history {}", before + 1);
    let without = play(seed, None, false);
    assert!(without.complaints.is_empty(), "also without it: {}", verdict(seed, &without));
}

#[test]
fn catches_a_store_that_returns_another_keys_value() {
    is_caught(Defect::OtherKey, "after the storm");
}

#[test]
fn catches_a_store_that_forges_valid_seals() {
    is_caught(Defect::ValidSeal, "a wrong label");
}

/// Plays histories with a store that gives no values in time. The memo makes more calls, and all
/// else is as with a healthy store.
fn is_harmless(defect: Defect) {
    let seeds = (0..).filter(|&seed| Settings::of(seed).remote_cache).take(HARMLESS);
    for seed in seeds {
        let mut report = play(seed, Some(defect), false);
        let signs = ["not Hit", "not [Hit", "not [Miss, Hit", "calls for"];
        let is_a_miss = |text: &String| signs.iter().any(|sign| text.contains(sign));
        report.complaints.retain(|text| !is_a_miss(text));
        assert!(report.complaints.is_empty(), "{}", verdict(seed, &report));
    }
}

#[test]
fn a_store_that_ignores_its_limit_costs_no_more_than_the_budget() {
    is_harmless(Defect::LateLookup);
}

#[test]
fn a_store_that_never_answers_costs_at_most_the_budget() {
    is_harmless(Defect::LostLookup);
}

#[test]
fn catches_a_classifier_that_labels_another_image() {
    is_caught(Defect::OtherImage, "a wrong label");
}

#[test]
fn catches_a_classifier_that_reports_a_wrong_model() {
    is_caught(Defect::WrongModel, "a wrong label");
}

#[test]
fn catches_a_classifier_that_loses_a_reply() {
    is_caught(Defect::LostReply, "in the end");
}

#[test]
fn catches_a_classifier_that_drops_a_reply() {
    is_caught(Defect::DroppedReply, "an internal error");
}

#[test]
fn catches_a_store_that_returns_another_keys_bytes() {
    is_caught(Defect::OtherBytes, "after the storm model");
}

#[test]
fn catches_a_store_that_forges_bytes_with_valid_seals() {
    is_caught(Defect::ForgedBytes, "a wrong answer");
}

#[test]
fn catches_an_upstream_that_swaps_rows() {
    is_caught(Defect::SwappedRows, "a wrong answer");
}

#[test]
fn catches_an_upstream_that_loses_rows() {
    is_caught(Defect::LostRows, "in the end");
}

#[test]
fn catches_a_flush_that_does_nothing() {
    is_caught(Defect::IgnoredFlush, "an answer older than the flush");
}

#[test]
fn catches_a_classifier_that_answers_twice() {
    is_caught(Defect::TwoCalls, "calls for");
}
