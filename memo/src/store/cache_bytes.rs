//! The byte store of a cache service as a store of a memo.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use afterimage_core::{ByteBudget, Reply};
use afterimage_wire::client::{BytesRead, Written};
use afterimage_wire::{CacheClient, CallError};
use bytes::Bytes;

use super::gather::{Gathered, MAX_GATHERED_BYTES};
use super::{Backend, Callback, Keep, OfBytes};

/// The time after which a write counts as failed.
const WRITE_TIMEOUT: Duration = Duration::from_secs(5);

/// The byte store of a cache service. The service needs version 2 of the protocol, and a byte store
/// (`afterimage cache --bytes SIZE`).
///
/// The client should fail fast, so that a lookup is a miss at once while the service is
/// unreachable. It should be another one than that of the labels, so that no label waits for a
/// large value on its connection.
#[derive(Debug)]
pub struct CacheBytes {
    client: CacheClient,
    gathered: ByteBudget,
    outcomes: Arc<Outcomes>,
}

#[derive(Debug, Default)]
struct Outcomes {
    /// Why the last lookup failed.
    cause: Mutex<Option<String>>,
    writes_failed: AtomicU64,
}

impl Outcomes {
    fn failed(&self, error: &CallError) {
        let cause = error.to_string();
        *self.cause.lock().unwrap_or_else(PoisonError::into_inner) = Some(cause);
    }
}

impl CacheBytes {
    /// The byte store of the service that this client connects to. Lookups of labels should have a
    /// connection of their own: they would wait while a large value is written.
    pub fn new(client: CacheClient) -> Self {
        let gathered = ByteBudget::new(MAX_GATHERED_BYTES);
        CacheBytes { client, gathered, outcomes: Arc::default() }
    }
}

impl Backend<OfBytes> for CacheBytes {
    fn name(&self) -> &'static str {
        "afterimage"
    }

    fn address(&self) -> &str {
        self.client.server()
    }

    fn is_connected(&self) -> bool {
        self.client.is_connected()
    }

    fn cause(&self) -> Option<String> {
        self.outcomes.cause.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn get_many(&self, keys: &[u128], limit: Duration, then: Callback<OfBytes>) {
        let lookup = Gathered::new(keys.len(), &self.gathered, then);
        for (i, key) in keys.iter().enumerate() {
            let (lookup, outcomes) = (Arc::clone(&lookup), Arc::clone(&self.outcomes));
            let reply = Reply::call(move |outcome: BytesRead| match outcome {
                Ok(value) => lookup.arrived(i, value),
                Err(error) => {
                    outcomes.failed(&error);
                    lookup.failed();
                }
            });
            self.client.submit_read_bytes(&key.to_le_bytes(), limit, reply);
        }
    }

    fn is_writing(&self) -> bool {
        self.is_connected() && self.client.counters().queued_bytes > 0
    }

    fn set(&self, key: u128, value: Bytes, keep: Keep) {
        let ttl = match keep {
            Keep::Answer(ttl) => ttl,
            Keep::Epoch => None,
        };
        let outcomes = Arc::clone(&self.outcomes);
        let reply = Reply::call(move |outcome: Written| {
            // A failed write is a miss later.
            if outcome.is_err() {
                outcomes.writes_failed.fetch_add(1, Relaxed);
            }
        });
        self.client.submit_write_bytes(&key.to_le_bytes(), &value, ttl, WRITE_TIMEOUT, reply);
    }

    fn writes_failed(&self) -> u64 {
        self.outcomes.writes_failed.load(Relaxed)
    }
}
