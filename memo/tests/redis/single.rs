//! One Redis server, or one and its replica: failures, and answers of bytes with prefixes and times
//! to live.

use std::sync::Arc;
use std::sync::atomic::Ordering::SeqCst;
use std::sync::atomic::{AtomicU16, AtomicUsize, Ordering};
use std::time::Duration;

use afterimage_core::{Answer, ModelId, Origin};
use afterimage_memo::store::{
    OfBytes, Redis, RedisOptions, RemoteStore, StoreOfBytes, StoreOptions,
};
use afterimage_memo::upstream::Function;
use afterimage_memo::{CHECK_EVERY, Memo, MemoOptions, ModelOptions, Request, Secret};
use afterimage_wire::proto::stats::Value;
use bytes::Bytes;
use redis::Commands;
use tokio::net::{TcpListener, TcpStream};

use crate::node::{Node, installed};
use crate::trouble::is_bypassed;
use crate::trouble::until_back;
use crate::{ask, counter, memo, memo_of, stats, until};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_redis_that_dies_fails_no_request_and_is_used_again() {
    if !installed("the test of a single Redis") {
        return;
    }
    let mut node = Node::start();
    node.until_up().await;
    let client = memo(&format!("redis://{}", node.addr())).await;
    until("all answers are stored", async || ask(&client, 0..100).await == 100).await;
    assert_eq!(node.keys(), 100);

    node.kill();
    assert_eq!(ask(&client, 0..100).await, 0);
    is_bypassed(&client).await;
    node.restart();
    node.until_it_listens().await;
    until_back(&client).await;
    until("all answers are stored again", async || ask(&client, 0..100).await == 100).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nonsense_under_our_keys_is_a_miss_and_put_right() {
    if !installed("the test of nonsense in Redis") {
        return;
    }
    let node = Node::start();
    node.until_up().await;
    let client = memo(&format!("redis://{}", node.addr())).await;
    until("all answers are stored", async || ask(&client, 0..100).await == 100).await;

    let server = redis::Client::open(format!("redis://{}", node.addr())).unwrap();
    let mut others = server.get_connection().unwrap();
    let keys: Vec<Vec<u8>> = others.keys("ai:*").unwrap();
    assert_eq!(keys.len(), 100);
    // Wrong lengths, a wrong type, and eight bytes that no memo has sealed.
    for (i, key) in keys.iter().enumerate() {
        let (): () = others.del(key).unwrap();
        let (): () = match i % 7 {
            0 => others.set(key, b"").unwrap(),
            1 => others.set(key, b"1234567").unwrap(),
            2 => others.set(key, b"123456789").unwrap(),
            3 => others.set(key, vec![b'x'; 1 << 20]).unwrap(),
            4 => others.lpush(key, "a list").unwrap(),
            5 => others.hset(key, "a", "hash").unwrap(),
            _ => others.set(key, b"nonsense").unwrap(),
        };
    }
    // `ask` fails at a wrong label.
    assert_eq!(ask(&client, 0..100).await, 0);
    until("all answers are stored again", async || ask(&client, 0..100).await == 100).await;
    assert_eq!(counter(&client, "rejected_tags").await, 100 / 7);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn takes_a_restricted_user_and_a_database_from_the_url() {
    if !installed("the test of a Redis user") {
        return;
    }
    let node = Node::start();
    node.until_up().await;
    // All rights that a memo needs.
    let user = ["acl", "setuser", "memo", "on", ">p@ss:w/rd", "~ai:*", "-@all", "+mget", "+mset"];
    assert_eq!(node.cli(&[&user[..], &["+select", "+@connection"]].concat()).trim(), "OK");
    assert_eq!(node.cli(&["acl", "setuser", "default", "-@all", "+acl", "+dbsize"]).trim(), "OK");

    let client = memo(&format!("redis://memo:p%40ss%3Aw%2Frd@{}/2", node.addr())).await;
    until("all answers are stored", async || ask(&client, 0..50).await == 50).await;
    assert_eq!(node.cli(&["acl", "setuser", "default", "+@all"]).trim(), "OK");
    assert_eq!(node.cli(&["-n", "2", "dbsize"]).trim(), "50");
    assert_eq!(node.keys(), 0);

    let stranger = memo(&format!("redis://memo:wrong@{}/2", node.addr())).await;
    assert_eq!(ask(&stranger, 0..50).await, 0);
    assert_eq!(stats(&stranger).await.get("store_connected"), Some(&Value::Text("no".into())));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_replica_is_read_and_its_refusal_of_writes_is_told() {
    if !installed("the test of a Redis replica") {
        return;
    }
    let (primary, replica) = (Node::start(), Node::start());
    primary.until_up().await;
    replica.until_up().await;
    replica.cli(&["replicaof", "127.0.0.1", &primary.port.to_string()]);
    let writer = memo(&format!("redis://{}", primary.addr())).await;
    until("all answers are stored", async || ask(&writer, 0..50).await == 50).await;

    let client = memo(&format!("redis://{}", replica.addr())).await;
    until("what the primary has is read", async || ask(&client, 0..50).await == 50).await;
    until("a write is refused, and counted", async || {
        ask(&client, 50..60).await;
        counter(&client, "store_writes_failed").await > 0
    })
    .await;
    assert_eq!(primary.keys(), 50);
    // The replica takes over.
    replica.cli(&["replicaof", "no", "one"]);
    until("writes are taken", async || ask(&client, 50..60).await == 10).await;
}

/// A virtual address: it forwards connections to the server that is set at the time.
async fn virtual_address(port: Arc<AtomicU16>) -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let own = listener.local_addr().unwrap().port();
    tokio::spawn(async move {
        while let Ok((mut near, _)) = listener.accept().await {
            let port = port.load(Ordering::Relaxed);
            tokio::spawn(async move {
                let mut far = TcpStream::connect(("127.0.0.1", port)).await.unwrap();
                let _ = tokio::io::copy_bidirectional(&mut near, &mut far).await;
            });
        }
    });
    own
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn after_a_failover_behind_one_address_the_new_primary_is_found() {
    if !installed("the test of a failover") {
        return;
    }
    let (first, second) = (Node::start(), Node::start());
    first.until_up().await;
    second.until_up().await;
    let behind = Arc::new(AtomicU16::new(first.port));
    let address = virtual_address(Arc::clone(&behind)).await;
    let client = memo(&format!("redis://127.0.0.1:{address}")).await;
    until("all answers are stored", async || ask(&client, 0..20).await == 20).await;
    // The roles change and the connections stay. The old primary answers, and refuses writes.
    first.cli(&["replicaof", "127.0.0.1", &second.port.to_string()]);
    behind.store(second.port, Ordering::Relaxed);
    until("the new one is written to", async || {
        ask(&client, 100..120).await;
        second.keys() >= 20
    })
    .await;
    until("and read", async || ask(&client, 100..120).await == 20).await;
}

/// A memo whose model repeats each row once, and the number of rows that the model has computed.
fn memo_of_rows(
    url: &str,
    options: RedisOptions,
    ttl: Option<Duration>,
) -> (Memo, Arc<AtomicUsize>) {
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
async fn ask_rows(memo: &Memo, rows: &[Vec<u8>]) -> usize {
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
    let new = || memo_of_rows(&url, RedisOptions::default(), None);
    let ((one, _), (other, _)) = (new(), new());
    // Up to 1 MiB each, and one of almost 16 MiB: no command, but a limit of the reply.
    let mut rows = rows(100);
    rows.push(vec![7; (8 << 20) - 100]);
    let all = rows.len();
    until("all is stored", async || ask_rows(&one, &rows).await == all).await;
    until("the other memo has hits", async || ask_rows(&other, &rows).await == all).await;
    assert_eq!(node.keys(), all);

    one.forget("m", &rows[0]).unwrap();
    one.flush("m").unwrap();
    assert_eq!(ask_rows(&one, &rows[..3]).await, 0);
    tokio::time::sleep(CHECK_EVERY).await;
    // Its next lookup reads the epoch; the one after that uses the new keys.
    ask_rows(&other, &rows[..1]).await;
    until("the new answers are shared", async || ask_rows(&other, &rows[..3]).await == 3).await;
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
    let new = || memo_of_rows(&url, RedisOptions::default(), Some(Duration::from_secs(600)));
    let ((one, _), (other, computed)) = (new(), new());
    let rows = rows(200);
    until("all is stored", async || ask_rows(&one, &rows).await == 200).await;
    until("the other memo has hits", async || ask_rows(&other, &rows).await == 200).await;
    let sizes: Vec<usize> = nodes.iter().map(Node::keys).collect();
    assert_eq!(sizes.iter().sum::<usize>(), 200);
    assert!(sizes.iter().all(|&size| size > 20), "every node has its share: {sizes:?}");
    let before = computed.load(SeqCst);
    other.flush("m").unwrap();
    assert_eq!(ask_rows(&other, &rows[..5]).await, 0);
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
    let ((one, _), (other, _)) =
        (memo_of_rows(&url, with("one:"), None), memo_of_rows(&url, with("other:"), None));
    let rows = rows(10);
    until("all is stored", async || ask_rows(&one, &rows).await == 10).await;
    assert_eq!(ask_rows(&other, &rows[..5]).await, 0, "another prefix");
    let labels = memo_of(&url, with("one:")).await;
    until("labels are stored", async || ask(&labels, 0..7).await == 7).await;
    until("each has its keys", async || {
        let script = "return #redis.call('keys', ARGV[1])";
        let count = |pattern| node.cli(&["eval", script, "0", pattern]).trim().to_owned();
        [count("one:*"), count("other:*"), count("ai:*")] == ["17", "5", "0"]
    })
    .await;
    assert_eq!(ask_rows(&one, &rows).await, 10);
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
    let (short, _) = memo_of_rows(&url, of_redis(), Some(Duration::from_secs(50)));
    until("bytes are stored", async || ask_rows(&short, &rows(3)).await == 3).await;
    let labels = memo_of(&url, of_redis()).await;
    until("labels are stored", async || ask(&labels, 0..4).await == 4).await;
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
    // An epoch outlives the answers that it deletes.
    short.flush("m").unwrap();
    until("the epoch is stored", async || times().first() == Some(&-1)).await;

    let (brief, _) = memo_of_rows(&url, of_redis(), Some(Duration::from_secs(1)));
    let row = [vec![200; 9]];
    until("it is stored", async || ask_rows(&brief, &row).await == 1).await;
    tokio::time::sleep(Duration::from_millis(2100)).await;
    assert_eq!(ask_rows(&brief, &row).await, 0, "its time is over");
}
