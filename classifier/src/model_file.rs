//! Model files: a safetensors container with the tensors that make the model, and texts that say
//! what they are. `README.md` has the table of names. Models that are trained here are of version
//! 1, imported ones of version 2.

use std::fs::{self, File};
use std::io::{self, ErrorKind, Write};
use std::path::{Path, PathBuf};

use crate::bounded;
use crate::error::ModelError;
use crate::features::FeatureMap;
use crate::model::{FORMAT, IMPORTED_VERSION, Metadata, Model, VERSION, version};
use crate::pairwise::Pairwise;
use crate::scoring::Scoring;
use crate::shape::{MAX_RANK, Shape};
use crate::svm::MAX_CLASSES;
use crate::tensors::{self, Texts};
use crate::weights::Weights;

/// Largest model file of any tool, in bytes. Ours are below 1 MB. The limit allows the text of
/// 60,000 support vectors of MNIST images (about 200 MB), or 65,535 classes of as many weights in
/// `f64` (411 MB).
pub const MAX_MODEL_FILE_BYTES: u64 = 1 << 30;

/// The versions that this program reads.
const VERSIONS: &str = "1 or 2";

/// The first byte of an ONNX file: the key of its first field, `ir_version`.
const ONNX_START: u8 = 0x08;
/// The byte-order mark of UTF-8.
const UTF8_MARK: &[u8] = b"\xef\xbb\xbf";

impl Model {
    /// Reads a safetensors model file.
    ///
    /// # Errors
    /// [`ModelError`], naming the file, when it cannot be read or is no model we can use.
    pub fn read(path: &Path) -> Result<Self, ModelError> {
        read(path)
    }

    /// Reads a model from the bytes of a safetensors file.
    ///
    /// # Errors
    /// [`ModelError`] when they are no model we can use.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, ModelError> {
        decode(bytes)
    }

    /// The bytes of this model's safetensors file; the same model always gives the same bytes.
    #[must_use]
    pub fn to_bytes(&self) -> Vec<u8> {
        encode(self)
    }

    /// Checks that [`write`](Self::write) can create a file at `path`, before a long computation.
    ///
    /// # Errors
    /// [`ModelError::Io`].
    pub fn check_path(path: &Path) -> Result<(), ModelError> {
        let check = || {
            let (_, aside) = target(path)?;
            File::create(&aside)?;
            fs::remove_file(&aside)
        };
        check().map_err(|source| ModelError::Io { path: path.to_owned(), source })
    }

    /// Writes this model's file: beside the place first, then renamed into it, so that no reader
    /// ever sees half of one.
    ///
    /// # Errors
    /// [`ModelError::Io`]; [`ModelError::TooLarge`], in [`ModelError::InFile`], when the file would
    /// be too large to be read again.
    pub fn write(&self, path: &Path) -> Result<(), ModelError> {
        write_at_most(self, path, MAX_MODEL_FILE_BYTES)
    }
}

fn read(path: &Path) -> Result<Model, ModelError> {
    let io = |source| ModelError::Io { path: path.to_owned(), source };
    let in_file = |source| ModelError::InFile { path: path.to_owned(), source: Box::new(source) };
    let file = bounded::open(path).map_err(io)?;
    if let Some(bytes) = file.size().filter(|&bytes| bytes > MAX_MODEL_FILE_BYTES) {
        return Err(in_file(ModelError::TooLarge { bytes, limit: MAX_MODEL_FILE_BYTES }));
    }
    // Bounded once more: a pipe or a growing file has no length.
    let bytes = bounded::read_at_most(file, MAX_MODEL_FILE_BYTES, "model file")
        .map_err(|error| in_file(error.into()))?;
    decode(&bytes).map_err(in_file)
}

/// Writes nothing that [`read`] would refuse for its length.
pub(crate) fn write_at_most(model: &Model, path: &Path, limit: u64) -> Result<(), ModelError> {
    let (tensors, texts) = (model.scoring().tensors(), texts(model));
    let bytes = tensors::encoded_len(&tensors, &texts);
    if bytes > limit {
        let source = Box::new(ModelError::TooLarge { bytes, limit });
        return Err(ModelError::InFile { path: path.to_owned(), source });
    }
    let encoded = tensors::encode(&tensors, &texts);
    drop(tensors);
    let io = |source| ModelError::Io { path: path.to_owned(), source };
    let (target, aside) = target(path).map_err(io)?;
    let mut file = File::create(&aside).map_err(io)?;
    let written = file.write_all(&encoded).and_then(|()| file.sync_all());
    written.and_then(|()| fs::rename(&aside, target)).map_err(|error| {
        // Half a file is of no use; the first error is reported.
        let _ = fs::remove_file(&aside);
        io(error)
    })
}

/// The regular file at the end of symbolic links, and the file beside it that is written first. A
/// rename would replace a link or a device.
fn target(path: &Path) -> io::Result<(PathBuf, PathBuf)> {
    let target = match fs::canonicalize(path) {
        Ok(target) if target.is_dir() => {
            return Err(io::Error::new(ErrorKind::IsADirectory, "it is a folder; give a file"));
        }
        Ok(target) if !target.is_file() => {
            let text = "it is not a regular file; give another path";
            return Err(io::Error::new(ErrorKind::InvalidInput, text));
        }
        Ok(target) => target,
        Err(error) if error.kind() == ErrorKind::NotFound => path.to_owned(),
        Err(error) => return Err(error),
    };
    let mut aside = target.clone().into_os_string();
    aside.push(format!(".partial-{}", std::process::id()));
    Ok((target, aside.into()))
}

fn encode(model: &Model) -> Vec<u8> {
    tensors::encode(&model.scoring().tensors(), &texts(model))
}

/// The texts of a model's file.
fn texts(model: &Model) -> Texts {
    let metadata = model.metadata();
    let mut texts = Texts::from([
        ("format".to_owned(), FORMAT.to_owned()),
        ("format_version".to_owned(), version(model.scoring()).to_owned()),
        ("features".to_owned(), model.scoring().name().to_owned()),
        ("shape".to_owned(), model.shape().to_string()),
        ("labels".to_owned(), join(model.labels())),
        ("command".to_owned(), metadata.command.clone()),
        ("dataset".to_owned(), metadata.dataset.clone()),
        ("note".to_owned(), metadata.note.clone()),
    ]);
    if let Scoring::Pairwise(pairwise) = model.scoring() {
        texts.insert("kernel".to_owned(), pairwise.function().name().to_owned());
    }
    if let Some(seed) = metadata.seed {
        texts.insert("seed".to_owned(), seed.to_string());
    }
    if let Some(c) = metadata.c {
        texts.insert("c".to_owned(), c.to_string());
    }
    if let Some((wrong, images)) = metadata.test_errors {
        texts.insert("test_errors".to_owned(), format!("{wrong} of {images}"));
    }
    texts
}

fn decode(bytes: &[u8]) -> Result<Model, ModelError> {
    let (mut tensors, texts) =
        tensors::decode(bytes).map_err(|error| foreign(bytes).unwrap_or(error))?;
    let text = |name: &str| texts.get(name).cloned().unwrap_or_default();
    if text("format") != FORMAT {
        return Err(ModelError::mismatch("metadata \"format\"", FORMAT, text("format")));
    }
    let version = text("format_version");
    if ![VERSION, IMPORTED_VERSION].contains(&version.as_str()) {
        return Err(ModelError::Version { found: version, expected: VERSIONS });
    }
    let shape = parse_shape(&text("shape"))?;
    let labels = parse_labels(&text("labels"))?;
    let (classes, dims) = (labels.len(), shape.len());
    let scoring = match (version.as_str(), text("features").as_str()) {
        (IMPORTED_VERSION, "weights") => {
            Scoring::Weights(Weights::from_tensors(classes, dims, &mut tensors)?)
        }
        (IMPORTED_VERSION, "kernel") => {
            let kernel = text("kernel");
            let pairwise = Pairwise::from_tensors(&kernel, classes, dims, &mut tensors)?;
            Scoring::Pairwise(Box::new(pairwise))
        }
        (IMPORTED_VERSION, other) => {
            let expected = "weights or kernel";
            return Err(ModelError::mismatch("features", expected, format!("{other:?}")));
        }
        (_, name) => {
            let map = FeatureMap::from_tensors(name, shape, &mut tensors)?;
            Scoring::from_features(map, classes, &mut tensors)?
        }
    };
    if let Some(unknown) = tensors.keys().next() {
        return Err(ModelError::mismatch("tensors", "only known ones", format!("{unknown:?}")));
    }
    let metadata = Metadata {
        command: text("command"),
        seed: parse_optional(&texts, "seed")?,
        c: parse_optional(&texts, "c")?,
        dataset: text("dataset"),
        test_errors: parse_test_errors(&texts)?,
        note: text("note"),
    };
    Model::of(shape, scoring, labels, metadata)
}

/// An error that names the format, when bytes that are not safetensors are a model of another tool.
fn foreign(bytes: &[u8]) -> Option<ModelError> {
    let is_onnx =
        || bytes.first() == Some(&ONNX_START) && bytes.windows(10).any(|ten| ten == b"Classifier");
    let text = bytes.strip_prefix(UTF8_MARK).unwrap_or(bytes).trim_ascii_start();
    Some(ModelError::Foreign(if text.starts_with(b"svm_type") {
        "a LIBSVM model"
    } else if text.starts_with(b"solver_type") {
        "a LIBLINEAR model"
    } else if is_onnx() {
        "an ONNX model"
    } else {
        return None;
    }))
}

fn join(labels: &[u16]) -> String {
    labels.iter().map(u16::to_string).collect::<Vec<_>>().join(",")
}

fn parse_shape(text: &str) -> Result<Shape, ModelError> {
    let wrong = || ModelError::mismatch("metadata \"shape\"", "like 28x28", format!("{text:?}"));
    // One more than allowed, to distinguish too many from exactly enough.
    let dims: Result<Vec<u32>, _> = text.split('x').take(MAX_RANK + 1).map(str::parse).collect();
    Ok(Shape::new(&dims.map_err(|_| wrong())?)?)
}

fn parse_labels(text: &str) -> Result<Vec<u16>, ModelError> {
    let labels: Result<Vec<u16>, _> =
        text.split(',').take(MAX_CLASSES + 1).map(str::parse).collect();
    labels
        .map_err(|_| ModelError::mismatch("metadata \"labels\"", "like 0,1,2", format!("{text:?}")))
}

fn parse_optional<T: std::str::FromStr>(
    texts: &Texts,
    name: &str,
) -> Result<Option<T>, ModelError> {
    let Some(text) = texts.get(name) else {
        return Ok(None);
    };
    let value = text.parse().map_err(|_| {
        ModelError::mismatch(format!("metadata {name:?}"), "a number", format!("{text:?}"))
    })?;
    Ok(Some(value))
}

fn parse_test_errors(texts: &Texts) -> Result<Option<(usize, usize)>, ModelError> {
    let Some(text) = texts.get("test_errors") else {
        return Ok(None);
    };
    text.split_once(" of ")
        .and_then(|(wrong, images)| Some((wrong.parse().ok()?, images.parse().ok()?)))
        .map(Some)
        .ok_or_else(|| {
            ModelError::mismatch("metadata \"test_errors\"", "like 12 of 345", format!("{text:?}"))
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_model_beyond_the_limit_is_not_written() {
        let directory = tempfile::tempdir().unwrap();
        let [small, large] = ["small", "large"].map(|name| directory.path().join(name));
        let model = Model::raw();
        let len = model.to_bytes().len() as u64;
        write_at_most(&model, &small, len).unwrap();
        assert_eq!(Model::read(&small).unwrap().digest(), model.digest());
        let error = write_at_most(&model, &large, len - 1).unwrap_err().to_string();
        let expected = format!("model file is {len} bytes; the limit is {}", len - 1);
        assert!(error.contains("large: ") && error.contains(&expected), "{error}");
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 1);
    }
}
