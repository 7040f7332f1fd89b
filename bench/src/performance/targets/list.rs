//! The targets themselves.

use super::Aim::{Least, Most, NoMoreThan};
use super::{Target, ahead, best_rate, figure, least_ahead, ratio};

/// Why nothing is said of a target that was never missed.
const MET: &str = "";
const EPOLL: &str = "The echo waits in the read of its only connection, ours in `epoll` for all of them, and reads then: a system \
                     call more. Records of one day lie on both sides of the aim. `--busy-poll` takes more off than that.";
const NO_HITS: &str = "A miss takes 0.8 µs at depth 1 and 0.4 µs at depth 64 beside the classifier's own work on the same core. With parts of \
                       it left out one after another, by hand, when depth 1 still took 1.4 µs, it lost 0.45 µs without the \
                       hash, 0.5 without the write into the table, 0.3 without counters and histograms, 0.1 without the \
                       look-up. At depth 1 all of it finds the caches taken by the kernel and by the scoring: its \
                       instructions wait for memory, which at depth 64 they do once for all. There the hash alone is one \
                       per cent, of a classifier that answers twice as many as before its replies were sent together. \
                       The p99 has the same reasons and more noise.";
const REMOTE: &str = "At depth 64 the memo and the classifier share a core that is busy all the time: the 1.6 µs that the memo takes \
                      for an image, to read it, to hash it and to send it on, are added up for 64 of them.";

/// All of them, those about the memo first.
pub(super) const TARGETS: [Target; 36] = [
    Target {
        record: "memo-hot",
        what: "remembered answers a second, best depth (the reference system in one process, without sockets: 1.25 M)",
        beside: &[],
        value: |record| best_rate(record, None),
        aim: Least(4e6),
        why: MET,
    },
    Target {
        record: "memo-hot",
        what: "the same, depth 64",
        beside: &[],
        value: |record| best_rate(record, Some(64)),
        aim: Least(1.25e6),
        why: MET,
    },
    Target {
        record: "memo-peers",
        what: "times as many as gRPC (tonic) with the same logic, asked by long streams",
        beside: &["memo M/s", "gRPC, streams M/s"],
        value: |record| figure(record, "memo over gRPC, streams"),
        aim: Least(10.0),
        why: "Long streams put many messages into one write, as our protocol does, so the system calls that a unary call \
              takes are spread in both. What is left for both is to copy 784 bytes and to hash them, and that is most of \
              what the memo does.",
    },
    Target {
        record: "memo-peers",
        what: "the same, asked by unary calls",
        beside: &["memo M/s", "gRPC, unary M/s"],
        value: |record| figure(record, "memo over gRPC, unary"),
        aim: Least(10.0),
        why: MET,
    },
    Target {
        record: "memo-peers",
        what: "times as many as FastAPI + scikit-learn + Redis",
        beside: &["memo M/s", "FastAPI M/s"],
        value: |record| figure(record, "memo over FastAPI"),
        aim: Least(200.0),
        why: MET,
    },
    Target {
        record: "memo-peers",
        what: "p50 of a remembered answer, depth 1, embedded, over a server that reads and writes the same bytes and does \
               nothing else",
        beside: &[],
        value: |record| figure(record, "memo p50 over a server of nothing"),
        aim: Most(1.10),
        why: "The memo's thread waits in `epoll` for all its connections and then reads, the other server waits in \
              the read of its only one: a system call more for each request. The hash and the look-up are the rest.",
    },
    Target {
        record: "memo-peers",
        what: "the same with `--busy-poll`",
        beside: &[],
        value: |record| figure(record, "memo p50 over a server of nothing, --busy-poll"),
        aim: Most(1.10),
        why: MET,
    },
    Target {
        record: "codec",
        what: "million `CacheReq` frames encoded and decoded a second, one core: reads",
        beside: &["CacheReq, read, median M/s"],
        value: |record| figure(record, "CacheReq, read, M/s"),
        aim: Least(100.0),
        why: MET,
    },
    Target {
        record: "codec",
        what: "the same: writes",
        beside: &["CacheReq, write, median M/s"],
        value: |record| figure(record, "CacheReq, write, M/s"),
        aim: Least(100.0),
        why: "A write has eight bytes more to copy and to check.",
    },
    Target {
        record: "micro",
        what: "ns for the keyed hash of an image of 784 bytes (the aim: about a hundred)",
        beside: &[],
        value: |record| figure(record, "paths, key_hash: median ns"),
        aim: Most(100.0),
        why: "HighwayHash takes some 2.5 ns for each 32 bytes here, and ten such steps more for the 256 bits that come out, \
              so that each image has a key of its own for its seal; 128 bits would take six. POLYVAL with AES, the other keyed \
              function with a published bound that was tried (by hand), took 160 ns.",
    },
    Target {
        record: "generator",
        what: "million small requests a second from one generator thread",
        beside: &["mixed, depth 16384, M/s"],
        value: |record| figure(record, "cache, depth 16384, M/s"),
        aim: Least(30.0),
        why: MET,
    },
    Target {
        record: "memo-overhead",
        what: "no hits, classifier embedded, over the classifier directly: p50, depth 1",
        beside: &[],
        value: |record| figure(record, "depth_1_embedded_p50_over_classifier"),
        aim: Most(1.02),
        why: NO_HITS,
    },
    Target {
        record: "memo-overhead",
        what: "the same: p99, depth 1",
        beside: &[],
        value: |record| figure(record, "depth_1_embedded_p99_over_classifier"),
        aim: Most(1.02),
        why: NO_HITS,
    },
    Target {
        record: "memo-overhead",
        what: "the same: p50, depth 64",
        beside: &[],
        value: |record| figure(record, "depth_64_embedded_p50_over_classifier"),
        aim: Most(1.02),
        why: NO_HITS,
    },
    Target {
        record: "memo-overhead",
        what: "the same: p99, depth 64",
        beside: &[],
        value: |record| figure(record, "depth_64_embedded_p99_over_classifier"),
        aim: Most(1.02),
        why: NO_HITS,
    },
    Target {
        record: "memo-overhead",
        what: "no hits, classifier elsewhere: what it adds to p50, depth 1, in µs (the aim: one hop)",
        beside: &[],
        value: |record| figure(record, "depth_1_remote_p50_over_classifier_us"),
        aim: NoMoreThan("depth_1_hop_p50_us"),
        why: MET,
    },
    Target {
        record: "memo-overhead",
        what: "the same: p99, depth 1",
        beside: &[],
        value: |record| figure(record, "depth_1_remote_p99_over_classifier_us"),
        aim: NoMoreThan("depth_1_hop_p99_us"),
        why: REMOTE,
    },
    Target {
        record: "memo-overhead",
        what: "the same: p50, depth 64",
        beside: &[],
        value: |record| figure(record, "depth_64_remote_p50_over_classifier_us"),
        aim: NoMoreThan("depth_64_hop_p50_us"),
        why: REMOTE,
    },
    Target {
        record: "memo-overhead",
        what: "the same: p99, depth 64",
        beside: &[],
        value: |record| figure(record, "depth_64_remote_p99_over_classifier_us"),
        aim: NoMoreThan("depth_64_hop_p99_us"),
        why: REMOTE,
    },
    Target {
        record: "memo-overload",
        what: "memory at its peak under overload, over that after the first second",
        beside: &["resident_mib_after_1_s", "resident_mib_peak"],
        value: |record| ratio(record, "resident_mib_peak", "resident_mib_after_1_s"),
        aim: Most(1.05),
        why: MET,
    },
    Target {
        record: "memo-overload",
        what: "wrong answers under overload",
        beside: &[],
        value: |record| figure(record, "wrong"),
        aim: Most(0.0),
        why: MET,
    },
    Target {
        record: "cache",
        what: "the cache's reads over the better of Redis and memcached",
        beside: &["afterimage M/s", "redis M/s", "memcached M/s"],
        value: |record| figure(record, "afterimage over the better peer"),
        aim: Least(20.0),
        why: MET,
    },
    Target {
        record: "cache",
        what: "the cache's reads with 50 million keys over those with one",
        beside: &["afterimage 50 M keys M/s"],
        value: |record| figure(record, "afterimage 50 M over 1 M"),
        aim: Least(0.7),
        why: "With 50 M keys each read waits for a line of memory. Four fifths of the server's time are spent in the \
              look-up; `bench/README.md` says what has been tried.",
    },
    Target {
        record: "cache",
        what: "p50 of a cache's read, depth 1, over an echo",
        beside: &["afterimage p50 µs", "echo p50 µs"],
        value: |record| figure(record, "p50 over an echo"),
        aim: Most(1.10),
        why: EPOLL,
    },
    Target {
        record: "cache",
        what: "p99 of a cache's read, depth 1, over an echo",
        beside: &["afterimage p99 µs", "echo p99 µs"],
        value: |record| figure(record, "p99 over an echo"),
        aim: Most(1.10),
        why: EPOLL,
    },
    Target {
        record: "cache",
        what: "bytes of memory an entry after 10 million keys",
        beside: &["redis bytes an entry", "memcached bytes an entry"],
        value: |record| figure(record, "afterimage bytes an entry after 10000000 keys"),
        aim: Most(20.0),
        why: MET,
    },
    Target {
        record: "classifier",
        what: "µs from an image's bytes to its label, alone",
        beside: &["speed, conv, multiply-adds in registers, avx512, floor, µs"],
        value: |record| figure(record, "ours, conv, 1 at once, µs per image"),
        aim: Most(40.0),
        why: MET,
    },
    Target {
        record: "classifier",
        what: "the same, 64 at once",
        beside: &[],
        value: |record| figure(record, "ours, conv, 64 at once, µs per image"),
        aim: Most(25.0),
        why: MET,
    },
    Target {
        record: "classifier",
        what: "two cores over one, through the engine",
        beside: &[
            "speed, conv, two threads, times as fast",
            "speed, conv, two threads, times as fast, median of the rounds",
        ],
        value: |record| figure(record, "speed, conv, engine, two threads, times as fast"),
        aim: Least(1.9),
        why: MET,
    },
    Target {
        record: "classifier",
        what: "the fastest of the others over ours, raw model, alone",
        beside: &[],
        value: |record| ahead(record, "ours, raw", 0),
        aim: Least(1.0),
        why: MET,
    },
    Target {
        record: "classifier",
        what: "the same, the least of all batches",
        beside: &[],
        value: |record| least_ahead(record, "ours, raw"),
        aim: Least(1.0),
        why: MET,
    },
    Target {
        record: "classifier",
        what: "the fastest of the others over ours, convolutional model, alone",
        beside: &[],
        value: |record| ahead(record, "ours, conv", 0),
        aim: Least(1.0),
        why: MET,
    },
    Target {
        record: "classifier",
        what: "the same, the least of all batches",
        beside: &[],
        value: |record| least_ahead(record, "ours, conv"),
        aim: Least(1.0),
        why: MET,
    },
    Target {
        record: "kernel-svm",
        what: "`svm-predict` over ours, an RBF model, one core",
        beside: &["support_vectors"],
        value: |record| figure(record, "ratio"),
        aim: Least(20.0),
        why: MET,
    },
    Target {
        record: "kernel-svm",
        what: "support vectors of that model",
        beside: &[],
        value: |record| figure(record, "support_vectors"),
        aim: Least(9000.0),
        why: MET,
    },
    Target {
        record: "kernel-svm",
        what: "labels that agree",
        beside: &[],
        value: |record| figure(record, "labels_that_agree"),
        aim: Least(10_000.0),
        why: MET,
    },
];
