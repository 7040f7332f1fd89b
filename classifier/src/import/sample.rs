//! What an imported model is tried on: labelled images in LIBSVM's text format or as IDX files, and what the original
//! tool predicts of them.

use std::collections::HashMap;
use std::fmt;
use std::fs::File;
use std::path::Path;

use ndarray::ArrayView2;

use super::Imported;
use super::lines::{Lines, shorten};
use crate::dataset::{Dataset, MAX_DATASET_FILE_BYTES};
use crate::error::{DataError, ModelError};
use crate::input::bounded;

/// Most disagreements listed.
const MOST_LISTED: usize = 5;

/// Images and the labels that they have, or that another tool gave them.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Sample {
    /// One after the other.
    images: Vec<u8>,
    labels: Vec<String>,
}

/// How a model's answers compare with given labels.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Agreement {
    /// Images.
    pub images: usize,
    /// Images answered with the label given.
    pub agree: usize,
    /// The first of the others: the image (from 1), the label given, and the answer.
    pub first_others: Vec<(usize, String, String)>,
}

impl Sample {
    /// Reads a text file as `svm-train` and `svm-predict` take them, or a folder with the MNIST test files.
    ///
    /// # Errors
    /// [`ModelError`], naming the file, and the line of what is no image of the model's.
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
    /// [`DataError::Mismatch`] when the images are not of the model's size.
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

    /// A text in LIBSVM's format: a label, then `index:value` with indices from 1 that ascend.
    ///
    /// # Errors
    /// [`ModelError::Text`], naming the line.
    pub fn parse(text: &str, imported: &Imported) -> Result<Self, ModelError> {
        let dims = imported.model.shape().len();
        let mut sample = Self::default();
        let mut lines = Lines::new(text.trim_end());
        while !lines.text.is_empty() {
            let line = lines.next_line()?;
            let mut fields = line.split_ascii_whitespace();
            let label = fields.next().ok_or_else(|| lines.error("a line without a label"))?;
            sample.labels.push(normal(label));
            let start = sample.images.len();
            sample.images.resize(start + dims, imported.byte(0, 0.0).unwrap_or_default());
            let mut least = 1;
            for field in fields {
                let Some((index, value)) = field.split_once(':') else {
                    return Err(lines.error(format!("{:?} is not like 12:0.5", shorten(field))));
                };
                let index = lines.count(index, least, dims)?;
                least = index + 1;
                let byte = imported.byte(index - 1, lines.number(value)?).ok_or_else(|| {
                    let (divisor, value) = (imported.divisor, shorten(value));
                    lines.error(format!(
                        "feature {index} is {value}, which is no byte over {divisor}"
                    ))
                })?;
                sample.images[start + index - 1] = byte;
            }
        }
        Ok(sample)
    }

    /// The same images with the labels in a file of predictions, one on a line.
    ///
    /// # Errors
    /// [`ModelError`] when there are more or fewer of them.
    pub fn with_predictions(&self, path: &Path) -> Result<Self, ModelError> {
        let bytes = read(path)?;
        let text = String::from_utf8_lossy(&bytes);
        let labels: Vec<String> = text.split_ascii_whitespace().map(normal).collect();
        if labels.len() != self.labels.len() {
            return Err(ModelError::mismatch("predictions", self.labels.len(), labels.len()));
        }
        Ok(Self { images: self.images.clone(), labels })
    }

    /// Classifies all images on the current rayon pool and compares.
    ///
    /// # Errors
    /// [`DataError`] when the images are not of the model's size.
    pub fn agreement(&self, imported: &Imported) -> Result<Agreement, DataError> {
        let Imported { model, labels, .. } = imported;
        let shape = (self.labels.len(), model.shape().len());
        let images = ArrayView2::from_shape(shape, &self.images)
            .map_err(|error| DataError::malformed("sample", error.to_string()))?;
        // What the model answers with, and what its own file calls it.
        let own: HashMap<u16, String> =
            model.labels().iter().copied().zip(labels.iter().map(|label| normal(label))).collect();
        let answers = model.classify_all(images)?;
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
        File::open(path).map_err(|source| ModelError::Io { path: path.to_owned(), source })?;
    Ok(bounded::read_at_most(file, MAX_DATASET_FILE_BYTES, "sample")
        .map_err(|error| error.in_file(path))?)
}

/// A label as all tools' are compared: `+1`, `1` and `1.0` are the same.
fn normal(label: &str) -> String {
    match label.parse::<f64>() {
        Ok(number) => number.to_string(),
        Err(_) => label.to_owned(),
    }
}
