//! Several classifiers behind one memo, over real sockets: balance, failures, draining, retries, and models that
//! disagree.

#![allow(clippy::unwrap_used)]

mod common;

use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use afterimage_memo::upstream::{Place, Remote, RemoteOptions};
use afterimage_wire::client::CallOptions;
use afterimage_wire::{CallError, Client, ClientOptions, Status};
use tokio::task::JoinHandle;

use common::{
    Mood, Puppet, Running, Serving, counter, fail_fast, gauge, label_of, memo, replica, until,
};

/// A remote of these replicas, once all are connected.
async fn remote(replicas: &[&Running], options: RemoteOptions) -> Arc<Remote> {
    let mut clients = Vec::new();
    for replica in replicas {
        clients.push(Client::connect(replica.addr.as_str(), fail_fast()).await.unwrap());
    }
    Remote::of_clients(clients, options)
}

/// One answer under load.
struct Call {
    image: [u8; 4],
    began: Instant,
    ended: Instant,
    answer: Result<u16, CallError>,
}

/// Callers that ask, each about one image after another, until they are told to stop.
struct Load {
    stop: Arc<AtomicBool>,
    calls: Arc<Mutex<Vec<Call>>>,
    callers: Vec<JoinHandle<()>>,
}

impl Load {
    /// `images` distinct ones, of at most 250.
    fn start(client: &Client, callers: u8, images: u8) -> Load {
        let (stop, calls) = (Arc::new(AtomicBool::new(false)), Arc::new(Mutex::new(Vec::new())));
        let caller = |caller: u8| {
            let (client, stop, calls) = (client.clone(), Arc::clone(&stop), Arc::clone(&calls));
            tokio::spawn(async move {
                for round in 0_u32.. {
                    if stop.load(SeqCst) {
                        return;
                    }
                    let of =
                        (round.wrapping_mul(7).wrapping_add(u32::from(caller))) % u32::from(images);
                    let [low, high, ..] = if images == 250 { round.to_le_bytes() } else { [0; 4] };
                    let image = [of as u8, low, high, if images == 250 { caller } else { 0 }];
                    let began = Instant::now();
                    let answer = client.classify(&image).await.map(|label| label.class);
                    let call = Call { image, began, ended: Instant::now(), answer };
                    calls.lock().unwrap().push(call);
                }
            })
        };
        let callers = (0..callers).map(caller).collect();
        Load { stop, calls, callers }
    }

    fn count(&self) -> usize {
        self.calls.lock().unwrap().len()
    }

    async fn more(&self, calls: usize) {
        let wanted = self.count() + calls;
        until("more calls", async || self.count() >= wanted).await;
    }

    async fn stop(self) -> Vec<Call> {
        self.stop.store(true, SeqCst);
        for caller in self.callers {
            caller.await.unwrap();
        }
        std::mem::take(&mut *self.calls.lock().unwrap())
    }
}

/// All answered, and each by one of these models.
fn assert_right(calls: &[Call], digests: &[u8]) {
    for Call { image, answer, .. } in calls {
        let class = answer.as_ref().unwrap_or_else(|error| panic!("{image:?}: {error}"));
        let right = digests.iter().any(|&digest| label_of(digest, image) == *class);
        assert!(right, "{class} for {image:?}");
    }
}

/// No answer of `old` to a call that began after one of `new` had come.
fn assert_no_way_back(calls: &[Call], old: u8, new: u8) {
    let is_of =
        |call: &Call, digest| *call.answer.as_ref().unwrap() == label_of(digest, &call.image);
    let first = calls.iter().filter(|call| is_of(call, new)).map(|call| call.ended).min();
    for call in calls.iter().filter(|call| is_of(call, old)) {
        assert!(first.is_none_or(|first| call.began < first), "the old model answers again");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn replicas_share_the_work() {
    let replicas = [replica(1).await, replica(1).await, replica(1).await];
    let upstream =
        remote(&replicas.each_ref().map(|(_, running)| running), RemoteOptions::default()).await;
    let (_memo, client) = memo(10_000, upstream).await;
    let load = Load::start(&client, 16, 250);
    load.more(1500).await;
    assert_right(&load.stop().await, &[1]);
    let asked = replicas.each_ref().map(|(puppet, _)| puppet.asked());
    assert!(asked.iter().all(|&asked| asked > 200), "{asked:?}");
    assert_eq!(gauge(&client, "classifiers_connected").await, 3);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_replica_that_is_killed_or_drains_loses_no_request() {
    let stays = replica(1).await;
    let [killed, drained] = [replica(1).await, replica(1).await];
    let all = [&stays.1, &killed.1, &drained.1];
    let (_memo, client) = memo(10_000, remote(&all, RemoteOptions::default()).await).await;
    let load = Load::start(&client, 16, 250);
    load.more(300).await;
    killed.1.kill().await;
    load.more(300).await;
    let addr = drained.1.addr.clone();
    drained.1.drain().await;
    load.more(300).await;
    // One comes back where one went, and gets work again.
    let back = Puppet::new(1);
    let _running = Running::start(Serving(Arc::clone(&back)), &addr).await;
    until("who came back is asked", async || back.asked() > 0).await;
    let calls = load.stop().await;
    assert_right(&calls, &[1]);
    assert_eq!(counter(&client, "classifier_failures").await, 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_hung_replica_holds_is_asked_elsewhere_and_it_is_ejected_and_comes_back() {
    let (good, bad) = (replica(1).await, replica(1).await);
    let options = RemoteOptions { timeout: Duration::from_millis(400), ..Default::default() };
    let (_memo, client) = memo(10_000, remote(&[&good.1, &bad.1], options).await).await;
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
async fn a_replica_that_hangs_is_ejected_long_before_requests_time_out_and_its_end_frees_what_it_holds()
 {
    let (good, bad) = (replica(1).await, replica(1).await);
    let options = RemoteOptions { timeout: Duration::from_secs(8), ..Default::default() };
    let (_memo, client) = memo(10_000, remote(&[&good.1, &bad.1], options).await).await;
    bad.0.set_mood(Mood::Hangs);
    let began = Instant::now();
    let ask = |i: u32| {
        let client = client.clone();
        tokio::spawn(async move { client.classify_with(&i.to_le_bytes(), once()).await })
    };
    let calls: Vec<_> = (0..40).map(ask).collect();
    until("some are stuck", async || bad.0.asked() > 5).await;
    // Whether it has been silent for too long is looked at with every miss.
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

/// Calls with this much time, each about an image of its own, that their client does not send again.
fn calls(client: &Client, calls: u32, time: Duration) -> Vec<JoinHandle<Result<u16, CallError>>> {
    let ask = |i: u32| {
        let (client, options) = (client.clone(), CallOptions::new().no_retry().timeout(time));
        let answer = async move { client.classify_with(&i.to_le_bytes(), options).await };
        tokio::spawn(async move { answer.await.map(|label| label.class) })
    };
    (0..calls).map(ask).collect()
}

/// So long that nobody is ejected for being silent, and no attempt ends by itself.
const ENDLESS: Duration = Duration::from_secs(600);

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_hung_replica_does_not_take_all_the_time_of_a_request_while_another_can_answer() {
    let (good, bad) = (replica(1).await, replica(1).await);
    bad.0.set_mood(Mood::Hangs);
    let options = RemoteOptions { timeout: ENDLESS, ..Default::default() };
    let (_memo, client) = memo(10_000, remote(&[&good.1, &bad.1], options).await).await;
    for (i, call) in calls(&client, 40, Duration::from_secs(4)).into_iter().enumerate() {
        assert_eq!(call.await.unwrap().unwrap(), label_of(1, &(i as u32).to_le_bytes()));
    }
    assert!(bad.0.asked() > 5, "it was asked {} times", bad.0.asked());
    assert_eq!(counter(&client, "classifier_retries").await, bad.0.asked() as u64);
    assert_eq!(counter(&client, "classifier_ejections").await, 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_answers_in_the_second_half_of_a_requests_time_is_believed_whether_or_not_another_was_asked()
 {
    for retry_burst in [1, 0] {
        let replicas = [replica(1).await, replica(1).await];
        replicas.iter().for_each(|(puppet, _)| puppet.set_mood(Mood::Hangs));
        let options =
            RemoteOptions { timeout: ENDLESS, retry_burst, retry_percent: 0, ..Default::default() };
        let running = replicas.each_ref().map(|(_, running)| running);
        let (_memo, client) = memo(100, remote(&running, options).await).await;
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
async fn a_replica_of_another_model_is_no_reason_to_eject_the_only_one_of_the_asked_model() {
    let [one, other] = [replica(1).await, replica(2).await];
    let upstream = remote(&[&one.1, &other.1], RemoteOptions::default()).await;
    let (_memo, client) = memo(100, upstream).await;
    one.0.set_mood(Mood::Fails(Status::Internal));
    for i in 0..20_u32 {
        client.classify_with(&i.to_le_bytes(), once()).await.unwrap_err();
    }
    assert_eq!((one.0.asked(), other.0.asked()), (20, 0));
    assert_eq!(counter(&client, "classifier_ejections").await, 0);
    one.0.set_mood(Mood::Answers);
    assert_eq!(client.classify(&[7; 4]).await.unwrap().class, label_of(1, &[7; 4]));
}

/// A call that its own client does not send again.
fn once() -> CallOptions {
    CallOptions::new().no_retry().timeout(Duration::from_secs(30))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn callers_without_patience_have_no_replica_ejected() {
    let (one, two) = (replica(1).await, replica(1).await);
    let options = RemoteOptions { timeout: Duration::from_secs(60), ..Default::default() };
    let (_memo, client) = memo(10_000, remote(&[&one.1, &two.1], options).await).await;
    for (puppet, _) in [&one, &two] {
        puppet.set_mood(Mood::Hangs);
    }
    let ask = |i: u32| {
        let client = client.clone();
        // Enough to get there, and far less than a replica may owe an answer for.
        let options = CallOptions::new().no_retry().timeout(Duration::from_secs(1));
        tokio::spawn(async move { client.classify_with(&i.to_le_bytes(), options).await })
    };
    for call in (0..100).map(ask).collect::<Vec<_>>() {
        assert_eq!(call.await.unwrap().unwrap_err().status(), Status::DeadlineExceeded);
    }
    until("the memo has given them up", async || {
        let stats = client.stats().await.unwrap();
        stats.counter_value("expired") + stats.counter_value("classifier_calls_dropped") > 0
            && gauge(&client, "waiting").await == 0
    })
    .await;
    assert!(one.0.asked() > 5 && two.0.asked() > 5, "both have failed often enough");
    assert_eq!(counter(&client, "classifier_ejections").await, 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_draining_replica_turns_away_is_asked_elsewhere_whatever_the_budget() {
    let (good, bad) = (replica(1).await, replica(1).await);
    bad.0.set_mood(Mood::Fails(Status::ShuttingDown));
    let options = RemoteOptions { retry_burst: 0, retry_percent: 0, ..Default::default() };
    let (_memo, client) = memo(10_000, remote(&[&good.1, &bad.1], options).await).await;
    for i in 0..100_u32 {
        client.classify_with(&i.to_le_bytes(), once()).await.unwrap();
    }
    assert!(bad.0.asked() > 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_replica_that_fails_costs_no_answer_and_soon_no_call() {
    let (good, bad) = (replica(1).await, replica(1).await);
    bad.0.set_mood(Mood::Fails(Status::Internal));
    let upstream = remote(&[&good.1, &bad.1], RemoteOptions::default()).await;
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
    let options = RemoteOptions { retry_burst: 20, retry_percent: 10, ..Default::default() };
    let upstream = remote(&replicas.each_ref().map(|(_, running)| running), options).await;
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
async fn a_rollout_under_load_gives_no_wrong_label_and_goes_one_way() {
    let replicas = [replica(1).await, replica(1).await, replica(1).await];
    let upstream =
        remote(&replicas.each_ref().map(|(_, running)| running), RemoteOptions::default()).await;
    let (inner, client) = memo(10_000, upstream).await;
    // A second memo before the first: what it remembers must be as right.
    let (_outer, outer) = memo(10_000, remote(&[&inner], RemoteOptions::default()).await).await;
    // Few images, so that most answers are remembered ones.
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
async fn while_two_models_live_the_memo_stands_for_the_one_that_most_replicas_have() {
    let [a, b, c] = [replica(1).await, replica(1).await, replica(2).await];
    let upstream = remote(&[&a.1, &b.1, &c.1], RemoteOptions::default()).await;
    let (_memo, client) = memo(10_000, upstream).await;
    let digest = || client.welcome().map(|welcome| welcome.digest[0]);
    let ask = async |expected: u8| {
        for i in 0..40 {
            let class = client.classify(&[i; 4]).await.unwrap().class;
            assert_eq!(class, label_of(expected, &[i; 4]));
        }
    };
    ask(1).await;
    assert_eq!((digest(), c.0.asked()), (Some(1), 0));
    // Two to one for the other model; nobody asks anything, and the client hears of it.
    b.0.becomes(2);
    until("the client is told", async || digest() == Some(2)).await;
    let asked = a.0.asked();
    ask(2).await;
    assert_eq!(a.0.asked(), asked);
    // One to one: it stays. Then the last one goes, and what is left is what is stood for.
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
    // The same digest and another input: another model.
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
    let upstream = remote(&[&odd_running, &a.1, &b.1], RemoteOptions::default()).await;
    let (_memo, client) = memo(10_000, upstream).await;
    for i in 0..40 {
        assert_eq!(client.classify(&[i; 4]).await.unwrap().class, label_of(1, &[i; 4]));
    }
    assert_eq!(client.welcome().unwrap().shape.dims(), [4]);
    assert_eq!(odd.asked(), 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_idle_client_of_a_memo_before_a_memo_hears_of_another_model() {
    let (puppet, running) = replica(1).await;
    let (inner, _) = memo(10_000, remote(&[&running], RemoteOptions::default()).await).await;
    let (_outer, client) = memo(10_000, remote(&[&inner], RemoteOptions::default()).await).await;
    client.classify(&[1; 4]).await.unwrap();
    let mut changes = client.changes();
    puppet.becomes(2);
    // Nobody asks anything meanwhile.
    let told = async {
        while client.welcome().is_none_or(|welcome| welcome.digest[0] != 2) {
            assert!(changes.next().await);
        }
    };
    tokio::time::timeout(common::PATIENCE, told).await.unwrap();
    assert_eq!(client.classify(&[1; 4]).await.unwrap().class, label_of(2, &[1; 4]));
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
    let places = vec![Place("classifiers.example:7402".into()), Place(c.1.addr.clone())];
    let upstream = Remote::at(
        places,
        RemoteOptions::default(),
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
    // A name that cannot be looked up any more changes nothing.
    *found.lock().unwrap() = None;
    let before = lookups.load(SeqCst);
    until("it was looked up in vain", async || lookups.load(SeqCst) > before + 2).await;
    assert_eq!(gauge(&client, "classifiers").await, 2);
    load.more(100).await;
    assert_right(&load.stop().await, &[1]);
}

#[tokio::test]
async fn a_name_that_does_not_exist_is_told_to_who_asks() {
    let upstream = Remote::at(
        vec![Place("nowhere.invalid:1".into())],
        RemoteOptions::default(),
        Duration::from_secs(100),
        Box::new(|address, _| Client::connect_lazy(address, ClientOptions::new())),
        Box::new(|_| Box::pin(async { Err(std::io::Error::other("no such name")) })),
    );
    let (_memo, client) = memo(100, upstream).await;
    until("it is told", async || {
        let error = client.classify(&[1; 4]).await.unwrap_err();
        error.to_string().contains("cannot look up nowhere.invalid:1: no such name")
    })
    .await;
}
