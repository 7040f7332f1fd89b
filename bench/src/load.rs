//! A run: connections spread over threads, and progress reports.

use std::sync::Barrier;
use std::sync::atomic::Ordering;
use std::thread;
use std::time::{Duration, Instant};

use afterimage_wire::proto::{Role, Welcome};

use crate::address::{Introduction, Peer};
use crate::connection::Connection;
use crate::error::BenchError;
use crate::plan::{Plan, Target};
use crate::report::Report;
use crate::tally::Tally;
use crate::worker::{Crew, Live, work};
use crate::workload::{Fresh, Pattern};

/// The interval of progress reports.
const PROGRESS_EVERY: Duration = Duration::from_millis(250);

/// The progress of a run.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Progress {
    /// Since the run began, warm-up included.
    pub elapsed: Duration,
    /// Whether the measurement has begun.
    pub measuring: bool,
    /// Requests of this run that were answered, errors included; starts again at 0 when the
    /// measurement begins.
    pub answered: u64,
    /// Answers a second since the last progress report.
    pub rate: f64,
    /// Answers so far that were wrong or belonged to no request.
    pub wrong: u64,
}

/// The kind of service at an address; `None` for servers of other dialects.
///
/// # Errors
/// [`BenchError::Connect`], `Refused` or `Protocol` when the server does not answer in this
/// dialect.
pub fn greet(peer: Peer<'_>) -> Result<Option<Role>, BenchError> {
    match Connection::open(peer)?.1 {
        Introduction::Welcome(welcome) => Ok(Some(welcome.service)),
        Introduction::Name(_) | Introduction::Model(_) => Ok(None),
    }
}

/// Asks an HTTP server for the document that describes its model, at `path`.
///
/// # Errors
/// [`BenchError::Connect`], `Refused` or `Protocol` if the server does not send it.
pub fn describe(peer: Peer<'_>, host: &str, path: &str) -> Result<Vec<u8>, BenchError> {
    let (mut connection, _) = Connection::open(peer)?;
    connection.get(peer.addr, host, path)
}

/// Executes a plan and calls `progress` a few times per second.
///
/// Blocks until the run ends. A server that stops answering or closes its connections ends the run
/// early; see [`Report::problems`].
///
/// # Errors
/// [`BenchError::Plan`] for an invalid plan; `Connect`, `Refused`, `Protocol`, `Service` and
/// `Shape` when the server does not fit the plan; `Pin` for a missing CPU; [`BenchError::Wrong`],
/// with the report inside, when an answer was wrong.
pub fn run(plan: &Plan, progress: &mut dyn FnMut(Progress)) -> Result<Report, BenchError> {
    let plan = &plan.spread();
    plan.validate().map_err(|what| BenchError::Plan { what })?;
    let pattern = &Pattern::new(plan.access, plan.subjects())
        .ok_or_else(|| BenchError::Plan { what: format!("no order is {:?}", plan.access) })?;
    let epoch = Instant::now();
    let mut server = None;
    let mut shares: Vec<Vec<(u32, Connection)>> = (0..plan.threads).map(|_| Vec::new()).collect();
    for lane in 0..plan.connections {
        let (connection, introduction) = Connection::open(plan.peer())?;
        if let Introduction::Welcome(welcome) = &introduction {
            check_welcome(plan, welcome)?;
        }
        server.get_or_insert(introduction);
        let lane_number = u32::try_from(lane).expect("connections are far fewer than 2³²");
        shares[lane % plan.threads].push((lane_number, connection));
    }
    let live: Vec<Live> = (0..plan.threads).map(|_| Live::default()).collect();
    let live = &live[..];
    let classes = match &server {
        Some(Introduction::Welcome(welcome)) => welcome.classes,
        _ => 0,
    };
    let barrier = Barrier::new(plan.threads);
    let crew = &Crew { plan, pattern, epoch, barrier, classes, nonce: Fresh::nonce() };
    let outcomes: Vec<_> = thread::scope(|scope| {
        let threads: Vec<_> = shares
            .into_iter()
            .enumerate()
            .map(|(number, share)| scope.spawn(move || work(crew, number, share, &live[number])))
            .collect();
        watch(epoch, live, progress, || threads.iter().all(|thread| thread.is_finished()));
        threads
            .into_iter()
            .map(|thread| thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
            .collect()
    });
    let mut tally = Tally::default();
    let mut uses = Vec::new();
    for outcome in outcomes {
        let (theirs, used) = outcome?;
        tally.add(theirs);
        uses.push(used);
    }
    let report = Report::new(plan, server, tally, uses);
    if report.wrong > 0 || report.unexpected > 0 {
        return Err(BenchError::Wrong(Box::new(report)));
    }
    Ok(report)
}

/// Passes on the threads' progress until they are done.
fn watch(
    epoch: Instant,
    live: &[Live],
    progress: &mut dyn FnMut(Progress),
    done: impl Fn() -> bool,
) {
    let (mut last, mut last_answered) = (Instant::now(), 0);
    while !done() {
        thread::sleep(Duration::from_millis(5));
        let since = last.elapsed();
        if since < PROGRESS_EVERY {
            continue;
        }
        let answered = live.iter().map(|live| live.answered.load(Ordering::Relaxed)).sum();
        progress(Progress {
            elapsed: epoch.elapsed(),
            measuring: live.iter().all(|live| live.measuring.load(Ordering::Relaxed)),
            answered,
            rate: answered.saturating_sub(last_answered) as f64 / since.as_secs_f64(),
            wrong: live.iter().map(|live| live.wrong.load(Ordering::Relaxed)).sum(),
        });
        (last, last_answered) = (Instant::now(), answered);
    }
}

fn check_welcome(plan: &Plan, welcome: &Welcome) -> Result<(), BenchError> {
    let (addr, service) = (plan.addr, welcome.service);
    let fits = match &plan.target {
        Target::Classify { .. } => service.classifies(),
        Target::Cache(_) => service == Role::Cache,
        Target::Call(_) => false,
    };
    if !fits {
        return Err(BenchError::Service { addr, service });
    }
    if let Target::Classify { population, .. } = &plan.target {
        let image_len = population.image_len();
        if welcome.shape.byte_len().is_some_and(|len| len != image_len) {
            let shape = welcome.shape.clone();
            return Err(BenchError::Shape { addr, shape, image_len });
        }
    }
    Ok(())
}
