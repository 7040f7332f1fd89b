//! One server, or one and its replica.

use std::sync::Arc;
use std::sync::atomic::{AtomicU16, Ordering};

use afterimage_wire::proto::stats::Value;
use redis::Commands;
use tokio::net::{TcpListener, TcpStream};

use crate::node::{Node, installed};
use crate::recovery::until_back;
use crate::trouble::is_bypassed;
use crate::{ask, counter, memo, stats, until};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_redis_that_dies_fails_no_request_and_is_used_again() {
    if !installed("the test of a single Redis") {
        return;
    }
    let mut node = Node::start();
    node.until_up().await;
    let client = memo(&format!("redis://{}", node.addr())).await;
    until("all is remembered", async || ask(&client, 0..100).await == 100).await;
    assert_eq!(node.keys(), 100);

    node.kill();
    assert_eq!(ask(&client, 0..100).await, 0);
    is_bypassed(&client).await;
    node.restart();
    node.until_it_listens().await;
    until_back(&client).await;
    until("all is remembered again", async || ask(&client, 0..100).await == 100).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nonsense_under_our_keys_is_a_miss_and_put_right() {
    if !installed("the test of nonsense in Redis") {
        return;
    }
    let node = Node::start();
    node.until_up().await;
    let client = memo(&format!("redis://{}", node.addr())).await;
    until("all is remembered", async || ask(&client, 0..100).await == 100).await;

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
    until("all is remembered again", async || ask(&client, 0..100).await == 100).await;
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
    until("all is remembered", async || ask(&client, 0..50).await == 50).await;
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
    until("all is remembered", async || ask(&writer, 0..50).await == 50).await;

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
    until("all is remembered", async || ask(&client, 0..20).await == 20).await;
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
