//! `afterimage bench compare`: the comparison of two records.

use std::path::PathBuf;

use afterimage_bench::compare::{self, Comparison};
use afterimage_bench::record::Record;
use anyhow::{Context, bail, ensure};

use crate::print::say;

#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  afterimage bench compare before.json after.json
  afterimage bench compare results/2026-01-31-ab.json")]
pub(crate) struct Args {
    /// Two records of `bench --repeat N --record DIR`, or one record of `bench ab`
    #[arg(value_name = "RECORD", required = true, num_args = 1..=2)]
    records: Vec<PathBuf>,
}

pub(crate) fn run(args: &Args) -> anyhow::Result<()> {
    let read = |path: &PathBuf| {
        Record::read(path).with_context(|| format!("cannot read the record {}", path.display()))
    };
    match &args.records[..] {
        [one] => within(&read(one)?, &one.display().to_string()),
        [a, b] => {
            say!("A: {}\nB: {}", a.display(), b.display())?;
            between(&read(a)?, &read(b)?)
        }
        _ => bail!("expected one or two records"),
    }
}

/// Compares the two servers of one record.
fn within(record: &Record, file: &str) -> anyhow::Result<()> {
    let Some(comparisons) = compare::within(record) else {
        let names = compare::by_name(&record.runs).len();
        bail!("{file} has runs of {names} different names; a comparison needs two");
    };
    if let Some(Comparison { names: [a, b], .. }) = comparisons.first() {
        say!("A: {a}\nB: {b}\n")?;
    }
    show(&comparisons)
}

/// Compares the runs with equal names, or the only run of each record.
fn between(a: &Record, b: &Record) -> anyhow::Result<()> {
    let found = compare::between(a, b);
    ensure!(!found.is_empty(), "the two records have no run of the same name");
    for (name, comparisons) in found {
        let [a, b] = comparisons.first().map_or([0, 0], |comparison| comparison.repeats);
        say!("\n{name} ({a} and {b} repeats)")?;
        show(&comparisons)?;
    }
    Ok(())
}

/// Prints comparisons as a table.
pub(super) fn show(comparisons: &[Comparison]) -> anyhow::Result<()> {
    ensure!(!comparisons.is_empty(), "the runs have no figures to compare");
    say!("{:<11}{:>14}{:>14}{:>10}", "", "A, median", "B, median", "B over A")?;
    for comparison in comparisons {
        say!("{comparison}")?;
    }
    Ok(())
}
