//! Snapshots: the entries of a label table or a byte store in a file, so that a restart is warm.
//!
//! [`SnapshotFile`] owns the file and replaces it as a whole; [`SnapshotWriter`] is a thread that
//! does so at intervals and on request. [`load`] uses nothing that it has not checked: a file with
//! one wrong bit is refused, and the store stays as it was. `cache/SNAPSHOT.md` describes the
//! formats byte by byte.

pub(crate) mod blocks;
pub(crate) mod file;
pub(crate) mod header;
pub(crate) mod records;
pub(crate) mod writer;

use file::open_regular;
use header::Header;
use sealed::Fault;
use std::io::{self, BufReader, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};
use thiserror::Error;

pub use file::{OpenError, SnapshotFile};
pub use writer::{RequestError, SnapshotHandle, SnapshotPart, SnapshotWriter, Written};

/// A store whose entries fit into a snapshot: a [`Table`](crate::Table) or a
/// [`ByteStore`](crate::ByteStore).
pub trait Content: sealed::Content {}

impl<S: sealed::Content> Content for S {}

pub(crate) mod sealed {
    use super::Header;
    use std::fmt;
    use std::io::{self, Read, Write};

    /// The format of a store's entries. The caller writes and reads the header.
    pub trait Content: fmt::Debug + Send + Sync + 'static {
        /// The first bytes of the file.
        const MAGIC: [u8; 8];

        /// The store in messages, with its article.
        const NAME: &'static str;

        /// Writes all entries.
        fn write_entries(&self, id: u64, file: &mut impl Write) -> io::Result<Size>;

        /// Reads and checks all entries, and returns the offset behind the last one.
        fn check_entries(header: Header, file: &mut impl Read) -> Result<u64, Fault>;

        /// Reads and checks all entries, and puts them into the store.
        fn restore_entries(&self, header: Header, file: &mut impl Read) -> Result<Restored, Fault>;
    }

    /// A fault of a snapshot, without its path.
    #[derive(Debug)]
    pub enum Fault {
        Io(io::Error),
        NotRegular(&'static str),
        NotASnapshot,
        UnsupportedVersion(u32),
        Damaged { offset: u64, what: &'static str },
    }

    /// The size of written entries.
    #[derive(Clone, Copy, Debug, Default)]
    pub struct Size {
        pub entries: u64,
        pub bytes: u64,
    }

    /// The outcome of loading the entries of a file.
    #[derive(Clone, Copy, Debug, Default)]
    pub struct Restored {
        pub restored: u64,
        pub expired: u64,
        pub evicted: u64,
    }
}

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
    /// Entries among them that were put into the store. The others were expired or too large, or
    /// the store had newer values for their keys.
    pub restored: u64,
    /// Expired entries.
    pub expired: u64,
    /// Entries that were evicted to free space for others. There can be some even in a store of
    /// the same capacity if it was not empty.
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
    /// The file is not a snapshot of this kind of store. Check the path.
    #[error("{path:?} is not a snapshot of {store}")]
    NotASnapshot {
        /// The file.
        path: PathBuf,
        /// The kind of store, with its article.
        store: &'static str,
    },
    /// Another version of this program wrote the snapshot. Start without it.
    #[error("the snapshot {path:?} has version {version}; this program reads version {supported}",
        supported = header::VERSION)]
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

/// Loads the snapshot at `path` into `store`, whose capacity may differ from that of the store that
/// was written. A smaller label table tends to keep the most valuable entries. Entries that are
/// already in the store and newer stay. Expired entries are skipped.
///
/// # Errors
///
/// [`LoadError`]. Then nothing was put into the store, unless the file changed while it was being
/// read (it is read twice, and checked each time).
pub fn load<S: Content>(store: &S, path: impl AsRef<Path>) -> Result<LoadReport, LoadError> {
    let path = path.as_ref();
    let started = Instant::now();
    read_file(store, path)
        .map(|(entries, sealed::Restored { restored, expired, evicted })| LoadReport {
            entries,
            restored,
            expired,
            evicted,
            elapsed: started.elapsed(),
        })
        .map_err(|fault| fault.in_file::<S>(path))
}

fn read_file<S: Content>(store: &S, path: &Path) -> Result<(u64, sealed::Restored), Fault> {
    let mut file = BufReader::with_capacity(1 << 18, open_regular(path)?);
    check_all::<S>(&mut file)?;
    file.seek(SeekFrom::Start(0))?;
    let header = read_header::<S>(&mut file)?;
    Ok((header.entries, store.restore_entries(header, &mut file)?))
}

/// Writes header and entries; returns the numbers of entries and bytes. The header is written last,
/// so that an unfinished file has no valid header.
fn write_all<S: Content>(store: &S, file: &mut (impl Write + Seek)) -> io::Result<sealed::Size> {
    let id = new_id();
    file.seek(SeekFrom::Start(Header::BYTES as u64))?;
    let sealed::Size { entries, bytes } = store.write_entries(id, file)?;
    file.seek(SeekFrom::Start(0))?;
    file.write_all(&Header { id, entries }.encode(S::MAGIC))?;
    Ok(sealed::Size { entries, bytes: bytes + Header::BYTES as u64 })
}

/// Reads and checks a whole snapshot, and returns its number of entries.
fn check_all<S: Content>(file: &mut impl Read) -> Result<u64, Fault> {
    let header = read_header::<S>(file)?;
    let offset = S::check_entries(header, file)?;
    match file.read(&mut [0])? {
        0 => Ok(header.entries),
        _ => Err(Fault::Damaged { offset, what: "bytes follow the last entry" }),
    }
}

fn read_header<S: Content>(file: &mut impl Read) -> Result<Header, Fault> {
    let mut header = [0; Header::BYTES];
    read_exact(file, &mut header, 0)?;
    Header::decode(&header, S::MAGIC)
}

impl Fault {
    fn in_file<S: Content>(self, path: &Path) -> LoadError {
        let path = path.to_owned();
        match self {
            Self::Io(error) if error.kind() == io::ErrorKind::NotFound => {
                LoadError::Missing { path }
            }
            Self::Io(source) => LoadError::Io { path, source },
            Self::NotRegular(kind) => LoadError::NotRegular { path, kind },
            Self::NotASnapshot => LoadError::NotASnapshot { path, store: S::NAME },
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
