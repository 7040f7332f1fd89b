//! Answers of bytes in Redis, prefixes of keys, and times to live.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};
use std::time::Duration;

use afterimage_core::{Answer, ModelId, Origin};
use afterimage_memo::store::{
    OfBytes, Redis, RedisOptions, RemoteStore, StoreOfBytes, StoreOptions,
};
use afterimage_memo::upstream::Function;
use afterimage_memo::{CHECK_EVERY, Memo, MemoOptions, ModelOptions, Request, Secret};
use bytes::Bytes;

use crate::node::{Node, installed};
use crate::{ask as ask_for_labels, memo_of, until};

/// A memo whose model repeats each row once, and the number of rows that the model has computed.
fn memo(url: &str, options: RedisOptions, ttl: Option<Duration>) -> (Memo, Arc<AtomicUsize>) {
    // A busy machine is not what these tests are about.
    let lookup_budget = Duration::from_secs(1);
    let limits = StoreOptions { lookup_budget, ..StoreOptions::for_bytes() };
    let redis = Redis::<OfBytes>::connect_lazy(url, options).unwrap();
    let store = StoreOfBytes::Remote(RemoteStore::new(redis, limits));
    let memo = Memo::of_bytes(store, MemoOptions::new(Secret::new([7; 32])));
    let computed = Arc::new(AtomicUsize::new(0));
    let rows_computed = Arc::clone(&computed);
    let twice = Function::new(ModelId::bytes("twice", [5; 32]), 1, move |rows| {
        rows_computed.fetch_add(rows.len(), SeqCst);
        Ok(rows.iter().map(|row| Answer::Bytes([&row[..], row].concat().into())).collect())
    });
    let mut of_model = ModelOptions::default();
    of_model.ttl = ttl;
    memo.add_model("m", twice, of_model);
    (memo, computed)
}

/// Asks for these rows in one request, checks the answers, and returns the number of hits.
async fn ask(memo: &Memo, rows: &[Vec<u8>]) -> usize {
    let request = Request::rows(rows.iter().cloned().map(Bytes::from)).model("m");
    let response = memo.ask(request).await.unwrap();
    let mut hits = 0;
    for (answer, row) in response.rows.iter().zip(rows) {
        assert!(answer.answer == Answer::Bytes([&row[..], row].concat().into()), "a wrong answer");
        hits += usize::from(answer.origin == Origin::Hit);
    }
    hits
}

fn rows(count: u8) -> Vec<Vec<u8>> {
    (0..count).map(|i| vec![i; 1 << (i % 20)]).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn memos_share_answers_of_bytes_through_redis() {
    if !installed("memos_share_answers_of_bytes_through_redis") {
        return;
    }
    let node = Node::start();
    node.until_up().await;
    let url = format!("redis://{}", node.addr());
    let new = || memo(&url, RedisOptions::default(), None);
    let ((one, _), (other, _)) = (new(), new());
    // Up to 1 MiB each, and one of almost 16 MiB: no command, but a limit of the reply.
    let mut rows = rows(100);
    rows.push(vec![7; (8 << 20) - 100]);
    let all = rows.len();
    until("all is stored", async || ask(&one, &rows).await == all).await;
    until("the other memo has hits", async || ask(&other, &rows).await == all).await;
    assert_eq!(node.keys(), all);

    one.forget("m", &rows[0]).unwrap();
    one.flush("m").unwrap();
    assert_eq!(ask(&one, &rows[..3]).await, 0);
    tokio::time::sleep(CHECK_EVERY).await;
    // Its next lookup reads the epoch; the one after that uses the new keys.
    ask(&other, &rows[..1]).await;
    until("the new answers are shared", async || ask(&other, &rows[..3]).await == 3).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cluster_stores_answers_of_bytes() {
    if !installed("a_cluster_stores_answers_of_bytes") {
        return;
    }
    let nodes: Vec<Node> = (0..3).map(|_| Node::start_for_cluster()).collect();
    crate::cluster::form_cluster(&nodes).await;
    let addrs: Vec<String> = nodes.iter().map(Node::addr).collect();
    let url = format!("redis+cluster://{}", addrs.join(","));
    let new = || memo(&url, RedisOptions::default(), Some(Duration::from_secs(600)));
    let ((one, _), (other, computed)) = (new(), new());
    let rows = rows(200);
    until("all is stored", async || ask(&one, &rows).await == 200).await;
    until("the other memo has hits", async || ask(&other, &rows).await == 200).await;
    let sizes: Vec<usize> = nodes.iter().map(Node::keys).collect();
    assert_eq!(sizes.iter().sum::<usize>(), 200);
    assert!(sizes.iter().all(|&size| size > 20), "every node has its share: {sizes:?}");
    let before = computed.load(SeqCst);
    other.flush("m").unwrap();
    assert_eq!(ask(&other, &rows[..5]).await, 0);
    assert_eq!(computed.load(SeqCst), before + 5);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn prefixes_separate_memos_and_kinds_of_answers() {
    if !installed("prefixes_separate_memos_and_kinds_of_answers") {
        return;
    }
    let node = Node::start();
    node.until_up().await;
    let url = format!("redis://{}", node.addr());
    let with = |prefix: &str| RedisOptions { prefix: prefix.into(), ..RedisOptions::default() };
    let ((one, _), (other, _)) = (memo(&url, with("one:"), None), memo(&url, with("other:"), None));
    let rows = rows(10);
    until("all is stored", async || ask(&one, &rows).await == 10).await;
    assert_eq!(ask(&other, &rows[..5]).await, 0, "another prefix");
    let labels = memo_of(&url, with("one:")).await;
    until("labels are stored", async || ask_for_labels(&labels, 0..7).await == 7).await;
    until("each has its keys", async || {
        let script = "return #redis.call('keys', ARGV[1])";
        let count = |pattern| node.cli(&["eval", script, "0", pattern]).trim().to_owned();
        [count("one:*"), count("other:*"), count("ai:*")] == ["17", "5", "0"]
    })
    .await;
    assert_eq!(ask(&one, &rows).await, 10);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn redis_drops_answers_after_their_time_and_keeps_epochs() {
    if !installed("redis_drops_answers_after_their_time_and_keeps_epochs") {
        return;
    }
    let node = Node::start();
    node.until_up().await;
    let url = format!("redis://{}", node.addr());
    let ttl = Some(Duration::from_secs(100));
    let of_redis = || RedisOptions { ttl, ..RedisOptions::default() };
    // The shorter of both times counts for answers of bytes; labels have that of Redis.
    let (short, _) = memo(&url, of_redis(), Some(Duration::from_secs(50)));
    until("bytes are stored", async || ask(&short, &rows(3)).await == 3).await;
    let labels = memo_of(&url, of_redis()).await;
    until("labels are stored", async || ask_for_labels(&labels, 0..4).await == 4).await;
    let times = || {
        let script = "local times = {} for _, key in ipairs(redis.call('keys', 'ai:*')) do \
                      times[#times + 1] = redis.call('ttl', key) end return times";
        let lines = node.cli(&["eval", script, "0"]);
        let mut times: Vec<i64> = lines.lines().filter_map(|line| line.parse().ok()).collect();
        times.sort_unstable();
        times
    };
    let found = times();
    assert_eq!(found.len(), 7, "{found:?}");
    assert!(found[..3].iter().all(|time| (1..=50).contains(time)), "{found:?}");
    assert!(found[3..].iter().all(|time| (51..=100).contains(time)), "{found:?}");
    // An epoch outlives the answers that it takes back.
    short.flush("m").unwrap();
    until("the epoch is stored", async || times().first() == Some(&-1)).await;

    let (brief, _) = memo(&url, of_redis(), Some(Duration::from_secs(1)));
    let row = [vec![200; 9]];
    until("it is stored", async || ask(&brief, &row).await == 1).await;
    tokio::time::sleep(Duration::from_millis(2100)).await;
    assert_eq!(ask(&brief, &row).await, 0, "its time is over");
}
