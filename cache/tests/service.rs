//! The cache service over TCP: bytes beside labels.

#![cfg(not(miri))]
#![allow(clippy::unwrap_used)]

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::time::Duration;

use afterimage_cache::{ByteStore, CacheService, Capacity, Table};
use afterimage_wire::proto::message::BytesWrite;
use afterimage_wire::proto::stats::Value;
use afterimage_wire::proto::{Frame, Hello, Message, Status};
use afterimage_wire::server::{Server, ServerOptions};
use afterimage_wire::{Client, ClientOptions};

/// Starts a service on a thread, which ends with the test's process.
fn start(bytes: Option<Arc<ByteStore>>) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    listener.set_nonblocking(true).unwrap();
    let addr = listener.local_addr().unwrap();
    let table = Arc::new(Table::new(Capacity::Entries(1000)).unwrap());
    let service = Arc::new(CacheService::new(table).with_bytes(bytes));
    std::thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let listener = tokio::net::TcpListener::from_std(listener).unwrap();
            let options = ServerOptions { max_body: 8 << 20, ..ServerOptions::default() };
            let server = Server::new(listener, service, options);
            server.serve(std::future::pending()).await;
        });
    });
    addr
}

/// A connection that sends a message and reads the reply.
struct Connection {
    stream: TcpStream,
    received: Vec<u8>,
}

impl Connection {
    fn open(bytes: Option<Arc<ByteStore>>) -> Self {
        let stream = TcpStream::connect(start(bytes)).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
        let mut connection = Connection { stream, received: Vec::new() };
        connection.ask(Message::Hello(Hello::new(b"")), |reply| {
            assert!(matches!(reply, Message::Welcome(_)), "{reply:?}");
        });
        connection
    }

    fn ask<T>(&mut self, message: Message<'_>, then: impl FnOnce(Message<'_>) -> T) -> T {
        let mut request = Vec::new();
        message.encode(1, &mut request);
        self.stream.write_all(&request).unwrap();
        self.received.clear();
        let mut piece = vec![0; 1 << 16];
        loop {
            if let Some(frame) = Frame::decode(&self.received, u32::MAX).unwrap() {
                return then(Message::decode(frame).unwrap());
            }
            let read = self.stream.read(&mut piece).unwrap();
            assert!(read > 0, "the server closed the connection");
            self.received.extend_from_slice(&piece[..read]);
        }
    }

    fn read(&mut self, key: u8) -> Option<Vec<u8>> {
        self.ask(Message::BytesRead { key: [key; 16], budget_ms: 0 }, |reply| {
            let Message::BytesResp { value } = reply else { panic!("{reply:?}") };
            value.map(<[u8]>::to_vec)
        })
    }

    fn write(&mut self, key: u8, value: &[u8], ttl_s: u32) -> Result<(), (Status, String)> {
        let write = BytesWrite { key: [key; 16], ttl_s, value };
        self.ask(Message::BytesWrite(write), |reply| match reply {
            Message::BytesResp { value: None } => Ok(()),
            Message::Error { status, text, .. } => Err((status, text.to_owned())),
            other => panic!("{other:?}"),
        })
    }
}

#[test]
fn written_bytes_are_read_until_their_time_is_over() {
    let store = Arc::new(ByteStore::new(64 << 20, 16 << 20));
    let mut client = Connection::open(Some(Arc::clone(&store)));
    assert_eq!(client.read(1), None);
    let large: Vec<u8> = (0..5 << 20).map(|i| (i / 3) as u8).collect();
    client.write(1, &large, 0).unwrap();
    client.write(2, b"", 3600).unwrap();
    client.write(3, b"short", 1).unwrap();
    assert_eq!(client.read(1), Some(large));
    assert_eq!(client.read(2).as_deref(), Some(&b""[..]), "an empty value is a value");
    assert_eq!(client.read(3).as_deref(), Some(&b"short"[..]));
    client.write(2, b"newer", 0).unwrap();
    assert_eq!(client.read(2).as_deref(), Some(&b"newer"[..]));
    std::thread::sleep(Duration::from_millis(2100));
    assert_eq!(client.read(3), None, "its time to live is over");

    // Labels have keys of their own.
    let label = client.ask(Message::CacheRead { key: 1, budget_ms: 0 }, |reply| match reply {
        Message::CacheResp { value } => value,
        other => panic!("{other:?}"),
    });
    assert_eq!(label, None);
    client.ask(Message::StatsReq, |reply| {
        let Message::StatsResp(stats) = reply else { panic!("{reply:?}") };
        assert_eq!(stats.counter_value("hits"), 4);
        assert_eq!(stats.counter_value("misses"), 3);
        assert_eq!(stats.counter_value("byte_store_writes"), 4);
        assert_eq!(stats.get("byte_store_entries"), Some(&Value::Gauge(2)));
    });
}

#[test]
fn a_value_above_the_limit_is_refused_with_both_sizes() {
    let mut client = Connection::open(Some(Arc::new(ByteStore::new(1 << 20, 1000))));
    client.write(1, b"old", 0).unwrap();
    client.write(1, &[7; 1000], 0).unwrap();
    let (status, text) = client.write(1, &[7; 1001], 0).unwrap_err();
    assert_eq!(status, Status::TooLarge);
    assert_eq!(text, "the value has 1001 bytes; the limit is 1000");
    assert_eq!(client.read(1), None, "the outdated value is not found");
}

#[test]
fn a_service_without_a_byte_store_names_the_flag() {
    let mut client = Connection::open(None);
    let (status, text) = client.write(1, b"x", 0).unwrap_err();
    assert_eq!(status, Status::Unsupported);
    assert_eq!(text, "this cache service stores no bytes; start it with --bytes SIZE");
}

#[tokio::test]
async fn the_client_stores_and_reads_bytes() {
    let addr = start(Some(Arc::new(ByteStore::new(64 << 20, 16 << 20)))).to_string();
    let client = Client::connect(addr.as_str(), ClientOptions::new()).await.unwrap();
    let values: Vec<Vec<u8>> = (0..64).map(|i| vec![i; usize::from(i) * 1000]).collect();
    for (i, value) in (0..).zip(&values) {
        client.cache().write_bytes(&[i; 16], value, Some(Duration::from_secs(60))).await.unwrap();
    }
    for (i, value) in (0..).zip(&values) {
        let read = client.cache().read_bytes(&[i; 16]).await.unwrap();
        assert_eq!(read.as_deref(), Some(&value[..]));
    }
    assert_eq!(client.cache().read_bytes(&[99; 16]).await.unwrap(), None);
}
