//! `afterimage bench ab`: two services measured in turn, so that what disturbs the machine disturbs
//! both.

use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};

use afterimage_bench::compare::within;
use afterimage_bench::record::{Machine, Record, Run};
use anyhow::bail;

use super::load::{LoadArgs, Place};
use super::{compare, output};
use crate::print::say;

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The one service, as `afterimage bench` takes it.
    #[arg(value_name = "A")]
    a: String,

    /// The other: better or worse than the first?
    #[arg(value_name = "B")]
    b: String,

    /// How often each is measured, in turn; below 6 there is no confidence interval.
    #[arg(long, value_name = "N", default_value = "10")]
    rounds: NonZeroUsize,

    /// Write the runs into this folder as one record, for `bench compare` and `bench report`.
    #[arg(long, value_name = "DIR")]
    record: Option<PathBuf>,

    /// What the record is about, in a word; part of its file's name.
    #[arg(long, value_name = "NAME", default_value = "ab")]
    record_name: String,

    #[command(flatten)]
    load: LoadArgs,
}

pub(crate) fn run(args: &Args) -> anyhow::Result<()> {
    let machine = Machine::here();
    let mut plans = Vec::new();
    for (name, place) in [("A", &args.a), ("B", &args.b)] {
        let (plan, spec) = args.load.plan(Place::parse(place)?)?;
        if spec.depths().len() > 1 {
            bail!("one depth at a time: --depth has {}", spec.depths().len());
        }
        plans.push((name, plan));
    }
    // Answers are checked against each other, where both answer alike.
    let target = plans[0].1.target.clone();
    if args.load.spec()?.images.is_none() && plans[1].1.dialect == plans[0].1.dialect {
        plans[1].1.target = target;
    }
    let mut runs = Vec::new();
    for round in 1..=args.rounds.get() {
        for (name, plan) in &mut plans {
            let report = super::measure(plan, &format!("{name}, round {round}: "))?;
            plan.prefill = false;
            let problems = report.problems();
            if !problems.is_empty() {
                bail!("{name}, round {round}: {}", problems.join("; "));
            }
            runs.push(Run { name: (*name).into(), report });
        }
        // Who goes first changes, or it would be one of them that always comes after a rest.
        plans.reverse();
    }
    say!("A: {}\nB: {}\n{} rounds\n", args.a, args.b, args.rounds)?;
    let record = Record::new(&args.record_name, Path::new("."), machine, runs);
    compare::show(&within(&record).unwrap_or_default())?;
    if let Some(folder) = &args.record {
        output::keep(&record, folder)?;
    }
    Ok(())
}
