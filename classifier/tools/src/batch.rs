//! Labels of many images, on all threads of the current rayon pool.

use std::sync::{Mutex, PoisonError};

use afterimage_classifier::{DataError, Model, Scratch};
use ndarray::ArrayView2;
use rayon::prelude::*;

/// Images of a task: a fifth of a millisecond of work, so that all threads end at about the same
/// time.
const TASK: usize = 16;

/// The labels of many images, one for each row of `images` (`[images, bytes of one]`), on all
/// threads of the current rayon pool.
///
/// # Errors
/// [`DataError::Mismatch`] when the rows are not of the model's size.
pub fn classify_all(model: &Model, images: ArrayView2<'_, u8>) -> Result<Vec<u16>, DataError> {
    if images.ncols() != model.shape().len() {
        return Err(DataError::Mismatch {
            what: "bytes in one image",
            expected: format!("{} ({})", model.shape().len(), model.shape()),
            found: images.ncols().to_string(),
        });
    }
    let images = images.as_standard_layout();
    let pixels = images.as_slice().expect("standard layout is contiguous");
    let rows: Vec<&[u8]> = pixels.chunks_exact(images.ncols()).collect();
    let mut labels = vec![0; rows.len()];
    // A free thread takes the next task, so that a slow thread does not delay the rest.
    let tasks = Mutex::new(rows.chunks(TASK).zip(labels.chunks_mut(TASK)));
    let work = || -> Result<(), DataError> {
        let mut scratch = Scratch::default();
        loop {
            let task = tasks.lock().unwrap_or_else(PoisonError::into_inner).next();
            let Some((images, labels)) = task else { return Ok(()) };
            model.classify_batch(images, &mut scratch, labels)?;
        }
    };
    (0..rayon::current_num_threads()).into_par_iter().with_max_len(1).try_for_each(|_| work())?;
    Ok(labels)
}

#[cfg(test)]
mod tests {
    use ndarray::Array2;

    use super::*;
    use crate::train::random::Random;

    #[test]
    fn labels_do_not_depend_on_threads_or_memory_order() {
        let model = Model::shipped();
        let mut noise = Random::new(9, b"a test..", 0);
        // The images have every density of light pixels.
        let matrix = Array2::from_shape_fn((130, 784), |(i, _)| {
            noise.below(256).saturating_sub(noise.below(1 + 4 * i)) as u8
        });
        let images = matrix.rows();
        let alone: Vec<u16> = images
            .into_iter()
            .map(|image| model.classify(image.as_slice().unwrap()).unwrap())
            .collect();
        for threads in [1, 2, 3] {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            let labels = pool.install(|| classify_all(&model, matrix.view()).unwrap());
            assert_eq!(labels, alone, "{threads} threads");
        }
        let columns = matrix.t().as_standard_layout().into_owned();
        assert_eq!(classify_all(&model, columns.t()).unwrap(), alone);
        assert!(alone.iter().any(|label| *label != alone[0]));
        assert!(classify_all(&model, ArrayView2::from_shape((2, 0), &[]).unwrap()).is_err());
    }
}
