//! Callbacks are called exactly once.

use std::sync::mpsc::{Receiver, channel};
use std::time::Duration;

use afterimage_wire::client::{Classified, Reply, Values};
use afterimage_wire::proto::{Kind, Message, Welcome};
use afterimage_wire::{CallError, Client};

use crate::{PATIENCE, label, options, pair, pair_with, pipes, soon, welcome};

fn submit(client: &Client, timeout: Duration) -> Receiver<Classified> {
    let (sender, receiver) = channel();
    client.submit_classify(
        &[1],
        timeout,
        Reply::call(move |outcome| sender.send(outcome).unwrap()),
    );
    receiver
}

fn submit_many(client: &Client) -> Receiver<Values> {
    let (sender, receiver) = channel();
    client.cache().submit_get_many(
        &[2, 4, 6],
        PATIENCE,
        Reply::call(move |outcome| {
            sender.send(outcome).unwrap();
        }),
    );
    receiver
}

/// The only outcome. The callback must not be called again.
async fn only<T>(receiver: Receiver<T>) -> T {
    let outcome = soon(async {
        loop {
            match receiver.try_recv() {
                Ok(outcome) => return outcome,
                Err(_) => tokio::time::sleep(Duration::from_millis(1)).await,
            }
        }
    })
    .await;
    assert!(receiver.try_recv().is_err(), "the callback was called twice");
    outcome
}

#[tokio::test]
async fn the_answer_comes_with_the_welcome_of_its_connection() {
    let (client, mut old, mut listener) = pair(options()).await;
    let first = submit(&client, PATIENCE);
    let first_id = old.expect(Kind::ClassifyReq).await;
    old.send(0, Message::GoAway { text: "" }).await;
    let other = Welcome { digest: [8; 32], ..welcome() };
    let mut new = listener.welcome_with(other.clone()).await;
    let second = submit(&client, PATIENCE);
    let second_id = new.expect(Kind::ClassifyReq).await;
    new.send(second_id, Message::ClassifyResp(label(2))).await;
    let (answer, from) = only(second).await.unwrap();
    assert_eq!((answer, &*from), (label(2), &other));
    old.send(first_id, Message::ClassifyResp(label(1))).await;
    let (answer, from) = only(first).await.unwrap();
    assert_eq!((answer, &*from), (label(1), &welcome()));
}

#[tokio::test]
async fn many_reads_are_answered_together() {
    let (client, peer, _listener) = pair(options().max_in_flight(2)).await;
    tokio::spawn(peer.serve());
    assert_eq!(only(submit_many(&client)).await.unwrap(), [Some(2), Some(4), Some(6)]);
}

#[tokio::test]
async fn a_lost_connection_calls_back_and_does_not_send_again() {
    let (client, mut peer, mut listener) = pair(options()).await;
    let (one, many) = (submit(&client, PATIENCE), submit_many(&client));
    peer.expect(Kind::ClassifyReq).await;
    drop(peer);
    let error = only(one).await.unwrap_err();
    assert!(matches!(error, CallError::ConnectionLost { .. }), "{error}");
    let error = only(many).await.unwrap_err();
    assert!(matches!(error, CallError::ConnectionLost { .. }), "{error}");
    let mut peer = listener.welcome().await;
    soon(client.connected(PATIENCE)).await.unwrap();
    let again = tokio::time::timeout(Duration::from_millis(20), peer.try_next()).await;
    assert!(again.is_err(), "{again:?}");
}

#[tokio::test]
async fn a_deadline_calls_back() {
    let (client, _peer, _listener) = pair(options()).await;
    let error = only(submit(&client, Duration::from_millis(10))).await.unwrap_err();
    assert!(matches!(error, CallError::DeadlineExceeded { .. }), "{error}");
    let error = only(submit(&client, Duration::ZERO)).await.unwrap_err();
    assert!(matches!(error, CallError::DeadlineExceeded { .. }), "{error}");
}

#[tokio::test]
async fn an_extreme_timeout_does_not_overflow() {
    let (client, peer, _listener) = pair(options()).await;
    tokio::spawn(peer.serve());
    assert_eq!(only(submit(&client, Duration::MAX)).await.unwrap().0, label(1));
}

#[tokio::test]
async fn dropping_the_client_calls_back() {
    let (client, _peer, _listener) = pair(options()).await;
    let (one, many) = (submit(&client, PATIENCE), submit_many(&client));
    drop(client.clone());
    assert!(one.try_recv().is_err(), "one handle is still open");
    drop(client);
    assert!(matches!(only(one).await, Err(CallError::Closed)));
    assert!(matches!(only(many).await, Err(CallError::Closed)));
}

#[tokio::test]
async fn dropping_a_client_that_never_connected_calls_back() {
    let (connector, _listener) = pipes(1 << 16);
    let client = Client::with_connector(connector, options());
    let (one, many) = (submit(&client, PATIENCE), submit_many(&client));
    drop(client);
    assert!(matches!(only(one).await, Err(CallError::Closed)));
    assert!(matches!(only(many).await, Err(CallError::Closed)));
}

#[test]
fn dropping_the_runtime_calls_back() {
    let runtime = || tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let first = runtime();
    let (client, one, many, _peer, _listener) = first.block_on(async {
        let (client, peer, listener) = pair(options()).await;
        let (one, many) = (submit(&client, PATIENCE), submit_many(&client));
        (client, one, many, peer, listener)
    });
    drop(first);
    let second = runtime();
    second.block_on(async {
        assert!(matches!(only(one).await, Err(CallError::Closed)));
        assert!(matches!(only(many).await, Err(CallError::Closed)));
        assert!(matches!(only(submit(&client, PATIENCE)).await, Err(CallError::Closed)));
        assert!(matches!(soon(client.classify(&[1])).await, Err(CallError::Closed)));
        soon(client.close()).await;
    });
}

#[tokio::test]
async fn a_refused_request_calls_back_before_submit_returns() {
    let (client, _peer, _listener) =
        pair_with(options(), Welcome { max_body: 0, ..welcome() }).await;
    let outcome = submit(&client, PATIENCE).try_recv().unwrap();
    assert!(matches!(outcome, Err(CallError::TooLarge { .. })), "{outcome:?}");
}

#[tokio::test]
async fn a_callback_may_submit_the_next_request_and_may_panic() {
    let (client, peer, _listener) = pair(options()).await;
    tokio::spawn(peer.serve());
    client.submit_classify(&[1], PATIENCE, Reply::call(|_| panic!("on purpose")));
    let (sender, receiver) = channel();
    let again = client.clone();
    let reply = Reply::call(move |first: Classified| {
        let reply = Reply::call(move |second: Classified| {
            sender.send((first.unwrap().0, second.unwrap().0)).unwrap();
        });
        again.submit_classify(&[3], PATIENCE, reply);
    });
    client.submit_classify(&[2], PATIENCE, reply);
    assert_eq!(only(receiver).await, (label(2), label(3)));
    assert!(client.is_connected());
}
