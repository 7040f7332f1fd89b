//! The snapshot file: a regular file that one process owns at a time.
//!
//! A snapshot is written to a temporary file beside it, which is then renamed. So the path holds a
//! whole snapshot at every moment, the old one or the new one, even if the process or the machine
//! fails during the write.
//!
//! The owner holds a lock (`flock`) on `<name>.lock`, not on the snapshot itself, which each write
//! replaces. The lock file contains the owner's process id. It is removed when the owner closes it;
//! after a crash it stays, unlocked, and the next owner takes it over. The temporary file is locked
//! as well, so that a live owner keeps it even if the lock file was deleted by hand.

use super::sealed::{Fault, Size};
use super::{
    Content, LoadError, LoadReport, SnapshotPart, SnapshotReport, WriteError, load, write_all,
};
use crate::byte_store::ByteStore;
use crate::table::Table;
use std::ffi::{OsStr, OsString};
use std::fs::{self, File, FileType, Metadata, OpenOptions, TryLockError};
use std::io::{self, ErrorKind, Read, Seek, Write};
use std::marker::PhantomData;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;
use thiserror::Error;

/// A snapshot file that this process owns, of a label table or of a byte store. Dropping it
/// releases the lock.
#[derive(Debug)]
pub struct SnapshotFile<S = Table> {
    path: PathBuf,
    removed: usize,
    /// Held during a write: there is one temporary file.
    writing: Mutex<()>,
    _lock: Lock,
    _store: PhantomData<fn(&S)>,
}

/// Why a path cannot be used for snapshots.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum OpenError {
    /// The path leads to a directory, a FIFO, a device or a socket. Name a regular file.
    #[error("{path:?} is {kind}; a snapshot must be a regular file")]
    NotRegular {
        /// The path.
        path: PathBuf,
        /// The kind of file, with its article.
        kind: &'static str,
    },
    /// The file is not a snapshot of this kind of store, and a write would destroy it. Name another
    /// file, or remove it.
    #[error("{path:?} is not a snapshot of {store} and would be overwritten: name another file")]
    NotASnapshot {
        /// The file.
        path: PathBuf,
        /// The kind of store, with its article.
        store: &'static str,
    },
    /// Another process uses the file. Stop it, or name another file.
    #[error("the snapshot {path:?} is in use by {}; name another file, or stop that process first",
        owner(*pid))]
    InUse {
        /// The file, with symbolic links resolved.
        path: PathBuf,
        /// The process, as the lock file names it.
        pid: Option<u32>,
    },
    /// The file cannot be read, or no file can be created beside it. Check the directory and the
    /// permissions.
    #[error("cannot {action} {path:?}: {source}")]
    Io {
        /// The step that failed.
        action: &'static str,
        /// The file or directory.
        path: PathBuf,
        /// The error of the system.
        source: io::Error,
    },
}

fn owner(pid: Option<u32>) -> String {
    pid.map_or_else(|| "another process".to_owned(), |pid| format!("process {pid}"))
}

impl SnapshotFile {
    /// Takes ownership of the file at `path`, which need not exist yet, for a label table. Symbolic
    /// links are followed now, once: the file that they lead to is the one that is read and
    /// replaced.
    ///
    /// Removes temporary files of earlier owners.
    ///
    /// # Errors
    ///
    /// [`OpenError`]; then nothing has changed on the disk.
    pub fn open(path: impl AsRef<Path>) -> Result<Self, OpenError> {
        Self::take(path.as_ref())
    }
}

impl SnapshotFile<ByteStore> {
    /// As [`SnapshotFile::open`], for a byte store.
    ///
    /// # Errors
    ///
    /// As [`SnapshotFile::open`].
    pub fn open_bytes(path: impl AsRef<Path>) -> Result<Self, OpenError> {
        Self::take(path.as_ref())
    }
}

impl<S: Content> SnapshotFile<S> {
    fn take(given: &Path) -> Result<Self, OpenError> {
        let path = resolve(given)?;
        let failed = |action, path: &Path| {
            let path = path.to_owned();
            move |source| OpenError::Io { action, path, source }
        };
        let not_a_snapshot = || OpenError::NotASnapshot { path: given.to_owned(), store: S::NAME };
        match begins_with_part_of(&path, S::MAGIC) {
            Ok(true) => {}
            Ok(false) => return Err(not_a_snapshot()),
            Err(Fault::NotRegular(kind)) => {
                return Err(OpenError::NotRegular { path: given.to_owned(), kind });
            }
            Err(Fault::Io(error)) if error.kind() == ErrorKind::NotFound => {}
            Err(Fault::Io(error)) => return Err(failed("read", given)(error)),
            Err(_) => return Err(not_a_snapshot()),
        }
        let lock_path = beside(&path, ".lock");
        let lock = match Lock::take(&lock_path).map_err(failed("lock", &lock_path))? {
            Ok(lock) => lock,
            Err(pid) => return Err(OpenError::InUse { path, pid }),
        };
        let removed = remove_temporary_files(&path);
        // A first write that fails hours later would be too late.
        let probe = temporary(&path);
        create(&probe).and_then(|_| fs::remove_file(&probe)).map_err(failed("create", &probe))?;
        Ok(Self { path, removed, writing: Mutex::new(()), _lock: lock, _store: PhantomData })
    }

    /// The file, with symbolic links resolved.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The number of unfinished snapshots of earlier owners that [`open`](Self::open) removed.
    pub fn removed(&self) -> usize {
        self.removed
    }

    /// The file together with its store, for a [`SnapshotWriter`](super::SnapshotWriter).
    pub fn of(self, store: Arc<S>) -> SnapshotPart {
        SnapshotPart::new(store, self)
    }

    /// Loads the snapshot into `store`: [`load`].
    ///
    /// # Errors
    ///
    /// As [`load`].
    pub fn load(&self, store: &S) -> Result<LoadReport, LoadError> {
        load(store, &self.path)
    }

    /// Replaces the snapshot by one of `store`. Readers and writers of the store continue
    /// meanwhile: an entry that stays in the store for the whole time is in the snapshot. A
    /// second caller waits for the first.
    ///
    /// # Errors
    ///
    /// [`WriteError`], and then the path still holds the previous snapshot.
    pub fn write(&self, store: &S) -> Result<SnapshotReport, WriteError> {
        self.write_through(store, |file| file)
    }

    /// [`write`](Self::write) into `wrap(file)`, with which tests simulate a failing disk.
    fn write_through<F: Durable>(
        &self,
        store: &S,
        wrap: impl FnOnce(File) -> F,
    ) -> Result<SnapshotReport, WriteError> {
        let started = Instant::now();
        let _one_at_a_time = self.writing.lock().unwrap_or_else(PoisonError::into_inner);
        let path = &self.path;
        let temporary = temporary(path);
        let failed = |action, path: &Path| {
            let path = path.to_owned();
            move |source| WriteError { action, path, source }
        };
        let file = create(&temporary).map_err(failed("create", &temporary))?;
        let written = (|| {
            let mut file = wrap(file);
            let Size { entries, bytes } =
                write_all(store, &mut file).map_err(failed("write", &temporary))?;
            file.sync().map_err(failed("flush", &temporary))?;
            drop(file);
            fs::rename(&temporary, path).map_err(failed("rename the new snapshot to", path))?;
            let directory = directory(path);
            let flushed = File::open(directory).and_then(|directory| directory.sync_all());
            flushed.map_err(failed("flush the directory", directory))?;
            Ok(SnapshotReport { entries, bytes, elapsed: started.elapsed() })
        })();
        if written.is_err() {
            // On a full disk an unfinished snapshot takes space for nothing.
            let _ = fs::remove_file(&temporary);
        }
        written
    }
}

/// A file that can be made durable.
trait Durable: Write + Seek {
    /// Waits until the written bytes are on the disk.
    fn sync(&self) -> io::Result<()>;
}

impl Durable for File {
    fn sync(&self) -> io::Result<()> {
        self.sync_all()
    }
}

/// Opens a regular file for reading. Other kinds are refused without opening them, since opening a
/// FIFO would wait for a writer, and opening some devices changes them.
pub(super) fn open_regular(path: &Path) -> Result<File, Fault> {
    check_kind(&fs::metadata(path)?)?;
    // In case the file was replaced since.
    let file = without_waiting(OpenOptions::new().read(true)).open(path)?;
    check_kind(&file.metadata()?)?;
    Ok(file)
}

fn check_kind(metadata: &Metadata) -> Result<(), Fault> {
    let kind = metadata.file_type();
    if kind.is_file() { Ok(()) } else { Err(Fault::NotRegular(name_of(kind))) }
}

fn name_of(kind: FileType) -> &'static str {
    #[cfg(unix)]
    {
        use std::os::unix::fs::FileTypeExt;
        if kind.is_fifo() {
            return "a FIFO";
        }
        if kind.is_socket() {
            return "a socket";
        }
        if kind.is_char_device() || kind.is_block_device() {
            return "a device";
        }
    }
    if kind.is_dir() { "a directory" } else { "a special file" }
}

/// Whether the file is empty or begins with `magic`, or with a part of it.
fn begins_with_part_of(path: &Path, magic: [u8; 8]) -> Result<bool, Fault> {
    let mut start = Vec::new();
    open_regular(path)?.take(magic.len() as u64).read_to_end(&mut start)?;
    Ok(magic.starts_with(&start))
}

/// The most symbolic links that are followed: as many as Linux follows.
const MAX_LINKS: usize = 40;

/// The real path of a file that may not exist yet, also behind symbolic links.
fn resolve(given: &Path) -> Result<PathBuf, OpenError> {
    let failed = |source| OpenError::Io { action: "find", path: given.to_owned(), source };
    match fs::metadata(given) {
        Ok(metadata) => {
            if let Err(Fault::NotRegular(kind)) = check_kind(&metadata) {
                return Err(OpenError::NotRegular { path: given.to_owned(), kind });
            }
            return fs::canonicalize(given).map_err(failed);
        }
        Err(error) if error.kind() == ErrorKind::NotFound => {}
        Err(error) => return Err(failed(error)),
    }
    // The file does not exist. The last component may be a link all the same.
    let mut path = given.to_owned();
    for _ in 0..MAX_LINKS {
        match fs::read_link(&path) {
            Ok(target) => path = directory(&path).join(target),
            Err(_) => break,
        }
    }
    let Some(name) = path.file_name() else {
        return Err(failed(io::Error::new(ErrorKind::InvalidInput, "the path names no file")));
    };
    Ok(fs::canonicalize(directory(&path)).map_err(failed)?.join(name))
}

/// A locked file that contains the id of this process.
#[derive(Debug)]
struct Lock {
    file: File,
    path: PathBuf,
}

impl Lock {
    /// Takes the lock, or returns the id of the process that holds it.
    fn take(path: &Path) -> io::Result<Result<Self, Option<u32>>> {
        loop {
            let mut options = OpenOptions::new();
            options.read(true).write(true).create(true);
            let mut file = without_following(&mut options).open(path)?;
            if !file.metadata()?.is_file() {
                return Err(io::Error::new(ErrorKind::InvalidInput, "it is not a regular file"));
            }
            match file.try_lock() {
                Ok(()) => {}
                Err(TryLockError::WouldBlock) => {
                    let mut text = String::new();
                    let _ = file.take(16).read_to_string(&mut text);
                    return Ok(Err(text.trim().parse().ok()));
                }
                // A file system without locks. Snapshots worked there before there was a lock.
                Err(TryLockError::Error(error)) if error.kind() == ErrorKind::Unsupported => {
                    tracing::warn!(
                        "cannot lock {}: {error}; let no other process use this snapshot",
                        path.display()
                    );
                }
                Err(TryLockError::Error(error)) => return Err(error),
            }
            // The previous owner removes the file when it closes it. A lock on a removed file
            // protects nothing.
            if is_at(&file, path) {
                file.set_len(0)?;
                writeln!(file, "{}", std::process::id())?;
                return Ok(Ok(Self { file, path: path.to_owned() }));
            }
        }
    }
}

impl Drop for Lock {
    fn drop(&mut self) {
        if is_at(&self.file, &self.path) {
            // A lock file that stays is taken over by the next owner.
            let _ = fs::remove_file(&self.path);
        }
    }
}

/// Whether this open file is the one at `path`.
#[cfg(unix)]
fn is_at(file: &File, path: &Path) -> bool {
    use std::os::unix::fs::MetadataExt;
    let (Ok(open), Ok(there)) = (file.metadata(), fs::symlink_metadata(path)) else { return false };
    (open.dev(), open.ino()) == (there.dev(), there.ino())
}

/// An open file cannot be removed on these systems.
#[cfg(not(unix))]
fn is_at(_: &File, _: &Path) -> bool {
    true
}

/// Creates a file that only its owner can read, and locks it.
fn create(path: &Path) -> io::Result<File> {
    let mut options = OpenOptions::new();
    let file = without_following(options.write(true).create_new(true)).open(path)?;
    // On a file system without locks the lock file's warning stands for this one, too.
    let _ = file.try_lock();
    Ok(file)
}

#[cfg(unix)]
fn without_waiting(options: &mut OpenOptions) -> &mut OpenOptions {
    use std::os::unix::fs::OpenOptionsExt;
    options.custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY)
}

#[cfg(not(unix))]
fn without_waiting(options: &mut OpenOptions) -> &mut OpenOptions {
    options
}

/// For files that are created: not through a symbolic link, and readable by their owner alone.
#[cfg(unix)]
fn without_following(options: &mut OpenOptions) -> &mut OpenOptions {
    use std::os::unix::fs::OpenOptionsExt;
    options.custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY | libc::O_NOFOLLOW).mode(0o600)
}

#[cfg(not(unix))]
fn without_following(options: &mut OpenOptions) -> &mut OpenOptions {
    options
}

/// The directory that contains `path`.
fn directory(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if parent != Path::new("") => parent,
        _ => Path::new("."),
    }
}

/// The file beside `path` whose name continues with `end`.
fn beside(path: &Path, end: &str) -> PathBuf {
    let mut name = path.file_name().unwrap_or(OsStr::new("snapshot")).to_owned();
    name.push(end);
    directory(path).join(name)
}

const TEMPORARY: &str = ".tmp-";

/// The file that this process writes a snapshot to.
fn temporary(path: &Path) -> PathBuf {
    beside(path, &format!("{TEMPORARY}{}", std::process::id()))
}

/// Removes the temporary files of earlier owners, and counts them. A file that cannot be removed
/// only takes space.
fn remove_temporary_files(path: &Path) -> usize {
    let start: OsString = beside(path, TEMPORARY).file_name().unwrap_or_default().to_owned();
    let Ok(listing) = fs::read_dir(directory(path)) else { return 0 };
    let unfinished = listing.flatten().filter(|entry| {
        // The rest of the name must be a process id: other files are not ours.
        entry
            .file_name()
            .as_encoded_bytes()
            .strip_prefix(start.as_encoded_bytes())
            .is_some_and(|id| !id.is_empty() && id.iter().all(u8::is_ascii_digit))
    });
    let abandoned = unfinished.filter(|entry| {
        // A live writer holds a lock.
        open_regular(&entry.path())
            .is_ok_and(|file| !matches!(file.try_lock(), Err(TryLockError::WouldBlock)))
    });
    abandoned.filter(|entry| fs::remove_file(entry.path()).is_ok()).count()
}

// Miri has no files.
#[cfg(all(test, not(miri)))]
mod tests {
    use super::*;
    use crate::table::Capacity;
    use std::io::SeekFrom;

    /// A file on a disk with `room` bytes left, which cannot be flushed unless it `keeps` them.
    struct Disk {
        file: File,
        room: u64,
        keeps: bool,
    }

    impl Write for Disk {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            let fits = bytes.len().min(self.room as usize);
            if fits == 0 {
                return Err(ErrorKind::StorageFull.into());
            }
            self.room -= fits as u64;
            self.file.write(&bytes[..fits])
        }

        fn flush(&mut self) -> io::Result<()> {
            self.file.flush()
        }
    }

    impl Seek for Disk {
        fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
            self.file.seek(to)
        }
    }

    impl Durable for Disk {
        fn sync(&self) -> io::Result<()> {
            if self.keeps { Ok(()) } else { Err(io::Error::other("the disk is broken")) }
        }
    }

    #[test]
    fn a_failed_write_keeps_the_previous_snapshot() {
        let folder = tempfile::tempdir().unwrap();
        let file = SnapshotFile::open(folder.path().join("snapshot")).unwrap();
        let filled = |generation| {
            let table = Table::new(Capacity::Entries(1000)).unwrap();
            for key in 0..100 {
                table.insert(key, generation);
            }
            table
        };
        let generation = || {
            let table = Table::new(Capacity::Entries(1000)).unwrap();
            assert_eq!(file.load(&table).unwrap().entries, 100);
            table.get(0).unwrap()
        };
        let bytes = file.write(&filled(1)).unwrap().bytes;
        for (room, keeps) in (0..bytes).map(|room| (room, true)).chain([(u64::MAX, false)]) {
            let error =
                file.write_through(&filled(2), |file| Disk { file, room, keeps }).unwrap_err();
            assert_eq!(error.action, if keeps { "write" } else { "flush" });
            assert!(!temporary(file.path()).exists(), "room for {room}");
            assert_eq!(generation(), 1, "room for {room}");
        }
        file.write_through(&filled(2), |file| Disk { file, room: bytes, keeps: true }).unwrap();
        assert_eq!(generation(), 2);
    }

    #[test]
    fn a_bare_file_name_is_in_the_working_directory() {
        assert_eq!(directory(Path::new("snapshot")), Path::new("."));
        assert_eq!(beside(Path::new("a/b.snap"), ".lock"), Path::new("a/b.snap.lock"));
    }
}
