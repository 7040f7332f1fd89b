//! Import of models of other tools: text files of LIBSVM and LIBLINEAR, and ONNX files of
//! scikit-learn.
//!
//! Feature `j` of such a model (counted from 1 in the text files) is byte `j − 1` of the image
//! divided by a divisor, and possibly scaled by `svm-scale`. Numbers stay in `f64`. If a label
//! depends on rounding, the operations of the original tool are repeated in their order
//! (`weights.rs` and `pairwise/` of `afterimage-classifier`), so the labels are equal.
//! `pairwise/votes.rs` says for which compilers.

mod liblinear;
mod libsvm;
mod lines;
mod onnx;
mod sample;
mod scale;

use std::fmt;
use std::path::Path;

use afterimage_classifier::pixels::{Learnt, Pixels};
use afterimage_classifier::scoring::Scoring;
use afterimage_classifier::{MAX_MODEL_FILE_BYTES, Metadata, Model, ModelError, Shape, bounded};

use lines::{CUT, Lines};
pub use onnx::proto as onnx_proto;
pub use sample::{Agreement, Sample};
pub use scale::Scale;

/// Facts that are not in the file of the other tool.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct ImportOptions {
    /// The shape of the images. `None` means 28x28, or one row if an ONNX model has another number
    /// of features.
    pub shape: Option<Shape>,
    /// The divisor from bytes to features: 255 for features from 0 to 1, 1 for plain bytes. With
    /// `None` it is derived from the support vectors, from the ranges of `scale` or from the
    /// scaling in an ONNX model. Without any of these it is 255.
    pub divisor: Option<f64>,
    /// The labels to answer with, in the model's order. With `None` they are the model's own,
    /// which must be from 0 to 65535.
    pub labels: Option<Vec<u16>>,
    /// The scaling by `svm-scale` of the training data of LIBSVM or LIBLINEAR, if there was one.
    pub scale: Option<Scale>,
}

/// An imported model, and facts from its file.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Imported {
    /// The model.
    pub model: Model,
    /// The tool that made it, its solver or kernel, and their parameters.
    pub origin: String,
    /// The labels of its classes, as in the file.
    pub labels: Vec<String>,
    /// The number of features. The model ignores further bytes of an image.
    pub features: usize,
    /// The divisor from bytes to features.
    pub divisor: f64,
    /// Whether the divisor is a guess: it is neither in the options nor visible in the file.
    pub assumed: bool,
    /// Warnings for the user of the model.
    pub warnings: Vec<String>,
    /// The values of bytes in a text file for the original tool.
    pixels: Pixels,
}

impl Imported {
    /// Reads a model file of LIBLINEAR or LIBSVM, or an ONNX file. Its first bytes show the format.
    ///
    /// # Errors
    /// [`ModelError`], naming the file, and the line of a fault in a text.
    pub fn read(path: &Path, options: &ImportOptions) -> Result<Self, ModelError> {
        let io = |source| ModelError::Io { path: path.to_owned(), source };
        let in_file =
            |source| ModelError::InFile { path: path.to_owned(), source: Box::new(source) };
        let file = bounded::open(path).map_err(io)?;
        let bytes = bounded::read_at_most(file, MAX_MODEL_FILE_BYTES, "model file")
            .map_err(|error| in_file(error.into()))?;
        Self::from_bytes(&bytes, options).map_err(in_file)
    }

    /// Reads a model from the bytes of such a file.
    ///
    /// # Errors
    /// [`ModelError`], naming the line of a text.
    pub fn from_bytes(bytes: &[u8], options: &ImportOptions) -> Result<Self, ModelError> {
        check_mark(bytes)?;
        let first =
            bytes.trim_ascii_start().split(|byte| !is_key(*byte)).next().unwrap_or_default();
        let found = if LIBLINEAR_KEYS.contains(&first) {
            liblinear::read(&mut Lines::new(text(bytes)?), options)?
        } else if LIBSVM_KEYS.contains(&first) {
            libsvm::read(&mut Lines::new(text(bytes)?), options)?
        } else {
            onnx::read(bytes, options)?
        };
        found.finish(options)
    }

    /// The byte for the value of feature `at` (from 0) in the input of the original tool: already
    /// scaled by `svm-scale`, not yet scaled by an ONNX graph. `None` if no byte has this value.
    #[must_use]
    pub fn byte(&self, at: usize, value: f64) -> Option<u8> {
        self.pixels.byte(at, value)
    }
}

/// Prints the facts, one on each line.
impl fmt::Display for Imported {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const MOST_LABELS: usize = 20;
        let Self { model, origin, labels, features, divisor, assumed, .. } = self;
        writeln!(f, "found     {origin}")?;
        writeln!(f, "model     {}", model.description())?;
        let more = if labels.len() > MOST_LABELS { " …" } else { "" };
        let shown = labels[..labels.len().min(MOST_LABELS)].join(" ");
        writeln!(f, "classes   {}, labels {shown}{more}", labels.len())?;
        if labels.iter().zip(model.labels()).any(|(old, new)| *old != new.to_string()) {
            let new: Vec<_> = model.labels().iter().take(MOST_LABELS).map(u16::to_string).collect();
            writeln!(f, "answers   {}{more}", new.join(" "))?;
        }
        write!(f, "features  {features} of images of {}: bytes over {divisor}", model.shape())?;
        if *assumed {
            write!(f, ", a guess: the file does not show it (--divisor)")?;
        }
        writeln!(f)?;
        write!(f, "digest    {}", model.digest())
    }
}

/// The possible first keys of a LIBLINEAR model. LIBLINEAR itself writes the first one.
const LIBLINEAR_KEYS: [&[u8]; 3] = [b"solver_type", b"nr_feature", b"bias"];
/// The possible first keys of a LIBSVM model.
const LIBSVM_KEYS: [&[u8]; 9] = [
    b"svm_type",
    b"kernel_type",
    b"degree",
    b"gamma",
    b"coef0",
    b"nr_class",
    b"total_sv",
    b"rho",
    b"label",
];

fn is_key(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || byte == b'_'
}

fn text(bytes: &[u8]) -> Result<&str, ModelError> {
    check_mark(bytes)?;
    str::from_utf8(bytes).map_err(|_| Lines::new("").error("the file is not UTF-8 text"))
}

/// Refuses the byte-order mark that some editors put before a text.
fn check_mark(bytes: &[u8]) -> Result<(), ModelError> {
    let encoding = match bytes {
        [0xef, 0xbb, 0xbf, ..] => "UTF-8",
        [0xff, 0xfe, ..] | [0xfe, 0xff, ..] => "UTF-16",
        _ => return Ok(()),
    };
    Err(Lines::new("").error(format!(
        "the file begins with a byte-order mark ({encoding}); save it as UTF-8 without the mark"
    )))
}

/// The result of a reader: a model without the labels to answer with.
struct UnlabelledModel {
    origin: String,
    labels: Vec<String>,
    shape: Shape,
    features: usize,
    divisor: f64,
    /// Whether it is [`USUAL_DIVISOR`], because the file does not show a divisor.
    assumed: bool,
    warnings: Vec<String>,
    /// The values of bytes in a text file for the original tool.
    pixels: Pixels,
    scoring: Scoring,
}

/// The usual divisor of bytes, for files that do not show one.
const USUAL_DIVISOR: f64 = 255.0;

impl UnlabelledModel {
    fn finish(self, options: &ImportOptions) -> Result<Imported, ModelError> {
        let Self { origin, labels, shape, features, divisor, assumed, .. } = self;
        let Self { mut warnings, pixels, scoring, .. } = self;
        if options.scale.as_ref().is_some_and(Scale::is_cut) {
            warnings.push(format!("range file: {CUT}"));
        }
        let answers = match &options.labels {
            Some(given) if given.len() == labels.len() => given.clone(),
            Some(given) => {
                let expected = format!("one for each of the model's {}", labels.len());
                return Err(ModelError::mismatch("labels given", expected, given.len()));
            }
            None => labels.iter().map(|label| own_label(label)).collect::<Result<_, _>>()?,
        };
        let mut metadata = Metadata::default();
        metadata.note = format!("imported from {origin}");
        let model = Model::of(shape, scoring, answers, metadata)?;
        Ok(Imported { model, origin, labels, features, divisor, assumed, warnings, pixels })
    }
}

fn own_label(label: &str) -> Result<u16, ModelError> {
    label.parse().map_err(|_| {
        let expected = "0 to 65535 (give other labels with --labels)";
        ModelError::mismatch("label of the model", expected, format!("{label:?}"))
    })
}

/// Support vectors as bytes, if all their values are bytes over the divisor, and the meaning of the
/// bytes: [`Pixels::learnt`] of `values` (all values except zero) and of their divisor.
fn learn_pixels(
    divisor: Option<f64>,
    single: bool,
    values: impl Iterator<Item = f64> + Clone,
) -> Result<(f64, Option<Learnt>), ModelError> {
    let divisor = divisor.unwrap_or_else(|| {
        let most = values.clone().fold(0.0, f64::max);
        if most > 1.0 { 1.0 } else { USUAL_DIVISOR }
    });
    Ok((divisor, Pixels::learnt(divisor, single, values)?))
}

/// Checks the divisor: support vectors are training images, so a value that no image can have shows
/// a wrong divisor.
fn check_range(pixels: &Pixels, at: usize, value: f64) -> Result<(), ModelError> {
    let (low, high) = pixels.range(at);
    let slack = 0.01 * (high - low);
    if (low - slack..=high + slack).contains(&value) {
        return Ok(());
    }
    let expected = format!(
        "{low} to {high} for bytes over the divisor (--divisor; --scale for what svm-scale scaled)"
    );
    Err(ModelError::mismatch(format!("feature {} of a support vector", at + 1), expected, value))
}

/// Refuses support vectors that are too many for a model file.
fn check_size(count: usize, dims: usize, bytes_each: usize) -> Result<(), ModelError> {
    let bytes = count.saturating_mul(dims).saturating_mul(bytes_each) as u64;
    if bytes <= MAX_MODEL_FILE_BYTES {
        return Ok(());
    }
    let expected = format!("at most {MAX_MODEL_FILE_BYTES} bytes");
    let found = format!("{bytes} bytes of {count} vectors of {dims} features");
    Err(ModelError::mismatch("support vectors", expected, found))
}
