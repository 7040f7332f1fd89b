//! `afterimage bench ab`: two servers measured in turn, so that a disturbance affects both.

use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};

use afterimage_bench::compare::within;
use afterimage_bench::record::{Machine, Record, Run};
use anyhow::bail;

use super::load::{LoadArgs, address};
use super::{Interrupts, compare, output};
use crate::print::say;

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// First server, in the form of TARGET of `afterimage bench`
    #[arg(value_name = "A")]
    a: String,

    /// Second server, compared with the first
    #[arg(value_name = "B")]
    b: String,

    /// Measurements of each server; below 6 there is no confidence interval
    #[arg(long, value_name = "N", default_value = "10")]
    rounds: NonZeroUsize,

    /// Write the runs into this folder as one record, for `bench compare` and `bench report`
    #[arg(long, value_name = "DIR")]
    record: Option<PathBuf>,

    /// Name of the record, part of its file name
    #[arg(long, value_name = "NAME", default_value = "ab")]
    record_name: String,

    #[command(flatten)]
    load: LoadArgs,
}

pub(crate) fn run(args: &Args) -> anyhow::Result<()> {
    if let Some(folder) = &args.record {
        output::check_folder(folder)?;
    }
    let machine = Machine::here();
    let (a, b) = (address(&args.a)?, address(&args.b)?);
    let mut plans = Vec::new();
    for (name, address) in [("A", &a), ("B", &b)] {
        let (plan, spec) = args.load.plan(address)?;
        if spec.depths().len() > 1 {
            bail!("--depth has {} values; `bench ab` takes one", spec.depths().len());
        }
        plans.push((name, plan));
    }
    let interrupts = Interrupts::watch()?;
    plans.iter_mut().for_each(|(_, plan)| plan.cancel = interrupts.cancel());
    // Both must give the same answers, so they share the table of expected answers.
    let target = plans[0].1.target.clone();
    if args.load.spec()?.images.is_none() && plans[1].1.dialect == plans[0].1.dialect {
        plans[1].1.target = target;
    }
    let mut runs = Vec::new();
    'rounds: for round in 1..=args.rounds.get() {
        for (name, plan) in &mut plans {
            let report = super::measure(plan, &format!("{name}, round {round}: "))?;
            plan.prefill = false;
            if report.interrupted {
                break 'rounds;
            }
            let problems = report.problems();
            if !problems.is_empty() {
                bail!("{name}, round {round}: {}", problems.join("; "));
            }
            runs.push(Run { name: (*name).into(), report });
        }
        // The order alternates, so that neither service always runs after a pause.
        plans.reverse();
    }
    // An interrupted round does not count.
    let rounds = runs.len() / 2;
    runs.truncate(2 * rounds);
    if let (0, Some(interrupted)) = (rounds, interrupts.happened()) {
        return Err(interrupted.into());
    }
    say!("A: {a}\nB: {b}\n{rounds} rounds\n")?;
    let record = Record::new(&args.record_name, Path::new("."), machine, runs);
    compare::show(&within(&record).unwrap_or_default())?;
    if let Some(folder) = &args.record {
        output::keep(&record, folder)?;
    }
    interrupts.happened().map_or(Ok(()), |interrupted| Err(interrupted.into()))
}
