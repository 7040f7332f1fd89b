//! `afterimage bench report`: a page with plots of records.

use std::collections::HashSet;
use std::io::Write;
use std::path::PathBuf;

use afterimage_bench::html::{self, Source};
use afterimage_bench::record::Record;
use anyhow::Context;

use super::output::OutFile;
use crate::print::say;

#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  afterimage bench report results/2026-01-31-bench.json
  afterimage bench report before.json after.json --html comparison.html --title 'Two versions'")]
pub(crate) struct Args {
    /// Records to show; each plot has the runs of all
    #[arg(value_name = "RECORD", required = true)]
    records: Vec<PathBuf>,

    /// File for the page, which needs no other file
    #[arg(long, value_name = "FILE", default_value = "report.html")]
    html: PathBuf,

    /// Title of the page
    #[arg(long, value_name = "TEXT", default_value = "Afterimage bench")]
    title: String,
}

pub(crate) fn run(args: &Args) -> anyhow::Result<()> {
    let read = |path: &PathBuf| {
        Record::read(path).with_context(|| format!("cannot read the record {}", path.display()))
    };
    let records: Vec<Record> = args.records.iter().map(read).collect::<anyhow::Result<_>>()?;
    let names = names(&args.records);
    let sources = names.iter().zip(&records);
    let sources: Vec<_> = sources.map(|(name, record)| Source::new(name, record)).collect();
    let page = html::page(&args.title, &sources);
    OutFile::open(&args.html)?.write(|out| out.write_all(page.as_bytes()))?;
    say!("{}", args.html.display())
}

/// The names of files without folder and extension, or whole paths where two of these are equal.
fn names(paths: &[PathBuf]) -> Vec<String> {
    let stem = |path: &PathBuf| path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
    let stems: Vec<String> = paths.iter().map(stem).collect();
    let is_unique = stems.iter().collect::<HashSet<_>>().len() == stems.len();
    if is_unique { stems } else { paths.iter().map(|path| path.display().to_string()).collect() }
}
