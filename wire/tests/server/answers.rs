//! Answers to valid and invalid requests.

use std::sync::atomic::Ordering;
use std::time::Duration;

use afterimage_wire::proto::codec::FrameCodec;
use afterimage_wire::proto::handshake::Hello;
use afterimage_wire::proto::message::Message;
use afterimage_wire::proto::{Role, Status};
use afterimage_wire::server::ServerOptions;
use futures_util::SinkExt;
use tokio::io::AsyncWriteExt;
use tokio::net::TcpStream;
use tokio_util::codec::Framed;

use crate::puppet::{
    DROPPED, FORGOTTEN, HELD, NOW, PANIC, PATIENCE, assert_works, class, classify, connect,
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
