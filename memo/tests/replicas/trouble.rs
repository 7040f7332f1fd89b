//! Replicas that fail, hang, drain or die: retries, hedges and ejections. Replicas that a name
//! resolution adds and removes.

use std::net::SocketAddr;
use std::sync::atomic::AtomicUsize;
use std::sync::atomic::Ordering::SeqCst;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use afterimage_memo::pool::{Pool, PoolOptions, Target};
use afterimage_wire::client::{CallError, CallOptions};
use afterimage_wire::{Client, ClientOptions, Status};
use tokio::task::JoinHandle;

use crate::common::{
    Mood, Puppet, Running, Serving, counter, fail_fast, gauge, label_of, memo, replica, until,
};
use crate::{Load, assert_right, once, pool};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_replica_that_is_killed_or_drains_loses_no_request() {
    let stays = replica(1).await;
    let [killed, drained] = [replica(1).await, replica(1).await];
    let all = [&stays.1, &killed.1, &drained.1];
    let (_memo, client) = memo(10_000, pool(&all, PoolOptions::default()).await).await;
    let load = Load::start(&client, 16, 250);
    load.more(300).await;
    killed.1.kill().await;
    load.more(300).await;
    let addr = drained.1.addr.clone();
    drained.1.drain().await;
    load.more(300).await;
    // A replica comes back in place of the dead one and gets requests again.
    let back = Puppet::new(1);
    let _running = Running::start(Serving(Arc::clone(&back)), &addr).await;
    until("who came back is asked", async || back.asked() > 0).await;
    let calls = load.stop().await;
    assert_right(&calls, &[1]);
    assert_eq!(counter(&client, "classifier_failures").await, 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn calls_of_a_hung_replica_move_and_it_comes_back() {
    let (good, bad) = (replica(1).await, replica(1).await);
    let options = PoolOptions { timeout: Duration::from_millis(400), ..Default::default() };
    let (_memo, client) = memo(10_000, pool(&[&good.1, &bad.1], options).await).await;
    let load = Load::start(&client, 8, 250);
    load.more(100).await;
    bad.0.set_mood(Mood::Hangs);
    until("it is ejected", async || counter(&client, "classifier_ejections").await > 0).await;
    load.more(300).await;
    let asked = bad.0.asked();
    bad.0.set_mood(Mood::Answers);
    until("it is asked again", async || bad.0.asked() > asked + 20).await;
    assert_right(&load.stop().await, &[1]);
    assert_eq!(counter(&client, "classifier_failures").await, 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_hung_replica_is_ejected_long_before_requests_time_out() {
    let (good, bad) = (replica(1).await, replica(1).await);
    let options = PoolOptions { timeout: Duration::from_secs(8), ..Default::default() };
    let (_memo, client) = memo(10_000, pool(&[&good.1, &bad.1], options).await).await;
    let began = Instant::now();
    let ask = |i: u32| {
        let client = client.clone();
        tokio::spawn(async move { client.classify_with(&i.to_le_bytes(), once()).await })
    };
    let calls = share(&good.0, &bad.0, || (0..40).map(ask).collect()).await;
    // Each miss checks for silent replicas.
    until("it is ejected", async || {
        drop(ask(1000 + began.elapsed().as_micros() as u32));
        counter(&client, "classifier_ejections").await == 1
    })
    .await;
    assert!(began.elapsed() < options.timeout, "{:?}", began.elapsed());
    bad.1.kill().await;
    for call in calls {
        call.await.unwrap().unwrap();
    }
    assert_eq!(counter(&client, "classifier_failures").await, 0);
}

/// Calls with this timeout, each with an image of its own, that their client does not repeat.
fn calls(client: &Client, calls: u32, time: Duration) -> Vec<JoinHandle<Result<u16, CallError>>> {
    let ask = |i: u32| {
        let (client, options) = (client.clone(), CallOptions::new().no_retry().timeout(time));
        let answer = async move { client.classify_with(&i.to_le_bytes(), options).await };
        tokio::spawn(async move { answer.await.map(|label| label.label) })
    };
    (0..calls).map(ask).collect()
}

/// The calls that `make` makes at once, shared by two replicas of which only the first ever
/// answers. Both hold their requests at first: a replica that answered at once would get nearly all
/// calls.
async fn share<C>(good: &Puppet, bad: &Puppet, make: impl FnOnce() -> Vec<C>) -> Vec<C> {
    for puppet in [good, bad] {
        puppet.set_mood(Mood::Hangs);
    }
    let calls = make();
    until("all are asked", async || good.asked() + bad.asked() >= calls.len()).await;
    assert!(bad.asked() > 5, "it was asked {} times", bad.asked());
    good.set_mood(Mood::Answers);
    good.release();
    calls
}

/// So long that no replica is ejected for silence and no attempt times out.
const ENDLESS: Duration = Duration::from_secs(600);

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_hung_replica_leaves_time_for_another_to_answer() {
    let (good, bad) = (replica(1).await, replica(1).await);
    let options = PoolOptions { timeout: ENDLESS, ..Default::default() };
    let (_memo, client) = memo(10_000, pool(&[&good.1, &bad.1], options).await).await;
    let calls = share(&good.0, &bad.0, || calls(&client, 40, Duration::from_secs(6))).await;
    for (i, call) in calls.into_iter().enumerate() {
        assert_eq!(call.await.unwrap().unwrap(), label_of(1, &(i as u32).to_le_bytes()));
    }
    assert!(counter(&client, "classifier_retries").await > 5);
    assert_eq!(counter(&client, "classifier_ejections").await, 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_answer_after_the_hedge_is_accepted_from_either_replica() {
    for retry_burst in [1, 0] {
        let replicas = [replica(1).await, replica(1).await];
        replicas.iter().for_each(|(puppet, _)| puppet.set_mood(Mood::Hangs));
        let options =
            PoolOptions { timeout: ENDLESS, retry_burst, retry_percent: 0, ..Default::default() };
        let running = replicas.each_ref().map(|(_, running)| running);
        let (_memo, client) = memo(100, pool(&running, options).await).await;
        let asked = || replicas.iter().map(|(puppet, _)| puppet.asked()).sum::<usize>();
        let [call] = &mut calls(&client, 1, Duration::from_secs(6))[..] else { unreachable!() };
        until("it is asked", async || asked() == 1).await;
        let [(one, _), (two, _)] = &replicas;
        let first = if one.asked() == 1 { one } else { two };
        until("half of its time is over", async || {
            let denied = counter(&client, "classifier_retries_denied").await == 1;
            if retry_burst == 0 { denied } else { asked() == 2 }
        })
        .await;
        first.release();
        assert_eq!(call.await.unwrap().unwrap(), label_of(1, &[0; 4]));
        assert_eq!(asked(), 1 + retry_burst as usize);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn another_model_never_ejects_the_only_replica() {
    let [one, other] = [replica(1).await, replica(2).await];
    let upstream = pool(&[&one.1, &other.1], PoolOptions::default()).await;
    let (_memo, client) = memo(100, upstream).await;
    one.0.set_mood(Mood::Fails(Status::Internal));
    for i in 0..20_u32 {
        client.classify_with(&i.to_le_bytes(), once()).await.unwrap_err();
    }
    assert_eq!((one.0.asked(), other.0.asked()), (20, 0));
    assert_eq!(counter(&client, "classifier_ejections").await, 0);
    one.0.set_mood(Mood::Answers);
    assert_eq!(client.classify(&[7; 4]).await.unwrap().label, label_of(1, &[7; 4]));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn callers_without_patience_have_no_replica_ejected() {
    let (one, two) = (replica(1).await, replica(1).await);
    let options = PoolOptions { timeout: Duration::from_secs(60), ..Default::default() };
    let (_memo, client) = memo(10_000, pool(&[&one.1, &two.1], options).await).await;
    for (puppet, _) in [&one, &two] {
        puppet.set_mood(Mood::Hangs);
    }
    let ask = |i: u32| {
        let client = client.clone();
        // Long enough for a round trip, and far shorter than the silence limit.
        let options = CallOptions::new().no_retry().timeout(Duration::from_secs(1));
        tokio::spawn(async move { client.classify_with(&i.to_le_bytes(), options).await })
    };
    for call in (0..100).map(ask).collect::<Vec<_>>() {
        assert_eq!(call.await.unwrap().unwrap_err().status(), Status::DeadlineExceeded);
    }
    until("the memo has given them up", async || {
        let stats = client.admin().stats().await.unwrap();
        stats.counter_value("expired") + stats.counter_value("classifier_calls_dropped") > 0
            && gauge(&client, "waiting").await == 0
    })
    .await;
    assert!(one.0.asked() > 5 && two.0.asked() > 5, "both have failed often enough");
    assert_eq!(counter(&client, "classifier_ejections").await, 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn refusals_of_a_draining_replica_move_without_budget() {
    let (good, bad) = (replica(1).await, replica(1).await);
    bad.0.set_mood(Mood::Fails(Status::ShuttingDown));
    let options = PoolOptions { retry_burst: 0, retry_percent: 0, ..Default::default() };
    let (_memo, client) = memo(10_000, pool(&[&good.1, &bad.1], options).await).await;
    for i in 0..100_u32 {
        client.classify_with(&i.to_le_bytes(), once()).await.unwrap();
    }
    assert!(bad.0.asked() > 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_replica_that_fails_costs_no_answer_and_soon_no_call() {
    let (good, bad) = (replica(1).await, replica(1).await);
    bad.0.set_mood(Mood::Fails(Status::Internal));
    let upstream = pool(&[&good.1, &bad.1], PoolOptions::default()).await;
    let (_memo, client) = memo(10_000, upstream).await;
    let load = Load::start(&client, 8, 250);
    load.more(1000).await;
    let calls = load.stop().await;
    assert_right(&calls, &[1]);
    let asked = bad.0.asked();
    assert!(asked < calls.len() / 5, "it was asked {asked} times in {} calls", calls.len());
    assert!(counter(&client, "classifier_ejections").await >= 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_retry_budget_caps_what_a_fleet_in_trouble_is_asked() {
    const REQUESTS: u32 = 1500;
    let replicas = [replica(1).await, replica(1).await, replica(1).await];
    for (puppet, _) in &replicas {
        puppet.set_mood(Mood::Fails(Status::Overloaded));
    }
    let options = PoolOptions { retry_burst: 20, retry_percent: 10, ..Default::default() };
    let upstream = pool(&replicas.each_ref().map(|(_, running)| running), options).await;
    let (_memo, client) = memo(10_000, upstream).await;
    for i in 0..REQUESTS {
        let error = client.classify(&i.to_le_bytes()).await.unwrap_err();
        assert_eq!(error.status(), Status::Overloaded);
    }
    let asked: usize = replicas.iter().map(|(puppet, _)| puppet.asked()).sum();
    let (requests, most) = (REQUESTS as usize, REQUESTS as usize * 11 / 10 + 20);
    assert!(asked > requests && asked <= most, "{asked} calls for {requests} requests");
    assert!(counter(&client, "classifier_retries_denied").await > 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn replicas_share_the_work() {
    let replicas = [replica(1).await, replica(1).await, replica(1).await];
    let upstream =
        pool(&replicas.each_ref().map(|(_, running)| running), PoolOptions::default()).await;
    let (_memo, client) = memo(10_000, upstream).await;
    let load = Load::start(&client, 16, 250);
    load.more(1500).await;
    assert_right(&load.stop().await, &[1]);
    let asked = replicas.each_ref().map(|(puppet, _)| puppet.asked());
    assert!(asked.iter().all(|&asked| asked > 200), "{asked:?}");
    assert_eq!(gauge(&client, "classifiers_connected").await, 3);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_name_is_looked_up_again_and_its_addresses_come_and_go() {
    let [a, b, c] = [replica(1).await, replica(1).await, replica(1).await];
    let addr = |running: &Running| running.addr.parse::<SocketAddr>().unwrap();
    let found = Arc::new(Mutex::new(Some(vec![addr(&a.1)])));
    let lookups = Arc::new(AtomicUsize::new(0));
    let resolve = {
        let (found, lookups) = (Arc::clone(&found), Arc::clone(&lookups));
        move |place: String| -> std::pin::Pin<Box<dyn Future<Output = _> + Send>> {
            assert_eq!(place, "classifiers.example:7402");
            lookups.fetch_add(1, SeqCst);
            let found = found.lock().unwrap().clone();
            Box::pin(async { found.ok_or_else(|| std::io::Error::other("no such name")) })
        }
    };
    let places = vec![Target("classifiers.example:7402".into()), Target(c.1.addr.clone())];
    let upstream = Pool::at(
        places,
        PoolOptions::default(),
        Duration::from_millis(20),
        Box::new(|address, _| Client::connect_lazy(address, fail_fast())),
        Box::new(resolve),
    );
    let (_memo, client) = memo(10_000, upstream).await;
    until("both are there", async || gauge(&client, "classifiers_connected").await == 2).await;
    let load = Load::start(&client, 8, 250);
    until("both are asked", async || a.0.asked() > 0 && c.0.asked() > 0).await;

    *found.lock().unwrap() = Some(vec![addr(&b.1)]);
    until("the new one is asked", async || b.0.asked() > 0).await;
    until("the old one is gone", async || gauge(&client, "classifiers").await == 2).await;
    // A name that fails to resolve changes nothing.
    *found.lock().unwrap() = None;
    let before = lookups.load(SeqCst);
    until("it was looked up in vain", async || lookups.load(SeqCst) > before + 2).await;
    assert_eq!(gauge(&client, "classifiers").await, 2);
    load.more(100).await;
    assert_right(&load.stop().await, &[1]);
}

#[tokio::test]
async fn an_unknown_name_is_reported_to_the_client() {
    let upstream = Pool::at(
        vec![Target("nowhere.invalid:1".into())],
        PoolOptions::default(),
        Duration::from_secs(100),
        Box::new(|address, _| Client::connect_lazy(address, ClientOptions::new())),
        Box::new(|_| Box::pin(async { Err(std::io::Error::other("no such name\x1b[2J\nforged")) })),
    );
    let (_memo, client) = memo(100, upstream).await;
    until("it is told", async || {
        let error = client.classify(&[1; 4]).await.unwrap_err();
        let CallError::Server { text, .. } = error else { panic!("{error}") };
        // The name is for operators.
        text.contains("the name lookup failed") && !text.contains("nowhere.invalid")
    })
    .await;
}
