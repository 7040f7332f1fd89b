//! Evaluation of a model on a data set: errors, confusions and speed.

mod sheet;

use std::collections::BTreeMap;
use std::fmt;
use std::time::{Duration, Instant};

use afterimage_classifier::{DataError, Model, Scratch};
use serde_json::{Value, json};

use crate::batch::classify_all;
use crate::dataset::Dataset;

pub use sheet::Example;
pub use sheet::{MAX_SHEET_EXAMPLES, contact_sheet};

/// Most labels for which a printed report has a matrix. With more labels it lists the most frequent
/// confusions.
const MATRIX_LABELS: usize = 26;
/// Listed confusions if there is no matrix.
const LISTED_CONFUSIONS: usize = 20;
/// Most images that are timed alone, and the time limit for them: some models need milliseconds for
/// an image.
const ALONE_IMAGES: usize = 1000;
const ALONE_PATIENCE: Duration = Duration::from_millis(500);

/// The counted answers of a model to a data set.
#[derive(Clone, Debug)]
pub struct Evaluation {
    /// The labels of the model and of the data, ascending.
    labels: Vec<u16>,
    /// The number of images with the first label that got the second one.
    counts: BTreeMap<(u16, u16), usize>,
    answers: Vec<u16>,
    elapsed: Duration,
    alone: Duration,
    threads: usize,
}

/// The figures of one label.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ClassFigures {
    /// The label.
    pub label: u16,
    /// The number of images with this label.
    pub images: usize,
    /// Precision: the share of the images with this answer that have the label; NaN without such
    /// images.
    pub precision: f64,
    /// Recall: the share of the images with the label that got this answer; NaN without such
    /// images.
    pub recall: f64,
}

impl Evaluation {
    /// Classifies all of `data` on the current rayon pool, and counts the answers.
    ///
    /// # Errors
    /// [`DataError::Mismatch`] when the images do not have the model's shape,
    /// [`DataError::Malformed`] when there are no images.
    pub fn of(model: &Model, data: &Dataset) -> Result<Self, DataError> {
        if data.is_empty() {
            return Err(DataError::malformed("test set", "it has no images"));
        }
        if model.shape() != data.shape() {
            return Err(DataError::Mismatch {
                what: "shape of the images",
                expected: model.shape().to_string(),
                found: data.shape().to_string(),
            });
        }
        let alone = time_alone(model, data)?;
        let started = Instant::now();
        let answers = classify_all(model, data.matrix())?;
        let elapsed = started.elapsed();
        let mut labels: Vec<u16> = [model.labels(), &data.classes()].concat();
        labels.sort_unstable();
        labels.dedup();
        let mut counts = BTreeMap::new();
        for (&label, &answer) in data.labels().iter().zip(&answers) {
            *counts.entry((label, answer)).or_insert(0) += 1;
        }
        let threads = rayon::current_num_threads();
        Ok(Self { labels, counts, answers, elapsed, alone, threads })
    }

    /// The number of images.
    #[must_use]
    pub fn images(&self) -> usize {
        self.answers.len()
    }

    /// The label that each image got, in the order of the data set.
    #[must_use]
    pub fn answers(&self) -> &[u16] {
        &self.answers
    }

    /// The number of wrong answers.
    #[must_use]
    pub fn wrong(&self) -> usize {
        self.confusions().map(|(_, _, count)| count).sum()
    }

    /// The share of wrong answers, 0 to 1.
    #[must_use]
    pub fn error_rate(&self) -> f64 {
        self.wrong() as f64 / self.images() as f64
    }

    /// The 95 % confidence interval of the error rate.
    #[must_use]
    pub fn error_interval(&self) -> (f64, f64) {
        wilson_interval(self.wrong(), self.images())
    }

    /// The number of images of `label` that got `answer`.
    #[must_use]
    pub fn count(&self, label: u16, answer: u16) -> usize {
        self.counts.get(&(label, answer)).copied().unwrap_or(0)
    }

    /// The wrong answers: `(label, answer, images)`, ordered by label, then answer.
    pub fn confusions(&self) -> impl Iterator<Item = (u16, u16, usize)> {
        self.counts
            .iter()
            .filter(|((label, answer), _)| label != answer)
            .map(|(&(l, a), &n)| (l, a, n))
    }

    /// The labels of the data and the model, ascending.
    #[must_use]
    pub fn labels(&self) -> &[u16] {
        &self.labels
    }

    /// Precision and recall of each label.
    #[must_use]
    pub fn classes(&self) -> Vec<ClassFigures> {
        let mut images = BTreeMap::new();
        let mut answers = BTreeMap::new();
        for (&(label, answer), &count) in &self.counts {
            *images.entry(label).or_insert(0) += count;
            *answers.entry(answer).or_insert(0) += count;
        }
        let figures = |&label: &u16| {
            let hits = self.count(label, label) as f64;
            let images = images.get(&label).copied().unwrap_or(0);
            let answers = answers.get(&label).copied().unwrap_or(0);
            ClassFigures {
                label,
                images,
                precision: hits / answers as f64,
                recall: hits / images as f64,
            }
        };
        self.labels.iter().map(figures).collect()
    }

    /// Wall-clock time for an image in batches, on all threads together.
    #[must_use]
    pub fn time_per_image(&self) -> Duration {
        self.elapsed / u32::try_from(self.images().max(1)).unwrap_or(u32::MAX)
    }

    /// The median time of an image alone on one thread, over the first images; zero without images.
    #[must_use]
    pub fn time_alone(&self) -> Duration {
        self.alone
    }

    /// The whole report for programs. Shares are from 0 to 1, or `null` without images to divide
    /// by. Times are in microseconds. `confusions` has every pair that occurred.
    #[must_use]
    pub fn to_json(&self) -> Value {
        let (low, high) = self.error_interval();
        let class = |class: ClassFigures| {
            let ClassFigures { label, images, precision, recall } = class;
            json!({ "label": label, "images": images, "precision": precision, "recall": recall })
        };
        let confusion =
            |(label, answer, images)| json!({ "label": label, "answer": answer, "images": images });
        json!({
            "images": self.images(),
            "wrong": self.wrong(),
            "error_rate": self.error_rate(),
            "error_interval_95": [low, high],
            "time_alone_us": micros(self.alone),
            "time_per_image_us": micros(self.time_per_image()),
            "threads": self.threads,
            "classes": self.classes().into_iter().map(class).collect::<Vec<_>>(),
            "confusions": self.confusions().map(confusion).collect::<Vec<_>>(),
        })
    }

    fn write_matrix(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "\nlabel  images  precision  recall   answered as")?;
        write!(f, "{:34}", "")?;
        self.labels.iter().try_for_each(|label| write!(f, "{label:>6}"))?;
        for class in self.classes() {
            write_class(f, &class)?;
            let counts = self.labels.iter().map(|&answer| self.count(class.label, answer));
            counts.into_iter().try_for_each(|count| write!(f, "{count:>6}"))?;
        }
        Ok(())
    }

    fn write_list(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "\nlabel  images  precision  recall")?;
        for class in self.classes().iter().filter(|class| class.images > 0) {
            write_class(f, class)?;
        }
        let mut confusions: Vec<_> = self.confusions().collect();
        confusions.sort_by_key(|&(_, _, count)| std::cmp::Reverse(count));
        write!(f, "\n\nthe commonest confusions: label, answered as, images")?;
        for (label, answer, count) in confusions.into_iter().take(LISTED_CONFUSIONS) {
            write!(f, "\n{label:>5}  {answer:>5}  {count:>6}")?;
        }
        Ok(())
    }
}

fn write_class(f: &mut fmt::Formatter<'_>, class: &ClassFigures) -> fmt::Result {
    let ClassFigures { label, images, precision, recall } = class;
    let (precision, recall) = (100.0 * precision, 100.0 * recall);
    write!(f, "\n{label:>5}  {images:>6}  {precision:>7.2} %  {recall:>5.2} % ")
}

/// The median time of an image alone, on this thread.
fn time_alone(model: &Model, data: &Dataset) -> Result<Duration, DataError> {
    let (began, mut scratch) = (Instant::now(), Scratch::default());
    let mut times = Vec::new();
    for image in data.images().take(ALONE_IMAGES) {
        let started = Instant::now();
        model.classify_batch(&[image], &mut scratch, &mut [0])?;
        times.push(started.elapsed());
        if began.elapsed() > ALONE_PATIENCE {
            break;
        }
    }
    times.sort_unstable();
    Ok(times.get(times.len() / 2).copied().unwrap_or_default())
}

fn micros(time: Duration) -> f64 {
    time.as_nanos() as f64 / 1000.0
}

/// The 95 % interval of a share with `hits` of `count`: E. B. Wilson, "Probable Inference, the Law
/// of Succession, and Statistical Inference", JASA 22, 1927. It is 0 to 1 if `count` is 0.
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
        let plural = if self.threads == 1 { "" } else { "s" };
        writeln!(
            f,
            "time {:.1} µs for an image alone (median); {:.1} µs per image in batches on {} thread{plural}",
            micros(self.alone),
            micros(self.time_per_image()),
            self.threads
        )?;
        if self.labels.len() <= MATRIX_LABELS { self.write_matrix(f) } else { self.write_list(f) }
    }
}

#[cfg(test)]
mod tests {
    use afterimage_classifier::{FeatureMap, LinearSvm, Metadata, RawPixels, Shape};
    use ndarray::{Array1, array};

    use super::*;

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
        assert_eq!(evaluation.answers(), [7, 7, 9, 7]);
        let counts = [7, 8, 9].map(|label| [7, 8, 9].map(|answer| evaluation.count(label, answer)));
        assert_eq!(counts, [[2, 0, 0], [1, 0, 0], [0, 0, 1]]);
        assert_eq!(evaluation.confusions().collect::<Vec<_>>(), [(8, 7, 1)]);
        assert_eq!((evaluation.wrong(), evaluation.images()), (1, 4));
        let classes = evaluation.classes();
        assert_eq!((classes[0].precision, classes[0].recall), (2.0 / 3.0, 1.0));
        assert!(classes[1].precision.is_nan());
        assert_eq!((classes[2].precision, classes[2].recall), (1.0, 1.0));
        let text = evaluation.to_string();
        assert!(text.starts_with("error 25.00 % (1 of 4 wrong; 95 % interval 4.5"), "{text}");
        assert!(
            text.contains("\n    8       1      NaN %   0.00 %      1     0     0\n"),
            "{text}"
        );
        let json = evaluation.to_json();
        assert_eq!((&json["images"], &json["wrong"]), (&json!(4), &json!(1)));
        assert_eq!(json["error_interval_95"][0], evaluation.error_interval().0);
        let class = json!({ "label": 8, "images": 1, "precision": null, "recall": 0.0 });
        assert_eq!(json["classes"][1], class);
        assert_eq!(json["confusions"], json!([{ "label": 8, "answer": 7, "images": 1 }]));
        assert!(json["time_alone_us"].as_f64() > Some(0.0));
    }

    #[test]
    fn many_classes_are_listed_and_take_no_matrix() {
        // One machine for each of 1000 labels; all but the last answer nothing.
        let shape = Shape::new(&[1]).unwrap();
        let map = FeatureMap::Raw(RawPixels::new(shape, 1.0).unwrap());
        let mut weights = ndarray::Array2::zeros((1000, 1));
        weights[[999, 0]] = 1.0;
        let svm = LinearSvm::new(weights, Array1::zeros(1000)).unwrap();
        let model = Model::new(map, svm, (0..1000).collect(), Metadata::default()).unwrap();
        let data = Dataset::new(shape, vec![1, 2, 3, 4], vec![65_535, 65_535, 3, 999]).unwrap();
        let text = Evaluation::of(&model, &data).unwrap().to_string();
        let confusions = "label, answered as, images\n65535    999       2\n    3    999       1";
        assert!(text.contains(confusions), "{text}");
        assert!(text.contains("\n  999       1    25.00 %  100.00 % \n"), "{text}");
        assert!(text.lines().count() < 15, "{text}");
    }

    #[test]
    fn refuses_images_of_another_shape_and_none_at_all() {
        let none = Dataset::new(Shape::MNIST, vec![], vec![]).unwrap();
        let error = Evaluation::of(&Model::raw(), &none).unwrap_err().to_string();
        assert!(error.contains("it has no images"), "{error}");
        let data = Dataset::new(Shape::new(&[784]).unwrap(), vec![0; 784], vec![1]).unwrap();
        assert!(Evaluation::of(&Model::raw(), &data).is_err());
    }
}
