//! Metrics of a memo, its stores and its upstreams.

use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};

use afterimage_cache::metrics::{HITS, LOOKUPS, MISSES};
use afterimage_core::Tally;
use afterimage_core::metric::Family;
use afterimage_wire::proto::stats::Stats;

/// Latencies of answers by origin.
pub const LATENCY: Family = Family {
    name: "latency",
    label: "result",
    help: "Time from a request's arrival to its answer, by result of the lookup",
};

afterimage_core::metrics! {
    "Time" {
        SAVED_TIME = Counter("saved_time_us", Micros, "waiting time saved", "Waiting time that hits saved");
        SAVED_CLASSIFIER_TIME = Counter("saved_classifier_time_us", Micros, "classifier time saved", "Time of the classifier that hits saved");
        LOOKUP_TIME = Counter("lookup_time_us", Micros, "time spent on lookups", "Waiting time that lookups took");
    }
    "Latency" {
        HIT_LATENCY = Histogram("hit_latency_ns", Nanos, "hits", "Latency of hits").of(&LATENCY, "hit");
        MISS_LATENCY = Histogram("miss_latency_ns", Nanos, "misses", "Latency of misses").of(&LATENCY, "miss");
        COALESCED_LATENCY = Histogram("coalesced_latency_ns", Nanos, "coalesced", "Latency of coalesced requests")
            .of(&LATENCY, "coalesced");
    }
    "Answers" {
        COALESCED = Counter("coalesced", Count, "coalesced", "Requests answered by an equal request in flight")
            .of(&LOOKUPS, "coalesced");
        WAITING = Gauge("waiting", Count, "in flight", "Requests waiting for the store or the classifier");
        WAITING_BYTES = Gauge("waiting_bytes", Bytes, "in flight, bytes", "Inputs of the requests in flight");
        OVERLOADED = Counter("overloaded", Count, "refused: overloaded", "Requests refused because of overload");
        EXPIRED = Counter("expired", Count, "deadline exceeded", "Requests whose deadline passed");
        ABANDONED = Counter("abandoned", Count, "client gone before the answer", "Requests whose client disconnected first");
        BAD_INPUTS = Counter("bad_inputs", Count, "refused: invalid input", "Requests refused because of an invalid input");
    }
    "Store" {
        STORE = Text("store", Count, "store", "Kind of the store");
        STORE_OF_BYTES = Text("store_of_bytes", Count, "store of bytes", "Kind of the store of answers of bytes");
        STORE_CONNECTED = Text("store_connected", Count, "connected", "Whether the store is connected")
            .states(&["no", "yes"]);
        STORE_BREAKER = Text("store_breaker", Count, "circuit breaker", "State of the store's circuit breaker")
            .states(&["closed", "open"]);
        AUTO_BYPASS = Text("auto_bypass", Count, "auto-bypass", "Whether the memo bypasses its store because lookups do not pay")
            .states(&["looking", "bypassing"]);
        STORE_WRITES = Counter("store_writes", Count, "answers stored", "Answers written to the store");
        STORE_WRITES_FAILED = Counter("store_writes_failed", Count, "writes failed", "Writes that the store did not confirm");
        STORE_LOOKUPS = Counter("store_lookups", Count, "lookups", "Lookups in the remote store");
        STORE_LOOKUPS_FAILED = Counter("store_lookups_failed", Count, "lookups failed", "Lookups without a reply in time");
        STORE_LOOKUPS_BYPASSED = Counter("store_lookups_bypassed", Count, "lookups skipped, store away", "Lookups skipped because the circuit breaker was open");
        STORE_LOOKUPS_UNSENT = Counter("store_lookups_unsent", Count, "lookups not sent in time", "Lookups whose time passed before they were sent");
        STORE_LOOKUPS_IN_FLIGHT = Gauge("store_lookups_in_flight", Count, "lookups in flight", "Keys of lookups in flight");
        STORE_LOOKUPS_QUEUED = Gauge("store_lookups_queued", Count, "lookups queued", "Keys of lookups that wait to be sent");
        AUTO_BYPASSED = Counter("auto_bypassed", Count, "lookups skipped, not worth it", "Lookups skipped because they do not pay");
        STORE_BREAKER_OPENED = Counter("store_breaker_opened", Count, "circuit breaker opened", "Times that the store's circuit breaker opened");
        REJECTED_TAGS = Counter("rejected_tags", Count, "entries with a wrong seal", "Stored values rejected because of a wrong seal");
    }
    "Disk" {
        DISK_ENTRIES = Gauge("disk_entries", Count, "entries", "Answers on the disk");
        DISK_BYTES = Gauge("disk_bytes", Bytes, "size", "Size of the files on the disk");
        DISK_HITS = Counter("disk_hits", Count, "hits", "Answers read from the disk");
        DISK_READ_TIME = Counter("disk_read_time_us", Micros, "time of reads", "Time to read answers from the disk");
        DISK_READS_FAILED = Counter("disk_reads_failed", Count, "reads failed", "Answers that were damaged or could not be read");
        DISK_WRITES_FAILED = Counter("disk_writes_failed", Count, "writes failed", "Answers that could not be written to the disk");
    }
    "Label table" {
        STORE_ENTRIES = Gauge("store_entries", Count, "entries", "Entries in the memo's label table");
        STORE_CAPACITY = Gauge("store_capacity", Count, "capacity", "Slots of the memo's label table");
        STORE_MEMORY = Gauge("store_memory_bytes", Bytes, "memory", "Memory of the memo's label table");
        STORE_EVICTIONS = Counter("store_evictions", Count, "evictions", "Entries evicted from the memo's label table");
    }
    "Classifier" {
        CLASSIFIER = Text("classifier", Count, "classifier", "Kind of the classifier");
        CLASSIFIER_CONNECTED = Text("classifier_connected", Count, "connected", "Whether a replica of the classifier is connected")
            .states(&["no", "yes"]);
        CLASSIFIERS = Gauge("classifiers", Count, "replicas", "Replicas of the classifier");
        CLASSIFIERS_CONNECTED = Gauge("classifiers_connected", Count, "replicas connected", "Replicas of the classifier that are connected");
        REPLICA = Texts("classifier", Count, "replica", "Address and state of a replica");
        REPLICA_CONNECTED = Gauge("replica_connected", Count, "replica connected", "Whether the replica is connected").per("replica");
        REPLICA_HEALTHY = Gauge("replica_healthy", Count, "replica healthy", "Whether the replica gets calls; 0 while it is ejected").per("replica");
        REPLICA_IN_FLIGHT = Gauge("replica_in_flight", Count, "replica, in flight", "Rows in flight at the replica").per("replica");
        CLASSIFIER_CALLS = Counter("classifier_calls", Count, "calls", "Calls to the classifier");
        CLASSIFIER_CALLS_WAITING = Gauge("classifier_calls_waiting", Count, "calls waiting for a place", "Calls that wait because all replicas are busy");
        CLASSIFIER_FAILURES = Counter("classifier_failures", Count, "calls failed", "Calls to the classifier that failed");
        CLASSIFIER_CALLS_DROPPED = Counter("classifier_calls_dropped", Count, "calls dropped, no waiter left", "Calls not made because all waiters had left");
        CLASSIFIER_RETRIES = Counter("classifier_retries", Count, "retries", "Calls repeated at another replica");
        CLASSIFIER_RETRIES_DENIED = Counter("classifier_retries_denied", Count, "retries denied by the budget", "Retries denied by the retry budget");
        CLASSIFIER_EJECTIONS = Counter("classifier_ejections", Count, "replicas ejected", "Times that a replica was ejected");
        OTHER_MODELS = Counter("classifier_answers_of_other_models", Count, "answers of another model", "Answers discarded because another model computed them");
        MODELS_MET = Counter("models_met", Count, "models met", "Models that the memo has met");
        FUNCTION_QUEUED = Gauge("function_queued", Count, "queued", "Calls that wait for a thread of the function");
        FUNCTION_BUSY = Gauge("function_busy", Count, "threads busy", "Threads that run the function");
    }
    "Audit of hits" {
        AUDITS = Counter("audits", Count, "hits re-checked", "Hits compared with a new answer");
        AUDITS_DISAGREED = Counter("audits_disagreed", Count, "mismatches", "Hits that differ from a new answer");
        AUDIT_WRONG_HITS = Gauge("audit_wrong_hits_ppm_below", Bound, "wrong hits", "Upper bound of the share of wrong hits, with 95 % confidence");
        AUDITS_SKIPPED = Counter("audits_skipped", Count, "checks skipped, classifier busy", "Checks skipped because the classifier was busy");
        AUDITS_FAILED = Counter("audits_failed", Count, "checks failed", "Checks without an answer");
    }
}

/// Stored answers with a wrong seal. Many of them mean an attack, or memos with different secrets
/// on one store.
#[derive(Debug)]
pub(crate) struct Rejections {
    count: AtomicU64,
    for_log: Tally,
}

impl Rejections {
    #[cold]
    pub(crate) fn add(&self) {
        self.count.fetch_add(1, Relaxed);
        if let Some(count) = self.for_log.count(1, Instant::now()) {
            tracing::warn!(
                count,
                "ignored stored answers with a wrong seal; do all memos have one --secret-file?"
            );
        }
    }
}

impl Default for Rejections {
    fn default() -> Self {
        Rejections { count: AtomicU64::new(0), for_log: Tally::new(Duration::from_secs(10)) }
    }
}

#[derive(Debug, Default)]
pub(crate) struct Counters {
    pub(crate) hits: AtomicU64,
    pub(crate) misses: AtomicU64,
    pub(crate) coalesced: AtomicU64,
    pub(crate) rejections: Rejections,
    pub(crate) overloaded: AtomicU64,
    pub(crate) expired: AtomicU64,
    /// Waiters without a client: it had left.
    pub(crate) abandoned: AtomicU64,
    pub(crate) bad_inputs: AtomicU64,
    pub(crate) calls: AtomicU64,
    pub(crate) call_failures: AtomicU64,
    /// Calls that were not made, since their waiters had all left.
    pub(crate) calls_dropped: AtomicU64,
    pub(crate) store_writes: AtomicU64,
}

impl Counters {
    pub(crate) fn stats(&self, stats: &mut Stats) {
        for (metric, counter) in [
            (&HITS, &self.hits),
            (&MISSES, &self.misses),
            (&COALESCED, &self.coalesced),
            (&REJECTED_TAGS, &self.rejections.count),
            (&OVERLOADED, &self.overloaded),
            (&EXPIRED, &self.expired),
            (&ABANDONED, &self.abandoned),
            (&BAD_INPUTS, &self.bad_inputs),
            (&CLASSIFIER_CALLS, &self.calls),
            (&CLASSIFIER_FAILURES, &self.call_failures),
            (&CLASSIFIER_CALLS_DROPPED, &self.calls_dropped),
            (&STORE_WRITES, &self.store_writes),
        ] {
            stats.counter(metric, counter.load(Relaxed));
        }
    }
}
