//! Requests without an id: borrowed from the caller, or owned while they are queued.

use std::time::{Duration, Instant};

use super::error::CallError;
use crate::proto::message::{Message, put_cache_read, put_cache_write, put_classify_req};
use crate::proto::{HEADER_LEN, Welcome};

/// Memory of a queued request beyond its frame, about: its entries in the table and the queue.
const OVERHEAD: usize = 128;

/// A request. Its image, if any, is a `B`.
#[derive(Clone, Copy, Debug)]
pub(super) enum Request<B> {
    Classify(B),
    CacheRead(u64),
    CacheWrite { key: u64, value: i64 },
    Ping,
    Stats,
    Snapshot,
}

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
            _ => 16,
        };
        OVERHEAD + HEADER_LEN + body
    }

    /// Whether this server can answer it, as far as its `Welcome` says.
    pub(super) fn check(&self, welcome: &Welcome) -> Result<(), CallError> {
        let Request::Classify(image) = self else {
            return Ok(());
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
