//! The snapshot writer: a thread that loads the snapshot at the start, writes it at intervals and
//! on request, and once more at the end.
//!
//! One snapshot is written at a time. A request that arrives during a write shares its result.

use std::fmt;
use std::path::Path;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant, SystemTime};

use afterimage_core::Failure;
use afterimage_wire::proto::stats::Stats;
use afterimage_wire::proto::{Snapshot, Status};
use afterimage_wire::server::SnapshotReply;

use super::{Content, LoadError, SnapshotFile, SnapshotReport, WriteError};
use crate::background::yield_to_readers;
use crate::metrics;

/// The most requests that may wait for a snapshot. Each is a client; more of them are a mistake of
/// the clients, and not worth the memory.
const MAX_WAITING: usize = 1024;

/// A store and its snapshot file: [`SnapshotFile::of`].
pub struct SnapshotPart(Box<dyn Part>);

impl SnapshotPart {
    pub(super) fn new<S: Content>(store: Arc<S>, file: SnapshotFile<S>) -> Self {
        SnapshotPart(Box::new(StoreFile { store, file }))
    }
}

impl fmt::Debug for SnapshotPart {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("SnapshotPart").field(&self.0.path()).finish()
    }
}

/// A thread that writes the snapshots of one or more stores while others use them. Dropping it ends
/// the thread without a last snapshot; [`finish`](Self::finish) writes one.
pub struct SnapshotWriter {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

impl SnapshotWriter {
    /// As [`start_all`](Self::start_all), for one store.
    ///
    /// # Panics
    ///
    /// If the system cannot start a thread.
    pub fn start<S: Content>(
        store: Arc<S>,
        file: SnapshotFile<S>,
        every: Option<Duration>,
    ) -> Self {
        Self::start_all(vec![file.of(store)], every)
    }

    /// Loads each store from its file if that holds a valid snapshot, and starts the thread. With
    /// `every` it writes snapshots of all stores at this interval.
    ///
    /// A snapshot that is damaged or cannot be read causes a cold start of its store with a warning
    /// in the log. It stays until the next snapshot replaces it.
    ///
    /// # Panics
    ///
    /// If the system cannot start a thread.
    pub fn start_all(parts: Vec<SnapshotPart>, every: Option<Duration>) -> Self {
        let parts: Vec<Box<dyn Part>> = parts.into_iter().map(|part| part.0).collect();
        // The snapshots are as old as the oldest of them.
        let last = parts.iter().filter_map(|part| part.load()).reduce(Last::and);
        let state = Mutex::new(State { last, ..State::default() });
        let shared = Arc::new(Shared { parts, state, changed: Condvar::new() });
        let work = {
            let shared = Arc::clone(&shared);
            move || {
                yield_to_readers();
                shared.work(every);
            }
        };
        let thread = std::thread::Builder::new().name("snapshot".into()).spawn(work);
        let thread = Some(thread.expect("the system can start a thread"));
        SnapshotWriter { shared, thread }
    }

    /// Refuses a request that comes earlier than this after the end of the last requested snapshot.
    /// Writing keeps a disk and a core busy, and a client must not force it all the time. Without
    /// this call there is no limit. Snapshots at the interval and at the end are not affected.
    #[must_use]
    pub fn with_request_interval(self, least: Duration) -> Self {
        self.shared.lock().request_interval = least;
        self
    }

    /// Writes the snapshot of each store now, on the calling thread. The report adds them up.
    ///
    /// # Errors
    ///
    /// [`WriteError`], of the first store whose snapshot failed; then its last good snapshot is
    /// still in place.
    pub fn write(&self) -> Result<SnapshotReport, WriteError> {
        self.shared.write()
    }

    /// Ends the thread and writes the last snapshot.
    ///
    /// # Errors
    ///
    /// As [`SnapshotWriter::write`].
    pub fn finish(mut self) -> Result<SnapshotReport, WriteError> {
        self.stop();
        self.write()
    }

    /// A handle for requests and statistics. It may outlive the writer.
    pub fn handle(&self) -> SnapshotHandle {
        SnapshotHandle(Arc::clone(&self.shared))
    }

    fn stop(&mut self) {
        if let Some(thread) = self.thread.take() {
            self.shared.stop();
            let _ = thread.join();
        }
    }
}

impl Drop for SnapshotWriter {
    fn drop(&mut self) {
        self.stop();
    }
}

impl fmt::Debug for SnapshotWriter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SnapshotWriter").field("parts", &self.shared.parts).finish_non_exhaustive()
    }
}

/// Why a request for a snapshot failed.
#[derive(Clone, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RequestError {
    /// The snapshot could not be written. Free disk space or repair the directory, then retry.
    #[error("no snapshot: {0}")]
    Failed(Arc<WriteError>),
    /// Too many requests wait for a snapshot already. Retry when it is written.
    #[error("{limit} requests wait for a snapshot already; the limit is {limit}")]
    TooManyWaiting {
        /// The limit.
        limit: usize,
    },
    /// The last requested snapshot has just ended. Retry after the time that is left.
    #[error(
        "the last requested snapshot ended {ago:.1?} ago; the next is possible in {left:.1?} \
         (the least interval is {interval:?})"
    )]
    TooSoon {
        /// The time since its end.
        ago: Duration,
        /// The time until the next request may come.
        left: Duration,
        /// The least interval.
        interval: Duration,
    },
    /// The writer has stopped: the process is about to end, and writes a last snapshot.
    #[error("the service is shutting down; it writes a last snapshot at its end")]
    Stopped,
}

impl RequestError {
    /// The failure that a client sees: without the server's paths.
    fn failure(&self) -> Failure {
        match self {
            RequestError::Failed(error) => {
                let WriteError { action, source, .. } = &**error;
                let text = format!(
                    "cannot {action} the snapshot's file: {source}; the last good one is kept"
                );
                Failure::new(Status::StorageFailed, text)
            }
            RequestError::TooManyWaiting { .. } | RequestError::TooSoon { .. } => {
                Failure::new(Status::Overloaded, self.to_string())
            }
            RequestError::Stopped => Failure::new(Status::ShuttingDown, self.to_string()),
        }
    }
}

/// The result of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Written {
    /// The snapshot.
    pub report: SnapshotReport,
    /// The write had begun before the request. Entries stored since then may be missing.
    pub joined: bool,
}

/// Requests snapshots of a [`SnapshotWriter`], and reports statistics about them.
#[derive(Clone)]
pub struct SnapshotHandle(Arc<Shared>);

impl SnapshotHandle {
    /// Requests a snapshot. Calls `then` once: on the writer's thread when the snapshot is safe on
    /// the disk or has failed, or at once if the request is refused. During a write the request
    /// joins that write.
    pub fn request(&self, then: impl FnOnce(Result<Written, RequestError>) + Send + 'static) {
        self.0.request(Box::new(then));
    }

    /// Requests a snapshot for a client of a service. The reply does not name the server's files.
    pub fn answer(&self, reply: SnapshotReply) {
        self.request(move |outcome| {
            let snapshot = |Written { report, joined }| {
                let SnapshotReport { entries, bytes, elapsed } = report;
                Snapshot { entries, bytes, elapsed, joined }
            };
            reply.send(outcome.map(snapshot).map_err(|error| error.failure()));
        });
    }

    /// Adds age, size and counts of the snapshots to `stats`. The age of a snapshot that was loaded
    /// at the start is the age of its file.
    pub fn stats(&self, stats: &mut Stats) {
        let state = self.0.lock();
        stats.counter(&metrics::SNAPSHOTS_WRITTEN, state.written);
        stats.counter(&metrics::SNAPSHOTS_FAILED, state.failed);
        stats.gauge(&metrics::SNAPSHOT_RUNNING, state.writing.into());
        if let Some(Last { at, entries, bytes, took }) = state.last {
            // After the clock was set back the age is 0.
            let age = SystemTime::now().duration_since(at).unwrap_or_default();
            stats.gauge(&metrics::SNAPSHOT_AGE, age.as_millis() as u64);
            stats.gauge(&metrics::SNAPSHOT_ENTRIES, entries);
            stats.gauge(&metrics::SNAPSHOT_SIZE, bytes);
            if let Some(took) = took {
                stats.gauge(&metrics::SNAPSHOT_TOOK, took.as_millis() as u64);
            }
        }
    }
}

impl fmt::Debug for SnapshotHandle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SnapshotHandle").field("parts", &self.0.parts).finish_non_exhaustive()
    }
}

/// Called once with the result of a request.
type Callback = Box<dyn FnOnce(Result<Written, RequestError>) + Send>;

struct Waiter {
    joined: bool,
    then: Callback,
}

/// The newest valid snapshots.
#[derive(Clone, Copy, Debug)]
struct Last {
    at: SystemTime,
    entries: u64,
    bytes: u64,
    /// Unknown if another process wrote it.
    took: Option<Duration>,
}

impl Last {
    fn and(self, other: Last) -> Last {
        Last {
            at: self.at.min(other.at),
            entries: self.entries + other.entries,
            bytes: self.bytes + other.bytes,
            took: self.took.zip(other.took).map(|(one, other)| one + other),
        }
    }
}

#[derive(Default)]
struct State {
    last: Option<Last>,
    written: u64,
    failed: u64,
    /// The thread is writing.
    writing: bool,
    /// The thread must end, or has ended.
    stopped: bool,
    waiting: Vec<Waiter>,
    /// The least time from the end of a requested snapshot to the next request.
    request_interval: Duration,
    /// When the last requested snapshot ended, written or not.
    requested_end: Option<Instant>,
}

impl State {
    /// The error of a request that comes too soon after the last requested snapshot.
    fn too_soon(&self, now: Instant) -> Option<RequestError> {
        let interval = self.request_interval;
        let ago = now.saturating_duration_since(self.requested_end?);
        let left = interval.checked_sub(ago).filter(|left| !left.is_zero())?;
        Some(RequestError::TooSoon { ago, left, interval })
    }
}

/// The state that the thread shares with its handles.
struct Shared {
    parts: Vec<Box<dyn Part>>,
    state: Mutex<State>,
    changed: Condvar,
}

impl Shared {
    /// The main loop of the thread: writes on request, and at the interval if there is one.
    fn work(&self, every: Option<Duration>) {
        let _end = End(self);
        while self.wait(every) {
            let outcome = self.write().map_err(|error| RequestError::Failed(Arc::new(error)));
            let waiting = {
                let mut state = self.lock();
                state.writing = false;
                if !state.waiting.is_empty() {
                    state.requested_end = Some(Instant::now());
                }
                std::mem::take(&mut state.waiting)
            };
            for Waiter { joined, then } in waiting {
                then(outcome.clone().map(|report| Written { report, joined }));
            }
        }
    }

    /// Waits until a snapshot is due, and marks it as begun. False if the thread must end.
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

    /// Writes all snapshots, logs the results and counts them as one. A failure does not keep the
    /// others from being written.
    fn write(&self) -> Result<SnapshotReport, WriteError> {
        let started = Instant::now();
        let outcomes: Vec<_> = self.parts.iter().map(|part| part.write()).collect();
        let nothing = SnapshotReport { entries: 0, bytes: 0, elapsed: started.elapsed() };
        let outcome = outcomes.into_iter().try_fold(nothing, |mut sum, report| {
            let report = report?;
            sum.entries += report.entries;
            sum.bytes += report.bytes;
            Ok(sum)
        });
        let mut state = self.lock();
        match &outcome {
            Ok(report) => {
                state.written += 1;
                state.last = Some(Last {
                    at: SystemTime::now(),
                    entries: report.entries,
                    bytes: report.bytes,
                    took: Some(report.elapsed),
                });
            }
            Err(_) => state.failed += 1,
        }
        outcome
    }

    fn stop(&self) {
        self.lock().stopped = true;
        self.changed.notify_all();
    }

    fn request(&self, then: Callback) {
        let refusal = {
            let mut state = self.lock();
            if state.stopped {
                RequestError::Stopped
            } else if state.waiting.len() >= MAX_WAITING {
                RequestError::TooManyWaiting { limit: MAX_WAITING }
            } else if let Some(too_soon) = state.too_soon(Instant::now())
                && !state.writing
                && state.waiting.is_empty()
            {
                too_soon
            } else {
                // A request during a write costs nothing more, however early it comes.
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

/// Answers all waiting requests when the thread ends, also by a panic.
struct End<'a>(&'a Shared);

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

/// A store whose type is erased, and its snapshot file.
trait Part: Send + Sync {
    fn path(&self) -> &Path;

    /// Loads the snapshot, logs the result, and returns what is known of a valid snapshot.
    fn load(&self) -> Option<Last>;

    /// Writes a snapshot and logs the result.
    fn write(&self) -> Result<SnapshotReport, WriteError>;
}

impl fmt::Debug for dyn Part {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.path().fmt(f)
    }
}

/// A store and its snapshot file.
struct StoreFile<S> {
    store: Arc<S>,
    file: SnapshotFile<S>,
}

impl<S: Content> Part for StoreFile<S> {
    fn path(&self) -> &Path {
        self.file.path()
    }

    fn load(&self) -> Option<Last> {
        let path = self.path();
        let removed = self.file.removed();
        if removed > 0 {
            tracing::warn!("removed {removed} unfinished snapshots beside {}", path.display());
        }
        match self.file.load(&self.store) {
            Ok(report) => {
                let of_these = match report.expired {
                    0 => String::new(),
                    expired => format!(" ({expired} were expired)"),
                };
                tracing::info!(
                    "loaded {} of {} entries{of_these} from {} in {:.1?}",
                    report.restored,
                    report.entries,
                    path.display(),
                    report.elapsed
                );
                let metadata = std::fs::metadata(path).ok()?;
                let at = metadata.modified().unwrap_or_else(|_| SystemTime::now());
                Some(Last { at, entries: report.entries, bytes: metadata.len(), took: None })
            }
            Err(LoadError::Missing { .. }) => {
                tracing::info!("a cold start: there is no snapshot at {} yet", path.display());
                None
            }
            Err(error) => {
                tracing::warn!("a cold start: {error}");
                None
            }
        }
    }

    fn write(&self) -> Result<SnapshotReport, WriteError> {
        let outcome = self.file.write(&self.store);
        match &outcome {
            Ok(SnapshotReport { entries, elapsed, .. }) => {
                tracing::info!(
                    "wrote {entries} entries to {} in {elapsed:.1?}",
                    self.path().display()
                );
            }
            Err(error) => tracing::warn!("no snapshot: {error}"),
        }
        outcome
    }
}

// Miri has no files.
#[cfg(all(test, not(miri)))]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::{Capacity, Table};
    use std::sync::mpsc;

    const PATIENCE: Duration = Duration::from_secs(60);

    /// A table's snapshot whose writes wait while the gate is locked.
    struct Gated(StoreFile<Table>, Arc<Mutex<()>>);

    impl Part for Gated {
        fn path(&self) -> &Path {
            self.0.path()
        }

        fn load(&self) -> Option<Last> {
            self.0.load()
        }

        fn write(&self) -> Result<SnapshotReport, WriteError> {
            let _waits = self.1.lock().unwrap();
            self.0.write()
        }
    }

    fn writer(folder: &tempfile::TempDir) -> (SnapshotWriter, Arc<Mutex<()>>) {
        let store = Arc::new(Table::new(Capacity::Entries(1000)).unwrap());
        let file = SnapshotFile::open(folder.path().join("table.snapshot")).unwrap();
        let gate = Arc::new(Mutex::new(()));
        let part = SnapshotPart(Box::new(Gated(StoreFile { store, file }, Arc::clone(&gate))));
        (SnapshotWriter::start_all(vec![part], None), gate)
    }

    fn request(handle: &SnapshotHandle) -> mpsc::Receiver<Result<Written, RequestError>> {
        let (sender, receiver) = mpsc::channel();
        handle.request(move |outcome| sender.send(outcome).unwrap());
        receiver
    }

    #[test]
    fn requests_during_a_write_join_it() {
        let folder = tempfile::tempdir().unwrap();
        let (writer, gate) = writer(&folder);
        let handle = writer.handle();
        let (first, others) = {
            let _delays_the_write = gate.lock().unwrap();
            let first = request(&handle);
            let deadline = Instant::now() + PATIENCE;
            while !handle.0.lock().writing {
                assert!(Instant::now() < deadline, "the write does not begin");
                std::thread::yield_now();
            }
            (first, [request(&handle), request(&handle)])
        };
        assert!(!first.recv_timeout(PATIENCE).unwrap().unwrap().joined);
        for other in others {
            assert!(other.recv_timeout(PATIENCE).unwrap().unwrap().joined);
        }
        assert_eq!(handle.0.lock().written, 1);
        assert!(!request(&handle).recv_timeout(PATIENCE).unwrap().unwrap().joined, "a new one");
    }

    #[test]
    fn a_request_within_the_interval_is_told_how_long_to_wait() {
        let folder = tempfile::tempdir().unwrap();
        let (writer, _gate) = writer(&folder);
        let writer = writer.with_request_interval(Duration::from_secs(3600));
        let handle = writer.handle();
        writer.write().unwrap();
        request(&handle).recv_timeout(PATIENCE).unwrap().unwrap();
        let again = request(&handle).recv_timeout(PATIENCE).unwrap().unwrap_err();
        let RequestError::TooSoon { ago, left, interval } = again else { panic!("{again}") };
        assert_eq!((ago + left, interval), (interval, Duration::from_secs(3600)));
        assert_eq!(again.failure().status, Status::Overloaded);
        assert_eq!(handle.0.lock().written, 2, "the refused request writes nothing");

        handle.0.lock().requested_end = Instant::now().checked_sub(interval);
        request(&handle).recv_timeout(PATIENCE).unwrap().unwrap();
    }

    #[test]
    fn a_refused_request_gets_the_reason() {
        let folder = tempfile::tempdir().unwrap();
        let (writer, gate) = writer(&folder);
        let handle = writer.handle();
        drop(folder);
        let failed = request(&handle).recv_timeout(PATIENCE).unwrap();
        assert!(matches!(failed, Err(RequestError::Failed(_))), "{failed:?}");

        let crowd: Vec<_> = {
            let _delays_the_write = gate.lock().unwrap();
            let crowd = (0..1025).map(|_| request(&handle)).collect::<Vec<_>>();
            let last = crowd[1024].recv_timeout(PATIENCE).unwrap();
            assert!(matches!(last, Err(RequestError::TooManyWaiting { limit: 1024 })), "{last:?}");
            crowd
        };
        for one in &crowd[..1024] {
            one.recv_timeout(PATIENCE).unwrap().unwrap_err();
        }
        drop(writer);
        let late = request(&handle).recv_timeout(PATIENCE).unwrap();
        assert!(matches!(late, Err(RequestError::Stopped)), "{late:?}");
    }
}
