//! Requests without an id: borrowed from the caller, or owned or shared while they are queued.

use std::num::NonZeroU16;
use std::time::{Duration, Instant};

use bytes::Bytes;

use super::error::CallError;
use super::outbound::{LARGE_BODY, SendBuffer};
use crate::proto::message::{Message, put_cache_read, put_cache_write, put_classify_req};
use crate::proto::{HEADER_LEN, Header, Kind, Welcome};

/// Memory of a queued request beyond its frame, about: its entries in the table and the queue.
const OVERHEAD: usize = 128;

/// A request. Its image, if any, is a `B`.
#[derive(Clone, Copy, Debug)]
pub(super) enum Request<B> {
    Classify(B),
    CacheRead(u64),
    CacheWrite {
        key: u64,
        value: i64,
    },
    Ping,
    Stats,
    Snapshot,
    /// A request of version 2, encoded.
    Encoded(EncodedRequest<B>),
}

/// An encoded request of version 2.
#[derive(Clone, Copy, Debug)]
pub(super) struct EncodedRequest<B> {
    pub(super) kind: Kind,
    pub(super) flags: u8,
    /// The header has a time budget.
    pub(super) has_budget: bool,
    /// Where the body has a time budget of 32 bits.
    pub(super) budget_at: Option<NonZeroU16>,
    pub(super) body: B,
}

// Requests of the hot path are copied into the table of calls.
const _: () = assert!(size_of::<Request<&[u8]>>() == 24);
const _: () = assert!(size_of::<Request<QueuedBody>>() == 24);

/// The body of a request.
pub(super) trait Body: AsRef<[u8]> {
    /// The same bytes, which can be shared without a copy.
    fn shared(&self) -> Option<&Bytes> {
        None
    }
}

impl Body for &[u8] {}

impl Body for &Bytes {
    fn shared(&self) -> Option<&Bytes> {
        Some(self)
    }
}

/// The body of a queued request.
#[derive(Debug)]
pub(super) enum QueuedBody {
    Copied(Box<[u8]>),
    Shared(Box<Bytes>),
}

impl QueuedBody {
    fn of(body: &impl Body) -> Self {
        match shared_if_large(body) {
            Some(bytes) => QueuedBody::Shared(Box::new(bytes.clone())),
            None => QueuedBody::Copied(body.as_ref().into()),
        }
    }
}

impl AsRef<[u8]> for QueuedBody {
    fn as_ref(&self) -> &[u8] {
        match self {
            QueuedBody::Copied(bytes) => bytes,
            QueuedBody::Shared(bytes) => bytes,
        }
    }
}

impl Body for QueuedBody {
    fn shared(&self) -> Option<&Bytes> {
        match self {
            QueuedBody::Copied(_) => None,
            QueuedBody::Shared(bytes) => Some(bytes),
        }
    }
}

/// The body, if sharing it costs less than a copy.
fn shared_if_large(body: &impl Body) -> Option<&Bytes> {
    body.shared().filter(|bytes| bytes.len() >= LARGE_BODY)
}

impl<B: Body> Request<B> {
    /// The same request for the queue.
    pub(super) fn to_queued(&self) -> Request<QueuedBody> {
        match *self {
            Request::Classify(ref image) => Request::Classify(QueuedBody::of(image)),
            Request::CacheRead(key) => Request::CacheRead(key),
            Request::CacheWrite { key, value } => Request::CacheWrite { key, value },
            Request::Ping => Request::Ping,
            Request::Stats => Request::Stats,
            Request::Snapshot => Request::Snapshot,
            Request::Encoded(ref request) => {
                let EncodedRequest { kind, flags, has_budget, budget_at, ref body } = *request;
                let body = QueuedBody::of(body);
                Request::Encoded(EncodedRequest { kind, flags, has_budget, budget_at, body })
            }
        }
    }

    /// The name of the request's kind.
    pub(super) fn name(&self) -> &'static str {
        match self {
            Request::Classify(_) => "ClassifyReq",
            Request::CacheRead(_) | Request::CacheWrite { .. } => "CacheReq",
            Request::Ping => "Ping",
            Request::Stats => "StatsReq",
            Request::Snapshot => "SnapshotReq",
            Request::Encoded(request) => request.kind.name(),
        }
    }

    /// Whether the server replies to it.
    pub(super) fn has_reply(&self) -> bool {
        !matches!(self, Request::CacheWrite { .. })
    }

    /// Bytes of memory that it takes while it is queued.
    pub(super) fn cost(&self) -> usize {
        let body = match self {
            Request::Classify(image) => image.as_ref().len(),
            Request::Encoded(request) => request.body.as_ref().len(),
            _ => 16,
        };
        OVERHEAD + HEADER_LEN + body
    }

    /// Whether this server can answer it, as far as its `Welcome` says.
    pub(super) fn check(&self, welcome: &Welcome) -> Result<(), CallError> {
        let image = match self {
            Request::Classify(image) => image,
            Request::Encoded(request) => return request.check(welcome),
            _ => return Ok(()),
        };
        let bytes = image.as_ref().len();
        if bytes > welcome.max_body as usize {
            let limit = welcome.max_body;
            return Err(CallError::TooLarge { bytes, limit });
        }
        match welcome.shape.byte_len() {
            Some(expected) if expected != bytes => {
                Err(CallError::BadArgument { bytes, expected, shape: welcome.shape.clone() })
            }
            _ => Ok(()),
        }
    }

    /// Appends its frame.
    pub(super) fn encode(&self, id: u64, budget_ms: u16, out: &mut SendBuffer) {
        let frames = out.frames();
        match self {
            Request::Classify(image) => match shared_if_large(image) {
                None => put_classify_req(frames, id, image.as_ref(), budget_ms),
                Some(image) => {
                    let (kind, status) = (Kind::ClassifyReq, budget_ms);
                    let body_len = body_len(image);
                    let header = Header { body_len, kind, flags: 0, status, id };
                    frames.extend_from_slice(&header.encode());
                    out.push(image.clone());
                }
            },
            Request::CacheRead(key) => put_cache_read(frames, id, *key, budget_ms),
            Request::CacheWrite { key, value } => put_cache_write(frames, id, *key, *value),
            Request::Ping => Message::Ping(&[]).encode(id, frames),
            Request::Stats => Message::StatsReq.encode(id, frames),
            Request::Snapshot => Message::SnapshotReq.encode(id, frames),
            Request::Encoded(request) => request.encode(id, budget_ms, out),
        }
    }
}

impl<B> EncodedRequest<B> {
    /// A request without a time budget.
    pub(super) fn plain(kind: Kind, flags: u8, body: B) -> Self {
        EncodedRequest { kind, flags, has_budget: false, budget_at: None, body }
    }
}

impl<B: Body> EncodedRequest<B> {
    fn check(&self, welcome: &Welcome) -> Result<(), CallError> {
        let (bytes, limit) = (self.body.as_ref().len(), welcome.max_body);
        let needed = self.kind.since();
        if welcome.version < needed {
            return Err(CallError::OldServer { needed, version: welcome.version });
        }
        if bytes > limit as usize {
            return Err(CallError::TooLarge { bytes, limit });
        }
        Ok(())
    }

    fn encode(&self, id: u64, budget_ms: u16, out: &mut SendBuffer) {
        let body = self.body.as_ref();
        let Self { kind, flags, .. } = *self;
        let status = if self.has_budget { budget_ms } else { 0 };
        let body_len = body_len(body);
        let budget = self.budget_at.map(|at| {
            let at = usize::from(at.get());
            at..at + size_of::<u32>()
        });
        let shared = shared_if_large(&self.body);
        // The part with the time budget is copied, because this changes it.
        let copied = match shared {
            None => body.len(),
            Some(_) => budget.as_ref().map_or(0, |budget| budget.end),
        };
        let frames = out.frames();
        frames.extend_from_slice(&Header { body_len, kind, flags, status, id }.encode());
        let start = frames.len();
        frames.extend_from_slice(&body[..copied]);
        // A time above 65 s stays as the caller gave it.
        if let Some(budget) = budget
            && budget_ms != 0
        {
            frames[start..][budget].copy_from_slice(&u32::from(budget_ms).to_le_bytes());
        }
        if let Some(shared) = shared {
            out.push(shared.slice(copied..));
        }
    }
}

/// The length of a body that `check` has limited.
fn body_len(body: &[u8]) -> u32 {
    u32::try_from(body.len()).expect("`check` has limited the body")
}

/// The time left until the deadline in whole milliseconds, rounded up, at least 1. A time that the
/// field cannot hold becomes 0, "no limit": the server must not give up before the caller does.
pub(super) fn budget_ms(now: Instant, deadline: Instant) -> u16 {
    let left = deadline.saturating_duration_since(now) + Duration::from_micros(999);
    match u16::try_from(left.as_millis()) {
        Ok(budget) => budget.max(1),
        Err(_) => 0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_budget_is_rounded_up_and_unlimited_beyond_the_field() {
        let now = Instant::now();
        for (left, budget) in [
            (Duration::ZERO, 1),
            (Duration::from_micros(1), 1),
            (Duration::from_micros(1001), 2),
            (Duration::from_secs(10), 10_000),
            (Duration::from_millis(65_535), u16::MAX),
            (Duration::from_millis(65_536), 0),
            (Duration::from_secs(3600), 0),
        ] {
            assert_eq!(budget_ms(now, now + left), budget, "{left:?}");
        }
        assert_eq!(budget_ms(now + Duration::from_secs(1), now), 1);
    }
}
