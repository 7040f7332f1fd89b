//! Output files of a run, and its limits.

use std::fs::{self, File};
use std::io::{self, BufWriter, Write};
use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};

use afterimage_bench::export;
use afterimage_bench::html::{self, Source};
use afterimage_bench::record::Record;
use afterimage_bench::threshold::Threshold;
use afterimage_core::file;
use anyhow::{Context, bail, ensure};

use crate::print;

#[derive(Debug, clap::Args)]
#[command(next_help_heading = "Output")]
pub(crate) struct OutputArgs {
    /// Measurements of each depth; `bench compare` needs several for a confidence interval
    #[arg(long, value_name = "N", default_value = "1")]
    repeat: NonZeroUsize,

    /// Exit with 1 if this is true of a run, for example 'p99>5ms'. May be given several times
    ///
    /// Latencies: mean, p50, p90, p99, p99.9, p99.99, max. Others: errors, throughput, hit-ratio.
    #[arg(long, value_name = "THRESHOLD")]
    fail_if: Vec<Threshold>,

    /// Print a record as JSON instead of a table (schema: bench/schema/record.json)
    #[arg(long)]
    json: bool,

    /// Write an HTML page with plots into this file
    #[arg(long, value_name = "FILE")]
    html: Option<PathBuf>,

    /// Write the percentiles of the last run into this file, for HdrHistogram's plotters (.hgrm)
    #[arg(long, value_name = "FILE")]
    hgrm: Option<PathBuf>,

    /// Write the histogram of each interval into this file, for HdrHistogram's log tools (.hlog)
    #[arg(long, value_name = "FILE")]
    interval_log: Option<PathBuf>,

    /// Write a record into this folder: reports, command, commit and machine
    #[arg(long, value_name = "DIR")]
    record: Option<PathBuf>,

    /// Name of the record, part of its file name
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

    /// Opens all files before the runs: a path that cannot be written ends the command at once.
    pub(crate) fn open(&self) -> anyhow::Result<Files> {
        let open = |path: &Option<PathBuf>| path.as_deref().map(OutFile::open).transpose();
        if let Some(folder) = &self.record {
            check_folder(folder)?;
        }
        let files = Files {
            json: self.json,
            html: open(&self.html)?,
            hgrm: open(&self.hgrm)?,
            interval_log: open(&self.interval_log)?,
            record: self.record.clone(),
        };
        refuse_same_file(&[
            ("--html", files.html.as_ref()),
            ("--hgrm", files.hgrm.as_ref()),
            ("--interval-log", files.interval_log.as_ref()),
        ])?;
        Ok(files)
    }
}

/// The open output files of a command.
#[derive(Debug)]
pub(crate) struct Files {
    json: bool,
    html: Option<OutFile>,
    hgrm: Option<OutFile>,
    interval_log: Option<OutFile>,
    record: Option<PathBuf>,
}

impl Files {
    /// Writes all of them.
    pub(crate) fn write(self, record: &Record) -> anyhow::Result<()> {
        if self.json {
            print::json(&serde_json::to_string_pretty(record)?)?;
        }
        if let Some(file) = self.html {
            let title = format!("Afterimage bench: {}", record.name);
            let page = html::page(&title, &[Source::new(&record.name, record)]);
            file.write(|out| out.write_all(page.as_bytes()))?;
        }
        if let (Some(file), Some(last)) = (self.hgrm, record.runs.last()) {
            let all = last.report.latencies().from_due;
            file.write(|out| export::percentiles(&all, out))?;
        }
        if let Some(file) = self.interval_log {
            let names: Vec<String> =
                record.runs.iter().map(|run| run.name.replace([' ', ','], "_")).collect();
            let reports = names.iter().zip(&record.runs);
            let reports: Vec<_> = reports.map(|(name, run)| (name.as_str(), &run.report)).collect();
            file.write(|out| export::interval_log(&reports, out))?;
        }
        if let Some(folder) = &self.record {
            keep(record, folder)?;
        }
        Ok(())
    }
}

/// Refuses two flags that name the same file, also by two names: the second would replace the
/// first.
fn refuse_same_file(files: &[(&str, Option<&OutFile>)]) -> anyhow::Result<()> {
    let mut seen: Vec<(&str, &OutFile)> = Vec::new();
    for &(flag, file) in files {
        let Some(file) = file else { continue };
        if let Some((other, _)) = seen.iter().find(|(_, other)| file.is_same(other)) {
            bail!("{other} and {flag} write the same file {}", file.path.display());
        }
        seen.push((flag, file));
    }
    Ok(())
}

/// A file that is opened before its content is known. The old content stays until then.
#[derive(Debug)]
pub(crate) struct OutFile {
    path: PathBuf,
    file: File,
    /// This value has created the file, and nothing is in it yet.
    is_new: bool,
}

impl OutFile {
    pub(crate) fn open(path: &Path) -> anyhow::Result<Self> {
        let is_new = !path.exists();
        let mut options = File::options();
        let options = options.write(true).create(true).truncate(false);
        let file = file::open_to_write(path, options);
        let file = file.with_context(|| format!("cannot write {}", path.display()))?;
        Ok(OutFile { path: path.to_owned(), file, is_new })
    }

    /// Whether both are one regular file. A device, such as a terminal, may take several outputs.
    fn is_same(&self, other: &OutFile) -> bool {
        use std::os::unix::fs::MetadataExt;
        let (Ok(one), Ok(other)) = (self.file.metadata(), other.file.metadata()) else {
            return false;
        };
        one.is_file() && (one.dev(), one.ino()) == (other.dev(), other.ino())
    }

    /// Replaces the content.
    pub(crate) fn write(
        mut self,
        content: impl FnOnce(&mut BufWriter<&File>) -> io::Result<()>,
    ) -> anyhow::Result<()> {
        self.is_new = false;
        let replace = || {
            // Devices and pipes have no length.
            if self.file.metadata()?.is_file() {
                self.file.set_len(0)?;
            }
            let mut out = BufWriter::new(&self.file);
            content(&mut out)?;
            out.flush()
        };
        replace().with_context(|| format!("cannot write {}", self.path.display()))
    }
}

impl Drop for OutFile {
    fn drop(&mut self) {
        if self.is_new {
            // An empty file would look like a result. If it stays, nothing else is wrong.
            let _ = fs::remove_file(&self.path);
        }
    }
}

/// Checks that a record can be written into this folder, which is created if it is missing.
pub(super) fn check_folder(folder: &Path) -> anyhow::Result<()> {
    let is_other = folder.exists() && !folder.is_dir();
    ensure!(!is_other, "cannot write records into {}: it is not a folder", folder.display());
    let probe = folder.join(format!(".afterimage-{}", std::process::id()));
    let checked = fs::create_dir_all(folder)
        .and_then(|()| File::create_new(&probe))
        .and_then(|_| fs::remove_file(&probe));
    checked.with_context(|| format!("cannot write records into {}", folder.display()))
}

/// Writes a record into `folder` and prints its path to standard error: standard output may hold
/// JSON.
pub(super) fn keep(record: &Record, folder: &Path) -> anyhow::Result<()> {
    let path = record
        .write(folder)
        .with_context(|| format!("cannot write a record into {}", folder.display()))?;
    print::note(format_args!("recorded in {}", path.display()));
    Ok(())
}
