//! Processes that die, hang and come back while load runs. What a memo promises of itself (see
//! `DESIGN.md`, "five promises") is asked of real processes over real sockets here.

#![allow(clippy::unwrap_used)]

mod common;

use std::sync::Arc;
use std::time::{Duration, Instant};

use afterimage_bench::workload::Population;
use afterimage_classifier::Model;
use afterimage_wire::client::CallError;
use afterimage_wire::proto::message::{Message, Origin};
use afterimage_wire::proto::stats::Value;
use afterimage_wire::{Client, ClientOptions, Status};
use rustix::process::Signal;
use tempfile::TempDir;

use common::load::{
    Call, Load, assert_none_failed, assert_only_upstream_crashes, assert_right, is_upstream_crash,
    longest, median, within,
};
use common::talk::{Raw, client, error, gauge, says_yes, stats, until_connected};
use common::{PATIENCE, Running, answered, contrary_model, file, folder, text, until};

/// The longest that a test here may take.
const LIMIT: Duration = Duration::from_secs(60);

/// "At once", on a busy machine and without optimization: well before a classifier's timeout, five seconds.
const AT_ONCE: Duration = Duration::from_secs(3);

/// "Within a second or two", on the same.
const SOON: Duration = Duration::from_secs(5);

/// A budget for lookups that a busy machine keeps, and that shows when it is waited for.
const BUDGET: Duration = Duration::from_millis(250);

fn start_cache() -> Running {
    Running::start(&["cache", "--memory", "8MiB"])
}

fn start_classifier() -> Running {
    Running::start(&["classifier", "--model", "raw"])
}

async fn start_memo(flags: &[&str]) -> Running {
    let memo = Running::start(&[&["memo", "--memory", "8MiB", "--model", "raw"], flags].concat());
    until_connected(memo.addr()).await;
    memo
}

/// A memo in front of this cache, with a classifier of its own.
async fn start_memo_with_cache(cache: &Running) -> Running {
    let budget = format!("{}ms", BUDGET.as_millis());
    start_memo(&["--cache", &cache.place(), "--lookup-budget", &budget]).await
}

fn digits(seed: u64, count: usize) -> (Arc<Population>, Vec<u16>) {
    let (population, labels) = answered(seed, count, &Model::raw());
    (Arc::new(population), labels)
}

/// Asks about every image once, so that it is remembered.
async fn ask_about_all(client: &Client, population: &Population, labels: &[u16]) {
    for (i, &class) in labels.iter().enumerate() {
        assert_eq!(client.classify(population.image(i)).await.unwrap().class, class);
    }
}

/// Waits until the memo finds answers in its cache (again); gives the time it took.
async fn until_hits(cache: &Running, what: &str) -> Duration {
    let began = Instant::now();
    until(what, async || stats(cache.addr()).await.counter_value("hits") > 0).await;
    began.elapsed()
}

// ---- The cache ----

#[test]
fn a_cache_that_dies_fails_no_request_and_is_used_again_when_it_is_back() {
    within(LIMIT, async {
        let mut cache = start_cache();
        let memo = start_memo_with_cache(&cache).await;
        let (population, labels) = digits(1, 60);
        let load = Load::start(&client(memo.addr()).await, &population, 6);
        until_hits(&cache, "the cache is used").await;

        cache.kill();
        load.more(300).await;
        cache.restart();
        let back_after = until_hits(&cache, "the cache is used again").await;
        load.more(100).await;
        let calls = load.stop().await;

        assert_none_failed(&calls);
        let (_, remembered) = assert_right(&calls, &labels);
        assert!(remembered > 0);
        assert!(back_after < SOON, "it took {back_after:?} until the cache was used again");
        assert!(longest(&calls) < SOON, "a call took {:?}", longest(&calls));
        assert_eq!(stats(memo.addr()).await.counter_value("rejected_tags"), 0);
    });
}

#[test]
fn a_cache_that_was_never_there_fails_no_request_and_is_used_when_it_comes() {
    within(LIMIT, async {
        let mut cache = start_cache();
        cache.kill();
        let budget = format!("{}ms", BUDGET.as_millis());
        let place = cache.place();
        let flags = ["memo", "--cache", &place, "--lookup-budget", &budget, "--model", "raw"];
        let memo = Running::start(&flags);
        let (population, labels) = digits(2, 40);
        let load = Load::start(&client(memo.addr()).await, &population, 4);
        load.more(100).await;
        cache.restart();
        let after = until_hits(&cache, "the cache is used").await;
        let calls = load.stop().await;
        assert_none_failed(&calls);
        assert_right(&calls, &labels);
        assert!(after < SOON, "it took {after:?} until the cache was used");
    });
}

#[test]
fn a_cache_that_hangs_costs_some_budgets_then_nothing_and_is_used_again_when_it_goes_on() {
    within(LIMIT, async {
        let cache = start_cache();
        let memo = start_memo_with_cache(&cache).await;
        let (population, labels) = digits(3, 60);
        let load = Load::start(&client(memo.addr()).await, &population, 6);
        until_hits(&cache, "the cache is used").await;

        cache.hang();
        load.more(300).await;
        let hung = load.count();
        load.more(300).await;
        let recovered = load.so_far().split_off(hung);
        let breaker = stats(memo.addr()).await;
        cache.go_on();
        let hits = stats(cache.addr()).await.counter_value("hits");
        let went_on = Instant::now();
        until("the cache is used again", async || {
            stats(cache.addr()).await.counter_value("hits") > hits + 10
        })
        .await;
        let back_after = went_on.elapsed();
        let calls = load.stop().await;

        assert_none_failed(&calls);
        assert_right(&calls, &labels);
        assert!(breaker.counter_value("store_breaker_opened") > 0, "{breaker:?}");
        assert!(breaker.counter_value("store_lookups_bypassed") > 0, "{breaker:?}");
        // With a budget and no breaker, every call would wait for the budget.
        assert!(median(&recovered) < BUDGET / 2, "half of the calls take {:?}", median(&recovered));
        assert!(longest(&calls) < SOON, "a call took {:?}", longest(&calls));
        assert!(back_after < SOON, "it took {back_after:?} until the cache was used again");
    });
}

#[test]
fn a_cache_that_hangs_does_not_slow_one_caller_down_for_good() {
    within(LIMIT, async {
        let cache = start_cache();
        // Each look at the cache takes longer than the time between two.
        let memo = start_memo_with_cache(&cache).await;
        let (population, labels) = digits(12, 30);
        let load = Load::start(&client(memo.addr()).await, &population, 1);
        until_hits(&cache, "the cache is used").await;
        cache.hang();
        load.more(30).await;
        let hung = load.count();
        load.more(100).await;
        let recovered = load.so_far().split_off(hung);
        let calls = load.stop().await;
        assert_none_failed(&calls);
        assert_right(&calls, &labels);
        assert!(median(&recovered) < BUDGET / 2, "half of the calls take {:?}", median(&recovered));
    });
}

#[test]
fn a_cache_that_hangs_from_the_start_fails_no_request_and_is_used_when_it_goes_on() {
    within(LIMIT, async {
        let cache = start_cache();
        cache.hang();
        // Its connections are accepted, by the kernel, and then nothing comes.
        let place = cache.place();
        let memo = Running::start(&["memo", "--cache", &place, "--model", "raw"]);
        let (population, labels) = digits(13, 30);
        let load = Load::start(&client(memo.addr()).await, &population, 4);
        load.more(100).await;
        cache.go_on();
        let after = until_hits(&cache, "the cache is used").await;
        let calls = load.stop().await;
        assert_none_failed(&calls);
        assert_right(&calls, &labels);
        assert!(longest(&calls) < SOON, "a call took {:?}", longest(&calls));
        assert!(after < 2 * SOON, "it took {after:?} until the cache was used");
    });
}

#[test]
fn a_cache_with_a_snapshot_comes_back_warm_after_its_end_and_after_a_crash() {
    within(LIMIT, async {
        let folder = folder();
        let snapshot = text(folder.path().join("snapshot"));
        let mut cache = Running::start(&[
            "cache",
            "--memory",
            "8MiB",
            "--snapshot",
            &snapshot,
            "--snapshot-every",
            "100ms",
        ]);
        let memo = start_memo(&["--cache", &cache.place(), "--lookup-budget", "10s"]).await;
        let client = client(memo.addr()).await;
        let (population, labels) = digits(14, 40);
        ask_about_all(&client, &population, &labels).await;
        for crash in [false, true] {
            if crash {
                // A crash may take the last moments with it, not more: these were long ago.
                tokio::time::sleep(Duration::from_secs(1)).await;
                cache.kill();
            } else {
                cache.signal(Signal::TERM);
                assert_eq!(cache.wait().code(), Some(0));
            }
            cache.restart();
            assert_eq!(gauge(&stats(cache.addr()).await, "entries"), 40, "crash: {crash}");
            until("the memo is back at its cache", async || {
                let _ = client.classify(population.image(0)).await;
                let stats = stats(memo.addr()).await;
                stats.get("store_breaker") == Some(&Value::Text("closed".into()))
                    && says_yes(&stats, "store_connected")
            })
            .await;
            for (i, &class) in labels.iter().enumerate() {
                let label = client.classify(population.image(i)).await.unwrap();
                assert_eq!((label.class, label.origin), (class, Origin::Memoized));
            }
        }
    });
}

#[test]
fn another_service_on_the_caches_port_fails_no_request() {
    within(LIMIT, async {
        // The address of a classifier, given for a cache's by mistake.
        let wrong = start_classifier();
        let place = wrong.place();
        let memo = Running::start(&["memo", "--cache", &place, "--model", "raw"]);
        let client = client(memo.addr()).await;
        let (population, labels) = digits(4, 20);
        for _ in 0..2 {
            ask_about_all(&client, &population, &labels).await;
        }
        assert_eq!(stats(memo.addr()).await.counter_value("hits"), 0);
    });
}

// ---- The classifier ----

/// Images that were asked about, and images that never were.
struct Known {
    old: Arc<Population>,
    old_labels: Vec<u16>,
    new: Arc<Population>,
    new_labels: Vec<u16>,
}

impl Known {
    fn new() -> Known {
        let (old, old_labels) = digits(5, 30);
        let (new, new_labels) = digits(6, 400);
        Known { old, old_labels, new, new_labels }
    }
}

#[test]
fn a_dead_classifier_fails_misses_at_once_while_hits_go_on() {
    within(LIMIT, async {
        a_dead_classifier(&[]).await;
    });
}

#[test]
fn a_dead_classifier_fails_misses_at_once_while_hits_go_on_from_a_remote_cache() {
    within(LIMIT, async {
        let cache = start_cache();
        a_dead_classifier(&["--cache", &cache.place(), "--lookup-budget", "10s"]).await;
    });
}

async fn a_dead_classifier(flags: &[&str]) {
    let mut classifier = start_classifier();
    let memo = start_memo(&[&["--classifier", &classifier.place()], flags].concat()).await;
    let client = client(memo.addr()).await;
    let known = Known::new();
    ask_about_all(&client, &known.old, &known.old_labels).await;
    // All of these are remembered, so all of them must be answered all the time.
    let load = Load::start(&client, &known.old, 4);
    load.more(20).await;

    classifier.kill();
    for i in 0..20 {
        let began = Instant::now();
        let error = client.classify(known.new.image(i)).await.unwrap_err();
        assert!(is_upstream_crash(&error), "{error:?}");
        assert!(error.to_string().contains("classifier"), "{error}");
        assert!(began.elapsed() < AT_ONCE, "the miss took {:?} to fail", began.elapsed());
    }
    load.more(100).await;

    classifier.restart();
    let restarted = Instant::now();
    until("misses work again", async || client.classify(known.new.image(0)).await.is_ok()).await;
    let back_after = restarted.elapsed();
    for i in 0..20 {
        let label = client.classify(known.new.image(i)).await.unwrap();
        assert_eq!(label.class, known.new_labels[i]);
    }
    load.more(20).await;

    let calls = load.stop().await;
    assert_none_failed(&calls);
    let (answers, remembered) = assert_right(&calls, &known.old_labels);
    assert_eq!(answers, remembered, "some hits were computed anew");
    assert!(longest(&calls) < SOON, "a hit took {:?}", longest(&calls));
    assert!(back_after < SOON, "it took {back_after:?} until misses worked again");
}

#[test]
fn a_classifier_that_was_never_there_fails_requests_at_once_and_works_when_it_comes() {
    within(LIMIT, async {
        let mut classifier = start_classifier();
        classifier.kill();
        let place = classifier.place();
        let memo = Running::start(&["memo", "--classifier", &place, "--memory", "8MiB"]);
        let client = client(memo.addr()).await;
        let (population, labels) = digits(15, 10);
        for i in 0..10 {
            let began = Instant::now();
            let error = client.classify(population.image(i)).await.unwrap_err();
            assert!(is_upstream_crash(&error), "{error:?}");
            assert!(began.elapsed() < AT_ONCE, "it took {:?} to fail", began.elapsed());
        }
        classifier.restart();
        until("requests work", async || client.classify(population.image(0)).await.is_ok()).await;
        ask_about_all(&client, &population, &labels).await;
        assert_eq!(client.welcome().unwrap().shape.dims(), [28, 28], "the client knows the shape");
    });
}

#[test]
fn what_waits_for_a_classifier_when_it_dies_fails_at_once() {
    within(LIMIT, async {
        const COUNT: usize = 300;
        let mut classifier = start_classifier();
        let memo = start_memo(&["--classifier", &classifier.place()]).await;
        let (population, _) = digits(7, COUNT);
        let (mut raw, _) = Raw::open(memo.addr(), "").await;
        classifier.hang();
        for i in 0..COUNT {
            let image = population.image(i);
            raw.feed(i as u64, Message::ClassifyReq { image, budget_ms: 0 }).await;
        }
        raw.flush().await;
        until("all wait for the classifier", async || {
            gauge(&stats(memo.addr()).await, "waiting") == COUNT as i64
        })
        .await;
        let killed = Instant::now();
        classifier.kill();
        let mut seen = [false; COUNT];
        for _ in 0..COUNT {
            let frame = raw.recv().await;
            let (status, _, connection) = error(&frame);
            assert_eq!((status, connection), (Status::UpstreamCrashed, false));
            let id = frame.header.id as usize;
            assert!(!std::mem::replace(&mut seen[id], true), "request {id} was answered twice");
        }
        assert!(killed.elapsed() < AT_ONCE, "it took {:?}", killed.elapsed());
        let after = stats(memo.addr()).await;
        assert_eq!(gauge(&after, "waiting"), 0);
        assert_eq!(after.counter_value("classifier_failures"), COUNT as u64);
    });
}

#[test]
fn a_classifier_that_hangs_fails_misses_in_time_while_hits_go_on() {
    within(LIMIT, async {
        let classifier = start_classifier();
        let place = classifier.place();
        let memo = start_memo(&["--classifier", &place, "--classifier-timeout", "1s"]).await;
        let client = client(memo.addr()).await;
        let known = Known::new();
        ask_about_all(&client, &known.old, &known.old_labels).await;
        let load = Load::start(&client, &known.old, 4);

        classifier.hang();
        let began = Instant::now();
        let error = client.classify(known.new.image(0)).await.unwrap_err();
        let failed_after = began.elapsed();
        assert!(
            matches!(error, CallError::Server { status: Status::UpstreamError, .. }),
            "{error:?}"
        );
        assert!(failed_after < SOON, "it took {failed_after:?}");
        load.more(50).await;
        classifier.go_on();
        until("misses work again", async || {
            let answer = client.classify(known.new.image(1)).await;
            answer.is_ok_and(|label| label.class == known.new_labels[1])
        })
        .await;

        let calls = load.stop().await;
        assert_none_failed(&calls);
        assert_right(&calls, &known.old_labels);
    });
}

// ---- The memo ----

/// A cache, a classifier, and a memo in front whose secret outlives it.
async fn full_house(folder: &TempDir) -> (Running, Running, Running) {
    let secret = file(folder, "secret", [9; 32]);
    let (cache, classifier) = (start_cache(), start_classifier());
    let (cache_place, classifier_place) = (cache.place(), classifier.place());
    let memo = start_memo(&[
        "--cache",
        &cache_place,
        "--classifier",
        &classifier_place,
        "--secret-file",
        &secret,
        "--lookup-budget",
        "10s",
    ])
    .await;
    (cache, classifier, memo)
}

/// A client that waits for a service to come back rather than fail, for all of [`PATIENCE`].
async fn patient_client(memo: &Running) -> Client {
    Client::connect(memo.addr(), ClientOptions::new().timeout(PATIENCE)).await.unwrap()
}

#[test]
fn a_client_outlives_a_memo_that_crashes_and_the_next_one_remembers() {
    within(LIMIT, async {
        let folder = folder();
        let (_cache, classifier, mut memo) = full_house(&folder).await;
        let (population, labels) = digits(8, 50);
        let client = patient_client(&memo).await;
        ask_about_all(&client, &population, &labels).await;
        let load = Load::start(&client, &population, 4);
        load.more(50).await;
        for _ in 0..2 {
            memo.kill();
            // Calls begin while nobody is there.
            tokio::time::sleep(Duration::from_millis(100)).await;
            memo.restart();
            load.more(50).await;
        }
        // What the first memo learned, the third finds in the cache.
        until_connected(memo.addr()).await;
        let computed = stats(classifier.addr()).await.counter_value("engine_scored");
        load.more(200).await;
        assert_eq!(stats(classifier.addr()).await.counter_value("engine_scored"), computed);

        let calls = load.stop().await;
        let failed = assert_only_upstream_crashes(&calls);
        assert!(failed < 50, "{failed} calls found a memo without its classifier");
        assert_right(&calls, &labels);
    });
}

#[test]
fn a_memo_that_is_told_to_end_under_load_loses_no_request() {
    within(LIMIT, async {
        let mut memo = start_memo(&[]).await;
        let (population, labels) = digits(9, 50);
        let load = Load::start(&patient_client(&memo).await, &population, 4);
        load.more(50).await;
        for _ in 0..2 {
            memo.signal(Signal::TERM);
            assert_eq!(memo.wait().code(), Some(0));
            memo.restart();
            load.more(50).await;
        }
        let calls = load.stop().await;
        assert_none_failed(&calls);
        assert_right(&calls, &labels);
    });
}

// ---- Another model ----

/// What a classifier itself answers to each image.
async fn direct_answers(classifier: &Running, population: &Population) -> Vec<u16> {
    let client = client(classifier.addr()).await;
    let mut labels = Vec::new();
    for i in 0..population.len() {
        labels.push(client.classify(population.image(i)).await.unwrap().class);
    }
    labels
}

/// Fails when an answer of the old model was given to a call that began after an answer of the new
/// one had come. `old` and `new` differ for every image.
fn assert_no_way_back(calls: &[Call], old: &[u16], new: &[u16]) {
    let mut first_new = None;
    for call in calls {
        let Ok(label) = &call.outcome else { continue };
        if label.class == new[call.image] {
            first_new = first_new.or(Some(call.ended));
            continue;
        }
        assert_eq!(label.class, old[call.image], "neither model's answer: {call:?}");
        assert!(
            first_new.is_none_or(|ended| call.began < ended),
            "the old model's answer after the new one's: {call:?}"
        );
    }
}

#[test]
fn another_model_behind_the_memo_never_gets_the_old_ones_answers() {
    within(LIMIT, async {
        another_model(&[]).await;
    });
}

#[test]
fn another_model_behind_the_memo_never_gets_the_old_ones_answers_from_a_remote_cache() {
    within(LIMIT, async {
        let cache = start_cache();
        another_model(&["--cache", &cache.place(), "--lookup-budget", "10s"]).await;
    });
}

async fn another_model(flags: &[&str]) {
    let folder = folder();
    let path = folder.path().join("contrary.safetensors");
    contrary_model().write(&path).unwrap();
    let path = text(&path);
    let models = ["raw", path.as_str()];

    let mut classifier = start_classifier();
    let memo =
        start_memo(&[&["--classifier", &classifier.place(), "--threads", "3"], flags].concat())
            .await;
    let population = Arc::new(Population::drawn(10, 40));
    let mut answers = direct_answers(&classifier, &population).await;
    let client = client(memo.addr()).await;
    let load = Load::start(&client, &population, 6);
    load.more(100).await;
    assert_right(&load.so_far(), &answers);

    // There, back again, and there once more: what was remembered of a model serves it again.
    for round in 1..=3 {
        let before = load.count();
        classifier.kill();
        load.more(20).await;
        classifier.restart_as(&["classifier", "--model", models[round % 2]]);
        let direct = direct_answers(&classifier, &population).await;
        assert!(answers.iter().zip(&direct).all(|(old, new)| old != new));
        let digest = Raw::open(classifier.addr(), "").await.1.digest;
        until("the memo knows of the change", async || {
            Raw::open(memo.addr(), "").await.1.digest == digest
        })
        .await;
        let known = Instant::now();
        load.more(200).await;

        let calls = load.so_far().split_off(before);
        assert_only_upstream_crashes(&calls);
        assert_no_way_back(&calls, &answers, &direct);
        let later: Vec<Call> = calls.into_iter().filter(|call| call.began > known).collect();
        assert_none_failed(&later);
        let (_, remembered) = assert_right(&later, &direct);
        assert!(remembered > 0, "nothing is remembered of the new model");
        answers = direct;
    }
    load.stop().await;
}

// ---- Rolling over ----

#[test]
fn a_classifier_that_drains_while_another_takes_over_gives_no_wrong_answer_and_no_hang() {
    within(LIMIT, async {
        let mut classifier = start_classifier();
        let place = classifier.place();
        // Nothing is remembered for long: nearly every call goes through to the classifier.
        let memo = start_memo(&["--classifier", &place, "--entries", "1"]).await;
        let (population, labels) = digits(11, 300);
        let load = Load::start(&client(memo.addr()).await, &population, 8);
        load.more(100).await;
        for _ in 0..3 {
            // The port is free as soon as the old one drains; the new one need not wait for its end.
            classifier.signal(Signal::TERM);
            let next = classifier.successor(&["classifier", "--model", "raw"]);
            let mut old = std::mem::replace(&mut classifier, next);
            assert_eq!(old.wait().code(), Some(0));
            until_connected(memo.addr()).await;
            load.more(100).await;
        }
        let calls = load.stop().await;
        // Between the two there is nobody, and misses fail at once: so how many do is a matter of how
        // long that lasts.
        let failed = assert_only_upstream_crashes(&calls);
        let (answers, _) = assert_right(&calls, &labels);
        assert_eq!(answers + failed, calls.len());
        assert!(longest(&calls) < SOON, "a call took {:?}", longest(&calls));
    });
}
