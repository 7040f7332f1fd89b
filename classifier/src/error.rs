//! What can go wrong with the files we are given. The engine's errors stand in `engine.rs`.

use std::io;
use std::path::{Path, PathBuf};

/// Why an image or a data set cannot be read.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DataError {
    /// The operating system refused. Check the path and its permissions.
    #[error("{path}: {source}", path = path.display())]
    Io {
        /// The file or directory.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The file named here is bad; `source` says how.
    #[error("{path}: {source}", path = path.display())]
    InFile {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        source: Box<DataError>,
    },
    /// The bytes are not of the format expected. Check that it is the right file.
    #[error("not {expected}: it starts with {found}")]
    Format {
        /// The format expected.
        expected: &'static str,
        /// The first bytes found, printable.
        found: String,
    },
    /// The file ends before what its header promises. It is cut short, or its header lies.
    #[error("{what} needs {needed} bytes; {have} are there")]
    Truncated {
        /// The part that is cut short.
        what: &'static str,
        /// Bytes needed.
        needed: u64,
        /// Bytes there.
        have: u64,
    },
    /// Bytes follow where the file should end. It is not the file it claims to be.
    #[error("{what} ends, but {extra} more bytes follow")]
    Trailing {
        /// The part after which bytes follow.
        what: &'static str,
        /// Bytes too many (at least).
        extra: u64,
    },
    /// A number is outside its range.
    #[error("{what} is {value}; the range is {min} to {max}")]
    OutOfRange {
        /// The thing counted.
        what: &'static str,
        /// Smallest value allowed.
        min: u64,
        /// Largest value allowed.
        max: u64,
        /// Value found.
        value: u64,
    },
    /// Two things that belong together do not fit.
    #[error("{what}: expected {expected}, found {found}")]
    Mismatch {
        /// The thing compared.
        what: &'static str,
        /// What it should be.
        expected: String,
        /// What it is.
        found: String,
    },
    /// The file is of the right format but broken inside.
    #[error("{what} is malformed: {detail}")]
    Malformed {
        /// The format or the part.
        what: &'static str,
        /// How it is broken.
        detail: String,
    },
    /// None of the names a file may have is there. Check the directory.
    #[error("{directory}: none of {names} is there", directory = directory.display())]
    Missing {
        /// The directory searched.
        directory: PathBuf,
        /// The names tried.
        names: String,
    },
}

impl DataError {
    pub(crate) fn io(path: &Path, source: io::Error) -> Self {
        Self::Io { path: path.to_owned(), source }
    }

    pub(crate) fn in_file(self, path: &Path) -> Self {
        match self {
            // These name their file already.
            error @ (Self::Io { .. } | Self::InFile { .. } | Self::Missing { .. }) => error,
            error => Self::InFile { path: path.to_owned(), source: Box::new(error) },
        }
    }

    pub(crate) fn out_of_range(what: &'static str, min: usize, max: usize, value: usize) -> Self {
        Self::OutOfRange { what, min: min as u64, max: max as u64, value: value as u64 }
    }

    pub(crate) fn malformed(what: &'static str, detail: impl Into<String>) -> Self {
        Self::Malformed { what, detail: detail.into() }
    }

    pub(crate) fn not(expected: &'static str, bytes: &[u8]) -> Self {
        let head = &bytes[..bytes.len().min(8)];
        let found = if head.is_empty() {
            "nothing (the file is empty)".to_owned()
        } else {
            format!("\"{}\"", head.escape_ascii())
        };
        Self::Format { expected, found }
    }
}

/// Why a model cannot be read, built or written.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ModelError {
    /// The operating system refused. Check the path and its permissions.
    #[error("{path}: {source}", path = path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The file named here is no model we can use; `source` says why.
    #[error("{path}: {source}", path = path.display())]
    InFile {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        source: Box<ModelError>,
    },
    /// The file is not safetensors, or broken. Check that it is the right file and whole.
    #[error("not a safetensors model: {0}")]
    Container(String),
    /// The file is a model of another tool. Convert it with `afterimage import`.
    #[error("it is {0}; convert it first with: afterimage import FILE")]
    Foreign(&'static str),
    /// The file is larger than any model may be, or would be if it were written.
    #[error("model file is {bytes} bytes; the limit is {limit}")]
    TooLarge {
        /// The file's size.
        bytes: u64,
        /// The limit.
        limit: u64,
    },
    /// The file is of a version this program does not know. Use a newer program or an older file.
    #[error("model format version is {found:?}; this program reads {expected:?}")]
    Version {
        /// Version found.
        found: String,
        /// Version read here.
        expected: &'static str,
    },
    /// A tensor or metadata entry is missing, unknown or of the wrong type or shape.
    #[error("{what}: expected {expected}, found {found}")]
    Mismatch {
        /// The tensor or entry.
        what: String,
        /// What it should be.
        expected: String,
        /// What it is.
        found: String,
    },
    /// A tensor holds an infinity or a NaN.
    #[error("tensor {tensor:?} holds {value} at index {index}; every number must be finite")]
    NotFinite {
        /// The tensor.
        tensor: String,
        /// The place.
        index: usize,
        /// What is there.
        value: f64,
    },
    /// A line of a text model is not what it should be.
    #[error("line {line}: {detail}")]
    Text {
        /// The line, from 1.
        line: usize,
        /// What is wrong.
        detail: String,
    },
    /// An ONNX file holds no model that can be imported.
    #[error("not an ONNX model we can use: {0}")]
    Onnx(String),
    /// The shape in the metadata is no shape.
    #[error(transparent)]
    Shape(#[from] DataError),
}

impl ModelError {
    pub(crate) fn mismatch(
        what: impl Into<String>,
        expected: impl ToString,
        found: impl ToString,
    ) -> Self {
        Self::Mismatch {
            what: what.into(),
            expected: expected.to_string(),
            found: found.to_string(),
        }
    }
}
