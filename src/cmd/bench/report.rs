//! `afterimage bench report`: the runs of records as a page with plots.

use std::io::Write;
use std::path::PathBuf;

use afterimage_bench::html;
use afterimage_bench::record::Record;
use anyhow::Context;

use super::output;
use crate::print::say;

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The records; their runs are laid over one another.
    #[arg(value_name = "RECORD", required = true)]
    records: Vec<PathBuf>,

    /// Where to write the page. It needs nothing but itself.
    #[arg(long, value_name = "FILE", default_value = "report.html")]
    html: PathBuf,

    /// The page's title.
    #[arg(long, value_name = "TEXT", default_value = "Afterimage bench")]
    title: String,
}

pub(crate) fn run(args: &Args) -> anyhow::Result<()> {
    let read = |path: &PathBuf| {
        Record::read(path).with_context(|| format!("cannot read the record {}", path.display()))
    };
    let records: Vec<Record> = args.records.iter().map(read).collect::<anyhow::Result<_>>()?;
    let page = html::page(&args.title, &records);
    output::write(&args.html, |out| out.write_all(page.as_bytes()))?;
    say!("{}", args.html.display())
}
