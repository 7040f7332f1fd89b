//! The end of connections and of the server.

use std::time::Duration;

use afterimage_wire::proto::Status;
use afterimage_wire::proto::message::Message;
use afterimage_wire::server::ServerOptions;
use tokio::io::AsyncWriteExt;
use tokio::net::TcpStream;

use crate::puppet::{
    HELD, LATER, PATIENCE, assert_works, class, classify, connect, error, next, recv, start,
};

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
