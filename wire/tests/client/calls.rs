//! Successful calls and their frames, for labels and for bytes.

use std::collections::HashSet;
use std::sync::mpsc::{Receiver, channel};
use std::time::Duration;

use afterimage_wire::client::{
    BytesRead, CallOptions, Classified, ErrorKind, Infer, Reply, Written,
};
use afterimage_wire::proto::header::MAX_VALUE;
use afterimage_wire::proto::message::BytesWrite;
use afterimage_wire::proto::{Kind, Message, Role, Status, Welcome};
use afterimage_wire::{CallError, Client};
use bytes::Bytes;
use tokio::net::TcpListener;

use crate::{PATIENCE, Peer, label, options, pair, pair_with, pipes, soon, welcome};

#[tokio::test]
async fn every_call_gets_its_answer() {
    let (client, peer, _listener) = pair(options()).await;
    tokio::spawn(peer.serve());
    soon(async {
        assert_eq!(client.classify(&[7, 0]).await.unwrap(), label(7));
        assert_eq!(client.cache().get(4).await.unwrap(), Some(4));
        assert_eq!(client.cache().get(5).await.unwrap(), None);
        assert_eq!(client.cache().get_many(&[2, 3, 6]).await.unwrap(), [Some(2), None, Some(6)]);
        assert_eq!(client.cache().get_many(&[]).await.unwrap(), []);
        client.cache().set(1, -1).unwrap();
        assert!(client.ping().await.unwrap() > Duration::ZERO);
        assert!(client.admin().stats().await.unwrap().entries.is_empty());
    })
    .await;
    assert_eq!(*client.welcome().unwrap(), welcome());
    let counters = client.counters();
    assert_eq!((counters.sent, counters.received), (9, 8));
    assert_eq!((counters.connects, counters.in_flight), (1, 0));
}

#[tokio::test]
async fn many_images_are_answered_in_order() {
    // 32 images of 4 KiB fit in half of the queue.
    let (client, peer, _listener) = pair(options().max_queued_bytes(256 << 10)).await;
    tokio::spawn(peer.serve());
    let images: Vec<_> = (0..1000).map(|i| vec![i as u8; 4096]).collect();
    let labels = soon(client.classify_many(&images)).await.unwrap();
    let expected: Vec<_> = images.iter().map(|image| label(image[0].into())).collect();
    assert_eq!(labels, expected);
    assert_eq!(client.counters().in_flight, 0);
    assert!(soon(client.classify_many::<&[u8]>(&[])).await.unwrap().is_empty());
}

#[tokio::test]
async fn lost_images_are_sent_again_together() {
    let (client, mut peer, mut listener) = pair(options()).await;
    let call = tokio::spawn({
        let client = client.clone();
        async move { client.classify_many(&[[1], [2], [3]]).await }
    });
    let first = peer.expect(Kind::ClassifyReq).await;
    peer.send(first, Message::ClassifyResp(label(1))).await;
    drop(peer);
    // The new connection gets the two images without an answer, one right after the other.
    let mut peer = listener.welcome().await;
    let second = peer.expect(Kind::ClassifyReq).await;
    let last = peer.expect(Kind::ClassifyReq).await;
    peer.send(second, Message::ClassifyResp(label(2))).await;
    let text = "an image has 784 bytes";
    peer.send(last, Message::Error { status: Status::BadArgument, text, connection: false }).await;
    let error = soon(call).await.unwrap().unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Invalid, "{error}");
}

#[tokio::test]
async fn connects_to_the_second_address_with_the_token() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let closed = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let addresses = [closed.local_addr().unwrap(), listener.local_addr().unwrap()];
    drop(closed);
    let served = tokio::spawn(async move {
        let (stream, _) = listener.accept().await.unwrap();
        let mut peer = Peer::new(stream);
        let hello = peer.next().await;
        let Message::Hello(hello) = hello.message().unwrap() else {
            panic!("the first frame is not a Hello");
        };
        assert_eq!(hello.token, b"secret");
        peer.send(0, Message::Welcome(welcome())).await;
        peer.serve().await;
    });
    // The client tries the second address without a pause.
    let options = options().backoff(PATIENCE * 100, PATIENCE * 100);
    let client = soon(Client::connect(addresses, options.token("secret"))).await.unwrap();
    assert_eq!(soon(client.classify(&[3])).await.unwrap(), label(3));
    assert_eq!(client.counters().attempts, 2);
    drop(client);
    soon(served).await.unwrap();
}

#[tokio::test]
async fn a_lazy_client_holds_its_calls_until_it_is_connected() {
    let (connector, mut listener) = pipes(1 << 16);
    let client = Client::with_connector(connector, options());
    assert!(!client.is_connected() && client.welcome().is_none());
    client.cache().set(2, 3).unwrap();
    let call = tokio::spawn({
        let client = client.clone();
        async move { client.classify(&[5]).await }
    });
    let mut peer = listener.welcome().await;
    assert_eq!(peer.next().await.message().unwrap(), Message::CacheWrite { key: 2, value: 3 });
    tokio::spawn(peer.serve());
    assert_eq!(soon(call).await.unwrap().unwrap(), label(5));
}

#[tokio::test]
async fn queued_writes_and_reads_keep_their_order() {
    let (connector, mut listener) = pipes(1 << 16);
    let client = Client::with_connector(connector, options().max_in_flight(1));
    for key in 0..3 {
        client.cache().set(key, 1).unwrap();
        client.cache().submit_get_many(&[key], PATIENCE, Reply::call(|_| {}));
        client.cache().set(key, 2).unwrap();
    }
    let mut peer = listener.welcome().await;
    for key in 0..3 {
        let message = peer.next().await;
        assert_eq!(message.message().unwrap(), Message::CacheWrite { key, value: 1 });
        let read = peer.next().await;
        assert!(matches!(read.message().unwrap(), Message::CacheRead { key: k, .. } if k == key));
        // The window is full: a write is sent after the earlier writes.
        client.cache().set(100 + key, 3).unwrap();
        peer.send(read.header.id, Message::CacheResp { value: None }).await;
        let message = peer.next().await;
        assert_eq!(message.message().unwrap(), Message::CacheWrite { key, value: 2 });
    }
    for key in 100..103 {
        let message = peer.next().await;
        assert_eq!(message.message().unwrap(), Message::CacheWrite { key, value: 3 });
    }
}

#[tokio::test]
async fn requests_carry_the_time_that_is_left() {
    let (client, mut peer, _listener) = pair(options()).await;
    for (timeout_ms, lowest, highest) in [(5_000, 1, 5_000), (3_600_000, 0, 0)] {
        let timeout = Duration::from_millis(timeout_ms);
        client.submit_classify(&[1], timeout, Reply::call(|_| {}));
        let budget = peer.next().await.header.status;
        assert!((lowest..=highest).contains(&budget), "{budget}");
    }
}

#[tokio::test]
async fn ten_thousand_requests_in_flight_have_ten_thousand_ids() {
    let window = 10_000;
    let (client, mut peer, _listener) =
        pair_with(options().max_in_flight(window), Welcome { window: window as u32, ..welcome() })
            .await;
    let keys: Vec<u64> = (0..window as u64).map(|key| key * 2).collect();
    let call = tokio::spawn(async move { (client.cache().get_many(&keys).await, keys) });
    let mut asked = Vec::new();
    for _ in 0..window {
        let frame = peer.next().await;
        let Message::CacheRead { key, .. } = frame.message().unwrap() else {
            panic!("the frame is not a read");
        };
        asked.push((frame.header.id, key));
    }
    let ids: HashSet<u64> = asked.iter().map(|(id, _)| *id).collect();
    assert_eq!(ids.len(), window);
    for (id, key) in asked.into_iter().rev() {
        peer.send(id, Message::CacheResp { value: Some(key as i64) }).await;
    }
    let (values, keys) = soon(call).await.unwrap();
    let expected: Vec<Option<i64>> = keys.iter().map(|&key| Some(key as i64)).collect();
    assert_eq!(values.unwrap(), expected);
}

#[tokio::test]
async fn a_call_may_have_a_timeout_of_its_own() {
    let (client, mut peer, _listener) = pair(options()).await;
    let short = CallOptions::new().timeout(Duration::from_millis(20));
    let error = soon(client.classify_with(&[1], short)).await.unwrap_err();
    assert_eq!(
        error.to_string(),
        "no answer from the server within 20ms: still waiting for the reply"
    );
    peer.expect(Kind::ClassifyReq).await;
}

/// Images of 1 byte to 100 KB.
fn images() -> Vec<Bytes> {
    let len = |i: u8| if i.is_multiple_of(2) { 1 } else { 1000 * usize::from(i) };
    (0..100).map(|i| vec![i; len(i)].into()).collect()
}

#[tokio::test]
async fn shared_images_are_sent_in_order_and_released() {
    let (connector, mut listener) = pipes(1 << 16);
    let client = Client::with_connector(connector, options());
    let (sender, labels) = channel();
    let submit = |image: &Bytes| {
        let sender = sender.clone();
        let reply = Reply::call(move |outcome: Classified| sender.send(outcome).unwrap());
        client.submit_classify_shared(image, PATIENCE, reply);
    };
    // One half is queued before there is a connection.
    let images = images();
    images[..50].iter().for_each(submit);
    let mut peer = listener.welcome_with(Welcome { max_body: 1 << 20, ..welcome() }).await;
    soon(client.connected(PATIENCE)).await.unwrap();
    images[50..].iter().for_each(submit);
    assert!(!images[99].is_unique(), "the client shares a large image");
    for image in &images {
        let frame = peer.next().await;
        let id = frame.header.id;
        let Message::ClassifyReq { image: sent, budget_ms } = frame.message().unwrap() else {
            panic!("{:?}", frame.header.kind);
        };
        assert!(sent == image && (1..=30_000).contains(&budget_ms));
        peer.send(id, Message::ClassifyResp(label(sent[0].into()))).await;
    }
    soon(async {
        while client.counters().in_flight > 0 {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    })
    .await;
    let labels: Vec<u16> = labels.try_iter().map(|outcome| outcome.unwrap().0.label).collect();
    assert_eq!(labels, (0..100).collect::<Vec<_>>());
    assert!(images.iter().all(Bytes::is_unique), "the client keeps no image");
}

#[tokio::test]
async fn large_rows_are_sent_with_the_time_that_is_left() {
    let (client, mut peer, _listener) = pair_with(options(), version_2()).await;
    let rows: [&[u8]; 2] = [&[1; 100_000], &[2; 3]];
    let call = tokio::spawn({
        let (client, request) = (client.clone(), Infer::rows("model", rows).version("2"));
        async move { client.infer(&request).await }
    });
    let frame = peer.next().await;
    let Message::InferReq(sent) = frame.message().unwrap() else {
        panic!("{:?}", frame.header.kind);
    };
    assert_eq!((sent.model, sent.version), ("model", "2"));
    assert!((1..=30_000).contains(&sent.budget_ms), "{} ms", sent.budget_ms);
    assert!(sent.rows.iter().eq(rows));
    call.abort();
}

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
