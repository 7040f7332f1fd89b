//! Feature map, matrix product and argmax, alone and in batches: `cargo bench -p afterimage-classifier --bench
//! scoring`. The raw model has no feature map to speak of, so the difference is the map's; the example `speed`
//! takes it apart further.

use afterimage_classifier::{Model, Scratch};
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

fn score(bencher: Bencher<'_, '_>, model: &Model, batch: usize) {
    // Different images, half of their pixels ink: the work does not depend on what they show.
    let pixel = |i: usize| if (i * 31) % 7 < 3 { (i % 256) as u8 } else { 0 };
    let pixels: Vec<u8> = (0..batch * model.shape().len()).map(pixel).collect();
    let images: Vec<&[u8]> = pixels.chunks_exact(model.shape().len()).collect();
    let (mut scratch, mut labels) = (Scratch::default(), vec![0; batch]);
    bencher.counter(ItemsCount::new(batch)).bench_local(|| {
        model.classify_batch(&images, &mut scratch, &mut labels).expect("images of the right size");
        labels[0]
    });
}
