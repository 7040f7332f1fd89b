//! Deadlines, windows and limits on queued bytes.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use afterimage_wire::client::{CallOptions, Classified, ConnectionError, Reply, Stage};
use afterimage_wire::proto::{Kind, Message, Shape, Welcome};
use afterimage_wire::{CallError, Client, Status};
use bytes::Bytes;

use crate::{PATIENCE, label, options, pair, pair_with, pipes, soon, welcome};

fn in_20_ms() -> CallOptions {
    CallOptions::new().timeout(Duration::from_millis(20))
}

fn stage(error: &CallError) -> Stage {
    let CallError::DeadlineExceeded { stage, .. } = error else {
        panic!("{error} is not DeadlineExceeded");
    };
    assert_eq!(error.status(), Status::DeadlineExceeded);
    *stage
}

#[tokio::test]
async fn a_deadline_covers_connecting_queueing_and_the_reply() {
    let (connector, mut listener) = pipes(1 << 16);
    let client = Client::with_connector(connector, options().max_in_flight(1));
    let error = soon(client.classify_with(&[1], in_20_ms())).await.unwrap_err();
    assert_eq!(stage(&error), Stage::Connecting);

    let mut peer = listener.welcome().await;
    soon(client.connected(PATIENCE)).await.unwrap();
    let holder = tokio::spawn({
        let client = client.clone();
        async move { client.classify(&[2]).await }
    });
    let held = peer.expect(Kind::ClassifyReq).await;
    let error = soon(client.classify_with(&[3], in_20_ms())).await.unwrap_err();
    assert_eq!(stage(&error), Stage::Queued);

    peer.send(held, Message::ClassifyResp(label(2))).await;
    assert_eq!(soon(holder).await.unwrap().unwrap(), label(2));
    let error = soon(client.classify_with(&[4], in_20_ms())).await.unwrap_err();
    assert_eq!(stage(&error), Stage::AwaitingReply);
    // The queued request that timed out was never sent.
    assert_eq!(peer.next().await.body[0], 4);
    assert_eq!(client.counters().timeouts, 3);
}

#[tokio::test]
async fn the_smaller_window_limits_requests_in_flight() {
    for (ours, theirs, window) in [(3, 1000, 3), (1000, 3, 3), (0, 0, 1)] {
        let (client, mut peer, _listener) =
            pair_with(options().max_in_flight(ours), Welcome { window: theirs, ..welcome() }).await;
        let call = tokio::spawn({
            let client = client.clone();
            async move { client.cache().get_many(&[2; 100]).await }
        });
        for _ in 0..100 / window {
            let mut ids = Vec::new();
            for _ in 0..window {
                ids.push(peer.expect(Kind::CacheReq).await);
            }
            let early = tokio::time::timeout(Duration::from_millis(2), peer.try_next()).await;
            assert!(early.is_err(), "more than {window} in flight: {early:?}");
            for id in ids {
                peer.send(id, Message::CacheResp { value: Some(2) }).await;
            }
        }
        tokio::spawn(peer.serve());
        assert_eq!(soon(call).await.unwrap().unwrap(), [Some(2); 100]);
    }
}

#[tokio::test]
async fn a_timed_out_call_frees_its_window_slot() {
    let (client, mut peer, _listener) = pair(options().max_in_flight(1)).await;
    for n in 0..3 {
        let image = [n];
        let call = client.classify_with(&image, in_20_ms());
        let error = soon(call).await.unwrap_err();
        assert_eq!(stage(&error), Stage::AwaitingReply);
        assert_eq!(peer.next().await.body[0], n);
    }
}

#[tokio::test]
async fn a_peer_that_does_not_read_fills_only_a_bounded_queue() {
    let limit = 100_000;
    let (connector, mut listener) = pipes(1024);
    let client = Client::with_connector(connector, options().max_queued_bytes(limit));
    let peer = listener.welcome().await;
    soon(client.connected(PATIENCE)).await.unwrap();
    let (full, late) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
    for _ in 0..1000 {
        let (full, late) = (Arc::clone(&full), Arc::clone(&late));
        let reply = Reply::call(move |outcome: Classified| {
            match outcome.unwrap_err() {
                CallError::QueueFull { limit_bytes: 100_000, .. } => &full,
                CallError::DeadlineExceeded { .. } => &late,
                other => panic!("{other}"),
            }
            .fetch_add(1, Ordering::SeqCst);
        });
        client.submit_classify(&[0; 784], Duration::from_millis(100), reply);
        assert!(client.counters().queued_bytes <= limit as u64);
    }
    let refused = full.load(Ordering::SeqCst);
    assert!((800..1000).contains(&refused), "{refused} refused at once");
    let fits = (0..limit).take_while(|_| client.cache().set(1, 1).is_ok()).count();
    assert!(fits < 10_000, "{fits} writes fit into a full queue");
    soon(async {
        while client.counters().in_flight > 0 {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    })
    .await;
    assert_eq!(full.load(Ordering::SeqCst) + late.load(Ordering::SeqCst), 1000);
    drop(peer);
}

#[tokio::test]
async fn shared_images_count_as_queued_bytes() {
    let limit = 500_000;
    let welcome = Welcome { max_body: 1 << 20, ..welcome() };
    let (client, peer, _listener) = pair_with(options().max_queued_bytes(limit), welcome).await;
    let image = Bytes::from(vec![7; 50_000]);
    let full = Arc::new(AtomicUsize::new(0));
    for _ in 0..100 {
        let full = Arc::clone(&full);
        let reply = Reply::call(move |outcome: Classified| {
            let is_full = matches!(outcome, Err(CallError::QueueFull { .. }));
            full.fetch_add(usize::from(is_full), Ordering::SeqCst);
        });
        client.submit_classify_shared(&image, PATIENCE, reply);
        assert!(client.counters().queued_bytes <= limit as u64);
    }
    // No image leaves while this thread submits.
    assert_eq!(full.load(Ordering::SeqCst), 91);
    drop((client, peer));
}

#[tokio::test]
async fn cancelled_calls_free_their_queue_bytes() {
    let (connector, _listener) = pipes(1024);
    let client = Client::with_connector(connector, options().max_queued_bytes(10_000));
    for _ in 0..1000 {
        let short = CallOptions::new().timeout(PATIENCE);
        let call = client.classify_with(&[0; 5000], short);
        let gone = tokio::time::timeout(Duration::from_micros(1), call).await;
        assert!(gone.is_err());
    }
    assert_eq!(client.counters().queued_bytes, 0);
}

#[tokio::test]
async fn an_invalid_image_is_rejected_before_it_is_sent() {
    let shape = Shape::new(&[28, 28]).unwrap();
    let welcome = Welcome { shape, max_body: 4096, ..welcome() };
    let (client, peer, _listener) = pair_with(options(), welcome).await;
    let error = soon(client.classify(&[0; 5000])).await.unwrap_err();
    assert_eq!(error.to_string(), "the request is 5000 bytes; the server accepts at most 4096");
    assert_eq!(error.status(), Status::TooLarge);
    let error = soon(client.classify(&[0; 783])).await.unwrap_err();
    assert_eq!(error.to_string(), "the image is 783 bytes; the model takes 28×28 = 784");
    assert_eq!(error.status(), Status::BadArgument);
    assert_eq!(client.counters().sent, 0);
    tokio::spawn(peer.serve());
    assert_eq!(soon(client.classify(&[0; 784])).await.unwrap(), label(0));
}

#[tokio::test]
async fn a_queued_image_is_checked_against_the_welcome() {
    let (connector, mut listener) = pipes(1 << 16);
    let client = Client::with_connector(connector, options());
    let call = tokio::spawn({
        let client = client.clone();
        async move { client.classify(&[0; 5000]).await }
    });
    tokio::task::yield_now().await;
    let _peer = listener.welcome().await;
    let error = soon(call).await.unwrap().unwrap_err();
    assert!(matches!(error, CallError::TooLarge { bytes: 5000, limit: 4096 }), "{error}");
}

#[tokio::test]
async fn a_peer_that_does_not_answer_pings_is_lost() {
    let interval = Duration::from_millis(500);
    let (client, mut peer, mut listener) = pair(options().keepalive(Some(interval))).await;
    for _ in 0..2 {
        let ping = peer.next().await;
        assert_eq!(ping.header.kind, Kind::Ping);
        assert!(client.is_connected());
        peer.send(ping.header.id, Message::Pong(&[])).await;
    }
    let call = tokio::spawn({
        let client = client.clone();
        let once = CallOptions::new().no_retry();
        async move { client.classify_with(&[1], once).await }
    });
    let error = soon(call).await.unwrap().unwrap_err();
    let CallError::ConnectionLost { cause, .. } = &error else {
        panic!("{error}");
    };
    assert!(matches!(**cause, ConnectionError::Silent { silence } if silence >= 2 * interval));
    assert_eq!(client.counters().unknown_ids, 0, "the pongs are expected");
    tokio::spawn(listener.welcome().await.serve());
    assert_eq!(soon(client.classify(&[2])).await.unwrap(), label(2));
}

/// A server with a full window reads no pings.
#[tokio::test(start_paused = true)]
async fn a_full_window_excuses_missing_pongs() {
    let interval = Duration::from_secs(1);
    let welcome = Welcome { window: 2, ..welcome() };
    let (client, mut peer, _listener) =
        pair_with(options().keepalive(Some(interval)), welcome).await;
    let calls = [1, 2].map(|class| {
        let client = client.clone();
        let slow = CallOptions::new().timeout(PATIENCE).no_retry();
        tokio::spawn(async move { client.classify_with(&[class], slow).await })
    });
    let ids = [peer.expect(Kind::ClassifyReq).await, peer.expect(Kind::ClassifyReq).await];
    tokio::time::sleep(interval * 10).await;
    for (id, class) in ids.into_iter().zip([1, 2]) {
        peer.send(id, Message::ClassifyResp(label(class))).await;
    }
    for call in calls {
        soon(call).await.unwrap().unwrap();
    }
    assert_eq!(client.counters().connects, 1);
    // With room in the window, silence ends the connection again.
    let lost = async {
        while client.is_connected() {
            tokio::time::sleep(interval / 4).await;
        }
    };
    tokio::time::timeout(interval * 5, lost).await.unwrap();
}
