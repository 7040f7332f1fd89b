//! Where remembered answers live: in this process, or across the network.

mod redis;
mod remote;

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use afterimage_cache::service::NO_SNAPSHOT;
use afterimage_cache::{Hashed, SnapshotHandle, Table};
use afterimage_wire::proto::stats::Stats;
use afterimage_core::Failure;
use afterimage_wire::server::SnapshotReply;
use afterimage_wire::{Client, Status};

pub use redis::{Redis, RedisError, RedisOptions};
pub use remote::{RemoteStore, StoreOptions};

/// A place that values are written to and looked up in. It may forget any of them at any time, and
/// what it gives back is not to be believed without a check.
#[derive(Debug)]
pub enum Store {
    /// The cache's table in the memo's own process, and who keeps its snapshot, if anybody does: a
    /// lookup takes nanoseconds.
    Embedded(Arc<Table>, Option<SnapshotHandle>),
    /// A cache over the network: ours, Redis or Valkey.
    Remote(RemoteStore),
}

impl Store {
    /// Stores a value, or does not: there is no reply.
    pub fn write(&self, key: u64, value: i64) {
        match self {
            Store::Embedded(table, _) => {
                table.insert(key, value.cast_unsigned());
            }
            Store::Remote(remote) => remote.write(key, value),
        }
    }

    /// Has the memory that a write of `key` takes brought near, as long as something else is done
    /// first: with a large table that is a hundred nanoseconds and more which a miss would wait
    /// for.
    pub fn prefetch_write(&self, key: u64) {
        if let Store::Embedded(table, _) = self {
            table.prefetch_bucket(Hashed::new(key));
        }
    }

    /// Writes a snapshot of the table in this process, if it has a place for one.
    pub fn snapshot(&self, reply: SnapshotReply) {
        match self {
            Store::Embedded(_, Some(snapshots)) => snapshots.answer(reply),
            Store::Embedded(_, None) => {
                reply.send(Err(Failure::new(Status::Unsupported, NO_SNAPSHOT)));
            }
            Store::Remote(_) => {
                let text = "the answers of this memo are in a remote store: ask that one";
                reply.send(Err(Failure::new(Status::Unsupported, text)));
            }
        }
    }

    /// Adds what the store counts to `stats`.
    pub fn stats(&self, stats: &mut Stats) {
        match self {
            Store::Embedded(table, snapshots) => {
                let table = table.stats();
                stats.text("store", "embedded");
                stats.gauge("store_entries", table.entries);
                stats.gauge("store_capacity", table.capacity);
                stats.gauge("store_memory_bytes", table.bytes);
                stats.counter("store_evictions", table.evictions);
                if let Some(status) = snapshots {
                    status.stats(stats);
                }
            }
            Store::Remote(remote) => remote.stats(stats),
        }
    }
}

/// Takes what a lookup found: as many values as keys, or `None` for no answer.
pub type Callback = Box<dyn FnOnce(Option<Vec<Option<i64>>>) + Send>;

/// A store over the network. Its methods return at once.
pub trait Backend: fmt::Debug + Send + Sync + 'static {
    /// What statistics call it.
    fn name(&self) -> &'static str;

    /// Where it is, for log lines.
    fn address(&self) -> &str {
        self.name()
    }

    /// Whether it can be reached, as far as is known.
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

    /// Sends a value on its way. If it does not arrive, a later lookup is a miss.
    fn set(&self, key: u64, value: i64);

    /// Adds what it counts of its own to `stats`.
    fn stats(&self, _stats: &mut Stats) {}
}

/// An Afterimage cache. The client should fail fast: while the cache is away, a lookup is a miss at
/// once.
impl Backend for Client {
    fn name(&self) -> &'static str {
        "afterimage"
    }

    fn address(&self) -> &str {
        self.server()
    }

    fn is_connected(&self) -> bool {
        Client::is_connected(self)
    }

    fn get_many(&self, keys: &[u64], limit: Duration, then: Callback) {
        self.submit_cache_get_many(keys, limit, move |values| then(values.ok()));
    }

    fn is_writing(&self) -> bool {
        Client::is_connected(self) && self.counters().queued_bytes > 0
    }

    fn set(&self, key: u64, value: i64) {
        // A full queue or a lost connection: a miss later, and nothing to do about it now.
        let _ = self.cache_set(key, value);
    }
}
