//! Connecting, also to servers that refuse, speak another protocol or stay silent; closing and
//! dropping a client.

use std::time::Duration;

use afterimage_wire::client::{ConnectionError, Expect, Report, Violation};
use afterimage_wire::proto::header::MAX_HANDSHAKE_BODY;
use afterimage_wire::proto::{Kind, Message, Role, Welcome};
use afterimage_wire::{CallError, Client, ClientOptions, Status};
use tokio::net::TcpSocket;

use crate::{PATIENCE, Peer, header, label, options, pair, pipes, soon, welcome};

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

/// The error of a call to a server that answers every Hello this way.
async fn answered_with(
    options: ClientOptions,
    mut hello: impl AsyncFnMut(&mut Peer) + 'static,
) -> CallError {
    let (connector, mut listener) = pipes(1 << 16);
    let client = Client::with_connector(connector, options);
    let server = async {
        loop {
            let mut peer = listener.accept().await;
            peer.expect(Kind::Hello).await;
            hello(&mut peer).await;
        }
    };
    tokio::select! {
        outcome = soon(client.classify(&[1])) => outcome.unwrap_err(),
        () = server => unreachable!("the server never ends"),
    }
}

#[tokio::test]
async fn a_wrong_token_reports_the_servers_text() {
    let error = answered_with(options().token("wrong"), async |peer| {
        let (status, text, connection) = (Status::Unauthenticated, "no such token", true);
        peer.send(0, Message::Error { status, text, connection }).await;
    })
    .await;
    assert!(matches!(error, CallError::Refused { .. }), "{error}");
    assert_eq!(
        Report(&error).to_string(),
        "the server refused the connection: no such token (unauthenticated)"
    );
}

#[tokio::test]
async fn calls_after_a_refusal_fail_at_once() {
    let (connector, mut listener) = pipes(1 << 16);
    let client = Client::with_connector(connector, options());
    let mut peer = listener.accept().await;
    let (status, text, connection) = (Status::Unsupported, "version 1 is too old", true);
    peer.send(0, Message::Error { status, text, connection }).await;
    let error = soon(client.connected(Duration::from_secs(30))).await.unwrap_err();
    assert!(matches!(error, CallError::Refused { .. }), "{error}");
    for _ in 0..10 {
        let error = soon(client.classify(&[1])).await.unwrap_err();
        assert!(matches!(error, CallError::Refused { .. }), "{error}");
        assert!(matches!(client.cache().set(1, 1), Err(CallError::Refused { .. })));
    }
    tokio::time::sleep(Duration::from_millis(300)).await;
    assert!(!listener.is_asked(), "a refused client waits for seconds");
    // Then it connects again.
    tokio::spawn(listener.welcome().await.serve());
    soon(async {
        while !client.is_connected() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    })
    .await;
    assert_eq!(soon(client.classify(&[2])).await.unwrap(), label(2));
}

#[tokio::test]
async fn a_full_server_is_tried_again() {
    let mut asked = 0;
    let (connector, mut listener) = pipes(1 << 16);
    let client = Client::with_connector(connector, options());
    let call = tokio::spawn(async move { client.classify(&[4]).await });
    while asked < 3 {
        let mut peer = listener.accept().await;
        let (status, text, connection) = (Status::Overloaded, "too many connections", true);
        peer.send(0, Message::Error { status, text, connection }).await;
        asked += 1;
    }
    tokio::spawn(listener.welcome().await.serve());
    assert_eq!(soon(call).await.unwrap().unwrap(), label(4));
}

#[tokio::test]
async fn a_wrong_service_is_refused_naming_both() {
    let error = answered_with(options().expect(Expect::Cache), async |peer| {
        let welcome = Welcome { service: Role::Classifier, ..welcome() };
        peer.send(0, Message::Welcome(welcome)).await;
    })
    .await;
    assert_eq!(
        Report(&error).to_string(),
        "cannot use the server: expected a cache but found classifier (\"fake\")"
    );
}

#[tokio::test]
async fn a_version_that_was_not_offered_is_refused() {
    let error = answered_with(options(), async |peer| {
        peer.send(0, Message::Welcome(Welcome { version: 3, ..welcome() })).await;
    })
    .await;
    let CallError::Refused { reason, .. } = &error else {
        panic!("{error}");
    };
    assert!(matches!(**reason, ConnectionError::WrongVersion { ours: 2, theirs: 3 }));
}

#[tokio::test]
async fn a_token_that_is_too_long_is_not_sent() {
    let (connector, _listener) = pipes(1 << 16);
    let client = Client::with_connector(connector, options().token([b'x'; 1025]));
    let error = soon(client.classify(&[1])).await.unwrap_err();
    assert_eq!(
        Report(&error).to_string(),
        "cannot use the server: the token is 1025 bytes; the limit is 1024"
    );
}

#[tokio::test]
async fn an_http_server_is_reported() {
    let error = answered_with(options(), async |peer| {
        peer.raw(b"HTTP/1.1 400 Bad Request\r\nConnection: close\r\n\r\n").await;
    })
    .await;
    assert_eq!(
        Report(&error).to_string(),
        "the server is not an Afterimage server: it speaks HTTP; first bytes \
         \"HTTP/1.1 400 Bad Request\\r\\nConnec\""
    );
}

#[tokio::test]
async fn a_server_of_another_protocol_is_reported() {
    for garbage in [&b"220 smtp\r\n"[..], &[0xFF; 100], &[0; 100], b"x"] {
        let error = answered_with(options(), async move |peer| peer.raw(garbage).await).await;
        let violation = match &error {
            CallError::Protocol { violation, .. } => violation,
            _ => panic!("{error}"),
        };
        let known = matches!(violation, Violation::AnotherProtocol { .. });
        assert!(known, "{violation}");
    }
}

#[tokio::test]
async fn a_welcome_that_is_too_large_or_broken_is_a_violation() {
    let error = answered_with(options(), async |peer| {
        peer.raw(&header(Kind::Welcome, 0, MAX_HANDSHAKE_BODY + 1)).await;
    })
    .await;
    let expected = "the server broke the protocol: frame body is 4097 bytes; the limit is 4096";
    assert_eq!(Report(&error).to_string(), expected);
    let error = answered_with(options(), async |peer| {
        peer.raw(&header(Kind::Welcome, 0, 0)).await;
    })
    .await;
    let expected =
        "the server broke the protocol: malformed Welcome: the body ends inside the magic";
    assert_eq!(Report(&error).to_string(), expected);
}

#[tokio::test]
async fn a_server_that_never_welcomes_is_a_handshake_timeout() {
    let (connector, mut listener) = pipes(1 << 16);
    let timeout = Duration::from_millis(20);
    let options = options().handshake_timeout(timeout).fail_fast(true);
    let client = Client::with_connector(connector, options);
    let _mute = listener.accept().await;
    let error = soon(client.classify(&[1])).await.unwrap_err();
    assert_eq!(
        Report(&error).to_string(),
        "cannot connect to the server: the TCP connection was accepted, but no Welcome came within \
         20ms; is it an Afterimage server?"
    );
    // The client tries again.
    tokio::spawn(listener.welcome().await.serve());
    soon(client.connected(timeout * 1000)).await.ok();
}

#[tokio::test]
async fn a_welcome_split_at_every_byte_is_the_same_welcome() {
    let mut bytes = Vec::new();
    Message::Welcome(welcome()).encode(0, &mut bytes);
    for cut in 1..bytes.len() {
        let (connector, mut listener) = pipes(1 << 16);
        let client = Client::with_connector(connector, options());
        let mut peer = listener.accept().await;
        peer.raw(&bytes[..cut]).await;
        for _ in 0..10 {
            tokio::task::yield_now().await;
        }
        assert!(!client.is_connected(), "cut at {cut}");
        peer.raw(&bytes[cut..]).await;
        soon(client.connected(Duration::from_secs(30))).await.unwrap();
        assert_eq!(*client.welcome().unwrap(), welcome());
    }
}

#[tokio::test]
async fn frames_after_the_welcome_are_not_lost() {
    let (connector, mut listener) = pipes(1 << 16);
    let client = Client::with_connector(connector, options());
    let mut first = listener.accept().await;
    let mut bytes = Vec::new();
    Message::Welcome(welcome()).encode(0, &mut bytes);
    Message::GoAway { text: "restarting" }.encode(0, &mut bytes);
    first.raw(&bytes).await;
    tokio::spawn(listener.welcome().await.serve());
    assert_eq!(soon(client.classify(&[6])).await.unwrap(), label(6));
    assert_eq!(client.counters().connects, 2);
}
