//! Servers that refuse the connection, speak another protocol, or stay silent.

use std::time::Duration;

use afterimage_wire::client::{ConnectionError, Expect, Report, Violation};
use afterimage_wire::proto::header::MAX_HANDSHAKE_BODY;
use afterimage_wire::proto::{Kind, Message, Role, Welcome};
use afterimage_wire::{CallError, Client, ClientOptions, Status};

use crate::server::{Peer, header, label, options, pipes, soon, welcome};

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
