//! Learning of the projection: the 100 largest principal components of the pooled values. They are
//! scaled between their own size and full whitening.

use afterimage_classifier::features::conv::{COMPONENTS, POOLED, Pooled, Projection};
use afterimage_classifier::kernels::{Chunk, Dots, Isa, LANES};
use rayon::prelude::*;

use super::eigen::fifth_root;
use super::eigen::{Eigen, symmetric_eigen};

/// Images whose values are multiplied in single precision before the sum in double precision.
const BLOCK: usize = 512;
const BLOCK_CHUNKS: usize = BLOCK / LANES;
/// Rows of the covariance for a task.
const BAND: usize = 64;

/// B = V·(e/e₀)^−0.2, times one scalar that makes the mean of ‖Bᵀ·(x − mean)‖² 1.
pub(super) fn learn(pooled: &[Pooled]) -> Projection {
    let mean = mean(pooled);
    from_eigen(&mean, &symmetric_eigen(covariance(pooled, &mean)))
}

fn from_eigen(mean: &[f64], Eigen { values, vectors }: &Eigen) -> Projection {
    // With at most as many images as components, some values are rounding errors only.
    let least = f64::EPSILON * values[0];
    let weights: Vec<f64> = values[..COMPONENTS]
        .iter()
        .map(|&value| if value > least { 1.0 / fifth_root(value / values[0]) } else { 0.0 })
        .collect();
    // The variance along an eigenvector is its eigenvalue.
    let total: f64 = values.iter().zip(&weights).map(|(e, w)| e * w * w).sum();
    let scale = 1.0 / total.sqrt();
    let mut matrix = vec![0.0_f32; POOLED * COMPONENTS];
    for (j, row) in matrix.chunks_exact_mut(COMPONENTS).enumerate() {
        for (c, entry) in row.iter_mut().enumerate() {
            *entry = (vectors[c][j] * weights[c] * scale) as f32;
        }
    }
    // The rounded matrix is used, so that the mean becomes exactly zero.
    let offset: Vec<f32> = (0..COMPONENTS)
        .map(|c| {
            let part = |(j, mean): (usize, &f64)| f64::from(matrix[j * COMPONENTS + c]) * mean;
            -mean.iter().enumerate().map(part).sum::<f64>() as f32
        })
        .collect();
    Projection::new(&matrix, &offset)
}

fn mean(pooled: &[Pooled]) -> Vec<f64> {
    let mut mean = vec![0.0; POOLED];
    for values in pooled {
        for (mean, &value) in mean.iter_mut().zip(values.as_flattened()) {
            *mean += f64::from(value);
        }
    }
    mean.iter_mut().for_each(|mean| *mean /= pooled.len() as f64);
    mean
}

fn covariance(pooled: &[Pooled], mean: &[f64]) -> Vec<Vec<f64>> {
    let isa = Isa::best();
    // Transposed and centred, `[block][value][image of the block]`, so that products run along
    // memory.
    let blocks: Vec<Vec<Chunk>> = pooled
        .par_chunks(BLOCK)
        .map(|images| {
            let mut block = vec![[0.0; LANES]; POOLED * BLOCK_CHUNKS];
            for (i, image) in images.iter().enumerate() {
                for (j, (&value, mean)) in image.as_flattened().iter().zip(mean).enumerate() {
                    let centred = (f64::from(value) - mean) as f32;
                    block[j * BLOCK_CHUNKS + i / LANES][i % LANES] = centred;
                }
            }
            block
        })
        .collect();
    let mut covariance = vec![vec![0.0; POOLED]; POOLED];
    covariance.par_chunks_mut(BAND).enumerate().for_each(|(band, rows)| {
        let mut products = vec![0.0; BAND * POOLED];
        for block in &blocks {
            let x = &block[band * BAND * BLOCK_CHUNKS..(band + 1) * BAND * BLOCK_CHUNKS];
            isa.run(Dots { row: BLOCK_CHUNKS, x, w: block, out: &mut products });
            for (row, products) in rows.iter_mut().zip(products.chunks_exact(POOLED)) {
                for (sum, &product) in row.iter_mut().zip(products) {
                    *sum += f64::from(product) / pooled.len() as f64;
                }
            }
        }
    });
    covariance
}

#[cfg(test)]
mod tests {
    use afterimage_classifier::features::conv::{COMPONENT_CHUNKS, POOLED_CHUNKS, Project};

    use super::super::random::Random;
    use super::*;

    /// Values that vary.
    const VARIED: usize = 150;

    /// 700 inputs of which the first values vary, neighbours together and later ones ever less; the
    /// rest are constant.
    fn example() -> Vec<Pooled> {
        let mut random = Random::new(1, b"a test..", 0);
        (0..700)
            .map(|_| {
                let mut values = [[3.0; LANES]; POOLED_CHUNKS];
                for k in 0..VARIED {
                    let amount = random.normal() as f32 / (1.0 + k as f32 / 10.0);
                    let flat = values.as_flattened_mut();
                    flat[k] += amount;
                    flat[(k + 1) % VARIED] -= amount / 2.0;
                }
                values
            })
            .collect()
    }

    /// What `learn` does, but that eigenvectors are sought among those values only that vary: all
    /// of them would take a test without optimization most of a minute.
    fn learn_from_varied(pooled: &[Pooled]) -> Projection {
        let mean = mean(pooled);
        let mut covariance = covariance(pooled, &mean);
        assert!(covariance[VARIED..].iter().flatten().all(|&product| product.abs() < 1e-12));
        covariance.truncate(VARIED);
        covariance.iter_mut().for_each(|row| row.truncate(VARIED));
        let mut eigen = symmetric_eigen(covariance);
        eigen.vectors.iter_mut().for_each(|vector| vector.resize(POOLED, 0.0));
        from_eigen(&mean, &eigen)
    }

    #[test]
    fn components_are_centered_uncorrelated_and_of_unit_scale() {
        let pooled = example();
        let projection = learn_from_varied(&pooled);
        let mut components = vec![[[0.0; LANES]; COMPONENT_CHUNKS]; pooled.len()];
        let project =
            Project { projection: &projection, pooled: &pooled, components: &mut components };
        Isa::best().run(project);
        let count = pooled.len() as f64;
        let mean_of = |f: &dyn Fn(&[f32]) -> f32| -> f64 {
            components.iter().map(|z| f64::from(f(z.as_flattened()))).sum::<f64>() / count
        };
        let square = mean_of(&|z| z.iter().map(|z| z * z).sum());
        assert!((square - 1.0).abs() < 1e-4, "{square}");
        for c in [0, 1, 50, 99] {
            assert!(mean_of(&|z| z[c]).abs() < 1e-4);
            let own = mean_of(&|z| z[c] * z[c]);
            let other = mean_of(&|z| z[c] * z[(c + 7) % 100]);
            assert!(other.abs() < 1e-3 * own, "{other} beside {own}");
        }
        let spread = |c: usize| mean_of(&|z| z[c] * z[c]);
        assert!(spread(0) > spread(50) && spread(50) > spread(99));
    }

    #[test]
    fn the_covariance_is_what_its_definition_says() {
        let pooled = example();
        let mean = mean(&pooled);
        let covariance = covariance(&pooled, &mean);
        for (i, j) in [(0, 0), (0, 1), (6, 0), (7, 6), (1023, 1023), (149, 148)] {
            let product = |v: &Pooled| {
                let v = v.as_flattened();
                (f64::from(v[i]) - mean[i]) * (f64::from(v[j]) - mean[j])
            };
            let expected = pooled.iter().map(product).sum::<f64>() / pooled.len() as f64;
            assert!((covariance[i][j] - expected).abs() < 1e-5, "{i}, {j}");
        }
    }
}
