//! Fuzz targets of every file format that the classifier reads.
//!
//! Each target is a function that takes any bytes and panics if a property does not hold. `fuzz/`
//! runs them under libFuzzer; the tests run them on a stable toolchain, on seeds, regressions and
//! seeded mutations of both. `fuzz/README.md` lists the properties.

use afterimage_classifier::{
    FeatureMap, Isa, LinearSvm, MAX_INPUT_LEN, Metadata, Model, RawPixels, Scratch, Shape,
};
use afterimage_classifier_tools::input::{idx as idx_format, png as png_format, unpack};
use afterimage_classifier_tools::{Dataset, Image, ImportOptions, Imported, Scale};
use ndarray::{Array1, Array2};

use super::Target;
use crate::fuzz::{Seed, Source};

/// Every target of this crate.
pub const TARGETS: &[Target] = &[
    Target {
        name: "image_file",
        body: image_file,
        seeds: image_file_seeds,
        // DEFLATE compresses at most 1032 to 1; then come the samples, the pixels, and a copy of
        // the pixels.
        memory_per_byte: 4 * 1032,
    },
    Target { name: "idx", body: idx, seeds: idx_seeds, memory_per_byte: 64 },
    Target {
        name: "model_file",
        body: model_file,
        seeds: model_file_seeds,
        // A tensor of one column has rows of four bytes in the file and of a whole chunk (64) in
        // the model.
        memory_per_byte: 512,
    },
    Target {
        name: "shipped_model",
        body: shipped_model,
        seeds: shipped_model_seeds,
        // Everything is within the base.
        memory_per_byte: 1,
    },
    Target {
        name: "model_text",
        body: model_text,
        seeds: model_text_seeds,
        // Two bytes of text make an empty support vector, which is 784 numbers as f64 and as f32,
        // and again in the written file and in the model that is read from it.
        memory_per_byte: 32 << 10,
    },
    Target {
        name: "model_onnx",
        body: model_onnx,
        seeds: model_onnx_seeds,
        // Two bytes make an empty node, of which there may be a million. A weight of four bytes is
        // eight in each of eight lanes, and again in the written file and in the model that
        // is read from it.
        memory_per_byte: 2048,
    },
];

/// Bytes that a gzipped file may unpack to here: enough for any of these images, little enough to
/// try often.
const UNPACKED_MAX: u64 = 1 << 18;

/// Any file as an image (PNG, PGM, IDX, also gzipped): it has as many pixels as its shape says, and
/// is the same after it is written plainly and read again.
///
/// Input: the file, gzipped or not.
pub fn image_file(data: &[u8]) {
    let Ok(file) = unpack(data.to_vec(), UNPACKED_MAX, "fuzzed file") else {
        return;
    };
    assert!(file.len() as u64 <= UNPACKED_MAX.max(data.len() as u64));
    let image = match Image::decode(&file) {
        Ok(image) => image,
        Err(error) => return assert!(!error.to_string().is_empty()),
    };
    check_image(&image);
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

fn check_image(image: &Image) {
    assert_eq!(image.pixels().len(), image.shape().len());
    assert!((1..=MAX_INPUT_LEN).contains(&image.shape().len()));
}

/// Any two files as a data set in IDX: as many images as labels, and no byte of the files unused.
///
/// Input: `u16` length of the first file, then two files.
pub fn idx(data: &[u8]) {
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
            check_image(&image);
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

fn image_file_seeds() -> Vec<Seed> {
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

fn idx_seeds() -> Vec<Seed> {
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

/// The largest model that comes with the program, to be damaged.
const SHIPPED: &[u8] = include_bytes!("../../../classifier/models/conv.safetensors");

/// LIBLINEAR's model of one feature.
const WEIGHT: &[u8] = b"solver_type L2R_LR\nnr_class 2\nlabel 1 0\nnr_feature 1\nbias -1\nw\n1 \n";

/// Any file as a model in safetensors. An accepted model answers every image with one of its
/// labels, the same alone and in a batch, on every instruction set, and after a round trip through
/// a file.
///
/// Input: `u8` the form of the file, then its contents.
pub fn model_file(data: &[u8]) {
    let mut source = Source::new(data);
    if source.flag() {
        // A header with its right length before it, so that no fuzzer has to count: `u16` length,
        // header, data.
        let len = source.u16().into();
        let (header, values) = (source.bytes(len), source.rest());
        check_file(&[&(header.len() as u64).to_le_bytes()[..], header, values].concat());
    } else {
        check_file(source.rest());
    }
}

/// The shipped model with some bytes changed: as [`model_file`].
///
/// Input: changes to the shipped model's file, each a `u24` place and a `u8` byte.
pub fn shipped_model(data: &[u8]) {
    let mut file = SHIPPED.to_vec();
    for &[a, b, c, byte] in data.as_chunks().0 {
        let at = u32::from_le_bytes([a, b, c, 0]) as usize % file.len();
        file[at] = byte;
    }
    check_file(&file);
}

/// Any text as a LIBLINEAR or LIBSVM model: as [`model_file`].
///
/// Input: `u8` shape, `u8` divisor, then the text of a model or of a range file.
pub fn model_text(data: &[u8]) {
    let mut source = Source::new(data);
    let dims: &[u32] = match source.u8() % 4 {
        0 => &[28, 28],
        1 => &[1],
        _ => &[2, 2],
    };
    let shape = Shape::new(dims).expect("a shape of the right size");
    // Zero leaves it to the model.
    let divisor = Some(source.u8().into()).filter(|&divisor| divisor > 0.0);
    let options = ImportOptions { shape: Some(shape), divisor, ..ImportOptions::default() };
    let text = String::from_utf8_lossy(source.rest());
    // A model, or a range file that belongs to the simplest one there is.
    match Scale::parse(&text) {
        Ok(scale) => import(WEIGHT, &ImportOptions { scale: Some(scale), ..options }),
        Err(error) => {
            assert!(!error.to_string().contains('\n'), "an error is one line: {error}");
            import(text.as_bytes(), &options);
        }
    }
}

/// Any bytes as an ONNX model: as [`model_file`].
///
/// Input: `u8` divisor, then the file.
pub fn model_onnx(data: &[u8]) {
    let mut source = Source::new(data);
    let divisor = Some(source.u8().into()).filter(|&divisor| divisor > 0.0);
    import(source.rest(), &ImportOptions { divisor, ..ImportOptions::default() });
}

fn import(file: &[u8], options: &ImportOptions) {
    match Imported::from_bytes(file, options) {
        Ok(imported) => {
            if let Some(shape) = options.shape {
                assert_eq!(imported.model.shape(), shape);
            }
            assert!(!imported.to_string().is_empty());
            check_model(&imported.model);
        }
        Err(error) => assert!(!error.to_string().contains('\n'), "an error is one line: {error}"),
    }
}

fn check_file(file: &[u8]) {
    match Model::from_bytes(file) {
        Ok(model) => check_model(&model),
        Err(error) => assert!(!error.to_string().is_empty()),
    }
}

/// The properties of every accepted model.
fn check_model(model: &Model) {
    let (shape, labels) = (model.shape(), model.labels());
    assert!(!model.description().is_empty());

    let bytes = model.to_bytes();
    let again = Model::from_bytes(&bytes).expect("a written model can be read");
    assert_eq!((again.digest(), again.labels()), (model.digest(), labels));
    assert_eq!(again.to_bytes(), bytes, "the same model gives the same bytes");

    let bright = vec![255; shape.len()];
    let slope: Vec<u8> = (0..shape.len()).map(|at| (at * 7) as u8).collect();
    let dark = vec![0; shape.len()];
    let images = [&bright[..], &slope, &dark];
    let mut answers = [0; 3];
    let classified = model.classify_batch(&images, &mut Scratch::default(), &mut answers);
    classified.expect("the images are of the right size");
    for (image, answer) in images.iter().zip(answers) {
        assert!(labels.contains(&answer), "{answer} is none of {labels:?}");
        assert_eq!(model.classify(image).ok(), Some(answer), "alone as in a batch");
    }
    assert!(model.classify(&bright[1..]).is_err(), "an image of another size is refused");

    let bits = |isa| -> Vec<u32> {
        let scores = model.scores_with(isa, &images).expect("the size was right before");
        // One NaN is as good as another.
        scores.iter().map(|s| if s.is_nan() { u32::MAX } else { s.to_bits() }).collect()
    };
    for isa in Isa::available() {
        assert_eq!(bits(isa), bits(Isa::best()), "{} has other scores", isa.name());
    }
}

/// A model of 2 × 2 pixels and three classes.
fn small() -> Model {
    let shape = Shape::new(&[2, 2]).expect("a small shape");
    let weights = Array2::from_shape_fn((3, 4), |(class, at)| class as f32 - at as f32 / 2.0);
    let svm = LinearSvm::new(weights, Array1::zeros(3)).expect("three machines");
    let map = FeatureMap::Raw(RawPixels::new(shape, 255.0).expect("a good divisor"));
    let mut metadata = Metadata::default();
    metadata.command = "none".to_owned();
    (metadata.seed, metadata.c, metadata.test_errors) = (Some(7), Some(0.5), Some((1, 10)));
    Model::new(map, svm, vec![7, 0, 300], metadata).expect("all parts fit")
}

fn model_file_seeds() -> Vec<Seed> {
    let file = small().to_bytes();
    let (len, rest) = file.split_first_chunk().expect("a container begins with a length");
    let header_len = u64::from_le_bytes(*len) as u16;
    let counted = [&[1], &header_len.to_le_bytes()[..], rest].concat();
    let tiny = br#"{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}"#;
    let with_tiny = [&[1, tiny.len() as u8, 0], &tiny[..], &[0; 4]].concat();
    let text = &model_text_seeds().swap_remove(0).1[2..];
    let options = ImportOptions { shape: Shape::new(&[2, 2]).ok(), ..ImportOptions::default() };
    let kernel = Imported::from_bytes(text, &options).expect("a good text").model.to_bytes();
    let kernel = [&[0], &kernel[..]].concat();
    let whole = [&[0], &file[..]].concat();
    [("whole", whole), ("counted", counted), ("tiny", with_tiny), ("kernel", kernel)]
        .map(|(name, input)| (name.to_owned(), input))
        .into()
}

fn shipped_model_seeds() -> Vec<Seed> {
    [
        ("unchanged", vec![]),
        // An infinity and great weights, somewhere among the tensors; a letter of the header.
        ("infinite", vec![0x03, 0x80, 0x04, 0x7f, 0x02, 0x80, 0x04, 0x80]),
        ("great", vec![0x03, 0x80, 0x04, 0x7e, 0x07, 0x80, 0x01, 0x7e]),
        ("header", vec![0x20, 0, 0, b'x']),
    ]
    .map(|(name, input)| (name.to_owned(), input))
    .into()
}

/// Three classes that vote, their vectors bytes over 255; the first of the text seeds.
const RBF: &str = "svm_type c_svc\nkernel_type rbf\ngamma 0.5\nnr_class 3\ntotal_sv 4\nrho 0.1 0 0\n\
                   label 4 9 2\nnr_sv 2 1 1\nSV\n0.5 1 1:0.2 2:1 \n0.25 0 \n-1 0.5 2:0.4 \n\
                   -1 -0.5 1:0.6 \n";

fn model_onnx_seeds() -> Vec<Seed> {
    macro_rules! seeds {
        ($($name:literal)*) => {
            [$(($name, &include_bytes!(concat!("classifier/seeds/", $name, ".onnx"))[..]),)*]
        };
    }
    let files = seeds!("rbf" "poly" "sigmoid" "linear_kernel" "scaled" "one_row" "two_rows");
    files.map(|(name, file)| (name.to_owned(), [&[255], file].concat())).into()
}

fn model_text_seeds() -> Vec<Seed> {
    let liblinear = "solver_type L2R_L2LOSS_SVC_DUAL\nnr_class 3\nlabel 7 0 300\nnr_feature 3\n\
                     bias 2\nw\n1 0 -1 \n0 1 -1 \n0 0 5.5e-1 \n-2 0.25 0 \n";
    let binary = "solver_type L2R_LR\nnr_class 2\nlabel 1 0\nnr_feature 4\nbias -1\nw\n\
                  1 \n-1 \n0 \n0 \n";
    let crammer = "solver_type MCSVM_CS\nnr_class 2\nlabel 1 0\nnr_feature 1\nbias 1e3\nw\n\
                   1 2 \n-1 1e30 \n";
    let libsvm = "svm_type c_svc\nkernel_type linear\nnr_class 2\ntotal_sv 2\nrho -0.5\n\
                  label 4 9\nnr_sv 1 1\nSV\n0.5 1:2 4:1 \n-0.5 2:2 4:1 \n";
    let great = "svm_type nu_svc\nkernel_type linear\nnr_class 2\ntotal_sv 1\nrho 0\n\
                 label 4 9\nnr_sv 1 0\nSV\n1e200 1:1e200 \n";
    let sigmoid = "svm_type c_svc\nkernel_type sigmoid\ngamma 0.5\ncoef0 -1\nnr_class 2\n\
                   total_sv 2\nrho 0\nlabel 0 1\nnr_sv 1 1\nSV\n1 1:0.2 \n-1 1:0.6 \n";
    let mut seeds = Vec::new();
    for (name, text) in [
        ("rbf", RBF),
        ("poly", &RBF.replace("rbf", "polynomial\ndegree 3\ncoef0 1")),
        ("odd", &RBF.replace("0.4 ", "0.4011 ")),
        // The digits that LIBSVM writes.
        ("eight", &RBF.replace("0.4 ", "0.49411765 ")),
        ("sigmoid", sigmoid),
        ("liblinear", liblinear),
        ("binary", binary),
        ("crammer", crammer),
        ("libsvm", libsvm),
        ("great", great),
        ("ranges", "y\n0 1\n3 8\nx\n-1 1\n1 0 255\n3 51 204\n"),
    ] {
        for (size, start) in [("small", [2, 0]), ("digits", [0, 255])] {
            seeds.push((format!("{name}_{size}"), [&start[..], text.as_bytes()].concat()));
        }
    }
    seeds
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_seeds_that_should_be_models_are() {
        for (name, seed) in model_text_seeds() {
            let taken = Imported::from_bytes(&seed[2..], &ImportOptions::default());
            // One has vectors that no `f32` holds, and one is no model.
            let is_model = !name.starts_with("great") && !name.starts_with("ranges");
            assert_eq!(taken.is_ok(), is_model, "{name}");
            let ranges = Scale::parse(str::from_utf8(&seed[2..]).unwrap());
            assert_eq!(ranges.is_ok(), name.starts_with("ranges"), "{name}");
        }
        for (name, seed) in model_onnx_seeds() {
            let taken = Imported::from_bytes(&seed[1..], &ImportOptions::default());
            assert!(taken.is_ok(), "{name}: {taken:?}");
        }
    }
}
