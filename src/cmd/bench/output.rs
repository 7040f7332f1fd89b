//! Where the figures of a run go, and what they must keep to.

use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};

use afterimage_bench::record::Record;
use afterimage_bench::threshold::Threshold;
use afterimage_bench::{export, html};
use anyhow::Context;

use crate::print::{self, say};

#[derive(Debug, clap::Args)]
#[command(next_help_heading = "Output")]
pub(crate) struct OutputArgs {
    /// Measure each depth so many times: what `bench compare` needs for a confidence interval.
    #[arg(long, value_name = "N", default_value = "1")]
    repeat: NonZeroUsize,

    /// Fail when this is true of a run: p99>5ms, say. May be given several times. Of latencies:
    /// mean, p50, p90, p99, p99.9, p99.99, max; else errors, throughput, hit-ratio.
    #[arg(long, value_name = "THRESHOLD")]
    fail_if: Vec<Threshold>,

    /// Print a record as JSON instead of the table (schema: bench/schema/record.json).
    #[arg(long)]
    json: bool,

    /// Write a page with plots into this file.
    #[arg(long, value_name = "FILE")]
    html: Option<PathBuf>,

    /// Write the percentiles into this file, as HdrHistogram's plotters read them (.hgrm; of
    /// several runs the last).
    #[arg(long, value_name = "FILE")]
    hgrm: Option<PathBuf>,

    /// Write the histogram of each interval into this file, as HdrHistogram's log tools read them
    /// (.hlog).
    #[arg(long, value_name = "FILE")]
    interval_log: Option<PathBuf>,

    /// Also write a record into this folder: the reports, the command, the commit, the machine.
    #[arg(long, value_name = "DIR")]
    record: Option<PathBuf>,

    /// What the record is about, in a word; part of its file's name.
    #[arg(long, value_name = "NAME", default_value = "run")]
    record_name: String,
}

impl OutputArgs {
    pub(crate) fn repeats(&self) -> usize {
        self.repeat.get()
    }

    pub(crate) fn json(&self) -> bool {
        self.json
    }

    pub(crate) fn record_name(&self) -> &str {
        &self.record_name
    }

    pub(crate) fn thresholds(&self) -> impl Iterator<Item = &Threshold> {
        self.fail_if.iter()
    }

    /// Writes all the files that were asked for.
    pub(crate) fn write(&self, record: &Record) -> anyhow::Result<()> {
        if self.json {
            say!("{}", serde_json::to_string_pretty(record)?)?;
        }
        if let Some(path) = &self.html {
            let page = html::page(
                &format!("Afterimage bench: {}", record.name),
                std::slice::from_ref(record),
            );
            write(path, |out| out.write_all(page.as_bytes()))?;
        }
        if let (Some(path), Some(last)) = (&self.hgrm, record.runs.last()) {
            let all = last.report.latencies().from_due;
            write(path, |out| export::percentiles(&all, out))?;
        }
        if let Some(path) = &self.interval_log {
            let names: Vec<String> =
                record.runs.iter().map(|run| run.name.replace([' ', ','], "_")).collect();
            let reports = names.iter().zip(&record.runs);
            let reports: Vec<_> = reports.map(|(name, run)| (name.as_str(), &run.report)).collect();
            write(path, |out| export::interval_log(&reports, out))?;
        }
        if let Some(folder) = &self.record {
            keep(record, folder)?;
        }
        Ok(())
    }
}

/// Writes a record into `folder` and says where. On standard error, since JSON may be on the other.
pub(super) fn keep(record: &Record, folder: &Path) -> anyhow::Result<()> {
    let path = record.write(folder).with_context(|| format!("in {}", folder.display()))?;
    print::note(format_args!("recorded in {}", path.display()));
    Ok(())
}

/// Writes a file.
pub(super) fn write(
    path: &Path,
    content: impl FnOnce(&mut BufWriter<File>) -> io::Result<()>,
) -> anyhow::Result<()> {
    let written = File::create(path).and_then(|file| {
        let mut out = BufWriter::new(file);
        content(&mut out)?;
        out.flush()
    });
    written.with_context(|| format!("cannot write {}", path.display()))
}
