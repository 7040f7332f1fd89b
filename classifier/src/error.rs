//! Errors of image, data-set and model files. The engine's errors are in `engine.rs`.

use std::io;
use std::path::{Path, PathBuf};

/// An error in an image or a data set.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DataError {
    /// The operating system refused. Check the path and its permissions.
    #[error("{path}: {source}", path = path.display())]
    Io {
        /// The file or directory.
        path: PathBuf,
        /// The system's error.
        source: io::Error,
    },
    /// A fault in the named file.
    #[error("{path}: {source}", path = path.display())]
    InFile {
        /// The file.
        path: PathBuf,
        /// The fault in it.
        source: Box<DataError>,
    },
    /// The operating system or a pipe failed while the bytes were read.
    #[error("{what} cannot be read: {source}")]
    Read {
        /// The thing read.
        what: &'static str,
        /// The system's error.
        source: io::Error,
    },
    /// There are more bytes than the limit allows.
    #[error("{what} has more than {limit} bytes, the limit")]
    TooLarge {
        /// The thing read.
        what: &'static str,
        /// The limit.
        limit: u64,
    },
    /// The bytes are not of the format expected. Check that it is the right file.
    #[error("not {expected}: it starts with {found}")]
    Format {
        /// The format expected.
        expected: &'static str,
        /// The first bytes found, printable.
        found: String,
    },
    /// The file ends before the length in its header: it is cut, or the header is wrong.
    #[error("{what} needs {needed} bytes; the file has {have}")]
    Truncated {
        /// The part that is cut.
        what: &'static str,
        /// Bytes needed.
        needed: u64,
        /// Bytes present.
        have: u64,
    },
    /// Bytes follow after the end that the header gives.
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
    /// Two values that must be equal differ.
    #[error("{what}: expected {expected}, found {found}")]
    Mismatch {
        /// The thing compared.
        what: &'static str,
        /// The expected value.
        expected: String,
        /// The value found.
        found: String,
    },
    /// The file has the right format and a fault inside.
    #[error("{what} is malformed: {detail}")]
    Malformed {
        /// The format or the part.
        what: &'static str,
        /// The fault.
        detail: String,
    },
    /// The directory has none of the file's possible names. Check the directory.
    #[error("the folder {directory} has none of the files {names}", directory = directory.display())]
    Missing {
        /// The directory searched.
        directory: PathBuf,
        /// The names tried.
        names: String,
    },
}

impl DataError {
    #[doc(hidden)]
    pub fn io(path: &Path, source: io::Error) -> Self {
        Self::Io { path: path.to_owned(), source }
    }

    #[doc(hidden)]
    pub fn in_file(self, path: &Path) -> Self {
        match self {
            // These errors name their file already.
            error @ (Self::Io { .. } | Self::InFile { .. } | Self::Missing { .. }) => error,
            error => Self::InFile { path: path.to_owned(), source: Box::new(error) },
        }
    }

    #[doc(hidden)]
    pub fn out_of_range(what: &'static str, min: usize, max: usize, value: usize) -> Self {
        Self::OutOfRange { what, min: min as u64, max: max as u64, value: value as u64 }
    }

    #[doc(hidden)]
    pub fn malformed(what: &'static str, detail: impl Into<String>) -> Self {
        Self::Malformed { what, detail: detail.into() }
    }

    #[doc(hidden)]
    pub fn not(expected: &'static str, bytes: &[u8]) -> Self {
        let head = &bytes[..bytes.len().min(8)];
        let found = if head.is_empty() {
            "nothing (the file is empty)".to_owned()
        } else {
            format!("\"{}\"", head.escape_ascii())
        };
        Self::Format { expected, found }
    }
}

/// An error in reading, building or writing a model.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ModelError {
    /// The operating system refused. Check the path and its permissions.
    #[error("{path}: {source}", path = path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// The system's error.
        source: io::Error,
    },
    /// A fault in the named model file.
    #[error("{path}: {source}", path = path.display())]
    InFile {
        /// The file.
        path: PathBuf,
        /// The fault in it.
        source: Box<ModelError>,
    },
    /// The file is not safetensors, or it is damaged. Check that it is the right file and complete.
    #[error(
        "not a safetensors model: {0}; convert the model of another tool with: afterimage import FILE"
    )]
    Container(String),
    /// The file is a model of another tool. Convert it with `afterimage import`.
    #[error("it is {0}; convert it first with: afterimage import FILE")]
    Foreign(&'static str),
    /// The model file is, or would be, larger than the limit.
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
        /// The expected value.
        expected: String,
        /// The value found.
        found: String,
    },
    /// A tensor has an infinity or a NaN.
    #[error("tensor {tensor:?} holds {value} at index {index}; every number must be finite")]
    NotFinite {
        /// The tensor.
        tensor: String,
        /// The index of the number.
        index: usize,
        /// The value found.
        value: f64,
    },
    /// A fault in a line of a text model.
    #[error("line {line}: {detail}")]
    Text {
        /// The line, from 1.
        line: usize,
        /// The fault.
        detail: String,
    },
    /// An ONNX file without a model that can be imported.
    #[error("the model cannot be imported: {0}")]
    Onnx(String),
    /// A shape or a data file of the model is not valid.
    #[error(transparent)]
    Shape(#[from] DataError),
}

impl ModelError {
    #[doc(hidden)]
    pub fn mismatch(
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
