//! The cache on the wire: batches of reads and writes against one table.

use std::sync::Arc;

use afterimage_wire::proto::{Role, Status, stats::Stats};
use afterimage_wire::server::{BATCH, Batch, Identity, Later, Op, Service};

use crate::{Hashed, Near, SnapshotHandle, Table};

/// What a service says that could keep a snapshot and does not.
pub const NO_SNAPSHOT: &str = "no snapshot is kept here: start the server with --snapshot FILE";

/// Serves a [`Table`] to the network.
///
/// Writes of one connection are carried out in the order of their arrival, and a read between the
/// same two writes as it arrived, so a client reads its own writes. Reads between the same two
/// writes have no order among themselves. Values are `i64` on the wire and the same 64 bits in the
/// table.
#[derive(Debug)]
pub struct CacheService {
    table: Arc<Table>,
    snapshots: Option<SnapshotHandle>,
}

impl CacheService {
    /// A service over `table`, which others may go on using.
    pub fn new(table: Arc<Table>) -> Self {
        CacheService { table, snapshots: None }
    }

    /// The same, writing the table's snapshots when a client asks, and telling of them in its
    /// statistics.
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
        // All of the batch is on its way before the first one is read.
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
                Op::Classify { .. } => {}
            }
        }
        let mut reads = Reads::new(&self.table);
        for (i, (request, &hashed)) in requests.iter().zip(&hashed).enumerate() {
            match request.op {
                Op::CacheRead { .. } => reads.read(batch, i, hashed),
                Op::CacheWrite { value, .. } => {
                    // What was asked before this write must not see it.
                    reads.settle(batch);
                    self.table.insert_hashed(hashed, value.cast_unsigned());
                }
                Op::Classify { .. } => {
                    batch.error(i, Status::Unsupported, "this is a cache; it knows no images");
                }
            }
        }
        reads.settle(batch);
        self.table.record_lookups(reads.hits, reads.misses);
    }

    fn stats(&self, stats: &mut Stats) {
        let table = self.table.stats();
        stats.gauge("entries", table.entries);
        stats.gauge("capacity", table.capacity);
        stats.gauge("memory_bytes", table.bytes);
        stats.counter("hits", table.hits);
        stats.counter("misses", table.misses);
        stats.counter("writes", table.writes);
        stats.counter("evictions", table.evictions);
        if let Some(handle) = &self.snapshots {
            handle.stats(stats);
        }
    }

    fn snapshot(&self, later: Later) {
        match &self.snapshots {
            Some(handle) => handle.answer(later),
            None => later.error(Status::Unsupported, NO_SNAPSHOT),
        }
    }
}

/// The reads of a batch. The few that need a second line of their bucket wait for it together.
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

    /// Answers those that wait.
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
