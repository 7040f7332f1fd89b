//! The golden vectors of `wire/vectors` against the codec, against the tables of `PROTOCOL.md`, and
//! against a running server. The vectors come from `make.py`, which shares no code with this crate.

#![allow(clippy::unwrap_used, reason = "tests panic")]

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use afterimage_testkit::vectors::Vector;
use afterimage_wire::proto::handshake::{MAGIC, MAX_TOKEN_LEN};
use afterimage_wire::proto::header::{MAX_HANDSHAKE_BODY, flags};
use afterimage_wire::proto::infer::{AnswerRef, Content};
use afterimage_wire::proto::message::{BytesWrite, Classification, Forget, Origin};
use afterimage_wire::proto::stats::{MAX_ENTRIES, Value as StatsValue};
use afterimage_wire::proto::{
    BodyError, Frame, FrameError, HEADER_LEN, Header, Hello, InferResp, Kind, Message, Role,
    Status, StreamFrame,
};
use serde_json::{Value, json};

mod server;

/// The frame of a valid vector.
fn decode(bytes: &[u8]) -> Frame<'_> {
    let frame = Frame::decode(bytes, u32::MAX).expect("no body is above this limit");
    frame.expect("the vector is a whole frame")
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// The payload of an unknown stats entry, read from the frame because decoding drops it.
fn unknown_payload(body: &[u8], index: usize) -> String {
    let mut rest = body;
    for at in 0.. {
        let name_len = usize::from(rest[1]);
        let (len_at, payload_at) = (2 + name_len, 6 + name_len);
        let len: [u8; 4] = rest[len_at..payload_at].try_into().expect("four bytes");
        let end = payload_at + u32::from_le_bytes(len) as usize;
        if at == index {
            return hex(&rest[payload_at..end]);
        }
        rest = &rest[end..];
    }
    unreachable!("the loop ends by returning")
}

/// The name and the fields of a message in the form of the vectors.
fn describe(message: &Message<'_>, frame: Frame<'_>) -> (&'static str, Value) {
    match message {
        Message::Hello(hello) => (
            "Hello",
            json!({
                "version_min": hello.version_min, "version_max": hello.version_max,
                "features": hello.features, "token": hex(hello.token),
            }),
        ),
        Message::Welcome(welcome) => (
            "Welcome",
            json!({
                "version": welcome.version, "service": welcome.service.code(),
                "features": welcome.features, "max_body": welcome.max_body,
                "window": welcome.window, "classes": welcome.classes,
                "digest": hex(&welcome.digest), "shape": welcome.shape.dims(),
                "name": welcome.name,
            }),
        ),
        Message::Ping(bytes) => ("Ping", json!({"bytes": hex(bytes)})),
        Message::Pong(bytes) => ("Pong", json!({"bytes": hex(bytes)})),
        Message::StatsReq => ("StatsReq", json!({})),
        Message::StatsResp(stats) => {
            let entries: Vec<Value> = stats
                .entries
                .iter()
                .enumerate()
                .map(|(i, (name, value))| describe_entry(i, name, value, frame.body))
                .collect();
            ("StatsResp", json!({"entries": entries}))
        }
        Message::SnapshotReq => ("SnapshotReq", json!({})),
        Message::SnapshotResp(snapshot) => (
            "SnapshotResp",
            json!({
                "entries": snapshot.entries.to_string(), "bytes": snapshot.bytes.to_string(),
                "elapsed_us": snapshot.elapsed.as_micros().to_string(), "joined": snapshot.joined,
            }),
        ),
        Message::Error { status, text, connection } => {
            assert_eq!(status.code(), frame.header.status);
            ("Error", json!({"text": text, "connection": connection}))
        }
        Message::GoAway { text } => ("GoAway", json!({"text": text})),
        Message::CacheRead { key, budget_ms } => {
            ("CacheReq", json!({"write": false, "key": key.to_string(), "budget_ms": budget_ms}))
        }
        Message::CacheWrite { key, value } => {
            ("CacheReq", json!({"write": true, "key": key.to_string(), "value": value.to_string()}))
        }
        Message::CacheResp { value } => {
            let value = value.map(|value| value.to_string());
            ("CacheResp", json!({"value": value}))
        }
        Message::ClassifyReq { image, budget_ms } => {
            ("ClassifyReq", json!({"image": hex(image), "budget_ms": budget_ms}))
        }
        Message::ClassifyResp(Classification { label, origin }) => {
            ("ClassifyResp", json!({"label": label, "origin": origin_name(*origin)}))
        }
        Message::BytesRead { key, budget_ms } => {
            ("BytesReq", json!({"write": false, "key": hex(key), "budget_ms": budget_ms}))
        }
        Message::BytesWrite(BytesWrite { key, ttl_s, value }) => (
            "BytesReq",
            json!({"write": true, "key": hex(key), "ttl_s": ttl_s, "value": hex(value)}),
        ),
        Message::BytesResp { value } => ("BytesResp", json!({"value": value.map(hex)})),
        Message::InferReq(request) => (
            "InferReq",
            json!({
                "model": request.model, "version": request.version, "refresh": request.refresh,
                "no_store": request.no_store, "ttl_s": request.ttl_s,
                "budget_ms": request.budget_ms,
                "rows": request.rows.iter().map(hex).collect::<Vec<_>>(),
            }),
        ),
        Message::InferResp(InferResp { digest, answers }) => {
            let answers: Vec<Value> = answers.iter().map(describe_answer).collect();
            ("InferResp", json!({"digest": hex(digest), "answers": answers}))
        }
        Message::ForgetReq(Forget { model, version, row }) => {
            ("ForgetReq", json!({"model": model, "version": version, "row": hex(row)}))
        }
        Message::ForgetResp { count } => ("ForgetResp", json!({"count": count.to_string()})),
        Message::FlushReq { model } => ("FlushReq", json!({"model": model})),
        Message::FlushResp => ("FlushResp", json!({})),
        Message::StreamOpen(open) => (
            "StreamOpen",
            json!({
                "credit": open.credit.to_string(), "name": open.name, "header": hex(open.header),
            }),
        ),
        Message::Stream(StreamFrame::Data { bytes, end }) => {
            ("StreamData", json!({"bytes": hex(bytes), "end": end}))
        }
        Message::Stream(StreamFrame::Credit { credit }) => {
            ("StreamCredit", json!({"credit": credit.to_string()}))
        }
        Message::Stream(StreamFrame::Progress(bytes)) => {
            ("StreamProgress", json!({"bytes": hex(bytes)}))
        }
        Message::Stream(StreamFrame::Reset { status, text }) => {
            assert_eq!(status.code(), frame.header.status);
            ("StreamReset", json!({"text": text}))
        }
        Message::Unknown { kind } => ("Unknown", json!({"kind": kind})),
        other => panic!("the vectors have no form for {other:?}"),
    }
}

fn origin_name(origin: Origin) -> &'static str {
    match origin {
        Origin::Miss => "miss",
        Origin::Coalesced => "coalesced",
        Origin::Hit => "hit",
    }
}

fn describe_answer(AnswerRef { origin, age_s, content }: AnswerRef<'_>) -> Value {
    let origin = origin_name(origin);
    match content {
        Content::Label(label) => json!({"origin": origin, "age_s": age_s, "label": label}),
        Content::Bytes(bytes) => json!({"origin": origin, "age_s": age_s, "bytes": hex(bytes)}),
    }
}

fn describe_entry(index: usize, name: &str, value: &StatsValue, body: &[u8]) -> Value {
    let (code, value) = match value {
        StatsValue::Counter(value) => (1, json!(value.to_string())),
        StatsValue::Gauge(value) => (2, json!(value.to_string())),
        StatsValue::Text(text) => (3, json!(text)),
        StatsValue::Histogram(buckets) => {
            let pairs = buckets.iter();
            let pairs = pairs.map(|(bound, count)| [bound.to_string(), count.to_string()]);
            (4, json!(pairs.collect::<Vec<_>>()))
        }
        StatsValue::Unknown(code) => (*code, json!(unknown_payload(body, index))),
        other => panic!("the vectors have no form for {other:?}"),
    };
    json!({"name": name, "type": code, "value": value})
}

/// An error in the form of the vectors.
fn describe_error(error: BodyError) -> Value {
    match error {
        BodyError::Truncated { field } => json!({"error": "truncated", "field": field}),
        BodyError::Trailing { bytes } => {
            json!({"error": "trailing", "field": null, "bytes": bytes})
        }
        BodyError::WrongMagic => json!({"error": "wrong_magic", "field": "magic"}),
        BodyError::NotUtf8 { field } => json!({"error": "not_utf8", "field": field}),
        BodyError::OutOfRange { field, value, limit } => {
            json!({"error": "out_of_range", "field": field, "value": value, "limit": limit})
        }
        BodyError::Empty { field } => json!({"error": "empty", "field": field}),
        BodyError::UnknownFlags { flags } => {
            json!({"error": "unknown_flags", "field": null, "flags": flags})
        }
        other => panic!("the vectors have no form for {other:?}"),
    }
}

/// The error of an invalid vector's bytes, and the answer of a server.
fn failure(bytes: &[u8], max_body: u32) -> (Value, String) {
    let frame = match Frame::decode(bytes, max_body) {
        Ok(Some(frame)) => frame,
        Ok(None) => return (json!({"error": "need_more", "field": null}), "wait".into()),
        Err(FrameError::TooLarge { header, limit }) => {
            let value = header.body_len;
            let what = json!({
                "error": "frame_too_large", "field": null, "value": value, "limit": limit,
            });
            return (what, answer_to_too_large(bytes, header, limit));
        }
        Err(other) => panic!("the vectors have no form for {other:?}"),
    };
    let error = Message::decode(frame).expect_err("the vector is invalid");
    let status = error.status().name();
    let answer = match frame.header.kind {
        Kind::Error | Kind::Pong | Kind::GoAway => "ignore".into(),
        Kind::Welcome
        | Kind::StatsResp
        | Kind::SnapshotResp
        | Kind::CacheResp
        | Kind::ClassifyResp
        | Kind::BytesResp
        | Kind::InferResp
        | Kind::ForgetResp
        | Kind::FlushResp => "error unsupported".into(),
        Kind::Hello => format!("close {status}"),
        kind if kind.is_stream() => format!("reset {status}"),
        _ => format!("error {status}"),
    };
    (describe_error(error), answer)
}

fn answer_to_too_large(bytes: &[u8], header: Header, limit: u32) -> String {
    /// A server skips a body that is longer than the limit by at most this many bytes.
    const MAX_SKIP: u32 = 16 << 20;
    let answer = match &bytes[..4] {
        b"GET " | b"POST" => "http 400",
        [0x16, 3, 1..=4, _] => "close unsupported",
        _ if limit == MAX_HANDSHAKE_BODY => "close bad_argument",
        _ if header.body_len - limit > MAX_SKIP => "close too_large",
        _ => "error too_large",
    };
    answer.into()
}

#[test]
fn every_valid_vector_decodes_to_its_fields() {
    for vector in Vector::valid() {
        let bytes = vector.bytes();
        let frame = decode(&bytes);
        let header = frame.header;
        assert_eq!(header.frame_len(), bytes.len(), "{}", vector.about());
        let found = json!({
            "body_len": header.body_len, "kind": header.kind.code(), "flags": header.flags,
            "status": header.status, "id": header.id.to_string(),
        });
        assert_eq!(found, vector.json["header"], "{}", vector.about());
        let message = match Message::decode(frame) {
            Ok(message) => message,
            Err(error) => panic!("{}: {error}", vector.about()),
        };
        let (name, fields) = describe(&message, frame);
        assert_eq!(name, vector.text("message"), "{}", vector.about());
        assert_eq!(fields, vector.json["fields"], "{}", vector.about());
    }
}

#[test]
fn only_canonical_vectors_encode_to_their_bytes() {
    let mut canonical = 0;
    for vector in Vector::valid() {
        let bytes = vector.bytes();
        let frame = decode(&bytes);
        let message = Message::decode(frame).expect("the vector is valid");
        let mut encoded = Vec::new();
        message.encode(frame.header.id, &mut encoded);
        if vector.json["canonical"] == json!(true) {
            assert_eq!(hex(&encoded), vector.text("hex"), "{}", vector.about());
            canonical += 1;
        } else {
            assert_ne!(hex(&encoded), vector.text("hex"), "{}", vector.about());
        }
    }
    assert!(canonical > 50, "most vectors are canonical");
}

#[test]
fn every_prefix_of_a_valid_vector_needs_more() {
    for vector in Vector::valid() {
        let bytes = vector.bytes();
        for cut in 0..bytes.len() {
            let found = Frame::decode(&bytes[..cut], u32::MAX);
            assert_eq!(found, Ok(None), "{} cut at {cut}", vector.about());
        }
    }
}

#[test]
fn a_frame_fits_a_limit_of_exactly_its_length() {
    for vector in Vector::valid() {
        let bytes = vector.bytes();
        let header = decode(&bytes).header;
        let found = Frame::decode(&bytes, header.body_len);
        assert!(matches!(found, Ok(Some(_))), "{}", vector.about());
        if let Some(limit) = header.body_len.checked_sub(1) {
            let refused = Err(FrameError::TooLarge { header, limit });
            assert_eq!(Frame::decode(&bytes, limit), refused, "{}", vector.about());
        }
    }
}

#[test]
fn every_invalid_vector_fails_with_its_error() {
    for vector in Vector::invalid() {
        let (mut found, answer) = failure(&vector.bytes(), vector.max_body());
        for key in ["name", "comment", "hex", "max_body"] {
            found[key] = vector.json[key].clone();
        }
        found["answer"] = answer.into();
        assert_eq!(found, vector.json, "{}", vector.about());
    }
}

#[test]
fn every_kind_and_every_status_has_a_vector() {
    let valid = Vector::valid();
    let headers: Vec<Header> = valid.iter().map(|v| decode(&v.bytes()).header).collect();
    for kind in Kind::ALL {
        let found = headers.iter().any(|header| header.kind == *kind);
        assert!(found, "no valid vector of kind {}", kind.name());
    }
    for status in Status::ALL {
        let found = headers
            .iter()
            .any(|header| header.kind == Kind::Error && header.status == status.code());
        assert!(found, "no valid Error with status {status}");
    }
    let unknown = |header: &Header| matches!(Status::from_code(header.status), Status::Unknown(_));
    let errors = headers.iter().filter(|header| header.kind == Kind::Error);
    assert!(errors.clone().any(unknown), "no Error of unknown status");
    for bit in [flags::CONNECTION, 0] {
        assert!(errors.clone().any(|header| header.flags == bit));
    }
    let labels = |bits| {
        let mut replies = headers.iter().filter(|h| h.kind == Kind::ClassifyResp);
        replies.any(|header| header.flags == bits)
    };
    assert!([0, flags::HIT, flags::COALESCED].into_iter().all(labels));
    let has = |kind, bits| headers.iter().any(|h| h.kind == kind && h.flags == bits);
    assert!(has(Kind::SnapshotResp, flags::JOINED) && has(Kind::SnapshotResp, 0));
    assert!(has(Kind::BytesReq, flags::WRITE) && has(Kind::BytesReq, 0));
    assert!(has(Kind::BytesResp, flags::EXISTS) && has(Kind::BytesResp, 0));
    assert!([0, flags::REFRESH, flags::NO_STORE].into_iter().all(|bits| has(Kind::InferReq, bits)));
    assert!(has(Kind::CacheReq, flags::WRITE) && has(Kind::CacheReq, 0));
    assert!(has(Kind::CacheResp, flags::EXISTS) && has(Kind::CacheResp, 0));
}

#[test]
fn every_error_has_an_invalid_vector() {
    let found: BTreeSet<String> =
        Vector::invalid().iter().map(|vector| vector.text("error").to_owned()).collect();
    let wanted = [
        "empty",
        "frame_too_large",
        "need_more",
        "not_utf8",
        "out_of_range",
        "trailing",
        "truncated",
        "unknown_flags",
        "wrong_magic",
    ];
    assert!(found.iter().eq(wanted), "{found:?}");
}

#[test]
fn accepts_the_maximum_number_of_stats_entries() {
    let mut bytes = Vector::named(&Vector::invalid(), "stats_resp_too_many_entries").bytes();
    let entry_len = (bytes.len() - HEADER_LEN) / (MAX_ENTRIES + 1);
    bytes.truncate(bytes.len() - entry_len);
    let body_len = u32::try_from(bytes.len() - HEADER_LEN).unwrap();
    bytes[..4].copy_from_slice(&body_len.to_le_bytes());
    let message = Message::decode(decode(&bytes));
    assert!(matches!(message, Ok(Message::StatsResp(stats)) if stats.entries.len() == MAX_ENTRIES));
}

#[test]
fn the_longest_token_and_hello_match_the_limits() {
    let longest = Vector::named(&Vector::valid(), "hello_longest_token").bytes();
    let Ok(Message::Hello(Hello { token, .. })) = Message::decode(decode(&longest)) else {
        panic!("hello_longest_token is a Hello");
    };
    assert_eq!(token.len(), MAX_TOKEN_LEN);
    let longest = Vector::named(&Vector::valid(), "hello_longest").bytes();
    assert_eq!(decode(&longest).header.body_len, MAX_HANDSHAKE_BODY);
}

#[test]
fn the_tables_of_the_document_match_the_code() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("PROTOCOL.md");
    let text = fs::read_to_string(path).unwrap();
    let has_row = |start: String| {
        let found = text.lines().any(|line| line.starts_with(&start));
        assert!(found, "PROTOCOL.md has no row that begins {start:?}");
    };
    for kind in Kind::ALL {
        has_row(format!("| {:#04x} | {} | ", kind.code(), kind.name()));
    }
    for status in Status::ALL {
        has_row(format!("| {} | {} | ", status.code(), status.name()));
        let row = format!("| {} | {} | ", status.code(), status.name());
        let line = text.lines().find(|line| line.starts_with(&row)).unwrap();
        let advice = line.trim_end_matches(" |").rsplit(" | ").next().unwrap();
        assert_eq!(
            advice.starts_with("yes"),
            status.is_retryable(),
            "the retry advice for {status} is {advice:?}"
        );
    }
    for service in [Role::Memo, Role::Cache, Role::Classifier] {
        let named = format!("{} {service}", service.code());
        assert!(text.contains(&named), "PROTOCOL.md does not contain {named:?}");
    }
    let magic = str::from_utf8(&MAGIC).unwrap();
    assert!(text.contains(&format!("`{magic}`")));
}
