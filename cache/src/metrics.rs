//! Metrics of a label table, its snapshots and the cache service.

use afterimage_core::metric::Family;

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
