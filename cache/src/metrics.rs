//! Metrics of a label table, a byte store, their snapshots and the cache service.

use afterimage_core::metric::Family;
use afterimage_wire::proto::stats::Stats;

use crate::ByteStoreStats;

/// Adds the statistics of a byte store, without its lookups.
pub fn report_byte_store(store: &ByteStoreStats, stats: &mut Stats) {
    stats.gauge(&BYTE_STORE_ENTRIES, store.entries);
    stats.gauge(&BYTE_STORE_BYTES, store.bytes);
    stats.gauge(&BYTE_STORE_CAPACITY, store.capacity_bytes);
    stats.counter(&BYTE_STORE_EVICTIONS, store.evicted);
    stats.counter(&BYTE_STORE_EXPIRED, store.expired);
    stats.counter(&BYTE_STORE_WRITES, store.inserted);
    stats.counter(&BYTE_STORE_DECLINED, store.declined);
}

/// Requests by the way in which they were answered.
pub const LOOKUPS: Family = Family {
    name: "lookups",
    label: "result",
    help: "Lookups by result: hit, miss, or coalesced with an equal request in flight",
};

afterimage_core::metrics! {
    "Answers" {
        HITS = Counter("hits", Count, "hits", "Requests answered from the store").of(&LOOKUPS, "hit");
        MISSES = Counter("misses", Count, "misses", "Requests for which the store has no answer")
            .of(&LOOKUPS, "miss");
    }
    "Label table" {
        ENTRIES = Gauge("entries", Count, "entries", "Entries in the label table");
        CAPACITY = Gauge("capacity", Count, "capacity", "Slots of the label table");
        MEMORY = Gauge("memory_bytes", Bytes, "memory", "Memory of the label table");
        WRITES = Counter("writes", Count, "writes", "Entries written to the label table");
        EVICTIONS = Counter("evictions", Count, "evictions", "Entries evicted from the label table");
    }
    "Byte store" {
        BYTE_STORE_ENTRIES = Gauge("byte_store_entries", Count, "entries", "Answers in the byte store");
        BYTE_STORE_BYTES = Gauge("byte_store_bytes", Bytes, "memory", "Memory of the byte store's answers");
        BYTE_STORE_CAPACITY = Gauge("byte_store_capacity_bytes", Bytes, "capacity", "Memory limit of the byte store");
        BYTE_STORE_EVICTIONS = Counter("byte_store_evictions", Count, "evictions", "Answers evicted from the byte store");
        BYTE_STORE_EXPIRED = Counter("byte_store_expired", Count, "expired", "Answers of the byte store that expired");
        BYTE_STORE_WRITES = Counter("byte_store_writes", Count, "writes", "Answers written to the byte store");
        BYTE_STORE_DECLINED = Counter("byte_store_declined", Count, "declined", "Large answers that a full byte store declined");
    }
    "Snapshot" {
        SNAPSHOT_AGE = Gauge("snapshot_age_ms", Millis, "age", "Age of the newest snapshot");
        SNAPSHOT_ENTRIES = Gauge("snapshot_entries", Count, "entries", "Entries in the newest snapshot");
        SNAPSHOT_SIZE = Gauge("snapshot_bytes", Bytes, "size", "Size of the newest snapshot");
        SNAPSHOT_TOOK = Gauge("snapshot_took_ms", Millis, "time to write", "Time to write the newest snapshot");
        SNAPSHOT_RUNNING = Gauge("snapshot_running", Count, "being written", "Whether a snapshot is being written");
        SNAPSHOTS_WRITTEN = Counter("snapshots_written", Count, "written", "Snapshots written");
        SNAPSHOTS_FAILED = Counter("snapshots_failed", Count, "failed", "Snapshots that could not be written");
    }
}
