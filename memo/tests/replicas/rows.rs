//! Requests of several rows: each upstream request carries several, where the replica takes them.

use std::sync::atomic::Ordering::SeqCst;
use std::time::Duration;

use afterimage_core::{Answer, Origin};
use afterimage_memo::pool::PoolOptions;
use afterimage_wire::client::{CallOptions, Infer};
use afterimage_wire::{CallError, Client, Status};

use crate::common::{Mood, label_of, memo, replica};
use crate::load::pool;

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
        for first in [0, 50, 100, 150] {
            let rows = rows(first..first + 50);
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
