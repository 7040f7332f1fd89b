//! `afterimage bench`: load and measurement of a running server.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};
use std::{fmt, thread};

use afterimage_bench::format::number;
use afterimage_bench::record::{Machine, Record, Run};
use afterimage_bench::{Cancel, Plan, Progress, Report, Span};
use anyhow::{Context, bail};
pub(crate) use load::mnist;
use tokio::signal::unix::{Signal, SignalKind, signal};

use crate::print::say;
use crate::progress::Bar;

mod ab;
mod compare;
mod find_max;
mod load;
mod output;
mod report;

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

Ctrl-C and SIGTERM end the measurement early: the figures until then are printed and written.";

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
            say!("{report}")?;
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

/// Exit codes: 128 plus the number of the signal, as shells do.
const SIGINT: u8 = 128 + 2;
const SIGTERM: u8 = 128 + 15;

/// The error of a command that a signal has ended early.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Interrupted {
    /// The exit code.
    pub(crate) code: u8,
}

impl fmt::Display for Interrupted {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = if self.code == SIGINT { "Ctrl-C" } else { "SIGTERM" };
        write!(f, "interrupted by {name}; the figures cover the time until then")
    }
}

impl std::error::Error for Interrupted {}

/// The signals since its creation. The first one cancels the runs, the second ends the process.
#[derive(Clone, Debug)]
pub(crate) struct Interrupts {
    code: Arc<AtomicU8>,
    cancel: Cancel,
}

impl Interrupts {
    /// Takes over both signals of this process.
    pub(crate) fn watch() -> anyhow::Result<Self> {
        let interrupts = Interrupts { code: Arc::new(AtomicU8::new(0)), cancel: Cancel::default() };
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_io()
            .build()
            .context("cannot watch for signals")?;
        let (mut int, mut term) = {
            let _guard = runtime.enter();
            let watched = |kind| signal(kind).context("cannot watch for signals");
            (watched(SignalKind::interrupt())?, watched(SignalKind::terminate())?)
        };
        let theirs = interrupts.clone();
        thread::spawn(move || {
            runtime.block_on(async {
                let first = either(&mut int, &mut term).await;
                theirs.code.store(first, Ordering::Relaxed);
                theirs.cancel.cancel();
                std::process::exit(either(&mut int, &mut term).await.into());
            });
        });
        Ok(interrupts)
    }

    /// The value that ends runs early.
    pub(crate) fn cancel(&self) -> Cancel {
        self.cancel.clone()
    }

    /// The error of an interrupted command; `None` while there was no signal.
    pub(crate) fn happened(&self) -> Option<Interrupted> {
        match self.code.load(Ordering::Relaxed) {
            0 => None,
            code => Some(Interrupted { code }),
        }
    }
}

async fn either(int: &mut Signal, term: &mut Signal) -> u8 {
    tokio::select! {
        _ = int.recv() => SIGINT,
        _ = term.recv() => SIGTERM,
    }
}
