//! Distortions that keep the class of a digit: a small rotation, shear and scaling, and a smooth
//! random warp. A model trained with them learns to ignore such differences (P. Y. Simard, D.
//! Steinkraus, J. C. Platt, "Best Practices for Convolutional Neural Networks Applied to Visual
//! Document Analysis", ICDAR 2003).

use std::f64::consts::PI;

use afterimage_classifier::features::conv::{MIDDLE, Plane, SIDE};

use super::eigen::{cos, cos_pi, exp, sin};
use super::random::Random;

/// Largest rotation, in radians: 10°.
const ROTATION: f64 = 10.0 * PI / 180.0;
/// Largest shear, in columns per row.
const SHEAR: f64 = 0.1;
/// Largest change of the logarithm of the size, in either direction.
const LOG_SCALE: f64 = 0.1;
/// Root mean square of the warp in either direction, in pixels.
const WARP: f64 = 1.0;
/// The warp's cosines have m and n half waves with m² + n² below this.
const MODES_BELOW: usize = 36;
/// One more than the largest m or n.
const MODES: usize = 6;

/// A generator of distortions, with its tables.
pub(crate) struct Distorter {
    /// `[m][i]`: cos(π·m·(i + ½)/28).
    cosines: [[f32; SIDE]; MODES],
    /// `[m][n]`: the standard deviation of the amplitude of a mode, zero for unused modes.
    deviations: [[f64; MODES]; MODES],
}

impl Distorter {
    pub(crate) fn new() -> Self {
        let cosine = |m: usize, i: usize| cos_pi(m * (2 * i + 1), 2 * SIDE) as f32;
        let mut deviations = [[0.0_f64; MODES]; MODES];
        let mut power = 0.0;
        for (m, deviations) in deviations.iter_mut().enumerate() {
            for (n, deviation) in deviations.iter_mut().enumerate() {
                let order = m * m + n * n;
                if (1..MODES_BELOW).contains(&order) {
                    *deviation = 1.0 / order as f64;
                    // The mean square of a cosine is ½, of a constant 1.
                    let half = |m: usize| if m == 0 { 1.0 } else { 0.5 };
                    power += half(m) * half(n) * *deviation * *deviation;
                }
            }
        }
        let scale = WARP / f64::sqrt(power);
        deviations.as_flattened_mut().iter_mut().for_each(|deviation| *deviation *= scale);
        Self { cosines: std::array::from_fn(|m| std::array::from_fn(|i| cosine(m, i))), deviations }
    }

    /// Writes a distorted copy of `from`. Pixels from outside are zero.
    pub(crate) fn distort(&self, random: &mut Random, from: &Plane, to: &mut Plane) {
        let angle = random.symmetric() * ROTATION;
        let shear = random.symmetric() * SHEAR;
        let (scale_y, scale_x) =
            (exp(random.symmetric() * LOG_SCALE), exp(random.symmetric() * LOG_SCALE));
        let (sine, cosine) = (sin(angle), cos(angle));
        // The source of a pixel: scaled, sheared, and rotated about the middle.
        let yy = (cosine * scale_y) as f32;
        let yx = (sine * scale_x) as f32;
        let xy = ((shear * cosine - sine) * scale_y) as f32;
        let xx = ((shear * sine + cosine) * scale_x) as f32;
        let warp_y = self.warp(random);
        let warp_x = self.warp(random);
        for y in 0..SIDE {
            let dy = y as f32 - MIDDLE;
            for x in 0..SIDE {
                let dx = x as f32 - MIDDLE;
                let source_y = MIDDLE + yy * dy + yx * dx + warp_y[y][x];
                let source_x = MIDDLE + xy * dy + xx * dx + warp_x[y][x];
                to.row_mut(y)[x] = sample(from, source_y, source_x);
            }
        }
    }

    /// One direction of the warp: a sum of cosines with random amplitudes.
    fn warp(&self, random: &mut Random) -> [[f32; SIDE]; SIDE] {
        // First along x for each m, then along y. This is a tenth of the work of both at once.
        let mut along_x = [[0.0_f32; SIDE]; MODES];
        for (row, deviations) in along_x.iter_mut().zip(&self.deviations) {
            for (cosines, &deviation) in self.cosines.iter().zip(deviations) {
                if deviation > 0.0 {
                    let amplitude = (random.normal() * deviation) as f32;
                    for (value, cosine) in row.iter_mut().zip(cosines) {
                        *value += amplitude * cosine;
                    }
                }
            }
        }
        let mut warp = [[0.0; SIDE]; SIDE];
        for (y, row) in warp.iter_mut().enumerate() {
            for (part, cosines) in along_x.iter().zip(&self.cosines) {
                for (value, part) in row.iter_mut().zip(part) {
                    *value += cosines[y] * part;
                }
            }
        }
        warp
    }
}

/// The interpolated value of the four pixels around a point.
fn sample(plane: &Plane, y: f32, x: f32) -> f32 {
    let (y0, x0) = (y.floor(), x.floor());
    let (fy, fx) = (y - y0, x - x0);
    let at = |y: f32, x: f32| {
        let inside = 0.0..SIDE as f32;
        if inside.contains(&y) && inside.contains(&x) {
            plane.row(y as usize)[x as usize]
        } else {
            0.0
        }
    };
    let upper = (1.0 - fx) * at(y0, x0) + fx * at(y0, x0 + 1.0);
    let lower = (1.0 - fx) * at(y0 + 1.0, x0) + fx * at(y0 + 1.0, x0 + 1.0);
    (1.0 - fy) * upper + fy * lower
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn warps_are_about_one_pixel_rms() {
        let distorter = Distorter::new();
        let mut random = Random::new(1, b"a test..", 0);
        let mut sum = 0.0;
        let count = 3000;
        for _ in 0..count {
            let warp = distorter.warp(&mut random);
            sum += warp.as_flattened().iter().map(|&w| f64::from(w * w)).sum::<f64>() / 784.0;
        }
        let rms = (sum / f64::from(count)).sqrt();
        assert!((rms - 1.0).abs() < 0.03, "{rms}");
    }

    #[test]
    fn a_distorted_digit_is_another_one_of_about_the_same_mass() {
        let mut plane = Plane::ZERO;
        for y in 6..22 {
            plane.row_mut(y)[12..16].fill(1.0);
        }
        let mass = |plane: &Plane| -> f32 { (0..SIDE).flat_map(|y| plane.row(y)).sum() };
        let distorter = Distorter::new();
        for i in 0..200 {
            let mut to = Plane::ZERO;
            distorter.distort(&mut Random::new(1, b"a test..", i), &plane, &mut to);
            assert_ne!(to, plane);
            let ratio = mass(&to) / mass(&plane);
            assert!((0.5..2.0).contains(&ratio), "{ratio}");
            assert!((0..SIDE).all(|y| to.row(y)[SIDE..] == [0.0; 4]), "clean padding");
        }
    }

    #[test]
    fn sampling_blends_the_four_pixels_around() {
        let mut plane = Plane::ZERO;
        plane.row_mut(0)[0] = 1.0;
        plane.row_mut(0)[1] = 0.5;
        plane.row_mut(1)[0] = 0.25;
        assert_eq!(sample(&plane, 0.0, 0.0), 1.0);
        assert_eq!(sample(&plane, 0.0, 0.5), 0.75);
        assert_eq!(sample(&plane, 0.5, 0.5), 0.4375);
        assert_eq!(sample(&plane, -0.5, 0.0), 0.5);
        assert_eq!(sample(&plane, 27.5, 40.0), 0.0);
    }
}
