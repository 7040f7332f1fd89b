//! Fuzz targets of every file format that the classifier reads.
//!
//! Each target is a function that takes any bytes and panics if a property does not hold. `fuzz/`
//! runs them under libFuzzer; the tests run them on a stable toolchain, on seeds, regressions and
//! seeded mutations of both. `fuzz/README.md` lists the properties.

mod images;
mod models;

use super::Target;

/// Every target of this crate.
pub const TARGETS: &[Target] = &[
    Target {
        name: "image_file",
        body: image_file,
        seeds: images::image_file_seeds,
        // DEFLATE compresses at most 1032 to 1; then come the samples, the pixels, and a copy of
        // the pixels.
        memory_per_byte: 4 * 1032,
    },
    Target { name: "idx", body: idx, seeds: images::idx_seeds, memory_per_byte: 64 },
    Target {
        name: "model_file",
        body: model_file,
        seeds: models::model_file_seeds,
        // A tensor of one column has rows of four bytes in the file and of a whole chunk (64) in
        // the model.
        memory_per_byte: 512,
    },
    Target {
        name: "shipped_model",
        body: shipped_model,
        seeds: models::shipped_model_seeds,
        // Everything is within the base.
        memory_per_byte: 1,
    },
    Target {
        name: "model_text",
        body: model_text,
        seeds: models::model_text_seeds,
        // Two bytes of text make an empty support vector, which is 784 numbers as f64 and as f32,
        // and again in the written file and in the model that is read from it.
        memory_per_byte: 32 << 10,
    },
    Target {
        name: "model_onnx",
        body: model_onnx,
        seeds: models::model_onnx_seeds,
        // Two bytes make an empty node, of which there may be a million. A weight of four bytes is
        // eight in each of eight lanes, and again in the written file and in the model that
        // is read from it.
        memory_per_byte: 2048,
    },
];

/// Any file as an image (PNG, PGM, IDX, also gzipped): it has as many pixels as its shape says, and
/// is the same after it is written plainly and read again.
pub fn image_file(data: &[u8]) {
    images::image_file(data);
}

/// Any two files as a data set in IDX: as many images as labels, and no byte of the files unused.
pub fn idx(data: &[u8]) {
    images::idx(data);
}

/// Any file as a model in safetensors. An accepted model answers every image with one of its
/// labels, the same alone and in a batch, on every instruction set, and after a round trip through
/// a file.
pub fn model_file(data: &[u8]) {
    models::model_file(data);
}

/// The shipped model with some bytes changed: as [`model_file`].
pub fn shipped_model(data: &[u8]) {
    models::shipped_model(data);
}

/// Any text as a LIBLINEAR or LIBSVM model: as [`model_file`].
pub fn model_text(data: &[u8]) {
    models::model_text(data);
}

/// Any bytes as an ONNX model: as [`model_file`].
pub fn model_onnx(data: &[u8]) {
    models::model_onnx(data);
}
