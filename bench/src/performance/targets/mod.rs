//! What was aimed at, and what was reached.

mod list;

use std::fmt::Write;
use std::path::Path;

use self::Aim::{Least, Most, NoMoreThan};
use self::list::TARGETS;
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

enum Aim {
    Least(f64),
    Most(f64),
    /// No more than this figure of the same record.
    NoMoreThan(&'static str),
}

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
            ("memo over gRPC, streams", 9.0),
            ("memo over FastAPI", 250.0),
            ("memo p50 over a server of nothing", 1.2),
            ("gRPC, streams M/s", 0.05),
        ];
        let table = judged("memo-peers", &figures);
        assert_eq!((table.matches("| **no** (").count(), table.matches("| yes |").count()), (2, 1));
        assert!(
            table.contains("| 9 | ≥ 10 | **no** (1) | gRPC, streams M/s 0.05 | [`x-2`]"),
            "{table}"
        );
        assert!(table.contains("\n2. The memo's thread waits"), "{table}");
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
