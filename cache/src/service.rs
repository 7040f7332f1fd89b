//! The cache service: batches of reads and writes on a label table and a byte store.

use std::sync::Arc;
use std::time::Instant;

use afterimage_core::Failure;
use afterimage_wire::proto::message::BytesWrite;
use afterimage_wire::proto::{Role, Status, stats::Stats};
use afterimage_wire::server::{BATCH, Batch, Identity, Op, Service, SnapshotReply};

use bytes::Bytes;

use crate::metrics;
use crate::{Admission, ByteStore, Hashed, Near, SnapshotHandle, Table};

/// The reply to a snapshot request of a service without a snapshot file.
pub const NO_SNAPSHOT: &str = "this server has no snapshot file; start it with --snapshot FILE";

/// The reply to a request for bytes of a service without a byte store.
const NO_BYTES: &str = "this cache service stores no bytes; start it with --bytes SIZE";

/// Serves a [`Table`] to the network, and a [`ByteStore`] if it has one.
///
/// The writes of a connection are executed in the order of their arrival, and each read between the
/// two writes between which it arrived, so a client reads its own writes. Reads between the same
/// two writes have no order. Values are `i64` on the wire and the same 64 bits in the table.
#[derive(Debug)]
pub struct CacheService {
    table: Arc<Table>,
    bytes: Option<Arc<ByteStore>>,
    snapshots: Option<SnapshotHandle>,
}

impl CacheService {
    /// A service for `table`, which others may use at the same time.
    pub fn new(table: Arc<Table>) -> Self {
        CacheService { table, bytes: None, snapshots: None }
    }

    /// Stores bytes, too. Without a store such requests are refused.
    #[must_use]
    pub fn with_bytes(mut self, store: Option<Arc<ByteStore>>) -> Self {
        self.bytes = store;
        self
    }

    /// Writes snapshots at a client's request, and reports them in the statistics.
    #[must_use]
    pub fn with_snapshots(mut self, handle: Option<SnapshotHandle>) -> Self {
        self.snapshots = handle;
        self
    }
}

impl Service for CacheService {
    fn identity(&self) -> Identity {
        Identity::without_model(Role::Cache)
    }

    fn handle(&self, batch: &mut Batch<'_>) {
        let requests = batch.requests();
        // The whole batch is prefetched before the first read.
        let mut hashed = [Hashed::default(); BATCH];
        for (hashed, request) in hashed.iter_mut().zip(requests) {
            match request.op {
                Op::CacheRead { key } => {
                    *hashed = Hashed::new(key);
                    self.table.prefetch(*hashed);
                }
                Op::CacheWrite { key, .. } => {
                    *hashed = Hashed::new(key);
                    self.table.prefetch_bucket(*hashed);
                }
                _ => {}
            }
        }
        let mut reads = Reads::new(&self.table);
        for (i, (request, &hashed)) in requests.iter().zip(&hashed).enumerate() {
            match request.op {
                Op::CacheRead { .. } => reads.read(batch, i, hashed),
                Op::CacheWrite { value, .. } => {
                    // Reads that arrived before this write must not see it.
                    reads.settle(batch);
                    self.table.insert_hashed(hashed, value.cast_unsigned());
                }
                Op::ReadBytes { .. } | Op::WriteBytes(_) if self.bytes.is_none() => {
                    batch.error(i, Status::Unsupported, NO_BYTES);
                }
                Op::ReadBytes { key } => {
                    let now = Instant::now();
                    let store = self.bytes.as_ref();
                    let stored = store.and_then(|store| store.get(u128::from_le_bytes(key), now));
                    batch.bytes(i, stored.map(|stored| stored.value));
                }
                Op::WriteBytes(write) => {
                    if let Some(store) = &self.bytes {
                        write_bytes(store, batch, i, write);
                    }
                }
                Op::Classify { .. } | Op::Infer(_) | Op::Forget(_) | Op::Flush { .. } => {
                    batch.error(i, Status::Unsupported, "this is a cache service; it has no model");
                }
            }
        }
        reads.settle(batch);
        self.table.record_lookups(reads.hits, reads.misses);
    }

    fn stats(&self, stats: &mut Stats) {
        let table = self.table.stats();
        stats.gauge(&metrics::ENTRIES, table.entries);
        stats.gauge(&metrics::CAPACITY, table.capacity);
        stats.gauge(&metrics::MEMORY, table.bytes);
        let bytes = self.bytes.as_ref().map(|store| store.stats());
        let (hits, misses) = bytes.map_or((0, 0), |bytes| (bytes.hits, bytes.misses));
        stats.counter(&metrics::HITS, table.hits + hits);
        stats.counter(&metrics::MISSES, table.misses + misses);
        stats.counter(&metrics::WRITES, table.writes);
        stats.counter(&metrics::EVICTIONS, table.evictions);
        if let Some(bytes) = bytes {
            metrics::report_byte_store(&bytes, stats);
        }
        if let Some(handle) = &self.snapshots {
            handle.stats(stats);
        }
    }

    fn snapshot(&self, reply: SnapshotReply) {
        match &self.snapshots {
            Some(handle) => handle.answer(reply),
            None => {
                reply.send(Err(Failure::new(Status::Unsupported, NO_SNAPSHOT)));
            }
        }
    }
}

/// Stores a value and answers its request. A store may drop a value at any time, so a value that it
/// declines is answered like any other.
fn write_bytes(store: &ByteStore, batch: &mut Batch<'_>, i: usize, write: &BytesWrite<'_>) {
    let BytesWrite { key, value, .. } = write;
    let (key, len, now) = (u128::from_le_bytes(*key), value.len(), Instant::now());
    match store.insert(key, Bytes::copy_from_slice(value), write.ttl(), now) {
        Admission::Stored | Admission::Declined => batch.stored(i),
        Admission::TooLarge => {
            let limit = store.max_value_bytes();
            let text = format!("the value has {len} bytes; the limit is {limit}");
            batch.error(i, Status::TooLarge, &text);
        }
    }
}

/// The reads of a batch. Reads that need the second line of their bucket are delayed until it is
/// prefetched.
struct Reads<'a> {
    table: &'a Table,
    far: [(usize, Hashed); BATCH],
    waiting: usize,
    hits: u64,
    misses: u64,
}

impl<'a> Reads<'a> {
    fn new(table: &'a Table) -> Self {
        Self { table, far: [Default::default(); BATCH], waiting: 0, hits: 0, misses: 0 }
    }

    #[inline]
    fn read(&mut self, batch: &mut Batch<'_>, i: usize, hashed: Hashed) {
        match self.table.read_near(hashed) {
            Near::Known(value) => self.answer(batch, i, value),
            Near::Far => {
                self.far[self.waiting] = (i, hashed);
                self.waiting += 1;
            }
        }
    }

    /// Answers the delayed reads.
    #[inline]
    fn settle(&mut self, batch: &mut Batch<'_>) {
        for at in 0..std::mem::take(&mut self.waiting) {
            let (i, hashed) = self.far[at];
            self.answer(batch, i, self.table.read(hashed));
        }
    }

    #[inline]
    fn answer(&mut self, batch: &mut Batch<'_>, i: usize, value: Option<u64>) {
        self.hits += u64::from(value.is_some());
        self.misses += u64::from(value.is_none());
        batch.value(i, value.map(u64::cast_signed));
    }
}
