//! Drawn digits: seeded images that look like handwriting, in any number.
//!
//! No data set is shipped or downloaded. Each digit is a few splines through the points of
//! `strokes`, distorted a little differently every time. `ink` draws it as MNIST was prepared:
//! white on black, the ink scaled into 20×20 with its proportions kept, and its centre of mass in
//! the middle of 28×28 (LeCun et al., <http://yann.lecun.com/exdb/mnist/>).
//!
//! The arithmetic is additions, multiplications, divisions and square roots, which IEEE 754 rounds
//! the same everywhere, and the random generator has a fixed stream. So a seed gives the same bytes
//! on every platform.

use std::collections::HashSet;

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use crate::workload::Population;

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
    let mut strokes = strokes(class, rng);

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
    let mut curves: Vec<Vec<Point>> = strokes.iter().map(|s| spline(s)).collect();

    // The pen, then the scale at which ink of this thickness just fits the box.
    let pen = within(rng, 1.9, 3.1);
    let fill = within(rng, 0.93, 1.0);
    fit(&mut curves, BOX * fill - pen);
    let mut image = ink(&curves, pen);
    let off = |rng: &mut _| (0.45 * bell(rng)) as i32;
    let (off_x, off_y) = (off(rng), off(rng));
    centre(&mut image, off_x, off_y);
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

/// Pixels along one side of an image.
const SIDE: usize = 28;

/// Straight pieces for one span of a spline. With more, an image of 28 pixels looks the same.
const PIECES: u8 = 6;

/// Width of the pen's soft edge in pixels. It gives about as many grey pixels as MNIST has.
const FADE: f32 = 1.8;

/// A point: in the glyph's unit box at first, in pixels after [`fit`].
#[derive(Clone, Copy, Debug, PartialEq)]
struct Point {
    x: f32,
    y: f32,
}

/// The Catmull–Rom spline through `points` as a chain of straight pieces.
fn spline(points: &[Point]) -> Vec<Point> {
    let at = |i: usize| points[i.min(points.len() - 1)];
    let mut chain = Vec::with_capacity(points.len() * usize::from(PIECES) + 1);
    chain.push(at(0));
    for i in 0..points.len() - 1 {
        let (a, b, c, d) = (at(i.saturating_sub(1)), at(i), at(i + 1), at(i + 2));
        for piece in 1..=PIECES {
            let t = f32::from(piece) / f32::from(PIECES);
            let along = |a: f32, b: f32, c: f32, d: f32| {
                let cubic = 3.0 * (b - c) + d - a;
                let square = 2.0 * a - 5.0 * b + 4.0 * c - d;
                b + 0.5 * t * ((c - a) + t * (square + t * cubic))
            };
            chain.push(Point { x: along(a.x, b.x, c.x, d.x), y: along(a.y, b.y, c.y, d.y) });
        }
    }
    chain
}

/// Scales and moves the curves: the larger of their width and height becomes `extent` pixels, and
/// they are in the middle of the image.
fn fit(curves: &mut [Vec<Point>], extent: f32) {
    let (mut low, mut high) =
        (Point { x: f32::MAX, y: f32::MAX }, Point { x: f32::MIN, y: f32::MIN });
    for point in curves.iter().flatten() {
        low = Point { x: low.x.min(point.x), y: low.y.min(point.y) };
        high = Point { x: high.x.max(point.x), y: high.y.max(point.y) };
    }
    let scale = extent / (high.x - low.x).max(high.y - low.y);
    let middle = SIDE as f32 / 2.0;
    for point in curves.iter_mut().flatten() {
        point.x = (point.x - (low.x + high.x) / 2.0) * scale + middle;
        point.y = (point.y - (low.y + high.y) / 2.0) * scale + middle;
    }
}

/// Draws the curves with a round pen of `pen` pixels. Its edge fades over [`FADE`] pixels.
fn ink(curves: &[Vec<Point>], pen: f32) -> [u8; SIDE * SIDE] {
    let mut image = [0u8; SIDE * SIDE];
    // The radius at which the ink ends. [`FADE`] pixels further in, it is full.
    let reach = (pen + FADE) / 2.0;
    for piece in curves.iter().flat_map(|curve| curve.windows(2)) {
        let &[from, to] = piece else { continue };
        let along = Point { x: to.x - from.x, y: to.y - from.y };
        let length_squared = (along.x * along.x + along.y * along.y).max(f32::MIN_POSITIVE);
        for row in pixels(from.y.min(to.y) - reach, from.y.max(to.y) + reach) {
            for column in pixels(from.x.min(to.x) - reach, from.x.max(to.x) + reach) {
                // The distance of the pixel's centre from the piece.
                let (x, y) = (column as f32 + 0.5 - from.x, row as f32 + 0.5 - from.y);
                let t = ((x * along.x + y * along.y) / length_squared).clamp(0.0, 1.0);
                let (x, y) = (x - t * along.x, y - t * along.y);
                let ink = ((reach - (x * x + y * y).sqrt()) / FADE).clamp(0.0, 1.0);
                let pixel = &mut image[row * SIDE + column];
                *pixel = (*pixel).max((ink * 255.0) as u8);
            }
        }
    }
    image
}

/// The rows or columns whose pixels touch `low..high`.
fn pixels(low: f32, high: f32) -> std::ops::Range<usize> {
    // A cast from a float saturates, so positions left of the image become 0.
    (low as usize).min(SIDE)..(high as usize + 1).min(SIDE)
}

/// Moves the image by whole pixels, so that its centre of mass is in the middle, and then by
/// `off_x` and `off_y`. Ink never leaves the image and never touches its border.
fn centre(image: &mut [u8; SIDE * SIDE], off_x: i32, off_y: i32) {
    let (mut mass, mut sum_x, mut sum_y) = (0u32, 0u32, 0u32);
    let (mut low_x, mut low_y, mut high_x, mut high_y) = (SIDE, SIDE, 0, 0);
    for (i, &value) in image.iter().enumerate().filter(|(_, value)| **value > 0) {
        let (x, y, ink) = (i % SIDE, i / SIDE, u32::from(value));
        mass += ink;
        sum_x += ink * x as u32;
        sum_y += ink * y as u32;
        (low_x, low_y) = (low_x.min(x), low_y.min(y));
        (high_x, high_y) = (high_x.max(x), high_y.max(y));
    }
    if mass == 0 {
        return;
    }
    let shift = |sum: u32, off: i32, low: usize, high: usize| {
        let middle = (SIDE as u32 / 2) as i32;
        let wanted = middle - ((sum + mass / 2) / mass) as i32 + off;
        wanted.clamp(1 - low as i32, (SIDE as i32 - 2) - high as i32)
    };
    let by_x = shift(sum_x, off_x, low_x, high_x);
    let by_y = shift(sum_y, off_y, low_y, high_y);
    let old = *image;
    image.fill(0);
    for y in low_y..=high_y {
        for x in low_x..=high_x {
            let (to_x, to_y) = (x as i32 + by_x, y as i32 + by_y);
            image[to_y as usize * SIDE + to_x as usize] = old[y * SIDE + x];
        }
    }
}

type Stroke = [(f32, f32)];

const ZERO: &[&Stroke] = &[&[
    (0.42, 0.00),
    (0.15, 0.14),
    (0.01, 0.50),
    (0.09, 0.86),
    (0.36, 1.00),
    (0.66, 0.85),
    (0.77, 0.50),
    (0.68, 0.15),
    (0.40, 0.01),
]];

const ONE: &[&Stroke] = &[&[(0.30, 0.00), (0.30, 0.50), (0.29, 1.00)]];
const ONE_FLAGGED: &[&Stroke] =
    &[&[(0.12, 0.20), (0.32, 0.00)], &[(0.32, 0.00), (0.31, 0.50), (0.31, 1.00)]];
const ONE_ON_A_BASE: &[&Stroke] = &[
    &[(0.10, 0.20), (0.32, 0.00)],
    &[(0.32, 0.00), (0.31, 0.50), (0.31, 1.00)],
    &[(0.04, 1.00), (0.60, 0.99)],
];

const TWO: &[&Stroke] = &[
    &[
        (0.05, 0.24),
        (0.16, 0.06),
        (0.38, 0.00),
        (0.57, 0.12),
        (0.58, 0.34),
        (0.42, 0.60),
        (0.20, 0.82),
        (0.02, 0.97),
    ],
    &[(0.02, 0.97), (0.34, 0.95), (0.72, 0.97)],
];
const TWO_LOOPED: &[&Stroke] = &[&[
    (0.08, 0.18),
    (0.25, 0.01),
    (0.48, 0.05),
    (0.56, 0.25),
    (0.46, 0.55),
    (0.27, 0.85),
    (0.10, 0.98),
    (0.01, 0.88),
    (0.13, 0.78),
    (0.36, 0.88),
    (0.56, 0.98),
    (0.76, 0.90),
]];

const THREE: &[&Stroke] = &[
    &[(0.06, 0.10), (0.28, 0.00), (0.51, 0.07), (0.55, 0.25), (0.42, 0.41), (0.22, 0.47)],
    &[(0.22, 0.47), (0.46, 0.50), (0.61, 0.68), (0.53, 0.91), (0.28, 1.00), (0.01, 0.92)],
];

const FOUR: &[&Stroke] = &[
    &[(0.08, 0.02), (0.03, 0.28), (0.05, 0.48), (0.26, 0.55), (0.58, 0.47)],
    &[(0.58, 0.00), (0.56, 0.50), (0.53, 1.00)],
];
const FOUR_CLOSED: &[&Stroke] = &[
    &[(0.46, 0.00), (0.24, 0.32), (0.00, 0.62)],
    &[(0.00, 0.62), (0.36, 0.60), (0.72, 0.59)],
    &[(0.47, 0.03), (0.47, 0.50), (0.46, 1.00)],
];

const FIVE: &[&Stroke] = &[
    &[(0.66, 0.01), (0.42, 0.02), (0.20, 0.03)],
    &[(0.20, 0.03), (0.16, 0.22), (0.13, 0.42)],
    &[(0.13, 0.42), (0.35, 0.38), (0.56, 0.52), (0.58, 0.76), (0.38, 0.97), (0.02, 0.97)],
];

const SIX: &[&Stroke] = &[&[
    (0.47, 0.00),
    (0.22, 0.20),
    (0.05, 0.52),
    (0.07, 0.85),
    (0.28, 1.00),
    (0.51, 0.91),
    (0.56, 0.71),
    (0.42, 0.56),
    (0.22, 0.63),
    (0.08, 0.82),
]];

const SEVEN: &[&Stroke] = &[
    &[(0.00, 0.08), (0.30, 0.04), (0.62, 0.04)],
    &[(0.62, 0.04), (0.48, 0.35), (0.35, 0.66), (0.27, 1.00)],
];
const SEVEN_CROSSED: &[&Stroke] = &[
    &[(0.00, 0.08), (0.30, 0.04), (0.62, 0.04)],
    &[(0.62, 0.04), (0.48, 0.35), (0.35, 0.66), (0.27, 1.00)],
    &[(0.18, 0.52), (0.62, 0.48)],
];

const EIGHT: &[&Stroke] = &[&[
    (0.57, 0.12),
    (0.35, 0.00),
    (0.11, 0.10),
    (0.13, 0.32),
    (0.34, 0.47),
    (0.54, 0.66),
    (0.54, 0.88),
    (0.31, 1.00),
    (0.08, 0.89),
    (0.11, 0.68),
    (0.33, 0.48),
    (0.53, 0.31),
    (0.59, 0.14),
    (0.45, 0.02),
]];

const NINE: &[&Stroke] = &[
    &[
        (0.56, 0.16),
        (0.36, 0.00),
        (0.11, 0.09),
        (0.03, 0.32),
        (0.17, 0.48),
        (0.40, 0.41),
        (0.56, 0.16),
    ],
    &[(0.57, 0.12), (0.55, 0.52), (0.49, 1.00)],
];
const NINE_HOOKED: &[&Stroke] = &[
    &[
        (0.56, 0.16),
        (0.36, 0.00),
        (0.11, 0.09),
        (0.04, 0.30),
        (0.18, 0.45),
        (0.41, 0.39),
        (0.56, 0.16),
    ],
    &[(0.57, 0.12), (0.57, 0.50), (0.51, 0.80), (0.39, 0.97), (0.24, 1.00)],
];

/// The strokes of a digit of class `class` (below ten), in one of its forms.
fn strokes(class: u8, rng: &mut impl Rng) -> Vec<Vec<Point>> {
    // This number is drawn for every class, so that the class does not change the numbers after it.
    let (often, seldom) = (chance(rng, 0.35), chance(rng, 0.15));
    let shape = match class {
        0 => ZERO,
        1 if seldom => ONE_ON_A_BASE,
        1 if often => ONE_FLAGGED,
        1 => ONE,
        2 if often => TWO_LOOPED,
        2 => TWO,
        3 => THREE,
        4 if often => FOUR_CLOSED,
        4 => FOUR,
        5 => FIVE,
        6 => SIX,
        7 if seldom => SEVEN_CROSSED,
        7 => SEVEN,
        8 => EIGHT,
        _ if often => NINE_HOOKED,
        _ => NINE,
    };
    shape.iter().map(|stroke| stroke.iter().map(|&(x, y)| Point { x, y }).collect()).collect()
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

    #[test]
    fn a_spline_passes_through_its_points() {
        let points = [(0.0, 0.0), (1.0, 3.0), (2.0, -1.0), (5.0, 0.5)].map(|(x, y)| Point { x, y });
        let chain = spline(&points);
        for (i, point) in points.iter().enumerate() {
            let at = chain[i * usize::from(PIECES)];
            assert!((at.x - point.x).abs() < 1e-5 && (at.y - point.y).abs() < 1e-5);
        }
    }

    #[test]
    fn a_line_is_as_thick_as_the_pen() {
        let line = vec![Point { x: 14.0, y: 6.0 }, Point { x: 14.0, y: 22.0 }];
        let image = ink(&[line], 3.0);
        let row: f32 = image[14 * SIDE..15 * SIDE].iter().map(|&v| f32::from(v) / 255.0).sum();
        assert!((2.9..3.1).contains(&row), "{row} pixels of ink across");
    }

    #[test]
    fn centring_keeps_all_the_ink() {
        let mut image = [0; SIDE * SIDE];
        image[0] = 200;
        image[SIDE + 1] = 100;
        let before: u32 = image.iter().map(|&v| u32::from(v)).sum();
        centre(&mut image, 40, -40);
        let after: u32 = image.iter().map(|&v| u32::from(v)).sum();
        assert_eq!(before, after);
    }
}
