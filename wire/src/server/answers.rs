//! Replies outside of batches, from the connection or one by one from its service: pings,
//! statistics, snapshots, and frames that its service does not accept.

use std::sync::Arc;

use super::greeting::Serves;
use super::metrics::Counters;
use super::options::Rights;
use super::outbox::Outbox;
use super::service::Service;
use super::shared::Shared;
use crate::proto::header::{MAX_LARGE_BODY, MAX_VALUE, flags};
use crate::proto::infer::MAX_NAME_LEN;
use crate::proto::message::{BYTES_KEY_LEN, BYTES_WRITE_HEAD, MAX_CACHE_REQ, MAX_PING_LEN};
use crate::proto::{BodyError, Frame, Header, Kind, Message, Status, stats::Stats};
use crate::server::metrics;

/// Answers a frame whose body does not decode.
pub(super) fn answer_malformed(header: Header, error: BodyError, out: &mut Vec<u8>) {
    let text = format!("malformed {}: {error}", header.kind.name());
    let error = Message::Error { status: error.status(), text: &text, connection: false };
    error.encode(header.id, out);
}

/// Answers a frame whose body is longer than its kind allows, from the header alone.
pub(super) fn answer_too_long<S: Service>(
    shared: &Shared<S>,
    serves: Serves,
    header: Header,
    out: &mut Vec<u8>,
    outbox: &Arc<Outbox>,
) {
    let Header { body_len, kind, flags, id, .. } = header;
    let known = match kind {
        Kind::CacheReq | Kind::BytesReq => flags::WRITE,
        Kind::InferReq => flags::REFRESH | flags::NO_STORE,
        _ => 0,
    };
    let takes = serves.takes(kind)
        || serves.takes_alone(kind)
        || matches!(kind, Kind::Ping | Kind::StatsReq | Kind::SnapshotReq);
    if !takes {
        return answer_other(shared, serves, Frame { header, body: &[] }, out, outbox);
    }
    Counters::add(&shared.counters.malformed, 1);
    let error = if flags & !known != 0 {
        BodyError::UnknownFlags { flags: flags & !known }
    } else if kind == Kind::Ping {
        let limit = MAX_PING_LEN as u64;
        BodyError::OutOfRange { field: "ping", value: body_len.into(), limit }
    } else if kind == Kind::ClassifyReq {
        let expected = serves.input_len.unwrap_or(0);
        let text = format!("the input has {body_len} bytes; the model takes {expected}");
        return Message::Error { status: Status::BadArgument, text: &text, connection: false }
            .encode(id, out);
    } else if kind == Kind::BytesReq && flags & flags::WRITE != 0 {
        let (value, limit) = (u64::from(body_len) - BYTES_WRITE_HEAD as u64, MAX_VALUE as u64);
        BodyError::OutOfRange { field: "value", value, limit }
    } else if matches!(kind, Kind::InferReq | Kind::ForgetReq) {
        let (value, limit) = (body_len.into(), MAX_LARGE_BODY.into());
        BodyError::OutOfRange { field: "body length", value, limit }
    } else {
        let needed = match kind {
            Kind::BytesReq => BYTES_KEY_LEN,
            Kind::FlushReq => 1 + MAX_NAME_LEN,
            Kind::CacheReq if flags & flags::WRITE != 0 => MAX_CACHE_REQ,
            Kind::CacheReq => MAX_CACHE_REQ / 2,
            _ => 0,
        };
        BodyError::Trailing { bytes: body_len as usize - needed }
    };
    answer_malformed(header, error, out);
}

/// Answers a request that needs admin rights.
pub(super) fn answer_unauthorized(header: Header, out: &mut Vec<u8>) {
    let text = match header.kind {
        Kind::SnapshotReq => "a snapshot needs the admin token",
        _ => "deleting stored answers needs the admin token",
    };
    Message::Error { status: Status::Unauthorized, text, connection: false }.encode(header.id, out);
}

/// Answers a frame for which there is no memory.
pub(super) fn answer_no_memory(header: Header, limit: usize, out: &mut Vec<u8>) {
    let text = format!(
        "no memory for a body of {} bytes; all connections together may use {limit}",
        header.body_len
    );
    Message::Error { status: Status::Overloaded, text: &text, connection: false }
        .encode(header.id, out);
}

/// Answers a frame above the limit; `fatal` if the server then closes the connection.
pub(super) fn too_large(header: Header, limit: u32, fatal: bool, out: &mut Vec<u8>) {
    let text = format!("frame body is {} bytes; the limit is {limit}", header.body_len);
    let error = Message::Error { status: Status::TooLarge, text: &text, connection: fatal };
    error.encode(header.id, out);
}

/// Answers a frame that does not go to the service in a batch.
pub(super) fn answer_other<S: Service>(
    shared: &Shared<S>,
    serves: Serves,
    frame: Frame<'_>,
    out: &mut Vec<u8>,
    outbox: &Arc<Outbox>,
) {
    let Header { id, kind, .. } = frame.header;
    let unsupported = |text: &str, out: &mut Vec<u8>| {
        Message::Error { status: Status::Unsupported, text, connection: false }.encode(id, out);
    };
    match kind {
        // Replies and notices need no reply, and two peers that answer errors with errors would
        // never stop.
        Kind::Error | Kind::Pong | Kind::GoAway => {}
        _ if kind.since() > serves.version => {
            let (code, name, version) = (kind.code(), kind.name(), serves.version);
            unsupported(&format!("kind {code:#04x} ({name}) is not in version {version}"), out);
        }
        Kind::CacheReq
        | Kind::ClassifyReq
        | Kind::BytesReq
        | Kind::InferReq
        | Kind::ForgetReq
        | Kind::FlushReq => {
            let text = format!("this is a {}; it does not answer {}", serves.kind, kind.name());
            unsupported(&text, out);
        }
        Kind::Welcome
        | Kind::StatsResp
        | Kind::SnapshotResp
        | Kind::CacheResp
        | Kind::ClassifyResp
        | Kind::BytesResp
        | Kind::InferResp
        | Kind::ForgetResp
        | Kind::FlushResp => {
            unsupported(&format!("{} is a reply, not a request", kind.name()), out);
        }
        Kind::StreamOpen
        | Kind::StreamData
        | Kind::StreamCredit
        | Kind::StreamProgress
        | Kind::StreamReset => unreachable!("streams have their frames on version 2"),
        Kind::Unknown(code) => {
            unsupported(&format!("kind {code:#04x} is not known to this version"), out);
        }
        Kind::Hello => {
            let text = "a second Hello: the connection is open already";
            Message::Error { status: Status::BadArgument, text, connection: false }.encode(id, out);
        }
        Kind::Ping | Kind::StatsReq | Kind::SnapshotReq => match Message::decode(frame) {
            Ok(Message::Ping(bytes)) => Message::Pong(bytes).encode(id, out),
            Ok(Message::SnapshotReq) if serves.rights == Rights::Use => {
                answer_unauthorized(frame.header, out);
            }
            Ok(Message::SnapshotReq) => shared.service.snapshot(outbox.reply(id)),
            Ok(_) => {
                let mut stats = Stats::default();
                stats.text(&metrics::SERVICE, serves.kind.to_string());
                stats.text(&metrics::VERSION, shared.options.name.as_str());
                shared.counters.stats(shared.options.has_tls(), &mut stats);
                shared.service.stats(&mut stats);
                if serves.rights == Rights::Admin {
                    shared.service.admin_stats(&mut stats);
                }
                Message::StatsResp(stats).encode(id, out);
            }
            Err(error) => {
                Counters::add(&shared.counters.malformed, 1);
                answer_malformed(frame.header, error, out);
            }
        },
    }
}
