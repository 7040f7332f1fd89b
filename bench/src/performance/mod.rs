//! `docs/performance.md`, and the figures of the READMEs, made from the newest records: none of
//! them was typed by anybody.

mod extracts;
mod show;
mod targets;

use std::fmt::Write;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use crate::record::Record;

pub use extracts::{DOCUMENTS, filled};

/// A record and the file that holds it.
pub type Kept = (PathBuf, Record);

/// A part of the page.
struct Subject {
    /// The name of its record.
    name: &'static str,
    heading: &'static str,
    /// How it was measured.
    text: &'static str,
    /// Writes what came out.
    show: fn(&mut String, &Record),
}

/// The records that the page is about, in its order.
const SUBJECTS: [Subject; 12] = [
    Subject {
        name: "memo-hot",
        heading: "Remembered answers",
        text: "`bench/memo`: `afterimage serve` on one core, the load on the other, one connection, every answer \
               checked.",
        show: show::runs_and_figures,
    },
    Subject {
        name: "memo-hot-busy-poll",
        heading: "Remembered answers, with busy polling",
        text: "`bench/memo`: the same with `--busy-poll 1ms`, so that the server's thread looks for the next request \
               in place of sleeping.",
        show: show::runs_and_figures,
    },
    Subject {
        name: "memo-hot-tls",
        heading: "Remembered answers, over TLS",
        text: "`bench/memo`: the same over TLS 1.3.",
        show: show::runs_and_figures,
    },
    Subject {
        name: "memo-peers",
        heading: "The memo, the classifier, and what people would write today",
        text: "`bench/memo-peers`: the memo cold and hot, with table and classifier in its own process (embedded) and \
               with both elsewhere (remote), beside the classifier asked directly; then gRPC (tonic) with the same \
               logic, and FastAPI + scikit-learn + Redis. All servers of a system on one core, the load on the other; \
               the median of three rounds in which the systems take turns. The peers are asked in the way that each \
               answers fastest.",
        show: show::text_and_figures,
    },
    Subject {
        name: "memo-overhead",
        heading: "A memo that remembers nothing",
        text: "`bench/overhead`: images that nobody has asked about, of the classifier directly, of a memo with its \
               classifier embedded and of one with the same classifier elsewhere; the median of twelve rounds in turn, the \
               servers started anew after every fourth. Beside them hits, which come back over one hop and nothing else, \
               and the classifier once more: what the two differ by is what cannot be told.",
        show: show::runs_and_figures,
    },
    Subject {
        name: "memo-overload",
        heading: "A memo asked for ten times what it can do",
        text: "`bench/overload`: for a minute new images come, in an open loop, ten times as fast as they can be \
               classified, and a thousand hits a second beside them. What is too much is answered `overloaded`, at \
               once: refused. To refuse an image is to read it, to hash it and to look it up; as it is done nearly \
               twenty times for each that is classified, and on the same core, fewer are classified than in calm. Those wait \
               behind the 4,096 that may wait. An image that the flood has pushed out of the table is no hit any more: the few that failed. Latencies \
               are from the moment a request was due.",
        show: show::runs_and_figures,
    },
    Subject {
        name: "cache",
        heading: "The cache beside Redis and memcached",
        text: "`bench/cache`: each on one core, the load on the other; the median of three rounds in turn, five one at \
               a time. The peers are asked in the way that each answers fastest.",
        show: show::runs_and_figures,
    },
    Subject {
        name: "classifier",
        heading: "The classifier beside LIBLINEAR, LIBSVM, scikit-learn and ONNX Runtime",
        text: "`bench/classifier`: the same models, one core, one thread each, CPU time; the least of many passes, in \
               turns. Ours goes from an image's bytes to its label, the others from inputs made ready for them. A floor \
               is the time that the model's multiply-adds take at the rate measured beside it.",
        show: show::classifier,
    },
    Subject {
        name: "kernel-svm",
        heading: "An RBF model beside `svm-predict`",
        text: "`bench/kernel-svm`: a model of LIBSVM's, a thousand images in turn, both on one core, CPU time; what \
               `svm-predict` takes to read the model is not counted.",
        show: show::runs_and_figures,
    },
    Subject {
        name: "codec",
        heading: "The wire codec alone",
        text: "`bench/codec`: frames that are encoded and decoded again, on one core. That nothing is allocated is a \
               test (`wire/tests/no_allocation.rs`).",
        show: show::runs_and_figures,
    },
    Subject {
        name: "micro",
        heading: "Piece by piece",
        text: "`bench/micro`: the rooms' micro-benchmarks, on one core; of each its fastest sample and the median one. \
               The codec's are of 512 frames each, the scoring's of as many images as the number says.",
        show: show::micro,
    },
    Subject {
        name: "generator",
        heading: "The load generator",
        text: "`bench/generator`: one thread and one connection against a server that does nothing but answer, a core \
               for each; the best of five rounds.",
        show: show::runs_and_figures,
    },
];

/// The newest record of each name in `folder`, with its file.
///
/// # Errors
/// Whatever the file system says; `InvalidData` for a file that is no record.
pub fn newest(folder: &Path) -> io::Result<Vec<Kept>> {
    let mut newest: Vec<Kept> = Vec::new();
    for entry in fs::read_dir(folder)? {
        let path = entry?.path();
        if path.extension().is_none_or(|extension| extension != "json") {
            continue;
        }
        let record = Record::read(&path).map_err(|error| {
            io::Error::new(error.kind(), format!("{}: {error}", path.display()))
        })?;
        let kept = (path, record);
        match newest.iter_mut().find(|(_, known)| known.name == kept.1.name) {
            Some(known) if age(known) < age(&kept) => *known = kept,
            Some(_) => {}
            None => newest.push(kept),
        }
    }
    newest.sort_by(|(_, one), (_, other)| one.name.cmp(&other.name));
    Ok(newest)
}

/// What orders records of one name by age: the moment, then the number at the end of the file's
/// name, of which the longer is the larger (there is none, then `-2`, at last `-10`).
fn age((path, record): &Kept) -> (&str, usize, &Path) {
    (&record.date, path.as_os_str().len(), path)
}

fn find<'a>(records: &'a [Kept], name: &str) -> Option<&'a Kept> {
    records.iter().find(|(_, record)| record.name == name)
}

/// The page about these records.
pub fn page(records: &[Kept]) -> String {
    let mut out = String::from(
        "# Performance\n\nMade by `just performance` from the newest records in `bench/results/`; do not edit. The \
         machine is shared and virtual: quote ratios from one record, not absolute figures. `just bench-all` makes \
         all records anew, and this page. Measured elsewhere, as tables in the documents themselves: the memo's stores \
         ([`docs/scaling.md`](scaling.md)), the cache's threads and snapshots \
         ([`cache/README.md`](../cache/README.md)).\n",
    );
    targets::table(&mut out, records);
    for Subject { name, heading, text, show } in &SUBJECTS {
        if let Some((path, record)) = find(records, name) {
            let _ = write!(out, "\n## {heading}\n\n{text}\n\n");
            show(&mut out, record);
            let _ = writeln!(out, "\n{}", show::source(path, record));
        }
    }
    out
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::record::{Commit, Machine, Run};
    use crate::report::tests::report;

    /// A record with two runs of one name.
    pub(crate) fn record(name: &str, date: &str, figures: &[(&str, f64)]) -> Record {
        let figures = figures.iter().map(|&(name, value)| (name.to_owned(), value)).collect();
        let (date, commit) = (date.to_owned(), Commit::default());
        let run = |rate| {
            let mut report = report();
            report.throughput_per_s = rate;
            Run { name: "a run".into(), report }
        };
        let runs = vec![run(300.0), run(100.0), run(200.0)];
        Record {
            date,
            commit,
            figures,
            ..Record::new(name, Path::new("."), Machine::default(), runs)
        }
    }

    #[test]
    fn the_newest_record_of_each_name_is_on_the_page() {
        let folder = tempfile::tempdir().unwrap();
        for (date, rate) in [("2026-01-02T00:00:00Z", 150.0), ("2026-01-01T00:00:00Z", 7.0)] {
            let record = record("codec", date, &[("CacheReq, read, M/s", rate)]);
            record.write(folder.path()).unwrap();
        }
        record("other", "2026-01-03T00:00:00Z", &[]).write(folder.path()).unwrap();
        fs::write(folder.path().join("notes.txt"), "no record").unwrap();
        let records = newest(folder.path()).unwrap();
        assert_eq!(records.len(), 2);
        let page = page(&records);
        assert!(
            page.contains("| CacheReq, read, M/s | 150 |") && !page.contains("| 7 |"),
            "{page}"
        );
        assert!(page.contains("2026-01-02-codec.json"), "{page}");
        fs::write(folder.path().join("broken.json"), "{").unwrap();
        assert!(newest(folder.path()).unwrap_err().to_string().contains("broken.json"));
    }

    #[test]
    fn of_records_of_one_moment_the_one_with_the_highest_number_is_the_newest() {
        let folder = tempfile::tempdir().unwrap();
        for rate in 1..=11 {
            let figures = [("CacheReq, read, M/s", f64::from(rate))];
            record("codec", "2026-01-02T00:00:00Z", &figures).write(folder.path()).unwrap();
        }
        let records = newest(folder.path()).unwrap();
        let name = records[0].0.file_name().unwrap().to_string_lossy();
        assert_eq!(name, "2026-01-02-codec-11.json");
        assert_eq!(records[0].1.figures["CacheReq, read, M/s"], 11.0);
    }

    #[test]
    fn of_runs_with_one_name_the_middle_one_is_shown() {
        let record =
            record("memo-overhead", "2026-01-02T00:00:00Z", &[("depth_1_hop_p50_us", 2.0)]);
        let page = page(&[("x.json".into(), record)]);
        assert_eq!(page.matches("| a run |").count(), 1, "{page}");
        assert!(page.contains("| a run | 200 |") && page.contains("| depth 1 hop p50 µs | 2 |"));
    }

    #[test]
    fn programs_and_batches_of_the_classifiers_record_become_a_table() {
        let figures = [
            ("ours, raw, 1 at once, µs per image", 0.2),
            ("ours, raw, 64 at once, µs per image", 0.1),
            ("ours, raw, answers that are ours", 10.0),
            ("ours, conv, 1 at once, µs per image", 12.5),
            ("predict, command line, µs per image", 16.0),
            ("speed, conv, floor, µs", 6.0),
            ("speed, raw, floor, µs", 0.06),
        ];
        let page =
            page(&[("x.json".into(), record("classifier", "2026-01-02T00:00:00Z", &figures))]);
        assert!(page.contains("| ours, raw | 0.2 | 0.1 |"), "{page}");
        assert!(page.contains("| predict, command line | 16.0 |"), "{page}");
        assert!(page.contains("| floor, µs | 6 | 0.06 |"), "{page}");
    }
}
