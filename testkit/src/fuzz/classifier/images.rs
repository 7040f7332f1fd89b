//! Images, alone and as data sets.

use crate::fuzz::{Seed, Source};
use afterimage_classifier::{MAX_INPUT_LEN, Shape};
use afterimage_classifier_tools::input::{
    gzip as gzip_format, idx as idx_format, png as png_format,
};
use afterimage_classifier_tools::{Dataset, Image};

/// Bytes that a gzipped file may unpack to here: enough for any of these images, little enough to
/// try often.
const UNPACKED_MAX: u64 = 1 << 18;

/// Input: the file, gzipped or not.
pub(super) fn image_file(data: &[u8]) {
    let Ok(file) = gzip_format::unpack(data.to_vec(), UNPACKED_MAX, "fuzzed file") else {
        return;
    };
    assert!(file.len() as u64 <= UNPACKED_MAX.max(data.len() as u64));
    let image = match Image::decode(&file) {
        Ok(image) => image,
        Err(error) => return assert!(!error.to_string().is_empty()),
    };
    check(&image);
    assert_eq!(Image::decode(&file).ok().as_ref(), Some(&image), "the same file, the same image");
    if !file.starts_with(&png_format::SIGNATURE) {
        // A PNG may have anything behind its end; what the others say of their length is exact.
        let is_text = file.starts_with(b"P2");
        // A text may end in a comment, which goes on to the end of its line.
        let longer = [&file[..], if is_text { &b"\n0"[..] } else { b"x" }].concat();
        assert!(Image::decode(&longer).is_err(), "more than the header says");
        assert!(is_text || Image::decode(&file[..file.len() - 1]).is_err(), "one byte less");
    }
    if let &[rows, columns] = image.shape().dims() {
        // The plainest file of the same image.
        let mut plain = format!("P5 {columns} {rows} 255\n").into_bytes();
        plain.extend_from_slice(image.pixels());
        let plain = Image::decode(&plain).expect("PGM holds any image");
        assert_eq!((plain.shape(), plain.pixels()), (image.shape(), image.pixels()));
    }
}

fn check(image: &Image) {
    assert_eq!(image.pixels().len(), image.shape().len());
    assert!((1..=MAX_INPUT_LEN).contains(&image.shape().len()));
}

/// Input: `u16` length of the first file, then two files.
pub(super) fn idx(data: &[u8]) {
    let mut source = Source::new(data);
    let len = source.u16().into();
    let (images, labels) = (source.bytes(len), source.rest());
    for file in [images, labels] {
        if let Ok(idx) = idx_format::decode(file) {
            // Other factors of nothing may be as large as they like.
            let is_empty = idx.dims.contains(&0);
            let promised =
                idx.dims.iter().try_fold(1, |len: usize, &dim| len.checked_mul(dim as usize));
            let promised = if is_empty { Some(0) } else { promised };
            assert_eq!(Some(idx.values.len()), promised);
            assert_eq!(4 + 4 * idx.dims.len() + idx.values.len(), file.len());
        }
        if let Ok(image) = idx_format::decode_single_image(file) {
            check(&image);
            assert!(file.ends_with(image.pixels()));
        }
    }
    let (Ok((shape, pixels)), Ok(labels)) =
        (idx_format::decode_images(images), idx_format::decode_labels(labels))
    else {
        return;
    };
    let label = |&label: &u8| u16::from(label);
    let fits = pixels.len() == shape.len() * labels.len();
    match Dataset::new(shape, pixels.to_vec(), labels.iter().map(label).collect()) {
        Ok(dataset) => {
            assert!(fits && dataset.len() == labels.len());
            assert!(dataset.images().flatten().eq(pixels));
            for index in 0..dataset.len() {
                assert_eq!(dataset.image(index).len(), shape.len());
            }
            let (first, last) = dataset.split_at(dataset.len() / 2);
            assert_eq!(first.len() + last.len(), dataset.len());
        }
        Err(error) => assert!(!fits, "{error}"),
    }
}

/// A PNG with one row of `data`.
fn png(color: png::ColorType, depth: png::BitDepth, width: u32, data: &[u8]) -> Vec<u8> {
    let mut file = Vec::new();
    let mut encoder = png::Encoder::new(&mut file, width, 1);
    encoder.set_color(color);
    encoder.set_depth(depth);
    if color == png::ColorType::Indexed {
        encoder.set_palette(vec![0, 0, 0, 255, 255, 255, 255, 0, 0]);
        encoder.set_trns(vec![255, 0, 128]);
    }
    let mut writer = encoder.write_header().expect("a small PNG can be encoded");
    writer.write_image_data(data).expect("as many bytes as its header says");
    writer.finish().expect("a PNG ends");
    file
}

fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut file = Vec::new();
    let mut encoder = flate2::read::GzEncoder::new(bytes, flate2::Compression::default());
    std::io::Read::read_to_end(&mut encoder, &mut file).expect("memory can be read");
    file
}

/// An IDX file of bytes; all dimensions are below 256.
fn idx_file(dims: &[u8], values: &[u8]) -> Vec<u8> {
    let mut file = vec![0, 0, 8, dims.len() as u8];
    dims.iter().for_each(|&dim| file.extend_from_slice(&[0, 0, 0, dim]));
    file.extend_from_slice(values);
    file
}

pub(super) fn image_file_seeds() -> Vec<Seed> {
    use png::BitDepth::{Eight, One, Sixteen, Two};
    use png::ColorType::{Grayscale, GrayscaleAlpha, Indexed, Rgb, Rgba};
    let digit: Vec<u8> = (0..784u32).map(|at| (at * at / 97) as u8).collect();
    let mut digit_pgm = b"P5\n# a digit\n28 28\n255\n".to_vec();
    digit_pgm.extend_from_slice(&digit);
    let seeds = [
        ("png_grey", png(Grayscale, Eight, 4, &[1, 2, 3, 4])),
        ("png_bits", png(Grayscale, One, 9, &[0b1010_1010, 0x80])),
        ("png_wide", png(Grayscale, Sixteen, 2, &[1, 2, 3, 4])),
        ("png_alpha", png(GrayscaleAlpha, Eight, 2, &[1, 2, 3, 4])),
        ("png_colour", png(Rgb, Eight, 2, &[1, 2, 3, 4, 5, 6])),
        ("png_colour_alpha", png(Rgba, Sixteen, 1, &[1, 2, 3, 4, 5, 6, 7, 8])),
        ("png_palette", png(Indexed, Two, 3, &[0b0001_1000])),
        ("pgm_binary", b"P5 2 2 255\n1234".to_vec()),
        ("pgm_binary_wide", b"P5 2 1 65535\n1234".to_vec()),
        ("pgm_text", b"P2 2 2 9 # comment\n1 2 3 4\n".to_vec()),
        ("pgm_huge", b"P5 4294967295 4294967295 255\n".to_vec()),
        ("pgm_digit", digit_pgm.clone()),
        ("pgm_gzipped", gzip(&digit_pgm)),
        ("zeros_gzipped", gzip(&[0; 5000])),
        ("idx_image", idx_file(&[28, 28], &digit)),
        ("idx_one_of_one", idx_file(&[1, 2, 2], &[1, 2, 3, 4])),
        ("idx_gzipped", gzip(&idx_file(&[28, 28], &digit))),
    ];
    seeds.map(|(name, file)| (name.to_owned(), file)).into()
}

pub(super) fn idx_seeds() -> Vec<Seed> {
    let dataset = |images: Vec<u8>, labels: Vec<u8>| {
        [&(images.len() as u16).to_le_bytes()[..], &images, &labels].concat()
    };
    let shape = Shape::MNIST.dims();
    let digits = idx_file(&[2, shape[0] as u8, shape[1] as u8], &[9; 2 * 784]);
    let seeds = [
        ("two_small", dataset(idx_file(&[2, 1, 2], &[9, 8, 7, 6]), idx_file(&[2], &[5, 3]))),
        ("two_digits", dataset(digits, idx_file(&[2], &[5, 3]))),
        ("one_label_short", dataset(idx_file(&[2, 2], &[9, 8, 7, 6]), idx_file(&[1], &[5]))),
        ("rank_5", dataset(idx_file(&[1, 1, 1, 1, 1], &[9]), idx_file(&[1], &[5]))),
        ("none", dataset(idx_file(&[0, 3, 3], &[]), idx_file(&[0], &[]))),
    ];
    seeds.map(|(name, input)| (name.to_owned(), input)).into()
}
