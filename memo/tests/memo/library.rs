//! The memo as a library: rows, answers of bytes, many models, and deletion of answers.

use std::collections::HashMap;
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use afterimage_cache::{ByteStore, Capacity, Table};
use afterimage_core::{Answer, Computed, Failure, ModelId, Origin, Reply, Response, Rows, Status};
use afterimage_memo::store::{Backend, Callback, Keep, RemoteStore, StoreOptions};
use afterimage_memo::upstream::{Call, Function};
use afterimage_memo::{
    Memo, MemoOptions, MemoService, ModelOptions, Request, Secret, Store, Upstream,
};
use afterimage_wire::proto::stats::Stats;
use afterimage_wire::server::Service;
use bytes::Bytes;

fn options() -> MemoOptions {
    MemoOptions::new(Secret::new([7; 32]))
}

fn bytes_memo() -> (Memo, Arc<ByteStore>) {
    let store = Arc::new(ByteStore::new(8 << 20, 1 << 20));
    (Memo::of_bytes(Arc::clone(&store), options()), store)
}

/// The rows of each call, in order.
type Calls = Arc<Mutex<Vec<Vec<Bytes>>>>;

/// A model that answers with the row in capitals, and fails rows that start with `!`.
fn capitals(digest: u8) -> (Function, Calls) {
    let calls = Calls::default();
    let seen = Arc::clone(&calls);
    let function = Function::new(ModelId::bytes("capitals", [digest; 32]), 2, move |rows| {
        seen.lock().unwrap().push(rows.to_vec());
        if rows.iter().any(|row| row.starts_with(b"!")) {
            return Err(Failure::new(Status::UpstreamError, "planned"));
        }
        Ok(rows.iter().map(|row| Answer::Bytes(row.to_ascii_uppercase().into())).collect())
    });
    (function, calls)
}

fn texts(response: &Response) -> Vec<(&[u8], Origin)> {
    let row = |row: &afterimage_core::RowAnswer| match &row.answer {
        Answer::Bytes(bytes) => (bytes.to_vec().leak() as &[u8], row.origin),
        Answer::Label(label) => panic!("a label: {label}"),
    };
    response.rows.iter().map(row).collect()
}

fn counter(memo: &Memo, name: &str) -> u64 {
    let mut stats = Stats::default();
    memo.stats(&mut stats);
    stats.counter_value(name)
}

#[tokio::test]
async fn a_batch_asks_for_unknown_rows_in_one_call_and_in_order() {
    let (memo, _) = bytes_memo();
    let (model, calls) = capitals(1);
    memo.add_model("m", model, ModelOptions::default());
    memo.ask(Request::rows(["b", "d"]).model("m")).await.unwrap();
    let response = memo.ask(Request::rows(["a", "b", "c", "d", "e"]).model("m")).await.unwrap();
    let expected: [(&[u8], Origin); 5] = [
        (b"A", Origin::Miss),
        (b"B", Origin::Hit),
        (b"C", Origin::Miss),
        (b"D", Origin::Hit),
        (b"E", Origin::Miss),
    ];
    assert_eq!(texts(&response), expected);
    assert_eq!(*calls.lock().unwrap(), [vec!["b", "d"], vec!["a", "c", "e"]]);
}

#[tokio::test]
async fn equal_rows_of_one_request_are_asked_once() {
    let (memo, _) = bytes_memo();
    let (model, calls) = capitals(1);
    memo.add_model("m", model, ModelOptions::default());
    let response = memo.ask(Request::rows(["x", "y", "x", "x"])).await.unwrap();
    let expected: [(&[u8], Origin); 4] = [
        (b"X", Origin::Miss),
        (b"Y", Origin::Miss),
        (b"X", Origin::Coalesced),
        (b"X", Origin::Coalesced),
    ];
    assert_eq!(texts(&response), expected);
    assert_eq!(*calls.lock().unwrap(), [vec!["x", "y"]]);
}

#[tokio::test]
async fn a_failed_call_fails_the_request_and_keeps_known_rows() {
    let (memo, _) = bytes_memo();
    let (model, _) = capitals(1);
    memo.add_model("m", model, ModelOptions::default());
    memo.ask(Request::row("known")).await.unwrap();
    let failure = memo.ask(Request::rows(["known", "!"])).await.unwrap_err();
    assert_eq!(failure, Failure::new(Status::UpstreamError, "planned"));
    let again = memo.ask(Request::row("known")).await.unwrap();
    assert_eq!(again.rows[0].origin, Origin::Hit);
    assert_eq!(memo.in_flight(), (0, 0));
}

#[tokio::test]
async fn models_share_a_memo_and_no_answer() {
    let (memo, _) = bytes_memo();
    let reverse = Function::new(ModelId::bytes("reverse", [2; 32]), 1, |rows: &[Bytes]| {
        let turned = |row: &Bytes| row.iter().rev().copied().collect::<Vec<u8>>();
        Ok(rows.iter().map(|row| Answer::Bytes(turned(row).into())).collect())
    });
    memo.add_model("capitals", capitals(1).0, ModelOptions::default());
    memo.add_model("reverse", reverse, ModelOptions::default());
    for origin in [Origin::Miss, Origin::Hit] {
        let one = memo.ask(Request::row("ab").model("capitals")).await.unwrap();
        let other = memo.ask(Request::row("ab").model("reverse")).await.unwrap();
        assert_eq!(
            (texts(&one), texts(&other)),
            (vec![(&b"AB"[..], origin)], vec![(&b"ba"[..], origin)])
        );
    }
    let unnamed = memo.ask(Request::row("ab")).await.unwrap_err();
    assert_eq!(unnamed.text, "the request names no model; the memo has 2");
    let unknown = memo.ask(Request::row("ab").model("other")).await.unwrap_err();
    assert_eq!(
        (unknown.status, &*unknown.text),
        (Status::BadArgument, "the memo has no model \"other\"")
    );
    assert!(memo.remove_model("reverse") && !memo.remove_model("reverse"));
    assert_eq!(memo.model_names(), ["capitals"]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn label_and_bytes_of_one_digest_in_flight_are_two_calls() {
    let table = Arc::new(Table::new(Capacity::Entries(1000)).unwrap());
    let bytes = Arc::new(ByteStore::new(1 << 20, 1 << 16));
    let memo = Memo::new(Store::Embedded(table, None), bytes, options());
    // Both calls wait until both have begun.
    let both = Arc::new(std::sync::Barrier::new(2));
    let (one, other) = (Arc::clone(&both), both);
    let label = Function::new(ModelId::labels([1; 32], None, 10), 1, move |rows| {
        one.wait();
        Ok(rows.iter().map(|_| Answer::Label(7)).collect())
    });
    let scores = Function::new(ModelId::bytes("scores", [1; 32]), 1, move |rows| {
        other.wait();
        Ok(rows.iter().map(|_| Answer::Bytes("scores".into())).collect())
    });
    memo.add_model("label", label, ModelOptions::default());
    memo.add_model("scores", scores, ModelOptions::default());
    let asks = ["label", "scores"].map(|model| memo.ask(Request::row("same").model(model)));
    let answers =
        tokio::time::timeout(Duration::from_secs(30), futures_util::future::join_all(asks));
    let answers = answers.await.expect("each model is called");
    let answers: Vec<_> =
        answers.into_iter().map(|answer| answer.unwrap().rows[0].clone()).collect();
    assert_eq!(answers[0].answer.label(), Some(7));
    assert_eq!(answers[1].answer, Answer::Bytes("scores".into()));
}

#[tokio::test]
async fn a_request_can_refresh_and_can_leave_no_trace() {
    let (memo, store) = bytes_memo();
    let (model, calls) = capitals(1);
    memo.add_model("m", model, ModelOptions::default());
    memo.ask(Request::row("a").no_store()).await.unwrap();
    assert_eq!(store.stats().entries, 0);
    memo.ask(Request::row("a")).await.unwrap();
    let fresh = memo.ask(Request::row("a").fresh()).await.unwrap();
    assert_eq!(fresh.rows[0].origin, Origin::Miss);
    assert_eq!(memo.ask(Request::row("a")).await.unwrap().rows[0].origin, Origin::Hit);
    assert_eq!(calls.lock().unwrap().len(), 3);
}

#[tokio::test]
async fn an_unstored_model_still_shares_calls_in_flight() {
    let (memo, store) = bytes_memo();
    let (model, calls) = capitals(1);
    memo.add_model("m", model, ModelOptions::default().unstored());
    memo.ask(Request::rows(["a", "a"])).await.unwrap();
    memo.ask(Request::row("a")).await.unwrap();
    assert_eq!((store.stats().entries, calls.lock().unwrap().len()), (0, 2));
}

#[tokio::test]
async fn forget_and_flush_take_answers_back() {
    let (memo, _) = bytes_memo();
    memo.add_model("m", capitals(1).0, ModelOptions::default());
    let ask = async |row: &'static str| memo.ask(Request::row(row)).await.unwrap().rows[0].origin;
    assert_eq!((ask("a").await, ask("b").await), (Origin::Miss, Origin::Miss));
    memo.forget("m", b"a").unwrap();
    assert_eq!((ask("a").await, ask("b").await), (Origin::Miss, Origin::Hit));
    memo.flush("m").unwrap();
    assert_eq!((ask("a").await, ask("b").await), (Origin::Miss, Origin::Miss));
    assert_eq!((ask("a").await, ask("b").await), (Origin::Hit, Origin::Hit));
    memo.flush_all().unwrap();
    assert_eq!(ask("a").await, Origin::Miss);
    assert_eq!(memo.flush("other").unwrap_err().status, Status::BadArgument);
}

#[tokio::test]
async fn labels_can_be_taken_back_too() {
    let table = Arc::new(Table::new(Capacity::Entries(1000)).unwrap());
    let memo = Memo::new(Store::Embedded(table, None), None, options());
    let id = ModelId::labels([1; 32], None, 256);
    let first_byte = Function::new(id, 1, |rows: &[Bytes]| {
        Ok(rows.iter().map(|row| Answer::Label(row.first().copied().unwrap_or(0).into())).collect())
    });
    memo.add_model("", first_byte, ModelOptions::default());
    // Inputs of any length, because the model declares no shape.
    for row in ["", "a", "a longer input"] {
        for origin in [Origin::Miss, Origin::Hit] {
            let answer = &memo.ask(Request::row(row)).await.unwrap().rows[0];
            let label = row.bytes().next().unwrap_or(0).into();
            assert_eq!((&answer.answer, answer.origin), (&Answer::Label(label), origin));
        }
    }
    memo.forget("", b"a").unwrap();
    assert_eq!(memo.ask(Request::row("a")).await.unwrap().rows[0].origin, Origin::Miss);
    assert_eq!(counter(&memo, "rejected_tags"), 0, "a forgotten label is no forgery");
    memo.flush("").unwrap();
    assert_eq!(memo.ask(Request::row("a")).await.unwrap().rows[0].origin, Origin::Miss);
    let rows: Vec<String> = (0..200).map(|i| format!("{i}")).collect();
    let many = memo.ask(Request::rows(rows.clone())).await.unwrap();
    assert_eq!(many.rows.len(), 200);
    let again = memo.ask(Request::rows(rows)).await.unwrap();
    assert!(again.rows.iter().all(|row| row.origin == Origin::Hit));
}

#[tokio::test]
async fn a_stored_answer_that_was_changed_is_computed_anew() {
    let (memo, store) = bytes_memo();
    memo.add_model("m", capitals(1).0, ModelOptions::default());
    memo.ask(Request::row("a")).await.unwrap();
    let keys = afterimage_memo::key::KeySpace::new(
        &Secret::new([7; 32]),
        Arc::new(ModelId::bytes("capitals", [1; 32])),
        0,
    );
    let key = keys.unwrap().hash(b"a").identity();
    let sealed = store.get(key, Instant::now()).unwrap().value;
    for at in 0..sealed.len() {
        let mut changed = sealed.to_vec();
        changed[at] ^= 0x20;
        store.insert(key, changed.into(), None, Instant::now());
        let response = memo.ask(Request::row("a")).await.unwrap();
        assert_eq!(texts(&response), [(&b"A"[..], Origin::Miss)], "byte {at}");
    }
    assert_eq!(counter(&memo, "rejected_tags"), sealed.len() as u64 * 2, "read twice each");
}

#[tokio::test]
async fn an_answer_expires_with_the_time_of_its_model() {
    let (memo, _) = bytes_memo();
    let ttl = Duration::from_secs(1);
    memo.add_model("m", capitals(1).0, ModelOptions::default().ttl(ttl));
    memo.ask(Request::row("a")).await.unwrap();
    assert_eq!(memo.ask(Request::row("a")).await.unwrap().rows[0].origin, Origin::Hit);
    let expired = async || {
        memo.ask(Request::row("a").no_store()).await.unwrap().rows[0].origin == Origin::Miss
    };
    let started = Instant::now();
    while !expired().await {
        assert!(started.elapsed() < Duration::from_secs(30), "it never expires");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

#[tokio::test(start_paused = true)]
async fn a_label_expires_with_the_time_of_its_model_or_request() {
    let table = Arc::new(Table::new(Capacity::Entries(64)).unwrap());
    let memo = Memo::new(Store::Embedded(table, None), None, options());
    let label = |digest| {
        Function::new(ModelId::labels([digest; 32], None, 10), 1, |rows| {
            Ok(rows.iter().map(|_| Answer::Label(3)).collect())
        })
    };
    let hour = Duration::from_secs(3600);
    memo.add_model("limited", label(1), ModelOptions::default().ttl(hour));
    memo.add_model("free", label(2), ModelOptions::default());
    let ask = async |model: &str, row: &'static str, ttl| {
        let mut request = Request::row(row).model(model);
        request.directives.ttl = ttl;
        memo.ask(request).await.unwrap().rows[0].origin
    };
    let minute = Some(Duration::from_secs(60));
    for (origin, passed) in [(Origin::Miss, 0), (Origin::Hit, 50), (Origin::Miss, 20)] {
        tokio::time::advance(Duration::from_secs(passed)).await;
        assert_eq!(ask("limited", "request", minute).await, origin, "{passed}");
        assert_eq!(ask("free", "request", minute).await, origin, "{passed}");
    }
    for (origin, passed) in [(Origin::Miss, 0), (Origin::Hit, 3400), (Origin::Miss, 200)] {
        tokio::time::advance(Duration::from_secs(passed)).await;
        // A request cannot lengthen the model's time.
        let day = Some(24 * hour);
        assert_eq!(ask("limited", "model", day).await, origin, "{passed}");
    }
    assert_eq!(ask("free", "model", None).await, Origin::Miss);
    tokio::time::advance(1000 * hour).await;
    assert_eq!(ask("free", "model", None).await, Origin::Hit, "without a time, it stays");
    assert_eq!(counter(&memo, "rejected_tags"), 0, "an expired label is no forgery");
}

#[tokio::test]
async fn each_model_can_have_a_byte_store_of_its_own() {
    let (memo, _) = bytes_memo();
    let of = |id: u8| {
        Function::new(ModelId::bytes("m", [id; 32]), 1, |rows| {
            Ok(rows.iter().map(|row| Answer::Bytes(row.repeat(100).into())).collect())
        })
    };
    let own = Arc::new(ByteStore::new(1 << 20, 1 << 16));
    memo.add_model("shared", of(1), ModelOptions::default());
    memo.add_model_with_store("own", of(2), ModelOptions::default(), Arc::clone(&own));
    let ask = async |model: &str, row: String| {
        memo.ask(Request::row(row).model(model)).await.unwrap().rows[0].origin
    };
    assert_eq!(ask("shared", "kept".into()).await, Origin::Miss);
    let before = own.stats().bytes;
    // Far more than its own store has room for.
    for i in 0..3000 {
        ask("own", format!("row {i}")).await;
    }
    assert!(own.stats().evicted > 0 && own.stats().bytes > before);
    assert_eq!(ask("shared", "kept".into()).await, Origin::Hit, "it evicts no other model's");
    assert_eq!(ask("own", "row 2999".into()).await, Origin::Hit);
    memo.forget("own", b"row 2999").unwrap();
    assert_eq!(ask("own", "row 2999".into()).await, Origin::Miss);
    memo.flush("own").unwrap();
    assert_eq!(ask("own", "row 2999".into()).await, Origin::Miss);
    assert_eq!(ask("shared", "kept".into()).await, Origin::Hit);
    let mut stats = Stats::default();
    memo.stats(&mut stats);
    assert!(matches!(stats.get("byte_store_capacity_bytes"), Some(
        afterimage_wire::proto::stats::Value::Gauge(capacity)) if *capacity == 9 << 20));
}

#[tokio::test]
async fn requests_that_break_a_limit_name_it() {
    let store = Arc::new(ByteStore::new(1 << 20, 1 << 16));
    let memo = Memo::of_bytes(store, options().max_waiting_bytes(100).max_waiting(2));
    memo.add_model("m", capitals(1).0, ModelOptions::default());
    let refusal = async |request| {
        let Failure { status, text, .. } = memo.ask(request).await.unwrap_err();
        (status, text.into_owned())
    };
    let none = refusal(Request::rows(Vec::<Bytes>::new())).await;
    assert_eq!(
        none,
        (Status::BadArgument, "the request has 0 rows; the range is 1 to 65536".into())
    );
    let large = refusal(Request::row(vec![b'x'; 101])).await;
    let text = "the row has 101 bytes; waiting rows hold 0 of 100 bytes: the limit is reached";
    assert_eq!(large, (Status::Overloaded, text.into()));
    let many = refusal(Request::rows(["a", "b", "c"])).await;
    assert_eq!(many.0, Status::Overloaded, "{}", many.1);
    let mut request = Request::row("a");
    request.version = "7".into();
    let version = refusal(request).await;
    let text = "model \"m\" has version \"\", not \"7\"";
    assert_eq!(version, (Status::BadArgument, text.into()));
    // The limits count the rows that wait now.
    while memo.in_flight() != (0, 0) {
        tokio::task::yield_now().await;
    }
    for i in 0..20 {
        memo.ask(Request::row(format!("{i:0>90}"))).await.unwrap();
    }
}

/// An upstream that misbehaves as its row says, in the caller's thread.
struct Rogue(Arc<ModelId>);

impl Upstream for Rogue {
    fn model(&self) -> Option<Arc<ModelId>> {
        Some(Arc::clone(&self.0))
    }

    fn compute(&self, calls: Vec<Call>) {
        for call in calls {
            let answer = |answers: Vec<&'static str>| {
                let answers: Rows<_> =
                    answers.into_iter().map(|text| Answer::Bytes(text.into())).collect();
                Ok(Computed { model: Arc::clone(&self.0), answers })
            };
            let row = call.rows[0].clone();
            let rows = call.rows.len();
            let sent = match &row[..] {
                b"panics" => panic!("planned"),
                b"drops" => continue,
                b"label" => {
                    let answers = Rows::from_elem(Answer::Label(1), rows);
                    call.reply.send(Ok(Computed { model: Arc::clone(&self.0), answers }))
                }
                b"none" => call.reply.send(answer(vec![])),
                b"two" => call.reply.send(answer(vec!["1", "2"])),
                b"large" => call
                    .reply
                    .send(answer(vec!["an answer above the limit of this model, which is small"])),
                b"other model" => {
                    let other = Arc::new(ModelId::bytes("rogue", [9; 32]));
                    let answers = Rows::from_elem(Answer::Bytes("x".into()), rows);
                    call.reply.send(Ok(Computed { model: other, answers }))
                }
                _ => call.reply.send(answer(vec!["fine"; rows])),
            };
            assert!(sent);
        }
    }

    fn stats(&self, _: &mut Stats) {}
}

#[tokio::test]
async fn an_upstream_that_misbehaves_costs_its_rows_and_nothing_else() {
    let (memo, store) = bytes_memo();
    let mut limited = ModelOptions::default();
    limited.max_answer_bytes = 20;
    memo.add_model("m", Rogue(Arc::new(ModelId::bytes("rogue", [1; 32]))), limited);
    for (row, status, part) in [
        ("drops", Status::Internal, "without an answer"),
        ("label", Status::UpstreamCorrupt, "not of the model's kind"),
        ("none", Status::UpstreamCorrupt, "answers"),
        ("two", Status::UpstreamCorrupt, "answers"),
        ("large", Status::UpstreamCorrupt, "limit is 20"),
        ("other model", Status::ShuttingDown, "model has changed"),
    ] {
        for request in [Request::row(row), Request::rows([row, "second"])] {
            let failure = memo.ask(request.clone()).await;
            // Two answers are right for two rows.
            if row == "two" && request.rows.len() == 2 {
                failure.unwrap();
                continue;
            }
            let failure = failure.unwrap_err();
            assert_eq!(failure.status, status, "{row}: {failure}");
            assert!(failure.text.contains(part), "{row}: {failure}");
        }
    }
    // A panic in the upstream unwinds through `submit`; the flight still ends, and the reply comes.
    for rows in [vec!["panics"], vec!["panics", "b"]] {
        let (sender, outcome) = std::sync::mpsc::channel();
        let reply = Reply::call(move |outcome| sender.send(outcome).unwrap());
        let submit = std::panic::AssertUnwindSafe(|| memo.submit(Request::rows(rows), reply));
        assert!(std::panic::catch_unwind(submit).is_err());
        let failure: Failure = outcome.recv().unwrap().map(|_: Response| ()).unwrap_err();
        assert_eq!(failure, Failure::abandoned());
        assert_eq!(memo.in_flight(), (0, 0), "no flight is left");
    }
    assert_eq!(memo.ask(Request::row("fine")).await.unwrap().rows[0].origin, Origin::Miss);
    assert!(store.stats().entries >= 1);
}

#[tokio::test]
async fn a_call_that_all_clients_have_left_is_not_computed() {
    let (memo, _) = bytes_memo();
    let computed = Arc::new(AtomicUsize::new(0));
    let (open, gate) = std::sync::mpsc::channel::<()>();
    let (counted, gate) = (Arc::clone(&computed), Mutex::new(gate));
    let slow = Function::new(ModelId::bytes("slow", [1; 32]), 1, move |rows: &[Bytes]| {
        if rows[0] == "first" {
            let _ = gate.lock().unwrap().recv();
        }
        counted.fetch_add(1, SeqCst);
        Ok(vec![Answer::Bytes("done".into()); rows.len()])
    });
    memo.add_model("m", slow, ModelOptions::default());
    let first = tokio::spawn({
        let memo = memo.clone();
        async move { memo.ask(Request::row("first")).await }
    });
    while counter(&memo, "classifier_calls") == 0 {
        tokio::task::yield_now().await;
    }
    // The only thread is busy. These calls are withdrawn, one by its deadline and one with its
    // future.
    let soon = Instant::now() + Duration::from_millis(20);
    let late = memo.ask(Request::row("late").deadline(soon)).await.unwrap_err();
    assert_eq!(late.status, Status::DeadlineExceeded);
    let withdrawn = memo.ask(Request::row("withdrawn"));
    assert!(tokio::time::timeout(Duration::from_millis(20), withdrawn).await.is_err());
    let waits = tokio::spawn({
        let memo = memo.clone();
        async move { memo.ask(Request::row("waits")).await }
    });
    while counter(&memo, "classifier_calls") < 4 {
        tokio::task::yield_now().await;
    }
    drop(open);
    first.await.unwrap().unwrap();
    waits.await.unwrap().unwrap();
    assert_eq!(computed.load(SeqCst), 2, "the first one and the one that waits");
    assert_eq!(counter(&memo, "classifier_calls_dropped"), 2);
    assert_eq!(counter(&memo, "abandoned"), 1);
    assert_eq!(memo.in_flight(), (0, 0));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn ten_thousand_equal_requests_make_one_call() {
    let (memo, _) = bytes_memo();
    let (model, calls) = capitals(1);
    memo.add_model("m", model, ModelOptions::default());
    let tasks: Vec<_> = (0..10_000)
        .map(|_| {
            let memo = memo.clone();
            tokio::spawn(async move { memo.ask(Request::row("same")).await.unwrap() })
        })
        .collect();
    let mut origins = std::collections::BTreeMap::new();
    for task in tasks {
        *origins.entry(task.await.unwrap().rows[0].origin).or_insert(0) += 1;
    }
    assert_eq!(calls.lock().unwrap().len(), 1);
    assert_eq!(origins[&Origin::Miss], 1, "{origins:?}");
    assert_eq!(origins.values().sum::<i32>(), 10_000);
}

/// The names of a memo's statistics.
fn names(memo: &Memo) -> Vec<String> {
    let mut stats = Stats::default();
    memo.stats(&mut stats);
    memo.admin_stats(&mut stats);
    stats.entries.into_iter().map(|(name, _)| name).collect()
}

#[tokio::test]
async fn every_described_metric_is_reported_and_the_reverse() {
    use afterimage_cache::metrics as cache;
    use afterimage_memo::pool::Pool;
    use afterimage_memo::store::{Disk, Redis, RemoteStore, StoreOfBytes, StoreOptions};
    use afterimage_wire::{Client, ClientOptions};

    let audited = options().audit(std::num::NonZeroU32::new(10)).auto_bypass(true);
    let bytes = Arc::new(ByteStore::new(8 << 20, 1 << 20));
    let redis = Redis::connect_lazy("redis://127.0.0.1:1", Default::default()).unwrap();
    let remote = Store::Remote(RemoteStore::new(redis, StoreOptions::default()));
    let pool = Memo::new(remote, Some(bytes), audited);
    let client = Client::connect_lazy("127.0.0.1:1", ClientOptions::new());
    pool.add_model("m", Pool::new(client, Duration::from_secs(1)), ModelOptions::default());
    let table = Arc::new(Table::new(Capacity::Entries(1000)).unwrap());
    let function = Memo::new(Store::Embedded(table, None), None, options());
    function.add_model("m", capitals(1).0, ModelOptions::default());
    let folder = tempfile::tempdir().unwrap();
    let log = afterimage_cache::DiskLog::open(folder.path(), 1 << 20).unwrap();
    let disk = Disk::start(Arc::new(ByteStore::new(1 << 20, 1 << 16)), log).unwrap();
    let disk = StoreOfBytes::Remote(RemoteStore::new(disk, StoreOptions::for_bytes()));
    let disk = Memo::of_bytes(disk, options());

    let reported = [names(&pool), names(&function), names(&disk)].concat();
    let described = afterimage_memo::metrics::METRICS;
    for metric in described {
        assert!(reported.iter().any(|name| metric.has_name(name)), "{} is unused", metric.name);
    }
    for name in &reported {
        let is_described =
            cache::METRICS.iter().chain(described).any(|metric| metric.has_name(name));
        assert!(is_described, "{name} has no description");
    }
}

/// A store of labels that answers at once and from this process, as one across the network would.
#[derive(Clone, Debug, Default)]
struct Shelf {
    labels: Arc<Mutex<HashMap<u64, i64>>>,
    /// The number of keys in each lookup of several.
    lookups: Arc<Mutex<Vec<usize>>>,
}

impl Backend for Shelf {
    fn name(&self) -> &'static str {
        "shelf"
    }

    fn is_connected(&self) -> bool {
        true
    }

    fn get_many(&self, keys: &[u64], _: Duration, then: Callback) {
        if keys.len() > 1 {
            self.lookups.lock().unwrap().push(keys.len());
        }
        let labels = self.labels.lock().unwrap();
        let values = keys.iter().map(|key| labels.get(key).copied()).collect();
        drop(labels);
        then(Some(values));
    }

    fn set(&self, key: u64, value: i64, _: Keep) {
        self.labels.lock().unwrap().insert(key, value);
    }
}

#[tokio::test]
async fn unknown_labels_of_a_remote_store_make_one_call() {
    let shelf = Shelf::default();
    let store = Store::Remote(RemoteStore::new(shelf.clone(), StoreOptions::default()));
    let memo = Memo::new(store, None, options());
    let calls = Calls::default();
    let seen = Arc::clone(&calls);
    // The label is the number in the row.
    let model = Function::new(ModelId::labels([1; 32], None, 1000), 1, move |rows| {
        seen.lock().unwrap().push(rows.to_vec());
        let label = |row: &Bytes| u16::from_le_bytes(row[..].try_into().unwrap());
        Ok(rows.iter().map(|row| Answer::Label(label(row))).collect())
    });
    memo.add_model("m", model, ModelOptions::default());
    let row = |i: u16| Bytes::copy_from_slice(&i.to_le_bytes());
    // More rows than one batch of lookups has.
    let known: Vec<u16> = (0..200).filter(|i| i % 3 == 0).collect();
    let request = Request::rows(known.iter().map(|&i| row(i))).model("m");
    memo.ask(request).await.unwrap();
    let response = memo.ask(Request::rows((0..200).map(row)).model("m")).await.unwrap();
    for (i, answer) in response.rows.iter().enumerate() {
        let origin = if i % 3 == 0 { Origin::Hit } else { Origin::Miss };
        assert_eq!((&answer.answer, answer.origin), (&Answer::Label(i as u16), origin), "row {i}");
    }
    let unknown = (0..200).filter(|i| i % 3 != 0).map(row).collect::<Vec<_>>();
    let known: Vec<_> = known.into_iter().map(row).collect();
    assert_eq!(*calls.lock().unwrap(), [known, unknown]);
    // One lookup for each request. The first one brings the epoch and its floor along.
    assert_eq!(*shelf.lookups.lock().unwrap(), [69, 200]);
}

/// An upstream that does not keep the `Arc` of its model.
struct Forgetful;

impl Upstream for Forgetful {
    fn model(&self) -> Option<Arc<ModelId>> {
        Some(Arc::new(ModelId::labels([1; 32], None, 10)))
    }

    fn compute(&self, calls: Vec<Call>) {
        for call in calls.into_iter().flat_map(Call::scatter) {
            call.send_label(7);
        }
    }

    fn stats(&self, _: &mut Stats) {}
}

#[tokio::test]
async fn an_equal_model_in_another_arc_is_the_same_model() {
    let table = Arc::new(Table::new(Capacity::Entries(100)).unwrap());
    let service = MemoService::new(Store::Embedded(table, None), Forgetful, options());
    let generation = service.generation();
    assert_eq!((service.generation(), service.generation()), (generation, generation));
    for origin in [Origin::Miss, Origin::Hit, Origin::Hit] {
        let response = service.memo().ask(Request::row("x")).await.unwrap();
        assert_eq!(
            (&response.rows[0].answer, response.rows[0].origin),
            (&Answer::Label(7), origin)
        );
    }
    assert_eq!(counter(service.memo(), "models_met"), 1);
}
