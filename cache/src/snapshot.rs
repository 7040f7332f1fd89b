//! Snapshots: the table's entries in a file, so that a restart is warm.
//!
//! [`SnapshotFile`] owns the file and replaces it as a whole; [`SnapshotWriter`] is a thread that
//! does so at intervals and on request. [`load`] uses nothing that it has not checked: a file with
//! one wrong bit is refused, and the table stays as it was. `cache/SNAPSHOT.md` describes the
//! format byte by byte.

pub(crate) mod file;
pub(crate) mod format;
pub(crate) mod writer;

use crate::bucket::{Entry, Insert};
use crate::table::Table;
use file::open_regular;
use format::{Block, Header};
use std::io::{self, BufReader, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};
use thiserror::Error;

pub use file::{OpenError, SnapshotFile};
pub use writer::{RequestError, SnapshotHandle, SnapshotWriter, Written};

/// The result of [`SnapshotFile::write`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct SnapshotReport {
    /// Entries in the snapshot.
    pub entries: u64,
    /// Size of the file.
    pub bytes: u64,
    /// Time until the snapshot was safe on the disk.
    pub elapsed: Duration,
}

/// The result of [`load`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct LoadReport {
    /// Entries in the snapshot.
    pub entries: u64,
    /// Entries among them that were put into the table. The keys of the others were in the table
    /// already, with newer values.
    pub restored: u64,
    /// Entries that were evicted to make room for others. There can be some even in a table of the
    /// same capacity if it was not empty.
    pub evicted: u64,
    /// Time for reading and checking.
    pub elapsed: Duration,
}

/// Why no snapshot was written. The previous one is still in place, unless only the last step
/// failed: to flush the directory, which makes the new name durable.
#[derive(Debug, Error)]
#[error("cannot {action} {path:?}: {source}")]
pub struct WriteError {
    /// The step that failed.
    pub action: &'static str,
    /// The file or directory.
    pub path: PathBuf,
    /// The error of the system.
    pub source: io::Error,
}

/// Why nothing was loaded.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum LoadError {
    /// There is no file, as at the first start.
    #[error("there is no snapshot at {path:?}")]
    Missing {
        /// The expected file.
        path: PathBuf,
    },
    /// The file cannot be read. Check its permissions and the disk.
    #[error("cannot read the snapshot {path:?}: {source}")]
    Io {
        /// The file.
        path: PathBuf,
        /// The error of the system.
        source: io::Error,
    },
    /// The path leads to a directory, a FIFO, a device or a socket.
    #[error("{path:?} is {kind}; a snapshot must be a regular file")]
    NotRegular {
        /// The path.
        path: PathBuf,
        /// The kind of file, with its article.
        kind: &'static str,
    },
    /// The file is not a snapshot. Check the path.
    #[error("{path:?} is not a snapshot")]
    NotASnapshot {
        /// The file.
        path: PathBuf,
    },
    /// Another version of this program wrote the snapshot. Start without it.
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
        /// The start of the damaged part.
        offset: u64,
        /// The rule that the part breaks.
        what: &'static str,
    },
}

/// Loads the snapshot at `path` into `table`, whose capacity may differ from that of the table that
/// was written. A smaller table tends to keep the most valuable entries. Keys that are already in
/// the table keep their values.
///
/// # Errors
///
/// [`LoadError`]. Then nothing was put into the table, unless the file changed while it was being
/// read (it is read twice, and checked each time).
pub fn load(table: &Table, path: impl AsRef<Path>) -> Result<LoadReport, LoadError> {
    let path = path.as_ref();
    let started = Instant::now();
    let in_file = |fault: Fault| fault.in_file(path);
    let file = open_regular(path).map_err(in_file)?;
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

/// Writes header and blocks; returns the numbers of entries and bytes. The header is written last,
/// so that an unfinished file has no valid header.
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

/// Reads and checks a whole snapshot, calls `each` with the entries of valid blocks, and returns
/// their number.
fn read_all(file: &mut impl Read, mut each: impl FnMut(Entry)) -> Result<u64, Fault> {
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
        return Err(Fault::Damaged {
            offset,
            what: "there are more entries than the header states",
        });
    }
    match file.read(&mut [0])? {
        0 => Ok(entries),
        _ => Err(Fault::Damaged { offset, what: "bytes follow the last block" }),
    }
}

/// A fault of a snapshot, without its path.
enum Fault {
    Io(io::Error),
    NotRegular(&'static str),
    NotASnapshot,
    UnsupportedVersion(u32),
    Damaged { offset: u64, what: &'static str },
}

impl Fault {
    fn in_file(self, path: &Path) -> LoadError {
        let path = path.to_owned();
        match self {
            Self::Io(error) if error.kind() == io::ErrorKind::NotFound => {
                LoadError::Missing { path }
            }
            Self::Io(source) => LoadError::Io { path, source },
            Self::NotRegular(kind) => LoadError::NotRegular { path, kind },
            Self::NotASnapshot => LoadError::NotASnapshot { path },
            Self::UnsupportedVersion(version) => LoadError::UnsupportedVersion { path, version },
            Self::Damaged { offset, what } => LoadError::Damaged { path, offset, what },
        }
    }
}

impl From<io::Error> for Fault {
    fn from(error: io::Error) -> Self {
        Self::Io(error)
    }
}

/// Fills `buffer` from the part of the file that starts at `offset`. An early end of the file is
/// damage.
fn read_exact(file: &mut impl Read, buffer: &mut [u8], offset: u64) -> Result<(), Fault> {
    file.read_exact(buffer).map_err(|error| match error.kind() {
        io::ErrorKind::UnexpectedEof => Fault::Damaged { offset, what: "the file ends here" },
        _ => Fault::Io(error),
    })
}

/// A number that distinguishes the blocks of this snapshot from those of any other.
fn new_id() -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    now.as_nanos() as u64 ^ u64::from(std::process::id()).rotate_left(48)
}
