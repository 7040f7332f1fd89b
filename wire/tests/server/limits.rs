//! Limits and timeouts of the server.

use std::sync::Arc;
use std::time::Duration;

use afterimage_testkit::doubles::FirstByte;
use afterimage_wire::proto::codec::FrameCodec;
use afterimage_wire::proto::handshake::Hello;
use afterimage_wire::proto::message::Message;
use afterimage_wire::proto::{Header, Kind, Status};
use afterimage_wire::server::{Server, ServerOptions};
use futures_util::{SinkExt, StreamExt};
use tokio::io::AsyncWriteExt;
use tokio::net::TcpStream;
use tokio_util::codec::Framed;

use crate::{
    HELD, NOW, PATIENCE, assert_works, class, classify, connect, error, next, recv, start,
};

#[tokio::test]
async fn a_full_server_answers_overloaded_and_reuses_slots() {
    let server = start(ServerOptions { max_connections: 2, ..Default::default() }).await;
    let (mut a, mut b) = (connect(server.addr).await, connect(server.addr).await);
    let mut refused =
        Framed::new(TcpStream::connect(server.addr).await.unwrap(), FrameCodec::default());
    let (status, text, connection) = error(&recv(&mut refused).await);
    assert_eq!((status, connection), (Status::Overloaded, true));
    assert!(text.contains("the limit is 2"), "{text}");
    assert_works(&mut a).await;
    drop(a);
    let mut again = loop {
        let stream = TcpStream::connect(server.addr).await.unwrap();
        let mut client = Framed::new(stream, FrameCodec::default());
        client.send((7, Message::Hello(Hello::new(b"")))).await.unwrap();
        if matches!(recv(&mut client).await.message(), Ok(Message::Welcome(_))) {
            break client;
        }
    };
    assert_works(&mut again).await;
    assert_works(&mut b).await;
}

#[tokio::test]
async fn a_full_window_stops_reading_until_replies_are_sent() {
    let server = start(ServerOptions { window: 8, ..Default::default() }).await;
    let mut client = connect(server.addr).await;
    for id in 0..20 {
        classify(&mut client, id, HELD, id as u8).await;
    }
    server.service.until_held(8).await;
    tokio::time::sleep(Duration::from_millis(50)).await;
    assert_eq!(server.service.held.lock().unwrap().len(), 8, "no more than the window is held");
    let mut answered = 0;
    while answered < 20 {
        answered += server.service.release();
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    let mut ids: Vec<u64> = Vec::new();
    for _ in 0..20 {
        ids.push(recv(&mut client).await.header.id);
    }
    ids.sort_unstable();
    assert_eq!(ids, (0..20).collect::<Vec<_>>());
}

#[tokio::test]
async fn a_missing_hello_gets_deadline_exceeded() {
    let handshake_timeout = Duration::from_millis(50);
    let server = start(ServerOptions { handshake_timeout, ..Default::default() }).await;
    for sent in [&b""[..], &[0x20, 0, 0]] {
        let mut stream = TcpStream::connect(server.addr).await.unwrap();
        stream.write_all(sent).await.unwrap();
        let mut client = Framed::new(stream, FrameCodec::default());
        let (status, _, connection) = error(&recv(&mut client).await);
        assert_eq!((status, connection), (Status::DeadlineExceeded, true));
        assert!(next(&mut client).await.is_none());
    }
}

#[tokio::test]
async fn only_connections_without_requests_are_idle() {
    let idle_timeout = Duration::from_millis(700);
    let server = start(ServerOptions { idle_timeout, ..Default::default() }).await;
    let mut waiting = connect(server.addr).await;
    classify(&mut waiting, 1, HELD, 1).await;
    let mut idle = connect(server.addr).await;
    assert!(matches!(recv(&mut idle).await.message(), Ok(Message::GoAway { .. })));
    assert!(next(&mut idle).await.is_none());
    tokio::time::sleep(idle_timeout * 2).await;
    server.service.until_held(1).await;
    server.service.release();
    assert_eq!(class(&recv(&mut waiting).await), 1);
}

#[tokio::test]
async fn the_frame_timeout_ignores_time_with_a_full_window() {
    let frame_timeout = Duration::from_secs(1);
    let server = start(ServerOptions { frame_timeout, window: 1, ..Default::default() }).await;
    // The window of this client is full, so the server does not read the rest of its frame.
    let mut blocked = connect(server.addr).await;
    let mut bytes = Vec::new();
    Message::ClassifyReq { image: &[HELD, 1], budget_ms: 0 }.encode(1, &mut bytes);
    let half = bytes.len() + 5;
    Message::ClassifyReq { image: &[NOW, 2], budget_ms: 0 }.encode(2, &mut bytes);
    blocked.get_mut().write_all(&bytes[..half]).await.unwrap();
    server.service.until_held(1).await;

    let mut trickling = connect(server.addr).await;
    let mut bytes_left = bytes.clone().into_iter().skip(half - 5).take(17);
    let cut_off = async {
        loop {
            if let Some(byte) = bytes_left.next() {
                trickling.get_mut().write_all(&[byte]).await.unwrap();
            }
            match tokio::time::timeout(Duration::from_millis(20), trickling.next()).await {
                Ok(frame) => break frame.unwrap().unwrap(),
                Err(_) => continue,
            }
        }
    };
    let frame = tokio::time::timeout(PATIENCE, cut_off).await.unwrap();
    assert_eq!((error(&frame).0, error(&frame).2), (Status::DeadlineExceeded, true));

    tokio::time::sleep(frame_timeout).await;
    server.service.release();
    assert_eq!(class(&recv(&mut blocked).await), 1);
    blocked.get_mut().write_all(&bytes[half..]).await.unwrap();
    assert_eq!(class(&recv(&mut blocked).await), 2);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_peer_that_does_not_read_is_disconnected() {
    let write_timeout = Duration::from_millis(300);
    let server = start(ServerOptions { write_timeout, ..Default::default() }).await;
    let mut bytes = Vec::new();
    for id in 0..10_000 {
        Message::StatsReq.encode(id, &mut bytes);
    }
    let mut deaf = connect(server.addr).await;
    let mut other = connect(server.addr).await;
    let sending = async {
        // The write fails when the server closes.
        while deaf.get_mut().write_all(&bytes).await.is_ok() {}
    };
    let talking = async {
        loop {
            assert_works(&mut other).await;
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(PATIENCE, async {
        tokio::select! { () = sending => {}, () = talking => {} }
    })
    .await
    .expect("the server closes the connection that does not read");
    assert_works(&mut other).await;
}

#[tokio::test]
async fn extreme_timeouts_are_clamped() {
    let extreme = ServerOptions {
        handshake_timeout: Duration::MAX,
        idle_timeout: Duration::MAX,
        frame_timeout: Duration::MAX,
        write_timeout: Duration::MAX,
        drain_timeout: Duration::ZERO,
        window: 0,
        ..Default::default()
    };
    let server = start(extreme).await;
    assert_works(&mut connect(server.addr).await).await;
}

#[tokio::test]
async fn a_body_of_impossible_length_is_refused_from_the_header() {
    let server = start(ServerOptions::default()).await;
    let mut client = connect(server.addr).await;
    let cases = [
        (Kind::ClassifyReq, Status::BadArgument),
        (Kind::Ping, Status::BadArgument),
        (Kind::StatsReq, Status::BadArgument),
        (Kind::SnapshotReq, Status::BadArgument),
        (Kind::CacheReq, Status::Unsupported),
        (Kind::Hello, Status::BadArgument),
        (Kind::Unknown(0xEE), Status::Unsupported),
    ];
    for (id, (kind, expected)) in (1..).zip(cases) {
        let header = Header { body_len: 1 << 20, kind, flags: 0, status: 0, id };
        // The answer comes before a byte of the body is sent.
        client.get_mut().write_all(&header.encode()).await.unwrap();
        let frame = recv(&mut client).await;
        assert_eq!((frame.header.id, error(&frame).0), (id, expected), "{kind:?}");
        client.get_mut().write_all(&vec![0; 1 << 20]).await.unwrap();
        assert_works(&mut client).await;
    }
    let header = Header { body_len: 3, kind: Kind::ClassifyReq, flags: 1, status: 0, id: 50 };
    client.get_mut().write_all(&header.encode()).await.unwrap();
    assert_eq!(error(&recv(&mut client).await).0, Status::Unsupported);
}

#[tokio::test]
async fn a_large_frame_without_memory_is_overloaded() {
    let options = ServerOptions { max_buffer_memory: 300 << 10, ..Default::default() };
    let server = Server::bind("127.0.0.1:0", Arc::new(FirstByte), options).await.unwrap();
    let addr = server.local_addr().unwrap();
    tokio::spawn(server.serve(std::future::pending()));
    let mut large = connect(addr).await;
    large.send((1, Message::ClassifyReq { image: &[9; 1 << 20], budget_ms: 0 })).await.unwrap();
    let frame = recv(&mut large).await;
    let (status, text, connection) = error(&frame);
    assert_eq!((frame.header.id, status, connection), (1, Status::Overloaded, false), "{text}");
    assert!(text.contains("1048576") && text.contains("307200"), "{text}");
    // The rest of the body is skipped, and the connection goes on.
    large.send((2, Message::ClassifyReq { image: &[9; 784], budget_ms: 0 })).await.unwrap();
    assert_eq!(class(&recv(&mut large).await), 9);
}
