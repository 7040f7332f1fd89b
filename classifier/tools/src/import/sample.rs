//! Samples for an imported model: labelled images as LIBSVM text or IDX files, and the predictions
//! of the original tool.

use std::collections::HashMap;
use std::fmt;
use std::ops::Range;
use std::path::Path;

use afterimage_classifier::{DataError, ModelError, bounded};
use ndarray::ArrayView2;

use super::Imported;
use super::lines::{Lines, shorten};
use crate::batch::classify_all;
use crate::dataset::Dataset;
use crate::input::MAX_DATASET_FILE_BYTES;

/// Most listed disagreements.
const MOST_LISTED: usize = 5;

/// Most images of a sample: seventeen times MNIST's training set. A label takes about sixty bytes
/// in memory.
const MAX_SAMPLE_IMAGES: usize = 1 << 20;

/// Most bytes of a sample's images. The length of the file does not limit them, because a line of
/// two bytes makes an image of any size.
const MAX_SAMPLE_BYTES: usize = 1 << 30;

/// Limits of a sample.
struct Limits {
    images: usize,
    bytes: usize,
}

const LIMITS: Limits = Limits { images: MAX_SAMPLE_IMAGES, bytes: MAX_SAMPLE_BYTES };

/// Images with their labels, or with the predictions of another tool.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Sample {
    /// One after the other.
    images: Vec<u8>,
    labels: Vec<String>,
}

/// Comparison of the answers of a model with given labels.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Agreement {
    /// Images.
    pub images: usize,
    /// Images with the given label as their answer.
    pub agree: usize,
    /// The first images with another answer: the image (from 1), the given label, and the answer.
    pub first_others: Vec<(usize, String, String)>,
}

impl Sample {
    /// Reads a text file as `svm-train` and `svm-predict` take them, or a folder with the MNIST
    /// test files.
    ///
    /// # Errors
    /// [`ModelError`], naming the file, and the line of an image that does not fit the model.
    pub fn read(path: &Path, imported: &Imported) -> Result<Self, ModelError> {
        let in_file =
            |source| ModelError::InFile { path: path.to_owned(), source: Box::new(source) };
        if path.is_dir() {
            return Self::of(&Dataset::read(path, "t10k")?, imported).map_err(in_file);
        }
        let bytes = read(path)?;
        let text = super::text(&bytes).map_err(in_file)?;
        Self::parse(text, imported).map_err(in_file)
    }

    /// A labelled data set.
    ///
    /// # Errors
    /// [`DataError::Mismatch`] if the images do not have the model's shape.
    pub fn of(data: &Dataset, imported: &Imported) -> Result<Self, ModelError> {
        if data.shape().len() != imported.model.shape().len() {
            return Err(DataError::Mismatch {
                what: "shape of the images",
                expected: imported.model.shape().to_string(),
                found: data.shape().to_string(),
            }
            .into());
        }
        let labels = data.labels().iter().map(u16::to_string).collect();
        Ok(Self { images: data.matrix().iter().copied().collect(), labels })
    }

    /// A text in LIBSVM's format: a label, then `index:value` with indices from 1 that ascend; at
    /// most a million images (2²⁰), and 1 GiB of their bytes.
    ///
    /// # Errors
    /// [`ModelError::Text`], naming the line.
    pub fn parse(text: &str, imported: &Imported) -> Result<Self, ModelError> {
        Self::parse_within(text, imported, &LIMITS)
    }

    fn parse_within(text: &str, imported: &Imported, limits: &Limits) -> Result<Self, ModelError> {
        let dims = imported.model.shape().len();
        // An omitted feature is zero.
        let blank: Vec<Option<u8>> = (0..dims).map(|at| imported.byte(at, 0.0)).collect();
        let mut sample = Self::default();
        let mut lines = Lines::new(text.trim_end());
        while !lines.text.is_empty() {
            let line = lines.next_line()?;
            let Limits { images, bytes } = *limits;
            if sample.labels.len() == images {
                return Err(lines.error(format!("more images than the limit: {images}")));
            }
            if sample.images.len() + dims > bytes {
                return Err(lines.error(format!("images of more bytes than the limit: {bytes}")));
            }
            let mut fields = line.split_ascii_whitespace();
            let label = fields.next().ok_or_else(|| lines.error("a line without a label"))?;
            sample.labels.push(normal(label));
            sample.read_image(fields, imported, &blank, &lines)?;
        }
        if sample.labels.is_empty() {
            return Err(lines.error("the sample has no images"));
        }
        Ok(sample)
    }

    /// Adds the image of a line.
    fn read_image<'a>(
        &mut self,
        fields: impl Iterator<Item = &'a str>,
        imported: &Imported,
        blank: &[Option<u8>],
        lines: &Lines<'_>,
    ) -> Result<(), ModelError> {
        let refuse = |index: usize, value: &str| {
            let divisor = imported.divisor;
            lines.error(format!("feature {index} is {value}, not a byte over {divisor}"))
        };
        let mut done = 0;
        for field in fields {
            let Some((index, value)) = field.split_once(':') else {
                return Err(lines.error(format!("{:?} is not like 12:0.5", shorten(field))));
            };
            let index = lines.feature(index, done, imported.model.shape())?;
            let byte = imported.byte(index - 1, lines.number(value)?);
            let byte = byte.ok_or_else(|| refuse(index, &shorten(value)))?;
            self.skip(blank, done..index - 1).map_err(|at| refuse(at + 1, "0"))?;
            self.images.push(byte);
            done = index;
        }
        self.skip(blank, done..blank.len()).map_err(|at| refuse(at + 1, "0"))
    }

    /// Adds the bytes of the omitted features. The error is a position without a byte for zero.
    fn skip(&mut self, blank: &[Option<u8>], places: Range<usize>) -> Result<(), usize> {
        for at in places {
            self.images.push(blank[at].ok_or(at)?);
        }
        Ok(())
    }

    /// The same images with the labels in a file of predictions, one on a line.
    ///
    /// # Errors
    /// [`ModelError`] if there are more or fewer of them.
    pub fn with_predictions(&self, path: &Path) -> Result<Self, ModelError> {
        let bytes = read(path)?;
        let text = super::text(&bytes)?;
        let due = self.labels.len();
        let given = || text.split_ascii_whitespace();
        let labels: Vec<String> = given().take(due).map(normal).collect();
        if given().nth(due).is_some() || labels.len() < due {
            return Err(ModelError::mismatch("predictions", due, given().count()));
        }
        Ok(Self { images: self.images.clone(), labels })
    }

    /// Classifies all images on the current rayon pool and compares.
    ///
    /// # Errors
    /// [`DataError`] if the images do not have the model's shape.
    pub fn agreement(&self, imported: &Imported) -> Result<Agreement, DataError> {
        let Imported { model, labels, .. } = imported;
        let shape = (self.labels.len(), model.shape().len());
        let images = ArrayView2::from_shape(shape, &self.images)
            .map_err(|error| DataError::malformed("sample", error.to_string()))?;
        // The model's answer, and its name in the original file.
        let own: HashMap<u16, String> =
            model.labels().iter().copied().zip(labels.iter().map(|label| normal(label))).collect();
        let answers = classify_all(model, images)?;
        let mut agreement = Agreement { images: answers.len(), agree: 0, first_others: Vec::new() };
        for (number, (answer, given)) in answers.iter().zip(&self.labels).enumerate() {
            let answer = &own[answer];
            if answer == given {
                agreement.agree += 1;
            } else if agreement.first_others.len() < MOST_LISTED {
                agreement.first_others.push((number + 1, given.clone(), answer.clone()));
            }
        }
        Ok(agreement)
    }
}

impl fmt::Display for Agreement {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { images, agree, first_others } = self;
        write!(
            f,
            "{agree} of {images} ({:.2} %)",
            100.0 * *agree as f64 / (*images).max(1) as f64
        )?;
        for (number, given, answer) in first_others {
            write!(f, "\n  image {number}: {given} given, {answer} answered")?;
        }
        Ok(())
    }
}

fn read(path: &Path) -> Result<Vec<u8>, ModelError> {
    let file =
        bounded::open(path).map_err(|source| ModelError::Io { path: path.to_owned(), source })?;
    Ok(bounded::read_at_most(file, MAX_DATASET_FILE_BYTES, "sample")
        .map_err(|error| error.in_file(path))?)
}

/// A label in a form that is comparable between tools: `+1`, `1` and `1.0` are equal, and names are
/// shortened as those of a model.
fn normal(label: &str) -> String {
    match label.parse::<f64>() {
        Ok(number) => number.to_string(),
        Err(_) => shorten(label),
    }
}

#[cfg(test)]
mod tests {
    use afterimage_classifier::Shape;

    use super::*;
    use crate::import::ImportOptions;

    #[test]
    fn refuses_too_many_images_before_it_allocates_them() {
        let model = "solver_type L2R_LR\nnr_class 2\nlabel 1 0\nnr_feature 1\nbias -1\nw\n1 \n";
        let shape = Some(Shape::new(&[2, 2]).unwrap());
        let options = ImportOptions { shape, ..ImportOptions::default() };
        let imported = Imported::from_bytes(model.as_bytes(), &options).unwrap();
        let parse = |text: &str, images, bytes| {
            Sample::parse_within(text, &imported, &Limits { images, bytes })
        };
        assert_eq!(parse("1\n0\n1\n", 3, 12).unwrap().images, [0; 12]);
        let error = parse("1\n0\n1\n", 2, 100).unwrap_err().to_string();
        assert_eq!(error, "line 3: more images than the limit: 2");
        let error = parse("1\n0\n1\n", 3, 11).unwrap_err().to_string();
        assert_eq!(error, "line 3: images of more bytes than the limit: 11");
    }

    #[test]
    fn long_labels_are_compared_as_far_as_a_models_are_kept() {
        let long = "x".repeat(100);
        assert_eq!(normal(&long), shorten(&long));
        assert_eq!(normal("+1.0"), "1");
    }
}
