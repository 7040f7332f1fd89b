//! A Redis that hangs, is slow or is missing: it costs the lookup budget a few times, then nothing,
//! and is used again when it is back.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use afterimage_memo::store::{RedisOptions, StoreOptions};
use afterimage_wire::Client;
use afterimage_wire::proto::message::Origin;
use afterimage_wire::proto::stats::Value;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

use crate::node::{Node, installed};
use crate::recovery::until_back;
use crate::{ask, memo, memo_within, stats, until};

/// Sends requests until the breaker is open. Then checks that only a probe now and then waits for
/// the store.
pub(crate) async fn is_bypassed(client: &Client) {
    until("the breaker opens", async || {
        ask(client, 0..4).await;
        stats(client).await.get("store_breaker") == Some(&Value::Text("open".into()))
    })
    .await;
    let before = stats(client).await;
    let start = Instant::now();
    ask(client, 0..200).await;
    let elapsed = start.elapsed();
    let after = stats(client).await;
    let more = |name| after.counter_value(name) - before.counter_value(name);
    let (waited, bypassed) = (more("store_lookups"), more("store_lookups_bypassed"));
    assert_eq!(waited + bypassed, 200);
    // The probes: one at the start, and one after each pause.
    let probes = elapsed.div_duration_f64(StoreOptions::default().probe_every) as u64 + 1;
    assert!(waited <= probes, "{waited} of 200 requests waited, in {elapsed:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_hung_redis_is_bypassed_and_used_again_soon() {
    if !installed("the test of a Redis that hangs") {
        return;
    }
    let node = Node::start();
    node.until_up().await;
    let client = memo(&format!("redis://{}", node.addr())).await;
    until("all is remembered", async || ask(&client, 0..20).await == 20).await;
    node.signal("STOP");
    is_bypassed(&client).await;
    node.signal("CONT");
    until_back(&client).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_slow_redis_is_bypassed_until_it_is_fast_again() {
    if !installed("the test of a slow Redis") {
        return;
    }
    let node = Node::start();
    node.until_up().await;
    let delay_ms = Arc::new(AtomicU64::new(0));
    let port = slow_proxy(node.addr(), Arc::clone(&delay_ms)).await;
    let client = memo(&format!("redis://127.0.0.1:{port}")).await;
    until("all is remembered", async || ask(&client, 0..20).await == 20).await;
    // Longer than the lookup budget, and shorter than the time after which the server counts as
    // dead.
    delay_ms.store(500, Ordering::SeqCst);
    is_bypassed(&client).await;
    delay_ms.store(0, Ordering::SeqCst);
    until_back(&client).await;
}

/// A port that forwards to the server at `addr` and delays its replies.
async fn slow_proxy(addr: String, delay_ms: Arc<AtomicU64>) -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    tokio::spawn(async move {
        while let Ok((near, _)) = listener.accept().await {
            let Ok(far) = TcpStream::connect(&addr).await else { continue };
            let ((mut from_client, mut to_client), (mut from_server, mut to_server)) =
                (near.into_split(), far.into_split());
            let delay_ms = Arc::clone(&delay_ms);
            tokio::spawn(async move { tokio::io::copy(&mut from_client, &mut to_server).await });
            tokio::spawn(async move {
                let mut bytes = [0; 4096];
                while let Ok(len @ 1..) = from_server.read(&mut bytes).await {
                    let delay = Duration::from_millis(delay_ms.load(Ordering::SeqCst));
                    tokio::time::sleep(delay).await;
                    if to_client.write_all(&bytes[..len]).await.is_err() {
                        return;
                    }
                }
            });
        }
    });
    port
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_speaks_no_redis_costs_no_answer_and_soon_no_time() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            tokio::spawn(async move {
                let mut bytes = [0; 4096];
                while let Ok(1..) = stream.read(&mut bytes).await {
                    let _ = stream.write_all(b"HTTP/1.1 400 Bad Request\r\n\r\n").await;
                }
            });
        }
    });
    let client = memo(&format!("redis://127.0.0.1:{port}")).await;
    assert_eq!(ask(&client, 0..100).await, 0);
    is_bypassed(&client).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn ten_thousand_stored_inputs_at_once_are_as_many_hits() {
    const INPUTS: u32 = 10_000;
    if !installed("ten_thousand_stored_inputs_at_once_are_as_many_hits") {
        return;
    }
    let node = Node::start();
    node.until_up().await;
    // The defaults, or ten times that much time for a build without optimization.
    let mut limits = StoreOptions::default();
    if cfg!(debug_assertions) {
        limits.lookup_budget *= 10;
        limits.max_queue_wait *= 10;
    }
    let url = format!("redis://{}", node.addr());
    let client = memo_within(&url, RedisOptions::default(), limits).await;
    let burst = async || {
        let asked = (0..INPUTS).map(|number| {
            let client = client.clone();
            tokio::spawn(async move { client.classify(&number.to_le_bytes()).await.unwrap() })
        });
        let mut hits = 0;
        for (number, answer) in asked.collect::<Vec<_>>().into_iter().enumerate() {
            let answer = answer.await.unwrap();
            assert_eq!(answer.label, number as u16 % 256);
            hits += u32::from(answer.origin == Origin::Hit);
        }
        hits
    };
    until("the memo is connected", async || ask(&client, 200..202).await == 2).await;
    burst().await;
    until("all answers are stored", async || node.keys() >= INPUTS as usize).await;
    let before = stats(&client).await;
    assert_eq!(burst().await, INPUTS);
    let after = stats(&client).await;
    for name in ["store_breaker_opened", "store_lookups_failed"] {
        assert_eq!(after.counter_value(name), before.counter_value(name), "{name}");
    }
}
