//! Model files: a safetensors container with the tensors of the feature map and the machines, and texts
//! that say what they are. `README.md` has the table of names.

use std::fs::{self, File};
use std::io::Write;
use std::path::Path;

use ndarray::{Array1, Array2};
use sha2::{Digest, Sha256};

use crate::error::ModelError;
use crate::features::FeatureMap;
use crate::input::bounded;
use crate::model::{Metadata, Model, ModelDigest};
use crate::shape::{MAX_RANK, Shape};
use crate::svm::{LinearSvm, MAX_CLASSES};
use crate::tensors::{self, Tensor, Tensors, Texts};

/// Largest model file read, in bytes: far above ours (under 1 MB), far below what would hurt.
pub const MAX_MODEL_FILE_BYTES: u64 = 256 << 20;

/// What a file says it is.
const FORMAT: &str = "afterimage-model";
/// The version written, and the only one read.
const VERSION: &str = "1";

const WEIGHTS: &str = "svm.weights";
const INTERCEPTS: &str = "svm.intercepts";

pub(crate) fn read(path: &Path) -> Result<Model, ModelError> {
    let io = |source| ModelError::Io { path: path.to_owned(), source };
    let in_file = |source| ModelError::InFile { path: path.to_owned(), source: Box::new(source) };
    let file = File::open(path).map_err(io)?;
    let bytes = file.metadata().map_err(io)?.len();
    if bytes > MAX_MODEL_FILE_BYTES {
        return Err(in_file(ModelError::TooLarge { bytes, limit: MAX_MODEL_FILE_BYTES }));
    }
    // Bounded once more: a pipe or a growing file has no length.
    let bytes = bounded::read_at_most(file, MAX_MODEL_FILE_BYTES, "model file")
        .map_err(|error| in_file(error.into()))?;
    decode(&bytes).map_err(in_file)
}

pub(crate) fn write(model: &Model, path: &Path) -> Result<(), ModelError> {
    let io = |source| ModelError::Io { path: path.to_owned(), source };
    let mut aside = path.as_os_str().to_owned();
    aside.push(".partial");
    let mut file = File::create(&aside).map_err(io)?;
    file.write_all(&encode(model)).and_then(|()| file.sync_all()).map_err(io)?;
    fs::rename(&aside, path).map_err(io)
}

pub(crate) fn encode(model: &Model) -> Vec<u8> {
    let metadata = model.metadata();
    let mut texts = Texts::from([
        ("format".to_owned(), FORMAT.to_owned()),
        ("format_version".to_owned(), VERSION.to_owned()),
        ("features".to_owned(), model.features().name().to_owned()),
        ("shape".to_owned(), model.shape().to_string()),
        ("labels".to_owned(), join(model.labels())),
        ("command".to_owned(), metadata.command.clone()),
        ("dataset".to_owned(), metadata.dataset.clone()),
        ("note".to_owned(), metadata.note.clone()),
    ]);
    if let Some(seed) = metadata.seed {
        texts.insert("seed".to_owned(), seed.to_string());
    }
    if let Some(c) = metadata.c {
        texts.insert("c".to_owned(), c.to_string());
    }
    if let Some((wrong, images)) = metadata.test_errors {
        texts.insert("test_errors".to_owned(), format!("{wrong} of {images}"));
    }
    tensors::encode(&all_tensors(model.features(), model.svm()), &texts)
}

pub(crate) fn decode(bytes: &[u8]) -> Result<Model, ModelError> {
    let (mut tensors, texts) = tensors::decode(bytes)?;
    let text = |name: &str| texts.get(name).cloned().unwrap_or_default();
    if text("format") != FORMAT {
        return Err(ModelError::mismatch("metadata \"format\"", FORMAT, text("format")));
    }
    if text("format_version") != VERSION {
        return Err(ModelError::Version { found: text("format_version"), expected: VERSION });
    }
    let shape = parse_shape(&text("shape"))?;
    let labels = parse_labels(&text("labels"))?;
    let features = FeatureMap::from_tensors(&text("features"), shape, &mut tensors)?;
    let (classes, dims) = (labels.len(), features.dims());
    let weights = Tensor::take(&mut tensors, WEIGHTS, &[classes, dims])?;
    let weights = Array2::from_shape_vec((classes, dims), weights)
        .map_err(|error| ModelError::mismatch(WEIGHTS, "a matrix", error))?;
    let intercepts = Array1::from(Tensor::take(&mut tensors, INTERCEPTS, &[classes])?);
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
    Model::new(features, LinearSvm::new(weights, intercepts)?, labels, metadata)
}

/// SHA-256 over, in this order, lengths and integers as 64-bit little-endian:
///
/// 1. the text `afterimage-model 1` and a zero byte;
/// 2. the feature map's name (length, bytes);
/// 3. the shape (rank, dimensions);
/// 4. the labels (count, each);
/// 5. every tensor in the order of names: name (length, bytes), shape (rank, dimensions), values (32-bit
///    little-endian floats).
pub(crate) fn digest(features: &FeatureMap, svm: &LinearSvm, labels: &[u16]) -> ModelDigest {
    let mut hash = Sha256::new();
    hash.update(format!("{FORMAT} {VERSION}\0"));
    let number = |hash: &mut Sha256, value: u64| hash.update(value.to_le_bytes());
    let text = |hash: &mut Sha256, text: &str| {
        hash.update((text.len() as u64).to_le_bytes());
        hash.update(text);
    };
    text(&mut hash, features.name());
    let shape = features.shape();
    number(&mut hash, shape.dims().len() as u64);
    shape.dims().iter().for_each(|&dim| number(&mut hash, u64::from(dim)));
    number(&mut hash, labels.len() as u64);
    labels.iter().for_each(|&label| number(&mut hash, u64::from(label)));
    for (name, tensor) in all_tensors(features, svm) {
        text(&mut hash, &name);
        number(&mut hash, tensor.shape.len() as u64);
        tensor.shape.iter().for_each(|&dim| number(&mut hash, dim as u64));
        tensor.values.iter().for_each(|value| hash.update(value.to_le_bytes()));
    }
    ModelDigest(hash.finalize().into())
}

fn all_tensors(features: &FeatureMap, svm: &LinearSvm) -> Tensors {
    let mut tensors = features.tensors();
    let weights = svm.weights().iter().copied().collect();
    tensors.insert(WEIGHTS.to_owned(), Tensor::new(&[svm.classes(), svm.dims()], weights));
    let intercepts = svm.intercepts().to_vec();
    tensors.insert(INTERCEPTS.to_owned(), Tensor::new(&[svm.classes()], intercepts));
    tensors
}

fn join(labels: &[u16]) -> String {
    labels.iter().map(u16::to_string).collect::<Vec<_>>().join(",")
}

fn parse_shape(text: &str) -> Result<Shape, ModelError> {
    let wrong = || ModelError::mismatch("metadata \"shape\"", "like 28x28", format!("{text:?}"));
    // One more than allowed, so that too many are told from exactly enough.
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
