//! `afterimage bench find-max`: the highest request rate that meets a latency goal.

use std::num::NonZeroU32;
use std::time::Duration;

use afterimage_bench::format::{duration, number};
use afterimage_bench::search::{Search, SearchResult};
use afterimage_bench::threshold::{Metric, Threshold};
use afterimage_bench::workload::Spec;
use afterimage_bench::workload::spec::Spacing;
use afterimage_bench::{Arrivals, MAX_RATE, Mode, Report, Span};
use anyhow::{bail, ensure};

use super::Interrupts;
use super::load::{LoadArgs, TargetArgs};
use crate::args::Time;
use crate::print::say;

/// The default depth: deep enough that the schedule limits the load, and not the window.
const DEPTH: usize = 4096;

/// The default length of a try.
const TRY: Duration = Duration::from_secs(2);

/// The share of a rate that must be completed, with any latencies.
const KEPT: f64 = 0.98;

/// The share of the p99 goal that the generator's own delay may take. With more, a try says
/// nothing about the server.
const OWN_SHARE: f64 = 0.5;

#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  afterimage bench find-max 127.0.0.1:7400 --p99 1ms
  afterimage bench find-max 127.0.0.1:7400 --fail-if 'p99.9>5ms' --budget 5m")]
pub(crate) struct Args {
    #[command(flatten)]
    target: TargetArgs,

    /// Goal: the 99th percentile of the latency from the due time
    #[arg(long, value_name = "TIME", default_value = "1ms")]
    p99: Time,

    /// Another limit, for example 'p99.9>2ms'. May be given several times
    #[arg(long, value_name = "THRESHOLD")]
    fail_if: Vec<Threshold>,

    /// First rate to try, in requests per second
    #[arg(long, value_name = "N", default_value_t = 1000.0)]
    start: f64,

    /// End the search when the rate is known to this share
    #[arg(long, value_name = "SHARE", default_value_t = 0.05)]
    precision: f64,

    /// Number of repetitions in which the found rate must meet the goal
    #[arg(long, value_name = "N", default_value = "3")]
    confirm: NonZeroU32,

    /// Time limit of the search
    #[arg(long, value_name = "TIME", default_value = "2m")]
    budget: Time,

    #[command(flatten)]
    load: LoadArgs,
}

pub(crate) fn run(args: &Args) -> anyhow::Result<()> {
    let start = args.start;
    ensure!(
        start > 0.0 && start <= MAX_RATE,
        "--start is {start}; it must be above 0 and at most {MAX_RATE}"
    );
    let precise = (0.001..=0.5).contains(&args.precision);
    ensure!(precise, "--precision is {}; it must be from 0.001 to 0.5", args.precision);
    let spec = args.load.spec()?;
    ensure!(spec.rate.is_none(), "find-max searches for the rate; remove --rate");
    let spec = Spec { rate: Some(start), ..spec };
    let (mut plan, spec) = args.load.plan_for(&args.target.address()?, spec)?;
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
    let interrupts = Interrupts::watch()?;
    plan.cancel = interrupts.cancel();
    say!("{:>14}{:>14}{:>12}{:>12}  ", "due/s", "done/s", "p50", "p99")?;
    let search = Search {
        start,
        precision: args.precision,
        confirmations: args.confirm.get(),
        budget: args.budget.0,
    };
    let (mut best, mut late) = (None::<f64>, Late::default());
    let found = search.run(&mut |rate| {
        plan.mode = Mode::Open { rate, arrivals };
        let report = super::measure(&plan, &format!("{} due/s: ", number(rate)))?;
        plan.prefill = false;
        if let Some(interrupted) = interrupts.happened() {
            return Err(interrupted.into());
        }
        let broken = broken(&report, rate, &goals);
        let latency = report.latency_from_due;
        let (p50, p99) = (duration(latency.p50_ns), duration(latency.p99_ns));
        let verdict = match &broken {
            None => "holds".to_owned(),
            Some(broken) => format!("{broken}{}", late.note(&report, args.p99.0)),
        };
        let (due, done) = (number(rate), number(report.throughput_per_s));
        say!("{due:>14}{done:>14}{p50:>12}{p99:>12}  {verdict}")?;
        if broken.is_none() {
            best = Some(best.map_or(rate, |best| best.max(rate)));
        }
        anyhow::Ok(broken.is_none())
    });
    if interrupts.happened().is_some() {
        match best {
            Some(rate) => {
                say!("\ninterrupted: {} requests/s met the goal, not confirmed", number(rate))?
            }
            None => say!("\ninterrupted: no rate has met the goal yet")?,
        }
    }
    let found = found?;
    let concluded = conclude(&found, args);
    if late.tries > 0 {
        say!("{late}")?;
    }
    concluded
}

/// The failed tries in which the load generator itself was late.
#[derive(Debug, Default)]
struct Late {
    tries: u32,
    longest_ns: u64,
}

impl Late {
    /// Counts a failed try, and reports a late generator.
    fn note(&mut self, report: &Report, goal: Duration) -> String {
        let late_ns = report.generator.late_p99_ns;
        if (late_ns as f64) < goal.as_nanos() as f64 * OWN_SHARE {
            return String::new();
        }
        self.tries += 1;
        self.longest_ns = self.longest_ns.max(late_ns);
        format!("; the load generator itself was late by {}", duration(late_ns))
    }
}

impl std::fmt::Display for Late {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Late { tries, longest_ns } = self;
        let times = if *tries == 1 { "try" } else { "tries" };
        write!(
            f,
            "the load generator itself was late by up to {} (p99) in {tries} failed {times}: this machine is \
             too busy, and the server may hold a higher rate",
            duration(*longest_ns)
        )
    }
}

/// Why a run does not hold its rate or a goal; `None` if it does.
fn broken(report: &Report, rate: f64, goals: &[&Threshold]) -> Option<String> {
    let problems = report.problems();
    if !problems.is_empty() {
        return Some(problems.join("; "));
    }
    if let Some(broken) = goals.iter().find_map(|goal| goal.broken_by(report)) {
        return Some(broken);
    }
    // A Poisson process brings more or less than its rate; the requests that arrived count.
    let due = (report.sent as f64 / report.measured_s).min(rate);
    let done = report.throughput_per_s;
    (done < KEPT * due)
        .then(|| format!("only {} of {} requests/s were completed", number(done), number(due)))
}

/// Prints the result, and whether it was confirmed.
fn conclude(found: &SearchResult, args: &Args) -> anyhow::Result<()> {
    let Some(rate) = found.rate else {
        bail!("no rate met the goal in {} tries", found.tries);
    };
    let goal = humantime::format_duration(args.p99.0);
    let extent = match found.failed {
        Some(failed) => format!("{} did not hold", number(failed)),
        None => "no rate was too high".into(),
    };
    say!("\nhighest rate with p99 ≤ {goal}: {} requests/s ({extent})", number(rate))?;
    if !found.confirmed {
        let budget = humantime::format_duration(args.budget.0);
        bail!("the rate was not confirmed within --budget {budget}");
    }
    say!("met the goal {} times in a row", args.confirm)?;
    Ok(())
}
