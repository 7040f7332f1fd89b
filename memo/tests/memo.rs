//! The memo's promises, over real sockets, with a classifier that does as the test says.

#![allow(clippy::unwrap_used)]

use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use afterimage_cache::{CacheService, Capacity, Table};
use afterimage_memo::key::{KeySpace, ModelId};
use afterimage_memo::store::{Backend, Callback, RemoteOptions, RemoteStore};
use afterimage_memo::upstream::{Answer, Failure, Job, Remote};
use afterimage_memo::{Classifier, MemoOptions, MemoService, Secret, Store};
use afterimage_wire::client::CallOptions;
use afterimage_wire::proto::message::{Label, Origin};
use afterimage_wire::proto::{Service as Kind, Shape, stats::Stats};
use afterimage_wire::server::{Batch, Identity, Op, Server, ServerOptions, Service};
use afterimage_wire::{CallError, Client, ClientOptions, Status};
use tokio::task::JoinHandle;

const PATIENCE: Duration = Duration::from_secs(30);

fn secret() -> Secret {
    Secret::new([7; 32])
}

fn model_id(digest: u8) -> ModelId {
    ModelId { digest: [digest; 32], shape: Shape::new(&[4]).unwrap(), classes: 100 }
}

/// Answers with the image's first byte plus `shift`; holds its jobs while told to.
#[derive(Clone)]
struct Puppet(Arc<Strings>);

struct Strings {
    model: Mutex<Option<Arc<ModelId>>>,
    shift: AtomicU64,
    calls: AtomicUsize,
    holding: Mutex<Option<Vec<Job>>>,
    failing: Mutex<Option<Failure>>,
}

impl Puppet {
    fn new() -> Self {
        Puppet(Arc::new(Strings {
            model: Mutex::new(Some(Arc::new(model_id(1)))),
            shift: AtomicU64::new(0),
            calls: AtomicUsize::new(0),
            holding: Mutex::new(None),
            failing: Mutex::new(None),
        }))
    }

    fn calls(&self) -> usize {
        self.0.calls.load(Ordering::Relaxed)
    }

    fn hold(&self) {
        *self.0.holding.lock().unwrap() = Some(Vec::new());
    }

    /// Answers what is held, and holds no more.
    fn release(&self) {
        let jobs = self.0.holding.lock().unwrap().take().unwrap_or_default();
        self.answer(jobs);
    }

    fn fail_with(&self, status: Option<Status>) {
        let failure = status.map(|status| Failure { status, text: "as planned".into() });
        *self.0.failing.lock().unwrap() = failure;
    }

    fn answer(&self, jobs: Vec<Job>) {
        for Job { image, reply } in jobs {
            if let Some(failure) = self.0.failing.lock().unwrap().clone() {
                reply.send(Err(failure));
                continue;
            }
            let label = u16::from(image[0]) + self.0.shift.load(Ordering::Relaxed) as u16;
            reply.send(Ok(Answer { label, model: self.model().unwrap() }));
        }
    }
}

impl Classifier for Puppet {
    fn model(&self) -> Option<Arc<ModelId>> {
        self.0.model.lock().unwrap().clone()
    }

    fn classify(&self, jobs: Vec<Job>) {
        self.0.calls.fetch_add(jobs.len(), Ordering::Relaxed);
        if let Some(held) = &mut *self.0.holding.lock().unwrap() {
            held.extend(jobs);
            return;
        }
        self.answer(jobs);
    }

    fn stats(&self, _: &mut Stats) {}
}

struct Running {
    addr: String,
    task: JoinHandle<()>,
}

async fn serve(service: impl Service, addr: &str) -> Running {
    let server = Server::bind(addr, Arc::new(service), ServerOptions::default()).await.unwrap();
    let addr = server.local_addr().unwrap().to_string();
    Running { addr, task: tokio::spawn(server.serve(std::future::pending())) }
}

fn table() -> Arc<Table> {
    Arc::new(Table::new(Capacity::Entries(10_000)).unwrap())
}

/// A memo in front of `puppet`, with its table in the same process.
async fn embedded(puppet: &Puppet, table: &Arc<Table>) -> Client {
    let store = Store::Embedded(Arc::clone(table), None);
    memo(store, puppet.clone(), MemoOptions::new(secret())).await
}

/// A memo in front of `puppet`, with its table behind a socket.
async fn remote(puppet: &Puppet, cache: &str) -> Client {
    memo(remote_store(cache), puppet.clone(), MemoOptions::new(secret())).await
}

fn remote_store(cache: &str) -> Store {
    let client = Client::connect_lazy(cache, fail_fast());
    // A busy machine is not what these tests are about.
    let lookup_budget = Duration::from_millis(300);
    Store::Remote(RemoteStore::new(client, RemoteOptions { lookup_budget, ..Default::default() }))
}

fn fail_fast() -> ClientOptions {
    ClientOptions::new()
        .fail_fast(true)
        .backoff(Duration::from_millis(1), Duration::from_millis(50))
}

async fn memo(store: Store, classifier: impl Classifier, options: MemoOptions) -> Client {
    let running = serve(MemoService::new(store, classifier, options), "127.0.0.1:0").await;
    Client::connect(running.addr.as_str(), ClientOptions::new()).await.unwrap()
}

fn label(class: u16, origin: Origin) -> Label {
    Label { class, origin }
}

fn status<T: std::fmt::Debug>(result: Result<T, CallError>) -> Status {
    result.unwrap_err().status()
}

async fn counter(client: &Client, name: &str) -> u64 {
    client.stats().await.unwrap().counter_value(name)
}

async fn until(what: &str, condition: impl AsyncFn() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !condition().await {
        assert!(Instant::now() < deadline, "timed out: {what}");
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
}

#[tokio::test]
async fn the_second_answer_is_remembered_with_a_table_here_and_there() {
    let table = table();
    let cache = serve(CacheService::new(Arc::clone(&table)), "127.0.0.1:0").await;
    let puppet = Puppet::new();
    for client in [embedded(&puppet, &table).await, remote(&puppet, &cache.addr).await] {
        table.clear();
        let before = puppet.calls();
        for (i, origin) in [Origin::Computed, Origin::Memoized, Origin::Memoized].iter().enumerate()
        {
            let answer = client.classify(&[5, 6, 7, 8]).await.unwrap();
            assert_eq!(answer, label(5, *origin), "request {i}");
        }
        assert_eq!(client.classify(&[6, 6, 7, 8]).await.unwrap(), label(6, Origin::Computed));
        assert_eq!(puppet.calls() - before, 2);
        assert_eq!(counter(&client, "hits").await, 2);
        assert_eq!(counter(&client, "misses").await, 2);
        assert_eq!(counter(&client, "store_writes").await, 2);
    }
}

#[tokio::test]
async fn memos_that_share_cache_and_secret_share_their_answers_and_others_do_not() {
    let cache = serve(CacheService::new(table()), "127.0.0.1:0").await;
    let puppet = Puppet::new();
    let (a, b) = (remote(&puppet, &cache.addr).await, remote(&puppet, &cache.addr).await);
    a.classify(&[1; 4]).await.unwrap();
    assert_eq!(b.classify(&[1; 4]).await.unwrap(), label(1, Origin::Memoized));
    let stranger = MemoOptions::new(Secret::new([8; 32]));
    let stranger = memo(remote_store(&cache.addr), puppet.clone(), stranger).await;
    assert_eq!(stranger.classify(&[1; 4]).await.unwrap(), label(1, Origin::Computed));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn identical_requests_in_flight_make_one_call_and_one_write() {
    let table = table();
    let cache = serve(CacheService::new(Arc::clone(&table)), "127.0.0.1:0").await;
    let puppet = Puppet::new();
    for client in [embedded(&puppet, &table).await, remote(&puppet, &cache.addr).await] {
        table.clear();
        let before = puppet.calls();
        puppet.hold();
        let calls: Vec<_> = (0..2000)
            .map(|_| {
                let client = client.clone();
                tokio::spawn(async move { client.classify(&[9; 4]).await.unwrap() })
            })
            .collect();
        until("all wait", async || {
            let stats = client.stats().await.unwrap();
            stats.get("waiting") == Some(&afterimage_wire::proto::stats::Value::Gauge(2000))
        })
        .await;
        puppet.release();
        let mut computed = 0;
        for call in calls {
            let Label { class, origin } = call.await.unwrap();
            assert_eq!(class, 9);
            computed += usize::from(origin == Origin::Computed);
        }
        assert_eq!((computed, puppet.calls() - before), (1, 1));
        assert_eq!(counter(&client, "store_writes").await, 1);
        assert_eq!(counter(&client, "coalesced").await, 1999);
    }
}

/// Handles a batch of one on this thread, without a network: what stands between a lookup and the
/// boarding of a flight is then some hundred instructions, and threads do meet there.
#[test]
fn requests_that_race_with_a_landing_never_make_a_second_call() {
    const ROUNDS: u32 = 60_000;
    const THREADS: usize = 3;
    let (puppet, table) =
        (Puppet::new(), Arc::new(Table::new(Capacity::Entries(1 << 20)).unwrap()));
    let store = Store::Embedded(table, None);
    let memo = Arc::new(MemoService::new(store, puppet.clone(), MemoOptions::new(secret())));
    let barrier = std::sync::Barrier::new(THREADS);
    std::thread::scope(|scope| {
        for _ in 0..THREADS {
            scope.spawn(|| {
                for round in 0..ROUNDS {
                    let mut image = round.to_le_bytes();
                    image.reverse();
                    barrier.wait();
                    afterimage_wire::server::handle_one(&*memo, Op::Classify { image: &image });
                }
            });
        }
    });
    assert_eq!(puppet.calls(), ROUNDS as usize);
}

#[tokio::test]
async fn the_call_outlives_the_caller_who_asked_first() {
    let puppet = Puppet::new();
    let client = embedded(&puppet, &table()).await;
    puppet.hold();
    let impatient = CallOptions::new().timeout(Duration::from_millis(300));
    let error = client.classify_with(&[3; 4], impatient).await.unwrap_err();
    assert_eq!(error.status(), Status::DeadlineExceeded);
    let second = tokio::spawn({
        let client = client.clone();
        async move { client.classify(&[3; 4]).await.unwrap() }
    });
    until("the second waits", async || counter(&client, "requests").await >= 2).await;
    puppet.release();
    // Whether he counts as the first now depends on when the first one's budget was noticed.
    let answer = second.await.unwrap();
    assert!(answer.class == 3 && answer.origin != Origin::Memoized, "{answer:?}");
    assert_eq!(client.classify(&[3; 4]).await.unwrap(), label(3, Origin::Memoized));
    assert_eq!(puppet.calls(), 1);
}

#[tokio::test]
async fn the_call_outlives_the_connection_that_asked_first_and_answers_the_others() {
    let puppet = Puppet::new();
    let store = Store::Embedded(table(), None);
    let service = MemoService::new(store, puppet.clone(), MemoOptions::new(secret()));
    let running = serve(service, "127.0.0.1:0").await;
    let client =
        async || Client::connect(running.addr.as_str(), ClientOptions::new()).await.unwrap();
    let (first, second) = (client().await, client().await);
    puppet.hold();
    let ask = |client: &Client| {
        let client = client.clone();
        tokio::spawn(async move { client.classify(&[3; 4]).await })
    };
    let doomed = ask(&first);
    until("the call is made", async || puppet.calls() == 1).await;
    let waiting = [ask(&second), ask(&second)];
    until("the others wait", async || counter(&second, "requests").await >= 3).await;
    doomed.abort();
    assert!(doomed.await.unwrap_err().is_cancelled());
    first.close().await;
    puppet.release();
    for call in waiting {
        assert_eq!(call.await.unwrap().unwrap(), label(3, Origin::Coalesced));
    }
    assert_eq!(second.classify(&[3; 4]).await.unwrap(), label(3, Origin::Memoized));
    assert_eq!((puppet.calls(), counter(&second, "store_writes").await), (1, 1));
}

#[tokio::test]
async fn a_failure_reaches_all_who_wait_and_is_not_remembered() {
    let table = table();
    let cache = serve(CacheService::new(Arc::clone(&table)), "127.0.0.1:0").await;
    let puppet = Puppet::new();
    for client in [embedded(&puppet, &table).await, remote(&puppet, &cache.addr).await] {
        table.clear();
        let before = puppet.calls();
        puppet.hold();
        puppet.fail_with(Some(Status::UpstreamError));
        let calls: Vec<_> = (0..10)
            .map(|_| {
                let client = client.clone();
                tokio::spawn(async move { client.classify(&[4; 4]).await })
            })
            .collect();
        until("all wait", async || counter(&client, "requests").await >= 10).await;
        until("the call is made", async || puppet.calls() - before == 1).await;
        puppet.release();
        for call in calls {
            assert_eq!(status(call.await.unwrap()), Status::UpstreamError);
        }
        assert_eq!((table.len(), counter(&client, "store_writes").await), (0, 0));
        puppet.fail_with(None);
        assert_eq!(client.classify(&[4; 4]).await.unwrap(), label(4, Origin::Computed));
        assert_eq!(client.classify(&[4; 4]).await.unwrap(), label(4, Origin::Memoized));
        assert_eq!(puppet.calls() - before, 2);
    }
}

#[tokio::test]
async fn a_job_that_the_classifier_drops_is_an_error_and_not_a_hang() {
    let puppet = Puppet::new();
    let client = embedded(&puppet, &table()).await;
    puppet.hold();
    let call = tokio::spawn({
        let client = client.clone();
        async move { client.classify(&[4; 4]).await }
    });
    until("it is held", async || puppet.calls() == 1).await;
    drop(puppet.0.holding.lock().unwrap().take());
    let error = call.await.unwrap().unwrap_err().to_string();
    assert!(error.contains("gave the request up without an answer"), "{error}");
}

#[tokio::test]
async fn a_label_that_the_model_cannot_give_is_corrupt_and_not_remembered() {
    let puppet = Puppet::new();
    let client = embedded(&puppet, &table()).await;
    puppet.0.shift.store(100, Ordering::Relaxed);
    let error = client.classify(&[0; 4]).await.unwrap_err();
    assert_eq!(error.status(), Status::UpstreamCorrupt);
    assert!(error.to_string().contains("label 100; its model has 100 classes"), "{error}");
    puppet.0.shift.store(0, Ordering::Relaxed);
    assert_eq!(client.classify(&[0; 4]).await.unwrap(), label(0, Origin::Computed));
}

#[tokio::test]
async fn an_image_of_the_wrong_size_is_told_both_sizes_and_its_batch_goes_on() {
    let puppet = Puppet::new();
    let service =
        MemoService::new(Store::Embedded(table(), None), puppet, MemoOptions::new(secret()));
    let running = serve(service, "127.0.0.1:0").await;
    // A raw client, since ours would not even send it.
    let stream = tokio::net::TcpStream::connect(&running.addr).await.unwrap();
    use afterimage_wire::proto::{Message, codec::FrameCodec, handshake::Hello};
    use futures_util::{SinkExt, StreamExt};
    let mut raw = tokio_util::codec::Framed::new(stream, FrameCodec::default());
    raw.feed((0, Message::Hello(Hello::new(b"")))).await.unwrap();
    for (id, image) in [(1, &[1, 2, 3][..]), (2, &[2; 4]), (3, &[])] {
        raw.feed((id, Message::ClassifyReq { image, budget_ms: 0 })).await.unwrap();
    }
    raw.flush().await.unwrap();
    let mut texts = Vec::new();
    for _ in 0..4 {
        let frame = raw.next().await.unwrap().unwrap();
        if let Message::Error { status, text, .. } = frame.message().unwrap() {
            texts.push((frame.header.id, status, text.to_owned()));
        }
    }
    texts.sort_by_key(|(id, ..)| *id);
    let text = |len| format!("the image is {len} bytes; the model takes 4, which is 4 bytes");
    assert_eq!(texts, [(1, Status::BadArgument, text(3)), (3, Status::BadArgument, text(0))]);
}

#[tokio::test]
async fn past_the_cap_misses_are_overloaded_at_once_and_hits_go_on() {
    let puppet = Puppet::new();
    let options = MemoOptions { max_waiting: 3, ..MemoOptions::new(secret()) };
    let client = memo(Store::Embedded(table(), None), puppet.clone(), options).await;
    client.classify(&[50; 4]).await.unwrap();
    puppet.hold();
    let waiting: Vec<_> = (0..3)
        .map(|i| {
            let client = client.clone();
            tokio::spawn(async move { client.classify(&[i; 4]).await.unwrap() })
        })
        .collect();
    until("three are held", async || puppet.calls() == 4).await;
    let start = Instant::now();
    assert_eq!(status(client.classify(&[9; 4]).await), Status::Overloaded);
    assert!(start.elapsed() < Duration::from_secs(2));
    assert_eq!(client.classify(&[50; 4]).await.unwrap(), label(50, Origin::Memoized));
    puppet.release();
    for (i, call) in waiting.into_iter().enumerate() {
        assert_eq!(call.await.unwrap(), label(i as u16, Origin::Computed));
    }
    assert_eq!(client.classify(&[9; 4]).await.unwrap(), label(9, Origin::Computed));
}

#[tokio::test]
async fn whatever_others_write_into_the_table_the_label_is_right() {
    let (table, puppet) = (table(), Puppet::new());
    let client = embedded(&puppet, &table).await;
    let keys = KeySpace::new(&secret(), model_id(1)).unwrap();
    let (image, other) = ([5; 4], [6; 4]);
    let key = keys.hash(&image).cache_key();
    client.classify(&image).await.unwrap();
    client.classify(&other).await.unwrap();
    let own = table.get(key).unwrap();
    let foreign = table.get(keys.hash(&other).cache_key()).unwrap();
    let other_model = KeySpace::new(&secret(), model_id(2)).unwrap();
    let of_other_model = other_model.seal(other_model.hash(&image), 8).cast_unsigned();
    let planted =
        (0..64).map(|bit| own ^ (1 << bit)).chain([0, 5, u64::MAX, foreign, of_other_model]);
    for value in planted {
        table.insert(key, value);
        let rejected = counter(&client, "rejected_tags").await;
        // A miss, counted, and the entry is put right.
        assert_eq!(
            client.classify(&image).await.unwrap(),
            label(5, Origin::Computed),
            "{value:#x}"
        );
        assert_eq!(counter(&client, "rejected_tags").await, rejected + 1);
        assert_eq!(table.get(key), Some(own));
        assert_eq!(client.classify(&image).await.unwrap(), label(5, Origin::Memoized));
    }
}

#[tokio::test]
async fn a_new_model_is_never_answered_for_with_the_old_ones_labels() {
    let puppet = Puppet::new();
    let client = embedded(&puppet, &table()).await;
    client.classify(&[5; 4]).await.unwrap();
    let first = client.welcome().unwrap();

    *puppet.0.model.lock().unwrap() = Some(Arc::new(model_id(2)));
    puppet.0.shift.store(10, Ordering::Relaxed);
    assert_eq!(client.classify(&[5; 4]).await.unwrap(), label(15, Origin::Computed));
    assert_eq!(client.classify(&[5; 4]).await.unwrap(), label(15, Origin::Memoized));
    until("the client learns of the new model", async || {
        let _ = client.classify(&[5; 4]).await;
        client.welcome().is_some_and(|welcome| welcome.digest == [2; 32])
    })
    .await;
    assert_eq!(first.digest, [1; 32]);

    // Back again: what the first model said is still there, and still its own.
    *puppet.0.model.lock().unwrap() = Some(Arc::new(model_id(1)));
    puppet.0.shift.store(0, Ordering::Relaxed);
    assert_eq!(client.classify(&[5; 4]).await.unwrap(), label(5, Origin::Memoized));
}

#[tokio::test]
async fn an_answer_of_another_model_than_the_asked_one_is_neither_given_nor_remembered() {
    let puppet = Puppet::new();
    let client = embedded(&puppet, &table()).await;
    puppet.hold();
    let call = tokio::spawn({
        let client = client.clone();
        let once = CallOptions::new().no_retry();
        async move { client.classify_with(&[5; 4], once).await }
    });
    until("it is held", async || puppet.calls() == 1).await;
    *puppet.0.model.lock().unwrap() = Some(Arc::new(model_id(2)));
    puppet.0.shift.store(10, Ordering::Relaxed);
    puppet.release();
    // Its client was told of the first model; asking again, he hears of the second one.
    let error = call.await.unwrap().unwrap_err();
    assert!(matches!(error, CallError::Server { status: Status::ShuttingDown, .. }), "{error}");
    assert_eq!(client.classify(&[5; 4]).await.unwrap(), label(15, Origin::Computed));
    *puppet.0.model.lock().unwrap() = Some(Arc::new(model_id(1)));
    puppet.0.shift.store(0, Ordering::Relaxed);
    assert_eq!(client.classify(&[5; 4]).await.unwrap(), label(5, Origin::Computed));
}

#[tokio::test]
async fn a_memo_behind_a_memo_files_no_answer_under_the_wrong_model() {
    let puppet = Puppet::new();
    let inner = MemoService::new(
        Store::Embedded(table(), None),
        puppet.clone(),
        MemoOptions::new(secret()),
    );
    let inner = serve(inner, "127.0.0.1:0").await;
    let upstream = Client::connect(inner.addr.as_str(), fail_fast()).await.unwrap();
    let upstream = Remote::new(upstream, Duration::from_secs(5));
    let outer = memo(Store::Embedded(table(), None), upstream, MemoOptions::new(secret())).await;
    let set_model = |digest, shift| {
        *puppet.0.model.lock().unwrap() = Some(Arc::new(model_id(digest)));
        puppet.0.shift.store(shift, Ordering::Relaxed);
    };
    until("the chain stands", async || outer.classify(&[1; 4]).await.is_ok()).await;
    // Asked about for the first time while the inner memo's connection still tells of model 1.
    set_model(2, 10);
    assert_eq!(outer.classify(&[5; 4]).await.unwrap().class, 15);
    // Back again. The outer memo hears of it with its next miss, and has nothing of model 2 under
    // model 1's keys then.
    set_model(1, 0);
    assert_eq!(outer.classify(&[6; 4]).await.unwrap().class, 6);
    for _ in 0..3 {
        assert_eq!(outer.classify(&[5; 4]).await.unwrap().class, 5);
    }
}

#[tokio::test]
async fn a_budget_ends_the_wait_but_not_the_call() {
    let puppet = Puppet::new();
    let store = Store::Embedded(table(), None);
    let service = MemoService::new(store, puppet.clone(), MemoOptions::new(secret()));
    let running = serve(service, "127.0.0.1:0").await;
    puppet.hold();
    // A raw client, since ours gives up by itself.
    let stream = tokio::net::TcpStream::connect(&running.addr).await.unwrap();
    use afterimage_wire::proto::{Message, codec::FrameCodec, handshake::Hello};
    use futures_util::{SinkExt, StreamExt};
    let mut raw = tokio_util::codec::Framed::new(stream, FrameCodec::default());
    raw.send((0, Message::Hello(Hello::new(b"")))).await.unwrap();
    raw.next().await.unwrap().unwrap();
    for (id, budget_ms) in [(1, 30), (2, 0), (3, 60)] {
        let image = &[7; 4];
        raw.send((id, Message::ClassifyReq { image, budget_ms })).await.unwrap();
    }
    for id in [1, 3] {
        let frame = tokio::time::timeout(PATIENCE, raw.next()).await.unwrap().unwrap().unwrap();
        assert_eq!(frame.header.id, id);
        let message = frame.message().unwrap();
        let exceeded = Status::DeadlineExceeded;
        assert!(
            matches!(message, Message::Error { status, .. } if status == exceeded),
            "{message:?}"
        );
    }
    puppet.release();
    let frame = tokio::time::timeout(PATIENCE, raw.next()).await.unwrap().unwrap().unwrap();
    assert_eq!((frame.header.id, frame.header.status), (2, 0));
    assert_eq!(puppet.calls(), 1);
}

#[tokio::test]
async fn a_lookup_that_the_store_drops_is_a_miss_and_not_a_hang() {
    #[derive(Debug)]
    struct Forgetful;
    impl Backend for Forgetful {
        fn name(&self) -> &'static str {
            "forgetful"
        }
        fn is_connected(&self) -> bool {
            true
        }
        fn get_many(&self, _: &[u64], _: Duration, _: Callback) {}
        fn set(&self, _: u64, _: i64) {}
    }
    let store = Store::Remote(RemoteStore::new(Forgetful, RemoteOptions::default()));
    let client = memo(store, Puppet::new(), MemoOptions::new(secret())).await;
    for i in 0..10 {
        assert_eq!(client.classify(&[i; 4]).await.unwrap(), label(i.into(), Origin::Computed));
    }
    assert_eq!(counter(&client, "store_breaker_opened").await, 1);
}

#[tokio::test]
async fn a_classifier_never_reached_is_a_typed_error_at_once() {
    let nobody = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let addr = nobody.local_addr().unwrap().to_string();
    drop(nobody);
    let client = Client::connect_lazy(addr, fail_fast());
    let classifier = Remote::new(client, Duration::from_secs(5));
    let client = memo(Store::Embedded(table(), None), classifier, MemoOptions::new(secret())).await;
    let start = Instant::now();
    assert_eq!(status(client.classify(&[1; 4]).await), Status::UpstreamCrashed);
    assert!(start.elapsed() < Duration::from_secs(3));
}

/// A classifier behind a socket that answers with the image's first byte.
struct FirstByte;

impl Service for FirstByte {
    fn identity(&self) -> Identity {
        let ModelId { digest, shape, classes } = model_id(1);
        Identity { service: Kind::Classifier, digest, classes, shape }
    }

    fn handle(&self, batch: &mut Batch<'_>) {
        for (i, request) in batch.requests().iter().enumerate() {
            if let Op::Classify { image } = request.op {
                batch.label(i, label(image[0].into(), Origin::Computed));
            }
        }
    }

    fn stats(&self, _: &mut Stats) {}
}

#[tokio::test]
async fn a_dead_classifier_fails_misses_at_once_while_hits_go_on_and_is_back_when_it_is_back() {
    let classifier = serve(FirstByte, "127.0.0.1:0").await;
    let upstream = Client::connect_lazy(classifier.addr.as_str(), fail_fast());
    let upstream = Remote::new(upstream, Duration::from_secs(5));
    let client = memo(Store::Embedded(table(), None), upstream, MemoOptions::new(secret())).await;
    until("the classifier is reached", async || client.classify(&[1; 4]).await.is_ok()).await;

    classifier.task.abort();
    let _ = classifier.task.await;
    until("its end is noticed", async || client.classify(&[2; 4]).await.is_err()).await;
    let start = Instant::now();
    assert_eq!(status(client.classify(&[3; 4]).await), Status::UpstreamCrashed);
    assert!(start.elapsed() < Duration::from_secs(2));
    assert_eq!(client.classify(&[1; 4]).await.unwrap(), label(1, Origin::Memoized));

    let _back = serve(FirstByte, &classifier.addr).await;
    until("it is used again", async || client.classify(&[3; 4]).await.is_ok()).await;
}

#[tokio::test]
async fn a_dead_cache_fails_nothing_and_is_used_again_when_it_is_back() {
    let cache = serve(CacheService::new(table()), "127.0.0.1:0").await;
    let puppet = Puppet::new();
    let client = remote(&puppet, &cache.addr).await;
    until("the cache is used", async || {
        client.classify(&[1; 4]).await.unwrap().origin == Origin::Memoized
    })
    .await;
    cache.task.abort();
    let _ = cache.task.await;
    for i in 0..50 {
        assert_eq!(client.classify(&[i; 4]).await.unwrap().class, u16::from(i));
    }
    let _back = serve(CacheService::new(table()), &cache.addr).await;
    until("the cache is used again", async || {
        client.classify(&[60; 4]).await.unwrap().origin == Origin::Memoized
    })
    .await;
}

#[tokio::test]
async fn a_cache_that_never_answers_costs_the_lookup_budget_a_few_times_and_then_nothing() {
    // Welcomes, and then says nothing to anything.
    struct Mute(Mutex<Vec<afterimage_wire::server::Later>>);
    impl Service for Mute {
        fn identity(&self) -> Identity {
            Identity::without_model(Kind::Cache)
        }
        fn handle(&self, batch: &mut Batch<'_>) {
            for i in 0..batch.requests().len() {
                self.0.lock().unwrap().push(batch.later(i));
            }
        }
        fn stats(&self, _: &mut Stats) {}
    }
    let cache = serve(Mute(Mutex::default()), "127.0.0.1:0").await;
    let upstream = Client::connect(cache.addr.as_str(), fail_fast()).await.unwrap();
    let options = RemoteOptions {
        lookup_budget: Duration::from_millis(100),
        breaker_threshold: 3,
        probe_every: Duration::from_secs(1000),
    };
    let store = Store::Remote(RemoteStore::new(upstream, options));
    let client = memo(store, Puppet::new(), MemoOptions::new(secret())).await;
    for i in 0..3 {
        let start = Instant::now();
        assert_eq!(client.classify(&[i; 4]).await.unwrap().class, u16::from(i));
        assert!(start.elapsed() >= options.lookup_budget);
    }
    let start = Instant::now();
    for i in 10..60 {
        assert_eq!(client.classify(&[i; 4]).await.unwrap().class, u16::from(i));
    }
    // Fifty budgets would be five seconds.
    assert!(start.elapsed() < Duration::from_secs(3), "{:?}", start.elapsed());
    assert_eq!(counter(&client, "store_breaker_opened").await, 1);
}
