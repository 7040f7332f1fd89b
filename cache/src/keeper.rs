//! Keeps a table's snapshot: loads it at the start, writes it now and then, whenever it is asked
//! to, and once more at the end.

mod requests;
// They need files and processes, which Miri has not.
#[cfg(test)]
#[cfg(not(miri))]
mod tests;

use std::fmt;
use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, SystemTime};

use crate::Table;
use crate::background::yield_to_readers;
use crate::snapshot::{self, LoadError, SnapshotReport, WriteError};
use requests::{Desk, Last};

pub use requests::{KeeperHandle, RequestError, Written};

/// A thread that writes a table's snapshot while others go on using the table.
pub struct Keeper {
    desk: Arc<Desk>,
    thread: Option<JoinHandle<()>>,
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

impl Keeper {
    /// Loads the snapshot at `path` into `table`, if there is a good one, and writes it anew
    /// `every` so often, if that is given.
    ///
    /// A snapshot that is damaged or cannot be read is a cold start with a warning in the log; it
    /// is left where it is until the next snapshot takes its place.
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
        let last = load(&table, path);
        let desk = Arc::new(Desk::new(table, path.to_owned(), last));
        let work = {
            let desk = Arc::clone(&desk);
            move || {
                yield_to_readers();
                desk.work(every);
            }
        };
        let thread = std::thread::Builder::new().name("snapshot".into()).spawn(work);
        let thread = Some(thread.expect("the system has room for a thread"));
        Ok(Keeper { desk, thread })
    }

    /// Writes a snapshot now, on this thread.
    ///
    /// # Errors
    /// [`WriteError`]; the last good snapshot is still in place then.
    pub fn write(&self) -> Result<SnapshotReport, WriteError> {
        self.desk.write()
    }

    /// Ends the thread and writes the last snapshot.
    ///
    /// # Errors
    /// As [`Keeper::write`].
    pub fn finish(mut self) -> Result<SnapshotReport, WriteError> {
        self.stop();
        self.write()
    }

    /// Something that can ask for snapshots, and tell of them, after the keeper itself has gone
    /// elsewhere.
    pub fn handle(&self) -> KeeperHandle {
        KeeperHandle::new(Arc::clone(&self.desk))
    }

    fn stop(&mut self) {
        if let Some(thread) = self.thread.take() {
            self.desk.stop();
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
        f.debug_struct("Keeper").field("path", &self.desk.path()).finish_non_exhaustive()
    }
}

/// Loads what is at `path`, says in the log how it went, and tells of the snapshot if it was a good
/// one.
fn load(table: &Table, path: &Path) -> Option<Last> {
    match snapshot::load(table, path) {
        Ok(report) => {
            tracing::info!(
                "loaded {} of {} entries from {} in {:.1?}",
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
