//! Closing and dropping a client.

use std::time::Duration;

use afterimage_wire::proto::{Kind, Message};
use afterimage_wire::{CallError, Client};

use tokio::net::TcpSocket;

use crate::server::{PATIENCE, Peer, label, options, pair, pipes, soon, welcome};

#[tokio::test]
async fn close_finishes_open_calls_and_rejects_new_ones() {
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
        while !matches!(client.cache().set(1, 1), Err(CallError::Closed)) {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    })
    .await;
    assert!(matches!(soon(client.classify(&[3])).await, Err(CallError::Closed)));
    assert!(!closed.is_finished());
    peer.send(first, Message::ClassifyResp(label(1))).await;
    // The client closes the connection after the last answer.
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
async fn close_sends_all_writes() {
    let (connector, mut listener) = pipes(64);
    let client = Client::with_connector(connector, options());
    let mut peer = listener.welcome().await;
    soon(client.connected(PATIENCE)).await.unwrap();
    for key in 0..100 {
        client.cache().set(key, 1).unwrap();
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
async fn a_dropped_client_sends_its_writes_and_closes() {
    let (client, mut peer, _listener) = pair(options()).await;
    client.cache().set(1, 2).unwrap();
    drop(client);
    let frame = peer.next().await;
    assert_eq!(frame.message().unwrap(), Message::CacheWrite { key: 1, value: 2 });
    assert!(soon(peer.try_next()).await.is_none());
}

#[tokio::test]
async fn close_ends_with_a_peer_that_does_not_read() {
    let (connector, mut listener) = pipes(64);
    let client = Client::with_connector(connector, options());
    let _deaf = listener.welcome().await;
    soon(client.connected(PATIENCE)).await.unwrap();
    for key in 0..100 {
        client.cache().set(key, 1).unwrap();
    }
    soon(client.close()).await;
}

#[tokio::test]
async fn close_without_a_connection_waits_for_deadlines_only() {
    let (connector, _listener) = pipes(64);
    let client = Client::with_connector(connector, options().timeout(Duration::from_millis(20)));
    client.cache().set(1, 1).unwrap();
    let call = tokio::spawn({
        let client = client.clone();
        async move { client.classify(&[1]).await }
    });
    tokio::task::yield_now().await;
    soon(client.close()).await;
    let error = soon(call).await.unwrap().unwrap_err();
    assert!(matches!(error, CallError::DeadlineExceeded { .. }), "{error}");
}

/// The kernel drops unsent bytes when a socket is closed with unread bytes.
#[tokio::test]
async fn the_last_writes_arrive_despite_a_late_reply() {
    const WRITES: u64 = 1000;
    let listener = TcpSocket::new_v4().unwrap();
    // A small buffer keeps most of the writes at the client.
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
        client.cache().set(key, 1).unwrap();
    }
    let mut closed = tokio::spawn(async move { client.close().await });
    // Close must not end before the server has read everything.
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
