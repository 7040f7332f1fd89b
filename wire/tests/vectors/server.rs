//! A running server against the golden vectors.
//!
//! The server gives the answer of each vector, and the stream stays in step.

use std::sync::Arc;
use std::time::Duration;

use afterimage_core::{ModelId, Response, RowAnswer};
use afterimage_testkit::vectors::Vector;
use afterimage_wire::proto::handshake::Hello;
use afterimage_wire::proto::header::{DEFAULT_MAX_BODY, HEADER_LEN};
use afterimage_wire::proto::message::{Classification, Message, Origin};
use afterimage_wire::proto::stats::Stats;
use afterimage_wire::proto::{Frame, Header, Kind, Role, StreamFrame};
use afterimage_wire::server::{Batch, Identity, Op, ServerOptions, Service, serve_stream};
use tokio::io::{AsyncReadExt, AsyncWriteExt, duplex};
use tokio_util::sync::CancellationToken;

use crate::decode;

/// A limit for each session that a busy machine does not reach.
const PATIENCE: Duration = Duration::from_secs(60);

/// The id of the Ping after every vector. No vector uses it.
const MARK: u64 = 0x6d61726b;

/// A service that has no key and answers label 7 to every image.
struct Simple(Role);

impl Service for Simple {
    fn identity(&self) -> Identity {
        Identity::without_model(self.0)
    }

    fn handle(&self, batch: &mut Batch<'_>) {
        for (i, request) in batch.requests().iter().enumerate() {
            match request.op {
                Op::CacheRead { .. } => batch.value(i, None),
                Op::CacheWrite { .. } => {}
                Op::Classify { .. } => {
                    batch.label(i, Classification { label: 7, origin: Origin::Miss })
                }
                Op::ReadBytes { .. } => batch.bytes(i, None),
                Op::WriteBytes(_) => batch.stored(i),
                Op::Infer(infer) => {
                    let model = Arc::new(ModelId::bytes(infer.model, [7; 32]));
                    let answer = |_| RowAnswer::label(7, Origin::Miss);
                    let rows = infer.rows().map(answer).collect();
                    batch.response_reply(i).send(Ok(Response { model, rows }));
                }
                Op::Forget(_) => batch.forgotten(i, 1),
                Op::Flush { .. } => batch.flushed(i),
            }
        }
    }

    fn stats(&self, _: &mut Stats) {}
}

/// The bytes that a server sends before it closes, when a client sends `sent` and closes.
async fn reply_to(service: Role, max_body: u32, sent: Vec<u8>) -> Vec<u8> {
    let (mut ours, theirs) = duplex(1 << 16);
    let options = ServerOptions { max_body, ..ServerOptions::default() };
    let server = serve_stream(Arc::new(Simple(service)), options, theirs, CancellationToken::new());
    let client = async {
        let (mut reader, mut writer) = tokio::io::split(&mut ours);
        let mut received = Vec::new();
        let write = async {
            // The server may close before it reads everything.
            let _ = writer.write_all(&sent).await;
            let _ = writer.shutdown().await;
        };
        let (_, read) = tokio::join!(write, reader.read_to_end(&mut received));
        read.unwrap();
        received
    };
    let both = async { tokio::join!(client, server).0 };
    tokio::time::timeout(PATIENCE, both).await.expect("the server closes")
}

/// The frames of which `bytes` consists.
fn frames(mut bytes: &[u8]) -> Vec<Frame<'_>> {
    let mut found = Vec::new();
    while !bytes.is_empty() {
        let frame = Frame::decode(bytes, u32::MAX).unwrap().expect("replies are whole");
        bytes = &bytes[frame.header.frame_len()..];
        found.push(frame);
    }
    found
}

/// A service that answers the kind of `header`.
fn service_for(header: Option<Header>) -> Role {
    match header.map(|header| header.kind) {
        Some(Kind::CacheReq | Kind::BytesReq) => Role::Cache,
        Some(Kind::ForgetReq | Kind::FlushReq) => Role::Memo,
        _ => Role::Classifier,
    }
}

/// A Hello, then `bytes`, then `rest` zeros that complete the body, then a Ping.
///
/// The Pong shows that the stream is in step.
fn session(bytes: &[u8], rest: usize) -> Vec<u8> {
    let mut sent = Vec::new();
    Message::Hello(Hello::new(b"")).encode(0, &mut sent);
    sent.extend_from_slice(bytes);
    sent.resize(sent.len() + rest, 0);
    Message::Ping(b"").encode(MARK, &mut sent);
    sent
}

/// The replies to a [`session`] except the Welcome and the Pong.
fn between<'a>(received: &'a [u8], about: &str) -> Vec<Frame<'a>> {
    let mut found = frames(received);
    assert_eq!(found.remove(0).header.kind, Kind::Welcome, "{about}");
    // An answer that the service gives later may follow the Pong.
    let pong =
        found.iter().position(|frame| (frame.header.kind, frame.header.id) == (Kind::Pong, MARK));
    found.remove(pong.expect("a Pong shows that the stream is in step"));
    found
}

fn assert_error(frame: Frame<'_>, status: &str, connection: bool, id: u64, about: &str) {
    match Message::decode(frame).unwrap() {
        Message::Error { status: found, connection: whole, .. } => {
            let found = (found.name(), whole, frame.header.id);
            assert_eq!(found, (status, connection, id), "{about}");
        }
        other => panic!("{about}: answered with {other:?}"),
    }
}

fn assert_reset(frame: Frame<'_>, status: &str, id: u64, about: &str) {
    match Message::decode(frame).unwrap() {
        Message::Stream(StreamFrame::Reset { status: found, .. }) => {
            assert_eq!((found.name(), frame.header.id), (status, id), "{about}");
        }
        other => panic!("{about}: answered with {other:?}"),
    }
}

#[tokio::test]
async fn every_invalid_vector_gets_its_answer() {
    for vector in Vector::invalid() {
        let (bytes, max_body, about) = (vector.bytes(), vector.max_body(), vector.about());
        let header = Header::decode(&bytes);
        let service = service_for(header);
        let first = max_body == 4096 || header.is_some_and(|header| header.kind == Kind::Hello);
        let answer: Vec<&str> = vector.text("answer").split(' ').collect();
        match answer[..] {
            ["wait"] => {
                let mut sent = session(&bytes, 0);
                sent.truncate(sent.len() - HEADER_LEN);
                let received = reply_to(service, max_body, sent).await;
                let found = frames(&received);
                // A server may answer a kind that it does not know before the body has arrived.
                let early = header.is_some_and(|header| matches!(header.kind, Kind::Unknown(_)));
                assert_eq!(found.len(), if early { 2 } else { 1 }, "{about}");
                if early {
                    assert_error(found[1], "unsupported", false, header.unwrap().id, &about);
                }
            }
            ["ignore"] => {
                let received = reply_to(service, max_body, session(&bytes, 0)).await;
                assert_eq!(between(&received, &about), [], "{about}");
            }
            ["error", status] => {
                let rest = header.unwrap().frame_len() - bytes.len();
                let received = reply_to(service, max_body, session(&bytes, rest)).await;
                let found = between(&received, &about);
                assert_eq!(found.len(), 1, "{about}");
                assert_error(found[0], status, false, header.unwrap().id, &about);
            }
            ["reset", status] => {
                let rest = header.unwrap().frame_len() - bytes.len();
                let received = reply_to(service, max_body, session(&bytes, rest)).await;
                let found = between(&received, &about);
                assert_eq!(found.len(), 1, "{about}");
                assert_reset(found[0], status, header.unwrap().id, &about);
            }
            ["close", status] if first => {
                let received = reply_to(service, DEFAULT_MAX_BODY, bytes).await;
                let found = frames(&received);
                assert_eq!(found.len(), 1, "{about}");
                assert_error(found[0], status, true, header.unwrap().id, &about);
            }
            ["close", status] => {
                let received = reply_to(service, max_body, session(&bytes, 0)).await;
                let found = frames(&received);
                assert_eq!(found.len(), 2, "{about}");
                assert_error(found[1], status, true, header.unwrap().id, &about);
            }
            ["http", "400"] => {
                let received = reply_to(service, DEFAULT_MAX_BODY, bytes).await;
                let received = String::from_utf8(received).unwrap();
                assert!(received.starts_with("HTTP/1.1 400 "), "{about}: {received}");
                assert!(received.contains("Afterimage"), "{about}: {received}");
            }
            _ => panic!("{about}: unknown answer {answer:?}"),
        }
    }
}

#[tokio::test]
async fn every_valid_vector_gets_its_reply() {
    for vector in Vector::valid() {
        let (bytes, about) = (vector.bytes(), vector.about());
        let header = decode(&bytes).header;
        let received =
            reply_to(service_for(Some(header)), DEFAULT_MAX_BODY, session(&bytes, 0)).await;
        let found = between(&received, &about);
        let reply = found.first().map(|frame| (frame.header.kind, frame.header.id));
        let replied = |kind| assert_eq!(reply, Some((kind, header.id)), "{about}");
        match header.kind {
            Kind::Error | Kind::Pong | Kind::GoAway => assert_eq!(found, [], "{about}"),
            Kind::CacheReq if header.flags != 0 => assert_eq!(found, [], "{about}"),
            Kind::CacheReq => replied(Kind::CacheResp),
            Kind::ClassifyReq => replied(Kind::ClassifyResp),
            Kind::StatsReq => replied(Kind::StatsResp),
            Kind::BytesReq => replied(Kind::BytesResp),
            Kind::InferReq => replied(Kind::InferResp),
            Kind::ForgetReq => replied(Kind::ForgetResp),
            Kind::FlushReq => replied(Kind::FlushResp),
            Kind::Ping => {
                replied(Kind::Pong);
                assert_eq!(found[0].body, &bytes[HEADER_LEN..], "{about}");
            }
            Kind::Hello => assert_error(found[0], "bad_argument", false, header.id, &about),
            // The service has no streams.
            Kind::StreamOpen => assert_reset(found[0], "unsupported", header.id, &about),
            kind if kind.is_stream() => {
                assert_reset(found[0], "bad_argument", header.id, &about);
            }
            _ => assert_error(found[0], "unsupported", false, header.id, &about),
        }
        assert!(found.len() <= 1, "{about}");
    }
}

#[tokio::test]
async fn a_first_frame_gets_a_welcome_or_an_error() {
    for vector in Vector::valid() {
        let (bytes, about) = (vector.bytes(), vector.about());
        let header = decode(&bytes).header;
        let received = reply_to(Role::Memo, DEFAULT_MAX_BODY, bytes).await;
        let found = frames(&received);
        assert_eq!(found.len(), 1, "{about}");
        let fields = &vector.json["fields"];
        if header.kind != Kind::Hello {
            assert_error(found[0], "bad_argument", true, header.id, &about);
            continue;
        }
        let of = |field: &str| fields[field].as_u64().unwrap();
        let newest = of("version_max").min(2);
        if of("version_min").max(1) <= newest {
            assert_eq!(found[0].header.id, header.id, "{about}");
            let welcome = Message::decode(found[0]).unwrap();
            let version = match welcome {
                Message::Welcome(welcome) => u64::from(welcome.version),
                other => panic!("{about}: {other:?}"),
            };
            assert_eq!(version, newest, "{about}");
        } else {
            assert_error(found[0], "unsupported", true, header.id, &about);
        }
    }
}

#[tokio::test]
async fn a_request_for_another_service_is_unsupported() {
    let requests = ["cache_read", "cache_write", "classify_req_digit"];
    let version_2 = ["bytes_read", "bytes_write", "infer_req", "forget_req", "flush_req"];
    for name in requests.into_iter().chain(version_2) {
        let vector = Vector::named(&Vector::valid(), name);
        let (bytes, about) = (vector.bytes(), vector.about());
        let header = decode(&bytes).header;
        let other = match header.kind {
            Kind::CacheReq | Kind::BytesReq => Role::Memo,
            _ => Role::Cache,
        };
        let received = reply_to(other, DEFAULT_MAX_BODY, session(&bytes, 0)).await;
        let found = between(&received, &about);
        assert_eq!(found.len(), 1, "{about}");
        assert_error(found[0], "unsupported", false, header.id, &about);
        let text = str::from_utf8(found[0].body).unwrap();
        assert!(text.contains(&other.to_string()), "{text}");
    }
}

/// A client that speaks version 1 only gets the answers that it knows.
#[tokio::test]
async fn kinds_of_version_2_are_unknown_on_version_1() {
    for vector in Vector::valid() {
        let (bytes, about) = (vector.bytes(), vector.about());
        let header = decode(&bytes).header;
        let mut sent = Vec::new();
        let hello = Hello { version_max: 1, ..Hello::new(b"") };
        Message::Hello(hello).encode(0, &mut sent);
        sent.extend_from_slice(&bytes);
        Message::Ping(b"").encode(MARK, &mut sent);
        let received = reply_to(service_for(Some(header)), DEFAULT_MAX_BODY, sent).await;
        let found = between(&received, &about);
        if header.kind.since() == 1 {
            let session = session(&bytes, 0);
            let newer = reply_to(service_for(Some(header)), DEFAULT_MAX_BODY, session).await;
            let kinds = |found: Vec<Frame<'_>>| {
                found.iter().map(|frame| frame.header.kind).collect::<Vec<_>>()
            };
            assert_eq!(kinds(found), kinds(between(&newer, &about)), "{about}");
        } else {
            assert_eq!(found.len(), 1, "{about}");
            assert_error(found[0], "unsupported", false, header.id, &about);
        }
    }
}
