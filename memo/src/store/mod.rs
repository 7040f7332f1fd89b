//! Where remembered answers live: in this process, or across the network.

mod backend;
mod redis;
mod remote;

use std::sync::Arc;

use afterimage_cache::{KeeperStatus, Table};
use afterimage_wire::proto::stats::Stats;

pub use backend::{Backend, Callback};
pub use redis::{Redis, RedisError};
pub use remote::{RemoteOptions, RemoteStore};

/// A place that values are written to and looked up in. It may forget any of them at any time, and
/// what it gives back is not to be believed without a check.
#[derive(Debug)]
pub enum Store {
    /// The cache's table in the memo's own process, and who keeps its snapshot, if anybody does: a
    /// lookup takes nanoseconds.
    Embedded(Arc<Table>, Option<KeeperStatus>),
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
