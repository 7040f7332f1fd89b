//! Records as one HTML page with plots. The page needs no other file, no network and no script, and
//! follows the reader's choice of light or dark.

mod plot;
mod verdict;

use std::fmt::Write;

use crate::compare::{by_name, median, middle};
use crate::format::{duration, grouped, number, percent};
use crate::outcome::Outcome;
use crate::record::{Record, Run};
use crate::report::{Report, Settings};
use crate::threshold::Metric;
use plot::{COLOURS, Plot, class_of, escape};
use plot::{by_outcome, latency_over_time, percentiles, throughput_over_time};

/// The most runs in a plot: more curves cannot be distinguished.
const MAX_CURVES: usize = 2 * COLOURS;

/// The latencies in the tables.
const LATENCIES: [Metric; 6] =
    [Metric::P50, Metric::P90, Metric::P99, Metric::P999, Metric::P9999, Metric::Max];

/// A record and its name on the page, mostly that of its file.
#[derive(Clone, Copy, Debug)]
pub struct Source<'a> {
    name: &'a str,
    record: &'a Record,
}

impl<'a> Source<'a> {
    /// A record under this name.
    pub fn new(name: &'a str, record: &'a Record) -> Self {
        Source { name, record }
    }
}

/// The repeats of one run. The plots show the one with the median throughput, the tables the
/// median of each figure.
struct Shown<'a> {
    name: String,
    repeats: Vec<&'a Run>,
    report: &'a Report,
}

impl Shown<'_> {
    /// The median of a figure over the repeats.
    fn median(&self, figure: impl Fn(&Report) -> Option<f64>) -> Option<f64> {
        let values: Vec<f64> = self.repeats.iter().filter_map(|run| figure(&run.report)).collect();
        (!values.is_empty()).then(|| median(values))
    }

    /// The problems of all repeats, each once.
    fn problems(&self) -> Vec<String> {
        let mut problems: Vec<String> =
            self.repeats.iter().flat_map(|run| run.report.problems()).collect();
        problems.dedup();
        problems
    }

    /// The kinds of proper answers that the run got.
    fn outcomes(&self) -> Vec<Outcome> {
        let outcomes = self.report.outcomes.keys().copied();
        outcomes.filter(|&outcome| outcome != Outcome::Failed).collect()
    }
}

/// A page about all runs of these records, laid over one another.
pub fn page(title: &str, sources: &[Source<'_>]) -> String {
    let runs = shown(sources);
    let mut out = String::new();
    let title = escape(title);
    let style = include_str!("style.css");
    let _ = write!(
        out,
        "<!DOCTYPE html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n<meta name=\"viewport\" \
         content=\"width=device-width, initial-scale=1\">\n<title>{title}</title>\n<style>\n{style}</style>\n\
         </head>\n<body>\n<main>\n<h1>{title}</h1>\n"
    );
    out.push_str(&introduction(sources));
    out.push_str(&table(&runs));
    out.push_str(&verdict::section(sources));
    let plotted = &runs[..runs.len().min(MAX_CURVES)];
    if plotted.len() < runs.len() {
        let _ =
            writeln!(out, "<p>The plots show the first {MAX_CURVES} of {} runs.</p>", runs.len());
    }
    let names: Vec<&str> = plotted.iter().map(|run| run.name.as_str()).collect();
    let legend = legend(&names);
    let mut section = |heading: &str, text: &str, plot: Option<Plot>, legend: &str| {
        if let Some(plot) = plot {
            let _ = write!(out, "<h2>{heading}</h2>\n<p>{text}</p>\n{}", plot.html(legend));
        }
    };
    section(
        "Latency by percentile",
        "From the moment a request was due until its answer was read: the time its user waits. Each step \
         to the right is ten times rarer.",
        percentiles(plotted),
        &legend,
    );
    let (plot, names) = by_outcome(plotted);
    let names: Vec<&str> = names.iter().map(String::as_str).collect();
    section(
        "Latency of hits and of other answers",
        "The same for each kind of answer.",
        plot,
        &self::legend(&names),
    );
    section(
        "Latency over time",
        "Median (thin) and 99th percentile of each interval.",
        latency_over_time(plotted),
        &legend,
    );
    section(
        "Throughput over time",
        "Completed requests per second in each interval.",
        throughput_over_time(plotted),
        &legend,
    );
    out.push_str(&footer(sources));
    out.push_str("</main>\n</body>\n</html>\n");
    out
}

/// All runs, with names that are unique across records.
fn shown<'a>(sources: &[Source<'a>]) -> Vec<Shown<'a>> {
    let mut runs: Vec<Shown<'_>> = Vec::new();
    for Source { name: source, record } in sources {
        let prefix = match sources.len() {
            1 => String::new(),
            _ => format!("{source}, "),
        };
        for (name, repeats) in by_name(&record.runs) {
            let count = match repeats.len() {
                1 => String::new(),
                count => format!(" (median of {count})"),
            };
            let report = &middle(repeats.clone()).report;
            runs.push(Shown { name: format!("{prefix}{name}{count}"), repeats, report });
        }
    }
    runs
}

fn introduction(sources: &[Source<'_>]) -> String {
    let mut out = String::new();
    for Source { name, record } in sources {
        let mut loads = record.runs.iter().map(|run| load(&run.report));
        let Some(first) = loads.next() else { continue };
        let text = match loads.all(|other| other == first) {
            true => first,
            false => format!("{} runs of different services or loads.", record.runs.len()),
        };
        // Several records are named.
        let name = match sources.len() {
            1 => String::new(),
            _ => format!("<strong>{}</strong>: ", escape(name)),
        };
        // A date is not broken at its hyphens.
        let date = record.date.get(..10).unwrap_or(&record.date).replace('-', "\u{2011}");
        let cpu = record.machine.cpu.as_deref().unwrap_or("unknown processor");
        let _ = writeln!(out, "<p>{name}{} {date}, {}.</p>", escape(&text), escape(cpu));
    }
    out
}

/// Service and load of a run, in a sentence.
fn load(report: &Report) -> String {
    let settings = &report.settings;
    format!(
        "{} {}: {} over {} {}, {}, {} connection{}.",
        report.server.service,
        report.server.name,
        settings.access,
        grouped(settings.population),
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
            format!("open loop at {} requests per second, {arrivals} arrivals", number(rate))
        }
    }
}

/// The names of the curves; nothing for a single one.
fn legend(names: &[&str]) -> String {
    if names.len() < 2 {
        return String::new();
    }
    let mut out = String::from("<ul class=\"legend\">\n");
    for (i, name) in names.iter().enumerate() {
        let (class, name) = (class_of(i), escape(name));
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
        let rate = run.median(|report| Some(report.throughput_per_s)).unwrap_or_default();
        let name = escape(&run.name);
        let _ = write!(out, "<tr><th scope=\"row\">{name}</th><td>{}</td>", number(rate));
        let latencies = LATENCIES.map(|metric| run.median(|report| metric.of(report)));
        cells(&mut out, latencies);
        let hits = run.median(|report| report.hit_ratio).map(percent).unwrap_or_default();
        let _ = writeln!(out, "<td>{hits}</td></tr>");
        // A single kind of answer has the figures of the whole run.
        let outcomes = run.outcomes();
        for outcome in outcomes.iter().filter(|_| outcomes.len() > 1) {
            let summary = |report: &Report| Some(report.outcomes.get(outcome)?.from_due);
            let count = |report: &Report| summary(report).map(|latency| latency.count as f64);
            let all = run.median(|report| Some(report.answered as f64)).unwrap_or_default();
            let share = run.median(count).map(|count| percent(count / all.max(1.0)));
            let _ = write!(
                out,
                "<tr class=\"part\"><th scope=\"row\">{}</th><td></td>",
                outcome.name()
            );
            let latencies = LATENCIES.map(|metric| {
                run.median(|report| summary(report).and_then(|latency| metric.of_summary(&latency)))
            });
            cells(&mut out, latencies);
            let _ = writeln!(out, "<td>{}</td></tr>", share.unwrap_or_default());
        }
    }
    out.push_str("</tbody>\n</table></div>\n");
    out + &problems(runs)
}

fn cells(out: &mut String, latencies: [Option<f64>; LATENCIES.len()]) {
    for ns in latencies {
        let _ = write!(out, "<td>{}</td>", ns.map_or_else(String::new, |ns| duration(ns as u64)));
    }
}

/// The problems of each run.
fn problems(runs: &[Shown<'_>]) -> String {
    let mut out = String::new();
    for run in runs {
        let problems = run.problems();
        if !problems.is_empty() {
            let (name, what) = (escape(&run.name), escape(&problems.join("; ")));
            let _ = writeln!(out, "<li><strong>{name}</strong>: {what}</li>");
        }
    }
    match out.is_empty() {
        true => {
            "<p>Every request was sent and answered. All answers about one input were equal.</p>\n"
                .into()
        }
        false => format!("<ul class=\"bad\">\n{out}</ul>\n"),
    }
}

fn footer(sources: &[Source<'_>]) -> String {
    let mut out = String::from("<footer>\n");
    for Source { name, record } in sources {
        let commit = record.commit.hash.as_deref().unwrap_or("unknown");
        let changed = if record.commit.changed == Some(true) { " with local changes" } else { "" };
        let load = record
            .machine
            .load_before
            .map_or(String::new(), |load| format!(", load before {load}"));
        let _ = writeln!(
            out,
            "<p>{} · {} · commit {}{changed}{load}<br><code>{}</code></p>",
            escape(name),
            escape(&record.date),
            escape(commit.get(..12).unwrap_or(commit)),
            escape(&record.command.join(" "))
        );
    }
    out + "</footer>\n"
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::record::{Commit, Machine, Run};
    use crate::report::Summary;
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
    fn a_page_has_all_plots_and_runs_and_no_links() {
        let (one, two) = (record("one", &["a", "a", "b"]), record("two", &["a"]));
        let page = page("A <talk>", &[Source::new("one", &one), Source::new("two", &two)]);
        for part in [
            "Latency by percentile",
            "Latency over time",
            "Throughput over time",
            "one, a (median of 2)",
            "two, a",
            "A &lt;talk&gt;",
            "bench &lt;&amp;&gt;",
            "0123456789ab with local changes",
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
    fn hits_and_other_answers_are_shown_apart() {
        let mut both = record("x", &["a"]);
        let report = &mut both.runs[0].report;
        let mut miss = report.outcomes[&Outcome::Hit];
        miss.from_due = Summary { count: 1000, p50_ns: 20_000_000, ..miss.from_due };
        report.outcomes.insert(Outcome::Miss, miss);
        report.answered = 2000;
        report.histograms.insert(Outcome::Miss, report.histograms[&Outcome::Hit].clone());
        let page = page("t", &[Source::new("x", &both)]);
        assert!(page.contains("<th scope=\"row\">miss</th><td></td><td>20.0 ms</td>"), "{page}");
        assert!(page.contains("<th scope=\"row\">hit</th><td></td><td>1.00 ms</td>"), "{page}");
        assert!(page.contains("Latency of hits and of other answers"));
        assert!(page.contains("a, hit</li>") && page.contains("a, miss</li>"), "{page}");
        let only_hits = record("x", &["a"]);
        let page = super::page("t", &[Source::new("x", &only_hits)]);
        assert!(!page.contains("other answers") && !page.contains("class=\"part\""));
    }

    #[test]
    fn the_tables_show_the_same_medians() {
        let mut one = record("one", &["a"; 4]);
        for (run, rate) in one.runs.iter_mut().zip([100.0, 200.0, 400.0, 500.0]) {
            run.report.throughput_per_s = rate;
        }
        let two = one.clone();
        let page = page("t", &[Source::new("x", &one), Source::new("y", &two)]);
        assert!(page.contains("<td>300</td>") && page.contains("<td>300/s</td>"), "{page}");
    }

    #[test]
    fn an_old_record_has_a_percentile_curve_only() {
        let mut old = record("old", &["a"]);
        old.runs[0].report.histograms.clear();
        old.runs[0].report.timeline.clear();
        let page = page("Old", &[Source::new("old", &old)]);
        assert!(page.contains("Latency by percentile") && !page.contains("Throughput over time"));
        let empty = super::page("Empty", &[]);
        assert!(empty.contains("<h1>Empty</h1>") && !empty.contains("<svg class"));
    }
}
