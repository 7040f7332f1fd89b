//! Comparison of the server's output with the expected replies.

use super::Script;
use crate::fuzz::wire::server_model::{Reply, Rest, kind, status};
use afterimage_wire::proto::{Frame, HEADER_LEN, Message};

/// Compares the output with the expected replies.
pub(super) fn check(script: &Script, mut expected: Vec<Reply>, rest: Rest, output: &[u8]) {
    // A slow client gets the deadline's error instead, in a frame.
    if rest == Rest::Http && (script.is_plain() || output.starts_with(b"HTTP")) {
        let start = b"HTTP/1.1 400 Bad Request\r\n";
        assert!(output.starts_with(start) || script.deaf_for.is_some(), "HTTP is answered in HTTP");
        assert!(output.ends_with(b"client.\n") || !script.is_plain(), "with a whole answer");
        return;
    }
    let (mut said, left) = frames(output);
    // Only a client that does not read, or has aborted, may see part of a frame.
    let is_cut = script.abort || script.deaf_for.is_some();
    assert!(is_cut || left == 0, "the output ends {left} bytes into a frame");

    // No frame follows a connection-level error.
    let fatal = said.iter().position(|frame| frame.kind == kind::ERROR && frame.flags == 1);
    assert!(fatal.is_none_or(|at| at + 1 == said.len()), "more follows the last words: {said:?}");
    assert!(said.iter().skip(1).all(|frame| frame.kind != kind::WELCOME), "one Welcome");

    // Notices of the server that answer no request.
    let notice = |frame: &Reply| {
        frame.id == 0
            && match (frame.kind, frame.flags) {
                (kind::GO_AWAY, 0) => frame.status == status::SHUTTING_DOWN,
                (kind::ERROR, 1) => {
                    matches!(frame.status, status::DEADLINE_EXCEEDED | status::SHUTTING_DOWN)
                }
                _ => false,
            }
    };
    let notices: Vec<Reply> = said.iter().filter(|frame| notice(frame)).cloned().collect();
    said.retain(|frame| !notice(frame));

    if script.is_plain() {
        let to_expect = match rest {
            _ if script.half_close => None,
            Rest::Closed | Rest::Http => None,
            Rest::Greeting | Rest::Partial => Some((kind::ERROR, status::DEADLINE_EXCEEDED)),
            Rest::Idle => Some((kind::GO_AWAY, status::SHUTTING_DOWN)),
        };
        let noticed: Vec<_> = notices.iter().map(|notice| (notice.kind, notice.status)).collect();
        assert!(
            noticed.iter().copied().eq(to_expect),
            "{noticed:?} but not {to_expect:?}, {rest:?}"
        );
    }
    // After a connection-level error, or with the client gone, replies may be missing, but none may
    // be extra.
    let may_miss = is_cut || fatal.is_some() || (!script.is_plain() && !notices.is_empty());
    // A changed service turns requests away; which ones depends on the batches.
    let has_changed = script.changes_after != u64::MAX;
    let (turned_away, said): (Vec<Reply>, Vec<Reply>) =
        said.into_iter().partition(|frame| has_changed && is_turned_away(frame));
    for frame in said {
        let place = expected.iter().position(|reply| is_answer(reply, &frame));
        let Some(place) = place else {
            panic!("nothing asks for {frame:?}; still to come are {expected:?}");
        };
        expected.remove(place);
    }
    for frame in turned_away {
        let place = expected.iter().position(|reply| is_of_service(reply) && reply.id == frame.id);
        expected.remove(place.expect("only requests to the service are turned away"));
    }
    assert!(may_miss || expected.is_empty(), "no answer: {expected:?}");
}

/// Whether this error tells the client to repeat one request on a new connection.
fn is_turned_away(frame: &Reply) -> bool {
    (frame.kind, frame.flags, frame.status) == (kind::ERROR, 0, status::SHUTTING_DOWN)
}

/// Whether this replies to a request that reached the service.
fn is_of_service(reply: &Reply) -> bool {
    let kinds = [kind::CACHE_RESP, kind::CLASSIFY_RESP, kind::BYTES_RESP, kind::INFER_RESP];
    kinds.contains(&reply.kind) || reply.status == status::INTERNAL
}

/// Whether `said` is the reply that was `expected`.
fn is_answer(expected: &Reply, said: &Reply) -> bool {
    let body_fits = match &expected.body {
        None => true,
        body => *body == said.body,
    };
    // A server that drains opens no stream.
    let drained = expected.kind == kind::STREAM_RESET && said.status == status::SHUTTING_DOWN;
    let status = if drained { status::SHUTTING_DOWN } else { expected.status };
    body_fits
        && (expected.id, expected.kind, expected.flags, status)
            == (said.id, said.kind, said.flags, said.status)
}

/// All whole frames of `output`, each checked to be well-formed, and how many bytes follow.
fn frames(output: &[u8]) -> (Vec<Reply>, usize) {
    let (mut frames, mut rest) = (Vec::new(), output);
    while let Some(frame) = Frame::decode(rest, 1 << 20).expect("no reply is above 1 MiB") {
        let header = frame.header;
        match Message::decode(frame).expect("a server's frames are well-formed") {
            Message::Error { text, .. } | Message::GoAway { text } => {
                assert!(!text.is_empty(), "an error says why");
            }
            Message::Unknown { kind } => panic!("a frame of kind {kind:#04x}"),
            _ => {}
        }
        frames.push(Reply {
            id: header.id,
            kind: header.kind.code(),
            flags: header.flags,
            status: header.status,
            body: Some(frame.body.to_vec()),
        });
        rest = &rest[HEADER_LEN + frame.body.len()..];
    }
    (frames, rest.len())
}
