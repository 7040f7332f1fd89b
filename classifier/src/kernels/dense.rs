//! Kernels over dense rows of `f32`: products of matrices and sums of vectors.

use super::{Chunk, Kernel, Simd};

/// Every dot product of a row of `x` with a row of `w`: `out[i * classes + c] = Σ x[i]·w[c]`, all
/// rows of `row` chunks.
///
/// Each product is summed in the same order: over the chunks in turn, lane by lane, then over the
/// lanes by [`Simd::sum`]. So the result does not depend on the number of rows or the tiling.
pub struct Dots<'a> {
    pub row: usize,
    pub x: &'a [Chunk],
    pub w: &'a [Chunk],
    pub out: &'a mut [f32],
}

impl Kernel for Dots<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let Self { row, x, w, out } = self;
        let classes = w.len() / row;
        let rows = if S::WIDE { 4 } else { 1 };
        for (x, out) in x.chunks(rows * row).zip(out.chunks_mut(rows * classes)) {
            if x.len() == 4 * row {
                tile_classes::<S, 4>(simd, row, x, w, out);
            } else {
                for (x, out) in x.chunks_exact(row).zip(out.chunks_exact_mut(classes)) {
                    tile_classes::<S, 1>(simd, row, x, w, out);
                }
            }
        }
    }
}

/// `I` rows of `x` against all rows of `w`, five or ten at a time and the rest one at a time.
#[inline(always)]
fn tile_classes<S: Simd, const I: usize>(
    simd: S,
    row: usize,
    x: &[Chunk],
    w: &[Chunk],
    out: &mut [f32],
) {
    let classes = w.len() / row;
    let mut class = 0;
    // A single row needs more sums at once to keep the multipliers busy, since each addition waits
    // for the one before it.
    while S::WIDE && I == 1 && class + 10 <= classes {
        tile::<S, I, 10>(simd, row, x, &w[class * row..], classes, &mut out[class..]);
        class += 10;
    }
    while class + 5 <= classes {
        tile::<S, I, 5>(simd, row, x, &w[class * row..], classes, &mut out[class..]);
        class += 5;
    }
    while class < classes {
        tile::<S, I, 1>(simd, row, x, &w[class * row..], classes, &mut out[class..]);
        class += 1;
    }
}

#[inline(always)]
fn tile<S: Simd, const I: usize, const C: usize>(
    simd: S,
    row: usize,
    x: &[Chunk],
    w: &[Chunk],
    stride: usize,
    out: &mut [f32],
) {
    let x: [&[Chunk]; I] = std::array::from_fn(|i| &x[i * row..(i + 1) * row]);
    let w: [&[Chunk]; C] = std::array::from_fn(|c| &w[c * row..(c + 1) * row]);
    let mut sums = [[simd.splat(0.0); C]; I];
    for k in 0..row {
        let w: [S::V; C] = std::array::from_fn(|c| simd.load(&w[c][k]));
        for i in 0..I {
            let x = simd.load(&x[i][k]);
            for c in 0..C {
                sums[i][c] = simd.mul_add(x, w[c], sums[i][c]);
            }
        }
    }
    for i in 0..I {
        for c in 0..C {
            out[i * stride + c] = simd.sum(sums[i][c]);
        }
    }
}

/// `w += factor · x`, element by element.
pub struct AddScaled<'a> {
    pub w: &'a mut [Chunk],
    pub factor: f32,
    pub x: &'a [Chunk],
}

impl Kernel for AddScaled<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let factor = simd.splat(self.factor);
        for (w, x) in self.w.iter_mut().zip(self.x) {
            let sum = simd.mul_add(factor, simd.load(x), simd.load(w));
            simd.store(sum, w);
        }
    }
}

/// `x ← factor · x + offset`, element by element.
pub struct Affine<'a> {
    pub x: &'a mut [Chunk],
    pub factor: f32,
    pub offset: &'a [Chunk],
}

impl Kernel for Affine<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let factor = simd.splat(self.factor);
        for (x, offset) in self.x.iter_mut().zip(self.offset) {
            let value = simd.mul_add(factor, simd.load(x), simd.load(offset));
            simd.store(value, x);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::noise;
    use super::super::{Isa, LANES};
    use super::*;

    fn dots(isa: Isa, row: usize, x: &[Chunk], w: &[Chunk]) -> Vec<u32> {
        let mut out = vec![0.0; (x.len() / row) * (w.len() / row)];
        isa.run(Dots { row, x, w, out: &mut out });
        out.into_iter().map(f32::to_bits).collect()
    }

    #[test]
    fn every_isa_gives_the_same_bits_for_dot_products() {
        let (x, w) = (noise(7 * 49, 1), noise(11 * 49, 2));
        let expected = dots(Isa::available()[0], 49, &x, &w);
        for isa in Isa::available() {
            assert_eq!(dots(isa, 49, &x, &w), expected, "{isa:?}");
        }
    }

    #[test]
    fn a_row_alone_gives_the_same_bits_as_in_any_batch() {
        let (x, w) = (noise(13 * 9, 3), noise(10 * 9, 4));
        for isa in Isa::available() {
            let together = dots(isa, 9, &x, &w);
            for count in 1..=13 {
                assert_eq!(dots(isa, 9, &x[..count * 9], &w), together[..count * 10]);
            }
            for i in 0..13 {
                let alone = dots(isa, 9, &x[i * 9..(i + 1) * 9], &w);
                assert_eq!(alone, together[i * 10..(i + 1) * 10], "{isa:?}, row {i}");
            }
        }
    }

    #[test]
    fn dot_products_are_right() {
        let x = [[2.0; LANES], [1.0; LANES]];
        let w: Vec<Chunk> = vec![std::array::from_fn(|i| i as f32), [0.5; LANES]];
        let out = dots(Isa::best(), 2, &x, &w);
        assert_eq!(f32::from_bits(out[0]), 2.0 * 120.0 + 8.0);
    }
}
