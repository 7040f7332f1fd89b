//! The memo itself is killed, or stopped by a signal.

use std::time::Duration;

use afterimage_wire::{Client, ClientOptions};
use rustix::process::Signal;
use tempfile::TempDir;

use crate::common::load::{
    Load, assert_none_failed, assert_only_upstream_crashes, assert_right, within,
};
use crate::common::talk::{stats, until_connected};
use crate::common::{PATIENCE, Running, file, folder};

use crate::{LIMIT, ask_about_all, digits, start_cache, start_classifier, start_memo};

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
