//! Who asks for a snapshot and who writes it: one at a time, and whoever comes while one is being
//! written shares it.

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use afterimage_core::Failure;
use afterimage_wire::proto::stats::Stats;
use afterimage_wire::proto::{Snapshot, Status};
use afterimage_wire::server::SnapshotReply;

use crate::Table;
use crate::snapshot::{self, SnapshotReport, WriteError};

/// Requests that may wait for a snapshot. Each is a client who wants to know when it is done; more
/// than this many are a mistake, and not worth the memory.
const MAX_WAITING: usize = 1024;

/// Why somebody who asked for a snapshot gets none.
#[derive(Clone, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RequestError {
    /// It could not be written. Make room on the disk, or mend the folder, and ask again.
    #[error("no snapshot: {0}")]
    Failed(Arc<WriteError>),
    /// Too many wait for one already. Ask again when it is done.
    #[error("{limit} requests wait for a snapshot already; the limit is {limit}")]
    Crowded {
        /// How many may wait.
        limit: usize,
    },
    /// The keeper has stopped: the process is about to end, and writes its last snapshot by itself.
    #[error("the service is going away, and writes its last snapshot when nobody is left")]
    Stopped,
}

/// A snapshot that was asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Written {
    /// What was written.
    pub report: SnapshotReport,
    /// It had begun before it was asked for: what was stored since then need not be in it.
    pub joined: bool,
}

/// Is called once, with what became of a request.
type Callback = Box<dyn FnOnce(Result<Written, RequestError>) + Send>;

struct Waiter {
    joined: bool,
    then: Callback,
}

/// The last snapshot that is known to be good.
#[derive(Clone, Copy, Debug)]
pub(super) struct Last {
    pub(super) at: SystemTime,
    pub(super) entries: u64,
    pub(super) bytes: u64,
    /// Not known of one that another process wrote.
    pub(super) took: Option<Duration>,
}

#[derive(Default)]
struct State {
    last: Option<Last>,
    written: u64,
    failed: u64,
    /// The thread is writing.
    writing: bool,
    /// The thread is to end, or has ended.
    stopped: bool,
    waiting: Vec<Waiter>,
}

/// What the keeper's thread and those who ask share.
pub(super) struct Desk {
    table: Arc<Table>,
    path: PathBuf,
    state: Mutex<State>,
    changed: Condvar,
}

impl Desk {
    pub(super) fn new(table: Arc<Table>, path: PathBuf, last: Option<Last>) -> Self {
        let state = Mutex::new(State { last, ..State::default() });
        Desk { table, path, state, changed: Condvar::new() }
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// The thread's life: writes when it is asked to, and `every` so often if that is given.
    pub(super) fn work(&self, every: Option<Duration>) {
        let _end = End(self);
        while self.wait(every) {
            let outcome = self.write().map_err(|error| RequestError::Failed(Arc::new(error)));
            let waiting = {
                let mut state = self.lock();
                state.writing = false;
                std::mem::take(&mut state.waiting)
            };
            for Waiter { joined, then } in waiting {
                then(outcome.clone().map(|report| Written { report, joined }));
            }
        }
    }

    /// Waits until there is something to write, and marks it as begun. False when the end has come.
    fn wait(&self, every: Option<Duration>) -> bool {
        let due = every.and_then(|every| Instant::now().checked_add(every));
        let mut state = self.lock();
        loop {
            if state.stopped {
                return false;
            }
            let left = due.map(|due| due.saturating_duration_since(Instant::now()));
            if !state.waiting.is_empty() || left == Some(Duration::ZERO) {
                state.writing = true;
                return true;
            }
            state = match left {
                None => self.changed.wait(state).unwrap_or_else(PoisonError::into_inner),
                Some(left) => {
                    let waited = self.changed.wait_timeout(state, left);
                    waited.unwrap_or_else(PoisonError::into_inner).0
                }
            };
        }
    }

    /// Writes a snapshot, and keeps account of it.
    pub(super) fn write(&self) -> Result<SnapshotReport, WriteError> {
        let outcome = snapshot::write(&self.table, &self.path);
        let mut state = self.lock();
        match &outcome {
            Ok(report) => {
                let (path, elapsed) = (self.path.display(), report.elapsed);
                tracing::info!("wrote {} entries to {path} in {elapsed:.1?}", report.entries);
                state.written += 1;
                state.last = Some(Last {
                    at: SystemTime::now(),
                    entries: report.entries,
                    bytes: report.bytes,
                    took: Some(elapsed),
                });
            }
            Err(error) => {
                tracing::warn!("no snapshot: {error}");
                state.failed += 1;
            }
        }
        outcome
    }

    pub(super) fn stop(&self) {
        self.lock().stopped = true;
        self.changed.notify_all();
    }

    fn request(&self, then: Callback) {
        let refusal = {
            let mut state = self.lock();
            if state.stopped {
                RequestError::Stopped
            } else if state.waiting.len() >= MAX_WAITING {
                RequestError::Crowded { limit: MAX_WAITING }
            } else {
                let joined = state.writing;
                state.waiting.push(Waiter { joined, then });
                self.changed.notify_all();
                return;
            }
        };
        then(Err(refusal));
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The end of the thread, however it comes: nobody is left waiting for it.
struct End<'a>(&'a Desk);

impl Drop for End<'_> {
    fn drop(&mut self) {
        let waiting = {
            let mut state = self.0.lock();
            state.stopped = true;
            std::mem::take(&mut state.waiting)
        };
        for waiter in waiting {
            (waiter.then)(Err(RequestError::Stopped));
        }
    }
}

fn reported(Written { report, joined }: Written) -> Snapshot {
    let SnapshotReport { entries, bytes, elapsed } = report;
    Snapshot { entries, bytes, elapsed, joined }
}

impl RequestError {
    /// What a client of a service gets to know: not the server's paths.
    fn failure(&self) -> Failure {
        match self {
            RequestError::Failed(error) => {
                let WriteError { action, source, .. } = &**error;
                let text = format!(
                    "cannot {action} the snapshot's file: {source}; the last good one is kept"
                );
                Failure::new(Status::StorageFailed, text)
            }
            RequestError::Crowded { .. } => Failure::new(Status::Overloaded, self.to_string()),
            RequestError::Stopped => Failure::new(Status::ShuttingDown, self.to_string()),
        }
    }
}

/// Asks a [`Keeper`](super::Keeper) for snapshots, and tells of them.
#[derive(Clone)]
pub struct KeeperHandle(Arc<Desk>);

impl KeeperHandle {
    pub(super) fn new(desk: Arc<Desk>) -> Self {
        KeeperHandle(desk)
    }

    /// Asks for a snapshot and calls `then` once, when it is safe on the disk or has failed: on the
    /// keeper's thread, or at once when it cannot be had. While one is being written, this joins
    /// it.
    pub fn request(&self, then: impl FnOnce(Result<Written, RequestError>) + Send + 'static) {
        self.0.request(Box::new(then));
    }

    /// The same for a client of a service. What it is told does not name the server's files.
    pub fn answer(&self, reply: SnapshotReply) {
        self.request(move |outcome| {
            reply.send(outcome.map(reported).map_err(|error| error.failure()));
        });
    }

    /// Adds age, size and counts of the snapshots to `stats`. The age of one that was loaded at the
    /// start is that of its file.
    pub fn stats(&self, stats: &mut Stats) {
        let state = self.0.lock();
        stats.counter("snapshots_written", state.written);
        stats.counter("snapshots_failed", state.failed);
        stats.gauge("snapshot_running", state.writing.into());
        if let Some(Last { at, entries, bytes, took }) = state.last {
            // A clock that was set back makes it new, not an error.
            let age = SystemTime::now().duration_since(at).unwrap_or_default();
            stats.gauge("snapshot_age_ms", age.as_millis() as u64);
            stats.gauge("snapshot_entries", entries);
            stats.gauge("snapshot_bytes", bytes);
            if let Some(took) = took {
                stats.gauge("snapshot_took_ms", took.as_millis() as u64);
            }
        }
    }
}

impl fmt::Debug for KeeperHandle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("KeeperHandle").field("path", &self.0.path).finish_non_exhaustive()
    }
}
