//! One call for identical requests in flight, in all cases of failure and departure.

use std::sync::Arc;
use std::time::{Duration, Instant};

use afterimage_cache::{CacheService, Capacity, Table};
use afterimage_memo::{MemoOptions, MemoService, Store};
use afterimage_wire::client::CallOptions;
use afterimage_wire::proto::message::{Classification, Origin};
use afterimage_wire::server::Op;
use afterimage_wire::{Client, ClientOptions, Status};

use crate::common::{PATIENCE, counter, until};
use crate::{Puppet, embedded, label, memo, remote, secret, serve, status, table};

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
            let stats = client.admin().stats().await.unwrap();
            stats.get("waiting") == Some(&afterimage_wire::proto::stats::Value::Gauge(2000))
        })
        .await;
        puppet.release();
        let mut computed = 0;
        for call in calls {
            let Classification { label: class, origin } = call.await.unwrap();
            assert_eq!(class, 9);
            computed += usize::from(origin == Origin::Miss);
        }
        assert_eq!((computed, puppet.calls() - before), (1, 1));
        assert_eq!(counter(&client, "store_writes").await, 1);
        assert_eq!(counter(&client, "coalesced").await, 1999);
    }
}

/// Handles a batch of one on this thread, without a network. Only some hundred instructions then
/// separate the lookup from joining a flight, so threads do meet there.
#[test]
fn requests_racing_with_a_completion_make_no_second_call() {
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
async fn the_call_outlives_the_first_caller() {
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
    // The budget of the first waiter may expire before or after the second waiter joins.
    let answer = second.await.unwrap();
    assert!(answer.label == 3 && answer.origin != Origin::Hit, "{answer:?}");
    assert_eq!(client.classify(&[3; 4]).await.unwrap(), label(3, Origin::Hit));
    assert_eq!(puppet.calls(), 1);
}

#[tokio::test]
async fn the_call_outlives_the_first_connection() {
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
    assert_eq!(second.classify(&[3; 4]).await.unwrap(), label(3, Origin::Hit));
    assert_eq!((puppet.calls(), counter(&second, "store_writes").await), (1, 1));
}

#[tokio::test]
async fn a_failure_reaches_all_waiters_and_is_not_stored() {
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
        assert_eq!(client.classify(&[4; 4]).await.unwrap(), label(4, Origin::Miss));
        assert_eq!(client.classify(&[4; 4]).await.unwrap(), label(4, Origin::Hit));
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
    assert!(error.contains("dropped the request without an answer"), "{error}");
}

#[tokio::test]
async fn a_budget_ends_the_wait_but_not_the_call() {
    let puppet = Puppet::new();
    let store = Store::Embedded(table(), None);
    let service = MemoService::new(store, puppet.clone(), MemoOptions::new(secret()));
    let running = serve(service, "127.0.0.1:0").await;
    puppet.hold();
    // A raw client, because our client ends the request by itself.
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
async fn past_the_cap_misses_are_overloaded_at_once_and_hits_go_on() {
    let puppet = Puppet::new();
    let options = MemoOptions::new(secret()).max_waiting(3);
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
    assert_eq!(client.classify(&[50; 4]).await.unwrap(), label(50, Origin::Hit));
    puppet.release();
    for (i, call) in waiting.into_iter().enumerate() {
        assert_eq!(call.await.unwrap(), label(i as u16, Origin::Miss));
    }
    assert_eq!(client.classify(&[9; 4]).await.unwrap(), label(9, Origin::Miss));
}
