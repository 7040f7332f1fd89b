//! Answers of bytes in stores across the network.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use afterimage_cache::{ByteStore, CacheService, Capacity, Table};
use afterimage_core::{Answer, Computed, ModelId, Origin};
use afterimage_memo::key::{KeySpace, SEAL_LEN};
use afterimage_memo::store::{
    Backend, CacheBytes, Callback, Keep, OfBytes, RemoteStore, StoreOfBytes, StoreOptions,
};
use afterimage_memo::upstream::Call;
use afterimage_memo::{CHECK_EVERY, Memo, MemoOptions, ModelOptions, Request, Upstream};
use afterimage_wire::CacheClient;
use afterimage_wire::proto::stats::Stats;
use bytes::Bytes;

use crate::common::fail_fast;
use crate::{secret, serve};

/// A model in this process: the row in capitals. Counts calls and rows.
#[derive(Clone, Debug, Default)]
struct Capitals(Arc<Counts>);

#[derive(Debug, Default)]
struct Counts {
    calls: AtomicUsize,
    rows: AtomicUsize,
}

fn id() -> Arc<ModelId> {
    static ID: std::sync::OnceLock<Arc<ModelId>> = std::sync::OnceLock::new();
    Arc::clone(ID.get_or_init(|| Arc::new(ModelId::bytes("capitals", [3; 32]))))
}

impl Upstream for Capitals {
    fn model(&self) -> Option<Arc<ModelId>> {
        Some(id())
    }

    fn compute(&self, calls: Vec<Call>) {
        for call in calls {
            self.0.calls.fetch_add(1, SeqCst);
            self.0.rows.fetch_add(call.rows.len(), SeqCst);
            let answer = |row: &Bytes| Answer::Bytes(row.to_ascii_uppercase().into());
            let answers = call.rows.iter().map(answer).collect();
            call.reply.send(Ok(Computed { model: call.model, answers }));
        }
    }

    fn stats(&self, _: &mut Stats) {}
}

/// A store that keeps all it gets, and ignores times to live.
#[derive(Clone, Debug, Default)]
struct Shelf(Arc<ShelfState>);

#[derive(Debug, Default)]
struct ShelfState {
    values: Mutex<HashMap<u128, Bytes>>,
    lookups: AtomicUsize,
    largest_lookup: AtomicUsize,
    /// It answers nothing.
    is_dead: AtomicBool,
}

impl Backend<OfBytes> for Shelf {
    fn name(&self) -> &'static str {
        "shelf"
    }

    fn is_connected(&self) -> bool {
        true
    }

    fn get_many(&self, keys: &[u128], _: Duration, then: Callback<OfBytes>) {
        self.0.lookups.fetch_add(1, SeqCst);
        self.0.largest_lookup.fetch_max(keys.len(), SeqCst);
        let values = self.0.values.lock().unwrap();
        let found = keys.iter().map(|key| values.get(key).cloned()).collect();
        let is_dead = self.0.is_dead.load(SeqCst);
        tokio::spawn(async move {
            tokio::task::yield_now().await;
            then((!is_dead).then_some(found));
        });
    }

    fn set(&self, key: u128, value: Bytes, _: Keep) {
        self.0.values.lock().unwrap().insert(key, value);
    }
}

fn memo_on(store: impl Into<StoreOfBytes>, ttl: Option<Duration>) -> (Memo, Capitals) {
    let (memo, model) = (Memo::of_bytes(store, MemoOptions::new(secret())), Capitals::default());
    let mut options = ModelOptions::default();
    options.ttl = ttl;
    memo.add_model("m", model.clone(), options);
    (memo, model)
}

/// A busy machine is not what these tests are about.
fn patient() -> StoreOptions {
    StoreOptions { lookup_budget: Duration::from_secs(5), ..StoreOptions::for_bytes() }
}

fn on_shelf(shelf: &Shelf, ttl: Option<Duration>) -> (Memo, Capitals) {
    memo_on(StoreOfBytes::Remote(RemoteStore::new(shelf.clone(), patient())), ttl)
}

async fn ask_all(memo: &Memo, rows: &[String]) -> Vec<(Origin, Duration)> {
    let request = Request::rows(rows.iter().cloned().map(Bytes::from)).model("m");
    let response = memo.ask(request).await.unwrap();
    let answers = response.rows.iter().zip(rows);
    answers
        .map(|(answer, row)| {
            assert_eq!(answer.answer, Answer::Bytes(row.to_ascii_uppercase().into()));
            (answer.origin, answer.age)
        })
        .collect()
}

async fn ask(memo: &Memo, row: &str) -> Origin {
    ask_all(memo, &[row.to_owned()]).await[0].0
}

fn counter(memo: &Memo, name: &str) -> u64 {
    let mut stats = Stats::default();
    memo.stats(&mut stats);
    stats.counter_value(name)
}

#[tokio::test]
async fn memos_share_answers_through_a_cache_service() {
    let table = Arc::new(Table::new(Capacity::Entries(64)).unwrap());
    let bytes = Arc::new(ByteStore::new(64 << 20, 16 << 20));
    let service = CacheService::new(table).with_bytes(Some(Arc::clone(&bytes)));
    let cache = serve(service, "127.0.0.1:0").await;
    let new = || {
        let client = CacheClient::connect_lazy(cache.addr.as_str(), fail_fast());
        let remote = RemoteStore::new(CacheBytes::new(client), patient());
        memo_on(StoreOfBytes::Remote(remote), Some(Duration::from_secs(60)))
    };
    let ((one, _), (other, model)) = (new(), new());
    let large = "x".repeat(3 << 20);
    for row in ["a", "", &large] {
        // The first lookups may come before the connection.
        let mut origin = ask(&one, row).await;
        for _ in 0..1000 {
            if origin == Origin::Hit {
                break;
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
            origin = ask(&one, row).await;
        }
        assert_eq!(origin, Origin::Hit, "{} bytes", row.len());
    }
    let rows: Vec<_> = ["a", "", &large, "new"].map(str::to_owned).into();
    let mut origins = ask_all(&other, &rows).await;
    for _ in 0..1000 {
        if origins.iter().all(|(origin, _)| *origin == Origin::Hit) {
            break;
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
        origins = ask_all(&other, &rows).await;
    }
    assert!(origins.iter().all(|(origin, _)| *origin == Origin::Hit), "{origins:?}");
    assert!(model.0.rows.load(SeqCst) >= 1);
    assert_eq!(counter(&other, "rejected_tags"), 0);
    // Three rows, a fourth one, and the epoch if a memo has written one.
    assert!((4..=5).contains(&bytes.stats().entries));
}

#[tokio::test]
async fn rows_are_looked_up_together_and_misses_are_one_call() {
    let shelf = Shelf::default();
    let (memo, model) = on_shelf(&shelf, None);
    let rows: Vec<String> = (0..200).map(|i| format!("row {i}")).collect();
    ask_all(&memo, &rows[..150]).await;
    assert_eq!((model.0.calls.load(SeqCst), model.0.rows.load(SeqCst)), (1, 150));
    let mixed: Vec<_> = rows.iter().rev().chain(&rows[190..]).cloned().collect();
    let origins = ask_all(&memo, &mixed).await;
    assert_eq!((model.0.calls.load(SeqCst), model.0.rows.load(SeqCst)), (2, 200));
    let hits = origins.iter().filter(|(origin, _)| *origin == Origin::Hit).count();
    let coalesced = origins.iter().filter(|(origin, _)| *origin == Origin::Coalesced).count();
    assert_eq!((hits, coalesced), (150, 10));
    // No lookup of the backend has more keys than a store should hold in memory at once.
    assert_eq!(shelf.0.largest_lookup.load(SeqCst), 64);
    assert_eq!(counter(&memo, "store_lookups"), 152 + 200);
}

#[tokio::test(start_paused = true)]
async fn a_time_to_live_holds_across_memos_and_stores() {
    let shelf = Shelf::default();
    let (one, _) = on_shelf(&shelf, Some(Duration::from_secs(60)));
    // The memo that reads has no time to live of its own: that of the value counts.
    let (other, _) = on_shelf(&shelf, None);
    assert_eq!(ask(&one, "a").await, Origin::Miss);
    tokio::time::advance(Duration::from_secs(50)).await;
    let (origin, age) = ask_all(&other, &["a".to_owned()]).await[0];
    assert_eq!(origin, Origin::Hit);
    assert!((50..=52).contains(&age.as_secs()), "{age:?}");
    tokio::time::advance(Duration::from_secs(11)).await;
    assert_eq!(ask(&other, "a").await, Origin::Miss);
    assert_eq!(counter(&other, "rejected_tags"), 0, "an old value is not a forged one");
    tokio::time::advance(Duration::from_secs(3600)).await;
    assert_eq!(ask(&one, "a").await, Origin::Hit, "the other memo stored it without a limit");
}

#[tokio::test(start_paused = true)]
async fn a_store_cannot_extend_or_exchange_a_stored_answer() {
    let shelf = Shelf::default();
    let (memo, model) = on_shelf(&shelf, Some(Duration::from_secs(60)));
    let keys = KeySpace::new(&secret(), id(), 0).unwrap();
    let (a, b) = (keys.hash(b"a").identity(), keys.hash(b"b").identity());
    for row in ["a", "b"] {
        ask(&memo, row).await;
    }
    let value = |key| shelf.0.values.lock().unwrap()[&key].clone();
    let (sealed_a, sealed_b) = (value(a), value(b));
    assert_eq!(sealed_a.len(), 1 + SEAL_LEN);
    tokio::time::advance(Duration::from_secs(61)).await;
    let mut rejected = 0;
    // The time of storing, in all bits of its first five bytes, and the time to live.
    let flips = (1..6).chain(9..13).flat_map(|at| (0..8).map(move |bit| (at, 1 << bit)));
    let forged = flips.map(|(at, bit)| {
        let mut bytes = sealed_a.to_vec();
        bytes[at] ^= bit;
        Bytes::from(bytes)
    });
    for forged in forged.chain([sealed_b, sealed_a.slice(1..), Bytes::from_static(b"x")]) {
        shelf.0.values.lock().unwrap().insert(a, forged);
        let before = model.0.calls.load(SeqCst);
        assert_eq!(ask(&memo, "a").await, Origin::Miss);
        assert_eq!(model.0.calls.load(SeqCst), before + 1);
        rejected += 1;
        assert_eq!(counter(&memo, "rejected_tags"), rejected);
    }
    shelf.0.values.lock().unwrap().insert(a, sealed_a);
    assert_eq!(ask(&memo, "a").await, Origin::Miss, "the old value is over");
}

#[tokio::test(start_paused = true)]
async fn forget_and_flush_reach_the_other_memos() {
    let shelf = Shelf::default();
    let ((one, _), (other, _)) = (on_shelf(&shelf, None), on_shelf(&shelf, None));
    for row in ["a", "b", "c"] {
        assert_eq!(ask(&one, row).await, Origin::Miss);
        assert_eq!(ask(&other, row).await, Origin::Hit);
    }
    one.forget("m", b"a").unwrap();
    assert_eq!(ask(&other, "a").await, Origin::Miss, "at once");
    assert_eq!(ask(&other, "b").await, Origin::Hit, "one input only");
    assert_eq!(counter(&other, "rejected_tags"), 0);
    one.flush("m").unwrap();
    assert_eq!(ask(&one, "b").await, Origin::Miss, "here at once");
    tokio::time::advance(CHECK_EVERY).await;
    assert_eq!(ask(&other, "c").await, Origin::Miss, "within a second");
    let (third, _) = on_shelf(&shelf, None);
    assert_eq!(ask(&third, "a").await, Origin::Miss, "a memo that starts later");
    assert_eq!(ask(&third, "b").await, Origin::Hit, "stored since");
}

#[tokio::test]
async fn equal_rows_share_the_lookup_and_the_call() {
    let shelf = Shelf::default();
    let (memo, model) = on_shelf(&shelf, None);
    ask(&memo, "z").await;
    let before = shelf.0.lookups.load(SeqCst);
    let row = ["a".to_owned()];
    let asks = (0..50).map(|_| ask_all(&memo, &row));
    let origins = futures_util::future::join_all(asks).await;
    let count = |wanted| origins.iter().filter(|rows| rows[0].0 == wanted).count();
    assert_eq!((count(Origin::Miss), count(Origin::Coalesced)), (1, 49));
    assert_eq!((shelf.0.lookups.load(SeqCst) - before, model.0.rows.load(SeqCst)), (1, 2));
}

#[tokio::test]
async fn a_store_without_answers_costs_no_answer() {
    let shelf = Shelf::default();
    let (memo, _) = on_shelf(&shelf, None);
    assert_eq!(ask(&memo, "a").await, Origin::Miss);
    shelf.0.is_dead.store(true, SeqCst);
    for _ in 0..10 {
        assert_eq!(ask(&memo, "a").await, Origin::Miss);
    }
    assert_eq!(counter(&memo, "store_breaker_opened"), 1);
    shelf.0.is_dead.store(false, SeqCst);
    for _ in 0..1000 {
        if ask(&memo, "a").await == Origin::Hit {
            return;
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    panic!("no hit after the store has recovered");
}

#[tokio::test]
async fn a_cache_service_without_bytes_costs_no_answer() {
    let table = Arc::new(Table::new(Capacity::Entries(64)).unwrap());
    let cache = serve(CacheService::new(table), "127.0.0.1:0").await;
    let client = CacheClient::connect(cache.addr.as_str(), fail_fast()).await.unwrap();
    let backend = CacheBytes::new(client);
    let (sender, outcome) = tokio::sync::oneshot::channel();
    let then: Callback<OfBytes> = Box::new(move |values| sender.send(values).unwrap());
    backend.get_many(&[1, 2], Duration::from_secs(5), then);
    assert_eq!(outcome.await.unwrap(), None);
    let cause = backend.cause().unwrap();
    assert!(cause.contains("--bytes SIZE"), "{cause}");
    let (memo, _) = memo_on(StoreOfBytes::Remote(RemoteStore::new(backend, patient())), None);
    for _ in 0..10 {
        assert_eq!(ask(&memo, "a").await, Origin::Miss);
    }
    assert!(counter(&memo, "store_writes_failed") > 0);
    assert_eq!(counter(&memo, "store_breaker_opened"), 1);
}
