//! Where remembered answers live: in this process, or across the network.

mod backend;
mod redis;
mod remote;

use std::sync::Arc;

use afterimage_cache::service::NO_SNAPSHOT;
use afterimage_cache::{Hashed, SnapshotHandle, Table};
use afterimage_wire::Status;
use afterimage_wire::proto::stats::Stats;
use afterimage_wire::server::Later;

pub use backend::{Backend, Callback};
pub use redis::{Redis, RedisError};
pub use remote::{RemoteOptions, RemoteStore};

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
    pub fn snapshot(&self, later: Later) {
        match self {
            Store::Embedded(_, Some(keeper)) => keeper.answer(later),
            Store::Embedded(_, None) => later.error(Status::Unsupported, NO_SNAPSHOT),
            Store::Remote(_) => {
                let text = "what this memo remembers is in a cache elsewhere: ask that one";
                later.error(Status::Unsupported, text);
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
