//! The client against a fake server, and against the real one.

#![allow(unreachable_pub, reason = "a test binary has no outside")]
#![allow(clippy::unwrap_used, reason = "tests panic")]

use std::future::Future;
use std::io;
use std::time::Duration;

use afterimage_wire::client::{Client, ClientOptions, Connector};
use afterimage_wire::proto::codec::{FrameCodec, OwnedFrame};
use afterimage_wire::proto::message::{Classification, Origin};
use afterimage_wire::proto::{HEADER_LEN, Header, Kind, Message, Role, Shape, Welcome};
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream};
use tokio::sync::mpsc;
use tokio_util::codec::Decoder;

mod blocking;
mod callbacks;
mod calls;
mod chaos;
mod lifecycle;
mod limits;
mod loss;
mod replies;

/// A limit for each step that a busy machine does not reach.
pub(crate) const PATIENCE: Duration = Duration::from_secs(30);

/// Awaits `what`, and panics after [`PATIENCE`].
pub(crate) async fn soon<F: Future>(what: F) -> F::Output {
    tokio::time::timeout(PATIENCE, what).await.expect("the step ends in time")
}

pub(crate) fn label(class: u16) -> Classification {
    Classification { label: class, origin: Origin::Miss }
}

pub(crate) fn welcome() -> Welcome {
    Welcome {
        version: 1,
        service: Role::Memo,
        features: 0,
        max_body: 4096,
        window: 1024,
        classes: 0,
        digest: [7; 32],
        shape: Shape::default(),
        name: "fake".into(),
    }
}

/// Options for tests: short pauses before reconnects, long timeouts for everything else.
pub(crate) fn options() -> ClientOptions {
    ClientOptions::new()
        .timeout(PATIENCE)
        .connect_timeout(PATIENCE)
        .handshake_timeout(PATIENCE)
        .backoff(Duration::from_millis(1), Duration::from_millis(5))
        .keepalive(None)
}

/// Accepts the in-memory connections of a client.
pub(crate) struct Listener(mpsc::UnboundedReceiver<DuplexStream>);

impl Listener {
    pub(crate) async fn accept(&mut self) -> Peer {
        soon(self.try_accept()).await.expect("the client is open")
    }

    /// `None` when the client is closed.
    pub(crate) async fn try_accept(&mut self) -> Option<Peer> {
        self.0.recv().await.map(Peer::new)
    }

    /// Accepts and sends [`welcome`].
    pub(crate) async fn welcome(&mut self) -> Peer {
        self.welcome_with(welcome()).await
    }

    pub(crate) async fn welcome_with(&mut self, welcome: Welcome) -> Peer {
        let mut peer = self.accept().await;
        assert_eq!(peer.next().await.header.kind, Kind::Hello);
        peer.send(0, Message::Welcome(welcome)).await;
        peer
    }

    /// Whether a connection waits to be accepted.
    pub(crate) fn is_asked(&mut self) -> bool {
        !self.0.is_empty()
    }
}

/// Connections whose pipes hold `capacity` bytes each way.
pub(crate) fn pipes(capacity: usize) -> (impl Connector<Transport = DuplexStream>, Listener) {
    let (sender, receiver) = mpsc::unbounded_channel();
    let connector = move |_| {
        let (client, server) = tokio::io::duplex(capacity);
        let sent = sender.send(server);
        async move {
            match sent {
                Ok(()) => Ok(client),
                Err(_) => Err(io::ErrorKind::ConnectionRefused.into()),
            }
        }
    };
    (connector, Listener(receiver))
}

/// A client that is connected to a fake server.
pub(crate) async fn pair(options: ClientOptions) -> (Client, Peer, Listener) {
    pair_with(options, welcome()).await
}

pub(crate) async fn pair_with(
    options: ClientOptions,
    welcome: Welcome,
) -> (Client, Peer, Listener) {
    let (connector, mut listener) = pipes(1 << 16);
    let client = Client::with_connector(connector, options);
    let peer = listener.welcome_with(welcome).await;
    soon(client.connected(PATIENCE)).await.unwrap();
    (client, peer, listener)
}

/// The server's end of one connection.
pub(crate) struct Peer<T = DuplexStream> {
    pub(crate) io: T,
    codec: FrameCodec,
    input: bytes::BytesMut,
}

impl<T: tokio::io::AsyncRead + tokio::io::AsyncWrite + Unpin> Peer<T> {
    pub(crate) fn new(io: T) -> Self {
        Peer { io, codec: FrameCodec::default(), input: bytes::BytesMut::new() }
    }

    /// The next frame, `None` when the client has closed.
    pub(crate) async fn try_next(&mut self) -> Option<OwnedFrame> {
        loop {
            if let Some(frame) = self.codec.decode(&mut self.input).expect("a client's frame") {
                return Some(frame);
            }
            match self.io.read_buf(&mut self.input).await {
                Ok(0) | Err(_) => return None,
                Ok(_) => {}
            }
        }
    }

    pub(crate) async fn next(&mut self) -> OwnedFrame {
        soon(self.try_next()).await.expect("the client sends a frame")
    }

    /// The id of the next frame, which must be of this kind.
    pub(crate) async fn expect(&mut self, kind: Kind) -> u64 {
        let frame = self.next().await;
        assert_eq!(frame.header.kind, kind);
        frame.header.id
    }

    pub(crate) async fn send(&mut self, id: u64, message: Message<'_>) {
        let mut bytes = Vec::new();
        message.encode(id, &mut bytes);
        self.raw(&bytes).await;
    }

    pub(crate) async fn raw(&mut self, bytes: &[u8]) {
        soon(self.io.write_all(bytes)).await.expect("the client reads");
    }

    /// Answers every request with [`answer`] until the client closes.
    pub(crate) async fn serve(mut self) {
        while let Some(frame) = self.try_next().await {
            let mut bytes = Vec::new();
            answer(&frame, &mut bytes);
            if self.io.write_all(&bytes).await.is_err() {
                return;
            }
        }
    }
}

/// The answer to a request: an image's first byte, an even key itself, a ping's bytes. Odd keys
/// are missing.
pub(crate) fn answer(frame: &OwnedFrame, out: &mut Vec<u8>) {
    let id = frame.header.id;
    match frame.message().expect("a client's message") {
        Message::ClassifyReq { image, .. } => {
            let class = image.first().copied().unwrap_or(0).into();
            Message::ClassifyResp(label(class)).encode(id, out);
        }
        Message::CacheRead { key, .. } => {
            let value = (key % 2 == 0).then_some(key as i64);
            Message::CacheResp { value }.encode(id, out);
        }
        Message::Ping(bytes) => Message::Pong(bytes).encode(id, out),
        Message::StatsReq => Message::StatsResp(Default::default()).encode(id, out),
        Message::Hello(_) => Message::Welcome(welcome()).encode(id, out),
        Message::CacheWrite { .. } => {}
        other => panic!("not a request: {other:?}"),
    }
}

/// A header that announces a body of this length.
pub(crate) fn header(kind: Kind, id: u64, body_len: u32) -> [u8; HEADER_LEN] {
    Header { body_len, kind, flags: 0, status: 0, id }.encode()
}
