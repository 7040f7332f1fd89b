//! Slow and silent peers, and frames that are too large.

use std::sync::Arc;
use std::time::Duration;

use afterimage_testkit::doubles::FirstByte;
use afterimage_wire::proto::message::Message;
use afterimage_wire::proto::stats::Value;
use afterimage_wire::proto::{Header, Kind, Status};
use afterimage_wire::server::{Server, ServerOptions};
use tokio::io::{AsyncReadExt, AsyncWriteExt, duplex};
use tokio::net::TcpStream;
use tokio::sync::mpsc;
use tokio_rustls::TlsConnector;

use crate::{NEVER, PATIENCE, SOON, Site, Stream, certificates, client_hello, hello, last_error};

/// Sends byte after byte with pauses until the server answers. Returns the Error at the end.
async fn trickle(stream: &mut dyn Stream, bytes: &[u8]) -> (Status, String) {
    let mut received = Vec::new();
    let mut scratch = [0; 1024];
    for byte in bytes {
        // The server may have closed.
        let _ = stream.write_all(&[*byte]).await;
        let _ = stream.flush().await;
        let pause = SOON / 10;
        if let Ok(read) = tokio::time::timeout(pause, stream.read(&mut scratch)).await {
            received.extend_from_slice(&scratch[..read.unwrap()]);
            break;
        }
    }
    stream.read_to_end(&mut received).await.unwrap();
    last_error(&received)
}

#[tokio::test]
async fn a_slow_hello_times_out() {
    for secure in [false, true] {
        let options = ServerOptions { handshake_timeout: SOON, ..Default::default() };
        let site = Site::open(secure, options).await;
        let mut stranger = site.stranger().await;
        let (status, text) = site.while_answering(trickle(&mut *stranger, &hello())).await;
        assert_eq!((status, &*text), (Status::DeadlineExceeded, "no Hello within 3s"));
    }
}

#[tokio::test]
async fn a_slow_frame_times_out() {
    for secure in [false, true] {
        let options = ServerOptions { frame_timeout: SOON, ..Default::default() };
        let site = Site::open(secure, options).await;
        let mut guest = site.guest().await;
        let mut bytes = Vec::new();
        Message::ClassifyReq { image: &[7; 784], budget_ms: 0 }.encode(1, &mut bytes);
        let (status, text) = site.while_answering(trickle(&mut *guest, &bytes)).await;
        assert_eq!(status, Status::DeadlineExceeded);
        assert_eq!(text, "a frame was not complete within 3s");
    }
}

#[tokio::test]
async fn a_frame_of_4_gib_is_rejected_from_its_header() {
    for secure in [false, true] {
        let site = Site::open(secure, ServerOptions::default()).await;
        let mut guest = site.guest().await;
        let kind = Kind::ClassifyReq;
        let header = Header { body_len: u32::MAX, kind, flags: 0, status: 0, id: 1 };
        let (status, text) = site
            .while_answering(async {
                guest.write_all(&header.encode()).await.unwrap();
                guest.flush().await.unwrap();
                let mut received = Vec::new();
                guest.read_to_end(&mut received).await.unwrap();
                last_error(&received)
            })
            .await;
        assert_eq!(status, Status::TooLarge);
        assert_eq!(text, "frame body is 4294967295 bytes; the limit is 17825792");
    }
}

#[tokio::test]
async fn a_peer_that_never_reads_is_disconnected() {
    for secure in [false, true] {
        let options = ServerOptions { write_timeout: SOON, ..Default::default() };
        let site = Site::open(secure, options).await;
        let mut deaf = site.guest().await;
        let mut questions = Vec::new();
        for id in 0..1000 {
            Message::StatsReq.encode(id, &mut questions);
        }
        // The write fails when the server closes.
        site.while_answering(async { while deaf.write_all(&questions).await.is_ok() {} }).await;
    }
}

/// The socket's buffers and TLS hold all replies: the server has nothing left to write, and the
/// peer still does not read.
#[tokio::test]
async fn bytes_buffered_by_tls_count_as_unread() {
    let (server_tls, client_tls, _folder) = certificates();
    let (network, listener) = mpsc::channel(1);
    let options = ServerOptions {
        tls: Some(server_tls),
        write_timeout: SOON,
        idle_timeout: NEVER,
        ..Default::default()
    };
    tokio::spawn(Server::new(listener, Arc::new(FirstByte), options).serve(std::future::pending()));
    // The pipe holds some of the replies.
    let (near, far) = duplex(4096);
    network.send((far, "a peer")).await.unwrap();
    let name = client_tls.name_for("127.0.0.1").unwrap();
    let mut deaf = TlsConnector::from(client_tls.config()).connect(name, near).await.unwrap();
    let mut bytes = hello();
    for id in 0..10 {
        Message::StatsReq.encode(id, &mut bytes);
    }
    deaf.write_all(&bytes).await.unwrap();
    let cut_off = async {
        // The server ignores a Pong, so it writes nothing more.
        let mut notice = Vec::new();
        Message::Pong(&[]).encode(99, &mut notice);
        while deaf.write_all(&notice).await.is_ok() && deaf.flush().await.is_ok() {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    tokio::time::timeout(PATIENCE, cut_off).await.expect("the server closes the connection");
}

#[tokio::test]
async fn connections_of_vanished_peers_are_closed() {
    for secure in [false, true] {
        let options =
            ServerOptions { handshake_timeout: SOON, idle_timeout: SOON, ..Default::default() };
        let site = Site::open(secure, options).await;
        // These peers never read, write or close, like machines that lost their power.
        let in_the_socket = TcpStream::connect(site.addr).await.unwrap();
        let after_tls = site.stranger().await;
        let after_hello = site.guest().await;
        let mut half_a_handshake = TcpStream::connect(site.addr).await.unwrap();
        half_a_handshake.write_all(&client_hello(site.tls.as_ref())[..10]).await.unwrap();
        let gone = async {
            loop {
                let stats = site.first.admin().stats().await.unwrap();
                let open = stats.entries.iter().find(|(name, _)| name == "connections_open");
                let alone = open.is_some_and(|(_, value)| *value == Value::Gauge(1));
                if alone && stats.counter_value("connections_accepted") == 5 {
                    break;
                }
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        site.while_answering(gone).await;
        drop((in_the_socket, after_tls, after_hello, half_a_handshake));
    }
}

#[tokio::test]
async fn a_drain_sends_an_error_to_peers_without_a_hello() {
    for secure in [false, true] {
        let mut site = Site::open(secure, ServerOptions::default()).await;
        let mut stranger = site.stranger().await;
        // Wait until the server has accepted the connection.
        while site.count("connections_accepted").await < 2 {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        site.stop.take().unwrap().send(()).unwrap();
        let mut received = Vec::new();
        let reading = stranger.read_to_end(&mut received);
        tokio::time::timeout(PATIENCE, reading).await.unwrap().unwrap();
        let (status, text) = last_error(&received);
        assert_eq!((status, &*text), (Status::ShuttingDown, "the server is shutting down"));
        tokio::time::timeout(PATIENCE, site.served).await.unwrap().unwrap();
    }
}
