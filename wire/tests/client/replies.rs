//! Replies that are out of order, split, late, repeated or invalid.

use std::time::Duration;

use afterimage_wire::client::{CallOptions, Reply, Report, Violation};
use afterimage_wire::proto::{Kind, Message, Snapshot, Welcome};
use afterimage_wire::{CallError, Status};

use crate::{PATIENCE, header, label, options, pair, pair_with, soon, welcome};

/// Runs the client's task until it waits.
async fn settle() {
    for _ in 0..50 {
        tokio::task::yield_now().await;
    }
}

#[tokio::test]
async fn replies_out_of_order_reach_their_callers() {
    let (client, mut peer, _listener) = pair(options()).await;
    let calls: Vec<_> = (0..100u8)
        .map(|n| {
            let client = client.clone();
            tokio::spawn(async move { (n, client.classify(&[n]).await) })
        })
        .collect();
    let mut asked = Vec::new();
    for _ in 0..calls.len() {
        asked.push(peer.next().await);
    }
    // 37 and 100 have no common divisor, so every request gets one answer, out of order.
    for n in 0..calls.len() {
        let frame = &asked[n * 37 % calls.len()];
        let class = frame.body[0].into();
        peer.send(frame.header.id, Message::ClassifyResp(label(class))).await;
    }
    for call in calls {
        let (n, answer) = soon(call).await.unwrap();
        assert_eq!(answer.unwrap(), label(n.into()));
    }
}

#[tokio::test]
async fn a_reply_split_at_every_byte_is_the_same_reply() {
    let (client, mut peer, _listener) = pair(options()).await;
    let mut len = 1;
    let mut cut = 0;
    while cut < len {
        let call = tokio::spawn({
            let client = client.clone();
            async move { client.cache().get_many(&[2, 4]).await }
        });
        let mut bytes = Vec::new();
        for value in [20, 40] {
            let id = peer.expect(Kind::CacheReq).await;
            Message::CacheResp { value: Some(value) }.encode(id, &mut bytes);
        }
        len = bytes.len();
        peer.raw(&bytes[..cut]).await;
        settle().await;
        peer.raw(&bytes[cut..]).await;
        assert_eq!(soon(call).await.unwrap().unwrap(), [Some(20), Some(40)], "cut at {cut}");
        cut += 1;
    }
    assert_eq!(len, 48);
}

#[tokio::test]
async fn a_reply_larger_than_the_read_buffer_arrives_whole() {
    let (client, mut peer, _listener) = pair(options()).await;
    use afterimage_wire::proto::stats::{Stats, Value};
    let mut stats = Stats::default();
    for n in 0..4000 {
        stats.push(&format!("entry_{n}"), Value::Text("x".repeat(200)));
    }
    for _ in 0..2 {
        let call = tokio::spawn({
            let client = client.clone();
            async move { client.admin().stats().await }
        });
        let id = peer.expect(Kind::StatsReq).await;
        peer.send(id, Message::StatsResp(stats.clone())).await;
        assert_eq!(soon(call).await.unwrap().unwrap(), stats);
    }
}

#[tokio::test]
async fn a_snapshot_returns_its_size_or_the_servers_error() {
    let (client, mut peer, _listener) = pair(options()).await;
    let ask = || {
        let client = client.clone();
        tokio::spawn(async move { client.admin().snapshot(Duration::from_secs(60)).await })
    };
    let elapsed = Duration::from_micros(1_250_000);
    let written = Snapshot { entries: 7, bytes: 163, elapsed, joined: true };
    let call = ask();
    let id = peer.expect(Kind::SnapshotReq).await;
    peer.send(id, Message::SnapshotResp(written)).await;
    assert_eq!(soon(call).await.unwrap().unwrap(), written);
    let call = ask();
    let id = peer.expect(Kind::SnapshotReq).await;
    let (status, text) = (Status::StorageFailed, "the disk is full");
    peer.send(id, Message::Error { status, text, connection: false }).await;
    let error = soon(call).await.unwrap().unwrap_err();
    assert!(matches!(error, CallError::Server { status: Status::StorageFailed, .. }), "{error}");
}

#[tokio::test]
async fn late_and_duplicate_replies_are_dropped_and_counted() {
    let (client, mut peer, _listener) = pair(options()).await;
    let call = tokio::spawn({
        let client = client.clone();
        async move { (client.cache().get(1).await, client.cache().get(2).await) }
    });
    let first = peer.expect(Kind::CacheReq).await;
    // Id 0 belongs to requests without a reply. An Error to them is dropped.
    peer.send(0, Message::CacheResp { value: Some(-1) }).await;
    for _ in 0..3 {
        peer.send(first, Message::CacheResp { value: Some(1) }).await;
    }
    let second = peer.expect(Kind::CacheReq).await;
    assert_ne!(first, second);
    // The slot has another request now, which must not get the duplicate.
    peer.send(first, Message::CacheResp { value: Some(1) }).await;
    peer.send(second, Message::CacheResp { value: Some(2) }).await;
    let (first, second) = soon(call).await.unwrap();
    assert_eq!((first.unwrap(), second.unwrap()), (Some(1), Some(2)));
    assert_eq!(client.counters().unknown_ids, 1 + 2 + 1);
    assert!(client.is_connected());
}

#[tokio::test]
async fn an_unknown_id_closes_the_connection() {
    for unknown in [|_| 1, |_| u64::MAX, |id| id ^ 1, |id| id + (1 << 32)] as [fn(u64) -> u64; 4] {
        let (client, mut peer, mut listener) = pair(options()).await;
        let ask = |key| {
            let client = client.clone();
            let (sender, receiver) = tokio::sync::oneshot::channel();
            client.cache().submit_get_many(
                &[key],
                PATIENCE,
                Reply::call(|outcome| drop(sender.send(outcome))),
            );
            receiver
        };
        let calls = [ask(1), ask(2)];
        let ids = [peer.expect(Kind::CacheReq).await, peer.expect(Kind::CacheReq).await];
        // In one write: the replies before the unknown id are used, the later ones are not.
        let mut bytes = Vec::new();
        for (id, value) in [(ids[0], 1), (unknown(ids[1] + 1), -1), (ids[1], -1)] {
            Message::CacheResp { value: Some(value) }.encode(id, &mut bytes);
        }
        peer.raw(&bytes).await;
        let [first, second] = calls;
        assert_eq!(soon(first).await.unwrap().unwrap(), [Some(1)]);
        let error = soon(second).await.unwrap().unwrap_err();
        assert_eq!(error.status(), Status::UpstreamCorrupt);
        assert!(Report(&error).to_string().contains("never sent on this connection"), "{error}");
        assert_eq!(client.counters().unknown_ids, 1);
        // The next connection works.
        tokio::spawn(listener.accept().await.serve());
        assert_eq!(soon(client.cache().get(7)).await.unwrap(), None);
    }
}

#[tokio::test]
async fn a_cancelled_caller_leaves_no_reply_for_another() {
    let (client, mut peer, _listener) = pair(options()).await;
    let mut gone = Box::pin(client.classify(&[1]));
    assert!(futures_poll(&mut gone).await.is_none());
    let late = peer.expect(Kind::ClassifyReq).await;
    drop(gone);
    assert_eq!(client.counters().in_flight, 0);

    let cache = client.cache();
    let mut many = Box::pin(cache.get_many(&[1, 2, 3]));
    assert!(futures_poll(&mut many).await.is_none());
    drop(many);
    assert_eq!(client.counters().in_flight, 0);
    for _ in 0..3 {
        peer.expect(Kind::CacheReq).await;
    }

    let next = tokio::spawn({
        let client = client.clone();
        async move { client.classify(&[2]).await }
    });
    let id = peer.expect(Kind::ClassifyReq).await;
    peer.send(late, Message::ClassifyResp(label(1))).await;
    peer.send(id, Message::ClassifyResp(label(2))).await;
    assert_eq!(soon(next).await.unwrap().unwrap(), label(2));
    assert_eq!(client.counters().unknown_ids, 1);
}

/// Polls a future once.
async fn futures_poll<F: Future + Unpin>(future: &mut F) -> Option<F::Output> {
    std::future::poll_fn(|cx| {
        std::task::Poll::Ready(match std::pin::Pin::new(&mut *future).poll(cx) {
            std::task::Poll::Ready(output) => Some(output),
            std::task::Poll::Pending => None,
        })
    })
    .await
}

#[tokio::test]
async fn a_reply_after_its_deadline_is_dropped() {
    let (client, mut peer, _listener) = pair(options()).await;
    let short = CallOptions::new().timeout(Duration::from_millis(10));
    let error = soon(client.classify_with(&[1], short)).await.unwrap_err();
    assert!(matches!(error, CallError::DeadlineExceeded { .. }), "{error}");
    let late = peer.expect(Kind::ClassifyReq).await;
    peer.send(late, Message::ClassifyResp(label(1))).await;
    tokio::spawn(peer.serve());
    assert_eq!(soon(client.classify(&[2])).await.unwrap(), label(2));
    let counters = client.counters();
    assert_eq!((counters.unknown_ids, counters.timeouts), (1, 1));
}

#[tokio::test]
async fn the_servers_error_reaches_the_caller() {
    let (client, mut peer, _listener) = pair(options()).await;
    let call = tokio::spawn({
        let client = client.clone();
        async move { client.classify(&[1]).await }
    });
    let id = peer.expect(Kind::ClassifyReq).await;
    let (status, text, connection) = (Status::Overloaded, "come back later", false);
    peer.send(id, Message::Error { status, text, connection }).await;
    let error = soon(call).await.unwrap().unwrap_err();
    assert_eq!(Report(&error).to_string(), "the server answered overloaded: come back later");
    assert_eq!(error.status(), Status::Overloaded);
}

/// The error of a call that gets these bytes as its reply, and whether the client is connected.
async fn answered_with(reply: impl FnOnce(u64) -> Vec<u8>) -> (CallError, bool) {
    let (client, mut peer, _listener) =
        pair_with(options().max_body(100_000), Welcome { classes: 10, ..welcome() }).await;
    let call = tokio::spawn({
        let client = client.clone();
        let once = CallOptions::new().no_retry();
        async move { client.classify_with(&[1], once).await }
    });
    let id = peer.expect(Kind::ClassifyReq).await;
    peer.raw(&reply(id)).await;
    let error = soon(call).await.unwrap().unwrap_err();
    assert_eq!(error.status(), Status::UpstreamCorrupt);
    settle().await;
    (error, client.is_connected())
}

#[tokio::test]
async fn an_invalid_reply_fails_its_call_only() {
    let (error, connected) = answered_with(|id| {
        let mut bytes = header(Kind::ClassifyResp, id, 3).to_vec();
        bytes.extend_from_slice(&[0; 3]);
        bytes
    })
    .await;
    assert_eq!(
        Report(&error).to_string(),
        "the server broke the protocol: malformed ClassifyResp: 1 bytes too many at the end of the body"
    );
    assert!(connected);

    let (error, connected) = answered_with(|id| {
        let mut bytes = Vec::new();
        Message::CacheResp { value: None }.encode(id, &mut bytes);
        bytes
    })
    .await;
    let expected = "the server broke the protocol: CacheResp came in reply to ClassifyReq";
    assert_eq!(Report(&error).to_string(), expected);
    assert!(connected);

    let (error, connected) = answered_with(|id| {
        let mut bytes = Vec::new();
        Message::ClassifyResp(label(10)).encode(id, &mut bytes);
        bytes
    })
    .await;
    let expected = "the server broke the protocol: the label is 10; the model has 10 classes";
    assert_eq!(Report(&error).to_string(), expected);
    assert!(connected);

    let (error, connected) = answered_with(|id| header(Kind::StatsReq, id, 0).to_vec()).await;
    assert!(
        matches!(
            &error,
            CallError::Protocol {
                violation: Violation::WrongReply { kind: Kind::StatsReq, .. },
                ..
            }
        ),
        "{error}"
    );
    assert!(connected);
}

#[tokio::test]
async fn a_frame_of_an_unknown_kind_is_skipped() {
    let (error, connected) = answered_with(|id| {
        let mut bytes = header(Kind::Unknown(0xEE), id, 3).to_vec();
        bytes.extend_from_slice(&[0; 3]);
        let (status, text) = (Status::UpstreamCorrupt, "the real reply");
        Message::Error { status, text, connection: false }.encode(id, &mut bytes);
        bytes
    })
    .await;
    assert!(Report(&error).to_string().contains("the real reply"), "{error}");
    assert!(connected);
}

#[tokio::test]
async fn a_reply_that_is_too_large_closes_the_connection() {
    let (error, connected) =
        answered_with(|id| header(Kind::ClassifyResp, id, 100_001).to_vec()).await;
    assert_eq!(
        Report(&error).to_string(),
        "the server broke the protocol: frame body is 100001 bytes; the limit is 100000"
    );
    assert!(!connected);
}
