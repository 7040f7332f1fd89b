//! Stores: the label table in this process, or a server across the network.

mod redis;
mod remote;

use crate::metrics;
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use afterimage_cache::service::NO_SNAPSHOT;
use afterimage_cache::{ByteStore, Hashed, SnapshotHandle, Table};
use afterimage_core::{Failure, Reply};
use afterimage_wire::client::Values;
use afterimage_wire::proto::stats::Stats;
use afterimage_wire::server::SnapshotReply;
use afterimage_wire::{CacheClient, Connection, Status};

pub use redis::{Redis, RedisError, RedisOptions};
pub use remote::{RemoteStore, StoreOptions};

/// A store of sealed labels. It may drop any value at any time. The memo checks the seal of each
/// value that it reads.
#[derive(Debug)]
pub enum Store {
    /// The label table in the memo's process, and the handle of its snapshot file, if it has one.
    /// A lookup takes nanoseconds.
    Embedded(Arc<Table>, Option<SnapshotHandle>),
    /// A store across the network: a cache service, Redis or Valkey.
    Remote(RemoteStore),
}

impl Store {
    /// Writes a value. There is no reply, and the store may drop the value.
    pub fn write(&self, key: u64, value: i64) {
        match self {
            Store::Embedded(table, _) => {
                table.insert(key, value.cast_unsigned());
            }
            Store::Remote(remote) => remote.write(key, value),
        }
    }

    /// Prefetches the memory that a write of `key` needs. With a large table this saves a miss more
    /// than a hundred nanoseconds, if other work comes before the write.
    pub fn prefetch_write(&self, key: u64) {
        if let Store::Embedded(table, _) = self {
            table.prefetch_bucket(Hashed::new(key));
        }
    }

    /// Writes a snapshot of the label table in this process, if it has a snapshot file.
    pub fn snapshot(&self, reply: SnapshotReply) {
        match self {
            Store::Embedded(_, Some(snapshots)) => snapshots.answer(reply),
            Store::Embedded(_, None) => {
                reply.send(Err(Failure::new(Status::Unsupported, NO_SNAPSHOT)));
            }
            Store::Remote(_) => {
                let text = "this memo has a remote store; request the snapshot from the store";
                reply.send(Err(Failure::new(Status::Unsupported, text)));
            }
        }
    }

    /// Adds the store's statistics to `stats`.
    pub fn stats(&self, stats: &mut Stats) {
        match self {
            Store::Embedded(table, snapshots) => {
                let table = table.stats();
                stats.text(&metrics::STORE, "embedded");
                stats.gauge(&metrics::STORE_ENTRIES, table.entries);
                stats.gauge(&metrics::STORE_CAPACITY, table.capacity);
                stats.gauge(&metrics::STORE_MEMORY, table.bytes);
                stats.counter(&metrics::STORE_EVICTIONS, table.evictions);
                if let Some(status) = snapshots {
                    status.stats(stats);
                }
            }
            Store::Remote(remote) => remote.stats(stats),
        }
    }
}

/// The stores of a memo.
#[derive(Debug)]
pub(crate) struct Stores {
    pub(crate) labels: Store,
    /// In this process. Without it, answers of bytes are not stored.
    pub(crate) bytes: Option<Arc<ByteStore>>,
}

/// Receives the result of a lookup: one entry for each key, or `None` if the store did not answer.
pub type Callback = Box<dyn FnOnce(Option<Vec<Option<i64>>>) + Send>;

/// A store across the network. Its methods return at once.
pub trait Backend: fmt::Debug + Send + Sync + 'static {
    /// The name in statistics.
    fn name(&self) -> &'static str;

    /// The address for log lines.
    fn address(&self) -> &str {
        self.name()
    }

    /// Whether it can be reached, as far as the client knows.
    fn is_connected(&self) -> bool;

    /// Looks `keys` up and calls `then`, once, within `limit`. That is far above the lookup budget,
    /// which the caller keeps: a connection without an answer by then should be closed.
    fn get_many(&self, keys: &[u64], limit: Duration, then: Callback);

    /// Whether lookups wait in this process to be written to the connection. Their budget has not
    /// begun.
    fn is_writing(&self) -> bool {
        false
    }

    /// A lookup took longer than its budget.
    fn is_late(&self, _budget: Duration) {}

    /// Sends a value. If the value does not arrive, a later lookup is a miss.
    fn set(&self, key: u64, value: i64);

    /// Adds its own statistics to `stats`.
    fn stats(&self, _stats: &mut Stats) {}
}

/// A cache service. The client should fail fast, so that a lookup is a miss at once while the
/// service is unreachable.
impl Backend for CacheClient {
    fn name(&self) -> &'static str {
        "afterimage"
    }

    fn address(&self) -> &str {
        self.server()
    }

    fn is_connected(&self) -> bool {
        Connection::is_connected(self)
    }

    fn get_many(&self, keys: &[u64], limit: Duration, then: Callback) {
        let reply = Reply::call(move |values: Values| then(values.ok()));
        self.submit_get_many(keys, limit, reply);
    }

    fn is_writing(&self) -> bool {
        Connection::is_connected(self) && self.counters().queued_bytes > 0
    }

    fn set(&self, key: u64, value: i64) {
        // A failed write is a miss later, and needs no action now.
        let _ = CacheClient::set(self, key, value);
    }
}
