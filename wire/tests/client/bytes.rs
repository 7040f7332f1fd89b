//! Reads and writes of bytes, and the error of a server that has none.

use std::sync::mpsc::{Receiver, channel};
use std::time::Duration;

use afterimage_wire::client::{BytesRead, Reply, Written};
use afterimage_wire::proto::header::MAX_VALUE;
use afterimage_wire::proto::message::BytesWrite;
use afterimage_wire::proto::{Kind, Message, Role, Status, Welcome};
use afterimage_wire::{CallError, Client};

use crate::server::{PATIENCE, Peer, options, pair, pair_with, soon, welcome};

const KEY: [u8; 16] = [7; 16];

fn version_2() -> Welcome {
    Welcome { version: 2, service: Role::Cache, max_body: 1 << 20, ..welcome() }
}

/// Answers reads with the value of the last write.
async fn serve(mut peer: Peer) {
    let mut stored: Option<Vec<u8>> = None;
    while let Some(frame) = peer.try_next().await {
        let id = frame.header.id;
        match frame.message().unwrap() {
            Message::BytesWrite(BytesWrite { key, ttl_s, value }) => {
                assert_eq!((key, ttl_s), (KEY, 60));
                stored = Some(value.to_vec());
                peer.send(id, Message::BytesResp { value: None }).await;
            }
            Message::BytesRead { key, .. } => {
                assert_eq!(key, KEY);
                peer.send(id, Message::BytesResp { value: stored.as_deref() }).await;
            }
            other => panic!("{other:?}"),
        }
    }
}

fn submit_read(client: &Client) -> Receiver<BytesRead> {
    let (sender, receiver) = channel();
    let reply = Reply::call(move |outcome| sender.send(outcome).unwrap());
    client.cache().submit_read_bytes(&KEY, PATIENCE, reply);
    receiver
}

fn submit_write(client: &Client, value: &[u8]) -> Receiver<BytesRead> {
    let (sender, receiver) = channel();
    let ttl = Some(Duration::from_secs(60));
    let reply = Reply::call(move |outcome: Written| sender.send(outcome.map(|()| None)).unwrap());
    client.cache().submit_write_bytes(&KEY, value, ttl, PATIENCE, reply);
    receiver
}

/// The only outcome. The callback must not be called again.
async fn only(receiver: Receiver<BytesRead>) -> BytesRead {
    let outcome = soon(async {
        loop {
            match receiver.try_recv() {
                Ok(outcome) => return outcome,
                Err(_) => tokio::time::sleep(Duration::from_millis(1)).await,
            }
        }
    });
    let outcome = outcome.await;
    assert!(receiver.try_recv().is_err(), "the callback was called twice");
    outcome
}

#[tokio::test]
async fn bytes_are_written_and_read() {
    let (client, peer, _listener) = pair_with(options(), version_2()).await;
    tokio::spawn(serve(peer));
    assert_eq!(soon(client.cache().read_bytes(&KEY)).await.unwrap(), None);
    for value in [&b""[..], b"an answer", &[9; 100_000]] {
        soon(client.cache().write_bytes(&KEY, value, Some(Duration::from_secs(60)))).await.unwrap();
        assert_eq!(soon(client.cache().read_bytes(&KEY)).await.unwrap().as_deref(), Some(value));
        assert_eq!(only(submit_write(&client, value)).await.unwrap(), None);
        assert_eq!(only(submit_read(&client)).await.unwrap().as_deref(), Some(value));
    }
}

#[tokio::test]
async fn a_server_of_version_1_is_named_in_the_error() {
    let (client, mut peer, _listener) = pair(options()).await;
    let write = soon(client.cache().write_bytes(&KEY, b"value", None)).await.unwrap_err();
    let read = soon(client.cache().read_bytes(&KEY)).await.unwrap_err();
    let submitted = only(submit_read(&client)).await.unwrap_err();
    let written = only(submit_write(&client, b"value")).await.unwrap_err();
    for error in [write, read, submitted, written] {
        assert!(matches!(error, CallError::OldServer { needed: 2, version: 1 }), "{error:?}");
        assert_eq!((error.status(), error.is_retryable()), (Status::Unsupported, false));
        assert!(error.to_string().contains("version 1"), "{error}");
    }
    // None of them was sent: the server would close the connection.
    let sent = tokio::time::timeout(Duration::from_millis(20), peer.try_next()).await;
    assert!(sent.is_err(), "{sent:?}");
}

#[tokio::test]
async fn a_value_above_a_limit_is_refused_unsent() {
    let (client, peer, _listener) = pair_with(options(), version_2()).await;
    tokio::spawn(serve(peer));
    let long = vec![0; MAX_VALUE + 1];
    let error = soon(client.cache().write_bytes(&KEY, &long, None)).await.unwrap_err();
    assert!(error.to_string().contains(&MAX_VALUE.to_string()), "{error}");
    assert!(matches!(only(submit_write(&client, &long)).await, Err(CallError::Invalid { .. })));
    let above_the_servers = vec![0; 1 << 20];
    let error = only(submit_write(&client, &above_the_servers)).await.unwrap_err();
    assert!(matches!(error, CallError::TooLarge { .. }), "{error:?}");
}

#[tokio::test]
async fn a_reply_of_another_kind_is_an_error() {
    let (client, mut peer, _listener) = pair_with(options(), version_2()).await;
    let read = submit_read(&client);
    let id = peer.expect(Kind::BytesReq).await;
    peer.send(id, Message::CacheResp { value: Some(1) }).await;
    assert!(matches!(only(read).await, Err(CallError::Protocol { .. })));
}

#[tokio::test]
async fn a_dropped_client_calls_back_for_bytes() {
    let (client, _peer, _listener) = pair_with(options(), version_2()).await;
    let (read, write) = (submit_read(&client), submit_write(&client, b"value"));
    drop(client);
    assert!(matches!(only(read).await, Err(CallError::Closed)));
    assert!(matches!(only(write).await, Err(CallError::Closed)));
}
