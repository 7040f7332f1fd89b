//! Figures of the newest records inside of other documents: each stands between two comments that
//! name the script which measured it.

use std::fmt::Write;
use std::io;

use super::show::{middle_runs, number, thousands};
use super::{Kept, find};
use crate::record::Record;
use crate::report::duration;

/// The documents with such figures: their places in the repository.
pub const DOCUMENTS: [&str; 2] = ["README.md", "bench/README.md"];

/// What can stand in a document.
struct Extract {
    /// What its comments name.
    marker: &'static str,
    /// The name of its record.
    record: &'static str,
    text: fn(&Record) -> String,
}

const EXTRACTS: [Extract; 4] = [
    Extract { marker: "bench/memo", record: "memo-hot", text: remembered },
    Extract { marker: "bench/cache, in short", record: "cache", text: cache_in_short },
    Extract { marker: "bench/cache", record: "cache", text: cache },
    Extract { marker: "bench/generator", record: "generator", text: generator },
];

/// The document with its figures brought up to date.
///
/// # Errors
/// `InvalidData` for a comment that opens such a place, of which the end or the record is missing.
pub fn filled(document: &str, records: &[Kept]) -> io::Result<String> {
    let wrong = |text: String| io::Error::new(io::ErrorKind::InvalidData, text);
    let mut out = document.to_owned();
    for Extract { marker, record, text } in &EXTRACTS {
        let (opens, closes) = (format!("<!-- {marker} -->\n"), format!("<!-- end of {marker} -->"));
        let Some((before, rest)) = out.split_once(&opens) else { continue };
        let (_, after) = rest
            .split_once(&closes)
            .ok_or_else(|| wrong(format!("\"<!-- {marker} -->\" has no \"{closes}\"")))?;
        let (path, record) =
            find(records, record).ok_or_else(|| wrong(format!("there is no record {record}")))?;
        let file = path.file_name().unwrap_or_default().to_string_lossy();
        out = format!("{before}{opens}\n{}\n`{file}`\n\n{closes}{after}", text(record));
    }
    Ok(out)
}

/// Depth, answers a second, p50 and p99.
fn remembered(record: &Record) -> String {
    let mut out = String::from(
        "| requests in flight | answers a second | p50 | p99 |\n| ---: | ---: | ---: | ---: |\n",
    );
    for run in middle_runs(&record.runs) {
        let (report, latency) = (&run.report, &run.report.latency_from_sent);
        let _ = writeln!(
            out,
            "| {} | {} | {} | {} |",
            thousands(report.settings.depth as f64),
            thousands(report.throughput_per_s),
            duration(latency.p50_ns),
            duration(latency.p99_ns)
        );
    }
    out
}

fn figure(record: &Record, name: &str) -> String {
    record.figures.get(name).map_or_else(|| "–".to_owned(), |&value| number(value))
}

fn cache_in_short(record: &Record) -> String {
    let figure = |name| figure(record, name);
    format!(
        "The cache alone beside Redis and memcached, 1 M keys, best depth for each, one server core: {} M reads a\n\
         second against {} M and {} M, {} times the better.\n",
        figure("afterimage M/s"),
        figure("redis M/s"),
        figure("memcached M/s"),
        figure("afterimage over the better peer")
    )
}

fn cache(record: &Record) -> String {
    let figure = |name: &str| figure(record, name);
    let judged = |name: &str, reached: fn(f64) -> bool| match record.figures.get(name) {
        Some(&value) if reached(value) => number(value),
        Some(&value) => format!("{}, **missed**", number(value)),
        None => "–".to_owned(),
    };
    let mut out = String::from(
        "| | Redis | memcached | Afterimage | target | reached |\n| --- | ---: | ---: | ---: | --- | --- |\n",
    );
    let mut row = |what: &str, names: [&str; 3], target: &str, reached: String| {
        let [redis, memcached, ours] = names.map(figure);
        let _ = writeln!(out, "| {what} | {redis} | {memcached} | {ours} | {target} | {reached} |");
    };
    let over = judged("afterimage over the better peer", |times| times >= 20.0);
    let names = ["redis M/s", "memcached M/s", "afterimage M/s"];
    row("pipelined reads, 1 M keys, M/s", names, "≥ 20 × the better", over);
    let share = judged("afterimage 50 M over 1 M", |share| share >= 0.7);
    let names = ["", "", "afterimage 50 M keys M/s"];
    row("the same, 50 M keys", names, "≥ 0.7 of 1 M", share);
    let names =
        ["redis server ns a read", "memcached server ns a read", "afterimage server ns a read"];
    row("server's CPU time a read, ns", names, "", String::new());
    let names = ["", "", "afterimage 50 M server ns a read"];
    row("the same, 50 M keys", names, "", String::new());
    for percentile in ["p50", "p99"] {
        let names = ["redis", "memcached", "afterimage"];
        let names = names.map(|name| format!("{name} {percentile} µs"));
        let echo = figure(&format!("echo {percentile} µs"));
        let over = judged(&format!("{percentile} over an echo"), |ratio| ratio <= 1.10);
        row(
            &format!("one at a time, {percentile}, µs"),
            names.each_ref().map(String::as_str),
            &format!("≤ 1.10 × an echo ({echo})"),
            over,
        );
    }
    let bytes = "afterimage bytes an entry after 10000000 keys";
    let names = ["redis bytes an entry", "memcached bytes an entry", bytes];
    let held = judged(bytes, |bytes| bytes <= 20.0);
    row("bytes an entry after 10 M keys", names, "≤ 20", held);
    let names = ["", "", "afterimage bytes an entry after 40000000 keys"];
    row("the same, full", names, "", String::new());
    out
}

fn generator(record: &Record) -> String {
    let mut out = String::from(
        "| load | requests/s | generator's share of its core | its CPU time a request |\n\
         | --- | ---: | ---: | ---: |\n",
    );
    for run in middle_runs(&record.runs) {
        let generator = &run.report.generator;
        let busy = generator.cpu_share.iter().sum::<f64>() * 100.0;
        let _ = writeln!(
            out,
            "| {} | {} | {busy:.0} % | {} ns |",
            run.name,
            thousands(run.report.throughput_per_s),
            number(generator.cpu_ns_per_request)
        );
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::performance::tests::record;

    #[test]
    fn only_what_stands_between_the_comments_changes() {
        let figures = [("afterimage M/s", 43.27), ("redis M/s", 1.674), ("p99 over an echo", 1.2)];
        let records = [("d/x-3.json".into(), record("cache", "2026-01-02T00:00:00Z", &figures))];
        let document = "a\n<!-- bench/cache, in short -->\nold\n<!-- end of bench/cache, in short -->\nb\n\
                        <!-- bench/cache -->\n<!-- end of bench/cache -->";
        let new = filled(document, &records).unwrap();
        assert!(new.starts_with("a\n<!-- bench/cache, in short -->\n\nThe cache"), "{new}");
        assert!(new.contains("43.3 M reads a\nsecond against 1.674 M and – M"), "{new}");
        assert!(new.contains("\n`x-3.json`\n") && !new.contains("old"), "{new}");
        assert!(new.contains("| 1.2, **missed** |"), "{new}");
        assert_eq!(filled(&new, &records).unwrap(), new);
        assert_eq!(filled("no figures", &[]).unwrap(), "no figures");
    }

    #[test]
    fn a_place_without_an_end_or_a_record_is_named() {
        let open = filled("<!-- bench/memo -->\n", &[]).unwrap_err().to_string();
        assert!(open.contains("end of bench/memo"), "{open}");
        let none = filled("<!-- bench/memo -->\n<!-- end of bench/memo -->", &[]);
        assert!(none.unwrap_err().to_string().contains("no record memo-hot"));
    }
}
