//! Requests without an id: borrowed from the caller, or owned while they are queued.

use std::num::NonZeroU16;
use std::time::{Duration, Instant};

use super::error::CallError;
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

impl Request<&[u8]> {
    /// The same request, owned.
    pub(super) fn to_owned(self) -> Request<Box<[u8]>> {
        match self {
            Request::Classify(image) => Request::Classify(image.into()),
            Request::CacheRead(key) => Request::CacheRead(key),
            Request::CacheWrite { key, value } => Request::CacheWrite { key, value },
            Request::Ping => Request::Ping,
            Request::Stats => Request::Stats,
            Request::Snapshot => Request::Snapshot,
            Request::Encoded(EncodedRequest { kind, flags, has_budget, budget_at, body }) => {
                let body = body.into();
                Request::Encoded(EncodedRequest { kind, flags, has_budget, budget_at, body })
            }
        }
    }
}

impl<B: AsRef<[u8]>> Request<B> {
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
    pub(super) fn encode(&self, id: u64, budget_ms: u16, out: &mut Vec<u8>) {
        match self {
            Request::Classify(image) => put_classify_req(out, id, image.as_ref(), budget_ms),
            Request::CacheRead(key) => put_cache_read(out, id, *key, budget_ms),
            Request::CacheWrite { key, value } => put_cache_write(out, id, *key, *value),
            Request::Ping => Message::Ping(&[]).encode(id, out),
            Request::Stats => Message::StatsReq.encode(id, out),
            Request::Snapshot => Message::SnapshotReq.encode(id, out),
            Request::Encoded(request) => request.encode(id, budget_ms, out),
        }
    }
}

impl<'a> EncodedRequest<&'a [u8]> {
    /// A request without a time budget.
    pub(super) fn plain(kind: Kind, flags: u8, body: &'a [u8]) -> Self {
        EncodedRequest { kind, flags, has_budget: false, budget_at: None, body }
    }
}

impl<B: AsRef<[u8]>> EncodedRequest<B> {
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

    fn encode(&self, id: u64, budget_ms: u16, out: &mut Vec<u8>) {
        let body = self.body.as_ref();
        let Self { kind, flags, .. } = *self;
        let status = if self.has_budget { budget_ms } else { 0 };
        let body_len = u32::try_from(body.len()).expect("`check` has limited the body");
        out.extend_from_slice(&Header { body_len, kind, flags, status, id }.encode());
        let start = out.len();
        out.extend_from_slice(body);
        // A time above 65 s stays as the caller gave it.
        if let Some(at) = self.budget_at
            && budget_ms != 0
        {
            let at = start + usize::from(at.get());
            out[at..at + size_of::<u32>()].copy_from_slice(&u32::from(budget_ms).to_le_bytes());
        }
    }
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
