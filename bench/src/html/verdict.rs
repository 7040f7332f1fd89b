//! The comparison of two services or records, with confidence intervals.

use std::fmt::Write;

use super::Source;
use super::plot::escape;
use crate::compare::{Comparison, Verdict, between, percent, within};
use crate::stats::CONFIDENCE;

/// Tables for two records with repeats of the same runs, or for one record with repeats of two;
/// nothing for others.
pub(super) fn section(sources: &[Source<'_>]) -> String {
    let mut out = String::new();
    match sources {
        [one] => {
            let all = within(one.record).unwrap_or_default();
            if let Some(Comparison { names: [a, b], .. }) = all.first() {
                table(&mut out, a, b, "", &all);
            }
        }
        [a, b] => {
            for (name, all) in between(a.record, b.record) {
                table(&mut out, a.name, b.name, name, &all);
            }
        }
        _ => {}
    }
    out
}

/// The change from `first` to `second` in the run of this name; nothing with too few repeats.
fn table(out: &mut String, first: &str, second: &str, run: &str, all: &[Comparison]) {
    let known = |comparison: &&Comparison| comparison.verdict() != Verdict::TooFewRepeats;
    let Some(Comparison { repeats: [a, b], .. }) = all.iter().find(known) else { return };
    let (first, second, confidence) = (escape(first), escape(second), CONFIDENCE * 100.0);
    let run = if run.is_empty() { String::new() } else { format!(": {}", escape(run)) };
    let _ = write!(
        out,
        "<h2>{second} compared with {first}{run}</h2>\n<p>Medians of {a} and {b} repeats. The change is estimated from all \
         repeats, with its {confidence:.0} % confidence interval.</p>\n<div class=\"scroll\"><table>\n<thead><tr>"
    );
    for head in ["", &first, &second, "change", "from", "to", "verdict"] {
        let _ = write!(out, "<th scope=\"col\">{head}</th>");
    }
    out.push_str("</tr></thead>\n<tbody>\n");
    for comparison in all {
        let [a, b] = comparison.medians.map(|median| escape(&comparison.metric.show(median)));
        let percent = |change| percent(change).replace('-', "\u{2212}");
        let interval = comparison.interval.map(|(low, high)| (percent(low), percent(high)));
        let (low, high) = interval.unwrap_or_default();
        let (class, verdict) = match comparison.verdict() {
            Verdict::Worse => (" class=\"bad\"", Verdict::Worse),
            Verdict::Better => (" class=\"good\"", Verdict::Better),
            verdict => ("", verdict),
        };
        let _ = writeln!(
            out,
            "<tr><th scope=\"row\">{}</th><td>{a}</td><td>{b}</td><td>{}</td><td>{low}</td><td>{high}</td>\
             <td{class}>{}</td></tr>",
            comparison.metric.name(),
            percent(comparison.change),
            verdict.name()
        );
    }
    out.push_str("</tbody>\n</table></div>\n");
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::record::{Machine, Record, Run};
    use crate::report::tests::report;

    fn record(name: &str, rates: &[f64]) -> Record {
        let run = |&rate| {
            let mut report = report();
            report.throughput_per_s = rate;
            Run { name: "depth 1".into(), report }
        };
        Record::new(name, Path::new("."), Machine::default(), rates.iter().map(run).collect())
    }

    #[test]
    fn two_records_with_repeats_get_a_verdict_and_others_none() {
        let (a, b) = (record("x", &[100.0; 6]), record("x", &[110.0; 6]));
        let text = section(&[Source::new("<a>", &a), Source::new("b", &b)]);
        assert!(text.contains("<h2>b compared with &lt;a&gt;: depth 1</h2>"), "{text}");
        assert!(text.contains("<td>+10.0 %</td>") && text.contains(">better</td>"), "{text}");
        assert!(text.contains("no difference shown"), "{text}");
        assert_eq!(section(&[Source::new("a", &a)]), "");
        assert_eq!(section(&[Source::new("a", &a), Source::new("c", &record("c", &[1.0]))]), "");
    }

    #[test]
    fn one_record_of_two_services_measured_in_turn_gets_a_verdict() {
        let mut both = record("ab", &[100.0, 110.0, 100.0, 110.0, 100.0, 110.0, 100.0, 110.0]);
        both.runs.extend(both.runs.clone());
        for (i, run) in both.runs.iter_mut().enumerate() {
            run.name = if i % 2 == 0 { "A".into() } else { "B".into() };
        }
        let text = section(&[Source::new("ab", &both)]);
        assert!(
            text.contains("<h2>B compared with A</h2>") && text.contains(">better</td>"),
            "{text}"
        );
    }
}
