//! The cache dies, hangs, is missing, or is another service. The memo itself is killed or stopped.

use std::time::{Duration, Instant};

use afterimage_wire::proto::message::Origin;
use afterimage_wire::proto::stats::Value;
use afterimage_wire::{Client, ClientOptions};
use rustix::process::Signal;
use tempfile::TempDir;

use crate::common::load::{
    Load, assert_none_failed, assert_only_upstream_crashes, assert_right, longest, median, within,
};
use crate::common::talk::{client, gauge, says_yes, stats, until_connected};
use crate::common::{PATIENCE, Running, file, folder, text, until};
use crate::{
    BUDGET, LIMIT, SOON, ask_about_all, digits, start_cache, start_classifier, start_memo,
    start_memo_with_cache, until_hits,
};

#[test]
fn a_cache_that_dies_fails_no_request_and_is_used_again() {
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
        let (_, hits) = assert_right(&calls, &labels);
        assert!(hits > 0);
        assert!(back_after < SOON, "it took {back_after:?} until the cache was used again");
        assert!(longest(&calls) < SOON, "a call took {:?}", longest(&calls));
        assert_eq!(stats(memo.addr()).await.counter_value("rejected_tags"), 0);
    });
}

#[test]
fn a_cache_that_starts_late_fails_no_request_and_is_used() {
    within(LIMIT, async {
        let mut cache = start_cache();
        cache.kill();
        let budget = format!("{}ms", BUDGET.as_millis());
        let place = cache.place();
        let flags = ["memo", "--store", &place, "--lookup-budget", &budget, "--model", "raw"];
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
fn a_hung_cache_costs_a_few_lookup_budgets_then_nothing() {
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
fn a_cache_hung_from_the_start_fails_no_request() {
    within(LIMIT, async {
        let cache = start_cache();
        cache.hang();
        // Its connections are accepted, by the kernel, and then nothing comes.
        let place = cache.place();
        let memo = Running::start(&["memo", "--store", &place, "--model", "raw"]);
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
fn a_cache_with_a_snapshot_restarts_warm_even_after_a_crash() {
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
        let memo = start_memo(&["--store", &cache.place(), "--lookup-budget", "10s"]).await;
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
                assert_eq!((label.label, label.origin), (class, Origin::Hit));
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
        let memo = Running::start(&["memo", "--store", &place, "--model", "raw"]);
        let client = client(memo.addr()).await;
        let (population, labels) = digits(4, 20);
        for _ in 0..2 {
            ask_about_all(&client, &population, &labels).await;
        }
        assert_eq!(stats(memo.addr()).await.counter_value("hits"), 0);
    });
}

/// A cache, a classifier, and a memo in front with a secret that the next memo shares.
async fn all_services(folder: &TempDir) -> (Running, Running, Running) {
    let secret = file(folder, "secret", [9; 32]);
    let (cache, classifier) = (start_cache(), start_classifier());
    let (cache_place, classifier_place) = (cache.place(), classifier.place());
    let memo = start_memo(&[
        "--store",
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
fn a_client_outlives_a_crashed_memo_and_gets_hits_from_the_next() {
    within(LIMIT, async {
        let folder = folder();
        let (_cache, classifier, mut memo) = all_services(&folder).await;
        let (population, labels) = digits(8, 50);
        let client = patient_client(&memo).await;
        ask_about_all(&client, &population, &labels).await;
        let load = Load::start(&client, &population, 4);
        load.more(50).await;
        for _ in 0..2 {
            memo.kill();
            // Calls begin while the memo is down.
            tokio::time::sleep(Duration::from_millis(100)).await;
            memo.restart();
            load.more(50).await;
        }
        // The third memo finds the answers of the first one in the cache.
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
fn a_memo_terminated_under_load_loses_no_request() {
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
