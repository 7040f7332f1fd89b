//! Keeps a table's snapshot: loads it at the start, writes it now and then, and once more at the end.

use std::fmt;
use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::sync::mpsc::{self, RecvTimeoutError, Sender};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use afterimage_wire::proto::stats::Stats;

use crate::Table;
use crate::snapshot::{self, LoadError, SnapshotReport, WriteError};

/// A thread that writes a table's snapshot while others go on using the table.
pub struct Keeper {
    table: Arc<Table>,
    path: PathBuf,
    record: Arc<Mutex<Record>>,
    thread: Option<(Sender<()>, JoinHandle<()>)>,
}

/// Why snapshots cannot be kept at a path.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BadPlace {
    /// There is a file that is no snapshot. Name another one, or remove it.
    #[error("{path:?} is not a snapshot and would be overwritten: name another file")]
    Occupied {
        /// The file.
        path: PathBuf,
    },
    /// No file can be made there. Look at the folder and its permissions.
    #[error("no snapshot can be written to {path:?}: {source}")]
    NotWritable {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
}

fn check_place(path: &Path) -> Result<(), BadPlace> {
    let not_writable = |source| BadPlace::NotWritable { path: path.to_owned(), source };
    match File::open(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(not_writable(error)),
        Ok(file) => {
            let mut start = Vec::new();
            file.take(snapshot::format::MAGIC.len() as u64)
                .read_to_end(&mut start)
                .map_err(not_writable)?;
            if !snapshot::format::MAGIC.starts_with(&start) {
                return Err(BadPlace::Occupied { path: path.to_owned() });
            }
        }
    }
    // A file beside it, as a snapshot begins.
    let mut probe = path.as_os_str().to_owned();
    probe.push(format!(".probe-{}", std::process::id()));
    File::create(&probe).and_then(|_| std::fs::remove_file(&probe)).map_err(not_writable)
}

/// What became of the snapshots so far.
#[derive(Debug, Default)]
struct Record {
    last: Option<(Instant, SnapshotReport)>,
    written: u64,
    failed: u64,
}

impl Keeper {
    /// Loads the snapshot at `path` into `table`, if there is a good one, and writes it anew
    /// `every` so often, if that is given.
    ///
    /// A snapshot that is damaged or cannot be read is a cold start with a warning in the log; it is
    /// left where it is until the next snapshot takes its place.
    ///
    /// # Errors
    /// [`BadPlace`] when there is something else at `path` that a snapshot would destroy, or when
    /// none can be written there: now, and not when the table is about to be lost.
    ///
    /// # Panics
    /// When the system gives no thread.
    pub fn start(
        table: Arc<Table>,
        path: &Path,
        every: Option<Duration>,
    ) -> Result<Self, BadPlace> {
        check_place(path)?;
        let removed = snapshot::remove_leftovers(path);
        if removed > 0 {
            tracing::warn!("removed {removed} unfinished snapshots beside {}", path.display());
        }
        match snapshot::load(&table, path) {
            Ok(report) => tracing::info!(
                "loaded {} of {} entries from {} in {:.1?}",
                report.restored,
                report.entries,
                path.display(),
                report.elapsed
            ),
            Err(LoadError::Missing { .. }) => {
                tracing::info!("a cold start: there is no snapshot at {} yet", path.display());
            }
            Err(error) => tracing::warn!("a cold start: {error}"),
        }
        let record = Arc::default();
        let path = path.to_owned();
        let mut keeper = Keeper { table, path, record, thread: None };
        if let Some(every) = every {
            keeper.thread = Some(keeper.write_every(every));
        }
        Ok(keeper)
    }

    /// Writes a snapshot now.
    ///
    /// # Errors
    /// [`WriteError`]; the last good snapshot is still in place then.
    pub fn write(&self) -> Result<SnapshotReport, WriteError> {
        write(&self.table, &self.path, &self.record)
    }

    /// Ends the thread and writes the last snapshot.
    ///
    /// # Errors
    /// As [`Keeper::write`].
    pub fn finish(mut self) -> Result<SnapshotReport, WriteError> {
        self.stop();
        self.write()
    }

    /// Something that can tell of the snapshots after the keeper itself has gone elsewhere.
    pub fn status(&self) -> KeeperStatus {
        KeeperStatus(Arc::clone(&self.record))
    }

    fn write_every(&self, every: Duration) -> (Sender<()>, JoinHandle<()>) {
        let (table, path) = (Arc::clone(&self.table), self.path.clone());
        let record = Arc::clone(&self.record);
        let (stop, stopped) = mpsc::channel::<()>();
        let work = move || {
            while let Err(RecvTimeoutError::Timeout) = stopped.recv_timeout(every) {
                // An error is in the log and in the statistics; the next attempt may do better.
                let _ = write(&table, &path, &record);
            }
        };
        let thread = std::thread::Builder::new().name("snapshot".into()).spawn(work);
        (stop, thread.expect("the system has room for a thread"))
    }

    fn stop(&mut self) {
        if let Some((stop, thread)) = self.thread.take() {
            drop(stop);
            let _ = thread.join();
        }
    }
}

impl Drop for Keeper {
    fn drop(&mut self) {
        self.stop();
    }
}

impl fmt::Debug for Keeper {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Keeper").field("path", &self.path).finish_non_exhaustive()
    }
}

/// Tells of a [`Keeper`]'s snapshots.
#[derive(Clone, Debug)]
pub struct KeeperStatus(Arc<Mutex<Record>>);

impl KeeperStatus {
    /// Adds age, size and counts of the snapshots to `stats`.
    pub fn stats(&self, stats: &mut Stats) {
        let record = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        stats.counter("snapshots_written", record.written);
        stats.counter("snapshots_failed", record.failed);
        if let Some((at, report)) = &record.last {
            stats.gauge("snapshot_age_ms", at.elapsed().as_millis() as u64);
            stats.gauge("snapshot_entries", report.entries);
            stats.gauge("snapshot_bytes", report.bytes);
        }
    }
}

fn write(table: &Table, path: &Path, record: &Mutex<Record>) -> Result<SnapshotReport, WriteError> {
    let outcome = snapshot::write(table, path);
    let mut record = record.lock().unwrap_or_else(PoisonError::into_inner);
    match &outcome {
        Ok(report) => {
            tracing::info!(
                "wrote {} entries to {} in {:.1?}",
                report.entries,
                path.display(),
                report.elapsed
            );
            record.written += 1;
            record.last = Some((Instant::now(), *report));
        }
        Err(error) => {
            tracing::warn!("no snapshot: {error}");
            record.failed += 1;
        }
    }
    outcome
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Capacity;

    fn table() -> Arc<Table> {
        Arc::new(Table::new(Capacity::Entries(1000)).unwrap())
    }

    fn file() -> (tempfile::TempDir, PathBuf) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("table.snapshot");
        (folder, path)
    }

    #[test]
    fn what_one_keeper_writes_at_its_end_the_next_one_loads() {
        let (_folder, path) = file();
        let before = table();
        let keeper = Keeper::start(Arc::clone(&before), &path, None).unwrap();
        before.insert(1, 10);
        assert_eq!(keeper.finish().unwrap().entries, 1);
        let after = table();
        let _keeper = Keeper::start(Arc::clone(&after), &path, None).unwrap();
        assert_eq!(after.get(1), Some(10));
    }

    #[test]
    fn writes_by_itself_while_it_lives_and_tells_of_it() {
        let (_folder, path) = file();
        let table = table();
        table.insert(1, 10);
        let keeper =
            Keeper::start(Arc::clone(&table), &path, Some(Duration::from_millis(5))).unwrap();
        let status = keeper.status();
        let written = || {
            let mut stats = Stats::default();
            status.stats(&mut stats);
            stats.counter_value("snapshots_written")
        };
        let deadline = Instant::now() + Duration::from_secs(30);
        while written() < 2 {
            assert!(Instant::now() < deadline, "no snapshot was written");
            std::thread::sleep(Duration::from_millis(1));
        }
        drop(keeper);
        let last = written();
        std::thread::sleep(Duration::from_millis(50));
        assert_eq!(written(), last, "a dropped keeper writes no more");
    }

    #[test]
    fn a_file_that_is_no_snapshot_is_left_alone_and_a_place_for_none_is_refused_at_the_start() {
        let (folder, path) = file();
        for content in [&b"token"[..], b"not a snapshot", &[0; 100]] {
            std::fs::write(&path, content).unwrap();
            let error = Keeper::start(table(), &path, None).unwrap_err();
            assert!(matches!(error, BadPlace::Occupied { .. }), "{error}");
            assert_eq!(std::fs::read(&path).unwrap(), content);
        }
        for place in [folder.path().to_owned(), folder.path().join("none").join("file")] {
            let error = Keeper::start(table(), &place, None).unwrap_err();
            assert!(matches!(error, BadPlace::NotWritable { .. }), "{error}");
        }
    }

    #[test]
    fn a_damaged_file_is_a_cold_start_and_a_failed_write_is_counted() {
        let (folder, path) = file();
        std::fs::write(&path, snapshot::format::MAGIC).unwrap();
        let table = table();
        let keeper = Keeper::start(Arc::clone(&table), &path, None).unwrap();
        assert_eq!(table.len(), 0);
        drop(folder);
        assert!(keeper.write().is_err());
        let mut stats = Stats::default();
        keeper.status().stats(&mut stats);
        assert_eq!(stats.counter_value("snapshots_failed"), 1);
    }
}
