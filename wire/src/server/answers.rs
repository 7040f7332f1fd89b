//! Replies that a connection gives by itself, or through its service one by one: pings, statistics,
//! snapshots, and frames that its service does not accept.

use std::sync::Arc;

use super::counters::Counters;
use super::greeting::Serves;
use super::options::Rights;
use super::outbox::Outbox;
use super::service::Service;
use super::shared::Shared;
use crate::proto::header::flags;
use crate::proto::message::{MAX_CACHE_REQ, MAX_PING_LEN};
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
    let known = if kind == Kind::CacheReq { flags::WRITE } else { 0 };
    let takes =
        serves.takes(kind) || matches!(kind, Kind::Ping | Kind::StatsReq | Kind::SnapshotReq);
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
    } else {
        let needed = match kind {
            Kind::CacheReq if flags & flags::WRITE != 0 => MAX_CACHE_REQ,
            Kind::CacheReq => MAX_CACHE_REQ / 2,
            _ => 0,
        };
        BodyError::Trailing { bytes: body_len as usize - needed }
    };
    answer_malformed(header, error, out);
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
        Kind::CacheReq | Kind::ClassifyReq => {
            let text = format!("this is a {}; it does not answer {}", serves.kind, kind.name());
            unsupported(&text, out);
        }
        Kind::Welcome
        | Kind::StatsResp
        | Kind::SnapshotResp
        | Kind::CacheResp
        | Kind::ClassifyResp => {
            unsupported(&format!("{} is a reply, not a request", kind.name()), out);
        }
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
                let (status, text) = (Status::Unauthorized, "a snapshot needs the admin token");
                Message::Error { status, text, connection: false }.encode(id, out);
            }
            Ok(Message::SnapshotReq) => shared.service.snapshot(outbox.reply(id)),
            Ok(_) => {
                let mut stats = Stats::default();
                stats.text(&metrics::SERVICE, serves.kind.to_string());
                stats.text(&metrics::VERSION, shared.options.name.as_str());
                shared.counters.stats(shared.options.tls.is_some(), &mut stats);
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
