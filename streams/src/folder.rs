//! A folder of checkpoints, one file for each run, and leases that fence former holders.
//!
//! A lease has a generation. Taking a lease writes the next generation into the run's file, under a
//! lock of the system, and a lease of an older generation can no longer write. So of two instances
//! that share a folder, only the newest holder of a run changes its checkpoint.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::checkpoint::Checkpoint;

/// Bytes of the longest id.
const MAX_ID: usize = 64;

/// Bytes of the largest file of a run: folds have at most some megabytes.
const MAX_FILE: u64 = 64 << 20;

/// Why a checkpoint cannot be read or written.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum FolderError {
    /// The id cannot be the name of a file.
    #[error("invalid id {0:?}; expected 1 to {MAX_ID} letters, digits, hyphens and underscores")]
    Id(String),
    /// There is no checkpoint of this id.
    #[error("there is no checkpoint of {0:?} to resume")]
    Unknown(String),
    /// There is a checkpoint of this id already.
    #[error("there is a checkpoint of {0:?} already; resume it, or choose another id")]
    Exists(String),
    /// Another client or instance continues the run.
    #[error("another connection continues this run")]
    Fenced,
    /// The file is damaged.
    #[error("the checkpoint {0} is damaged")]
    Damaged(PathBuf),
    /// The file cannot be read or written.
    #[error("cannot use the checkpoint {0}")]
    Io(PathBuf, #[source] io::Error),
}

/// A folder of checkpoints.
#[derive(Clone, Debug)]
pub struct Folder(PathBuf);

/// Whether a run begins or continues.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Start {
    /// There must be no checkpoint of this id.
    #[default]
    New,
    /// There must be one.
    Resume,
    /// Either.
    Any,
}

impl Folder {
    /// The folder at `path`, which is created if there is none.
    ///
    /// # Errors
    /// If it cannot be created.
    pub fn open(path: &Path) -> Result<Self, FolderError> {
        fs::create_dir_all(path).map_err(|error| FolderError::Io(path.to_owned(), error))?;
        Ok(Folder(path.to_owned()))
    }

    /// Takes the lease of a run, and fences the one before. Returns the checkpoint, if there is
    /// one.
    ///
    /// # Errors
    /// If the id is invalid, `start` does not fit, or the file cannot be used.
    pub fn lease(
        &self,
        id: &str,
        start: Start,
    ) -> Result<(Lease, Option<Checkpoint>), FolderError> {
        let is_allowed = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_');
        if id.is_empty() || id.len() > MAX_ID || !id.bytes().all(is_allowed) {
            return Err(FolderError::Id(id.to_owned()));
        }
        let path = self.0.join(format!("{id}.run"));
        let mut lease = Lease { folder: self.0.clone(), path, generation: 0 };
        let _lock = lease.lock()?;
        let stored = lease.read()?;
        match (&stored, start) {
            (None, Start::Resume) => return Err(FolderError::Unknown(id.to_owned())),
            (Some((_, Some(_))), Start::New) => return Err(FolderError::Exists(id.to_owned())),
            _ => {}
        }
        let (generation, checkpoint) = stored.unwrap_or_default();
        lease.generation = generation + 1;
        lease.write(checkpoint.as_ref())?;
        Ok((lease, checkpoint))
    }
}

/// The right to write the checkpoint of a run.
#[derive(Clone, Debug)]
pub struct Lease {
    folder: PathBuf,
    path: PathBuf,
    generation: u64,
}

impl Lease {
    /// Stores the checkpoint durably: it survives the end of the process and of the machine.
    ///
    /// # Errors
    /// [`FolderError::Fenced`] if a newer lease exists.
    pub fn save(&self, checkpoint: &Checkpoint) -> Result<(), FolderError> {
        let _lock = self.lock()?;
        match self.read()? {
            Some((generation, _)) if generation == self.generation => self.write(Some(checkpoint)),
            _ => Err(FolderError::Fenced),
        }
    }

    fn error(&self) -> impl Fn(io::Error) -> FolderError + '_ {
        |error| FolderError::Io(self.path.clone(), error)
    }

    /// Waits for the lock of this run. It is released with the file, also when the process ends.
    fn lock(&self) -> Result<File, FolderError> {
        let path = self.path.with_extension("lock");
        let file = OpenOptions::new().create(true).truncate(false).write(true).open(&path);
        let file = file.map_err(self.error())?;
        file.lock().map_err(self.error())?;
        Ok(file)
    }

    /// The generation and the checkpoint of the file, if there is one.
    fn read(&self) -> Result<Option<(u64, Option<Checkpoint>)>, FolderError> {
        let file = match File::open(&self.path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            opened => opened.map_err(self.error())?,
        };
        let mut bytes = Vec::new();
        file.take(MAX_FILE).read_to_end(&mut bytes).map_err(self.error())?;
        let damaged = || FolderError::Damaged(self.path.clone());
        let (generation, checkpoint) = bytes.split_first_chunk::<8>().ok_or_else(damaged)?;
        let checkpoint = match checkpoint {
            [] => None,
            bytes => Some(Checkpoint::from_bytes(bytes).map_err(|_| damaged())?),
        };
        Ok(Some((u64::from_le_bytes(*generation), checkpoint)))
    }

    fn write(&self, checkpoint: Option<&Checkpoint>) -> Result<(), FolderError> {
        let mut bytes = self.generation.to_le_bytes().to_vec();
        if let Some(checkpoint) = checkpoint {
            bytes.extend_from_slice(&checkpoint.to_bytes());
        }
        let temporary = self.path.with_extension("tmp");
        let write = || {
            let mut file = File::create(&temporary)?;
            file.write_all(&bytes)?;
            file.sync_data()?;
            fs::rename(&temporary, &self.path)?;
            // The new name must be durable, too.
            File::open(&self.folder)?.sync_data()
        };
        write().map_err(self.error())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::run::{OnBad, Plan, Run};

    fn checkpoint(bytes: &[u8]) -> Checkpoint {
        let (fold, format) = ("count".to_owned(), "lines".to_owned());
        let mut run =
            Run::new(Plan { fold, format, field: None, limit: 100 }, OnBad::Stop).unwrap();
        run.push(bytes).unwrap();
        run.checkpoint()
    }

    #[test]
    fn a_newer_lease_fences_the_older_one() {
        let folder = tempfile::tempdir().unwrap();
        let folder = Folder::open(folder.path()).unwrap();
        let (first, none) = folder.lease("a", Start::New).unwrap();
        assert_eq!(none, None);
        first.save(&checkpoint(b"1\n")).unwrap();
        let (second, found) = folder.lease("a", Start::Resume).unwrap();
        assert_eq!(found, Some(checkpoint(b"1\n")));
        assert!(matches!(first.save(&checkpoint(b"1\n2\n")), Err(FolderError::Fenced)));
        second.save(&checkpoint(b"1\n2\n3\n")).unwrap();
        let (_, found) = folder.lease("a", Start::Any).unwrap();
        assert_eq!(found, Some(checkpoint(b"1\n2\n3\n")));
        assert!(matches!(folder.lease("a", Start::New), Err(FolderError::Exists(_))));
        assert!(matches!(folder.lease("b", Start::Resume), Err(FolderError::Unknown(_))));
        for id in ["", "../a", "a/b", "a.b", &"a".repeat(65)] {
            assert!(matches!(folder.lease(id, Start::Any), Err(FolderError::Id(_))), "{id}");
        }
    }

    #[test]
    fn any_changed_byte_of_a_checkpoint_is_noticed() {
        let bytes = checkpoint(b"1\n2\n").to_bytes();
        assert_eq!(Checkpoint::from_bytes(&bytes), Ok(checkpoint(b"1\n2\n")));
        for at in 0..bytes.len() {
            let mut damaged = bytes.clone();
            damaged[at] ^= 1;
            assert!(Checkpoint::from_bytes(&damaged).is_err(), "byte {at}");
            assert!(Checkpoint::from_bytes(&bytes[..at]).is_err(), "{at} bytes");
        }
    }
}
