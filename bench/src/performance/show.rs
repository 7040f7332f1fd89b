//! Records as tables in Markdown.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write;
use std::path::Path;

use crate::compare::{by_name, middle};
use crate::record::{Record, Run};
use crate::report::{Count, duration};

/// Images that are classified at once in the classifier's record.
pub(super) const BATCHES: [u32; 4] = [1, 64, 256, 10_000];

/// All runs, those of one name by the middle one, and all figures.
pub(super) fn runs_and_figures(out: &mut String, record: &Record) {
    runs(out, record);
    if !record.runs.is_empty() && !record.figures.is_empty() {
        out.push('\n');
    }
    figures(out, record.figures.iter().map(|(name, value)| (name.as_str(), *value)));
}

/// What was printed for people, and all figures: for records of which not all was run by our own
/// generator.
pub(super) fn text_and_figures(out: &mut String, record: &Record) {
    let _ = writeln!(out, "```text\n{}\n```\n", record.text.join("\n").trim_end());
    figures(out, record.figures.iter().map(|(name, value)| (name.as_str(), *value)));
}

fn runs(out: &mut String, record: &Record) {
    if record.runs.is_empty() {
        return;
    }
    out.push_str(
        "| run | requests/s | p50 | p99 | p99.9 | hits | generator's core |\n\
         | --- | ---: | ---: | ---: | ---: | ---: | ---: |\n",
    );
    for run in middle_runs(&record.runs) {
        let report = &run.report;
        // In an open loop only the former shows what waited to be sent.
        let latency = match report.settings.rate_per_s {
            Some(_) => &report.latency_from_due,
            None => &report.latency_from_sent,
        };
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
}

/// Of the runs of each name the one with the middle throughput, in the order of the names' first
/// runs.
pub(super) fn middle_runs(runs: &[Run]) -> Vec<&Run> {
    by_name(runs).into_iter().map(|(_, runs)| middle(runs)).collect()
}

fn figures<'a>(out: &mut String, figures: impl Iterator<Item = (&'a str, f64)>) {
    let mut rows = String::new();
    for (name, value) in figures {
        let _ = writeln!(rows, "| {} | {} |", words(name), number(value));
    }
    if !rows.is_empty() {
        let _ = write!(out, "| figure | |\n| --- | ---: |\n{rows}");
    }
}

/// The classifier's record: programs by batches, what the command lines take, and our own speed
/// taken apart.
pub(super) fn classifier(out: &mut String, record: &Record) {
    let mut programs: BTreeMap<&str, [Option<f64>; BATCHES.len()]> = BTreeMap::new();
    let mut speeds: BTreeMap<&str, [Option<f64>; 2]> = BTreeMap::new();
    let mut commands = Vec::new();
    for (name, &value) in &record.figures {
        if let Some((program, batch)) = batch_of(name) {
            programs.entry(program).or_default()[batch] = Some(value);
        } else if let Some(command) = name.strip_suffix(", µs per image")
            && command.ends_with("command line")
        {
            commands.push((command, value));
        } else if let Some(what) = name.strip_prefix("speed, conv, ") {
            speeds.entry(what).or_default()[0] = Some(value);
        } else if let Some(what) = name.strip_prefix("speed, raw, ") {
            speeds.entry(what).or_default()[1] = Some(value);
        }
    }
    let cell = |value: Option<f64>| value.map(number).unwrap_or_default();
    out.push_str("| µs an image | one alone |");
    BATCHES[1..].iter().for_each(|&batch| {
        let _ = write!(out, " {} at once |", thousands(batch.into()));
    });
    out.push_str(" answers that are ours |\n| --- | ---: | ---: | ---: | ---: | ---: |\n");
    let mut rows: Vec<_> = programs.into_iter().collect();
    // The two models one after the other, and the fastest alone first.
    rows.sort_by(|(one, a), (other, b)| {
        let (a, b) = (a[0].unwrap_or(f64::MAX), b[0].unwrap_or(f64::MAX));
        one.contains("conv").cmp(&other.contains("conv")).then(a.total_cmp(&b))
    });
    for (program, times) in rows {
        let [alone, some, more, all] = times.map(cell);
        let agreed = record.figures.get(&format!("{program}, answers that are ours")).copied();
        let _ = writeln!(
            out,
            "| {program} | {alone} | {some} | {more} | {all} | {} |",
            agreed.map(thousands).unwrap_or_default()
        );
    }
    for (command, value) in commands {
        let _ = writeln!(out, "| {command} | {} | | | | |", number(value));
    }
    if !speeds.is_empty() {
        out.push_str("\n| ours, taken apart | conv | raw |\n| --- | ---: | ---: |\n");
    }
    for (what, values) in speeds {
        let [conv, raw] = values.map(cell);
        let _ = writeln!(out, "| {what} | {conv} | {raw} |");
    }
}

/// The micro-benchmarks: fastest and median of each.
pub(super) fn micro(out: &mut String, record: &Record) {
    out.push_str("| ns | fastest | median |\n| --- | ---: | ---: |\n");
    for (name, &fastest) in &record.figures {
        let Some(name) = name.strip_suffix(": fastest ns") else { continue };
        let median = record.figures.get(&format!("{name}: median ns")).copied();
        let median = median.map(number).unwrap_or_default();
        let _ = writeln!(out, "| {name} | {} | {median} |", number(fastest));
    }
}

/// The program and the index of the batch that a figure of the classifier's record is about.
pub(super) fn batch_of(figure: &str) -> Option<(&str, usize)> {
    let rest = figure.strip_suffix(" at once, µs per image")?;
    let (program, batch) = rest.rsplit_once(", ")?;
    let batch: u32 = batch.parse().ok()?;
    Some((program, BATCHES.iter().position(|&known| known == batch)?))
}

/// Where a record's figures come from.
pub(super) fn source(path: &Path, record: &Record) -> String {
    let file = path.file_name().unwrap_or_default().to_string_lossy();
    let machine = &record.machine;
    let load =
        machine.load_before.map_or(String::new(), |load| format!("; load before: {load:.1}"));
    let commit =
        record.commit.hash.as_deref().and_then(|hash| hash.get(..12)).unwrap_or("not known");
    let changed = if record.commit.changed == Some(true) { " with changes" } else { "" };
    format!(
        "{} · commit {commit}{changed} · {}, {} CPUs{load} · [`{file}`](../bench/results/{file})",
        record.date,
        machine.cpu.as_deref().unwrap_or("processor not known"),
        machine.cpus.unwrap_or(0)
    )
}

pub(super) fn thousands(value: f64) -> String {
    Count(value).to_string().replace(' ', ",")
}

/// A figure in as many digits as tell something.
pub(super) fn number(value: f64) -> String {
    match value.abs() {
        size if size >= 1000.0 => thousands(value),
        size if size >= 100.0 => format!("{value:.0}"),
        size if size >= 10.0 => format!("{value:.1}"),
        size => {
            // Three places, or as many as three digits take.
            let zeros = if size > 0.0 { -size.log10().floor() } else { 0.0 };
            let places = (zeros + 2.0).clamp(3.0, 12.0) as usize;
            format!("{value:.places$}").trim_end_matches('0').trim_end_matches('.').to_owned()
        }
    }
}

/// A figure's name as people write it: `p50_us` is p50 µs.
pub(super) fn words(name: &str) -> String {
    if name.contains(' ') {
        return name.to_owned();
    }
    let word = |word| match word {
        "us" => "µs",
        "mib" => "MiB",
        other => other,
    };
    name.split('_').map(word).collect::<Vec<_>>().join(" ")
}

/// The programs of the classifier's record that have the model of `ours` and are not it.
pub(super) fn peers_of<'a>(record: &'a Record, ours: &str) -> BTreeSet<&'a str> {
    let conv = ours.contains("conv");
    let programs = record.figures.keys().filter_map(|name| Some(batch_of(name)?.0));
    programs.filter(|name| !name.starts_with("ours") && name.contains("conv") == conv).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_micro_benchmark_is_a_line() {
        let figures =
            [("paths, key_hash: fastest ns", 98.5), ("paths, key_hash: median ns", 101.0)];
        let record = crate::performance::tests::record("micro", "2026-01-02T00:00:00Z", &figures);
        let mut out = String::new();
        micro(&mut out, &record);
        assert!(out.ends_with("| paths, key_hash | 98.5 | 101 |\n"), "{out}");
    }

    #[test]
    fn figures_are_shown_in_the_digits_that_tell_something() {
        let shown = [1_234_567.8, 123.4, 12.34, 1.0936, 0.7, 0.006_675_1, 0.0, -126.976];
        let texts = ["1,234,568", "123", "12.3", "1.094", "0.7", "0.00668", "0", "-127"];
        assert_eq!(shown.map(number), texts);
        assert_eq!(words("resident_mib_after_1_s"), "resident MiB after 1 s");
    }
}
