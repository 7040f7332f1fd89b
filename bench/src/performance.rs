//! `docs/performance.md`, made from the newest records: no figure in it was typed by anybody.

use std::fmt::Write;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use crate::record::Record;
use crate::report::{Count, duration};

/// The records that the page is about, in its order, and what each is headed by.
const SUBJECTS: [(&str, &str, &str); 5] = [
    (
        "memo-hot",
        "Remembered answers",
        "`bench/memo`: `afterimage serve` on one core, the load on the other, one connection, every answer checked.",
    ),
    (
        "memo-peers",
        "The memo, the classifier, and what people would write today",
        "`bench/memo-peers`: all servers of a system on one core, the load on the other; the median of three rounds in \
         which the systems take turns. The peers are asked in the way that each answers fastest.",
    ),
    (
        "cache",
        "The cache beside Redis and memcached",
        "`bench/cache`: each on one core, the load on the other; the median of three rounds in turn.",
    ),
    (
        "codec",
        "The wire codec alone",
        "`bench/codec`: frames that are encoded and decoded again, on one core.",
    ),
    (
        "generator",
        "The load generator",
        "`bench/generator`: one thread and one connection against a server that does nothing but answer, a core for \
         each; the best of five rounds.",
    ),
];

/// What was aimed at: record, figure, what it is about, and the limit, from below or (`false`) from above.
const TARGETS: [(&str, &str, &str, f64, bool); 10] = [
    (
        "generator",
        "mixed, depth 16384, M/s",
        "million small requests a second from one generator thread",
        30.0,
        true,
    ),
    ("memo-peers", "memo over gRPC", "the memo over gRPC with the same logic", 10.0, true),
    (
        "memo-peers",
        "memo over FastAPI",
        "the memo over FastAPI + scikit-learn + Redis",
        200.0,
        true,
    ),
    (
        "memo-peers",
        "memo p50 over a server of nothing",
        "p50 of a remembered answer, depth 1, over a server that does nothing",
        1.10,
        false,
    ),
    (
        "codec",
        "CacheReq, read, M/s",
        "million CacheReq frames encoded and decoded a second",
        100.0,
        true,
    ),
    (
        "cache",
        "afterimage over the better peer",
        "the cache's reads over the better of Redis and memcached",
        20.0,
        true,
    ),
    (
        "cache",
        "afterimage 50 M over 1 M",
        "the cache's reads with 50 million keys over those with one",
        0.7,
        true,
    ),
    ("cache", "p50 over an echo", "p50 of a cache's read, depth 1, over an echo", 1.10, false),
    ("cache", "p99 over an echo", "p99 of a cache's read, depth 1, over an echo", 1.10, false),
    (
        "cache",
        "afterimage bytes an entry after 40000000 keys",
        "bytes of memory for each entry of a full cache",
        20.0,
        false,
    ),
];

/// Remembered answers a second that are aimed at, by the depth of the run in the record `memo-hot`: `None` for the
/// best of all depths.
const RATES: [(Option<usize>, f64); 2] = [(None, 4e6), (Some(64), 1.25e6)];

/// The newest record of each name in `folder`, with its file's name.
///
/// # Errors
/// Whatever the file system says; `InvalidData` for a file that is no record.
pub fn newest(folder: &Path) -> io::Result<Vec<(PathBuf, Record)>> {
    let mut newest: Vec<(PathBuf, Record)> = Vec::new();
    let mut paths = Vec::new();
    for entry in fs::read_dir(folder)? {
        let path = entry?.path();
        if path.extension().is_some_and(|extension| extension == "json") {
            paths.push(path);
        }
    }
    paths.sort();
    for path in paths {
        let record = Record::read(&path).map_err(|error| {
            io::Error::new(error.kind(), format!("{}: {error}", path.display()))
        })?;
        match newest.iter_mut().find(|(_, known)| known.name == record.name) {
            Some(known) if known.1.date < record.date => *known = (path, record),
            Some(_) => {}
            None => newest.push((path, record)),
        }
    }
    Ok(newest)
}

/// The page about these records.
pub fn page(records: &[(PathBuf, Record)]) -> String {
    let mut out = String::from(
        "# Performance\n\nMade by `just performance` from the newest records in `bench/results/`; do not edit. The \
         machine is shared and virtual: quote ratios from one record, not absolute figures. `just bench-all` makes \
         all records anew, and this page.\n",
    );
    let find = |name: &str| records.iter().find(|(_, record)| record.name == name);
    targets(&mut out, &find);
    for (name, heading, text) in SUBJECTS {
        if let Some((path, record)) = find(name) {
            let _ = write!(out, "\n## {heading}\n\n{text}\n\n");
            subject(&mut out, path, record);
        }
    }
    out
}

fn targets<'a>(out: &mut String, find: &impl Fn(&str) -> Option<&'a (PathBuf, Record)>) {
    let mut lines = Vec::new();
    for (depth, least) in RATES {
        let Some((_, record)) = find("memo-hot") else { continue };
        let runs = record.runs.iter().map(|run| &run.report);
        let runs = runs.filter(|report| depth.is_none_or(|depth| report.settings.depth == depth));
        let Some(best) = runs.map(|report| report.throughput_per_s).reduce(f64::max) else {
            continue;
        };
        let what = match depth {
            None => "remembered answers a second, best depth".to_owned(),
            Some(depth) => format!("remembered answers a second, depth {depth}"),
        };
        lines.push((what, thousands(best), format!("≥ {}", thousands(least)), best >= least));
    }
    for (name, figure, what, limit, from_below) in TARGETS {
        let Some(value) = find(name).and_then(|(_, record)| record.figures.get(figure)) else {
            continue;
        };
        let (sign, met) =
            if from_below { ("≥", *value >= limit) } else { ("≤", *value <= limit) };
        lines.push((what.to_owned(), number(*value), format!("{sign} {}", number(limit)), met));
    }
    if lines.is_empty() {
        return;
    }
    let head = "\n## What was aimed at\n\n| | measured | aim | |\n| --- | ---: | ---: | --- |\n";
    let mut table = String::from(head);
    for (what, value, aim, met) in lines {
        let met = if met { "met" } else { "**missed**" };
        let _ = writeln!(table, "| {what} | {value} | {aim} | {met} |");
    }
    out.push_str(&table);
}

fn subject(out: &mut String, path: &Path, record: &Record) {
    if !record.runs.is_empty() {
        out.push_str(
            "| run | requests/s | p50 | p99 | p99.9 | hits | generator's core |\n\
             | --- | ---: | ---: | ---: | ---: | ---: | ---: |\n",
        );
    }
    for run in &record.runs {
        let report = &run.report;
        let latency = &report.latency_from_sent;
        let (p50, p99) = (duration(latency.p50_ns), duration(latency.p99_ns));
        let hits =
            report.hit_ratio.map(|ratio| format!("{:.1} %", ratio * 100.0)).unwrap_or_default();
        let busy = report.generator.cpu_share.iter().sum::<f64>() * 100.0;
        let (rate, p999) = (thousands(report.throughput_per_s), duration(latency.p999_ns));
        let _ = writeln!(
            out,
            "| {} | {rate} | {p50} | {p99} | {p999} | {hits} | {busy:.0} % |",
            run.name
        );
    }
    if !record.figures.is_empty() {
        out.push_str("\n| figure | |\n| --- | ---: |\n");
    }
    for (name, value) in &record.figures {
        let _ = writeln!(out, "| {name} | {} |", number(*value));
    }
    let file = path.file_name().unwrap_or_default().to_string_lossy();
    let machine = &record.machine;
    let load = machine.load_before.map_or(String::new(), |load| format!("; load before: {load}"));
    let commit =
        record.commit.hash.as_deref().and_then(|hash| hash.get(..12)).unwrap_or("not known");
    let changed = if record.commit.changed == Some(true) { " with changes" } else { "" };
    let _ = writeln!(
        out,
        "\n{} · commit {commit}{changed} · {}, {} CPUs{load} · [`{file}`](../bench/results/{file})",
        record.date,
        machine.cpu.as_deref().unwrap_or("processor not known"),
        machine.cpus.unwrap_or(0)
    );
}

fn thousands(value: f64) -> String {
    Count(value).to_string().replace(' ', ",")
}

/// A figure in as many digits as tell something.
fn number(value: f64) -> String {
    match value.abs() {
        size if size >= 1000.0 => thousands(value),
        size if size >= 100.0 => format!("{value:.0}"),
        size if size >= 10.0 => format!("{value:.1}"),
        _ => format!("{value:.3}").trim_end_matches('0').trim_end_matches('.').to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::record::{Commit, Machine, Run};
    use crate::report::tests::report;

    fn record(name: &str, date: &str, figures: &[(&str, f64)]) -> Record {
        let figures = figures.iter().map(|&(name, value)| (name.to_owned(), value)).collect();
        let (date, commit) = (date.to_owned(), Commit::default());
        let runs = vec![Run { name: "a run".into(), report: report() }];
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
        let met = "million CacheReq frames encoded and decoded a second | 150 | ≥ 100 | met |";
        assert!(page.contains(met) && page.contains("2026-01-02-codec.json"), "{page}");
        fs::write(folder.path().join("broken.json"), "{").unwrap();
        assert!(newest(folder.path()).unwrap_err().to_string().contains("broken.json"));
    }

    #[test]
    fn a_missed_aim_is_said_to_be_missed() {
        let figures = [
            ("memo over gRPC", 9.0),
            ("memo over FastAPI", 250.0),
            ("memo p50 over a server of nothing", 1.2),
        ];
        let record = record("memo-peers", "2026-01-02T00:00:00Z", &figures);
        let page = page(&[("x.json".into(), record)]);
        assert_eq!((page.matches("**missed**").count(), page.matches("| met |").count()), (2, 1));
    }
}
