//! Examples as a picture: a PNG contact sheet.
//!
//! The text under each image has its true label, an arrow and the answer (green and red, or both
//! grey if they are equal), then its index in the data set and its margin.

use afterimage_classifier::{DataError, Model, Shape};
use ndarray::ArrayView1;
use png::{BitDepth, ColorType, Encoder};
use rayon::prelude::*;

use super::Evaluation;
use crate::dataset::Dataset;

/// Most examples on a sheet: a picture of 1800 × 12,000 pixels, which every viewer can display.
pub const MAX_SHEET_EXAMPLES: usize = 1000;

/// Columns of a character of the font.
const WIDTH: usize = 5;
/// Rows of a character of the font.
const HEIGHT: usize = 7;
/// Columns from the start of one character to the start of the next.
const ADVANCE: usize = WIDTH + 1;

/// Approximate side of a drawn image: smaller images are enlarged by a whole number, larger ones
/// are averaged down.
const PICTURE: usize = 112;
/// Space around an image.
const MARGIN: usize = 8;
/// Height of the two lines under an image, with the space above each.
const CAPTION: usize = 4 + 2 * HEIGHT + 4 + HEIGHT;
/// Fewest columns of a sheet. With more examples it becomes wider, so that it is about as wide as
/// high.
const LEAST_COLUMNS: usize = 8;

const GROUND: [u8; 3] = [32, 34, 40];
const TRUE: [u8; 3] = [120, 210, 120];
const WRONG: [u8; 3] = [255, 110, 90];
const PLAIN: [u8; 3] = [160, 164, 172];

/// Draws examples of `data`, in their order. Returns the bytes of a PNG file.
///
/// # Errors
/// [`DataError::Mismatch`] when the images are not of rows and columns; [`DataError::OutOfRange`]
/// when there are no examples or more than [`MAX_SHEET_EXAMPLES`].
///
/// # Panics
/// If an example is not from `data`.
pub fn contact_sheet(data: &Dataset, examples: &[Example]) -> Result<Vec<u8>, DataError> {
    if examples.is_empty() || examples.len() > MAX_SHEET_EXAMPLES {
        let count = examples.len();
        return Err(DataError::out_of_range("examples to draw", 1, MAX_SHEET_EXAMPLES, count));
    }
    let scale = Scale::of(data.shape())?;
    let [cell_height, cell_width] = scale.cell();
    let columns = LEAST_COLUMNS.max(examples.len().isqrt()).min(examples.len());
    let rows = examples.len().div_ceil(columns);
    let mut canvas = Canvas::new(rows * cell_height + MARGIN, columns * cell_width + MARGIN);
    for (i, example) in examples.iter().enumerate() {
        let y = MARGIN + i / columns * cell_height;
        let x = MARGIN + i % columns * cell_width;
        canvas.picture(&scale, data.image(example.index), y, x);
        canvas.caption(&scale, example, y + scale.height(), x);
    }
    Ok(canvas.encode())
}

/// The scale that brings images to about [`PICTURE`] pixels.
struct Scale {
    rows: usize,
    columns: usize,
    /// Pixels of the sheet for each pixel of the image.
    enlarge: usize,
    /// Pixels of the image, in either direction, for each pixel of the sheet.
    reduce: usize,
}

impl Scale {
    fn of(shape: Shape) -> Result<Self, DataError> {
        let (rows, columns) = match *shape.dims() {
            [rows, columns] | [rows, columns, 1] | [1, rows, columns] => (rows, columns),
            // A flat image is usually a flattened square one.
            [len] if len.isqrt().pow(2) == len => (len.isqrt(), len.isqrt()),
            _ => {
                return Err(DataError::Mismatch {
                    what: "shape of the images to draw",
                    expected: "rows x columns".to_owned(),
                    found: shape.to_string(),
                });
            }
        };
        let (rows, columns) = (rows as usize, columns as usize);
        let longest = rows.max(columns);
        let (enlarge, reduce) = ((PICTURE / longest).max(1), longest.div_ceil(PICTURE));
        Ok(Self { rows, columns, enlarge, reduce })
    }

    /// Rows of an image on the sheet.
    fn height(&self) -> usize {
        self.rows.div_ceil(self.reduce) * self.enlarge
    }

    /// Columns of an image on the sheet.
    fn width(&self) -> usize {
        self.columns.div_ceil(self.reduce) * self.enlarge
    }

    /// Rows and columns of an image with its caption and the space around them.
    fn cell(&self) -> [usize; 2] {
        [self.height() + CAPTION + MARGIN, self.width().max(PICTURE) + MARGIN]
    }

    /// The grey value of one pixel of the sheet: the mean of its pixels of the image.
    fn grey(&self, image: &[u8], y: usize, x: usize) -> u8 {
        let range = |at: usize, len: usize| {
            let from = at / self.enlarge * self.reduce;
            from..(from + self.reduce).min(len)
        };
        let (rows, columns) = (range(y, self.rows), range(x, self.columns));
        let count = rows.len() * columns.len();
        let row = |y: usize| &image[y * self.columns..][columns.clone()];
        let sum: usize = rows.flat_map(row).map(|&pixel| usize::from(pixel)).sum();
        (sum / count) as u8
    }
}

/// Pixels, three bytes each.
struct Canvas {
    height: usize,
    width: usize,
    pixels: Vec<[u8; 3]>,
}

impl Canvas {
    fn new(height: usize, width: usize) -> Self {
        Self { height, width, pixels: vec![GROUND; height * width] }
    }

    fn picture(&mut self, scale: &Scale, image: &[u8], top: usize, left: usize) {
        for y in 0..scale.height() {
            for x in 0..scale.width() {
                self.pixels[(top + y) * self.width + left + x] = [scale.grey(image, y, x); 3];
            }
        }
    }

    fn caption(&mut self, scale: &Scale, example: &Example, top: usize, left: usize) {
        let Example { index, label, answer, margin } = *example;
        let (label, answer) = (label.to_string(), answer.to_string());
        let colours = if label == answer { [PLAIN; 3] } else { [TRUE, PLAIN, WRONG] };
        let room = scale.cell()[1] - MARGIN;
        let characters = label.len() + 1 + answer.len();
        let size = if characters * 2 * ADVANCE <= room { 2 } else { 1 };
        let top = top + 4;
        let mut x = left;
        for (text, colour) in [(&*label, 0), (">", 1), (&*answer, 2)] {
            x = self.text(text, colours[colour], size, [top, x]);
        }
        let top = top + 2 * HEIGHT + 4;
        self.text(&format!("#{index}"), PLAIN, 1, [top, left]);
        // It is infinite if the model does not have the label.
        let margin = format!("{margin:+.3}");
        let start = left + room.saturating_sub(margin.len() * ADVANCE - (ADVANCE - WIDTH));
        self.text(&margin, PLAIN, 1, [top, start]);
    }

    /// Writes a text, cut at the border, and returns the column after it.
    fn text(&mut self, text: &str, colour: [u8; 3], size: usize, [top, left]: [usize; 2]) -> usize {
        for (i, character) in text.bytes().enumerate() {
            let left = left + i * ADVANCE * size;
            for (row, bits) in glyph(character).into_iter().enumerate() {
                for column in (0..WIDTH).filter(|column| bits >> (WIDTH - 1 - column) & 1 == 1) {
                    for (dy, dx) in (0..size * size).map(|i| (i / size, i % size)) {
                        self.dot(top + row * size + dy, left + column * size + dx, colour);
                    }
                }
            }
        }
        left + text.len() * ADVANCE * size
    }

    fn dot(&mut self, y: usize, x: usize, colour: [u8; 3]) {
        if y < self.height && x < self.width {
            self.pixels[y * self.width + x] = colour;
        }
    }

    fn encode(&self) -> Vec<u8> {
        let mut file = Vec::new();
        // There are at most 1000 cells of a few hundred pixels in either direction.
        let mut encoder = Encoder::new(&mut file, self.width as u32, self.height as u32);
        encoder.set_color(ColorType::Rgb);
        encoder.set_depth(BitDepth::Eight);
        let write = |encoder: Encoder<'_, &mut Vec<u8>>| {
            let mut writer = encoder.write_header()?;
            writer.write_image_data(self.pixels.as_flattened())?;
            writer.finish()
        };
        write(encoder).expect("a picture of the declared size goes into memory");
        file
    }
}

/// The rows of a character, with the leftmost pixel in bit 4. `>` is an arrow. Characters that no
/// caption has are blank.
fn glyph(character: u8) -> [u8; HEIGHT] {
    match character {
        b'0' => [0b01110, 0b10001, 0b10001, 0b10001, 0b10001, 0b10001, 0b01110],
        b'1' => [0b00100, 0b01100, 0b00100, 0b00100, 0b00100, 0b00100, 0b01110],
        b'2' => [0b01110, 0b10001, 0b00001, 0b00010, 0b00100, 0b01000, 0b11111],
        b'3' => [0b11111, 0b00010, 0b00100, 0b00010, 0b00001, 0b10001, 0b01110],
        b'4' => [0b00010, 0b00110, 0b01010, 0b10010, 0b11111, 0b00010, 0b00010],
        b'5' => [0b11111, 0b10000, 0b11110, 0b00001, 0b00001, 0b10001, 0b01110],
        b'6' => [0b00110, 0b01000, 0b10000, 0b11110, 0b10001, 0b10001, 0b01110],
        b'7' => [0b11111, 0b00001, 0b00010, 0b00100, 0b01000, 0b01000, 0b01000],
        b'8' => [0b01110, 0b10001, 0b10001, 0b01110, 0b10001, 0b10001, 0b01110],
        b'9' => [0b01110, 0b10001, 0b10001, 0b01111, 0b00001, 0b00010, 0b01100],
        b'#' => [0b01010, 0b01010, 0b11111, 0b01010, 0b11111, 0b01010, 0b01010],
        b'+' => [0b00000, 0b00100, 0b00100, 0b11111, 0b00100, 0b00100, 0b00000],
        b'-' => [0b00000, 0b00000, 0b00000, 0b11111, 0b00000, 0b00000, 0b00000],
        b'.' => [0b00000, 0b00000, 0b00000, 0b00000, 0b00000, 0b01100, 0b01100],
        b'i' => [0b00100, 0b00000, 0b01100, 0b00100, 0b00100, 0b00100, 0b01110],
        b'n' => [0b00000, 0b00000, 0b10110, 0b11001, 0b10001, 0b10001, 0b10001],
        b'f' => [0b00110, 0b01001, 0b01000, 0b11100, 0b01000, 0b01000, 0b01000],
        b'a' => [0b00000, 0b00000, 0b01110, 0b00001, 0b01111, 0b10001, 0b01111],
        b'N' => [0b10001, 0b11001, 0b10101, 0b10011, 0b10001, 0b10001, 0b10001],
        b'>' => [0b00000, 0b00100, 0b00010, 0b11111, 0b00010, 0b00100, 0b00000],
        _ => [0; HEIGHT],
    }
}

/// Images of a task.
const TASK: usize = 64;

/// One image and the model's answer to it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Example {
    /// Its index in the data set, from 0.
    pub index: usize,
    /// Its label.
    pub label: u16,
    /// The model's answer.
    pub answer: u16,
    /// The score of its label minus the highest of the other scores, so it is negative for a wrong
    /// answer. Minus infinity if the model does not have the label.
    pub margin: f32,
}

impl Evaluation {
    /// The `count` worst images of `data`, the worst first: wrong answers before right ones, then
    /// smaller margins before larger ones. `model` and `data` are those of the evaluation.
    ///
    /// # Errors
    /// [`DataError::Mismatch`] if the images do not have the model's shape.
    ///
    /// # Panics
    /// If `data` has more images than were evaluated.
    pub fn worst(
        &self,
        model: &Model,
        data: &Dataset,
        count: usize,
    ) -> Result<Vec<Example>, DataError> {
        let images: Vec<&[u8]> = data.images().collect();
        let margins: Vec<Vec<f32>> = images
            .par_chunks(TASK)
            .zip(data.labels().par_chunks(TASK))
            .map(|(images, labels)| {
                let scores = model.scores(images)?;
                let margin = |(scores, label)| margin(model.labels(), scores, label);
                Ok(scores.outer_iter().zip(labels).map(margin).collect())
            })
            .collect::<Result<_, DataError>>()?;
        let example = |(index, margin)| {
            let (label, answer) = (data.labels()[index], self.answers[index]);
            Example { index, label, answer, margin }
        };
        let mut examples: Vec<Example> =
            margins.into_iter().flatten().enumerate().map(example).collect();
        examples.sort_by(|a, b| {
            let right = |example: &Example| example.label == example.answer;
            right(a).cmp(&right(b)).then(a.margin.total_cmp(&b.margin))
        });
        examples.truncate(count);
        Ok(examples)
    }
}

fn margin(labels: &[u16], scores: ArrayView1<'_, f32>, label: &u16) -> f32 {
    let best = |of_label: bool| {
        let scores = labels.iter().zip(scores);
        let scores = scores.filter(|(l, _)| (*l == label) == of_label).map(|(_, &score)| score);
        scores.fold(f32::NEG_INFINITY, f32::max)
    };
    let own = best(true);
    // Without another score to compare with, an unknown label is still the worst case.
    if own == f32::NEG_INFINITY { own } else { own - best(false) }
}

#[cfg(test)]
mod tests {
    use afterimage_classifier::{FeatureMap, LinearSvm, Metadata, RawPixels, Shape};
    use ndarray::{Array1, array};

    use super::*;
    use crate::image::Image;

    fn decode(file: &[u8]) -> (usize, usize, Vec<[u8; 3]>) {
        let mut reader = png::Decoder::new(std::io::Cursor::new(file)).read_info().unwrap();
        let mut pixels = vec![0; reader.output_buffer_size().unwrap()];
        let frame = reader.next_frame(&mut pixels).unwrap();
        assert_eq!(frame.color_type, ColorType::Rgb);
        let pixels = pixels.as_chunks().0.to_vec();
        (frame.height as usize, frame.width as usize, pixels)
    }

    fn example(index: usize, label: u16, answer: u16) -> Example {
        Example { index, label, answer, margin: -0.25 }
    }

    #[test]
    fn images_are_enlarged_in_order_with_a_caption_under_each() {
        let shape = Shape::new(&[28, 28]).unwrap();
        let mut images = vec![0; 3 * 784];
        images[784] = 255; // the upper left corner of the second
        images[2 * 784 + 783] = 128; // the lower right corner of the third
        let data = Dataset::new(shape, images, vec![3, 4, 5]).unwrap();
        let sheet = contact_sheet(&data, &[example(2, 5, 5), example(1, 4, 9)]).unwrap();
        let (height, width, pixels) = decode(&sheet);
        let (cell_height, cell_width) = (112 + CAPTION + MARGIN, 112 + MARGIN);
        assert_eq!((height, width), (cell_height + MARGIN, 2 * cell_width + MARGIN));
        let at = |y: usize, x: usize| pixels[y * width + x];
        // Each pixel has become four by four.
        assert_eq!(at(MARGIN + 108, MARGIN + 108), [128; 3]);
        assert_eq!(at(MARGIN + 107, MARGIN + 108), [0; 3]);
        assert_eq!(at(MARGIN + 3, MARGIN + cell_width + 3), [255; 3]);
        assert_eq!(at(MARGIN + 4, MARGIN + cell_width + 3), [0; 3]);
        assert_eq!(at(MARGIN - 1, MARGIN), GROUND);
        // Only the wrong answer is in colours, and only under its own image.
        let has = |colour: [u8; 3], columns: std::ops::Range<usize>| {
            (MARGIN + 112..height).any(|y| columns.clone().any(|x| at(y, x) == colour))
        };
        let (first, second) = (0..MARGIN + cell_width, MARGIN + cell_width..width);
        assert!(has(PLAIN, first.clone()) && !has(TRUE, first.clone()) && !has(WRONG, first));
        assert!(has(PLAIN, second.clone()) && has(TRUE, second.clone()) && has(WRONG, second));
    }

    #[test]
    fn a_caption_shows_the_labels_as_the_font_has_them() {
        let shape = Shape::new(&[1, 1]).unwrap();
        let data = Dataset::new(shape, vec![0], vec![4]).unwrap();
        let (_, width, pixels) = decode(&contact_sheet(&data, &[example(0, 4, 9)]).unwrap());
        let top = MARGIN + PICTURE + 4;
        for (place, character, colour) in [(0, b'4', TRUE), (1, b'>', PLAIN), (2, b'9', WRONG)] {
            let left = MARGIN + place * 2 * ADVANCE;
            for (row, bits) in glyph(character).into_iter().enumerate() {
                for column in 0..WIDTH {
                    let set = bits >> (WIDTH - 1 - column) & 1 == 1;
                    let pixel = pixels[(top + 2 * row) * width + left + 2 * column];
                    assert_eq!(pixel, if set { colour } else { GROUND });
                }
            }
        }
    }

    /// A margin below all numbers, that of a label which the model does not know, was a minus and
    /// nothing.
    #[test]
    fn every_character_of_every_caption_is_in_the_font() {
        for margin in [-12.345, 6_789.0, f32::NEG_INFINITY, f32::INFINITY, f32::NAN] {
            let text = format!("#{}>{margin:+.3}", 1_234_567_890);
            for character in text.bytes() {
                assert_ne!(glyph(character), glyph(b' '), "{:?} of {text}", character as char);
            }
        }
    }

    #[test]
    fn draws_any_shape_and_any_number_of_examples() {
        for (dims, width) in [
            (&[2, 3][..], 120 + MARGIN),
            (&[784], 120 + MARGIN),
            (&[1, 30, 20], 120 + MARGIN),
            (&[1000, 9], 120 + MARGIN),
            (&[2, 2048], 120 + MARGIN),
        ] {
            let shape = Shape::new(dims).unwrap();
            let data = Dataset::new(shape, vec![100; shape.len()], vec![65_535]).unwrap();
            let sheet = contact_sheet(&data, &[example(0, 65_535, 65_534)]).unwrap();
            let (height, found, pixels) = decode(&sheet);
            assert_eq!(found, width, "{shape}");
            assert!(height < 200);
            assert_eq!(pixels[MARGIN * width + MARGIN], [100; 3], "{shape}");
            assert_eq!(
                Image::decode(&sheet).unwrap().shape().dims(),
                [height as u32, width as u32]
            );
        }
        let data = Dataset::new(Shape::MNIST, vec![0; 784], vec![1]).unwrap();
        let (height, width, _) =
            decode(&contact_sheet(&data, &vec![example(0, 1, 2); 300]).unwrap());
        assert!(height > 1000 && width > 1000, "{height} × {width}");
    }

    #[test]
    fn what_cannot_be_drawn_is_refused() {
        let shape = Shape::new(&[3, 2, 2]).unwrap();
        let data = Dataset::new(shape, vec![0; 12], vec![1]).unwrap();
        let error = contact_sheet(&data, &[example(0, 1, 2)]).unwrap_err().to_string();
        assert_eq!(error, "shape of the images to draw: expected rows x columns, found 3x2x2");
        let data = Dataset::new(Shape::MNIST, vec![0; 784], vec![1]).unwrap();
        assert!(contact_sheet(&data, &[]).is_err());
        assert!(contact_sheet(&data, &vec![example(0, 1, 2); 1001]).is_err());
    }

    #[test]
    fn errors_come_first_and_the_smaller_margin_before_the_greater() {
        // The scores are the two pixels.
        let shape = Shape::new(&[2]).unwrap();
        let map = FeatureMap::Raw(RawPixels::new(shape, 1.0).unwrap());
        let svm = LinearSvm::new(array![[1.0, 0.0], [0.0, 1.0]], Array1::zeros(2)).unwrap();
        let model = Model::new(map, svm, vec![7, 9], Metadata::default()).unwrap();
        let images = vec![5, 1, 9, 2, 3, 3, 8, 1, 2, 4];
        // The third is a tie, which the first label wins; the model does not have the label 8.
        let data = Dataset::new(shape, images, vec![7, 9, 9, 8, 9]).unwrap();
        let evaluation = Evaluation::of(&model, &data).unwrap();
        let worst = evaluation.worst(&model, &data, 10).unwrap();
        let example = |(index, label, answer, margin)| Example { index, label, answer, margin };
        let expected = [
            (3, 8, 7, f32::NEG_INFINITY),
            (1, 9, 7, -7.0),
            (2, 9, 7, 0.0),
            (4, 9, 9, 2.0),
            (0, 7, 7, 4.0),
        ];
        assert_eq!(worst, expected.map(example));
        assert_eq!(evaluation.worst(&model, &data, 2).unwrap(), worst[..2]);
    }

    #[test]
    fn a_model_of_many_images_is_ranked_on_all_of_them() {
        let model = Model::raw();
        let images: Vec<u8> = (0..200 * 784).map(|i| (i * 31 % 255) as u8).collect();
        let labels = (0..200).map(|i| i % 10).collect();
        let data = Dataset::new(Shape::MNIST, images, labels).unwrap();
        let evaluation = Evaluation::of(&model, &data).unwrap();
        let worst = evaluation.worst(&model, &data, 200).unwrap();
        let wrong = worst.iter().filter(|example| example.label != example.answer).count();
        assert_eq!((worst.len(), wrong), (200, evaluation.wrong()));
        assert!(worst[..wrong].iter().all(|example| example.margin <= 0.0));
        assert!(worst[wrong..].iter().all(|example| example.margin >= 0.0));
    }
}
