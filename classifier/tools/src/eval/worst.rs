//! The worst examples of a data set: wrong answers, and right answers with the smallest margins.

use afterimage_classifier::{DataError, Model};
use ndarray::ArrayView1;
use rayon::prelude::*;

use super::Evaluation;
use crate::dataset::Dataset;

/// Images of a task.
const TASK: usize = 64;

/// One image and the model's answer to it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Example {
    /// Its index in the data set, from 0.
    pub index: usize,
    /// Its label.
    pub label: u16,
    /// The model's answer.
    pub answer: u16,
    /// The score of its label minus the highest of the other scores, so it is negative for a wrong
    /// answer. Minus infinity if the model does not have the label.
    pub margin: f32,
}

impl Evaluation {
    /// The `count` worst images of `data`, the worst first: wrong answers before right ones, then
    /// smaller margins before larger ones. `model` and `data` are those of the evaluation.
    ///
    /// # Errors
    /// [`DataError::Mismatch`] if the images do not have the model's shape.
    ///
    /// # Panics
    /// If `data` has more images than were evaluated.
    pub fn worst(
        &self,
        model: &Model,
        data: &Dataset,
        count: usize,
    ) -> Result<Vec<Example>, DataError> {
        let images: Vec<&[u8]> = data.images().collect();
        let margins: Vec<Vec<f32>> = images
            .par_chunks(TASK)
            .zip(data.labels().par_chunks(TASK))
            .map(|(images, labels)| {
                let scores = model.scores(images)?;
                let margin = |(scores, label)| margin(model.labels(), scores, label);
                Ok(scores.outer_iter().zip(labels).map(margin).collect())
            })
            .collect::<Result<_, DataError>>()?;
        let example = |(index, margin)| {
            let (label, answer) = (data.labels()[index], self.answers[index]);
            Example { index, label, answer, margin }
        };
        let mut examples: Vec<Example> =
            margins.into_iter().flatten().enumerate().map(example).collect();
        examples.sort_by(|a, b| {
            let right = |example: &Example| example.label == example.answer;
            right(a).cmp(&right(b)).then(a.margin.total_cmp(&b.margin))
        });
        examples.truncate(count);
        Ok(examples)
    }
}

fn margin(labels: &[u16], scores: ArrayView1<'_, f32>, label: &u16) -> f32 {
    let best = |of_label: bool| {
        let scores = labels.iter().zip(scores);
        let scores = scores.filter(|(l, _)| (*l == label) == of_label).map(|(_, &score)| score);
        scores.fold(f32::NEG_INFINITY, f32::max)
    };
    let own = best(true);
    // Without another score to compare with, an unknown label is still the worst case.
    if own == f32::NEG_INFINITY { own } else { own - best(false) }
}

#[cfg(test)]
mod tests {
    use afterimage_classifier::{FeatureMap, LinearSvm, Metadata, RawPixels, Shape};
    use ndarray::{Array1, array};

    use super::*;

    #[test]
    fn errors_come_first_and_the_smaller_margin_before_the_greater() {
        // The scores are the two pixels.
        let shape = Shape::new(&[2]).unwrap();
        let map = FeatureMap::Raw(RawPixels::new(shape, 1.0).unwrap());
        let svm = LinearSvm::new(array![[1.0, 0.0], [0.0, 1.0]], Array1::zeros(2)).unwrap();
        let model = Model::new(map, svm, vec![7, 9], Metadata::default()).unwrap();
        let images = vec![5, 1, 9, 2, 3, 3, 8, 1, 2, 4];
        // The third is a tie, which the first label wins; the model does not have the label 8.
        let data = Dataset::new(shape, images, vec![7, 9, 9, 8, 9]).unwrap();
        let evaluation = Evaluation::of(&model, &data).unwrap();
        let worst = evaluation.worst(&model, &data, 10).unwrap();
        let example = |(index, label, answer, margin)| Example { index, label, answer, margin };
        let expected = [
            (3, 8, 7, f32::NEG_INFINITY),
            (1, 9, 7, -7.0),
            (2, 9, 7, 0.0),
            (4, 9, 9, 2.0),
            (0, 7, 7, 4.0),
        ];
        assert_eq!(worst, expected.map(example));
        assert_eq!(evaluation.worst(&model, &data, 2).unwrap(), worst[..2]);
    }

    #[test]
    fn a_model_of_many_images_is_ranked_on_all_of_them() {
        let model = Model::raw();
        let images: Vec<u8> = (0..200 * 784).map(|i| (i * 31 % 255) as u8).collect();
        let labels = (0..200).map(|i| i % 10).collect();
        let data = Dataset::new(Shape::MNIST, images, labels).unwrap();
        let evaluation = Evaluation::of(&model, &data).unwrap();
        let worst = evaluation.worst(&model, &data, 200).unwrap();
        let wrong = worst.iter().filter(|example| example.label != example.answer).count();
        assert_eq!((worst.len(), wrong), (200, evaluation.wrong()));
        assert!(worst[..wrong].iter().all(|example| example.margin <= 0.0));
        assert!(worst[wrong..].iter().all(|example| example.margin >= 0.0));
    }
}
