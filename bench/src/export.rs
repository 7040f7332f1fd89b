//! A run's latencies as files that the usual plotters of HdrHistogram read.
//!
//! Values are in milliseconds, as those tools expect; they are latencies from due, of all proper
//! answers.

use std::io::{self, Write};
use std::time::{Duration, UNIX_EPOCH};

use hdrhistogram::Histogram;
use hdrhistogram::serialization::V2DeflateSerializer;
use hdrhistogram::serialization::interval_log::{IntervalLogWriterBuilder, Tag};

use crate::report::Report;

/// Nanoseconds in a millisecond.
const MS: f64 = 1e6;

/// Lines for each halving of the distance to 100 %: what HdrHistogram's own tools take by default.
const LINES_PER_HALF: u32 = 5;

/// Writes the percentile distribution of `histogram`, in nanoseconds, as a `.hgrm` file.
///
/// # Errors
/// Errors of `out`.
pub fn percentiles(histogram: &Histogram<u64>, out: &mut impl Write) -> io::Result<()> {
    writeln!(
        out,
        "{:>12} {:>14} {:>10} {:>14}\n",
        "Value", "Percentile", "TotalCount", "1/(1-Percentile)"
    )?;
    let mut total = 0;
    for step in histogram.iter_quantiles(LINES_PER_HALF) {
        total += step.count_since_last_iteration();
        let (value, quantile) = (step.value_iterated_to() as f64 / MS, step.quantile_iterated_to());
        write!(out, "{value:>12.6} {quantile:>14.12} {total:>10}")?;
        if quantile < 1.0 {
            write!(out, " {:>14.2}", 1.0 / (1.0 - quantile))?;
        }
        writeln!(out)?;
    }
    let (mean, deviation) = (histogram.mean() / MS, histogram.stdev() / MS);
    writeln!(out, "#[Mean    = {mean:>12.6}, StdDeviation   = {deviation:>12.6}]")?;
    let (max, count) = (histogram.max() as f64 / MS, histogram.len());
    writeln!(out, "#[Max     = {max:>12.6}, Total count    = {count:>12}]")?;
    let halves = 2usize << (f64::from(histogram.sigfig()) * f64::log2(10.0)).ceil() as u32;
    let buckets = histogram.buckets();
    writeln!(out, "#[Buckets = {buckets:>12}, SubBuckets     = {halves:>12}]")
}

/// Writes the intervals of `reports`, each with its name as a tag, as an interval log (format 1.3).
///
/// # Errors
/// Errors of `out`; `InvalidInput` when a name cannot be a tag: it may hold no comma and no
/// white space.
pub fn interval_log(reports: &[(&str, &Report)], out: &mut impl Write) -> io::Result<()> {
    let first = reports.iter().map(|(_, report)| report.started_unix_s).reduce(f64::min);
    let began = Duration::try_from_secs_f64(first.unwrap_or(0.0)).unwrap_or_default();
    let mut serializer = V2DeflateSerializer::new();
    let mut log = IntervalLogWriterBuilder::new()
        .add_comment("[Histogram log format version 1.3]")
        .with_start_time(UNIX_EPOCH + began)
        .with_base_time(UNIX_EPOCH + began)
        .with_max_value_divisor(MS)
        .begin_log_with(out, &mut serializer)?;
    for (name, report) in reports {
        let tag = Tag::new(name).ok_or_else(|| {
            let text = format!("{name:?} cannot be a tag: it may hold no comma and no white space");
            io::Error::new(io::ErrorKind::InvalidInput, text)
        })?;
        let after = (report.started_unix_s - began.as_secs_f64()).max(0.0);
        for interval in &report.timeline {
            let Some(histogram) = &interval.histogram else { continue };
            let start = Duration::from_secs_f64(after + interval.start_s);
            let length = Duration::from_secs_f64(interval.length_s);
            log.write_histogram(histogram, start, length, Some(tag))
                .map_err(|error| io::Error::other(format!("{error:?}")))?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::tests::report;
    use base64::Engine as _;
    use hdrhistogram::serialization::Deserializer;
    use hdrhistogram::serialization::interval_log::{IntervalLogIterator, LogEntry};

    #[test]
    fn a_percentile_file_says_what_the_histogram_says() {
        let mut histogram = crate::outcome::new_histogram();
        for i in 1..=10_000u64 {
            histogram.record(i * 1000).unwrap();
        }
        let mut file = Vec::new();
        percentiles(&histogram, &mut file).unwrap();
        let text = String::from_utf8(file).unwrap();
        let rows: Vec<Vec<f64>> = text
            .lines()
            .skip(2)
            .filter(|line| !line.starts_with('#'))
            .map(|line| line.split_whitespace().map(|cell| cell.parse().unwrap()).collect())
            .collect();
        assert!(rows.len() > 50, "{text}");
        for row in &rows {
            let expected = histogram.value_at_quantile(row[1]) as f64 / 1e6;
            assert!((row[0] - expected).abs() <= expected * 2e-3, "{row:?}, not {expected}");
            assert!((row[2] / 10_000.0 - row[1]).abs() < 0.01, "{row:?}");
        }
        assert_eq!(rows.last().unwrap()[1..], [1.0, 10_000.0]);
        assert!(
            text.contains("#[Max     =    10.00")
                && text.contains("Total count    =        10000]")
        );
    }

    #[test]
    fn an_interval_log_comes_back_with_every_answer() {
        let report = report();
        let mut file = Vec::new();
        interval_log(&[("one", &report), ("two", &report)], &mut file).unwrap();
        assert!(file.starts_with(b"#[Histogram log format version 1.3]\n#[StartTime: 1.000 "));
        let (mut counts, mut max) = (std::collections::BTreeMap::new(), 0);
        for entry in IntervalLogIterator::new(&file) {
            let LogEntry::Interval(interval) = entry.unwrap() else { continue };
            let encoded = interval.encoded_histogram();
            let bytes = base64::engine::general_purpose::STANDARD.decode(encoded).unwrap();
            let histogram: Histogram<u64> =
                Deserializer::new().deserialize(&mut bytes.as_slice()).unwrap();
            let tag = interval.tag().unwrap().as_str().to_owned();
            *counts.entry(tag).or_insert(0) += histogram.len();
            max = max.max(histogram.max());
            assert!((interval.max() - histogram.max() as f64 / 1e6).abs() < 1e-3);
        }
        assert_eq!(
            counts.into_iter().collect::<Vec<_>>(),
            [("one".into(), 1000), ("two".into(), 1000)]
        );
        assert!(max.abs_diff(500_000_000) < 500_000, "{max}");
        let refused = interval_log(&[("a, b", &report)], &mut Vec::new()).unwrap_err();
        assert!(refused.to_string().contains("tag"), "{refused}");
    }
}
