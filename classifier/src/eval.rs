//! How good a model is on a data set, and how fast.

use std::fmt;
use std::time::{Duration, Instant};

use ndarray::Array2;

use crate::dataset::Dataset;
use crate::error::DataError;
use crate::model::Model;

/// A model's answers to a data set, counted.
#[derive(Clone, Debug)]
pub struct Evaluation {
    /// The labels, ascending: those of the model and those of the data.
    labels: Vec<u16>,
    /// `[true label, answered label]`.
    confusion: Array2<u32>,
    elapsed: Duration,
    threads: usize,
}

/// One label's figures.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ClassFigures {
    /// The label.
    pub label: u16,
    /// Images that have it.
    pub images: usize,
    /// Of the images answered with it, the share that has it; NaN when there are none.
    pub precision: f64,
    /// Of the images that have it, the share answered with it; NaN when there are none.
    pub recall: f64,
}

impl Evaluation {
    /// Classifies all of `data` on the current rayon pool and counts.
    ///
    /// # Errors
    /// [`DataError::Mismatch`] when the images are not of the model's shape.
    pub fn of(model: &Model, data: &Dataset) -> Result<Self, DataError> {
        if model.shape() != data.shape() {
            return Err(DataError::Mismatch {
                what: "shape of the images",
                expected: model.shape().to_string(),
                found: data.shape().to_string(),
            });
        }
        let started = Instant::now();
        let answers = model.classify_all(data.matrix())?;
        let elapsed = started.elapsed();
        let mut labels: Vec<u16> = [model.labels(), &data.classes()].concat();
        labels.sort_unstable();
        labels.dedup();
        let index = |label: &u16| labels.binary_search(label).expect("all labels are in there");
        let mut confusion = Array2::zeros((labels.len(), labels.len()));
        for (label, answer) in data.labels().iter().zip(&answers) {
            confusion[[index(label), index(answer)]] += 1;
        }
        Ok(Self { labels, confusion, elapsed, threads: rayon::current_num_threads() })
    }

    /// Images answered.
    #[must_use]
    pub fn images(&self) -> usize {
        self.confusion.sum() as usize
    }

    /// Images answered wrongly.
    #[must_use]
    pub fn wrong(&self) -> usize {
        self.images() - self.confusion.diag().sum() as usize
    }

    /// The share answered wrongly, 0 to 1; NaN when there are no images.
    #[must_use]
    pub fn error_rate(&self) -> f64 {
        self.wrong() as f64 / self.images() as f64
    }

    /// The 95 % confidence interval of the error rate.
    #[must_use]
    pub fn error_interval(&self) -> (f64, f64) {
        wilson_interval(self.wrong(), self.images())
    }

    /// How often images of one label (rows) got another (columns); rows and columns as in [`Evaluation::labels`].
    #[must_use]
    pub fn confusion(&self) -> &Array2<u32> {
        &self.confusion
    }

    /// The labels that occur in the data or the model, ascending.
    #[must_use]
    pub fn labels(&self) -> &[u16] {
        &self.labels
    }

    /// Precision and recall of each label.
    #[must_use]
    pub fn classes(&self) -> Vec<ClassFigures> {
        let figures = |(i, &label): (usize, &u16)| {
            let hits = f64::from(self.confusion[[i, i]]);
            let images = self.confusion.row(i).sum();
            let answers = self.confusion.column(i).sum();
            ClassFigures {
                label,
                images: images as usize,
                precision: hits / f64::from(answers),
                recall: hits / f64::from(images),
            }
        };
        self.labels.iter().enumerate().map(figures).collect()
    }

    /// Wall-clock time per image, all threads together.
    #[must_use]
    pub fn time_per_image(&self) -> Duration {
        self.elapsed / u32::try_from(self.images().max(1)).unwrap_or(u32::MAX)
    }
}

/// The 95 % interval of a share of which `hits` in `count` were seen: E. B. Wilson, "Probable Inference, the Law
/// of Succession, and Statistical Inference", JASA 22, 1927. With nothing seen it is all of 0 to 1.
#[must_use]
pub fn wilson_interval(hits: usize, count: usize) -> (f64, f64) {
    if count == 0 {
        return (0.0, 1.0);
    }
    /// The 97.5 % quantile of the normal distribution.
    const Z: f64 = 1.959_963_984_540_054;
    let n = count as f64;
    let p = hits as f64 / n;
    let scale = 1.0 / (1.0 + Z * Z / n);
    let centre = scale * (p + Z * Z / (2.0 * n));
    let half = scale * Z * (p * (1.0 - p) / n + Z * Z / (4.0 * n * n)).sqrt();
    ((centre - half).max(0.0), (centre + half).min(1.0))
}

impl fmt::Display for Evaluation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (low, high) = self.error_interval();
        writeln!(
            f,
            "error {:.2} % ({} of {} wrong; 95 % interval {:.2} to {:.2} %)",
            100.0 * self.error_rate(),
            self.wrong(),
            self.images(),
            100.0 * low,
            100.0 * high
        )?;
        let micros = self.time_per_image().as_nanos() as f64 / 1000.0;
        let plural = if self.threads == 1 { "" } else { "s" };
        writeln!(f, "time {micros:.1} µs per image on {} thread{plural}", self.threads)?;
        writeln!(f, "\nlabel  images  precision  recall   answered as")?;
        write!(f, "{:34}", "")?;
        self.labels.iter().try_for_each(|label| write!(f, "{label:>6}"))?;
        for (i, class) in self.classes().iter().enumerate() {
            let ClassFigures { label, images, precision, recall } = class;
            let (precision, recall) = (100.0 * precision, 100.0 * recall);
            write!(f, "\n{label:>5}  {images:>6}  {precision:>7.2} %  {recall:>5.2} % ")?;
            self.confusion.row(i).iter().try_for_each(|count| write!(f, "{count:>6}"))?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use ndarray::{Array1, array};

    use super::*;
    use crate::features::{FeatureMap, RawPixels};
    use crate::model::Metadata;
    use crate::shape::Shape;
    use crate::svm::LinearSvm;

    #[test]
    fn wilson_intervals_match_published_ones() {
        // R. G. Newcombe, Statistics in Medicine 17 (1998), table I: 81/263, 15/148, 0/20, 1/29.
        for (hits, count, low, high) in [
            (81, 263, 0.2553, 0.3662),
            (15, 148, 0.0624, 0.1605),
            (0, 20, 0.0, 0.1611),
            (1, 29, 0.0061, 0.1718),
        ] {
            let interval = wilson_interval(hits, count);
            assert!((interval.0 - low).abs() < 5e-5, "{hits}/{count}: {interval:?}");
            assert!((interval.1 - high).abs() < 5e-5, "{hits}/{count}: {interval:?}");
        }
        assert_eq!(wilson_interval(0, 0), (0.0, 1.0));
    }

    #[test]
    fn counts_confusions_precision_and_recall() {
        // Answers 7 for a first pixel above the second, else 9.
        let shape = Shape::new(&[2]).unwrap();
        let map = FeatureMap::Raw(RawPixels::new(shape, 1.0).unwrap());
        let svm = LinearSvm::new(array![[1.0, -1.0], [-1.0, 1.0]], Array1::zeros(2)).unwrap();
        let model = Model::new(map, svm, vec![7, 9], Metadata::default()).unwrap();
        let images = vec![5, 1, 5, 1, 1, 5, 5, 1];
        let data = Dataset::new(shape, images, vec![7, 7, 9, 8]).unwrap();
        let evaluation = Evaluation::of(&model, &data).unwrap();
        assert_eq!(evaluation.labels(), [7, 8, 9]);
        assert_eq!(evaluation.confusion(), array![[2, 0, 0], [1, 0, 0], [0, 0, 1]]);
        assert_eq!((evaluation.wrong(), evaluation.images()), (1, 4));
        let classes = evaluation.classes();
        assert_eq!((classes[0].precision, classes[0].recall), (2.0 / 3.0, 1.0));
        assert!(classes[1].precision.is_nan());
        assert_eq!((classes[2].precision, classes[2].recall), (1.0, 1.0));
        assert!(
            evaluation.to_string().starts_with("error 25.00 % (1 of 4 wrong; 95 % interval 4.5")
        );
    }

    #[test]
    fn refuses_images_of_another_shape() {
        let data = Dataset::new(Shape::new(&[784]).unwrap(), vec![0; 784], vec![1]).unwrap();
        assert!(Evaluation::of(&Model::raw(), &data).is_err());
    }
}
