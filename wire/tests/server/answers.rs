//! Answers to valid and invalid requests, and the end of connections and of the server.

use std::sync::atomic::Ordering;
use std::time::Duration;

use afterimage_wire::proto::codec::FrameCodec;
use afterimage_wire::proto::handshake::Hello;
use afterimage_wire::proto::message::Message;
use afterimage_wire::proto::{Role, Status};
use afterimage_wire::server::{ServerOptions, Token};
use futures_util::SinkExt;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio_util::codec::Framed;

use crate::{
    DROPPED, FORGOTTEN, HELD, LATER, NOW, PANIC, PATIENCE, assert_works, class, classify, connect,
    connect_with, error, next, recv, start,
};

#[tokio::test]
async fn welcomes_and_answers_with_the_request_id() {
    let server = start(ServerOptions::default()).await;
    let (mut client, first) = connect_with(server.addr, b"").await;
    let Message::Welcome(welcome) = first.message().unwrap() else { panic!("no Welcome") };
    assert_eq!(welcome.service, Role::Classifier);
    assert_eq!((welcome.digest, welcome.classes, welcome.window), ([1; 32], 256, 16_384));
    assert_eq!(welcome.shape.dims(), [2]);
    // The lowest and the highest id, and an id that is used again after its reply.
    for id in [0, u64::MAX, 5, 5] {
        classify(&mut client, id, NOW, 9).await;
        let frame = recv(&mut client).await;
        assert_eq!((frame.header.id, class(&frame)), (id, 9));
    }
}

#[tokio::test]
async fn replies_come_out_of_order_when_later_ones_are_ready_first() {
    let server = start(ServerOptions::default()).await;
    let mut client = connect(server.addr).await;
    for id in 0..3 {
        classify(&mut client, id, HELD, id as u8).await;
    }
    classify(&mut client, 3, NOW, 3).await;
    assert_eq!(recv(&mut client).await.header.id, 3);
    server.service.until_held(3).await;
    server.service.release();
    for id in [2, 1, 0] {
        let frame = recv(&mut client).await;
        assert_eq!((frame.header.id, class(&frame)), (id, id as u16));
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn ten_thousand_requests_in_flight_get_one_reply_each() {
    let server = start(ServerOptions::default()).await;
    let mut client = connect(server.addr).await;
    for id in 0..10_000u64 {
        client
            .feed((id, Message::ClassifyReq { image: &[HELD, id as u8], budget_ms: 0 }))
            .await
            .unwrap();
    }
    client.flush().await.unwrap();
    tokio::time::timeout(PATIENCE, server.service.until_held(10_000)).await.unwrap();
    server.service.release();
    let mut seen = vec![false; 10_000];
    for _ in 0..10_000 {
        let frame = recv(&mut client).await;
        let id = frame.header.id as usize;
        assert_eq!(class(&frame), u16::from(id as u8));
        assert!(!std::mem::replace(&mut seen[id], true), "request {id} was answered twice");
    }
    assert_works(&mut client).await;
}

#[tokio::test]
async fn a_stream_split_at_every_byte_is_served_alike() {
    let server = start(ServerOptions::default()).await;
    let mut bytes = Vec::new();
    Message::Hello(Hello::new(b"")).encode(1, &mut bytes);
    Message::ClassifyReq { image: &[NOW, 8], budget_ms: 0 }.encode(2, &mut bytes);
    Message::Ping(b"abc").encode(3, &mut bytes);
    for cut in 1..bytes.len() {
        let mut stream = TcpStream::connect(server.addr).await.unwrap();
        stream.set_nodelay(true).unwrap();
        stream.write_all(&bytes[..cut]).await.unwrap();
        tokio::task::yield_now().await;
        tokio::time::sleep(Duration::from_micros(300)).await;
        stream.write_all(&bytes[cut..]).await.unwrap();
        let mut client = Framed::new(stream, FrameCodec::default());
        assert!(matches!(recv(&mut client).await.message(), Ok(Message::Welcome(_))), "cut {cut}");
        assert_eq!(class(&recv(&mut client).await), 8, "cut at {cut}");
        assert_eq!(recv(&mut client).await.message(), Ok(Message::Pong(b"abc")), "cut at {cut}");
    }
}

#[tokio::test]
async fn a_request_that_the_service_loses_gets_an_internal_error() {
    let server = start(ServerOptions::default()).await;
    let mut client = connect(server.addr).await;
    for how in [DROPPED, FORGOTTEN, PANIC] {
        classify(&mut client, how.into(), how, 0).await;
        let frame = recv(&mut client).await;
        assert_eq!(frame.header.id, u64::from(how));
        assert_eq!(error(&frame).0, Status::Internal);
        assert_works(&mut client).await;
    }
}

#[tokio::test]
async fn an_invalid_request_keeps_the_connection_open() {
    let server = start(ServerOptions { max_body: 100, ..Default::default() }).await;
    let mut client = connect(server.addr).await;
    let mut raw = Vec::new();

    client.send((1, Message::CacheRead { key: 1, budget_ms: 0 })).await.unwrap();
    let (status, text, _) = error(&recv(&mut client).await);
    assert_eq!(status, Status::Unsupported);
    assert_eq!(text, "this is a classifier; it does not answer CacheReq");

    client.send((2, Message::Unknown { kind: 0xF3 })).await.unwrap();
    let (status, text, _) = error(&recv(&mut client).await);
    assert_eq!(
        (status, &text[..]),
        (Status::Unsupported, "kind 0xf3 is not known to this version")
    );

    client.send((3, Message::CacheResp { value: None })).await.unwrap();
    assert_eq!(error(&recv(&mut client).await).0, Status::Unsupported);

    client.send((4, Message::Hello(Hello::new(b"")))).await.unwrap();
    assert_eq!(error(&recv(&mut client).await).0, Status::BadArgument);

    Message::ClassifyReq { image: &[NOW, 1], budget_ms: 0 }.encode(5, &mut raw);
    raw[5] = 0x40;
    client.get_mut().write_all(&raw).await.unwrap();
    let (status, text, _) = error(&recv(&mut client).await);
    assert_eq!(status, Status::Unsupported);
    assert_eq!(text, "malformed ClassifyReq: flags 0x40 are not known for this kind of request");

    let too_large = vec![0; 5000];
    client.send((6, Message::ClassifyReq { image: &too_large, budget_ms: 0 })).await.unwrap();
    let frame = recv(&mut client).await;
    assert_eq!(frame.header.id, 6);
    let too_large = (Status::TooLarge, "frame body is 5000 bytes; the limit is 100".into(), false);
    assert_eq!(error(&frame), too_large);

    // The server ignores replies of these kinds.
    client.send((8, Message::GoAway { text: "" })).await.unwrap();
    client
        .send((9, Message::Error { status: Status::None, text: "", connection: false }))
        .await
        .unwrap();
    assert_works(&mut client).await;
}

#[tokio::test]
async fn an_old_connection_gets_no_answer_of_a_new_model() {
    let server = start(ServerOptions::default()).await;
    let mut client = connect(server.addr).await;
    assert_works(&mut client).await;
    server.service.generation.fetch_add(1, Ordering::SeqCst);
    classify(&mut client, 1, NOW, 1).await;
    assert!(matches!(recv(&mut client).await.message(), Ok(Message::GoAway { .. })));
    let frame = recv(&mut client).await;
    assert_eq!((frame.header.id, error(&frame).0), (1, Status::ShuttingDown));
    assert!(next(&mut client).await.is_none());
    assert_works(&mut connect(server.addr).await).await;
}

#[tokio::test]
async fn statistics_cover_the_server_and_its_service() {
    let server = start(ServerOptions::default()).await;
    let mut client = connect(server.addr).await;
    assert_works(&mut client).await;
    client.send((1, Message::StatsReq)).await.unwrap();
    let frame = recv(&mut client).await;
    let Message::StatsResp(stats) = frame.message().unwrap() else { panic!("no statistics") };
    assert_eq!(stats.counter_value("puppet_calls"), 1);
    assert_eq!(stats.counter_value("requests"), 1);
    assert_eq!(stats.counter_value("connections_accepted"), 1);
}

#[tokio::test]
async fn a_reset_connection_does_not_affect_others() {
    let server = start(ServerOptions::default()).await;
    let mut other = connect(server.addr).await;
    let mut gone = connect(server.addr).await;
    for id in 0..100 {
        classify(&mut gone, id, HELD, 0).await;
    }
    server.service.until_held(100).await;
    gone.get_ref().set_zero_linger().unwrap();
    drop(gone);
    assert_works(&mut other).await;
    server.service.release();
    assert_works(&mut other).await;
}

#[tokio::test]
async fn a_half_closed_connection_gets_all_answers() {
    let server = start(ServerOptions::default()).await;
    let mut client = connect(server.addr).await;
    for id in 0..10 {
        classify(&mut client, id, LATER, id as u8).await;
    }
    classify(&mut client, 10, HELD, 10).await;
    client.get_mut().shutdown().await.unwrap();
    server.service.until_held(1).await;
    server.service.release();
    let mut ids = Vec::new();
    while let Some(frame) = next(&mut client).await {
        assert_eq!(u64::from(class(&frame)), frame.header.id);
        ids.push(frame.header.id);
    }
    ids.sort_unstable();
    assert_eq!(ids, (0..=10).collect::<Vec<_>>());
}

#[tokio::test]
async fn a_drain_sends_go_away_and_answers_open_requests() {
    let mut server = start(ServerOptions::default()).await;
    let mut client = connect(server.addr).await;
    classify(&mut client, 1, HELD, 1).await;
    server.service.until_held(1).await;
    server.stop.take().unwrap().send(()).unwrap();
    assert!(matches!(recv(&mut client).await.message(), Ok(Message::GoAway { .. })));
    // The server still answers requests that come after its GoAway.
    assert_works(&mut client).await;
    assert!(TcpStream::connect(server.addr).await.is_err(), "the port is closed");
    server.service.release();
    assert_eq!(class(&recv(&mut client).await), 1);
    assert!(next(&mut client).await.is_none());
    tokio::time::timeout(PATIENCE, server.task).await.unwrap().unwrap();
}

#[tokio::test]
async fn a_drain_ends_at_its_timeout() {
    let drain_timeout = Duration::from_millis(200);
    let mut server = start(ServerOptions { drain_timeout, ..Default::default() }).await;
    let mut client = connect(server.addr).await;
    classify(&mut client, 1, HELD, 1).await;
    server.service.until_held(1).await;
    server.stop.take().unwrap().send(()).unwrap();
    assert!(matches!(recv(&mut client).await.message(), Ok(Message::GoAway { .. })));
    let (status, _, connection) = error(&recv(&mut client).await);
    assert_eq!((status, connection), (Status::ShuttingDown, true));
    tokio::time::timeout(PATIENCE, server.task).await.unwrap().unwrap();
}

#[tokio::test]
async fn a_body_far_above_the_limit_closes_the_connection() {
    let server = start(ServerOptions { max_body: 100, ..Default::default() }).await;
    let mut client = connect(server.addr).await;
    let mut other = connect(server.addr).await;
    let mut raw = Vec::new();
    Message::Ping(b"").encode(1, &mut raw);
    raw[..4].copy_from_slice(&u32::MAX.to_le_bytes());
    client.get_mut().write_all(&raw).await.unwrap();
    let (status, text, connection) = error(&recv(&mut client).await);
    assert_eq!((status, connection), (Status::TooLarge, true));
    assert_eq!(text, "frame body is 4294967295 bytes; the limit is 100");
    assert!(next(&mut client).await.is_none());
    assert_works(&mut other).await;
}

#[tokio::test]
async fn an_http_request_gets_an_http_answer() {
    let server = start(ServerOptions::default()).await;
    let mut stream = TcpStream::connect(server.addr).await.unwrap();
    stream.write_all(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n").await.unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.unwrap();
    assert!(answer.starts_with("HTTP/1.1 400 "), "{answer}");
    assert!(answer.contains("This is the port of an Afterimage classifier."), "{answer}");
}

#[tokio::test]
async fn a_first_frame_that_is_not_a_hello_is_refused() {
    let server = start(ServerOptions::default()).await;
    let mut early = Vec::new();
    Message::Ping(b"x").encode(1, &mut early);
    let mut wrong_magic = Vec::new();
    Message::Hello(Hello::new(b"")).encode(1, &mut wrong_magic);
    wrong_magic[16] = b'X';
    for garbage in [&early[..], &wrong_magic, &[0xFF; 64], b"*1\r\n$4\r\nPING\r\n....."] {
        let mut stream = TcpStream::connect(server.addr).await.unwrap();
        stream.write_all(garbage).await.unwrap();
        let mut client = Framed::new(stream, FrameCodec::default());
        let (status, text, connection) = error(&recv(&mut client).await);
        assert_eq!((status, connection), (Status::BadArgument, true), "{text}");
        assert!(next(&mut client).await.is_none());
    }
}

#[tokio::test]
async fn only_the_right_token_is_accepted() {
    let token = Token::new("sesame");
    let server = start(ServerOptions { token, ..Default::default() }).await;
    for (token, text) in [(&b""[..], "a token is required"), (b"sesam", "the token is wrong")] {
        let (mut client, first) = connect_with(server.addr, token).await;
        assert_eq!(error(&first), (Status::Unauthenticated, text.into(), true));
        assert!(next(&mut client).await.is_none());
    }
    let (mut client, _) = connect_with(server.addr, b"sesame").await;
    assert_works(&mut client).await;
}

#[tokio::test]
async fn without_admin_rights_no_snapshots_and_no_internals() {
    let (token, admin_token) = (Token::new("use"), Token::new("admin"));
    let server = start(ServerOptions { token, admin_token, ..Default::default() }).await;
    for (token, expected) in [(&b"use"[..], Status::Unauthorized), (b"admin", Status::Unsupported)]
    {
        let (mut client, _) = connect_with(server.addr, token).await;
        client.send((1, Message::SnapshotReq)).await.unwrap();
        let (status, text, connection) = error(&recv(&mut client).await);
        assert_eq!((status, connection), (expected, false), "{text}");
        client.send((2, Message::StatsReq)).await.unwrap();
        let frame = recv(&mut client).await;
        let Message::StatsResp(stats) = frame.message().unwrap() else { panic!("no statistics") };
        assert_eq!(stats.get("puppet_address").is_some(), token == b"admin");
        assert_works(&mut client).await;
        assert_eq!(server.service.last_was_admin.load(Ordering::Relaxed), token == b"admin");
    }
}

#[tokio::test]
async fn an_unknown_version_is_refused() {
    let server = start(ServerOptions::default()).await;
    let stream = TcpStream::connect(server.addr).await.unwrap();
    let mut client = Framed::new(stream, FrameCodec::default());
    let hello = Hello { version_min: 3, version_max: 9, features: 0, token: b"" };
    client.send((1, Message::Hello(hello))).await.unwrap();
    let (status, text, connection) = error(&recv(&mut client).await);
    assert_eq!((status, connection), (Status::Unsupported, true));
    assert_eq!(text, "the client speaks protocol versions 3 to 9; the server 1 to 2");
}
