//! Snapshots: the table's entries in a file, so that a restart is warm.
//!
//! [`write()`] puts a snapshot beside the one that is there and then renames it over, so at every
//! moment the path holds one whole snapshot, the old one or the new one, also if the process or the
//! machine dies in the middle. [`load`] believes nothing that it has not checked: a file with one
//! wrong bit is refused, and the table stays as it was. The format stands byte for byte in
//! `cache/SNAPSHOT.md`.
//!
//! One process writes to one path. Two that share a path by mistake may make each other's writes
//! fail, but what is at the path stays whole.

pub(crate) mod format;

use crate::bucket::{Entry, Insert};
use crate::table::Table;
use format::{Block, Header};
use std::ffi::{OsStr, OsString};
use std::fs::{self, File, OpenOptions};
use std::io::{self, BufReader, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};
use thiserror::Error;

/// What [`write()`] wrote.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct SnapshotReport {
    /// Entries in the snapshot.
    pub entries: u64,
    /// The file's size.
    pub bytes: u64,
    /// How long it took, until it was safe on the disk.
    pub elapsed: Duration,
}

/// What [`load`] loaded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct LoadReport {
    /// Entries in the snapshot.
    pub entries: u64,
    /// Among them those that were put into the table. The others' keys were there already, and
    /// what is in the table is newer.
    pub restored: u64,
    /// Entries that had to leave the table again to make room for others. There are some even in a
    /// table of the same capacity if it was not empty.
    pub evicted: u64,
    /// How long it took, checks included.
    pub elapsed: Duration,
}

/// Why there is no new snapshot. The previous one is still in its place, unless all that failed was
/// to make the new name durable, which is the last step.
#[derive(Debug, Error)]
#[error("cannot {action} {path:?}: {source}")]
pub struct WriteError {
    /// What failed.
    pub action: &'static str,
    /// The file or directory that it failed on.
    pub path: PathBuf,
    /// What the system said.
    pub source: io::Error,
}

/// Why nothing was loaded.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum LoadError {
    /// There is no file; so it is at the first start.
    #[error("there is no snapshot at {path:?}")]
    Missing {
        /// Where one was expected.
        path: PathBuf,
    },
    /// The file cannot be read. Look at its permissions, and at the disk.
    #[error("cannot read the snapshot {path:?}: {source}")]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The file is something else. Look at the path.
    #[error("{path:?} is not a snapshot")]
    NotASnapshot {
        /// The file.
        path: PathBuf,
    },
    /// The snapshot was written by another version of this program. Start without it.
    #[error("the snapshot {path:?} has version {version}; this program reads version {supported}",
        supported = format::VERSION)]
    UnsupportedVersion {
        /// The file.
        path: PathBuf,
        /// Its version.
        version: u32,
    },
    /// The snapshot was damaged after it was written. Start without it.
    #[error("the snapshot {path:?} is damaged at byte {offset}: {what}")]
    Damaged {
        /// The file.
        path: PathBuf,
        /// The start of the part that is damaged.
        offset: u64,
        /// What is wrong with it.
        what: &'static str,
    },
}

/// Writes a snapshot of `table` to `path`, replacing the one that is there. Readers and writers of
/// the table go on meanwhile: an entry that stays in the table for the whole time is in the
/// snapshot.
///
/// Removes what writers of this path that died left behind. Only one snapshot is written at a time
/// in a process; others wait.
///
/// # Errors
///
/// [`WriteError`], and then `path` still holds what it held.
pub fn write(table: &Table, path: impl AsRef<Path>) -> Result<SnapshotReport, WriteError> {
    write_through(table, path.as_ref(), |file| file)
}

/// Loads the snapshot at `path` into `table`, which may have another capacity than the one that was
/// written; if it has less, what was worth most tends to stay. Keys that are in the table already
/// keep their values.
///
/// # Errors
///
/// [`LoadError`]; nothing was put into the table then, unless the file changed while it was being
/// read (it is read twice, and checked each time).
pub fn load(table: &Table, path: impl AsRef<Path>) -> Result<LoadReport, LoadError> {
    let path = path.as_ref();
    let started = Instant::now();
    let in_file = |wrong: Wrong| wrong.in_file(path);
    let file = File::open(path).map_err(|error| in_file(error.into()))?;
    let mut file = BufReader::with_capacity(1 << 18, file);
    let entries = read_all(&mut file, |_| {}).map_err(in_file)?;
    file.seek(SeekFrom::Start(0)).map_err(|error| in_file(error.into()))?;
    let (mut restored, mut evicted) = (0, 0);
    read_all(&mut file, |entry| {
        if let Some(outcome) = table.restore(entry) {
            restored += 1;
            evicted += u64::from(matches!(outcome, Insert::Evicted { .. }));
        }
    })
    .map_err(in_file)?;
    Ok(LoadReport { entries, restored, evicted, elapsed: started.elapsed() })
}

/// Removes what writers to `path` that died left behind, and says how many files it were.
/// [`write()`] does the same; this is for a program that starts and will not write soon. No
/// snapshot must be being written to the path by another process.
pub fn remove_leftovers(path: impl AsRef<Path>) -> usize {
    let _one_at_a_time = WRITING.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
    sweep(path.as_ref())
}

/// Held while a snapshot is written, so that a temporary file seen under it is a dead writer's.
pub(crate) static WRITING: Mutex<()> = Mutex::new(());

/// [`write()`], with the file seen through `wrap`, so that tests can make it fail.
fn write_through<F: SnapshotFile>(
    table: &Table,
    path: &Path,
    wrap: impl FnOnce(File) -> F,
) -> Result<SnapshotReport, WriteError> {
    let started = Instant::now();
    let _one_at_a_time = WRITING.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
    sweep(path);
    let aside = aside(path);
    let written = (|| {
        let failed = |action, path: &Path| {
            let path = path.to_owned();
            move |source| WriteError { action, path, source }
        };
        let file = OpenOptions::new().write(true).create_new(true).open(&aside);
        let mut file = wrap(file.map_err(failed("create", &aside))?);
        let (entries, bytes) = write_all(table, &mut file).map_err(failed("write", &aside))?;
        file.sync().map_err(failed("flush", &aside))?;
        drop(file);
        fs::rename(&aside, path).map_err(failed("rename the new snapshot to", path))?;
        let directory = directory(path);
        let flushed = File::open(directory).and_then(|directory| directory.sync_all());
        flushed.map_err(failed("flush the directory", directory))?;
        Ok(SnapshotReport { entries, bytes, elapsed: started.elapsed() })
    })();
    if written.is_err() {
        // It is of no use to anybody, and on a full disk it is in the way. If it is not there, all
        // the better.
        let _ = fs::remove_file(&aside);
    }
    written
}

/// Writes header and blocks; returns how many entries and bytes. The header comes last, so that a
/// file without its end has no beginning either.
fn write_all(table: &Table, file: &mut (impl Write + Seek)) -> io::Result<(u64, u64)> {
    let id = new_id();
    file.seek(SeekFrom::Start(Header::BYTES as u64))?;
    let mut bytes = Header::BYTES as u64;
    let mut entries = 0u64;
    let mut block = Block::new(id);
    for entry in table.entries() {
        entries += 1;
        if block.push(entry) {
            bytes += block.write(file)?;
        }
    }
    if !block.is_empty() {
        bytes += block.write(file)?;
    }
    file.seek(SeekFrom::Start(0))?;
    file.write_all(&Header { id, entries }.encode())?;
    Ok((entries, bytes))
}

/// Reads and checks a whole snapshot, handing out entries of blocks that are right; returns how
/// many.
fn read_all(file: &mut impl Read, mut each: impl FnMut(Entry)) -> Result<u64, Wrong> {
    let mut header = [0; Header::BYTES];
    read_exact(file, &mut header, 0)?;
    let header = Header::decode(&header)?;
    let mut offset = Header::BYTES as u64;
    let mut block = Block::new(header.id);
    let mut entries = 0;
    while entries < header.entries {
        offset += block.read(file, offset)?;
        entries += block.entries().map(&mut each).count() as u64;
    }
    if entries > header.entries {
        return Err(Wrong::Damaged { offset, what: "more entries than the header says" });
    }
    match file.read(&mut [0])? {
        0 => Ok(entries),
        _ => Err(Wrong::Damaged { offset, what: "bytes follow the last block" }),
    }
}

/// What is wrong with a snapshot, not yet saying with which.
enum Wrong {
    Io(io::Error),
    NotASnapshot,
    UnsupportedVersion(u32),
    Damaged { offset: u64, what: &'static str },
}

impl Wrong {
    fn in_file(self, path: &Path) -> LoadError {
        let path = path.to_owned();
        match self {
            Self::Io(error) if error.kind() == io::ErrorKind::NotFound => {
                LoadError::Missing { path }
            }
            Self::Io(source) => LoadError::Io { path, source },
            Self::NotASnapshot => LoadError::NotASnapshot { path },
            Self::UnsupportedVersion(version) => LoadError::UnsupportedVersion { path, version },
            Self::Damaged { offset, what } => LoadError::Damaged { path, offset, what },
        }
    }
}

impl From<io::Error> for Wrong {
    fn from(error: io::Error) -> Self {
        Self::Io(error)
    }
}

/// Fills `buffer` from a part of the file that starts at `offset`; the file's end is damage there.
fn read_exact(file: &mut impl Read, buffer: &mut [u8], offset: u64) -> Result<(), Wrong> {
    file.read_exact(buffer).map_err(|error| match error.kind() {
        io::ErrorKind::UnexpectedEof => Wrong::Damaged { offset, what: "the file ends here" },
        _ => Wrong::Io(error),
    })
}

/// What a snapshot is written into: a file, or one that a test makes fail.
trait SnapshotFile: Write + Seek {
    /// Makes durable what was written.
    fn sync(&self) -> io::Result<()>;
}

impl SnapshotFile for File {
    fn sync(&self) -> io::Result<()> {
        self.sync_all()
    }
}

/// A number that tells this snapshot's blocks from any other's.
fn new_id() -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    now.as_nanos() as u64 ^ u64::from(std::process::id()).rotate_left(48)
}

/// The directory that `path` is in.
fn directory(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if parent != Path::new("") => parent,
        _ => Path::new("."),
    }
}

/// How the names of the files begin in which snapshots for `path` are written.
fn aside_prefix(path: &Path) -> OsString {
    let mut name = path.file_name().unwrap_or(OsStr::new("snapshot")).to_owned();
    name.push(".tmp-");
    name
}

fn aside(path: &Path) -> PathBuf {
    let mut name = aside_prefix(path);
    name.push(std::process::id().to_string());
    directory(path).join(name)
}

/// Removes the temporary files of dead writers to `path`. One that cannot be removed is only
/// untidy.
fn sweep(path: &Path) -> usize {
    let prefix = aside_prefix(path);
    let Ok(listing) = fs::read_dir(directory(path)) else { return 0 };
    let dead = listing.flatten().filter(|file| {
        let name = file.file_name();
        // The rest of the name must be a process id: nobody else's file is removed.
        name.as_encoded_bytes()
            .strip_prefix(prefix.as_encoded_bytes())
            .is_some_and(|id| !id.is_empty() && id.iter().all(u8::is_ascii_digit))
    });
    dead.filter(|file| fs::remove_file(file.path()).is_ok()).count()
}

// They need files and processes, which Miri has not.
#[cfg(test)]
#[cfg(not(miri))]
mod tests;
