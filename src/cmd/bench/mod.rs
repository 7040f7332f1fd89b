//! `afterimage bench`: load and measurement of a running server.

mod ab;
mod compare;
mod find_max;
mod interrupt;
mod load;
mod output;
mod report;

use std::path::Path;

use afterimage_bench::format::number;
use afterimage_bench::record::{Machine, Record, Run};
use afterimage_bench::{Plan, Progress, Report, Span};
use anyhow::bail;

use crate::print::say;
use crate::progress::Bar;

pub(crate) use interrupt::Interrupted;
use interrupt::Interrupts;
pub(crate) use load::mnist;
pub(crate) use output::OutFile;

#[derive(Debug, clap::Args)]
#[command(args_conflicts_with_subcommands = true, after_help = EXAMPLES)]
pub(crate) struct Args {
    #[command(subcommand)]
    command: Option<Command>,

    #[command(flatten)]
    target: load::TargetArgs,

    #[command(flatten)]
    load: load::LoadArgs,

    #[command(flatten)]
    output: output::OutputArgs,
}

const EXAMPLES: &str = "\
Examples:
  afterimage bench 127.0.0.1:7400 --depth 1,64,1024 --html run.html
  afterimage bench --target redis://127.0.0.1:6379 --prefill --read-share 0.9 --zipf 1
  afterimage bench http://127.0.0.1:8080/v2/models/resnet --depth 1,16
  afterimage bench 127.0.0.1:7400 --rate 50000 --poisson --fail-if 'p99>1ms' --fail-if 'errors>0'
  afterimage bench find-max 127.0.0.1:7400 --p99 1ms
  afterimage bench ab 127.0.0.1:7400 127.0.0.1:7500 --depth 64 --record results

Ctrl-C, SIGTERM, SIGQUIT and SIGHUP end the measurement early: the figures until then are printed
and written.";

#[derive(Debug, clap::Subcommand)]
enum Command {
    /// Find the highest request rate that meets a latency goal
    FindMax(find_max::Args),
    /// Measure two servers in turn and compare them
    Ab(ab::Args),
    /// Compare two records, with confidence intervals
    Compare(compare::Args),
    /// Write an HTML page with plots of records
    Report(report::Args),
}

pub(crate) fn run(args: Args) -> anyhow::Result<()> {
    match args.command {
        Some(Command::FindMax(args)) => return find_max::run(&args),
        Some(Command::Ab(args)) => return ab::run(&args),
        Some(Command::Compare(args)) => return compare::run(&args),
        Some(Command::Report(args)) => return report::run(&args),
        None => {}
    }
    let files = args.output.open()?;
    let (mut plan, spec) = args.load.plan(&args.target.address()?)?;
    let interrupts = Interrupts::watch()?;
    plan.cancel = interrupts.cancel();
    let machine = Machine::here();
    let mut runs: Vec<Run> = Vec::new();
    let depths = spec.depths().iter().flat_map(|&depth| vec![depth; args.output.repeats()]);
    for depth in depths {
        plan.depth = depth;
        let report = measure(&plan, "")?;
        // The first run has written or asked about all of the population.
        plan.prefill = false;
        if report.interrupted && report.measured_s == 0.0 {
            break;
        }
        if !args.output.json() {
            let printed = say!("{report}");
            // After SIGHUP the terminal is closed, and the files are still to be written.
            if !report.interrupted {
                printed?;
            }
        }
        let is_interrupted = report.interrupted;
        let name = match (spec.rate, spec.depths().len()) {
            (Some(rate), 1) => format!("{rate} due/s"),
            (Some(rate), _) => format!("{rate} due/s, depth {depth}"),
            (None, _) => format!("depth {depth}"),
        };
        runs.push(Run { name, report });
        if is_interrupted {
            break;
        }
    }
    if runs.is_empty() {
        // Cancelled before the measurement: there are no figures.
        return interrupts.happened().map_or(Ok(()), |interrupted| Err(interrupted.into()));
    }
    let problems = problems(&runs, &args.output);
    let record = Record::new(args.output.record_name(), Path::new("."), machine, runs);
    files.write(&record)?;
    if let Some(interrupted) = interrupts.happened() {
        return Err(interrupted.into());
    }
    match &problems[..] {
        [] => Ok(()),
        problems => bail!("{}", problems.join("; ")),
    }
}

/// The problems of these runs, and the limits they broke.
fn problems(runs: &[Run], output: &output::OutputArgs) -> Vec<String> {
    let of = |run: &Run| {
        let broken = output.thresholds().filter_map(|limit| limit.broken_by(&run.report));
        run.report.problems().into_iter().chain(broken).collect::<Vec<_>>()
    };
    let several = runs.len() > 1;
    let named = |run: &Run, problem| match several {
        true => format!("{}: {problem}", run.name),
        false => problem,
    };
    runs.iter().flat_map(|run| of(run).into_iter().map(|it| named(run, it))).collect()
}

/// Runs a plan with a progress bar that begins with `heading`.
pub(crate) fn measure(plan: &Plan, heading: &str) -> anyhow::Result<Report> {
    let bar = Bar::new(0);
    let report = afterimage_bench::run(plan, &mut |progress: Progress| {
        let (done, steps) = match plan.stop {
            Span::Requests(count) => (progress.answered, count),
            Span::Time(time) => {
                let warmup = match plan.warmup {
                    Span::Time(time) => time,
                    Span::Requests(_) => std::time::Duration::ZERO,
                };
                (progress.elapsed.as_secs(), (warmup + time).as_secs())
            }
        };
        let phase = if progress.measuring { "" } else { ", warming up" };
        let wrong = match progress.wrong {
            0 => String::new(),
            wrong => format!(", {wrong} wrong"),
        };
        let line = format!("{heading}{} answers/s{phase}{wrong}", number(progress.rate));
        bar.set(&line, done.min(steps), steps);
    });
    Ok(report?)
}
