//! Memory that many bad peers together can make a server hold.
//!
//! One test at a time in a binary of its own, because it reads the memory of the whole process.
//! `MEMORY_CONNECTIONS=4096` repeats it with a full server; that needs 10,000 file descriptors.

#![allow(clippy::unwrap_used)]
#![cfg(target_os = "linux")]

use std::io::Write;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use afterimage_testkit::doubles::FirstByte;
use afterimage_testkit::memory::resident_bytes;
use afterimage_testkit::pki::Authority;
use afterimage_wire::proto::handshake::Hello;
use afterimage_wire::proto::message::{Message, put_classify_req};
use afterimage_wire::proto::{HEADER_LEN, Header};
use afterimage_wire::server::{Server, ServerOptions};
use afterimage_wire::tls::{ClientFiles, ClientTls, ServerFiles, ServerTls};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpSocket, TcpStream};
use tokio::sync::Mutex;
use tokio::time::{sleep, timeout};
use tokio_rustls::TlsConnector;

/// The share of one connection in 256 MiB for 4,096 connections.
const LIMIT_PER_CONNECTION: usize = 64 << 10;

/// Memory of the allocator and of the test's clients, for any number of connections.
const FIXED: usize = 4 << 20;

/// A write that takes longer is one that the server does not read.
const STUCK: Duration = Duration::from_millis(20);

/// Bytes of a TLS connection that finds the budget exhausted: its base, and its session.
const TLS_BASE: usize = 36 << 10;

/// The largest record of TLS. A server keeps a part of one while it does not read.
const RECORD: usize = 16 << 10;

/// Longer than a connection must be quiet before its buffers are released.
const SETTLE: Duration = Duration::from_millis(2500);

/// Both tests read the memory of the process.
static ONE_AT_A_TIME: Mutex<()> = Mutex::const_new(());

fn connections(default: usize) -> usize {
    std::env::var("MEMORY_CONNECTIONS").map_or(default, |count| count.parse().unwrap())
}

async fn connect(addr: SocketAddr) -> TcpStream {
    let socket = TcpSocket::new_v4().unwrap();
    // The server's replies must fill its own buffers, not those of the kernel.
    socket.set_recv_buffer_size(4 << 10).unwrap();
    socket.connect(addr).await.unwrap()
}

async fn guest(addr: SocketAddr) -> TcpStream {
    let mut stream = connect(addr).await;
    let mut hello = Vec::new();
    Message::Hello(Hello::new(b"")).encode(1, &mut hello);
    stream.write_all(&hello).await.unwrap();
    read_frame(&mut stream).await;
    stream
}

async fn read_frame(stream: &mut TcpStream) {
    let mut header = [0; HEADER_LEN];
    stream.read_exact(&mut header).await.unwrap();
    let len = Header::decode(&header).unwrap().body_len as usize;
    stream.read_exact(&mut vec![0; len]).await.unwrap();
}

/// The bytes that the peers send, built once: the test's own buffers would fragment the heap.
struct Traffic {
    /// All but the last byte of a request with a body of 1 MiB.
    unfinished: Vec<u8>,
    /// Requests for more statistics than a server keeps.
    statistics: Vec<u8>,
    /// A burst of 2,000 requests.
    burst: Vec<u8>,
}

impl Traffic {
    fn new() -> Self {
        let [mut unfinished, mut statistics, mut burst] = [const { Vec::new() }; 3];
        put_classify_req(&mut unfinished, 2, &vec![7; 1 << 20], 0);
        unfinished.pop();
        (0..3000).for_each(|id| Message::StatsReq.encode(id, &mut statistics));
        (0..2000).for_each(|id| put_classify_req(&mut burst, id, &[7; 784], 0));
        Traffic { unfinished, statistics, burst }
    }

    /// Sends the burst and reads all answers.
    async fn burst(&self, stream: &mut TcpStream) {
        let (mut reader, mut writer) = stream.split();
        let reading = async {
            let mut left = 2000 * (HEADER_LEN + 2);
            let mut scratch = [0; 1024];
            while left > 0 {
                left -= reader.read(&mut scratch).await.unwrap();
            }
        };
        let writing = async { writer.write_all(&self.burst).await.unwrap() };
        tokio::join!(reading, writing);
    }
}

#[tokio::test]
async fn bad_peers_stay_within_the_memory_for_buffers() {
    let _only = ONE_AT_A_TIME.lock().await;
    let connections = connections(192);
    let traffic = Traffic::new();
    let limit = connections * LIMIT_PER_CONNECTION;
    for (name, attack) in [
        ("unfinished bodies", 0),
        ("peers that never read", 1),
        ("peers that are idle after a burst", 2),
    ] {
        let options = ServerOptions {
            max_connections: connections + 1,
            max_buffer_memory: limit,
            // The attack must not end before its memory is measured.
            frame_timeout: Duration::from_secs(600),
            write_timeout: Duration::from_secs(600),
            ..Default::default()
        };
        let server = Server::bind("127.0.0.1:0", Arc::new(FirstByte), options).await.unwrap();
        let addr = server.local_addr().unwrap();
        let serving = tokio::spawn(server.serve(std::future::pending()));
        let mut good = guest(addr).await;
        traffic.burst(&mut good).await;
        let base = resident_bytes();
        let mut peers = Vec::new();
        let mut highest = base;
        while peers.len() < connections {
            let mut peer = guest(addr).await;
            match attack {
                0 => drop(timeout(STUCK, peer.write_all(&traffic.unfinished)).await),
                1 => drop(timeout(STUCK, peer.write_all(&traffic.statistics)).await),
                _ => traffic.burst(&mut peer).await,
            }
            peers.push(peer);
            highest = highest.max(resident_bytes());
        }
        sleep(SETTLE).await;
        let settled = resident_bytes().saturating_sub(base) >> 10;
        let highest = (highest - base) >> 10;
        println!("{connections} {name}: {settled} KiB, at most {highest} KiB");
        assert!(highest << 10 <= (limit + FIXED) as u64, "{name}: {highest} KiB");
        // The connection that behaves is served all the time.
        timeout(Duration::from_secs(10), traffic.burst(&mut good)).await.unwrap();
        drop(peers);
        serving.abort();
        let _ = serving.await;
    }
}

/// Connects with TLS, and sends requests for statistics in the largest records without reading a
/// reply. The session of the client is dropped before that: only the server's end stays in memory.
async fn never_reading_tls(addr: SocketAddr, tls: &ClientTls, requests: &[u8]) -> TcpStream {
    let connector = TlsConnector::from(tls.config());
    let name = tls.name_for("127.0.0.1").unwrap();
    let mut stream = connector.connect(name, connect(addr).await).await.unwrap();
    let mut hello = Vec::new();
    Message::Hello(Hello::new(b"")).encode(1, &mut hello);
    stream.write_all(&hello).await.unwrap();
    stream.flush().await.unwrap();
    stream.read_u8().await.unwrap();
    let (mut stream, mut session) = stream.into_inner();
    session.set_buffer_limit(None);
    let mut sealed = Vec::new();
    // One record at a time: holes that the client leaves in the heap would count as the server's.
    for record in requests.chunks(RECORD) {
        session.writer().write_all(record).unwrap();
        while session.wants_write() {
            session.write_tls(&mut sealed).unwrap();
        }
    }
    drop(session);
    drop(timeout(STUCK, stream.write_all(&sealed)).await);
    stream
}

#[tokio::test]
async fn tls_peers_that_never_read_stay_within_the_memory() {
    let _only = ONE_AT_A_TIME.lock().await;
    let connections = connections(96);
    let folder = tempfile::tempdir().unwrap();
    let authority = Authority::new(folder.path(), "ca");
    let issued = authority.issue("server", "127.0.0.1");
    let files = ServerFiles { cert: issued.cert, key: issued.key, client_ca: None };
    let limit = connections * LIMIT_PER_CONNECTION;
    let options = ServerOptions {
        tls: Some(ServerTls::load(files).unwrap()),
        max_connections: connections + 1,
        max_buffer_memory: limit,
        write_timeout: Duration::from_secs(600),
        ..Default::default()
    };
    let ca = Some(authority.cert.clone());
    let tls = ClientTls::load(ClientFiles { ca, cert: None, key: None }).unwrap();
    let server = Server::bind("127.0.0.1:0", Arc::new(FirstByte), options).await.unwrap();
    let addr = server.local_addr().unwrap();
    let serving = tokio::spawn(server.serve(std::future::pending()));
    // Not from `Traffic`: glibc returns less of the heap after a large buffer was freed.
    let mut requests = Vec::new();
    (0..6000).for_each(|id| Message::StatsReq.encode(id, &mut requests));
    // The first connection allocates what all share.
    drop(never_reading_tls(addr, &tls, &requests).await);
    let base = resident_bytes();
    let (mut peers, mut highest) = (Vec::new(), base);
    while peers.len() < connections {
        peers.push(never_reading_tls(addr, &tls, &requests).await);
        highest = highest.max(resident_bytes());
    }
    sleep(SETTLE).await;
    let settled = resident_bytes().saturating_sub(base) >> 10;
    let highest = (highest - base) >> 10;
    println!("{connections} TLS peers that never read: {settled} KiB, at most {highest} KiB");
    // The first ones use up the budget.
    let most = limit + FIXED + connections * TLS_BASE;
    assert!(highest << 10 <= most as u64, "{highest} KiB");
    assert!(highest << 10 <= 256 << 20, "{highest} KiB");
    serving.abort();
    let _ = serving.await;
}
