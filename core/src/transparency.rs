//! Transparent pictures of dark or light ink, and the ground that they are composited on.
//!
//! A reader of pictures that drops the alpha channel may turn a drawing into a blank sheet: black
//! ink on transparent is stored as black pixels everywhere.

/// Grey values below this are dark.
const MID_GREY: u8 = 128;

/// What the ink of a picture lies on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ground {
    /// The picture has no transparent pixel, so its ground is a part of it.
    Own,
    /// White: the ink is dark.
    White,
    /// Black: the ink is light, or it lies on a dark ground of its own.
    Black,
}

/// Composites grey pixels with alpha, row by row, and returns the grey values and the ground.
///
/// * The ground is white, because most drawings are dark.
/// * It is black if nothing on white would be darker than mid grey: a white drawing would not be
///   visible on white.
/// * It is black, too, if most of the border would be dark on white: the picture has a dark ground
///   of its own, and only its corners are transparent, for example.
///
/// ```
/// use afterimage_core::transparency::{Ground, composite};
///
/// let black_on_transparent = [[0, 0], [0, 255], [0, 0]];
/// assert_eq!(composite(3, &black_on_transparent), (vec![255, 0, 255], Ground::White));
/// ```
#[must_use]
pub fn composite(width: usize, pixels: &[[u8; 2]]) -> (Vec<u8>, Ground) {
    let is_transparent = pixels.iter().any(|[_, alpha]| *alpha < 255);
    let is_visible = pixels.iter().any(|[_, alpha]| *alpha > 0);
    let on_white = on(255, pixels);
    if !is_transparent {
        return (on_white, Ground::Own);
    }
    let is_light = on_white.iter().all(|&grey| grey >= MID_GREY);
    if is_visible && (is_light || has_dark_border(width, &on_white)) {
        return (on(0, pixels), Ground::Black);
    }
    (on_white, Ground::White)
}

/// The pixels on a ground of this grey.
fn on(ground: u8, pixels: &[[u8; 2]]) -> Vec<u8> {
    let mix = |&[grey, alpha]: &[u8; 2]| {
        let (grey, alpha) = (u32::from(grey), u32::from(alpha));
        // At most (255 × 255 + 127) / 255 = 255.
        ((grey * alpha + u32::from(ground) * (255 - alpha) + 127) / 255) as u8
    };
    pixels.iter().map(mix).collect()
}

/// Whether more than half of the border pixels are dark.
fn has_dark_border(width: usize, pixels: &[u8]) -> bool {
    let width = width.max(1);
    let last = pixels.len().saturating_sub(1);
    let (columns, rows) = (width - 1, last / width);
    let (mut border, mut dark) = (0_usize, 0_usize);
    for (at, &grey) in pixels.iter().enumerate() {
        let (x, y) = (at % width, at / width);
        if x == 0 || x == columns || y == 0 || y == rows {
            border += 1;
            dark += usize::from(grey < MID_GREY);
        }
    }
    2 * dark > border
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A card of 8 × 8 pixels: two pixels of ink in its middle, transparent corners.
    fn card(ink: u8, ground: u8) -> Vec<[u8; 2]> {
        let mut pixels = vec![[ground, 255]; 64];
        (pixels[27], pixels[35]) = ([ink, 255], [ink, 255]);
        for corner in [0, 7, 56, 63] {
            pixels[corner] = [0, 0];
        }
        pixels
    }

    #[test]
    fn an_opaque_picture_stays_as_it_is() {
        let pixels = [[9, 255], [200, 255]];
        assert_eq!(composite(2, &pixels), (vec![9, 200], Ground::Own));
        assert_eq!(composite(0, &[]), (vec![], Ground::Own));
    }

    #[test]
    fn dark_ink_lies_on_white_and_light_ink_on_black() {
        assert_eq!(composite(3, &[[0, 0], [0, 255], [0, 0]]).1, Ground::White);
        assert_eq!(composite(3, &[[0, 0], [0, 128], [0, 0]]).0, [255, 127, 255]);
        let light = composite(3, &[[255, 255], [200, 128], [0, 0]]);
        assert_eq!(light, (vec![255, 100, 0], Ground::Black));
        // Nothing visible is a white sheet.
        assert_eq!(composite(2, &[[0, 0], [255, 0]]), (vec![255, 255], Ground::White));
    }

    #[test]
    fn a_ground_of_its_own_decides_over_transparent_corners() {
        let (pixels, ground) = composite(8, &card(255, 0));
        assert_eq!((pixels[0], pixels[1], pixels[27], ground), (0, 0, 255, Ground::Black));
        let (pixels, ground) = composite(8, &card(0, 255));
        assert_eq!((pixels[0], pixels[1], pixels[27], ground), (255, 255, 0, Ground::White));
    }
}
