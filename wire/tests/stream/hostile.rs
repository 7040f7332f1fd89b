//! Clients that break the rules of streams, against a server over a pipe in memory.

use afterimage_testkit::memory::resident_bytes;
use afterimage_wire::proto::{Frame, Hello, Kind, Message, StreamFrame, StreamOpen};
use afterimage_wire::server::serve_stream;
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream, duplex};

use super::*;

/// Bytes on their way in each direction.
const PIPE: usize = 1 << 16;

/// The longest frame of a stream.
const FRAME: usize = 16 + (64 << 10);

/// A client that sends any frames.
struct Hostile {
    io: DuplexStream,
    received: Vec<u8>,
}

impl Hostile {
    async fn connect(version: u16) -> Self {
        let (io, theirs) = duplex(PIPE);
        let options = ServerOptions::default();
        tokio::spawn(serve_stream(Arc::new(Streams), options, theirs, CancellationToken::new()));
        let mut hostile = Hostile { io, received: Vec::new() };
        hostile.send(0, &Message::Hello(Hello { version_max: version, ..Hello::new(b"") })).await;
        assert_eq!(hostile.next().await.0, Kind::Welcome);
        hostile
    }

    async fn send(&mut self, id: u64, message: &Message<'_>) {
        let mut bytes = Vec::new();
        message.encode(id, &mut bytes);
        soon(self.io.write_all(&bytes)).await.unwrap();
    }

    async fn open(&mut self, id: u64, name: &str, credit: u64) {
        self.send(id, &Message::StreamOpen(StreamOpen { credit, name, header: b"" })).await;
    }

    /// Opens a stream that sends this many bytes.
    async fn pour(&mut self, id: u64, bytes: usize, credit: u64) {
        let header = bytes.to_string();
        let open = StreamOpen { credit, name: "pour", header: header.as_bytes() };
        self.send(id, &Message::StreamOpen(open)).await;
    }

    async fn data(&mut self, id: u64, bytes: &[u8], end: bool) {
        self.send(id, &Message::Stream(StreamFrame::Data { bytes, end })).await;
    }

    /// Kind, id, status and body of the next frame.
    async fn next(&mut self) -> (Kind, u64, Status, Vec<u8>) {
        loop {
            if let Some(frame) = Frame::decode(&self.received, u32::MAX).unwrap() {
                let header = frame.header;
                let status = Status::from_code(header.status);
                let found = (header.kind, header.id, status, frame.body.to_vec());
                self.received.drain(..header.frame_len());
                return found;
            }
            let mut space = [0; 4096];
            let len = soon(self.io.read(&mut space)).await.unwrap();
            assert!(len > 0, "the server has closed the connection");
            self.received.extend_from_slice(&space[..len]);
        }
    }

    /// Checks that this stream is reset and that the connection still answers.
    async fn expect_reset(&mut self, id: u64, status: Status) {
        loop {
            let (kind, of, found, body) = self.next().await;
            if kind == Kind::StreamReset {
                let text = String::from_utf8(body).unwrap();
                assert_eq!((of, found), (id, status), "{text}");
                break;
            }
        }
        self.expect_alive().await;
    }

    async fn expect_alive(&mut self) {
        self.send(u64::MAX, &Message::Ping(b"")).await;
        while self.next().await.0 != Kind::Pong {}
    }
}

#[tokio::test]
async fn bytes_beyond_the_credit_reset_the_stream() {
    let mut client = Hostile::connect(2).await;
    client.open(1, "idle", 0).await;
    client.data(1, &[0; 4096], false).await;
    client.expect_alive().await;
    client.data(1, &[0], false).await;
    client.expect_reset(1, Status::BadArgument).await;
    client.data(1, &[0; 60_000], false).await;
    client.expect_alive().await;
}

#[tokio::test]
async fn data_after_the_end_resets_the_stream() {
    let mut client = Hostile::connect(2).await;
    client.open(1, "idle", 0).await;
    client.data(1, b"last", true).await;
    client.data(1, b"more", false).await;
    client.expect_reset(1, Status::BadArgument).await;
}

#[tokio::test]
async fn a_used_id_or_an_unknown_one_is_refused() {
    let mut client = Hostile::connect(2).await;
    client.data(3, b"", false).await;
    client.expect_reset(3, Status::BadArgument).await;
    client.open(5, "idle", 0).await;
    client.open(5, "idle", 0).await;
    client.expect_reset(5, Status::BadArgument).await;
    client.open(4, "idle", 0).await;
    client.expect_reset(4, Status::BadArgument).await;
    client.open(6, "other", 0).await;
    client.expect_reset(6, Status::BadArgument).await;
    // A late frame of the stream that was refused.
    client.data(6, b"late", true).await;
    client.send(6, &Message::Stream(StreamFrame::Reset { status: Status::None, text: "" })).await;
    client.expect_alive().await;
}

#[tokio::test]
async fn the_highest_credit_is_no_limit_and_no_fault() {
    let mut client = Hostile::connect(2).await;
    client.pour(1, 1_000_000, 0).await;
    for credit in [1, u64::MAX, 5, u64::MAX] {
        client.send(1, &Message::Stream(StreamFrame::Credit { credit })).await;
    }
    let mut bytes = 0;
    while bytes < 1_000_000 {
        let (kind, id, _, body) = client.next().await;
        assert_eq!((kind, id), (Kind::StreamData, 1));
        assert!(body.len() <= 64 << 10, "a frame of {} bytes", body.len());
        bytes += body.len();
    }
    assert_eq!(bytes, 1_000_000);
}

#[tokio::test]
async fn a_server_without_credit_sends_nothing() {
    let mut client = Hostile::connect(2).await;
    client.pour(1, 1_000_000, 10).await;
    assert_eq!(client.next().await.3.len(), 10);
    client.expect_alive().await;
    client.send(1, &Message::Stream(StreamFrame::Credit { credit: 25 })).await;
    assert_eq!(client.next().await.3.len(), 15);
    client.expect_alive().await;
}

/// Counts bytes and uses no clock.
#[tokio::test]
async fn a_hit_waits_for_one_frame_and_those_on_their_way() {
    let mut client = Hostile::connect(2).await;
    for id in 1..=8 {
        client.pour(id, usize::MAX, u64::MAX).await;
    }
    for n in 0..100 {
        client.send(n + 9, &Message::ClassifyReq { image: &[7], budget_ms: 0 }).await;
        let mut before = 0;
        loop {
            let (kind, id, _, body) = client.next().await;
            if kind == Kind::ClassifyResp {
                assert_eq!(id, n + 9);
                break;
            }
            before += body.len();
        }
        // What this client has read already belongs to the bytes on their way.
        let limit = PIPE + 2 * FRAME;
        assert!(before <= limit, "{before} bytes of a stream came before a hit, not {limit}");
    }
}

#[tokio::test]
async fn endless_small_frames_take_no_memory() {
    let mut client = Hostile::connect(2).await;
    client.open(1, "idle", 0).await;
    let before = resident_bytes();
    let mut frames = Vec::new();
    for n in 0..10_000u64 {
        Message::Stream(StreamFrame::Progress(&[7; 1024])).encode(1, &mut frames);
        Message::Stream(StreamFrame::Credit { credit: n }).encode(1, &mut frames);
        Message::Stream(StreamFrame::Data { bytes: b"", end: false }).encode(1, &mut frames);
        if frames.len() > 1 << 16 {
            soon(client.io.write_all(&frames)).await.unwrap();
            frames.clear();
        }
    }
    client.expect_alive().await;
    // Thousands of chunks of one byte cost about their bytes.
    for _ in 0..4096 {
        client.data(1, b"x", false).await;
    }
    client.expect_alive().await;
    let growth = resident_bytes().saturating_sub(before);
    assert!(growth < 64 << 20, "{growth} bytes of memory");
}

#[tokio::test]
async fn opening_and_cancelling_without_end_is_bounded() {
    let mut client = Hostile::connect(2).await;
    for id in 1..20_000 {
        client.open(id, "idle", 0).await;
        let cancel = StreamFrame::Reset { status: Status::None, text: "" };
        client.send(id, &Message::Stream(cancel)).await;
        if id % 1000 == 0 {
            client.expect_alive().await;
        }
    }
    client.expect_alive().await;
}

#[tokio::test]
async fn unread_streams_stay_within_the_memory_for_streams() {
    let mut client = Hostile::connect(2).await;
    let before = resident_bytes();
    for id in 1..=1024 {
        client.open(id, "idle", u64::MAX).await;
        client.data(id, &[1; 4096], false).await;
    }
    client.expect_alive().await;
    client.open(1025, "idle", 0).await;
    client.expect_reset(1025, Status::Overloaded).await;
    let growth = resident_bytes().saturating_sub(before);
    assert!(growth < 64 << 20, "{growth} bytes for 1024 streams");
}

#[tokio::test]
async fn version_1_gets_a_clear_refusal() {
    let mut client = Hostile::connect(1).await;
    client.open(1, "echo", 0).await;
    let (kind, id, status, text) = client.next().await;
    assert_eq!((kind, id, status), (Kind::Error, 1, Status::Unsupported));
    let text = String::from_utf8(text).unwrap();
    assert!(text.contains("StreamOpen") && text.contains("version 1"), "{text}");
    client.expect_alive().await;
}

#[tokio::test]
async fn the_client_opens_no_stream_at_an_old_server() {
    let connector = |_| {
        let (ours, mut theirs) = duplex(1 << 16);
        tokio::spawn(async move {
            let mut hello = [0; 34];
            theirs.read_exact(&mut hello).await.unwrap();
            let welcome = afterimage_wire::proto::Welcome {
                version: 1,
                service: Role::Memo,
                features: 0,
                max_body: 1 << 20,
                window: 16,
                classes: 0,
                digest: [0; 32],
                shape: afterimage_wire::proto::Shape::new(&[]).unwrap(),
                name: "old".into(),
            };
            let mut out = Vec::new();
            Message::Welcome(welcome).encode(0, &mut out);
            theirs.write_all(&out).await.unwrap();
            std::future::pending::<()>().await;
        });
        async { Ok(ours) }
    };
    let client = Client::with_connector(connector, ClientOptions::new());
    let error = soon(client.open("echo", "")).await.unwrap_err();
    let found =
        matches!(error, afterimage_wire::CallError::OldServer { needed: 2, version: 1, .. });
    assert!(found, "{error}");
}
