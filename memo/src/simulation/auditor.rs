//! Reads along on every connection and keeps the protocol's accounts: each request has exactly one
//! reply, of the right kind, in time. What clients see is not enough for that: a reply that never
//! comes looks like a slow one to a caller whose time runs out.

use std::collections::BTreeMap;
use std::time::Duration;

use afterimage_wire::Status;
use afterimage_wire::proto::header::MAX_MAX_BODY;
use afterimage_wire::proto::{Frame, Kind, Message};
use tokio::time::Instant;

use crate::service::SWEEP_EVERY;

/// What a memo may take beyond a request's budget: its look at the flights, every so often, and the
/// millisecond that a timer is rounded to, twice.
const BUDGET_SLACK: Duration = SWEEP_EVERY.saturating_add(Duration::from_millis(2));

/// The accounts of one connection.
#[derive(Debug, Default)]
pub(super) struct Auditor {
    /// What each side has written and was not whole yet.
    partial: [Vec<u8>; 2],
    open: BTreeMap<u64, Asked>,
    /// The server promises to keep budgets while fewer requests than this are in flight. Past it,
    /// it does not read.
    window: Option<usize>,
    /// Something kept bytes from arriving when they should have: times prove nothing.
    pub(super) disturbed: bool,
}

/// A request that has no reply yet.
#[derive(Clone, Copy, Debug)]
struct Asked {
    kind: Kind,
    /// When its last byte arrives, if nothing comes in between.
    at: Instant,
    budget: Option<Duration>,
}

impl Auditor {
    /// Empty accounts. `window`: of a server that keeps budgets.
    pub(super) fn new(window: Option<usize>, disturbed: bool) -> Self {
        Auditor { window, disturbed, ..Auditor::default() }
    }

    /// Bytes of one side (0: the client) that arrive at this time. Says what is wrong with them.
    pub(super) fn wrote(&mut self, side: usize, bytes: &[u8], arrives: Instant) -> Option<String> {
        let mut partial = std::mem::take(&mut self.partial[side]);
        partial.extend_from_slice(bytes);
        let mut at = 0;
        let mut complaint = None;
        while let Ok(Some(frame)) = Frame::decode(&partial[at..], MAX_MAX_BODY) {
            at += frame.header.frame_len();
            let wrong = match side {
                0 => self.request(frame, arrives),
                _ => self.reply(frame, Instant::now()),
            };
            complaint = complaint.or(wrong);
        }
        partial.drain(..at);
        self.partial[side] = partial;
        complaint
    }

    fn request(&mut self, frame: Frame<'_>, at: Instant) -> Option<String> {
        let kind = frame.header.kind;
        let message = match Message::decode(frame) {
            Ok(message) => message,
            Err(error) => return Some(format!("a malformed {kind:?}: {error}")),
        };
        let budget = match message {
            Message::CacheWrite { .. } => return None,
            Message::ClassifyReq { budget_ms, .. } | Message::CacheRead { budget_ms, .. } => {
                (budget_ms > 0).then(|| Duration::from_millis(budget_ms.into()))
            }
            _ => None,
        };
        let id = frame.header.id;
        self.disturbed |= self.window.is_some_and(|window| self.open.len() >= window);
        let twice = self.open.insert(id, Asked { kind, at, budget }).is_some();
        twice.then(|| format!("id {id} is used again while it is in flight"))
    }

    fn reply(&mut self, frame: Frame<'_>, now: Instant) -> Option<String> {
        let id = frame.header.id;
        let message = match Message::decode(frame) {
            Ok(message) => message,
            Err(error) => return Some(format!("a malformed {:?}: {error}", frame.header.kind)),
        };
        if let Message::Error { status: Status::Internal, text, .. } = message {
            return Some(format!("request {id} got an internal error: {text}"));
        }
        let kind = match message {
            Message::GoAway { .. } | Message::Error { connection: true, .. } => return None,
            Message::Welcome(_) => Some(Kind::Hello),
            Message::Pong(_) => Some(Kind::Ping),
            Message::StatsResp(_) => Some(Kind::StatsReq),
            Message::CacheResp { .. } => Some(Kind::CacheReq),
            Message::ClassifyResp(_) => Some(Kind::ClassifyReq),
            Message::Error { .. } => None,
            _ => return Some(format!("a {:?} from a server", frame.header.kind)),
        };
        let Some(asked) = self.open.remove(&id) else {
            return Some(format!("a second reply to request {id}, or one to none"));
        };
        if kind.is_some_and(|kind| kind != asked.kind) {
            return Some(format!(
                "request {id}, a {:?}, got a {:?}",
                asked.kind, frame.header.kind
            ));
        }
        let took = now.saturating_duration_since(asked.at);
        let judged = self.window.is_some() && !self.disturbed;
        match asked.budget {
            Some(budget) if judged && took > budget + BUDGET_SLACK => {
                Some(format!("request {id} took {took:?}; its budget was {budget:?}"))
            }
            _ => None,
        }
    }

    /// The requests that have no reply.
    pub(super) fn unanswered(&self) -> usize {
        self.open.len()
    }
}
