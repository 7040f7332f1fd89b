//! The feature map by itself, and with the matrix product and argmax, alone and in batches: `cargo
//! bench -p afterimage-classifier --bench scoring`. The program `classifier-speed`
//! measures its parts.

use afterimage_classifier::{Features, Model, Scratch};
use divan::Bencher;
use divan::counter::ItemsCount;

fn main() {
    divan::main();
}

#[divan::bench(args = [1, 8, 64])]
fn shipped(bencher: Bencher<'_, '_>, batch: usize) {
    score(bencher, &Model::shipped(), batch);
}

#[divan::bench(args = [1, 8, 64])]
fn raw(bencher: Bencher<'_, '_>, batch: usize) {
    score(bencher, &Model::raw(), batch);
}

/// The shipped model's feature map alone.
#[divan::bench(args = [1, 8, 64])]
fn feature_map(bencher: Bencher<'_, '_>, batch: usize) {
    let model = Model::shipped();
    let pixels = pixels(&model, batch);
    let images: Vec<&[u8]> = pixels.chunks_exact(model.shape().len()).collect();
    let mut features = Features::new(model.features().expect("it looks at features"));
    bencher.counter(ItemsCount::new(batch)).bench_local(|| {
        let last = features.of(&images).last().expect("there is an image");
        last[0]
    });
}

/// Different images, half of their pixels ink: the work does not depend on the pixels.
fn pixels(model: &Model, batch: usize) -> Vec<u8> {
    let pixel = |i: usize| if (i * 31) % 7 < 3 { (i % 256) as u8 } else { 0 };
    (0..batch * model.shape().len()).map(pixel).collect()
}

fn score(bencher: Bencher<'_, '_>, model: &Model, batch: usize) {
    let pixels = pixels(model, batch);
    let images: Vec<&[u8]> = pixels.chunks_exact(model.shape().len()).collect();
    let (mut scratch, mut labels) = (Scratch::default(), vec![0; batch]);
    bencher.counter(ItemsCount::new(batch)).bench_local(|| {
        model.classify_batch(&images, &mut scratch, &mut labels).expect("images of the right size");
        labels[0]
    });
}
