//! `afterimage bench compare`: the runs of records laid over one another.

use std::path::PathBuf;

use afterimage_bench::compare::{Comparison, METRICS, by_name};
use afterimage_bench::record::{Record, Run};
use anyhow::{Context, bail, ensure};

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Two records, made with `bench --repeat N --record DIR`; or one that `bench ab` has made, whose two
    /// services were measured in turn.
    #[arg(value_name = "RECORD", required = true, num_args = 1..=2)]
    records: Vec<PathBuf>,
}

pub(crate) fn run(args: &Args) -> anyhow::Result<()> {
    let read = |path: &PathBuf| {
        Record::read(path).with_context(|| format!("cannot read the record {}", path.display()))
    };
    match &args.records[..] {
        [one] => within(read(one)?, &one.display().to_string()),
        [a, b] => {
            println!("A: {}\nB: {}", a.display(), b.display());
            between(&read(a)?, &read(b)?)
        }
        _ => bail!("one record or two"),
    }
}

/// Compares the two services of one record.
fn within(record: Record, file: &str) -> anyhow::Result<()> {
    let names: Vec<String> =
        by_name(&record.runs).iter().map(|(name, _)| (*name).to_owned()).collect();
    let [a, b] = &names[..] else {
        bail!("{file} has runs of {} names; a comparison needs two", names.len());
    };
    // Pairs, if they were measured in turn.
    let (rounds, rest) = record.runs.as_chunks::<2>();
    let paired = rest.is_empty() && rounds.iter().all(|[one, other]| one.name != other.name);
    println!("A: {a}\nB: {b}\n");
    show(&all_metrics(&record.runs, (a, b), paired))
}

/// Compares the runs that have the same names in both, or the only ones that each has.
fn between(a: &Record, b: &Record) -> anyhow::Result<()> {
    let (ours, theirs) = (by_name(&a.runs), by_name(&b.runs));
    let single = ours.len() == 1 && theirs.len() == 1;
    let mut any = false;
    for (name, first) in &ours {
        let other = theirs.iter().find(|(other, _)| single || other == name);
        let Some((_, second)) = other else { continue };
        any = true;
        println!("\n{name} ({} and {} repeats)", first.len(), second.len());
        let all =
            METRICS.iter().filter_map(|&metric| Comparison::new(metric, first, second, false));
        show(&all.collect::<Vec<_>>())?;
    }
    ensure!(any, "the two records have no run of the same name");
    Ok(())
}

fn show(comparisons: &[Comparison]) -> anyhow::Result<()> {
    ensure!(!comparisons.is_empty(), "the runs have no figures to compare");
    println!("{:<11}{:>14}{:>14}{:>10}", "", "A, median", "B, median", "B over A");
    for comparison in comparisons {
        println!("{comparison}");
    }
    Ok(())
}

/// All figures of the runs with these two names.
pub(super) fn all_metrics(runs: &[Run], names: (&str, &str), paired: bool) -> Vec<Comparison> {
    let of = |name: &str| runs.iter().filter(|run| run.name == name).collect::<Vec<_>>();
    let (first, second) = (of(names.0), of(names.1));
    METRICS.iter().filter_map(|&metric| Comparison::new(metric, &first, &second, paired)).collect()
}
