//! A worker: pulls jobs, runs them, sends heartbeats beside them, and reports their ends.

use std::collections::HashMap;
use std::future::Future;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use afterimage_core::Status;
use afterimage_wire::Connection;
use bytes::Bytes;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use crate::client::{Client, JobsError, Pending, done};
use crate::engine::{Grant, Verdict};
use crate::job::{Outcome, Token};
use crate::message::{Beat, Request, Response};
use crate::{Code, Definition, JobId};

/// The longest time between two heartbeats.
const LONGEST_BEAT: Duration = Duration::from_secs(1);

/// The shortest time between two heartbeats.
const SHORTEST_BEAT: Duration = Duration::from_millis(30);

/// The pauses between attempts to reach the server.
const PAUSES: [Duration; 2] = [Duration::from_millis(100), Duration::from_secs(2)];

/// A future that a [`Handler`] returns.
pub type Running = Pin<Box<dyn Future<Output = Outcome> + Send>>;

/// The code of a definition. Implemented for closures from [`Task`] to a boxed future.
pub trait Handler: Send + Sync + 'static {
    /// Runs a job. It may be called for several jobs at once, and again for the same job after a
    /// lease was lost.
    fn run(&self, task: Task) -> Running;
}

impl<F: Fn(Task) -> Running + Send + Sync + 'static> Handler for F {
    fn run(&self, task: Task) -> Running {
        self(task)
    }
}

/// A function of bytes as a handler. It runs on a thread for blocking work.
pub fn function(
    run: impl Fn(&[u8]) -> Result<Vec<u8>, String> + Send + Sync + 'static,
) -> impl Handler {
    let run = Arc::new(run);
    move |task: Task| -> Running {
        let run = Arc::clone(&run);
        Box::pin(async move {
            match tokio::task::spawn_blocking(move || run(&task.input)).await {
                Ok(Ok(output)) => Outcome::Succeeded(output.into()),
                Ok(Err(error)) => Outcome::Failed { error, retry: true },
                Err(error) => Outcome::Failed { error: format!("panicked: {error}"), retry: true },
            }
        })
    }
}

/// A job to run.
#[derive(Clone, Debug)]
pub struct Task {
    /// The job.
    pub id: JobId,
    /// The number of the attempt, from 1.
    pub attempt: u32,
    /// The definition's name.
    pub definition: Arc<str>,
    /// The longest time of the attempt.
    pub deadline: Duration,
    /// The input.
    pub input: Bytes,
    /// Cancelled when the job was cancelled or the lease is lost: stop.
    pub stop: CancellationToken,
    /// Cancelled when less than a tenth of the time until the deadline is left.
    pub soon: CancellationToken,
    progress: Arc<Mutex<Bytes>>,
}

impl Task {
    /// Reports the state of the work, for people. The next heartbeat carries the newest report.
    pub fn report(&self, progress: impl Into<Bytes>) {
        *self.progress.lock().unwrap_or_else(PoisonError::into_inner) = progress.into();
    }
}

/// A worker with its handlers.
///
/// ```no_run
/// # async fn example() -> Result<(), Box<dyn std::error::Error>> {
/// use afterimage_jobs::worker::function;
/// use afterimage_jobs::{Code, Definition, Worker};
/// use afterimage_wire::{ClientOptions, Connection};
///
/// let upper = function(|input| Ok(input.to_ascii_uppercase()));
/// let worker = Worker::new("worker-1")
///     .concurrency(4)
///     .with(Definition::new("upper"), Code::of(&[b"upper 1"]), upper);
/// let connection = Connection::connect("127.0.0.1:7430", ClientOptions::new()).await?;
/// worker.run(connection, Default::default()).await?;
/// # Ok(()) }
/// ```
pub struct Worker {
    name: String,
    concurrency: u32,
    definitions: Vec<(Definition, Code)>,
    handlers: HashMap<String, Arc<dyn Handler>>,
}

impl std::fmt::Debug for Worker {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Worker").field("name", &self.name).finish_non_exhaustive()
    }
}

impl Worker {
    /// A worker with this name, which runs one job at a time.
    pub fn new(name: impl Into<String>) -> Self {
        let (definitions, handlers) = (Vec::new(), HashMap::new());
        Worker { name: name.into(), concurrency: 1, definitions, handlers }
    }

    /// Sets how many jobs run at once.
    #[must_use]
    pub fn concurrency(mut self, jobs: u32) -> Self {
        self.concurrency = jobs.max(1);
        self
    }

    /// Adds a definition. If the server does not have it, it is created with these limits. `code`
    /// identifies the handler: a change of it forgets the results.
    #[must_use]
    pub fn with(mut self, definition: Definition, code: Code, handler: impl Handler) -> Self {
        self.handlers.insert(definition.name.clone(), Arc::new(handler));
        self.definitions.push((definition, code));
        self
    }

    /// Works until `stop`, and then until the running jobs have ended. After a lost connection it
    /// connects again and keeps its jobs, if the server still knows their leases.
    ///
    /// # Errors
    /// If the server refuses the worker for good.
    pub async fn run(
        self,
        connection: Connection,
        stop: CancellationToken,
    ) -> Result<(), JobsError> {
        let (ended, mut ends) = mpsc::unbounded_channel();
        let mut working = Working { worker: self, jobs: HashMap::new(), ended, unsent: Vec::new() };
        let mut pause = PAUSES[0];
        loop {
            let session = working.session(&connection, &mut ends, &stop, &mut pause).await;
            let Err(error) = session else { return Ok(()) };
            let is_final = match &error {
                JobsError::Refused { status, .. } => !status.is_retryable(),
                JobsError::Call(error) => !error.is_retryable(),
                _ => false,
            };
            if is_final {
                return Err(error);
            }
            tracing::warn!(%error, "lost the server; connecting again");
            tokio::select! {
                () = tokio::time::sleep(pause) => {}
                () = stop.cancelled(), if working.jobs.is_empty() => return Ok(()),
            }
            pause = (pause * 2).min(PAUSES[1]);
        }
    }
}

/// A job that runs.
struct Job {
    token: Token,
    stop: CancellationToken,
    soon: CancellationToken,
    progress: Arc<Mutex<Bytes>>,
    /// The server has told the worker to stop: its end is not reported.
    is_lost: bool,
}

/// The state of a worker across connections.
struct Working {
    worker: Worker,
    jobs: HashMap<JobId, Job>,
    ended: mpsc::UnboundedSender<(JobId, Token, Outcome)>,
    /// Ends that the server has not confirmed.
    unsent: Vec<(JobId, Token, Outcome)>,
}

/// Ends of jobs, as their tasks report them.
type Ends = mpsc::UnboundedReceiver<(JobId, Token, Outcome)>;

impl Working {
    /// Works on one stream. Returns without an error when the worker has stopped.
    async fn session(
        &mut self,
        connection: &Connection,
        ends: &mut Ends,
        stop: &CancellationToken,
        pause: &mut Duration,
    ) -> Result<(), JobsError> {
        let (sender, mut grants) = mpsc::unbounded_channel();
        let client = Client::open_with(connection, Some(sender)).await?;
        let name = self.worker.name.clone();
        let definitions = self.worker.definitions.clone();
        done(client.send(&Request::Attach { name, definitions })).await?;
        *pause = PAUSES[0];
        // Before the credit: the server must know which leases are alive.
        let mut verdicts = Some(self.beat(&client));
        let mut confirmations = Confirmations::default();
        for (id, token, outcome) in std::mem::take(&mut self.unsent) {
            confirmations.add(&client, id, token, outcome);
        }
        if !stop.is_cancelled() {
            let busy = self.jobs.len() + confirmations.0.len();
            let jobs = self.worker.concurrency.saturating_sub(busy as u32);
            client.tell(&Request::Credit { jobs });
        }
        let lease = self.worker.definitions.iter().map(|(definition, _)| definition.lease).min();
        let every = (lease.unwrap_or(LONGEST_BEAT) / 4).clamp(SHORTEST_BEAT, LONGEST_BEAT);
        let mut beats = tokio::time::interval(every);
        let mut is_stopping = false;
        let outcome = loop {
            if stop.is_cancelled() && !is_stopping {
                is_stopping = true;
                client.tell(&Request::Drain {});
            }
            if is_stopping && self.jobs.is_empty() && confirmations.0.is_empty() {
                return Ok(());
            }
            tokio::select! {
                grant = grants.recv() => match grant {
                    Some(grant) => self.start(grant),
                    None => break Err(JobsError::Stream(afterimage_wire::stream::StreamError::Ended)),
                },
                ended = ends.recv() => {
                    let (id, token, outcome) = ended.expect("the worker holds a sender");
                    let is_current = |job: &Job| job.token == token && !job.is_lost;
                    let report = self.jobs.get(&id).is_some_and(is_current);
                    // The job may run again already, under another lease.
                    if self.jobs.get(&id).is_some_and(|job| job.token == token) {
                        self.jobs.remove(&id);
                    }
                    match report {
                        true => confirmations.add(&client, id, token, outcome),
                        false => client.tell(&Request::Credit { jobs: 1 }),
                    }
                }
                confirmed = confirmations.next() => match confirmed {
                    Err(JobsError::Refused { status: Status::BadArgument, text }) => {
                        tracing::warn!("{text}: its end is not recorded");
                    }
                    Err(error) => break Err(error),
                    Ok(()) => {}
                },
                response = verdict(&mut verdicts) => {
                    verdicts = None;
                    match response {
                        Ok(verdicts) => self.obey(verdicts),
                        Err(error) => break Err(error),
                    }
                }
                _ = beats.tick() => {
                    // Also without a job: it keeps the connection open.
                    if verdicts.is_none() {
                        verdicts = Some(self.beat(&client));
                    }
                }
                () = stop.cancelled(), if !is_stopping => {}
            }
        };
        self.unsent = confirmations.into_unsent();
        outcome
    }

    /// Starts a job.
    fn start(&mut self, grant: Grant) {
        let (stop, soon) = (CancellationToken::new(), CancellationToken::new());
        let progress = Arc::new(Mutex::new(Bytes::new()));
        let task = Task {
            id: grant.id,
            attempt: grant.attempt,
            definition: Arc::clone(&grant.definition),
            deadline: grant.deadline,
            input: grant.input,
            stop: stop.clone(),
            soon: soon.clone(),
            progress: Arc::clone(&progress),
        };
        let handler = self.worker.handlers.get(&*grant.definition).map(Arc::clone);
        let (id, token, ended) = (grant.id, grant.token, self.ended.clone());
        let job = Job { token: grant.token, stop, soon, progress, is_lost: false };
        if let Some(before) = self.jobs.insert(id, job) {
            // The server has given the job again: the old lease is lost.
            before.stop.cancel();
        }
        tokio::spawn(async move {
            let outcome = match handler {
                Some(handler) => tokio::spawn(async move { handler.run(task).await }).await,
                None => {
                    Ok(Outcome::Failed { error: "the worker has no handler".into(), retry: true })
                }
            };
            let outcome = outcome.unwrap_or_else(|error| Outcome::Failed {
                error: format!("the handler panicked: {error}"),
                retry: true,
            });
            let _ = ended.send((id, token, outcome));
        });
    }

    /// Sends a heartbeat for all jobs.
    fn beat(&self, client: &Client) -> Pending {
        let beats = self.jobs.iter().filter(|(_, job)| !job.is_lost).map(|(&id, job)| {
            let mut progress = job.progress.lock().unwrap_or_else(PoisonError::into_inner);
            Beat { id, token: job.token, progress: std::mem::take(&mut progress) }
        });
        client.send(&Request::Beats { beats: beats.collect() })
    }

    /// Follows the server's answers to a heartbeat.
    fn obey(&mut self, verdicts: Vec<(JobId, Verdict)>) {
        for (id, verdict) in verdicts {
            let Some(job) = self.jobs.get_mut(&id) else { continue };
            match verdict {
                Verdict::GoOn => {}
                Verdict::Soon => job.soon.cancel(),
                Verdict::Stop => {
                    job.is_lost = true;
                    job.stop.cancel();
                }
            }
        }
    }
}

async fn verdict(pending: &mut Option<Pending>) -> Result<Vec<(JobId, Verdict)>, JobsError> {
    match pending {
        Some(pending) => match pending.await? {
            Response::Verdicts { verdicts } => Ok(verdicts),
            _ => Ok(Vec::new()),
        },
        None => std::future::pending().await,
    }
}

/// Ends that were sent, until the server confirms them. It does so in any order.
#[derive(Default)]
struct Confirmations(Vec<(JobId, Token, Outcome, Pending)>);

impl Confirmations {
    fn add(&mut self, client: &Client, id: JobId, token: Token, outcome: Outcome) {
        let finish = Request::Finish { id, token, outcome };
        let pending = client.send(&finish);
        let Request::Finish { outcome, .. } = finish else { return };
        self.0.push((id, token, outcome, pending));
    }

    /// The next confirmation. An end whose stream was lost stays.
    async fn next(&mut self) -> Result<(), JobsError> {
        let ready = std::future::poll_fn(|cx| {
            for (index, (.., pending)) in self.0.iter_mut().enumerate() {
                if let std::task::Poll::Ready(response) = Pin::new(&mut *pending).poll(cx) {
                    return std::task::Poll::Ready((index, response));
                }
            }
            std::task::Poll::Pending
        });
        let (index, response) = ready.await;
        match response {
            Err(error @ (JobsError::Stream(_) | JobsError::Call(_))) => Err(error),
            response => {
                self.0.swap_remove(index);
                response.map(drop)
            }
        }
    }

    fn into_unsent(self) -> Vec<(JobId, Token, Outcome)> {
        self.0.into_iter().map(|(id, token, outcome, _)| (id, token, outcome)).collect()
    }
}
