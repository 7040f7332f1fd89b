//! Drawn digits: seeded images that look like handwriting, in any number.
//!
//! No data set is shipped or downloaded. Each digit is a few splines through the points of
//! `glyphs`, distorted a little differently every time. `raster` draws it as MNIST was prepared:
//! white on black, the ink scaled into 20×20 with its proportions kept, and its centre of mass in
//! the middle of 28×28 (LeCun et al., <http://yann.lecun.com/exdb/mnist/>).
//!
//! The arithmetic is additions, multiplications, divisions and square roots, which IEEE 754 rounds
//! the same everywhere, and the random generator has a fixed stream. So a seed gives the same bytes
//! on every platform.

mod glyphs;
mod raster;

use std::collections::HashSet;

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use crate::workload::Population;
use raster::{Point, SIDE};

/// Bytes in a drawn digit: 28 rows of 28 pixels, 0 for black and 255 for white.
pub const DIGIT_LEN: usize = SIDE * SIDE;

/// The number of different digits.
pub const CLASSES: u8 = 10;

/// The maximum width and height of the ink in pixels: MNIST's normalization box.
const BOX: f32 = 20.0;

/// Draws one digit of class `class`, row by row. Every state of `rng` gives another image.
///
/// # Panics
/// When `class` is not below [`CLASSES`].
pub fn draw(class: u8, rng: &mut impl Rng) -> [u8; DIGIT_LEN] {
    assert!(class < CLASSES, "class is {class}; digits end at 9");
    let mut strokes = glyphs::strokes(class, rng);

    // The hand: it moves every point a little, and stretches, slants and rotates the whole.
    let jitter = within(rng, 0.008, 0.026);
    let width = within(rng, 0.82, 1.22);
    let slant = 0.16 + 0.17 * bell(rng);
    let turn = 0.05 * bell(rng);
    // The rational point on the unit circle at about 2·(turn/2) radians, which needs no sine.
    let half = turn / 2.0;
    let (sin, cos) = (2.0 * half / (1.0 + half * half), (1.0 - half * half) / (1.0 + half * half));
    for point in strokes.iter_mut().flatten() {
        let x = (point.x + jitter * bell(rng)) * width;
        let y = point.y + jitter * bell(rng);
        let x = x - slant * (y - 0.5);
        *point = Point { x: x * cos - y * sin, y: x * sin + y * cos };
    }
    let mut curves: Vec<Vec<Point>> = strokes.iter().map(|s| raster::spline(s)).collect();

    // The pen, then the scale at which ink of this thickness just fits the box.
    let pen = within(rng, 1.9, 3.1);
    let fill = within(rng, 0.93, 1.0);
    raster::fit(&mut curves, BOX * fill - pen);
    let mut image = raster::draw(&curves, pen);
    let off = |rng: &mut _| (0.45 * bell(rng)) as i32;
    let (off_x, off_y) = (off(rng), off(rng));
    raster::centre(&mut image, off_x, off_y);
    image
}

impl Population {
    /// `count` different digits in shuffled order, labelled with the intended digit. The classes
    /// have equal shares, except for the remainder.
    ///
    /// A model may give another label than the intended one.
    pub fn drawn(seed: u64, count: usize) -> Self {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let mut seen = HashSet::with_capacity(count);
        let mut bytes = Vec::with_capacity(count * DIGIT_LEN);
        let mut labels = Vec::with_capacity(count);
        let mut order: [u8; CLASSES as usize] = std::array::from_fn(|class| class as u8);
        while labels.len() < count {
            for i in (1..order.len()).rev() {
                order.swap(i, (rng.next_u32() % (i as u32 + 1)) as usize);
            }
            for &class in order.iter().take(count - labels.len()) {
                let image = loop {
                    let image = draw(class, &mut rng);
                    if seen.insert(image) {
                        break image;
                    }
                };
                bytes.extend_from_slice(&image);
                labels.push(u16::from(class));
            }
        }
        Population::new(bytes, DIGIT_LEN, Some(labels)).expect("one label for each whole image")
    }
}

/// A number in `low..high`, from the top 24 bits of one draw: exact in an `f32`.
fn within(rng: &mut impl Rng, low: f32, high: f32) -> f32 {
    const STEP: f32 = 1.0 / (1 << 24) as f32;
    low + (high - low) * ((rng.next_u32() >> 8) as f32 * STEP)
}

/// A roughly normal number with deviation 1 and within ±3.5: the scaled sum of four uniform ones.
fn bell(rng: &mut impl Rng) -> f32 {
    const SQRT_3: f32 = 1.732_050_8;
    let sum: f32 = (0..4).map(|_| within(rng, -0.5, 0.5)).sum();
    sum * SQRT_3
}

/// True with this probability.
fn chance(rng: &mut impl Rng, likelihood: f32) -> bool {
    within(rng, 0.0, 1.0) < likelihood
}

#[cfg(test)]
mod tests {
    use super::*;

    /// FNV-1a, to pin many bytes with one number.
    fn fnv(bytes: &[u8]) -> u64 {
        bytes.iter().fold(0xcbf2_9ce4_8422_2325, |hash, &byte| {
            (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
        })
    }

    #[test]
    fn a_seed_gives_the_same_bytes_for_ever() {
        let population = Population::drawn(7, 200);
        assert_eq!(fnv(population.bytes()), 5_470_502_141_521_625_421, "the drawing has changed");
    }

    #[test]
    fn no_two_drawn_images_are_alike_and_the_classes_are_balanced() {
        let population = Population::drawn(1, 1003);
        assert_eq!(population.len(), 1003);
        let distinct: HashSet<&[u8]> = (0..population.len()).map(|i| population.image(i)).collect();
        assert_eq!(distinct.len(), 1003);
        let labels = population.labels().unwrap();
        for class in 0..u16::from(CLASSES) {
            let count = labels.iter().filter(|&&label| label == class).count();
            assert!((100..=101).contains(&count), "{count} of class {class}");
        }
    }

    #[test]
    fn other_seeds_give_other_images() {
        let (a, b) = (Population::drawn(1, 50), Population::drawn(2, 50));
        assert!((0..50).all(|i| a.image(i) != b.image(i)));
    }

    #[test]
    fn ink_stays_in_the_frame_near_the_middle_and_has_grey_edges() {
        let population = Population::drawn(3, 500);
        for i in 0..population.len() {
            let image = population.image(i);
            let (mut mass, mut mass_x, mut mass_y, mut grey) = (0.0, 0.0, 0.0, 0);
            for (at, &value) in image.iter().enumerate() {
                let (x, y) = (at % SIDE, at / SIDE);
                let ink = f32::from(value);
                mass += ink;
                mass_x += ink * x as f32;
                mass_y += ink * y as f32;
                grey += usize::from((1..255).contains(&value));
                let border = x == 0 || y == 0 || x == SIDE - 1 || y == SIDE - 1;
                assert!(!border || value == 0, "image {i} runs out of its frame");
            }
            let (x, y) = (mass_x / mass, mass_y / mass);
            assert!((11.5..15.5).contains(&x), "image {i}: centre at {x}, {y}");
            assert!((11.5..15.5).contains(&y), "image {i}: centre at {x}, {y}");
            assert!((7_000.0..60_000.0).contains(&mass), "image {i}: ink {mass}");
            assert!(grey > 20, "image {i}: {grey} grey pixels");
        }
    }
}
