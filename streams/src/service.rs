//! The streams service: runs over the streams of the TCP protocol.
//!
//! Bytes get new credit when they are processed, so a client sends no faster than the run computes,
//! and the memory of a run is its window of the stream, the record in progress and the fold.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use afterimage_wire::Status;
use afterimage_wire::proto::Role;
use afterimage_wire::proto::stats::Stats;
use afterimage_wire::server::{Batch, Identity, Service};
use afterimage_wire::stream::{IncomingStream, Stream, StreamError, StreamWriter};
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;

use crate::checkpoint::Checkpoint;
use crate::fold::SinkError;
use crate::fold::ports::{PORTS, Ports};
use crate::folder::{Folder, FolderError, Lease};
use crate::message::{Open, Reply, STREAM};
use crate::metrics;
use crate::run::{OnBad, Run, RunError};

/// The least time between two progress messages.
const PROGRESS_EVERY: Duration = Duration::from_millis(100);

/// Settings of the service.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct StreamsOptions {
    /// The folder of checkpoints; without one no run can be resumed.
    pub folder: Option<Folder>,
    /// The database of ports; without one, ports are checked and not stored.
    pub database: Option<PathBuf>,
    /// The time between two checkpoints of a run. The default is 1 s.
    pub checkpoint_every: Duration,
    /// The largest record limit that a client may ask for. The default is 1 MiB.
    pub max_record: u32,
    /// The largest number of runs at once. The default is 10,000.
    pub max_runs: usize,
    /// Runs that compute at once; the others wait. The default is the number of processors.
    pub computing: usize,
}

impl Default for StreamsOptions {
    fn default() -> Self {
        StreamsOptions {
            folder: None,
            database: None,
            checkpoint_every: Duration::from_secs(1),
            max_record: 1 << 20,
            max_runs: 10_000,
            computing: std::thread::available_parallelism().map_or(1, usize::from),
        }
    }
}

/// The service behind a server of the TCP protocol.
#[derive(Clone)]
pub struct StreamsService(Arc<Inner>);

struct Inner {
    options: StreamsOptions,
    computing: Semaphore,
    runs: Semaphore,
    /// The newest connection of each id, by number, and the order to end it.
    holders: Mutex<HashMap<String, (u64, CancellationToken)>>,
    numbers: AtomicU64,
    counters: Counters,
}

#[derive(Default)]
struct Counters {
    started: AtomicU64,
    resumed: AtomicU64,
    completed: AtomicU64,
    failed: AtomicU64,
    bytes: AtomicU64,
}

/// Why a run of the service ends without a result.
#[derive(Debug, thiserror::Error)]
enum Failure {
    #[error(transparent)]
    Run(#[from] RunError),
    #[error(transparent)]
    Folder(#[from] FolderError),
    #[error("the stream ended")]
    Stream(#[from] StreamError),
    #[error("the computation ended unexpectedly")]
    Internal,
}

impl Failure {
    fn is_fenced(&self) -> bool {
        match self {
            Failure::Folder(FolderError::Fenced) => true,
            Failure::Run(RunError::Sink(error)) => matches!(**error, SinkError::Fenced),
            _ => false,
        }
    }
}

impl StreamsService {
    /// A service with these settings.
    pub fn new(options: StreamsOptions) -> Self {
        StreamsService(Arc::new(Inner {
            computing: Semaphore::new(options.computing.max(1)),
            runs: Semaphore::new(options.max_runs),
            options,
            holders: Mutex::default(),
            numbers: AtomicU64::default(),
            counters: Counters::default(),
        }))
    }
}

impl Service for StreamsService {
    fn identity(&self) -> Identity {
        Identity::without_model(Role::Streams)
    }

    fn handle(&self, _: &mut Batch<'_>) {
        // The server refuses the requests of other services.
    }

    fn open(&self, stream: IncomingStream) {
        if stream.name() != STREAM {
            let text = format!("this service has one stream: \"{STREAM}\"");
            return stream.refuse(Status::Unsupported, &text);
        }
        let open: Open = match serde_json::from_slice(stream.header()) {
            Ok(open) => open,
            Err(error) => {
                let text = format!("the header of the stream is invalid: {error}");
                return stream.refuse(Status::BadArgument, &text);
            }
        };
        if open.on_bad == OnBad::SetAside {
            let text = "a service sets no records aside; let it stop or skip";
            return stream.refuse(Status::BadArgument, text);
        }
        let limit = self.0.options.max_record;
        if open.plan.limit > limit {
            let text =
                format!("the record limit is {}; the largest one is {limit}", open.plan.limit);
            return stream.refuse(Status::BadArgument, &text);
        }
        let inner = Arc::clone(&self.0);
        tokio::spawn(async move {
            let Ok(_permit) = inner.runs.try_acquire() else {
                let text = format!("all {} runs are in use; try again", inner.options.max_runs);
                return stream.refuse(Status::Overloaded, &text);
            };
            inner.serve(open, stream.accept()).await;
        });
    }

    fn stats(&self, stats: &mut Stats) {
        let counters = &self.0.counters;
        for (metric, counter) in [
            (&metrics::STARTED, &counters.started),
            (&metrics::RESUMED, &counters.resumed),
            (&metrics::COMPLETED, &counters.completed),
            (&metrics::FAILED, &counters.failed),
            (&metrics::BYTES, &counters.bytes),
        ] {
            stats.counter(metric, counter.load(Ordering::Relaxed));
        }
        let running = self.0.options.max_runs - self.0.runs.available_permits();
        stats.gauge(&metrics::RUNNING, running as u64);
    }
}

impl Inner {
    async fn serve(&self, open: Open, stream: Stream) {
        let Stream { mut reader, mut writer, progress: _progress } = stream;
        let (number, fenced) =
            (self.numbers.fetch_add(1, Ordering::Relaxed), CancellationToken::new());
        if let Some(id) = &open.id {
            let holder = (number, fenced.clone());
            let before = self.holders().insert(id.clone(), holder);
            // A client that comes back must not wait until the end of its former connection is
            // noticed.
            if let Some((_, before)) = before {
                before.cancel();
            }
        }
        let end = self.drive(&open, &mut reader, &mut writer, &fenced).await;
        if let Some(id) = &open.id {
            let mut holders = self.holders();
            if holders.get(id).is_some_and(|(holder, _)| *holder == number) {
                holders.remove(id);
            }
        }
        match end {
            Ok(()) => {
                add(&self.counters.completed, 1);
            }
            Err(Failure::Stream(error)) => tracing::debug!(%error, "a stream ended early"),
            Err(failure) if failure.is_fenced() => {
                // Not a status that clients retry: two clients would end each other's runs for
                // ever.
                writer.reset(Status::BadArgument, &FolderError::Fenced.to_string());
            }
            Err(failure) => {
                add(&self.counters.failed, 1);
                let offset = match &failure {
                    Failure::Run(error) => error.offset(),
                    _ => None,
                };
                if let Failure::Folder(FolderError::Io(path, error)) = &failure {
                    tracing::error!("cannot use the checkpoint {}: {error}", path.display());
                }
                let reason = failure.to_string();
                let _ = send(&mut writer, &Reply::Failed { reason, offset }).await;
                let _ = writer.finish();
                // The client may be sending: it must not wait for credit.
                while let Ok(Some(_)) = reader.read().await {}
            }
        }
    }

    /// Runs until the bytes have ended, and sends the result.
    async fn drive(
        &self,
        open: &Open,
        reader: &mut afterimage_wire::stream::StreamReader,
        writer: &mut StreamWriter,
        fenced: &CancellationToken,
    ) -> Result<(), Failure> {
        let (mut run, lease, is_complete) = self.begin(open).await?;
        add(&self.counters.started, 1);
        let offset = run.position();
        send(writer, &Reply::Accepted { offset }).await?;
        let (mut computing, mut waiting) = (Duration::ZERO, Duration::ZERO);
        let (mut shown, mut saved) = (Instant::now(), Instant::now());
        if !is_complete {
            loop {
                let begun = Instant::now();
                let chunk = tokio::select! {
                    () = fenced.cancelled() => return Err(FolderError::Fenced.into()),
                    chunk = reader.read() => chunk,
                };
                waiting += begun.elapsed();
                let chunk = match chunk {
                    Ok(chunk) => chunk,
                    Err(error) => {
                        // The client can go on from here.
                        self.save(run.checkpoint(), lease.as_ref()).await?;
                        return Err(error.into());
                    }
                };
                let is_last = chunk.is_none();
                let begun = Instant::now();
                let chunk = chunk.unwrap_or_default();
                add(&self.counters.bytes, chunk.len() as u64);
                run = self.compute(run, chunk, is_last).await?;
                computing += begun.elapsed();
                if is_last {
                    self.save(run.checkpoint().completed(), lease.as_ref()).await?;
                    break;
                }
                if lease.is_some() && saved.elapsed() >= self.options.checkpoint_every {
                    self.save(run.checkpoint(), lease.as_ref()).await?;
                    saved = Instant::now();
                }
                if shown.elapsed() >= PROGRESS_EVERY {
                    let report = run.report(computing, waiting);
                    if let Ok(message) = serde_json::to_vec(&report) {
                        // A message that is too long is not sent. The next may be shorter.
                        let _ = writer.progress(message);
                    }
                    shown = Instant::now();
                }
            }
        }
        send(writer, &Reply::Result(run.report(computing, waiting))).await?;
        writer.finish()?;
        // A reader that is dropped early ends the stream, and with it replies on their way.
        while let Ok(Some(_)) = reader.read().await {}
        Ok(())
    }

    /// The run of the client's parameters, at its checkpoint if it resumes; and whether it is
    /// complete already.
    async fn begin(&self, open: &Open) -> Result<(Run, Option<Lease>, bool), Failure> {
        if let (PORTS, Some(path)) = (&*open.plan.fold, self.options.database.clone()) {
            let (id, start) = (open.id.clone(), open.start);
            let opened = blocking(move || Ports::into(&path, id.as_deref(), start)).await?;
            let (ports, checkpoint) = opened.map_err(RunError::from)?;
            add(&self.counters.resumed, checkpoint.is_some().into());
            let is_complete = checkpoint.as_ref().is_some_and(Checkpoint::is_complete);
            let (plan, ports) = (open.plan.clone(), Box::new(ports));
            let run = Run::with_fold(plan, open.on_bad, ports, checkpoint.as_ref())?;
            return Ok((run, None, is_complete));
        }
        let Some(id) = open.id.clone() else {
            return Ok((Run::new(open.plan.clone(), open.on_bad)?, None, false));
        };
        let Some(folder) = self.options.folder.clone() else {
            let text = "this service keeps no checkpoints; start it with --state DIR".to_owned();
            return Err(RunError::Format(text).into());
        };
        // A run with a wrong plan must not take the lease.
        let new = Run::new(open.plan.clone(), open.on_bad)?;
        let start = open.start;
        let (lease, checkpoint) = blocking(move || folder.lease(&id, start)).await??;
        let Some(checkpoint) = checkpoint else { return Ok((new, Some(lease), false)) };
        add(&self.counters.resumed, 1);
        let run = Run::resume(open.plan.clone(), open.on_bad, &checkpoint)?;
        Ok((run, Some(lease), checkpoint.is_complete()))
    }

    /// Processes a chunk on a thread for computing.
    async fn compute(
        &self,
        mut run: Run,
        chunk: bytes::Bytes,
        is_last: bool,
    ) -> Result<Run, Failure> {
        let _permit = self.computing.acquire().await.map_err(|_| Failure::Internal)?;
        blocking(move || {
            run.push(&chunk)?;
            if is_last {
                run.finish()?;
            }
            Ok(run)
        })
        .await?
    }

    async fn save(&self, checkpoint: Checkpoint, lease: Option<&Lease>) -> Result<(), Failure> {
        let Some(lease) = lease.cloned() else { return Ok(()) };
        Ok(blocking(move || lease.save(&checkpoint)).await??)
    }

    fn holders(&self) -> std::sync::MutexGuard<'_, HashMap<String, (u64, CancellationToken)>> {
        self.holders.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

async fn send(writer: &mut StreamWriter, reply: &Reply) -> Result<(), Failure> {
    let mut line = serde_json::to_vec(reply).map_err(|_| Failure::Internal)?;
    line.push(b'\n');
    Ok(writer.write(line).await?)
}

/// Runs `work` on a thread that may block.
async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T, Failure> {
    tokio::task::spawn_blocking(work).await.map_err(|_| Failure::Internal)
}

fn add(counter: &AtomicU64, count: u64) {
    counter.fetch_add(count, Ordering::Relaxed);
}
