//! Kernel models beside LIBSVM's operations written out plainly, most of all where a label depends
//! on the last bit.

#![allow(clippy::unwrap_used, reason = "a failed step fails the test")]

use afterimage_classifier::pairwise::{
    Pairwise, PairwiseScratch, Parts, VectorValues, whole_degree,
};
use afterimage_classifier::pixels::Pixels;
use afterimage_classifier::tensors::Tensors;
use afterimage_classifier::{Isa, KernelFunction};

/// The number of pairs of classes.
fn pairs(classes: usize) -> usize {
    classes * (classes - 1) / 2
}

struct Noise(u32);

impl Noise {
    fn next(&mut self) -> u32 {
        self.0 = self.0.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        self.0 >> 8
    }
    fn below(&mut self, bound: u32) -> u32 {
        self.next() % bound
    }
    fn real(&mut self) -> f64 {
        f64::from(self.next()) / f64::from(1 << 23) - 1.0
    }
    fn image(&mut self, dims: usize) -> Vec<u8> {
        let dark = self.below(4);
        (0..dims).map(|_| if self.below(4) < dark { 0 } else { self.next() as u8 }).collect()
    }
}

fn tables() -> [Pixels; 3] {
    let six = |byte: usize| (byte as f64 / 255.0 * 1e6).round() / 1e6;
    [
        Pixels::divided(255.0, false).unwrap(),
        Pixels::divided(1.0, false).unwrap(),
        Pixels::Table(Box::new(std::array::from_fn(six))),
    ]
}

fn functions(pixels: &Pixels) -> [KernelFunction; 4] {
    let unit = 255.0 / pixels.range(0).1;
    let (gamma, coef0) = (1e-6 * unit * unit, -0.25);
    [
        KernelFunction::Linear,
        KernelFunction::Polynomial { gamma, coef0, degree: 3 },
        KernelFunction::Rbf { gamma },
        KernelFunction::Sigmoid { gamma, coef0 },
    ]
}

/// Models of all kernels and all kinds of vectors. In some, the signs of coefficients are mixed.
fn models(noise: &mut Noise) -> Vec<Parts> {
    let mut all = Vec::new();
    for pixels in tables() {
        for function in functions(&pixels) {
            for kind in 0..4 {
                let classes = 2 + noise.below(3) as usize;
                let counts: Vec<u32> = (0..classes).map(|_| 1 + noise.below(20)).collect();
                let (dims, count) = (1 + noise.below(60) as usize, counts.iter().sum::<u32>());
                let bytes = noise.image(dims * count as usize);
                let places = bytes.iter().enumerate();
                let features = places.map(|(at, &byte)| pixels.value(at % dims, byte));
                let vectors = match kind {
                    0 => VectorValues::U8(bytes, None),
                    // Eight digits, as LIBSVM writes them.
                    1 => {
                        let eight = |byte: usize| format!("{:.7e}", pixels.value(0, byte as u8));
                        let table = std::array::from_fn(|byte| eight(byte).parse().unwrap());
                        VectorValues::U8(bytes, Some(Box::new(table)))
                    }
                    2 => VectorValues::F32(features.map(|value| (value * 0.99) as f32).collect()),
                    _ => VectorValues::F64(features.map(|value| value * 0.99).collect()),
                };
                let mixed = noise.below(2) == 0;
                let coefficient = |at: usize| {
                    let value = noise.real();
                    // Positive against the classes behind, as LIBSVM has it.
                    let (row, column) = (at / count as usize, at as u32 % count);
                    let class = (0..classes).find(|&c| column < counts[..=c].iter().sum());
                    let ahead = row >= class.unwrap();
                    if mixed { value } else { value.abs() * if ahead { 1.0 } else { -1.0 } }
                };
                let coefficients = (0..count as usize * (classes - 1)).map(coefficient).collect();
                let rho = (0..pairs(classes)).map(|_| noise.real() * 0.01).collect();
                let pixels = pixels.clone();
                all.push(Parts { pixels, function, dims, vectors, counts, coefficients, rho });
            }
        }
    }
    all
}

/// A linear kernel on features whose products are below the normal numbers of `f32`.
fn tiny(noise: &mut Noise) -> Parts {
    let (dims, count) = (40, 6);
    let vectors = noise.image(dims * count).into_iter().map(|byte| f32::from(byte) * 0.99e-23);
    Parts {
        pixels: Pixels::lines(vec![1e-23; dims], vec![0.0; dims]).unwrap(),
        function: KernelFunction::Linear,
        dims,
        vectors: VectorValues::F32(vectors.collect()),
        counts: vec![3, 3],
        coefficients: (0..count).map(|_| noise.real()).collect(),
        rho: vec![0.0],
    }
}

/// LIBSVM's `svm_predict_values`: the sum of each pair, before rho is subtracted; and the sum of
/// the coefficients' magnitudes.
fn sums(parts: &Parts, image: &[u8]) -> Vec<(f64, f64)> {
    let Parts { pixels, function, dims, vectors, counts, coefficients, .. } = parts;
    let feature = |at: usize| match vectors {
        VectorValues::U8(values, None) => pixels.value(at % dims, values[at]),
        VectorValues::U8(values, Some(table)) => table[usize::from(values[at])],
        VectorValues::F32(values) => f64::from(values[at]),
        VectorValues::F64(values) => values[at],
    };
    let count = counts.iter().sum::<u32>() as usize;
    let value = |vector: usize| {
        let mut sum = 0.0;
        for (at, &byte) in image.iter().enumerate() {
            let (x, s) = (pixels.value(at, byte), feature(vector * dims + at));
            match function {
                KernelFunction::Rbf { .. } => {
                    let difference = x - s;
                    sum += difference * difference;
                }
                _ => sum += x * s,
            }
        }
        function.exact(sum)
    };
    let values: Vec<f64> = (0..count).map(value).collect();
    let start = |class: usize| counts[..class].iter().sum::<u32>() as usize;
    let mut all = Vec::new();
    for first in 0..counts.len() {
        for second in first + 1..counts.len() {
            let (mut sum, mut weights) = (0.0, 0.0);
            for k in start(first)..start(first + 1) {
                sum += coefficients[(second - 1) * count + k] * values[k];
                weights += coefficients[(second - 1) * count + k].abs();
            }
            for k in start(second)..start(second + 1) {
                sum += coefficients[first * count + k] * values[k];
                weights += coefficients[first * count + k].abs();
            }
            all.push((sum, weights));
        }
    }
    all
}

fn reference(parts: &Parts, image: &[u8]) -> (usize, Vec<f32>) {
    let classes = parts.counts.len();
    let mut votes = vec![0.0; classes];
    let mut sums = sums(parts, image).into_iter().zip(&parts.rho);
    for first in 0..classes {
        for second in first + 1..classes {
            let ((sum, _), rho) = sums.next().unwrap();
            votes[if sum - rho > 0.0 { first } else { second }] += 1.0;
        }
    }
    let mut winner = 0;
    for class in 1..classes {
        if votes[class] > votes[winner] {
            winner = class;
        }
    }
    (winner, votes)
}

fn answer(model: &Pairwise, isa: Isa, images: &[&[u8]]) -> (Vec<usize>, Vec<f32>) {
    let mut scratch = PairwiseScratch::default();
    let (mut classes, mut votes) = (vec![usize::MAX; images.len()], Vec::new());
    model.classify(isa, images, &mut scratch, |place, class| classes[place] = class);
    model.votes(isa, images, &mut scratch, &mut votes);
    (classes, votes)
}

#[test]
fn answers_equal_those_of_libsvm_with_every_isa() {
    let mut noise = Noise(1);
    for parts in models(&mut noise) {
        let model = Pairwise::new(parts.clone()).unwrap();
        let images: Vec<Vec<u8>> = (0..37).map(|_| noise.image(parts.dims)).collect();
        let images: Vec<&[u8]> = images.iter().map(Vec::as_slice).collect();
        let expected: Vec<_> = images.iter().map(|image| reference(&parts, image)).collect();
        for isa in Isa::available() {
            let (classes, votes) = answer(&model, isa, &images);
            for (i, (class, of)) in expected.iter().enumerate() {
                let of_image = &votes[i * of.len()..(i + 1) * of.len()];
                assert_eq!(
                    (classes[i], of_image),
                    (*class, &of[..]),
                    "{isa:?}, {:?}",
                    parts.function
                );
            }
            let alone = answer(&model, isa, &images[5..6]);
            assert_eq!(alone.0[0], classes[5]);
        }
    }
}

/// Decision values of zero and of the next numbers above and below it.
#[test]
fn a_label_that_hangs_on_the_last_bit_is_libsvms() {
    let mut noise = Noise(2);
    let mut open = 0;
    for mut parts in models(&mut noise) {
        let image = noise.image(parts.dims);
        let sums = sums(&parts, &image);
        for turn in 0..6 {
            parts.rho = sums
                .iter()
                .map(|&(sum, _)| match (turn + noise.below(2)) % 3 {
                    0 => sum,
                    1 => sum.next_up(),
                    _ => sum.next_down(),
                })
                .collect();
            let model = Pairwise::new(parts.clone()).unwrap();
            let expected = reference(&parts, &image);
            for isa in Isa::available() {
                let (classes, votes) = answer(&model, isa, &[&image]);
                assert_eq!((classes[0], votes), expected, "{isa:?}, {:?}", parts.function);
            }
            let in_doubt = |&&(value, bound): &&(f64, f64)| value.abs() <= bound;
            open += model.decisions(&image).iter().filter(in_doubt).count();
        }
    }
    assert!(open > 300, "only {open} votes were in doubt");
}

/// The bound holds, and it is not so wide that all votes are in doubt.
#[test]
fn no_value_is_farther_from_libsvms_than_its_bound() {
    let mut noise = Noise(3);
    let mut all = models(&mut noise);
    all.extend((0..20).map(|_| tiny(&mut noise)));
    for parts in all {
        let model = Pairwise::new(parts.clone()).unwrap();
        for _ in 0..20 {
            let image = noise.image(parts.dims);
            let exact = sums(&parts, &image).into_iter().zip(&parts.rho);
            for ((value, bound), ((sum, weights), rho)) in model.decisions(&image).iter().zip(exact)
            {
                let off = (value - (sum - rho)).abs();
                assert!(off <= *bound, "{:?}: {off} > {bound}", parts.function);
                let scale = match parts.function {
                    KernelFunction::Linear | KernelFunction::Polynomial { .. } => f64::INFINITY,
                    _ => 0.01 * weights,
                };
                assert!(*bound <= scale, "{:?}: {bound} of {weights}", parts.function);
            }
        }
    }
}

#[test]
fn many_classes_and_more_vectors_than_a_tile_are_libsvms_too() {
    let mut noise = Noise(4);
    let (classes, dims) = (40, 9);
    let counts: Vec<u32> = (0..classes).map(|class| class % 17).collect();
    let count = counts.iter().sum::<u32>() as usize;
    assert!(count > 256 && !count.is_multiple_of(16));
    let parts = Parts {
        pixels: Pixels::divided(255.0, false).unwrap(),
        function: KernelFunction::Rbf { gamma: 0.5 },
        dims,
        vectors: VectorValues::U8(noise.image(dims * count), None),
        coefficients: (0..count * 39).map(|_| noise.real()).collect(),
        rho: (0..pairs(40)).map(|_| noise.real()).collect(),
        counts,
    };
    let model = Pairwise::new(parts.clone()).unwrap();
    let images: Vec<Vec<u8>> = (0..70).map(|_| noise.image(dims)).collect();
    let images: Vec<&[u8]> = images.iter().map(Vec::as_slice).collect();
    for isa in Isa::available() {
        let (classes, _) = answer(&model, isa, &images);
        for (image, class) in images.iter().zip(classes) {
            assert_eq!(class, reference(&parts, image).0, "{isa:?}");
        }
    }
}

/// All coefficients are zero, so every vote is in doubt and takes LIBSVM's own operations. At zero
/// they vote for the second class of a pair.
#[test]
fn a_model_whose_votes_are_all_in_doubt_is_libsvms_too() {
    let mut noise = Noise(7);
    let (classes, dims) = (400, 3);
    let mut parts = Parts {
        pixels: Pixels::divided(1.0, false).unwrap(),
        function: KernelFunction::Linear,
        dims,
        vectors: VectorValues::U8(noise.image(dims * classes), None),
        counts: vec![1; classes],
        coefficients: vec![0.0; classes * (classes - 1)],
        rho: vec![0.0; pairs(classes)],
    };
    let image = noise.image(dims);
    let model = Pairwise::new(parts.clone()).unwrap();
    assert_eq!(answer(&model, Isa::best(), &[&image]).0, [classes - 1]);
    // The least possible vote for the first class, in some of the pairs.
    for rho in &mut parts.rho {
        *rho = if noise.below(2) == 0 { 0.0 } else { -f64::MIN_POSITIVE };
    }
    let model = Pairwise::new(parts.clone()).unwrap();
    let (class, votes) = reference(&parts, &image);
    assert_eq!(answer(&model, Isa::best(), &[&image]), (vec![class], votes));
}

#[test]
fn parts_that_do_not_fit_or_are_too_great_make_no_model() {
    let mut noise = Noise(5);
    let good = models(&mut noise).swap_remove(8 + 3);
    assert!(
        matches!(good.vectors, VectorValues::F64(_))
            && matches!(good.function, KernelFunction::Rbf { .. })
    );
    assert!(Pairwise::new(good.clone()).is_ok());
    type Change = fn(&mut Parts);
    let changes: [(Change, &str); 10] = [
        (|parts| parts.counts.truncate(1), "2 to 65535"),
        (|parts| parts.counts[0] += 1, "kernel.vectors"),
        (|parts| parts.counts.fill(0), "support vectors"),
        (|parts| parts.coefficients.truncate(1), "kernel.coefficients"),
        (|parts| parts.rho.push(0.0), "kernel.rho"),
        (|parts| parts.rho[0] = f64::NAN, "finite"),
        (|parts| parts.function = KernelFunction::Rbf { gamma: -1.0 }, "gamma"),
        (
            |parts| {
                parts.function =
                    KernelFunction::Polynomial { gamma: 1.0, coef0: f64::INFINITY, degree: 2 };
            },
            "coef0",
        ),
        (
            |parts| {
                let VectorValues::F64(values) = &mut parts.vectors else { unreachable!() };
                values[0] = 1e300;
            },
            "values up to",
        ),
        (
            |parts| {
                let lines = Pixels::lines(vec![1.0; parts.dims], vec![0.0; parts.dims]).unwrap();
                parts.pixels = lines;
                let count = parts.counts.iter().sum::<u32>() as usize;
                parts.vectors = VectorValues::U8(vec![0; count * parts.dims], None);
            },
            "the same at every place",
        ),
    ];
    for (change, part) in changes {
        let mut parts = good.clone();
        change(&mut parts);
        let error = Pairwise::new(parts).unwrap_err().to_string();
        assert!(error.contains(part), "{error:?} should contain {part:?}");
    }
    assert_eq!(whole_degree(3.0).unwrap(), 3);
    assert!(
        whole_degree(2.5).is_err() && whole_degree(1e9).is_err() && whole_degree(f64::NAN).is_err()
    );
}

#[test]
fn tensors_hold_all_of_it() {
    let mut noise = Noise(6);
    for parts in models(&mut noise) {
        let model = Pairwise::new(parts.clone()).unwrap();
        let mut tensors = Tensors::new();
        model.add_tensors(&mut tensors);
        let name = model.function().name();
        let mut copy = tensors.clone();
        let read = Pairwise::from_tensors(name, model.classes(), parts.dims, &mut copy).unwrap();
        assert!(copy.is_empty());
        assert_eq!(*read.function(), parts.function);
        let image = noise.image(parts.dims);
        let (class, votes) = reference(&parts, &image);
        assert_eq!(answer(&read, Isa::best(), &[&image]), (vec![class], votes));
        let mut again = Tensors::new();
        read.add_tensors(&mut again);
        assert_eq!(again, tensors);
        assert!(
            Pairwise::from_tensors("cubic", model.classes(), parts.dims, &mut tensors).is_err()
        );
    }
}
