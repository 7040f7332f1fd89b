//! Records as one page with plots: it needs no other file, no network and no script, and follows
//! the reader's choice of light or dark.

mod curves;
mod plot;
mod verdict;

use std::fmt::Write;

use crate::compare::{by_name, middle};
use crate::record::Record;
use crate::report::{Report, Settings, Summary, duration};
use curves::{latency_over_time, percentiles, throughput_over_time};
use plot::{COLOURS, Plot, class_of, escape};

/// Runs whose curves a plot can show and a reader tell apart.
const MAX_CURVES: usize = 2 * COLOURS;

/// A run as the page shows it: of several repeats the middle one.
struct Shown<'a> {
    name: String,
    report: &'a Report,
    /// What went wrong in any of the repeats.
    problems: Vec<String>,
}

/// A page about all runs of these records, laid over one another.
pub fn page(title: &str, records: &[Record]) -> String {
    let runs = shown(records);
    let mut out = String::new();
    let title = escape(title);
    let style = include_str!("style.css");
    let _ = write!(
        out,
        "<!DOCTYPE html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n<meta name=\"viewport\" \
         content=\"width=device-width, initial-scale=1\">\n<title>{title}</title>\n<style>\n{style}</style>\n\
         </head>\n<body>\n<main>\n<h1>{title}</h1>\n"
    );
    out.push_str(&introduction(records));
    out.push_str(&table(&runs));
    out.push_str(&verdict::section(records));
    let plotted = &runs[..runs.len().min(MAX_CURVES)];
    if plotted.len() < runs.len() {
        let _ =
            writeln!(out, "<p>The plots show the first {MAX_CURVES} of {} runs.</p>", runs.len());
    }
    let legend = legend(plotted);
    let mut section = |heading: &str, text: &str, plot: Option<Plot>| {
        if let Some(plot) = plot {
            let _ = write!(out, "<h2>{heading}</h2>\n<p>{text}</p>\n{}", plot.html(&legend));
        }
    };
    section(
        "Latency by percentile",
        "From the moment a request was due until its answer was read: what its user waits. Each step to the \
         right is ten times rarer.",
        percentiles(plotted),
    );
    section(
        "Latency over time",
        "Median (thin) and 99th percentile of each interval.",
        latency_over_time(plotted),
    );
    section(
        "Throughput over time",
        "Requests that were over in each interval, a second.",
        throughput_over_time(plotted),
    );
    out.push_str(&footer(records));
    out.push_str("</main>\n</body>\n</html>\n");
    out
}

/// The runs with names that tell them apart, also across records.
fn shown(records: &[Record]) -> Vec<Shown<'_>> {
    let mut runs: Vec<Shown<'_>> = Vec::new();
    for (number, record) in records.iter().enumerate() {
        let namesake = |other: &&Record| other.name == record.name;
        let prefix = match records.len() {
            1 => String::new(),
            _ if records.iter().filter(namesake).count() == 1 => format!("{}, ", record.name),
            _ => format!("{} ({}), ", record.name, number + 1),
        };
        for (name, repeats) in by_name(&record.runs) {
            let mut problems: Vec<String> =
                repeats.iter().flat_map(|run| run.report.problems()).collect();
            problems.dedup();
            let count = match repeats.len() {
                1 => String::new(),
                count => format!(" (middle of {count})"),
            };
            let name = format!("{prefix}{name}{count}");
            runs.push(Shown { name, report: &middle(repeats).report, problems });
        }
    }
    runs
}

fn introduction(records: &[Record]) -> String {
    let mut out = String::new();
    for record in records {
        let mut loads = record.runs.iter().map(|run| load(&run.report));
        let Some(first) = loads.next() else { continue };
        let text = match loads.all(|other| other == first) {
            true => first,
            false => format!("{} runs, not all of the same service or load.", record.runs.len()),
        };
        // Of several records each is named.
        let name = match records.len() {
            1 => String::new(),
            _ => format!("<strong>{}</strong>: ", escape(&record.name)),
        };
        // A date is not broken at its hyphens.
        let date = record.date.get(..10).unwrap_or(&record.date).replace('-', "\u{2011}");
        let cpu = record.machine.cpu.as_deref().unwrap_or("processor not known");
        let _ = writeln!(out, "<p>{name}{} {date}, {}.</p>", escape(&text), escape(cpu));
    }
    out
}

/// Who was asked for what, and how.
fn load(report: &Report) -> String {
    let settings = &report.settings;
    format!(
        "{} {}: {} over {} {}, {}, {} connection{}.",
        report.server.service,
        report.server.name,
        settings.access,
        thousands(settings.population as f64),
        if settings.target == "cache" { "keys" } else { "images" },
        how_fast(settings),
        settings.connections,
        if settings.connections == 1 { "" } else { "s" },
    )
}

/// The loop, and its rate if it is open.
fn how_fast(settings: &Settings) -> String {
    match settings.rate_per_s {
        None => "closed loop".to_owned(),
        Some(rate) => {
            let arrivals = settings.mode.rsplit(' ').next().unwrap_or_default();
            format!("open loop at {} requests a second, {arrivals} arrivals", thousands(rate))
        }
    }
}

/// Which curve is whose; nothing when there is one only.
fn legend(runs: &[Shown<'_>]) -> String {
    if runs.len() < 2 {
        return String::new();
    }
    let mut out = String::from("<ul class=\"legend\">\n");
    for (i, run) in runs.iter().enumerate() {
        let (class, name) = (class_of(i), escape(&run.name));
        let _ = writeln!(
            out,
            "<li><svg viewBox=\"0 0 34 12\" aria-hidden=\"true\"><path class=\"curve {class}\" \
             d=\"M1 6H33\"/></svg>{name}</li>"
        );
    }
    out + "</ul>\n"
}

fn table(runs: &[Shown<'_>]) -> String {
    let mut out = String::from("<div class=\"scroll\"><table>\n<thead><tr>");
    for head in ["run", "requests/s", "p50", "p90", "p99", "p99.9", "p99.99", "max", "hits"] {
        let _ = write!(out, "<th scope=\"col\">{head}</th>");
    }
    out.push_str("</tr></thead>\n<tbody>\n");
    for run in runs {
        let report = run.report;
        let Summary { p50_ns, p90_ns, p99_ns, p999_ns, p9999_ns, max_ns, .. } =
            report.latency_from_due;
        let rate = thousands(report.throughput_per_s);
        let _ = write!(out, "<tr><th scope=\"row\">{}</th><td>{rate}</td>", escape(&run.name));
        for ns in [p50_ns, p90_ns, p99_ns, p999_ns, p9999_ns, max_ns] {
            let _ = write!(out, "<td>{}</td>", duration(ns));
        }
        let hits = report.hit_ratio.map(|ratio| format!("{:.1} %", ratio * 100.0));
        let _ = writeln!(out, "<td>{}</td></tr>", hits.unwrap_or_default());
    }
    out.push_str("</tbody>\n</table></div>\n");
    out + &problems(runs)
}

/// What went wrong, run by run.
fn problems(runs: &[Shown<'_>]) -> String {
    let mut out = String::new();
    for run in runs.iter().filter(|run| !run.problems.is_empty()) {
        let (name, what) = (escape(&run.name), escape(&run.problems.join("; ")));
        let _ = writeln!(out, "<li><strong>{name}</strong>: {what}</li>");
    }
    match out.is_empty() {
        true => "<p>Every request was sent and answered, and every answer was right.</p>\n".into(),
        false => format!("<ul class=\"bad\">\n{out}</ul>\n"),
    }
}

fn footer(records: &[Record]) -> String {
    let mut out = String::from("<footer>\n");
    for record in records {
        let commit = record.commit.hash.as_deref().unwrap_or("not known");
        let changed = if record.commit.changed == Some(true) { ", with changes" } else { "" };
        let load = record
            .machine
            .load_before
            .map_or(String::new(), |load| format!(", load before {load}"));
        let _ = writeln!(
            out,
            "<p>{} · {} · commit {}{changed}{load}<br><code>{}</code></p>",
            escape(&record.name),
            escape(&record.date),
            escape(commit.get(..12).unwrap_or(commit)),
            escape(&record.command.join(" "))
        );
    }
    out + "</footer>\n"
}

/// A whole number with its thousands apart.
fn thousands(value: f64) -> String {
    crate::report::Count(value).to_string().replace(' ', "\u{202f}")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::record::{Commit, Machine, Run};
    use crate::report::tests::report;

    fn record(name: &str, runs: &[&str]) -> Record {
        let run = |name: &&str| Run { name: (*name).into(), report: report() };
        let mut record = Record::new(
            name,
            std::path::Path::new("."),
            Machine::default(),
            runs.iter().map(run).collect(),
        );
        record.commit = Commit { hash: Some("0123456789abcdef".into()), changed: Some(true) };
        record.command = vec!["bench".into(), "<&>".into()];
        record
    }

    #[test]
    fn a_page_has_all_plots_and_every_run_and_nothing_from_elsewhere() {
        let page = page("A <talk>", &[record("one", &["a", "a", "b"]), record("two", &["a"])]);
        for part in [
            "Latency by percentile",
            "Latency over time",
            "Throughput over time",
            "one, a (middle of 2)",
            "two, a",
            "A &lt;talk&gt;",
            "bench &lt;&amp;&gt;",
            "0123456789ab, with changes",
            "prefers-color-scheme: dark",
            "2 error replies",
        ] {
            assert!(page.contains(part), "{part:?} is missing");
        }
        assert_eq!(page.matches("<svg class=\"wide\"").count(), 3);
        for foreign in ["http:", "https:", "<script", "url(", "@import", "src="] {
            assert!(!page.contains(foreign), "{foreign:?} is there");
        }
        // Every element that is opened is closed.
        for element in ["svg", "table", "tr", "ul", "li", "p", "div", "footer", "main", "h2"] {
            let opened = page.matches(&format!("<{element}>")).count()
                + page.matches(&format!("<{element} ")).count();
            assert_eq!(opened, page.matches(&format!("</{element}>")).count(), "{element}");
        }
    }

    #[test]
    fn records_of_earlier_versions_have_a_curve_and_no_timeline() {
        let mut old = record("old", &["a"]);
        old.runs[0].report.histograms.clear();
        old.runs[0].report.timeline.clear();
        let page = page("Old", &[old]);
        assert!(page.contains("Latency by percentile") && !page.contains("Throughput over time"));
        let empty = super::page("Empty", &[]);
        assert!(empty.contains("<h1>Empty</h1>") && !empty.contains("<svg class"));
    }
}
