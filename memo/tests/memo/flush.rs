//! A flush: all answers of a model are deleted, in every memo that shares the store, and after a
//! restart.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use afterimage_cache::{ByteStore, CacheService, Table};
use afterimage_core::{Answer, ModelId, Origin, Status};
use afterimage_memo::store::{Backend, Callback, Keep, RemoteStore, StoreOptions};
use afterimage_memo::upstream::{Call, Function};
use afterimage_memo::{
    CHECK_EVERY, Memo, MemoOptions, ModelOptions, Request, Secret, Store, Upstream,
};
use afterimage_wire::proto::stats::Stats;

use crate::common::until;
use crate::{remote_store, secret, serve, table};

/// A model that answers every input with its first byte.
fn first_byte(digest: u8) -> impl Upstream {
    Function::new(ModelId::labels([digest; 32], None, 256), 1, |rows| {
        Ok(rows.iter().map(|row| Answer::Label(row.first().copied().unwrap_or(0).into())).collect())
    })
}

fn memo_on(store: Store) -> Memo {
    let memo = Memo::new(store, None, MemoOptions::new(secret()));
    memo.add_model("m", first_byte(1), ModelOptions::default());
    memo
}

fn on(table: &Arc<Table>) -> Memo {
    memo_on(Store::Embedded(Arc::clone(table), None))
}

async fn ask(memo: &Memo, row: &str) -> Origin {
    memo.ask(Request::row(row.to_owned())).await.unwrap().rows[0].origin
}

/// Asks until the answer is stored: a lookup of a busy machine may be late.
async fn store(memo: &Memo, row: &str) {
    for _ in 0..100 {
        if ask(memo, row).await == Origin::Hit {
            return;
        }
    }
    panic!("{row} is never a hit");
}

#[tokio::test]
async fn a_flush_lasts_beyond_a_restart() {
    let table = table();
    let memo = on(&table);
    assert_eq!((ask(&memo, "a").await, ask(&memo, "a").await), (Origin::Miss, Origin::Hit));
    memo.flush("m").unwrap();
    assert_eq!(ask(&memo, "b").await, Origin::Miss);
    drop(memo);
    let again = on(&table);
    assert_eq!(ask(&again, "a").await, Origin::Miss, "it was flushed");
    assert_eq!(ask(&again, "b").await, Origin::Hit, "it was stored after the flush");
}

#[tokio::test]
async fn a_flush_of_bytes_lasts_beyond_a_restart() {
    let store = Arc::new(ByteStore::new(8 << 20, 1 << 20));
    let new = || {
        let memo = Memo::of_bytes(Arc::clone(&store), MemoOptions::new(secret()));
        let echo = |rows: &[bytes::Bytes]| Ok(rows.iter().cloned().map(Answer::Bytes).collect());
        let model = Function::new(ModelId::bytes("echo", [1; 32]), 1, echo);
        memo.add_model("m", model, ModelOptions::default());
        memo
    };
    let memo = new();
    assert_eq!((ask(&memo, "a").await, ask(&memo, "a").await), (Origin::Miss, Origin::Hit));
    memo.flush("m").unwrap();
    assert_eq!(ask(&memo, "b").await, Origin::Miss);
    let again = new();
    assert_eq!((ask(&again, "a").await, ask(&again, "b").await), (Origin::Miss, Origin::Hit));
}

#[tokio::test]
async fn a_flush_reaches_the_other_memos_of_a_store() {
    let cache = serve(CacheService::new(table()), "127.0.0.1:0").await;
    let (one, other) = (memo_on(remote_store(&cache.addr)), memo_on(remote_store(&cache.addr)));
    store(&one, "a").await;
    store(&other, "a").await;
    one.flush("m").unwrap();
    assert_eq!(ask(&one, "a").await, Origin::Miss, "here at once");
    store(&one, "a").await;
    tokio::time::sleep(CHECK_EVERY).await;
    // Its next lookup reads the epoch; the one after that uses the new keys.
    ask(&other, "z").await;
    store(&other, "a").await;
    other.flush("m").unwrap();
    assert_eq!(ask(&other, "a").await, Origin::Miss);
    tokio::time::sleep(CHECK_EVERY).await;
    assert_eq!(ask(&one, "a").await, Origin::Miss, "the second flush deletes the first's answers");
}

#[tokio::test]
async fn a_memo_that_starts_after_a_flush_finds_no_older_answer() {
    let table = table();
    let cache = serve(CacheService::new(Arc::clone(&table)), "127.0.0.1:0").await;
    let memo = memo_on(remote_store(&cache.addr));
    for row in ["a", "b", "c"] {
        store(&memo, row).await;
    }
    memo.flush("m").unwrap();
    // The flush is written once the store has answered.
    store(&memo, "d").await;
    let started = memo_on(remote_store(&cache.addr));
    for row in ["a", "b", "c"] {
        assert_eq!(ask(&started, row).await, Origin::Miss, "{row}");
    }
    store(&started, "d").await;
}

#[tokio::test]
async fn two_memos_that_flush_at_once_agree_on_a_new_epoch() {
    let cache = serve(CacheService::new(table()), "127.0.0.1:0").await;
    let memos = [memo_on(remote_store(&cache.addr)), memo_on(remote_store(&cache.addr))];
    for round in 0..3 {
        for memo in &memos {
            store(memo, "a").await;
        }
        memos.iter().for_each(|memo| memo.flush("m").unwrap());
        // The other memo may find the answer that this one stores now.
        assert_eq!(ask(&memos[0], "a").await, Origin::Miss, "round {round}");
        tokio::time::sleep(CHECK_EVERY).await;
        store(&memos[0], "b").await;
        ask(&memos[1], "z").await;
        assert_eq!(ask(&memos[1], "b").await, Origin::Hit, "they share answers again");
    }
}

#[tokio::test]
async fn a_flush_takes_back_what_an_unseen_flush_let_in() {
    let cache = serve(CacheService::new(table()), "127.0.0.1:0").await;
    let (one, other) = (memo_on(remote_store(&cache.addr)), memo_on(remote_store(&cache.addr)));
    store(&one, "a").await;
    store(&other, "a").await;
    one.flush("m").unwrap();
    store(&one, "b").await;
    // The other memo has not seen the first flush: its own would begin the same epoch.
    other.flush("m").unwrap();
    assert_eq!(ask(&other, "b").await, Origin::Miss);
}

/// A model that another one can replace.
#[derive(Clone)]
struct Changing(Arc<Mutex<Arc<ModelId>>>);

impl Changing {
    fn new(digest: u8) -> Self {
        Changing(Arc::new(Mutex::new(Arc::new(ModelId::labels([digest; 32], None, 256)))))
    }

    fn become_model(&self, digest: u8) {
        *self.0.lock().unwrap() = Arc::new(ModelId::labels([digest; 32], None, 256));
    }
}

impl Upstream for Changing {
    fn model(&self) -> Option<Arc<ModelId>> {
        Some(Arc::clone(&self.0.lock().unwrap()))
    }

    fn compute(&self, calls: Vec<Call>) {
        for call in calls.into_iter().flat_map(Call::scatter) {
            call.send_label(1);
        }
    }

    fn stats(&self, _: &mut Stats) {}
}

#[tokio::test]
async fn a_flush_takes_back_the_answers_of_former_models() {
    let cache = serve(CacheService::new(table()), "127.0.0.1:0").await;
    for place in [Store::Embedded(table(), None), remote_store(&cache.addr)] {
        let memo = Memo::new(place, None, MemoOptions::new(secret()));
        let model = Changing::new(1);
        memo.add_model("m", model.clone(), ModelOptions::default());
        store(&memo, "a").await;
        model.become_model(2);
        store(&memo, "b").await;
        memo.flush("m").unwrap();
        model.become_model(1);
        assert_eq!(ask(&memo, "a").await, Origin::Miss);
        store(&memo, "a").await;
        model.become_model(2);
        assert_eq!(ask(&memo, "b").await, Origin::Miss);
    }
}

#[tokio::test]
async fn a_flush_covers_models_that_only_an_earlier_process_met() {
    let cache = serve(CacheService::new(table()), "127.0.0.1:0").await;
    let table = table();
    let embedded = || Store::Embedded(Arc::clone(&table), None);
    let places: [&dyn Fn() -> Store; 2] = [&embedded, &|| remote_store(&cache.addr)];
    for place in places {
        let model = Changing::new(1);
        let new = || {
            let memo = Memo::new(place(), None, MemoOptions::new(secret()));
            memo.add_model("m", model.clone(), ModelOptions::default());
            memo
        };
        let before = new();
        store(&before, "a").await;
        drop(before);
        model.become_model(2);
        let memo = new();
        store(&memo, "b").await;
        memo.flush("m").unwrap();
        model.become_model(1);
        assert_eq!(ask(&memo, "a").await, Origin::Miss);
    }
}

#[tokio::test]
async fn a_flush_covers_former_models_after_a_restart() {
    let cache = serve(CacheService::new(table()), "127.0.0.1:0").await;
    let table = table();
    let embedded = || Store::Embedded(Arc::clone(&table), None);
    let places: [&dyn Fn() -> Store; 2] = [&embedded, &|| remote_store(&cache.addr)];
    for place in places {
        let with = |digest| {
            let memo = Memo::new(place(), None, MemoOptions::new(secret()));
            memo.add_model("m", first_byte(digest), ModelOptions::default());
            memo
        };
        let other = with(3);
        other.add_model("other", first_byte(4), ModelOptions::default());
        let of_other = || Request::row("a").model("other");
        let ask_other = async || other.ask(of_other()).await.unwrap().rows[0].origin;
        until("the other model's answer is stored", async || ask_other().await == Origin::Hit)
            .await;
        store(&with(1), "a").await;
        let flushing = with(2);
        store(&flushing, "b").await;
        flushing.flush("m").unwrap();
        // The flush is written once the store has answered.
        store(&flushing, "c").await;
        drop(flushing);
        assert_eq!(ask(&with(1), "a").await, Origin::Miss, "a former model in a new process");
        store(&with(2), "c").await;
        assert_eq!(ask_other().await, Origin::Hit, "the flush concerns one name");
    }
}

#[tokio::test]
async fn a_flush_covers_answers_of_an_epoch_that_was_dropped() {
    let table = table();
    let memo = on(&table);
    ask(&memo, "a").await;
    memo.flush("m").unwrap();
    ask(&memo, "z").await;
    // The store drops the epoch, and an answer is stored before the epoch is written again.
    table.clear();
    assert_eq!(ask(&memo, "a").await, Origin::Miss);
    drop(memo);
    let memo = on(&table);
    ask(&memo, "b").await;
    memo.flush("m").unwrap();
    assert_eq!(ask(&memo, "a").await, Origin::Miss);
}

/// A store that answers lookups at once, or when the test says so.
#[derive(Clone, Default)]
struct Held(Arc<Mutex<HeldState>>);

#[derive(Default)]
struct HeldState {
    values: HashMap<u64, i64>,
    holds: bool,
    lookup: Option<(Vec<Option<i64>>, Callback)>,
}

impl std::fmt::Debug for Held {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Held")
    }
}

impl Backend for Held {
    fn name(&self) -> &'static str {
        "held"
    }

    fn is_connected(&self) -> bool {
        true
    }

    fn get_many(&self, keys: &[u64], _: Duration, then: Callback) {
        let mut state = self.0.lock().unwrap();
        let values = keys.iter().map(|key| state.values.get(key).copied()).collect();
        if state.holds {
            state.lookup = Some((values, then));
            return;
        }
        drop(state);
        then(Some(values));
    }

    fn set(&self, key: u64, value: i64, _: Keep) {
        self.0.lock().unwrap().values.insert(key, value);
    }
}

#[tokio::test]
async fn a_refresh_takes_no_answer_of_a_lookup_that_is_under_way() {
    let held = Held::default();
    let lookup_budget = Duration::from_secs(60);
    let options = StoreOptions { lookup_budget, ..StoreOptions::default() };
    let memo = memo_on(Store::Remote(RemoteStore::new(held.clone(), options)));
    store(&memo, "a").await;
    held.0.lock().unwrap().holds = true;
    let (asking, refreshing) = (memo.clone(), memo.clone());
    let asked = tokio::spawn(async move { ask(&asking, "a").await });
    while held.0.lock().unwrap().lookup.is_none() {
        tokio::task::yield_now().await;
    }
    let refreshed = tokio::spawn(async move {
        refreshing.ask(Request::row("a").fresh()).await.unwrap().rows[0].origin
    });
    while memo.in_flight().0 < 2 {
        tokio::task::yield_now().await;
    }
    let (values, then) = held.0.lock().unwrap().lookup.take().unwrap();
    then(Some(values));
    // One call for both.
    let origins = (asked.await.unwrap(), refreshed.await.unwrap());
    assert_eq!(origins, (Origin::Miss, Origin::Coalesced));
}

#[tokio::test]
async fn a_store_that_drops_the_epoch_gets_it_again() {
    let table = table();
    let memo = on(&table);
    ask(&memo, "a").await;
    memo.flush("m").unwrap();
    table.clear();
    assert_eq!(ask(&on(&table), "z").await, Origin::Miss);
    tokio::time::sleep(CHECK_EVERY + Duration::from_millis(50)).await;
    store(&memo, "b").await;
    assert_eq!(ask(&on(&table), "b").await, Origin::Hit, "a new memo is in the same epoch");
}

#[tokio::test]
async fn a_flush_without_a_model_or_keys_says_so() {
    let memo = on(&table());
    let failure = memo.flush("other").unwrap_err();
    assert_eq!(failure.status, Status::BadArgument);
    assert!(failure.text.contains("other"), "{failure}");
    let other_secret =
        Memo::new(Store::Embedded(table(), None), None, MemoOptions::new(Secret::new([9; 32])));
    other_secret.flush_all().unwrap();
}
