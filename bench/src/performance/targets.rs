//! What was aimed at, and what was reached.

use std::fmt::Write;
use std::path::Path;

use super::show::{BATCHES, number, peers_of, thousands, words};
use super::{Kept, find};
use crate::record::Record;

/// Something that was aimed at.
struct Target {
    /// The name of the record that has it.
    record: &'static str,
    what: &'static str,
    /// Figures that it is made of, or that stand beside it.
    beside: &'static [&'static str],
    value: fn(&Record) -> Option<f64>,
    aim: Aim,
    /// Why it is missed, where it is.
    why: &'static str,
}

/// Why nothing is said of a target that was never missed.
const MET: &str = "";
const NO_HITS: &str = "A miss takes, beside the classifier's own work, a hash of the image, a look-up, a place on a \
                       flight and a write.";

enum Aim {
    Least(f64),
    Most(f64),
    /// No more than this figure of the same record.
    NoMoreThan(&'static str),
}

use Aim::{Least, Most, NoMoreThan};

const TARGETS: [Target; 31] = [
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
        what: "times as many as gRPC (tonic) with the same logic, asked in its fastest way (long streams)",
        beside: &["memo M/s", "gRPC M/s"],
        value: |record| figure(record, "memo over gRPC"),
        aim: Least(10.0),
        why: "Long streams put many messages into one write, as our protocol does, so the system calls that a unary call \
              takes are spread in both. What is left for both is to copy 784 bytes and to hash them, and that is most of \
              what the memo does.",
    },
    Target {
        record: "memo-peers",
        what: "the same, asked by unary calls (a try of 0.7 s each way)",
        beside: &[],
        value: |record| {
            Some(figure(record, "memo M/s")? * 1e6 / fastest_way(record, "gRPC, asked as unary")?)
        },
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
        record: "codec",
        what: "million `CacheReq` frames encoded and decoded a second, one core",
        beside: &[],
        value: |record| figure(record, "CacheReq, read, M/s"),
        aim: Least(100.0),
        why: MET,
    },
    Target {
        record: "micro",
        what: "ns for the keyed 128-bit hash of an image of 784 bytes",
        beside: &[],
        value: |record| figure(record, "paths, key_hash: median ns"),
        aim: Most(100.0),
        why: MET,
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
        why: MET,
    },
    Target {
        record: "cache",
        what: "p99 of a cache's read, depth 1, over an echo",
        beside: &["afterimage p99 µs", "echo p99 µs"],
        value: |record| figure(record, "p99 over an echo"),
        aim: Most(1.10),
        why: MET,
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
        beside: &[],
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

/// All that was aimed at and that the records tell of.
pub(super) fn table(out: &mut String, records: &[Kept]) {
    let (mut rows, mut reasons) = (String::new(), Vec::new());
    for target in &TARGETS {
        let Some((path, record)) = find(records, target.record) else { continue };
        let Some(value) = (target.value)(record) else { continue };
        let Some((aim, reached)) = target.aim.judge(value, record) else { continue };
        let beside: Vec<String> = target
            .beside
            .iter()
            .filter_map(|name| Some(format!("{} {}", words(name), number(figure(record, name)?))))
            .collect();
        if !reached && !target.why.is_empty() && !reasons.contains(&target.why) {
            reasons.push(target.why);
        }
        let reached = match reasons.iter().position(|why| *why == target.why) {
            _ if reached => "yes".to_owned(),
            Some(place) => format!("**no** ({})", place + 1),
            None => "**no**".to_owned(),
        };
        let _ = writeln!(
            rows,
            "| {} | {} | {aim} | {reached} | {} | {} |",
            target.what,
            number(value),
            beside.join(", "),
            link(path)
        );
    }
    if !rows.is_empty() {
        out.push_str(
            "\n## What was aimed at\n\nEach line's record says commit, machine and command; so does the part of this \
             page about it.\n\n| | measured | aim | reached | beside it | record |\n\
             | --- | ---: | ---: | --- | --- | --- |\n",
        );
        out.push_str(&rows);
        if !reasons.is_empty() {
            out.push_str("\nWhy not:\n\n");
        }
        for (place, why) in reasons.iter().enumerate() {
            let _ = writeln!(out, "{}. {why}", place + 1);
        }
    }
}

impl Aim {
    /// The aim as a text, and whether `value` reaches it.
    fn judge(&self, value: f64, record: &Record) -> Option<(String, bool)> {
        let text = |sign: &str, limit: f64| match limit {
            limit if limit >= 1000.0 => format!("{sign} {}", thousands(limit)),
            limit => format!("{sign} {limit}"),
        };
        Some(match *self {
            Least(limit) => (text("≥", limit), value >= limit),
            Most(limit) => (text("≤", limit), value <= limit),
            NoMoreThan(name) => {
                let limit = figure(record, name)?;
                (format!("≤ {}", number(limit)), value <= limit)
            }
        })
    }
}

fn link(path: &Path) -> String {
    let file = path.file_name().unwrap_or_default().to_string_lossy();
    format!("[`{}`](../bench/results/{file})", file.trim_end_matches(".json"))
}

fn figure(record: &Record, name: &str) -> Option<f64> {
    record.figures.get(name).copied()
}

fn ratio(record: &Record, one: &str, other: &str) -> Option<f64> {
    Some(figure(record, one)? / figure(record, other)?)
}

/// The most requests a second of the runs of this depth, or of all.
fn best_rate(record: &Record, depth: Option<usize>) -> Option<f64> {
    let runs = record.runs.iter().map(|run| &run.report);
    let runs = runs.filter(|report| depth.is_none_or(|depth| report.settings.depth == depth));
    runs.map(|report| report.throughput_per_s).reduce(f64::max)
}

/// The most answers a second of the lines of the record's text that begin with `way`.
fn fastest_way(record: &Record, way: &str) -> Option<f64> {
    let ways = record.text.iter().filter(|line| line.trim_start().starts_with(way));
    let rates = ways.filter_map(|line| line.trim_end().strip_suffix("/s")?.rsplit(' ').next());
    rates.filter_map(|rate| rate.parse().ok()).reduce(f64::max)
}

/// How many times as long as `ours` the fastest other program with the same model takes.
fn ahead(record: &Record, ours: &str, batch: usize) -> Option<f64> {
    let batch = BATCHES.get(batch)?;
    let time = |program: &str| figure(record, &format!("{program}, {batch} at once, µs per image"));
    let fastest = peers_of(record, ours).into_iter().filter_map(time).reduce(f64::min)?;
    Some(fastest / time(ours)?)
}

fn least_ahead(record: &Record, ours: &str) -> Option<f64> {
    (0..BATCHES.len()).filter_map(|batch| ahead(record, ours, batch)).reduce(f64::min)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::performance::tests::record;

    fn judged(name: &str, figures: &[(&str, f64)]) -> String {
        let mut out = String::new();
        table(&mut out, &[("x-2.json".into(), record(name, "2026-01-02T00:00:00Z", figures))]);
        out
    }

    #[test]
    fn what_was_missed_is_said_to_be_missed() {
        let figures = [
            ("memo over gRPC", 9.0),
            ("memo over FastAPI", 250.0),
            ("memo p50 over a server of nothing", 1.2),
            ("gRPC M/s", 0.05),
        ];
        let table = judged("memo-peers", &figures);
        assert_eq!((table.matches("| **no** (").count(), table.matches("| yes |").count()), (2, 1));
        assert!(table.contains("| 9 | ≥ 10 | **no** (1) | gRPC M/s 0.05 | [`x-2`]"), "{table}");
        assert!(table.contains("\n2. The memo's thread waits"), "{table}");
    }

    #[test]
    fn a_way_to_ask_a_peer_is_found_in_the_text() {
        let mut record = record("memo-peers", "2026-01-02T00:00:00Z", &[("memo M/s", 2.0)]);
        record.text = ["1 64          50000/s", "4 64    100000/s"]
            .map(|rest| format!("  gRPC, asked as unary {rest}"))
            .into();
        record.text.push("  gRPC, asked as stream 1 64   900000/s".into());
        let mut out = String::new();
        table(&mut out, &[("x.json".into(), record)]);
        assert!(
            out.contains("unary calls (a try of 0.7 s each way) | 20.0 | ≥ 10 | yes |"),
            "{out}"
        );
    }

    #[test]
    fn an_aim_may_be_another_figure() {
        let (added, hop) = ("depth_1_remote_p50_over_classifier_us", "depth_1_hop_p50_us");
        assert!(
            judged("memo-overhead", &[(added, 11.0), (hop, 14.0)]).contains("| ≤ 14.0 | yes |")
        );
        assert!(judged("memo-overhead", &[(added, 15.0), (hop, 14.0)]).contains("| **no** |"));
        assert_eq!(judged("memo-overhead", &[(added, 11.0)]), "");
    }

    #[test]
    fn ours_is_held_against_the_fastest_other_program_with_the_same_model() {
        let figures = [
            ("ours, raw, 1 at once, µs per image", 2.0),
            ("ours, raw, 64 at once, µs per image", 1.0),
            ("A, 1 at once, µs per image", 6.0),
            ("B, 1 at once, µs per image", 4.0),
            ("B, 64 at once, µs per image", 0.5),
            ("C, conv graph, 1 at once, µs per image", 0.1),
        ];
        let table = judged("classifier", &figures);
        assert!(table.contains("raw model, alone | 2 | ≥ 1 | yes |"), "{table}");
        assert!(table.contains("least of all batches | 0.5 | ≥ 1 | **no** |"), "{table}");
    }
}
