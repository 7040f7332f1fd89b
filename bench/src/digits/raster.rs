//! Conversion of points to pixels: splines, the fit into the box, a round pen with soft edges, and
//! centring.

/// Pixels along one side of an image.
pub(super) const SIDE: usize = 28;

/// Straight pieces for one span of a spline. With more, an image of 28 pixels looks the same.
const PIECES: u8 = 6;

/// Width of the pen's soft edge in pixels. It gives about as many grey pixels as MNIST has.
const FADE: f32 = 1.8;

/// A point: in the glyph's unit box at first, in pixels after [`fit`].
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Point {
    pub(super) x: f32,
    pub(super) y: f32,
}

/// The Catmull–Rom spline through `points` as a chain of straight pieces.
pub(super) fn spline(points: &[Point]) -> Vec<Point> {
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
pub(super) fn fit(curves: &mut [Vec<Point>], extent: f32) {
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
pub(super) fn draw(curves: &[Vec<Point>], pen: f32) -> [u8; SIDE * SIDE] {
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
pub(super) fn centre(image: &mut [u8; SIDE * SIDE], off_x: i32, off_y: i32) {
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

#[cfg(test)]
mod tests {
    use super::*;

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
        let image = draw(&[line], 3.0);
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
