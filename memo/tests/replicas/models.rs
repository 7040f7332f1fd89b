//! Replicas with different models, and requests of several rows.

use std::sync::Arc;
use std::sync::atomic::Ordering::SeqCst;
use std::time::Duration;

use afterimage_core::{Answer, Origin};
use afterimage_memo::pool::PoolOptions;
use afterimage_wire::client::{CallOptions, Infer};
use afterimage_wire::{CallError, Client, Status};

use crate::common::{
    Mood, PATIENCE, Puppet, Running, Serving, counter, gauge, label_of, memo, replica, until,
};
use crate::{Call, Load, assert_right, pool};

/// Checks that no call that started after an answer of `new` got an answer of `old`.
fn assert_no_way_back(calls: &[Call], old: u8, new: u8) {
    let is_of =
        |call: &Call, digest| *call.answer.as_ref().unwrap() == label_of(digest, &call.image);
    let first = calls.iter().filter(|call| is_of(call, new)).map(|call| call.ended).min();
    for call in calls.iter().filter(|call| is_of(call, old)) {
        assert!(first.is_none_or(|first| call.began < first), "the old model answers again");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_rollout_under_load_gives_no_wrong_label_and_goes_one_way() {
    let replicas = [replica(1).await, replica(1).await, replica(1).await];
    let upstream =
        pool(&replicas.each_ref().map(|(_, running)| running), PoolOptions::default()).await;
    let (inner, client) = memo(10_000, upstream).await;
    // A second memo in front of the first: its stored answers must be right, too.
    let (_outer, outer) = memo(10_000, pool(&[&inner], PoolOptions::default()).await).await;
    // Few images, so that most answers are hits.
    let loads = [Load::start(&client, 6, 40), Load::start(&outer, 6, 40)];
    let more = async |calls| {
        for load in &loads {
            load.more(calls).await;
        }
    };
    more(500).await;
    for (puppet, _) in &replicas {
        puppet.becomes(2);
        more(300).await;
    }
    for load in loads {
        let calls = load.stop().await;
        assert_right(&calls, &[1, 2]);
        assert_no_way_back(&calls, 1, 2);
        assert_eq!(*calls.last().unwrap().answer.as_ref().unwrap() / 300, 2);
    }
    assert!(counter(&outer, "hits").await > 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_memo_serves_the_model_of_most_replicas() {
    let [a, b, c] = [replica(1).await, replica(1).await, replica(2).await];
    let upstream = pool(&[&a.1, &b.1, &c.1], PoolOptions::default()).await;
    let (_memo, client) = memo(10_000, upstream).await;
    let digest = || client.welcome().map(|welcome| welcome.digest[0]);
    let ask = async |expected: u8| {
        for i in 0..40 {
            let class = client.classify(&[i; 4]).await.unwrap().label;
            assert_eq!(class, label_of(expected, &[i; 4]));
        }
    };
    ask(1).await;
    assert_eq!((digest(), c.0.asked()), (Some(1), 0));
    // Two replicas to one for the other model. The client learns of it without a request.
    b.0.becomes(2);
    until("the client is told", async || digest() == Some(2)).await;
    let asked = a.0.asked();
    ask(2).await;
    assert_eq!(a.0.asked(), asked);
    // On a tie the model stays. After the end of the last replica of the model, the other model is
    // served.
    b.1.kill().await;
    until("it is missed", async || gauge(&client, "classifiers_connected").await == 2).await;
    ask(2).await;
    c.1.kill().await;
    until("the client is told again", async || digest() == Some(1)).await;
    ask(1).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn replicas_of_other_shapes_do_not_disturb() {
    let [a, b] = [replica(1).await, replica(1).await];
    // The same digest with another shape is another model.
    struct Odd(Serving);
    impl afterimage_wire::server::Service for Odd {
        fn identity(&self) -> afterimage_wire::server::Identity {
            let mut identity = self.0.identity();
            identity.shape = afterimage_wire::proto::Shape::new(&[5]).unwrap();
            identity
        }
        fn handle(&self, batch: &mut afterimage_wire::server::Batch<'_>) {
            self.0.handle(batch);
        }
        fn stats(&self, _: &mut afterimage_wire::proto::stats::Stats) {}
    }
    let odd = Puppet::new(1);
    let odd_running = Running::start(Odd(Serving(Arc::clone(&odd))), "127.0.0.1:0").await;
    let upstream = pool(&[&odd_running, &a.1, &b.1], PoolOptions::default()).await;
    let (_memo, client) = memo(10_000, upstream).await;
    for i in 0..40 {
        assert_eq!(client.classify(&[i; 4]).await.unwrap().label, label_of(1, &[i; 4]));
    }
    assert_eq!(client.welcome().unwrap().shape.dims(), [4]);
    assert_eq!(odd.asked(), 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_idle_client_behind_two_memos_learns_of_a_new_model() {
    let (puppet, running) = replica(1).await;
    let (inner, _) = memo(10_000, pool(&[&running], PoolOptions::default()).await).await;
    let (_outer, client) = memo(10_000, pool(&[&inner], PoolOptions::default()).await).await;
    client.classify(&[1; 4]).await.unwrap();
    let mut changes = client.changes();
    puppet.becomes(2);
    // There are no requests meanwhile.
    let told = async {
        while client.welcome().is_none_or(|welcome| welcome.digest[0] != 2) {
            assert!(changes.next().await);
        }
    };
    tokio::time::timeout(PATIENCE, told).await.unwrap();
    assert_eq!(client.classify(&[1; 4]).await.unwrap().label, label_of(2, &[1; 4]));
}

fn rows(numbers: std::ops::Range<u8>) -> Vec<[u8; 4]> {
    numbers.map(|number| [number, 1, 2, 3]).collect()
}

async fn infer(client: &Client, rows: &[[u8; 4]]) -> Result<Vec<(u16, Origin)>, CallError> {
    let options = CallOptions::new().timeout(Duration::from_secs(2)).no_retry();
    let answers = client.infer_with(&Infer::rows("", rows), options).await?;
    let label = |answer: &Answer| answer.label().expect("this model gives labels");
    Ok(answers.rows.iter().map(|row| (label(&row.answer), row.origin)).collect())
}

/// The answers of model 1 to these rows.
fn right(rows: &[[u8; 4]], origin: Origin) -> Vec<(u16, Origin)> {
    rows.iter().map(|row| (label_of(1, row), origin)).collect()
}

#[tokio::test]
async fn the_rows_of_a_request_go_upstream_together() {
    let (puppet, running) = replica(1).await;
    let upstream = pool(&[&running], PoolOptions::default()).await;
    let (_memo, client) = memo(1000, upstream).await;
    assert_eq!(infer(&client, &rows(0..10)).await.unwrap(), right(&rows(0..10), Origin::Miss));
    assert_eq!((puppet.together.load(SeqCst), puppet.asked()), (1, 10));
    // Ten rows are hits, and one is a call of its own.
    let mut expected = right(&rows(0..10), Origin::Hit);
    expected.extend(right(&rows(10..11), Origin::Miss));
    assert_eq!(infer(&client, &rows(0..11)).await.unwrap(), expected);
    assert_eq!((puppet.together.load(SeqCst), puppet.asked()), (1, 11));
    // Requests of 64 rows at most.
    assert_eq!(
        infer(&client, &rows(100..200)).await.unwrap(),
        right(&rows(100..200), Origin::Miss)
    );
    assert_eq!((puppet.together.load(SeqCst), puppet.asked()), (3, 111));
}

#[tokio::test]
async fn a_replica_that_refuses_rows_gets_them_one_by_one() {
    let (puppet, running) = replica(1).await;
    puppet.refuses_rows.store(true, SeqCst);
    let upstream = pool(&[&running], PoolOptions::default()).await;
    let (_memo, client) = memo(1000, upstream).await;
    assert_eq!(infer(&client, &rows(0..40)).await.unwrap(), right(&rows(0..40), Origin::Miss));
    assert_eq!((puppet.together.load(SeqCst), puppet.asked()), (1, 40));
    // It is not tried again on this connection.
    assert_eq!(infer(&client, &rows(40..80)).await.unwrap(), right(&rows(40..80), Origin::Miss));
    assert_eq!((puppet.together.load(SeqCst), puppet.asked()), (1, 80));
}

#[tokio::test]
async fn rows_survive_a_replica_that_fails_or_hangs() {
    for mood in [Mood::Fails(Status::UpstreamError), Mood::Hangs] {
        let replicas = [replica(1).await, replica(1).await];
        replicas[0].0.set_mood(mood);
        let upstream =
            pool(&replicas.each_ref().map(|(_, running)| running), PoolOptions::default()).await;
        let (_memo, client) = memo(1000, upstream).await;
        // The pool picks at random: the faulty one is picked once in 25 calls.
        for first in (0..250).step_by(10) {
            let rows = rows(first..first + 10);
            assert_eq!(
                infer(&client, &rows).await.unwrap(),
                right(&rows, Origin::Miss),
                "{mood:?}"
            );
        }
        assert!(replicas[0].0.asked() > 0, "{mood:?}: the faulty replica got rows");
    }
}

#[tokio::test]
async fn a_memo_sends_rows_to_another_memo() {
    let (puppet, running) = replica(1).await;
    let (inner, client) = memo(1000, pool(&[&running], PoolOptions::default()).await).await;
    let (_outer, outer) = memo(1000, pool(&[&inner], PoolOptions::default()).await).await;
    infer(&client, &rows(0..20)).await.unwrap();
    // To the outer memo these are misses: the inner memo has the answers.
    assert_eq!(infer(&outer, &rows(0..20)).await.unwrap(), right(&rows(0..20), Origin::Miss));
    assert_eq!(infer(&outer, &rows(0..20)).await.unwrap(), right(&rows(0..20), Origin::Hit));
    assert_eq!((puppet.together.load(SeqCst), puppet.asked()), (1, 20));
}
