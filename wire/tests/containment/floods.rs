//! Floods of connections.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use afterimage_testkit::doubles::FirstByte;
use afterimage_wire::Client;
use afterimage_wire::proto::stats::Value;
use afterimage_wire::proto::{Frame, HEADER_LEN, Header, Kind, Message, Status};
use afterimage_wire::server::{Server, ServerOptions};
use futures_util::FutureExt;
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream, duplex};
use tokio::net::{TcpSocket, TcpStream};
use tokio::sync::mpsc;

use crate::{NEVER, PATIENCE, Site, certificates, client_hello, client_options, hello, last_error};

/// Opens connections, sends `first` on each, and keeps them open.
async fn flood(addr: SocketAddr, first: &[u8]) {
    let mut held = Vec::new();
    for n in 0u64.. {
        // A refused or reset connection counts, too.
        let connected: io::Result<TcpStream> = async {
            let mut stream = TcpStream::connect(addr).await?;
            stream.write_all(first).await?;
            Ok(stream)
        }
        .await;
        held.push(connected);
        if held.len() == 600 {
            std::future::pending::<()>().await;
        }
        if n % 8 == 0 {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    }
}

#[tokio::test]
async fn a_flood_of_connections_blocks_no_client() {
    for (secure, length) in [(false, 0), (false, 10), (true, 0), (true, 10), (true, usize::MAX)] {
        let options =
            ServerOptions { max_connections: 256, handshake_timeout: NEVER, ..Default::default() };
        let site = Site::open(secure, options).await;
        let mut first = client_hello(site.tls.as_ref());
        first.truncate(length);
        let newcomers = async {
            // By now the flood has opened more connections than the limit.
            while site.count("connections_accepted").await < 400 {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
            for _ in 0..3 {
                let newcomer = Client::connect(site.addr, client_options(site.tls.clone()));
                let newcomer = newcomer.await.unwrap();
                assert_eq!(newcomer.classify(&[1]).await.unwrap().label, 1);
            }
        };
        let flooded = async {
            tokio::select! { () = flood(site.addr, &first) => {}, () = newcomers => {} }
        };
        site.while_answering(flooded).await;
        assert!(site.count("connections_evicted").await > 0);
    }
}

#[tokio::test]
async fn peers_without_a_hello_do_not_fill_a_small_server() {
    for (secure, max_connections) in [(false, 8), (true, 8), (false, 3)] {
        let options =
            ServerOptions { max_connections, handshake_timeout: NEVER, ..Default::default() };
        let site = Site::open(secure, options).await;
        let mut strangers = Vec::new();
        for n in 1..=2 * max_connections as u64 {
            strangers.push(TcpStream::connect(site.addr).await.unwrap());
            // One by one: the server has accepted or refused each before the next one.
            let seen = async {
                let count = ["connections_accepted", "connections_refused"];
                while site.count(count[0]).await + site.count(count[1]).await < 1 + n {
                    tokio::time::sleep(Duration::from_millis(1)).await;
                }
            };
            tokio::time::timeout(PATIENCE, seen).await.unwrap();
        }
        let newcomer = Client::connect(site.addr, client_options(site.tls.clone()));
        let newcomer = site.while_answering(newcomer).await.unwrap();
        assert_eq!(newcomer.classify(&[1]).await.unwrap().label, 1);
        drop(strangers);
    }
}

#[tokio::test]
async fn a_failed_handshake_is_counted_once() {
    // Shorter than the time for which the server still reads after a failed handshake.
    let handshake_timeout = Duration::from_millis(800);
    let site = Site::open(true, ServerOptions { handshake_timeout, ..Default::default() }).await;
    // On a busy machine the first client's handshake may have timed out and been repeated.
    let before = site.count("tls_failed").await;
    let mut broken = client_hello(site.tls.as_ref());
    broken[5] ^= 0xFF;
    let mut stranger = TcpStream::connect(site.addr).await.unwrap();
    stranger.write_all(&broken).await.unwrap();
    let over = async {
        while site.count("tls_failed").await == before {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        // The peer receives an alert and the end of the stream.
        let mut alert = Vec::new();
        stranger.read_to_end(&mut alert).await.unwrap();
        assert!(!alert.is_empty());
        loop {
            let stats = site.first.admin().stats().await.unwrap();
            if stats.get("connections_open") == Some(&Value::Gauge(1)) {
                return stats.counter_value("tls_failed");
            }
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    };
    assert_eq!(site.while_answering(over).await, before + 1);
}

/// The test uses no clock: everything is ready at once, and only the order counts.
#[tokio::test]
async fn handshakes_do_not_delay_the_next_answer() {
    const HANDSHAKES: usize = 100;
    let (server_tls, client_tls, _folder) = certificates();
    let (network, listener) = mpsc::channel::<(DuplexStream, &'static str)>(HANDSHAKES);
    let options = ServerOptions { tls: Some(server_tls), ..Default::default() };
    tokio::spawn(Server::new(listener, Arc::new(FirstByte), options).serve(std::future::pending()));
    let connector = {
        let network = network.clone();
        move |_| {
            let network = network.clone();
            async move {
                let (near, far) = duplex(1 << 16);
                network.send((far, "a client")).await.map_err(io::Error::other)?;
                Ok(near)
            }
        }
    };
    let named = client_tls.clone().server_name("127.0.0.1").unwrap();
    let client = Client::with_connector(connector, client_options(Some(named)));
    client.classify(&[1]).await.unwrap();

    let hello = client_hello(Some(&client_tls));
    let mut strangers = Vec::new();
    for _ in 0..HANDSHAKES {
        let (mut near, far) = duplex(1 << 16);
        near.write_all(&hello).await.unwrap();
        network.send((far, "a stranger")).await.unwrap();
        strangers.push(near);
    }
    client.classify(&[2]).await.unwrap();
    let mut answered = 0;
    for stranger in &mut strangers {
        answered += usize::from(stranger.read_u8().now_or_never().is_some());
    }
    assert!(answered < HANDSHAKES / 2, "{answered} of {HANDSHAKES} handshakes came first");
    // All of them get an answer.
    for stranger in &mut strangers {
        tokio::time::timeout(PATIENCE, stranger.read_u8()).await.unwrap().unwrap();
    }
}

#[tokio::test]
async fn one_address_cannot_hold_all_connections() {
    let options =
        ServerOptions { max_connections_per_address: Some(3), ..ServerOptions::default() };
    let site = Site::open(false, options).await;
    let mut held = vec![site.guest().await, site.guest().await];
    let mut refused = TcpStream::connect(site.addr).await.unwrap();
    let mut received = Vec::new();
    refused.read_to_end(&mut received).await.unwrap();
    let (status, text) = last_error(&received);
    assert_eq!(status, Status::Overloaded);
    assert_eq!(text, "127.0.0.1 has 3 connections open; the limit per address is 3");
    // Another address is served.
    let socket = TcpSocket::new_v4().unwrap();
    socket.bind("127.0.0.2:0".parse().unwrap()).unwrap();
    let mut other = socket.connect(site.addr).await.unwrap();
    other.write_all(&hello()).await.unwrap();
    assert_eq!(first_kind(&mut other).await, Kind::Welcome);
    // A connection that ends makes space for the next one of its address.
    held.pop();
    site.while_answering(async { while welcome(site.addr).await.is_none() {} }).await;
}

#[tokio::test]
async fn pings_do_not_hold_a_slot() {
    let options = ServerOptions { max_connections: 4, ..ServerOptions::default() };
    let site = Site::open(false, options).await;
    let mut pinging = Vec::new();
    for _ in 0..3 {
        pinging.push(site.guest().await);
    }
    let pings = async {
        let mut ping = Vec::new();
        Message::Ping(b"").encode(9, &mut ping);
        loop {
            for peer in &mut pinging {
                // Fails for a peer that is evicted.
                let _ = peer.write_all(&ping).await;
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    let newcomers = async {
        let mut held = Vec::new();
        while held.len() < 3 {
            held.extend(welcome(site.addr).await);
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    let done = async {
        tokio::select! { () = pings => unreachable!(), () = newcomers => {} }
    };
    site.while_answering(done).await;
    assert_eq!(site.count("connections_evicted").await, 3);
    // An evicted peer learns it from a GoAway.
    let mut received = Vec::new();
    let _ = pinging[0].read_to_end(&mut received).await;
    let mut rest = &received[..];
    let mut kinds = Vec::new();
    while let Ok(Some(frame)) = Frame::decode(rest, 1 << 20) {
        kinds.push(frame.header.kind);
        rest = &rest[frame.header.frame_len()..];
    }
    assert_eq!(kinds.last(), Some(&Kind::GoAway));
}

#[tokio::test]
async fn every_refused_client_gets_an_error() {
    let options = ServerOptions { max_connections: 1, ..ServerOptions::default() };
    let site = Site::open(false, options).await;
    let refused: Vec<_> = (0..400)
        .map(|_| {
            tokio::spawn(async move {
                let mut stream = TcpStream::connect(site.addr).await.unwrap();
                stream.write_all(&hello()).await.ok();
                let mut header = [0; HEADER_LEN];
                stream.read_exact(&mut header).await.unwrap();
                let header = Header::decode(&header).unwrap();
                (header.kind, Status::from_code(header.status))
            })
        })
        .collect();
    let all = async {
        for refused in refused {
            assert_eq!(refused.await.unwrap(), (Kind::Error, Status::Overloaded));
        }
    };
    site.while_answering(all).await;
}

#[tokio::test]
async fn a_client_that_is_refused_with_tls_gets_an_error() {
    let options = ServerOptions { max_connections: 1, ..ServerOptions::default() };
    let site = Site::open(true, options).await;
    let refused = async {
        for _ in 0..20 {
            let mut stream = site.stranger().await;
            stream.write_all(&hello()).await.ok();
            stream.flush().await.ok();
            let mut header = [0; HEADER_LEN];
            stream.read_exact(&mut header).await.unwrap();
            let header = Header::decode(&header).unwrap();
            let found = (header.kind, Status::from_code(header.status));
            assert_eq!(found, (Kind::Error, Status::Overloaded));
        }
    };
    site.while_answering(refused).await;
    assert_eq!(site.count("connections_refused").await, 20);
}

/// The kind of the first frame that the server sends.
async fn first_kind(stream: &mut TcpStream) -> Kind {
    let mut header = [0; HEADER_LEN];
    stream.read_exact(&mut header).await.unwrap();
    Header::decode(&header).unwrap().kind
}

/// A connection after its Welcome; `None` if it is refused.
async fn welcome(addr: SocketAddr) -> Option<TcpStream> {
    let mut stream = TcpStream::connect(addr).await.unwrap();
    stream.write_all(&hello()).await.ok()?;
    (first_kind(&mut stream).await == Kind::Welcome).then_some(stream)
}
