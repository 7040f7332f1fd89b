//! The projection of the pooled values to 100 components (one matrix product, minus the mean's
//! part), and the quadratic expansion of the components.
//!
//! The expansion has the components and all their 5050 products, so that a linear machine on these
//! 5150 features is a quadratic one on the components. It is the explicit map of a polynomial
//! kernel of degree two (Y.-W. Chang et al., "Training and Testing Low-degree Polynomial Data
//! Mappings via Linear SVM", JMLR 11, 2010).
//!
//! The order of the features: for every component `a` in turn `z_a²`, then `√2·z_a·z_b` for `b`
//! from `a + 1` on; then the components themselves. With the √2 the inner product of two expansions
//! is `(z·z')² + z·z'`.

use std::f32::consts::SQRT_2;

use super::chunk_at;
use super::convolve::{POOLED, POOLED_CHUNKS};
use crate::kernels::{Chunk, Chunks, LANES, Simd, chunks};

/// Components kept.
pub const COMPONENTS: usize = 100;
/// Chunks of the components, zero in the padding.
pub const COMPONENT_CHUNKS: usize = chunks(COMPONENTS);

/// The pooled values of one image.
pub type Pooled = [Chunk; POOLED_CHUNKS];
/// The components of one image.
pub type Components = [Chunk; COMPONENT_CHUNKS];

/// `z = offset + Bᵀ·x`.
#[derive(Clone, Debug)]
pub struct Projection {
    /// B: the weight of each pooled value in every component.
    rows: Chunks,
    /// −Bᵀ·mean.
    offset: Components,
}

impl Projection {
    /// From B as `[POOLED][COMPONENTS]` and the offset, `[COMPONENTS]`.
    pub fn new(matrix: &[f32], offset: &[f32]) -> Self {
        assert_eq!((matrix.len(), offset.len()), (POOLED * COMPONENTS, COMPONENTS));
        let pad = |row: &[f32], padded: &mut [Chunk]| {
            padded.as_flattened_mut()[..COMPONENTS].copy_from_slice(row);
        };
        let mut rows = Chunks::zeros(POOLED * COMPONENT_CHUNKS);
        let padded = rows.as_chunks_mut::<COMPONENT_CHUNKS>().0;
        matrix.chunks_exact(COMPONENTS).zip(padded).for_each(|(row, padded)| pad(row, padded));
        let mut padded = [[0.0; LANES]; COMPONENT_CHUNKS];
        pad(offset, &mut padded);
        Self { rows, offset: padded }
    }

    /// B again, `[POOLED][COMPONENTS]`.
    pub fn matrix(&self) -> Vec<f32> {
        let rows = self.rows.chunks_exact(COMPONENT_CHUNKS);
        rows.flat_map(|row| &row.as_flattened()[..COMPONENTS]).copied().collect()
    }

    /// The offset again, `[COMPONENTS]`.
    pub fn offset(&self) -> Vec<f32> {
        self.offset.as_flattened()[..COMPONENTS].to_vec()
    }

    /// Projects a block of images. Each component is summed over the pooled values in order, for
    /// any block.
    #[inline(always)]
    pub fn project<S: Simd>(&self, simd: S, pooled: &[Pooled], out: &mut [Components]) {
        let together = if S::WIDE { 4 } else { 1 };
        for (pooled, out) in pooled.chunks(together).zip(out.chunks_mut(together)) {
            if let Ok(pooled) = <&[Pooled; 4]>::try_from(pooled) {
                self.tile(simd, pooled, out);
            } else {
                for (pooled, out) in pooled.iter().zip(out) {
                    self.tile(simd, std::array::from_ref(pooled), std::slice::from_mut(out));
                }
            }
        }
    }

    #[inline(always)]
    fn tile<S: Simd, const I: usize>(&self, simd: S, pooled: &[Pooled; I], out: &mut [Components]) {
        let offset: [S::V; COMPONENT_CHUNKS] = std::array::from_fn(|c| simd.load(&self.offset[c]));
        let mut sums = [offset; I];
        for (j, row) in self.rows.as_chunks::<COMPONENT_CHUNKS>().0.iter().enumerate() {
            let row: [S::V; COMPONENT_CHUNKS] = std::array::from_fn(|c| simd.load(&row[c]));
            for i in 0..I {
                let value = simd.splat(pooled[i][j / LANES][j % LANES]);
                for c in 0..COMPONENT_CHUNKS {
                    sums[i][c] = simd.mul_add(value, row[c], sums[i][c]);
                }
            }
        }
        for (sums, out) in sums.into_iter().zip(out) {
            for (sum, out) in sums.into_iter().zip(out) {
                simd.store(sum, out);
            }
        }
    }
}

/// Products of two components.
const PRODUCTS: usize = COMPONENTS * (COMPONENTS + 1) / 2;
/// Features.
pub const EXPANDED: usize = PRODUCTS + COMPONENTS;
/// Chunks of the features, zero in the padding.
pub const EXPANDED_CHUNKS: usize = chunks(EXPANDED);

/// The features of one image into `out`, `[EXPANDED_CHUNKS]`.
#[inline(always)]
pub(super) fn expand<S: Simd>(simd: S, components: &Components, out: &mut [Chunk]) {
    // Padded, so that a whole chunk can be read from any component on.
    let mut z = [0.0; COMPONENTS + 2 * LANES];
    z[..COMPONENTS].copy_from_slice(&components.as_flattened()[..COMPONENTS]);
    let out = out.as_flattened_mut();
    let mut at = 0;
    for a in 0..COMPONENTS {
        // A row's last chunk may reach into the next row, which then overwrites it, or into the
        // components at the end, which are written last.
        let scale = simd.splat(SQRT_2 * z[a]);
        for b in (a..COMPONENTS).step_by(LANES) {
            let to = out[at + b - a..].first_chunk_mut().expect("rows end before the components");
            simd.store(simd.mul(scale, simd.load(chunk_at(&z, b))), to);
        }
        out[at] = z[a] * z[a];
        at += COMPONENTS - a;
    }
    out[PRODUCTS..EXPANDED].copy_from_slice(&z[..COMPONENTS]);
    out[EXPANDED..].fill(0.0);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::{Isa, Kernel};

    struct Project<'a>(&'a Projection, &'a [Pooled]);

    impl Kernel for Project<'_> {
        type Output = Vec<Components>;
        #[inline(always)]
        fn run<S: Simd>(self, simd: S) -> Self::Output {
            let mut out = vec![[[7.0; LANES]; COMPONENT_CHUNKS]; self.1.len()];
            self.0.project(simd, self.1, &mut out);
            out
        }
    }

    fn example() -> (Vec<f32>, Vec<f32>, Vec<Pooled>) {
        let mut state = 17_u32;
        let mut next = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 8) as f32 / (1 << 23) as f32 - 1.0
        };
        let matrix = (0..POOLED * COMPONENTS).map(|_| next()).collect();
        let offset = (0..COMPONENTS).map(|_| next()).collect();
        let pooled = (0..7)
            .map(|_| std::array::from_fn(|_| std::array::from_fn(|_| next() + 1.0)))
            .collect();
        (matrix, offset, pooled)
    }

    #[test]
    fn is_the_matrix_product() {
        let (matrix, offset, pooled) = example();
        let out = Isa::best().run(Project(&Projection::new(&matrix, &offset), &pooled));
        for (x, z) in pooled.iter().zip(&out) {
            for c in 0..COMPONENTS {
                let x = x.as_flattened().iter();
                let dot: f64 = x
                    .enumerate()
                    .map(|(j, &x)| f64::from(x) * f64::from(matrix[j * COMPONENTS + c]))
                    .sum();
                let expected = dot + f64::from(offset[c]);
                assert!((f64::from(z.as_flattened()[c]) - expected).abs() < 1e-3);
            }
            assert_eq!(z.as_flattened()[COMPONENTS..], [0.0; 12]);
        }
    }

    #[test]
    fn has_the_same_bits_alone_in_any_block_and_with_every_isa() {
        let (matrix, offset, pooled) = example();
        let projection = Projection::new(&matrix, &offset);
        assert_eq!((projection.matrix(), projection.offset()), (matrix, offset));
        let expected = Isa::available()[0].run(Project(&projection, &pooled));
        for isa in Isa::available() {
            for count in 1..=pooled.len() {
                let some = isa.run(Project(&projection, &pooled[..count]));
                assert_eq!(some, expected[..count], "{isa:?}, {count} images");
            }
        }
    }

    struct Expand<'a>(&'a Components);

    impl Kernel for Expand<'_> {
        type Output = Vec<Chunk>;
        #[inline(always)]
        fn run<S: Simd>(self, simd: S) -> Self::Output {
            let mut out = vec![[7.0; LANES]; EXPANDED_CHUNKS];
            expand(simd, self.0, &mut out);
            out
        }
    }

    fn components(seed: f32) -> Components {
        let mut z = [[0.0; LANES]; chunks(COMPONENTS)];
        for (i, z) in z.as_flattened_mut()[..COMPONENTS].iter_mut().enumerate() {
            *z = (i as f32 * seed) % 0.37 - 0.2;
        }
        z
    }

    #[test]
    fn features_stand_in_the_order_documented() {
        let z = components(0.0123);
        let out = Isa::best().run(Expand(&z));
        let (z, out) = (z.as_flattened(), out.as_flattened());
        let mut expected = Vec::new();
        for a in 0..100 {
            expected.push(z[a] * z[a]);
            expected.extend((a + 1..100).map(|b| (SQRT_2 * z[a]) * z[b]));
        }
        expected.extend_from_slice(&z[..100]);
        assert_eq!(out[..EXPANDED], expected);
        assert_eq!(EXPANDED, 5150);
        assert!(out[EXPANDED..].iter().all(|&padding| padding == 0.0));
    }

    #[test]
    fn the_inner_product_is_the_kernel_of_degree_two() {
        let (x, y) = (components(0.0123), components(0.0457));
        let dot = |a: &[f32], b: &[f32]| -> f64 {
            a.iter().zip(b).map(|(&a, &b)| f64::from(a) * f64::from(b)).sum()
        };
        let linear = dot(x.as_flattened(), y.as_flattened());
        let (x, y) = (Isa::best().run(Expand(&x)), Isa::best().run(Expand(&y)));
        let expanded = dot(x.as_flattened(), y.as_flattened());
        assert!((expanded - (linear * linear + linear)).abs() < 1e-5);
    }

    #[test]
    fn every_isa_gives_the_same_bits() {
        let z = components(0.0123);
        let expected = Isa::available()[0].run(Expand(&z));
        for isa in Isa::available() {
            assert_eq!(isa.run(Expand(&z)), expected, "{isa:?}");
        }
    }
}
