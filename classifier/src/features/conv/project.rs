//! The projection of the pooled values to 100 components: one matrix product, the mean's part taken
//! off.

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
    /// B: for each pooled value its part in every component.
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
}
