//! Stores: in this process, or a server across the network. Labels and answers of bytes have stores
//! of their own.

mod cache_bytes;
mod disk;
mod gather;
mod redis;
mod remote;

use std::fmt;
use std::sync::Arc;
use std::time::{Duration, Instant};

use afterimage_cache::service::NO_SNAPSHOT;
use afterimage_cache::{ByteStore, ByteStoreStats, Hashed, SnapshotHandle, Table};
use afterimage_core::{Answer, AnswerKind, Failure, Reply};
use afterimage_wire::client::Values;
use afterimage_wire::proto::header::MAX_VALUE;
use afterimage_wire::proto::stats::Stats;
use afterimage_wire::server::SnapshotReply;
use afterimage_wire::{CacheClient, Connection, Status};
use bytes::Bytes;

use crate::key::{FORGOTTEN, KeySpace, Lifetime, RowHash};
use crate::metrics;
use crate::sync;

pub use cache_bytes::CacheBytes;
pub use disk::Disk;
pub use redis::{DEFAULT_PREFIX, MAX_PREFIX_LEN, Redis, RedisError, RedisOptions};
pub use remote::{RemoteStore, StoreOptions};

/// A store of sealed labels. It may drop any value at any time. The memo checks the seal of each
/// value that it reads.
/// A clone is the same store.
#[derive(Clone, Debug)]
pub enum Store {
    /// The label table in the memo's process, and the handle of its snapshot file, if it has one.
    /// A lookup takes nanoseconds.
    Embedded(Arc<Table>, Option<SnapshotHandle>),
    /// A store across the network: a cache service, Redis or Valkey.
    Remote(RemoteStore),
}

impl Store {
    /// Writes a value. There is no reply, and the store may drop the value.
    pub fn write(&self, key: u64, value: i64, keep: Keep) {
        match self {
            Store::Embedded(table, _) => {
                table.insert(key, value.cast_unsigned());
            }
            Store::Remote(remote) => remote.write(key, value, keep),
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

/// A store of sealed answers of bytes.
#[derive(Debug, Default)]
pub enum StoreOfBytes {
    /// None: answers of bytes are not stored.
    #[default]
    None,
    /// A byte store in the memo's process.
    Embedded(Arc<ByteStore>),
    /// A store across the network: the byte store of a cache service, Redis or Valkey.
    Remote(RemoteStore<OfBytes>),
}

impl From<Option<Arc<ByteStore>>> for StoreOfBytes {
    fn from(store: Option<Arc<ByteStore>>) -> Self {
        store.map_or(StoreOfBytes::None, StoreOfBytes::Embedded)
    }
}

impl From<Arc<ByteStore>> for StoreOfBytes {
    fn from(store: Arc<ByteStore>) -> Self {
        StoreOfBytes::Embedded(store)
    }
}

impl StoreOfBytes {
    /// The name in statistics.
    fn name(&self) -> Option<&'static str> {
        match self {
            StoreOfBytes::None => None,
            StoreOfBytes::Embedded(_) => Some("embedded"),
            StoreOfBytes::Remote(remote) => Some(remote.name()),
        }
    }
}

/// The stores of a memo.
#[derive(Debug)]
pub(crate) struct Stores {
    pub(crate) labels: Store,
    pub(crate) bytes: StoreOfBytes,
}

impl Stores {
    /// Writes the answer to a row, sealed.
    pub(crate) fn write(
        &self,
        keys: &KeySpace,
        hash: RowHash,
        answer: &Answer,
        ttl: Option<Duration>,
        now: Instant,
    ) {
        let sealed = |bytes: &Bytes| {
            keys.seal_bytes(hash, bytes, Lifetime::new(sync::unix_s(now), ttl))
        };
        match (answer, &self.bytes) {
            (Answer::Label(label), _) => {
                let value = match ttl {
                    None => keys.seal(hash, *label),
                    Some(ttl) => keys.seal_timed(hash, *label, sync::unix_s(now), ttl),
                };
                self.labels.write(hash.store_key(), value, Keep::Answer(ttl));
            }
            (Answer::Bytes(bytes), StoreOfBytes::Embedded(store)) => {
                store.insert(hash.identity(), sealed(bytes), ttl, now);
            }
            (Answer::Bytes(bytes), StoreOfBytes::Remote(store)) => {
                let value = sealed(bytes);
                if value.len() <= OfBytes::MAX_VALUE_LEN {
                    store.write(hash.identity(), value, Keep::Answer(ttl));
                }
            }
            (Answer::Bytes(_), StoreOfBytes::None) => {}
        }
    }

    /// Deletes the answer to a row.
    pub(crate) fn forget(&self, hash: RowHash, answers: AnswerKind) {
        match (answers, &self.bytes) {
            (AnswerKind::Label { .. }, _) => {
                self.labels.write(hash.store_key(), FORGOTTEN, Keep::Answer(None));
            }
            (AnswerKind::Bytes, StoreOfBytes::Embedded(bytes)) => {
                bytes.remove(hash.identity());
            }
            // Not every store can remove an entry.
            (AnswerKind::Bytes, StoreOfBytes::Remote(bytes)) => {
                bytes.write(hash.identity(), Bytes::new(), Keep::Answer(None));
            }
            (AnswerKind::Bytes, StoreOfBytes::None) => {}
        }
    }

    /// Adds the statistics of both stores to `stats`, and of all byte stores in this process
    /// together.
    pub(crate) fn stats(&self, here: &[Arc<ByteStore>], stats: &mut Stats) {
        let mut remote = None;
        match &self.labels {
            Store::Embedded(..) => self.labels.stats(stats),
            Store::Remote(labels) => {
                stats.text(&metrics::STORE, labels.name());
                remote = Some(labels.counts());
            }
        }
        if let Some(name) = self.bytes.name() {
            stats.text(&metrics::STORE_OF_BYTES, name);
        }
        let here = here.iter().map(|store| store.stats());
        if let Some(sum) = here.reduce(ByteStoreStats::and) {
            afterimage_cache::metrics::report_byte_store(&sum, stats);
        }
        if let StoreOfBytes::Remote(bytes) = &self.bytes {
            let counts = bytes.counts();
            bytes.report(stats);
            remote = Some(remote.map_or(counts, |labels| labels.and(counts)));
        }
        if let Some(counts) = remote {
            counts.report(stats);
        }
    }
}

/// A kind of entries: [`OfLabels`] or [`OfBytes`]. A store across the network has one kind.
pub trait Entries: fmt::Debug + Send + Sync + sealed::Sealed + 'static {
    /// The key of an entry.
    type Key: fmt::Debug + Copy + Send + Sync + 'static;
    /// The value of an entry, sealed.
    type Value: fmt::Debug + Send + 'static;

    /// Keys in one lookup of a [`Backend`]. A longer one is split.
    const KEYS_AT_ONCE: usize;

    /// The largest value in bytes.
    const MAX_VALUE_LEN: usize;

    /// The key for stores that know only bytes.
    fn key_bytes(key: Self::Key) -> impl AsRef<[u8]> + Send;

    /// The value for stores that know only bytes.
    fn value_bytes(value: &Self::Value) -> impl AsRef<[u8]>;

    /// The value of these bytes. `None` if a memo has not written them.
    fn parse(bytes: Vec<u8>) -> Option<Self::Value>;
}

/// Entries of labels: 64-bit keys and values.
#[derive(Debug)]
pub enum OfLabels {}

/// Entries of bytes: 128-bit keys, and values of up to 16 MiB.
#[derive(Debug)]
pub enum OfBytes {}

mod sealed {
    pub trait Sealed {}
    impl Sealed for super::OfLabels {}
    impl Sealed for super::OfBytes {}
}

impl Entries for OfLabels {
    type Key = u64;
    type Value = i64;

    const KEYS_AT_ONCE: usize = usize::MAX;
    const MAX_VALUE_LEN: usize = 8;

    fn key_bytes(key: u64) -> impl AsRef<[u8]> + Send {
        key.to_le_bytes()
    }

    fn value_bytes(value: &i64) -> impl AsRef<[u8]> {
        value.to_le_bytes()
    }

    fn parse(bytes: Vec<u8>) -> Option<i64> {
        Some(i64::from_le_bytes(bytes.try_into().ok()?))
    }
}

impl Entries for OfBytes {
    type Key = u128;
    type Value = Bytes;

    const KEYS_AT_ONCE: usize = 64;
    const MAX_VALUE_LEN: usize = MAX_VALUE;

    fn key_bytes(key: u128) -> impl AsRef<[u8]> + Send {
        key.to_le_bytes()
    }

    fn value_bytes(value: &Bytes) -> impl AsRef<[u8]> {
        value
    }

    fn parse(bytes: Vec<u8>) -> Option<Bytes> {
        Some(bytes.into())
    }
}

/// How long a store should keep an entry. It may drop any entry earlier.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Keep {
    /// An answer, for this time or as long as the store likes. A store without times of its own
    /// ignores it: the value holds its time, sealed.
    Answer(Option<Duration>),
    /// An epoch: longer than any answer.
    Epoch,
}

/// Receives the result of a lookup: one entry for each key, or `None` if the store did not answer.
pub type Callback<E = OfLabels> =
    Box<dyn FnOnce(Option<Vec<Option<<E as Entries>::Value>>>) + Send>;

/// A store across the network. Its methods return at once.
pub trait Backend<E: Entries = OfLabels>: fmt::Debug + Send + Sync + 'static {
    /// The name in statistics.
    fn name(&self) -> &'static str;

    /// The address for log lines.
    fn address(&self) -> &str {
        self.name()
    }

    /// Whether it can be reached, as far as the client knows.
    fn is_connected(&self) -> bool;

    /// Why the last lookup failed, for a warning that it has failed too often.
    fn cause(&self) -> Option<String> {
        None
    }

    /// Looks `keys` up and calls `then`, once, within `limit`. That is far above the lookup budget,
    /// which the caller keeps: a connection without an answer by then should be closed.
    fn get_many(&self, keys: &[E::Key], limit: Duration, then: Callback<E>);

    /// Whether lookups wait in this process to be written to the connection. Their budget has not
    /// begun.
    fn is_writing(&self) -> bool {
        false
    }

    /// A lookup took longer than its budget.
    fn is_late(&self, _budget: Duration) {}

    /// Sends a value. If the value does not arrive, a later lookup is a miss.
    fn set(&self, key: E::Key, value: E::Value, keep: Keep);

    /// Writes so far that the store did not confirm.
    fn writes_failed(&self) -> u64 {
        0
    }

    /// Adds what only this kind of store counts to `stats`.
    fn report(&self, stats: &mut Stats) {
        let _ = stats;
    }
}

/// The label table of a cache service. The client should fail fast, so that a lookup is a miss at
/// once while the service is unreachable.
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

    fn cause(&self) -> Option<String> {
        self.last_error().map(|error| error.to_string())
    }

    fn get_many(&self, keys: &[u64], limit: Duration, then: Callback) {
        let reply = Reply::call(move |values: Values| then(values.ok()));
        self.submit_get_many(keys, limit, reply);
    }

    fn is_writing(&self) -> bool {
        Connection::is_connected(self) && self.counters().queued_bytes > 0
    }

    fn set(&self, key: u64, value: i64, _: Keep) {
        // A failed write is a miss later, and needs no action now.
        let _ = CacheClient::set(self, key, value);
    }
}
