//! Shapes of the ten digits: points on the path of a pen, in a box of height one.
//!
//! `x` increases to the right and `y` downwards. A stroke is a smooth curve through its points. At
//! a corner of a digit, one stroke ends and the next begins. Several digits have more than one
//! form, as in handwriting.

use rand::Rng;

use super::chance;
use super::raster::Point;

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
pub(super) fn strokes(class: u8, rng: &mut impl Rng) -> Vec<Vec<Point>> {
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
