//! `afterimage bench find-max`: the highest rate that still holds a goal.

use std::num::NonZeroU32;
use std::time::Duration;

use afterimage_bench::search::{Found, Search};
use afterimage_bench::threshold::{Metric, Threshold};
use afterimage_bench::workload::Spec;
use afterimage_bench::workload::spec::Spacing;
use afterimage_bench::{Arrivals, Mode, Report, Span};
use anyhow::{bail, ensure};

use super::load::{LoadArgs, TargetArgs};
use crate::args::Time;
use crate::print::say;

/// Requests in flight at most, unless --depth says otherwise: the schedule decides, not the window.
const DEPTH: usize = 4096;

/// How long a rate is tried, unless --duration says otherwise.
const TRY: Duration = Duration::from_secs(2);

/// A rate of which less is done counts as not held, whatever the latencies say.
const KEPT: f64 = 0.98;

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    target: TargetArgs,

    /// 99 % of the answers take no longer than this, from the moment their requests were due.
    #[arg(long, value_name = "TIME", default_value = "1ms")]
    p99: Time,

    /// Another goal: what must not be true, p99.9>2ms, say. May be given several times.
    #[arg(long, value_name = "THRESHOLD")]
    fail_if: Vec<Threshold>,

    /// The rate to try first, a second.
    #[arg(long, value_name = "N", default_value_t = 1000.0)]
    start: f64,

    /// How close to come, as a share of the rate.
    #[arg(long, value_name = "SHARE", default_value_t = 0.05)]
    precision: f64,

    /// How often the rate found must hold again, in a row.
    #[arg(long, value_name = "N", default_value = "3")]
    confirm: NonZeroU32,

    /// How long to search at most.
    #[arg(long, value_name = "TIME", default_value = "2m")]
    budget: Time,

    #[command(flatten)]
    load: LoadArgs,
}

pub(crate) fn run(args: &Args) -> anyhow::Result<()> {
    ensure!(args.start.is_finite() && args.start > 0.0, "--start is {}; above 0", args.start);
    let precise = (0.001..=0.5).contains(&args.precision);
    ensure!(precise, "--precision is {}; from 0.001 to 0.5", args.precision);
    let spec = args.load.spec()?;
    ensure!(spec.rate.is_none(), "find-max looks for the rate; leave --rate away");
    let spec = Spec { rate: Some(args.start), ..spec };
    let (mut plan, spec) = args.load.plan_for(args.target.place()?, spec)?;
    let goal = Threshold::latency_above(Metric::P99, args.p99.0);
    let goals: Vec<&Threshold> = std::iter::once(&goal).chain(&args.fail_if).collect();
    plan.depth = spec.depth.as_ref().map_or(DEPTH, |_| plan.depth);
    plan.stop = match (spec.duration, spec.count) {
        (None, None) => Span::Time(TRY),
        _ => plan.stop,
    };
    let arrivals = match spec.arrivals {
        Some(Spacing::Constant) => Arrivals::Constant,
        Some(Spacing::Poisson) | None => Arrivals::Poisson,
    };
    say!("{:>14}{:>14}{:>12}{:>12}  ", "due/s", "done/s", "p50", "p99")?;
    let search = Search {
        start: args.start,
        precision: args.precision,
        confirmations: args.confirm.get(),
        budget: args.budget.0,
    };
    let found = search.run(&mut |rate| {
        plan.mode = Mode::Open { rate, arrivals };
        let report = super::measure(&plan, &format!("{rate:.0} due/s: "))?;
        plan.prefill = false;
        let broken = broken(&report, rate, &goals);
        let latency = |ns: u64| format!("{:.1} µs", ns as f64 / 1e3);
        let (p50, p99) = (report.latency_from_due.p50_ns, report.latency_from_due.p99_ns);
        let verdict = broken.as_deref().unwrap_or("holds");
        let (p50, p99, done) = (latency(p50), latency(p99), report.throughput_per_s);
        say!("{rate:>14.0}{done:>14.0}{p50:>12}{p99:>12}  {verdict}")?;
        anyhow::Ok(broken.is_none())
    })?;
    conclude(&found, args)
}

/// Why a run does not hold its rate or a goal, if it does not.
fn broken(report: &Report, rate: f64, goals: &[&Threshold]) -> Option<String> {
    let problems = report.problems();
    if !problems.is_empty() {
        return Some(problems.join("; "));
    }
    if let Some(broken) = goals.iter().find_map(|goal| goal.broken_by(report)) {
        return Some(broken);
    }
    // A Poisson process brings more or less than its rate; the requests that came count.
    let due = (report.sent as f64 / report.measured_s).min(rate);
    let done = report.throughput_per_s;
    (done < KEPT * due).then(|| format!("only {done:.0} of {due:.0} requests a second were done"))
}

/// Says what came out, and whether it was confirmed.
fn conclude(found: &Found, args: &Args) -> anyhow::Result<()> {
    let Some(rate) = found.rate else {
        bail!("no rate held the goal, in {} tries", found.tries);
    };
    let goal = humantime::format_duration(args.p99.0);
    let extent = match found.failed {
        Some(failed) => format!("{failed:.0} did not hold"),
        None => "no rate tried was too high".into(),
    };
    say!("\nhighest rate with p99 ≤ {goal}: {rate:.0} requests/s ({extent})")?;
    if !found.confirmed {
        let budget = humantime::format_duration(args.budget.0);
        bail!("--budget {budget} was used up before that was confirmed");
    }
    say!("held {} times in a row", args.confirm)?;
    Ok(())
}
