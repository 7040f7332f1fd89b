//! Talking to a service: frame by frame, to see everything, and through the client that users have.

use std::net::SocketAddr;
use std::time::Duration;

use afterimage_wire::proto::codec::{FrameCodec, OwnedFrame};
use afterimage_wire::proto::handshake::Hello;
use afterimage_wire::proto::message::{Classification, Message};
use afterimage_wire::proto::stats::{Stats, Value};
use afterimage_wire::proto::{Status, Welcome};
use afterimage_wire::{Client, ClientOptions};
use futures_util::{SinkExt, StreamExt};
use tokio::net::TcpStream;
use tokio_util::codec::Framed;

use super::PATIENCE;

/// One connection, frame by frame.
pub(crate) struct Raw(Framed<TcpStream, FrameCodec>);

impl Raw {
    /// Connects and says Hello; gives the first frame that comes back, too.
    pub(crate) async fn greet(addr: SocketAddr, token: &str) -> (Raw, OwnedFrame) {
        let stream = TcpStream::connect(addr).await.expect("the service accepts connections");
        stream.set_nodelay(true).expect("TCP has that option");
        let mut raw = Raw(Framed::new(stream, FrameCodec::new(1 << 20)));
        raw.send(7, Message::Hello(Hello::new(token.as_bytes()))).await;
        let first = raw.recv().await;
        assert_eq!(first.header.id, 7, "the first reply is the Hello's");
        (raw, first)
    }

    /// Connects, and fails without a Welcome.
    pub(crate) async fn open(addr: SocketAddr, token: &str) -> (Raw, Welcome) {
        let (raw, first) = Raw::greet(addr, token).await;
        match first.message() {
            Ok(Message::Welcome(welcome)) => (raw, welcome),
            other => panic!("expected a Welcome from {addr}, got {other:?}"),
        }
    }

    pub(crate) async fn send(&mut self, id: u64, message: Message<'_>) {
        self.0.send((id, message)).await.expect("the service takes what it is sent");
    }

    /// Puts a frame where [`Raw::flush`] finds it.
    pub(crate) async fn feed(&mut self, id: u64, message: Message<'_>) {
        self.0.feed((id, message)).await.expect("the service takes what it is sent");
    }

    pub(crate) async fn flush(&mut self) {
        self.0.flush().await.expect("the service takes what it is sent");
    }

    /// Bytes that need not be a frame.
    pub(crate) async fn send_bytes(&mut self, bytes: &[u8]) {
        use tokio::io::AsyncWriteExt;
        let write = self.0.get_mut().write_all(bytes);
        tokio::time::timeout(PATIENCE, write).await.expect("in time").expect("it is taken");
    }

    pub(crate) async fn recv(&mut self) -> OwnedFrame {
        self.next().await.expect("the connection is open")
    }

    /// The next frame, or `None` at the end of the stream.
    pub(crate) async fn next(&mut self) -> Option<OwnedFrame> {
        let frame = tokio::time::timeout(PATIENCE, self.0.next()).await.expect("a reply in time");
        frame.map(|frame| frame.expect("a whole frame"))
    }

    /// Sends one request and takes the next frame for its reply.
    pub(crate) async fn ask(&mut self, id: u64, message: Message<'_>) -> OwnedFrame {
        self.send(id, message).await;
        let frame = self.recv().await;
        assert_eq!(frame.header.id, id, "{frame:?}");
        frame
    }

    pub(crate) async fn classify(&mut self, id: u64, image: &[u8]) -> Classification {
        let frame = self.ask(id, Message::ClassifyReq { image, budget_ms: 0 }).await;
        label(&frame)
    }

    pub(crate) async fn stats(&mut self, id: u64) -> Stats {
        match self.ask(id, Message::StatsReq).await.message() {
            Ok(Message::StatsResp(stats)) => stats,
            other => panic!("expected stats, got {other:?}"),
        }
    }
}

/// The label in a reply.
pub(crate) fn label(frame: &OwnedFrame) -> Classification {
    match frame.message() {
        Ok(Message::ClassifyResp(label)) => label,
        other => panic!("expected a label, got {other:?}"),
    }
}

/// The error in a reply: its status, its text, and whether it ends the connection.
pub(crate) fn error(frame: &OwnedFrame) -> (Status, String, bool) {
    match frame.message() {
        Ok(Message::Error { status, text, connection }) => (status, text.to_owned(), connection),
        other => panic!("expected an error, got {other:?}"),
    }
}

/// A client as users have it.
pub(crate) async fn client(addr: SocketAddr) -> Client {
    Client::connect(addr, ClientOptions::new()).await.expect("the service can be reached")
}

/// The statistics of a service, read over a connection of their own, and over another one where the
/// service wants that: a memo that has just met its classifier's model sends those away that came
/// before.
pub(crate) async fn stats(addr: SocketAddr) -> Stats {
    stats_with(addr, "").await
}

/// The same of a service that wants a token.
pub(crate) async fn stats_with(addr: SocketAddr, token: &str) -> Stats {
    for _ in 0..10 {
        let mut raw = Raw::open(addr, token).await.0;
        raw.send(1, Message::StatsReq).await;
        while let Some(frame) = raw.next().await {
            match frame.message() {
                Ok(Message::StatsResp(stats)) => return stats,
                Ok(Message::GoAway { .. }) => {}
                Ok(Message::Error { status: Status::ShuttingDown, .. }) => {}
                other => panic!("expected stats, got {other:?}"),
            }
        }
    }
    panic!("{addr} sends everybody away");
}

/// A gauge, or -1.
pub(crate) fn gauge(stats: &Stats, name: &str) -> i64 {
    match stats.get(name) {
        Some(Value::Gauge(value)) => *value,
        _ => -1,
    }
}

/// Whether a text of the stats says yes.
pub(crate) fn says_yes(stats: &Stats, name: &str) -> bool {
    matches!(stats.get(name), Some(Value::Text(text)) if text == "yes")
}

/// Waits until a memo has reached the upstreams that it has.
pub(crate) async fn until_connected(memo: SocketAddr) {
    until_connected_with(memo, "").await;
}

/// The same of a memo that wants a token.
pub(crate) async fn until_connected_with(memo: SocketAddr, token: &str) {
    super::until("the memo reaches its upstreams", async || {
        let stats = stats_with(memo, token).await;
        ["store_connected", "classifier_connected"]
            .iter()
            .all(|name| stats.get(name).is_none() || says_yes(&stats, name))
    })
    .await;
}

/// Runs a test on one thread, and fails when it has not ended by itself in this time.
pub(crate) fn within(limit: Duration, test: impl Future<Output = ()>) {
    let runtime =
        tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    runtime.block_on(async {
        tokio::time::timeout(limit, test).await.expect("the test ends by itself");
    });
}
