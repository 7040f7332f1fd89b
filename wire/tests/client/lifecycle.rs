//! The end of a client.

use std::time::Duration;

use afterimage_wire::proto::{Kind, Message};
use afterimage_wire::{CallError, Client};

use tokio::net::TcpSocket;

use crate::server::{PATIENCE, Peer, label, options, pair, pipes, soon, welcome};

#[tokio::test]
async fn close_finishes_what_is_in_flight_and_takes_no_more() {
    let (client, mut peer, _listener) = pair(options().max_in_flight(1)).await;
    let calls: Vec<_> = (1..=2u8)
        .map(|n| {
            let client = client.clone();
            tokio::spawn(async move { client.classify(&[n]).await })
        })
        .collect();
    let first = peer.expect(Kind::ClassifyReq).await;
    let closed = tokio::spawn({
        let client = client.clone();
        async move { client.close().await }
    });
    soon(async {
        while !matches!(client.cache_set(1, 1), Err(CallError::Closed)) {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    })
    .await;
    assert!(matches!(soon(client.classify(&[3])).await, Err(CallError::Closed)));
    assert!(!closed.is_finished());
    peer.send(first, Message::ClassifyResp(label(1))).await;
    // The connection is closed when all is answered, and not before.
    while let Some(frame) = soon(peer.try_next()).await {
        if frame.header.kind == Kind::ClassifyReq {
            let reply = Message::ClassifyResp(label(2));
            peer.send(frame.header.id, reply).await;
        }
    }
    soon(closed).await.unwrap();
    for (n, call) in (1..).zip(calls) {
        assert_eq!(soon(call).await.unwrap().unwrap(), label(n));
    }
    soon(client.close()).await;
}

#[tokio::test]
async fn close_writes_what_it_was_given() {
    let (connector, mut listener) = pipes(64);
    let client = Client::with_connector(connector, options());
    let mut peer = listener.welcome().await;
    soon(client.connected(PATIENCE)).await.unwrap();
    for key in 0..100 {
        client.cache_set(key, 1).unwrap();
    }
    let closed = tokio::spawn(async move { client.close().await });
    for key in 0..100 {
        let frame = peer.next().await;
        assert_eq!(frame.message().unwrap(), Message::CacheWrite { key, value: 1 });
    }
    assert!(soon(peer.try_next()).await.is_none());
    soon(closed).await.unwrap();
}

#[tokio::test]
async fn a_dropped_client_writes_what_it_was_given_and_hangs_up() {
    let (client, mut peer, _listener) = pair(options()).await;
    client.cache_set(1, 2).unwrap();
    drop(client);
    let frame = peer.next().await;
    assert_eq!(frame.message().unwrap(), Message::CacheWrite { key: 1, value: 2 });
    assert!(soon(peer.try_next()).await.is_none());
}

#[tokio::test]
async fn close_does_not_wait_for_ever_for_a_peer_that_stops_reading() {
    let (connector, mut listener) = pipes(64);
    let client = Client::with_connector(connector, options());
    let _deaf = listener.welcome().await;
    soon(client.connected(PATIENCE)).await.unwrap();
    for key in 0..100 {
        client.cache_set(key, 1).unwrap();
    }
    soon(client.close()).await;
}

#[tokio::test]
async fn close_of_a_client_that_never_connected_waits_for_its_deadlines_only() {
    let (connector, _listener) = pipes(64);
    let client = Client::with_connector(connector, options().timeout(Duration::from_millis(20)));
    client.cache_set(1, 1).unwrap();
    let call = tokio::spawn({
        let client = client.clone();
        async move { client.classify(&[1]).await }
    });
    tokio::task::yield_now().await;
    soon(client.close()).await;
    let error = soon(call).await.unwrap().unwrap_err();
    assert!(matches!(error, CallError::DeadlineExceeded { .. }), "{error}");
}

/// A reply that comes when a socket is closed makes the kernel throw away what the socket still had
/// to send.
#[tokio::test]
async fn the_last_writes_arrive_although_a_late_reply_comes_after_them() {
    const WRITES: u64 = 1000;
    let listener = TcpSocket::new_v4().unwrap();
    // So that most of the writes wait at the client's end.
    listener.set_recv_buffer_size(4096).unwrap();
    listener.bind("127.0.0.1:0".parse().unwrap()).unwrap();
    let listener = listener.listen(1).unwrap();
    let client = Client::connect_lazy(listener.local_addr().unwrap(), options());
    let (stream, _) = soon(listener.accept()).await.unwrap();
    let mut peer = Peer::new(stream);
    peer.expect(Kind::Hello).await;
    peer.send(0, Message::Welcome(welcome())).await;
    soon(client.connected(PATIENCE)).await.unwrap();
    for key in 0..WRITES {
        client.cache_set(key, 1).unwrap();
    }
    let mut closed = tokio::spawn(async move { client.close().await });
    // It must not be over before the server has read all; if it were, this is enough to see it.
    let early = tokio::time::timeout(Duration::from_millis(200), &mut closed).await.is_ok();
    for _ in 0..3 {
        peer.send(77, Message::Pong(&[])).await;
        tokio::task::yield_now().await;
    }
    let mut arrived = 0;
    while soon(peer.try_next()).await.is_some() {
        arrived += 1;
    }
    assert_eq!((arrived, early), (WRITES, false));
    drop(peer);
    soon(closed).await.unwrap();
}
