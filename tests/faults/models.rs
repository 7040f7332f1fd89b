//! The classifier behind the memo becomes another one.

use std::sync::Arc;
use std::time::Instant;

use afterimage_bench::workload::Population;
use rustix::process::Signal;

use crate::common::load::{
    Call, Load, assert_none_failed, assert_only_upstream_crashes, assert_right, longest, within,
};
use crate::common::talk::{Raw, client, until_connected};
use crate::common::{Running, contrary_model, folder, text, until};

use crate::{LIMIT, SOON, digits, start_cache, start_classifier, start_memo};

/// The answer of a classifier itself to each image.
async fn direct_answers(classifier: &Running, population: &Population) -> Vec<u16> {
    let client = client(classifier.addr()).await;
    let mut labels = Vec::new();
    for i in 0..population.len() {
        labels.push(client.classify(population.image(i)).await.unwrap().label);
    }
    labels
}

/// Fails when an answer of the old model was given to a call that began after an answer of the new
/// one had come. `old` and `new` differ for every image.
fn assert_no_way_back(calls: &[Call], old: &[u16], new: &[u16]) {
    let mut first_new = None;
    for call in calls {
        let Ok(label) = &call.outcome else { continue };
        if label.label == new[call.image] {
            first_new = first_new.or(Some(call.ended));
            continue;
        }
        assert_eq!(label.label, old[call.image], "neither model's answer: {call:?}");
        assert!(
            first_new.is_none_or(|ended| call.began < ended),
            "the old model's answer after the new one's: {call:?}"
        );
    }
}

#[test]
fn a_new_model_never_gets_answers_of_the_old_one() {
    within(LIMIT, async {
        another_model(&[]).await;
    });
}

#[test]
fn a_new_model_never_gets_old_answers_from_a_remote_cache() {
    within(LIMIT, async {
        let cache = start_cache();
        another_model(&["--store", &cache.place(), "--lookup-budget", "10s"]).await;
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

    // The model changes, changes back and changes again: its cached answers serve it each time.
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

#[test]
fn a_handover_of_classifiers_gives_no_wrong_answer() {
    within(LIMIT, async {
        let mut classifier = start_classifier();
        let place = classifier.place();
        // Nothing is remembered for long: nearly every call goes through to the classifier.
        let memo = start_memo(&["--classifier", &place, "--entries", "1"]).await;
        let (population, labels) = digits(11, 300);
        let load = Load::start(&client(memo.addr()).await, &population, 8);
        load.more(100).await;
        for _ in 0..3 {
            // The port is free as soon as the old one drains; the new one need not wait for its
            // end.
            classifier.signal(Signal::TERM);
            let next = classifier.successor(&["classifier", "--model", "raw"]);
            let mut old = std::mem::replace(&mut classifier, next);
            assert_eq!(old.wait().code(), Some(0));
            until_connected(memo.addr()).await;
            load.more(100).await;
        }
        let calls = load.stop().await;
        // Between the two classifiers misses fail at once; their number depends on that time.
        let failed = assert_only_upstream_crashes(&calls);
        let (answers, _) = assert_right(&calls, &labels);
        assert_eq!(answers + failed, calls.len());
        assert!(longest(&calls) < SOON, "a call took {:?}", longest(&calls));
    });
}
