//! Replicas with different models.

use std::sync::Arc;

use afterimage_memo::pool::PoolOptions;

use crate::common::{
    PATIENCE, Puppet, Running, Serving, counter, gauge, label_of, memo, replica, until,
};

use crate::load::{Call, Load, assert_right, pool};

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
