//! Deskewing: the slant of a written digit depends more on the writer than on the digit.
//! The image is moved so that its centre of mass is in the middle, and sheared so that its rows'
//! centres of mass lie above one another as well as a straight line can make them.
//!
//! With the centre of mass (cy, cx) and the slope s = Σm·dy·dx / Σm·dy² over pixels of mass m at
//! (dy, dx) from it, the result is
//!
//! ```text
//! out[y, x] = in[y + cy − 13.5,  x + s·(y − 13.5) + cx − 13.5]
//! ```
//!
//! interpolated linearly in both directions, zero outside. Deskewing by moments goes back to Y.
//! LeCun et al., "Gradient-based learning applied to document recognition", Proc. IEEE 86, 1998,
//! section III.
//!
//! All pixels of a row move by the same fractions of a pixel, so a row is two blends of
//! neighbouring rows: no gathering.

use super::{MIDDLE, Plane, ROW_CHUNKS, ROW_LEN, SIDE, chunk_at};
use crate::kernels::{Chunk, LANES, Simd};

/// Zeros on both sides of a row, so that a shifted row can be read without bounds checks.
const MARGIN: usize = ROW_LEN;

/// Mean square distance from the middle row, in pixels², below which an image is one line with no
/// slope.
const FLAT: f32 = 1e-4;

/// The column numbers, counted from the middle; zero in the padding.
const COLUMNS: [Chunk; ROW_CHUNKS] = {
    let mut columns = [[0.0; LANES]; ROW_CHUNKS];
    let mut x = 0;
    while x < SIDE {
        columns[x / LANES][x % LANES] = x as f32 - MIDDLE;
        x += 1;
    }
    columns
};

/// Deskews `from` into `to`, and moves the image by `shift` (rows, columns; in pixels). Only
/// training has a `shift` other than 0.
#[inline(always)]
pub(crate) fn deskew<S: Simd>(simd: S, from: &Plane, shift: [f32; 2], to: &mut Plane) {
    let Lean { row, column, slope } = measure(simd, from);
    let down = row + shift[0];
    let (rows, down) = split(down);
    let (keep, take) = (simd.splat(1.0 - down), simd.splat(down));
    let mut blended = [0.0; MARGIN + ROW_LEN + MARGIN];
    for y in 0..SIDE {
        let out = &mut to.0[y];
        // Out of range on either side is a row of zeros.
        let source = |offset: i32| {
            usize::try_from(y as i32 + rows + offset).ok().filter(|&y| y < SIDE).map(|y| &from.0[y])
        };
        let (upper, lower) = (source(0), source(1));
        let right = slope * (y as f32 - MIDDLE) + column + shift[1];
        let (columns, right) = split(right);
        if (upper.is_none() && lower.is_none()) || columns.unsigned_abs() as usize > SIDE {
            *out = [[0.0; LANES]; ROW_CHUNKS];
            continue;
        }
        let zero = [[0.0; LANES]; ROW_CHUNKS];
        let (upper, lower) = (upper.unwrap_or(&zero), lower.unwrap_or(&zero));
        for (i, to) in blended[MARGIN..MARGIN + ROW_LEN].as_chunks_mut().0.iter_mut().enumerate() {
            let blend = simd.mul(keep, simd.load(&upper[i]));
            simd.store(simd.mul_add(take, simd.load(&lower[i]), blend), to);
        }
        let (keep, take) = (simd.splat(1.0 - right), simd.splat(right));
        let start = (MARGIN as i32 + columns) as usize;
        for (i, to) in out.iter_mut().enumerate() {
            let near = simd.load(chunk_at(&blended, start + i * LANES));
            let far = simd.load(chunk_at(&blended, start + i * LANES + 1));
            simd.store(simd.mul_add(take, far, simd.mul(keep, near)), to);
        }
        // The values that the shift moved from the left into the padding.
        out.as_flattened_mut()[SIDE..].fill(0.0);
    }
}

/// The distribution of an image's mass.
#[derive(Clone, Copy, Debug)]
struct Lean {
    /// The centre of mass, in rows from the middle.
    row: f32,
    /// The centre of mass, in columns from the middle.
    column: f32,
    /// Columns to the right per row down.
    slope: f32,
}

#[inline(always)]
fn measure<S: Simd>(simd: S, plane: &Plane) -> Lean {
    let zero = simd.splat(0.0);
    let [mut mass, mut by_row, mut by_row_squared] = [[zero; ROW_CHUNKS]; 3];
    for (y, row) in plane.0.iter().enumerate() {
        let dy = y as f32 - MIDDLE;
        let (dy, dy_squared) = (simd.splat(dy), simd.splat(dy * dy));
        for i in 0..ROW_CHUNKS {
            let row = simd.load(&row[i]);
            mass[i] = simd.add(mass[i], row);
            by_row[i] = simd.mul_add(dy, row, by_row[i]);
            by_row_squared[i] = simd.mul_add(dy_squared, row, by_row_squared[i]);
        }
    }
    let total = |v: [S::V; ROW_CHUNKS]| simd.sum(simd.add(v[0], v[1]));
    let columns = [simd.load(&COLUMNS[0]), simd.load(&COLUMNS[1])];
    let by_column = |v: [S::V; ROW_CHUNKS]| {
        simd.sum(simd.mul_add(v[1], columns[1], simd.mul(v[0], columns[0])))
    };
    let all = total(mass);
    if all <= 0.0 {
        return Lean { row: 0.0, column: 0.0, slope: 0.0 };
    }
    let (row, column) = (total(by_row) / all, by_column(mass) / all);
    let row_spread = total(by_row_squared) / all - row * row;
    let covariance = by_column(by_row) / all - row * column;
    let slope = if row_spread > FLAT { covariance / row_spread } else { 0.0 };
    Lean { row, column, slope }
}

/// An offset as whole pixels, rounded down, and a fraction from 0 to 1. Large offsets are clamped,
/// because they lie outside any image.
#[inline(always)]
fn split(offset: f32) -> (i32, f32) {
    const FAR: f32 = 1000.0;
    let offset = offset.clamp(-FAR, FAR);
    // Truncation of a positive number is its floor, without a call where there is no instruction
    // for it.
    let whole = (offset + FAR) as i32 - FAR as i32;
    (whole, offset - whole as f32)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::{Isa, Kernel};

    struct Deskew<'a>(&'a Plane, [f32; 2]);

    impl Kernel for Deskew<'_> {
        type Output = Plane;
        #[inline(always)]
        fn run<S: Simd>(self, simd: S) -> Plane {
            // Earlier contents of the plane must not show.
            let mut to = Plane([[[0.5; LANES]; ROW_CHUNKS]; SIDE]);
            deskew(simd, self.0, self.1, &mut to);
            to
        }
    }

    /// The formula at the top, computed directly in double precision.
    fn reference(from: &Plane, shift: [f32; 2]) -> Vec<f64> {
        let at = |y: i64, x: i64| match (0..28).contains(&y) && (0..28).contains(&x) {
            true => f64::from(from.row(y as usize)[x as usize]),
            false => 0.0,
        };
        let sum = |f: &dyn Fn(f64, f64) -> f64| -> f64 {
            (0..784).map(|i| at(i / 28, i % 28) * f((i / 28) as f64, (i % 28) as f64)).sum()
        };
        let mass = sum(&|_, _| 1.0);
        let (cy, cx) = (sum(&|y, _| y) / mass, sum(&|_, x| x) / mass);
        let slope = sum(&|y, x| (y - cy) * (x - cx)) / sum(&|y, _| (y - cy) * (y - cy));
        let mut out = Vec::new();
        for y in 0..28 {
            for x in 0..28 {
                let down = f64::from(y) + cy - 13.5 + f64::from(shift[0]);
                let right = f64::from(x) + slope * (f64::from(y) - 13.5) + cx - 13.5;
                let right = right + f64::from(shift[1]);
                let (y0, x0) = (down.floor(), right.floor());
                let (fy, fx) = (down - y0, right - x0);
                let (y0, x0) = (y0 as i64, x0 as i64);
                out.push(
                    (1.0 - fy) * ((1.0 - fx) * at(y0, x0) + fx * at(y0, x0 + 1))
                        + fy * ((1.0 - fx) * at(y0 + 1, x0) + fx * at(y0 + 1, x0 + 1)),
                );
            }
        }
        out
    }

    /// A thick line with the given lean and offset.
    fn stroke(lean: f32, down: f32, right: f32) -> Plane {
        let mut plane = Plane::ZERO;
        for y in 4..22 {
            for x in 0..SIDE {
                let middle = 13.0 + right + lean * (y as f32 - 13.0);
                let value = (2.0 - (x as f32 - middle).abs()).clamp(0.0, 1.0);
                let y = (y as f32 + down) as usize;
                plane.row_mut(y.min(SIDE - 1))[x] = value;
            }
        }
        plane
    }

    #[test]
    fn is_what_the_formula_says() {
        for (lean, down, right, shift) in [
            (0.0, 0.0, 0.0, [0.0, 0.0]),
            (0.4, 2.0, -3.0, [0.0, 0.0]),
            (-0.7, -4.0, 5.0, [0.7, -0.9]),
            (1.0, 5.0, 0.0, [-1.0, 1.0]),
        ] {
            let plane = stroke(lean, down, right);
            let expected = reference(&plane, shift);
            let got = Isa::best().run(Deskew(&plane, shift));
            for (i, expected) in expected.into_iter().enumerate() {
                let got = f64::from(got.row(i / 28)[i % 28]);
                assert!((got - expected).abs() < 1e-4, "pixel {i}: {got}, {expected}");
            }
        }
    }

    #[test]
    fn straightens_a_leaning_stroke() {
        let upright = Isa::best().run(Deskew(&stroke(0.6, 0.0, 0.0), [0.0; 2]));
        let again = measure(Isa::available(), &upright);
        assert!(again.slope.abs() < 0.02, "{again:?}");
        assert!(again.row.abs() < 0.02 && again.column.abs() < 0.02, "{again:?}");

        fn measure(isas: Vec<Isa>, plane: &Plane) -> Lean {
            struct Measure<'a>(&'a Plane);
            impl Kernel for Measure<'_> {
                type Output = Lean;
                #[inline(always)]
                fn run<S: Simd>(self, simd: S) -> Lean {
                    super::measure(simd, self.0)
                }
            }
            isas[0].run(Measure(plane))
        }
    }

    #[test]
    fn every_isa_gives_the_same_bits_and_clean_padding() {
        let mut hostile = Plane::ZERO;
        hostile.row_mut(3)[..28].fill(1.0);
        hostile.row_mut(4)[27] = 0.004;
        for plane in [stroke(0.3, 1.0, 2.0), Plane::ZERO, hostile] {
            let expected = Isa::available()[0].run(Deskew(&plane, [0.3, -0.2]));
            assert!((0..SIDE).all(|y| expected.row(y)[SIDE..] == [0.0; 4]));
            for isa in Isa::available() {
                assert_eq!(isa.run(Deskew(&plane, [0.3, -0.2])), expected, "{isa:?}");
            }
        }
    }

    #[test]
    fn an_empty_image_and_a_single_line_stay_what_they_are() {
        assert_eq!(Isa::best().run(Deskew(&Plane::ZERO, [0.0; 2])), Plane::ZERO);
        let mut line = Plane::ZERO;
        line.row_mut(5)[10..18].fill(1.0);
        let out = Isa::best().run(Deskew(&line, [0.0; 2]));
        let mass: f32 = (0..SIDE).flat_map(|y| out.row(y)).sum();
        assert!((mass - 8.0).abs() < 1e-4, "{mass}");
    }

    #[test]
    fn splitting_is_floor_and_fraction() {
        for (offset, whole, fraction) in
            [(0.0, 0, 0.0), (1.25, 1, 0.25), (-0.25, -1, 0.75), (-3.0, -3, 0.0)]
        {
            assert_eq!(split(offset), (whole, fraction));
        }
        assert_eq!(split(f32::INFINITY).0, 1000);
        assert_eq!(split(-1e30).0, -1000);
    }
}
