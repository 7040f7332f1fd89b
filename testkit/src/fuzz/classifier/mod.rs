//! Fuzz targets of every file format that the classifier reads: functions that take any bytes and
//! panic when a property does not hold.
//!
//! `fuzz/` runs them under libFuzzer, the tests here run them on a stable toolchain, on seeds,
//! regressions and seeded mutations of both. `fuzz/README.md` lists the properties.

mod images;
mod models;

use super::Target;

/// Every target of this crate.
pub const TARGETS: &[Target] = &[
    Target {
        name: "image_file",
        body: image_file,
        seeds: images::image_file_seeds,
        // DEFLATE packs 1032 to 1; the samples unpacked, and from them the pixels, and the pixels
        // again.
        memory_per_byte: 4 * 1032,
    },
    Target { name: "idx", body: idx, seeds: images::idx_seeds, memory_per_byte: 64 },
    Target {
        name: "model_file",
        body: model_file,
        seeds: models::model_file_seeds,
        // A tensor of one column has rows of four bytes in the file, of a whole chunk (64) in the
        // model.
        memory_per_byte: 512,
    },
    Target {
        name: "shipped_model",
        body: shipped_model,
        seeds: models::shipped_model_seeds,
        // All of it is within the base.
        memory_per_byte: 1,
    },
    Target {
        name: "model_text",
        body: model_text,
        seeds: models::model_text_seeds,
        // Two bytes of text make a support vector of nothing, which is 784 numbers as f64 and as
        // f32, and again in the file that is written and in the model that is read from it.
        memory_per_byte: 32 << 10,
    },
    Target {
        name: "model_onnx",
        body: model_onnx,
        seeds: models::model_onnx_seeds,
        // Two bytes are a node of nothing (of which there may be a million). A weight of four bytes
        // is eight in each of eight lanes, and again in the file that is written and in the
        // model that is read from it.
        memory_per_byte: 2048,
    },
];

/// Any file as an image (PNG, PGM, IDX, plain or gzipped): the number of pixels fits the shape, and
/// the image written as PGM and read again is the same.
pub fn image_file(data: &[u8]) {
    images::image_file(data);
}

/// Any two files as a data set in IDX: as many images as labels, and every byte of the files is used.
pub fn idx(data: &[u8]) {
    images::idx(data);
}

/// Any file as a model in safetensors: an accepted model answers every image with one of its labels,
/// the same alone and in a batch, with every instruction set, and after it is written and read
/// again.
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
