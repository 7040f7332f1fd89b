//! Replies that a connection gives by itself, or through its service one by one: pings, statistics,
//! snapshots, and frames that its service does not accept.

use std::sync::Arc;

use super::counters::Counters;
use super::greeting::Serves;
use super::outbox::Outbox;
use super::service::Service;
use super::shared::Shared;
use crate::proto::{BodyError, Frame, Header, Kind, Message, Status, stats::Stats};

/// Answers a frame whose body does not decode.
pub(super) fn answer_malformed(header: Header, error: BodyError, out: &mut Vec<u8>) {
    let text = format!("malformed {}: {error}", header.kind.name());
    let error = Message::Error { status: error.status(), text: &text, connection: false };
    error.encode(header.id, out);
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
            Ok(Message::SnapshotReq) => shared.service.snapshot(outbox.later(id)),
            Ok(_) => {
                let mut stats = Stats::default();
                stats.text("service", serves.kind.to_string());
                stats.text("version", shared.options.name.as_str());
                shared.counters.stats(shared.options.tls.is_some(), &mut stats);
                shared.service.stats(&mut stats);
                Message::StatsResp(stats).encode(id, out);
            }
            Err(error) => {
                Counters::add(&shared.counters.malformed, 1);
                answer_malformed(frame.header, error, out);
            }
        },
    }
}
