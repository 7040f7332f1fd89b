//! Models, in their own format and in others'.

use ndarray::{Array1, Array2};

use crate::fuzz::{Seed, Source};
use afterimage_classifier::{
    FeatureMap, Isa, LinearSvm, Metadata, Model, RawPixels, Scratch, Shape,
};
use afterimage_classifier_tools::{ImportOptions, Imported, Scale};

/// The largest model that comes with the program, to be damaged.
const SHIPPED: &[u8] = include_bytes!("../../../../classifier/models/conv.safetensors");

/// LIBLINEAR's model of one feature.
const WEIGHT: &[u8] = b"solver_type L2R_LR\nnr_class 2\nlabel 1 0\nnr_feature 1\nbias -1\nw\n1 \n";

/// Input: `u8` how the file is made, then what it is made of.
pub(super) fn model_file(data: &[u8]) {
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

/// Input: changes to the shipped model's file, each a `u24` place and a `u8` byte.
pub(super) fn shipped_model(data: &[u8]) {
    let mut file = SHIPPED.to_vec();
    for &[a, b, c, byte] in data.as_chunks().0 {
        let at = u32::from_le_bytes([a, b, c, 0]) as usize % file.len();
        file[at] = byte;
    }
    check_file(&file);
}

/// Input: `u8` shape, `u8` divisor, then the text of a model or of a range file.
pub(super) fn model_text(data: &[u8]) {
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

/// Input: `u8` divisor, then the file.
pub(super) fn model_onnx(data: &[u8]) {
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
            check(&imported.model);
        }
        Err(error) => assert!(!error.to_string().contains('\n'), "an error is one line: {error}"),
    }
}

fn check_file(file: &[u8]) {
    match Model::from_bytes(file) {
        Ok(model) => check(&model),
        Err(error) => assert!(!error.to_string().is_empty()),
    }
}

/// What holds of every model that was taken.
fn check(model: &Model) {
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

pub(super) fn model_file_seeds() -> Vec<Seed> {
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

pub(super) fn shipped_model_seeds() -> Vec<Seed> {
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

pub(super) fn model_onnx_seeds() -> Vec<Seed> {
    macro_rules! seeds {
        ($($name:literal)*) => {
            [$(($name, &include_bytes!(concat!("seeds/", $name, ".onnx"))[..]),)*]
        };
    }
    let files = seeds!("rbf" "poly" "sigmoid" "linear_kernel" "scaled" "one_row" "two_rows");
    files.map(|(name, file)| (name.to_owned(), [&[255], file].concat())).into()
}

pub(super) fn model_text_seeds() -> Vec<Seed> {
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
