//! Lost connections and servers that send GoAway.

use std::error::Error;
use std::time::Duration;

use afterimage_wire::client::{CallOptions, ConnectionError, Reply, Report};
use afterimage_wire::proto::{Kind, Message};
use afterimage_wire::{CallError, Client, ClientOptions, Status};
use tokio::net::TcpListener;

use crate::{PATIENCE, Peer, label, options, pair, pipes, soon, welcome};

fn once() -> CallOptions {
    CallOptions::new().no_retry()
}

#[tokio::test]
async fn a_lost_connection_fails_its_requests() {
    let (client, mut peer, mut listener) = pair(options()).await;
    let call = tokio::spawn({
        let client = client.clone();
        async move { client.classify_with(&[1], once()).await }
    });
    peer.expect(Kind::ClassifyReq).await;
    drop(peer);
    let error = soon(call).await.unwrap().unwrap_err();
    assert_eq!(error.status(), Status::UpstreamCrashed);
    let CallError::ConnectionLost { cause, .. } = &error else {
        panic!("{error}");
    };
    assert!(matches!(**cause, ConnectionError::ClosedByPeer), "{cause}");
    // The client connects again.
    tokio::spawn(listener.welcome().await.serve());
    assert_eq!(soon(client.classify(&[2])).await.unwrap(), label(2));
    assert_eq!(client.counters().connects, 2);
}

#[tokio::test]
async fn a_read_whose_connection_is_lost_is_sent_again_twice() {
    let (client, mut peer, mut listener) = pair(options()).await;
    let classify = tokio::spawn({
        let client = client.clone();
        async move { client.classify(&[1]).await }
    });
    peer.expect(Kind::ClassifyReq).await;
    drop(peer);
    let mut peer = listener.welcome().await;
    peer.expect(Kind::ClassifyReq).await;
    drop(peer);
    let mut peer = listener.welcome().await;
    let id = peer.expect(Kind::ClassifyReq).await;
    peer.send(id, Message::ClassifyResp(label(1))).await;
    assert_eq!(soon(classify).await.unwrap().unwrap(), label(1));

    let reads = tokio::spawn({
        let client = client.clone();
        async move { client.cache().get_many(&[2, 4]).await }
    });
    for _ in 0..3 {
        peer.expect(Kind::CacheReq).await;
        drop(peer);
        peer = listener.welcome().await;
    }
    let error = soon(reads).await.unwrap().unwrap_err();
    assert!(matches!(error, CallError::ConnectionLost { .. }), "{error}");
}

#[tokio::test]
async fn a_request_with_shutting_down_is_sent_again() {
    let (client, mut peer, _listener) = pair(options()).await;
    let call = tokio::spawn({
        let client = client.clone();
        async move { client.cache().get(2).await }
    });
    let id = peer.expect(Kind::CacheReq).await;
    let (status, text, connection) = (Status::ShuttingDown, "bye", false);
    peer.send(id, Message::Error { status, text, connection }).await;
    tokio::spawn(peer.serve());
    assert_eq!(soon(call).await.unwrap().unwrap(), Some(2));
}

#[tokio::test]
async fn retries_have_the_time_that_is_left() {
    let (client, mut peer, mut listener) = pair(options()).await;
    let (timeout, spent) = (Duration::from_secs(20), Duration::from_millis(100));
    let call = tokio::spawn({
        let client = client.clone();
        async move {
            let options = CallOptions::new().timeout(timeout);
            client.classify_with(&[1], options).await
        }
    });
    peer.expect(Kind::ClassifyReq).await;
    tokio::time::sleep(spent).await;
    drop(peer);
    let mut peer = listener.welcome().await;
    let again = peer.next().await;
    let left = Duration::from_millis(again.header.status.into());
    assert!(left <= timeout - spent, "{left:?}");
    peer.send(again.header.id, Message::ClassifyResp(label(1))).await;
    assert_eq!(soon(call).await.unwrap().unwrap(), label(1));
}

#[tokio::test]
async fn a_deadline_during_a_retry_names_the_whole_timeout() {
    let (client, mut peer, _listener) = pair(options()).await;
    let short = CallOptions::new().timeout(Duration::from_millis(50));
    let call = tokio::spawn({
        let client = client.clone();
        async move { client.classify_with(&[1], short).await }
    });
    peer.expect(Kind::ClassifyReq).await;
    drop(peer);
    // The server does not accept another connection.
    let error = soon(call).await.unwrap().unwrap_err();
    let CallError::DeadlineExceeded { timeout, .. } = &error else {
        panic!("{error}");
    };
    assert_eq!(*timeout, Duration::from_millis(50));
}

#[tokio::test]
async fn calls_report_a_connection_level_error() {
    let (client, mut peer, _listener) = pair(options()).await;
    let call = tokio::spawn(async move { client.classify_with(&[1], once()).await });
    peer.expect(Kind::ClassifyReq).await;
    let (status, text, connection) = (Status::Internal, "out of luck", true);
    peer.send(0, Message::Error { status, text, connection }).await;
    assert_eq!(
        Report(&soon(call).await.unwrap().unwrap_err()).to_string(),
        "the connection to the server was lost while the request was in flight: \
         out of luck (internal)"
    );
}

#[tokio::test]
async fn fail_fast_fails_at_once_with_the_last_error() {
    let closed = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = closed.local_addr().unwrap();
    drop(closed);
    let slow = options().backoff(PATIENCE * 100, PATIENCE * 100).fail_fast(true);
    let client = Client::connect_lazy(address, slow);
    // Only the first call waits for the first attempt.
    for _ in 0..3 {
        let error = soon(client.classify(&[1])).await.unwrap_err();
        assert!(matches!(error, CallError::Unavailable { .. }), "{error}");
        assert_eq!(error.to_string(), format!("cannot connect to {address}"));
        let cause = error.source().unwrap().downcast_ref();
        assert!(matches!(cause, Some(ConnectionError::Connect(_))), "{cause:?}");
        assert_eq!(error.status(), Status::UpstreamCrashed);
    }
    assert!(matches!(client.cache().set(1, 1), Err(CallError::Unavailable { .. })));
    let mut outcome = None;
    let (sender, receiver) = std::sync::mpsc::channel();
    client.submit_classify(&[1], PATIENCE, Reply::call(move |result| sender.send(result).unwrap()));
    if let Ok(result) = receiver.try_recv() {
        outcome = Some(result.unwrap_err());
    }
    assert!(matches!(outcome, Some(CallError::Unavailable { .. })), "{outcome:?}");
}

#[tokio::test]
async fn fail_fast_fails_calls_that_wait_for_a_window() {
    let options = options().max_in_flight(1).fail_fast(true);
    let (client, mut peer, _listener) = pair(options.backoff(PATIENCE, PATIENCE)).await;
    let call = tokio::spawn(async move { client.cache().get_many(&[1, 2, 3]).await });
    peer.expect(Kind::CacheReq).await;
    drop(peer);
    let error = soon(call).await.unwrap().unwrap_err();
    let typed = matches!(error, CallError::ConnectionLost { .. } | CallError::Unavailable { .. });
    assert!(typed, "{error}");
}

#[tokio::test]
async fn connect_gives_up_at_its_deadline_with_the_last_error() {
    let closed = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = closed.local_addr().unwrap();
    drop(closed);
    let brief = Duration::from_secs(1);
    let options = options().connect_timeout(brief).handshake_timeout(brief);
    let error = soon(Client::connect(address, options.clone())).await.unwrap_err();
    let text = Report(&error).to_string();
    assert!(text.contains("still connecting: Connection refused"), "{text}");
    let error = soon(Client::connect(address, options.fail_fast(true))).await.unwrap_err();
    assert!(matches!(error, CallError::Unavailable { .. }), "{error}");
    let error =
        soon(Client::connect(Vec::<String>::new(), ClientOptions::new().fail_fast(true))).await;
    assert!(Report(&error.unwrap_err()).to_string().contains("no address"));
}

#[tokio::test]
async fn reconnects_to_a_closing_server_back_off() {
    let (connector, mut listener) = pipes(1 << 16);
    let (min, max) = (Duration::from_millis(20), Duration::from_secs(20));
    let client = Client::with_connector(connector, options().backoff(min, max));
    let storm = async {
        loop {
            drop(listener.welcome().await);
        }
    };
    let stormed = tokio::time::timeout(Duration::from_millis(500), storm).await;
    assert!(stormed.is_err());
    // With pauses of up to 20, 40, 80, 160 and 320 ms, half a second has about six attempts.
    // Without growth it has fifty.
    let connects = client.counters().connects;
    assert!(connects < 25, "{connects} connections in half a second");
}

#[tokio::test]
async fn go_away_loses_no_request() {
    let (client, mut old, mut listener) = pair(options()).await;
    let early: Vec<_> = (0..50u8)
        .map(|n| {
            let client = client.clone();
            tokio::spawn(async move { (n, client.classify_with(&[n], once()).await) })
        })
        .collect();
    let mut asked = Vec::new();
    for _ in 0..early.len() {
        asked.push(old.next().await);
    }
    old.send(0, Message::GoAway { text: "restarting" }).await;
    let mut new = listener.accept().await;
    // Calls wait between the two connections.
    let late = tokio::spawn({
        let client = client.clone();
        async move { client.classify_with(&[99], once()).await }
    });
    new.send(0, Message::Welcome(welcome())).await;
    new.expect(Kind::Hello).await;
    let id = new.expect(Kind::ClassifyReq).await;
    new.send(id, Message::ClassifyResp(label(99))).await;
    assert_eq!(soon(late).await.unwrap().unwrap(), label(99));
    for frame in asked {
        let class = frame.body[0].into();
        old.send(frame.header.id, Message::ClassifyResp(label(class))).await;
    }
    for call in early {
        let (n, answer) = soon(call).await.unwrap();
        assert_eq!(answer.unwrap(), label(n.into()));
    }
    assert!(soon(old.try_next()).await.is_none(), "the old connection is closed");
    assert!(client.is_connected());
}

#[tokio::test]
async fn a_reply_on_the_wrong_connection_is_not_used() {
    let (client, mut old, mut listener) = pair(options()).await;
    let call = tokio::spawn({
        let client = client.clone();
        async move { client.classify(&[1]).await }
    });
    let id = old.expect(Kind::ClassifyReq).await;
    old.send(0, Message::GoAway { text: "" }).await;
    let mut new = listener.welcome().await;
    new.send(id, Message::ClassifyResp(label(66))).await;
    assert!(soon(new.try_next()).await.is_none(), "the client closes the connection");
    tokio::spawn(listener.accept().await.serve());
    soon(client.ping()).await.unwrap();
    old.send(id, Message::ClassifyResp(label(1))).await;
    assert_eq!(soon(call).await.unwrap().unwrap(), label(1));
    assert_eq!(client.counters().unknown_ids, 1);
}

#[tokio::test]
async fn the_loss_of_a_drained_connection_keeps_the_new_one() {
    let (client, mut old, mut listener) = pair(options()).await;
    let call = tokio::spawn({
        let client = client.clone();
        async move { client.classify(&[1]).await }
    });
    old.expect(Kind::ClassifyReq).await;
    old.send(0, Message::GoAway { text: "" }).await;
    let new: Peer = listener.welcome().await;
    tokio::spawn(new.serve());
    soon(client.ping()).await.unwrap();
    drop(old);
    // The client sent the request again, on the new connection.
    assert_eq!(soon(call).await.unwrap().unwrap(), label(1));
    assert!(client.is_connected());
    assert_eq!(client.counters().connects, 2);
}

#[tokio::test]
async fn reconnects_after_repeated_go_aways_back_off() {
    let (connector, mut listener) = pipes(1 << 16);
    let (min, max) = (Duration::from_millis(20), Duration::from_secs(20));
    let client = Client::with_connector(connector, options().backoff(min, max));
    let sent_away = async {
        let mut peers = Vec::new();
        loop {
            let mut peer = listener.welcome().await;
            for image in [[1], [2]] {
                client.submit_classify(&image, PATIENCE, Reply::call(|_| {}));
            }
            let answered = peer.expect(Kind::ClassifyReq).await;
            peer.expect(Kind::ClassifyReq).await;
            peer.send(answered, Message::ClassifyResp(label(1))).await;
            peer.send(0, Message::GoAway { text: "elsewhere" }).await;
            peers.push(peer);
        }
    };
    let ended = tokio::time::timeout(Duration::from_millis(500), sent_away).await;
    assert!(ended.is_err());
    let connects = client.counters().connects;
    // A busy machine may be slow, so the lower bound is far below the expected number.
    assert!((2..25).contains(&connects), "{connects} connections in half a second");
}

#[tokio::test]
async fn go_away_after_a_reply_reconnects_at_once() {
    let slow = options().backoff(PATIENCE * 100, PATIENCE * 100);
    let (client, mut old, mut listener) = pair(slow).await;
    let call = tokio::spawn({
        let client = client.clone();
        async move { client.cache().get(2).await }
    });
    let id = old.expect(Kind::CacheReq).await;
    old.send(id, Message::CacheResp { value: None }).await;
    soon(call).await.unwrap().unwrap();
    old.send(0, Message::GoAway { text: "" }).await;
    listener.welcome().await;
}

#[tokio::test]
async fn an_old_connection_is_closed_when_its_last_caller_gives_up() {
    let (client, mut old, mut listener) = pair(options()).await;
    let brief = CallOptions::new().timeout(Duration::from_millis(300));
    let call = tokio::spawn({
        let client = client.clone();
        async move { client.classify_with(&[1], brief).await }
    });
    old.expect(Kind::ClassifyReq).await;
    old.send(0, Message::GoAway { text: "" }).await;
    let _new = listener.welcome().await;
    let error = soon(call).await.unwrap().unwrap_err();
    assert!(matches!(error, CallError::DeadlineExceeded { .. }), "{error}");
    assert!(soon(old.try_next()).await.is_none());
    assert!(client.is_connected());
}
