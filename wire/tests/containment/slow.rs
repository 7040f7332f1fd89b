//! Peers that are slow, silent, or too large.

use std::sync::Arc;
use std::time::Duration;

use afterimage_testkit::first_byte::FirstByte;
use afterimage_wire::proto::message::Message;
use afterimage_wire::proto::stats::Value;
use afterimage_wire::proto::{Header, Kind, Status};
use afterimage_wire::server::{Server, ServerOptions};
use tokio::io::{AsyncReadExt, AsyncWriteExt, duplex};
use tokio::net::TcpStream;
use tokio::sync::mpsc;
use tokio_rustls::TlsConnector;

use crate::house::{
    House, NEVER, PATIENCE, SOON, Stream, certificates, client_hello, hello, last_words,
};

/// Sends a byte now and then, until the server says something; then reads to the end: its last
/// words.
async fn trickle(stream: &mut dyn Stream, bytes: &[u8]) -> (Status, String) {
    let mut said = Vec::new();
    let mut scratch = [0; 1024];
    for byte in bytes {
        // The server may have hung up.
        let _ = stream.write_all(&[*byte]).await;
        let _ = stream.flush().await;
        let pause = SOON / 10;
        if let Ok(read) = tokio::time::timeout(pause, stream.read(&mut scratch)).await {
            said.extend_from_slice(&scratch[..read.unwrap()]);
            break;
        }
    }
    stream.read_to_end(&mut said).await.unwrap();
    last_words(&said)
}

#[tokio::test]
async fn a_hello_that_trickles_is_cut_off() {
    for secure in [false, true] {
        let options = ServerOptions { handshake_timeout: SOON, ..Default::default() };
        let house = House::open(secure, options).await;
        let mut stranger = house.stranger().await;
        let (status, text) = house.while_answering(trickle(&mut *stranger, &hello())).await;
        assert_eq!((status, &*text), (Status::DeadlineExceeded, "no Hello within 1s"));
    }
}

#[tokio::test]
async fn a_frame_that_trickles_is_cut_off() {
    for secure in [false, true] {
        let options = ServerOptions { frame_timeout: SOON, ..Default::default() };
        let house = House::open(secure, options).await;
        let mut guest = house.guest().await;
        let mut bytes = Vec::new();
        Message::ClassifyReq { image: &[7; 784], budget_ms: 0 }.encode(1, &mut bytes);
        let (status, text) = house.while_answering(trickle(&mut *guest, &bytes)).await;
        assert_eq!(status, Status::DeadlineExceeded);
        assert_eq!(text, "a frame was not complete within 1s");
    }
}

#[tokio::test]
async fn a_frame_of_4_gib_is_not_waited_for() {
    for secure in [false, true] {
        let house = House::open(secure, ServerOptions::default()).await;
        let mut guest = house.guest().await;
        let kind = Kind::ClassifyReq;
        let header = Header { body_len: u32::MAX, kind, flags: 0, status: 0, id: 1 };
        let (status, text) = house
            .while_answering(async {
                guest.write_all(&header.encode()).await.unwrap();
                guest.flush().await.unwrap();
                let mut said = Vec::new();
                guest.read_to_end(&mut said).await.unwrap();
                last_words(&said)
            })
            .await;
        assert_eq!(status, Status::TooLarge);
        assert_eq!(text, "frame body is 4294967295 bytes; the limit is 1048576");
    }
}

#[tokio::test]
async fn a_peer_that_never_reads_is_cut_off() {
    for secure in [false, true] {
        let options = ServerOptions { write_timeout: SOON, ..Default::default() };
        let house = House::open(secure, options).await;
        let mut deaf = house.guest().await;
        let mut questions = Vec::new();
        for id in 0..1000 {
            Message::StatsReq.encode(id, &mut questions);
        }
        // Ends with an error when the server hangs up.
        house.while_answering(async { while deaf.write_all(&questions).await.is_ok() {} }).await;
    }
}

/// As many replies as a socket's buffers and TLS hold, and not one more: the server has nothing to
/// send, and still the peer does not read.
#[tokio::test]
async fn what_only_tls_still_holds_is_not_taken_for_read() {
    let (server_tls, client_tls, _folder) = certificates();
    let (network, listener) = mpsc::channel(1);
    let options = ServerOptions {
        tls: Some(server_tls),
        write_timeout: SOON,
        idle_timeout: NEVER,
        ..Default::default()
    };
    tokio::spawn(Server::new(listener, Arc::new(FirstByte), options).serve(std::future::pending()));
    // A pipe that holds some replies, and not all.
    let (near, far) = duplex(4096);
    network.send((far, "somebody")).await.unwrap();
    let name = client_tls.name_for("127.0.0.1").unwrap();
    let mut deaf = TlsConnector::from(client_tls.config()).connect(name, near).await.unwrap();
    let mut bytes = hello();
    for id in 0..10 {
        Message::StatsReq.encode(id, &mut bytes);
    }
    deaf.write_all(&bytes).await.unwrap();
    let cut_off = async {
        // What the server takes without an answer, so that nothing of its own moves.
        let mut notice = Vec::new();
        Message::Pong(&[]).encode(99, &mut notice);
        while deaf.write_all(&notice).await.is_ok() && deaf.flush().await.is_ok() {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    tokio::time::timeout(PATIENCE, cut_off).await.expect("it is cut off");
}

#[tokio::test]
async fn peers_that_are_gone_without_a_word_leave_nothing_behind() {
    for secure in [false, true] {
        let options =
            ServerOptions { handshake_timeout: SOON, idle_timeout: SOON, ..Default::default() };
        let house = House::open(secure, options).await;
        // None of them ever reads, writes or closes: what a peer looks like that lost its power.
        let in_the_socket = TcpStream::connect(house.addr).await.unwrap();
        let after_tls = house.stranger().await;
        let after_hello = house.guest().await;
        let mut half_a_handshake = TcpStream::connect(house.addr).await.unwrap();
        half_a_handshake.write_all(&client_hello(house.tls.as_ref())[..10]).await.unwrap();
        let gone = async {
            loop {
                let stats = house.first.stats().await.unwrap();
                let open = stats.entries.iter().find(|(name, _)| name == "connections_open");
                let alone = open.is_some_and(|(_, value)| *value == Value::Gauge(1));
                if alone && stats.counter_value("connections_accepted") == 5 {
                    break;
                }
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        house.while_answering(gone).await;
        drop((in_the_socket, after_tls, after_hello, half_a_handshake));
    }
}

#[tokio::test]
async fn whoever_has_not_said_hello_is_told_when_the_server_goes() {
    for secure in [false, true] {
        let mut house = House::open(secure, ServerOptions::default()).await;
        let mut stranger = house.stranger().await;
        // The server has it: what comes after it has been accepted.
        while house.count("connections_accepted").await < 2 {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        house.stop.take().unwrap().send(()).unwrap();
        let mut said = Vec::new();
        let reading = stranger.read_to_end(&mut said);
        tokio::time::timeout(PATIENCE, reading).await.unwrap().unwrap();
        let (status, text) = last_words(&said);
        assert_eq!((status, &*text), (Status::ShuttingDown, "the server is shutting down"));
        tokio::time::timeout(PATIENCE, house.served).await.unwrap().unwrap();
    }
}
