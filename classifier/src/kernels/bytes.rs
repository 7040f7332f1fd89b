//! Dot products of bytes, added up in `i32`: exact, so that every instruction set gives the same
//! numbers.
//!
//! Vectors are in groups of sixteen. A step of a group is four bytes of each vector, one register
//! of AVX-512. The same four bytes of an image are multiplied with all sixteen, so no sum crosses
//! lanes.

use super::{Isa, Kind};

/// Vectors of a group.
pub(crate) const GROUP: usize = 16;
/// Bytes of a vector in one step.
const STEP: usize = 4;

/// Longest vectors: the dot product of two, all bytes 255, is below 2³¹.
pub const MAX_BYTES: usize = i32::MAX as usize / (255 * 255);

/// One step of a group: four bytes of each vector, on a cache line.
#[derive(Clone, Copy, Debug)]
#[repr(C, align(64))]
pub(crate) struct Step(pub(super) [u8; GROUP * STEP]);

/// Rows of bytes, laid out for [`BytePanel::dots`].
#[derive(Clone, Debug)]
pub(crate) struct BytePanel {
    /// `[groups, steps]`.
    data: Vec<Step>,
    /// Steps of a group.
    steps: usize,
    /// 128 times the sum of each row's bytes, `[groups * GROUP]`.
    biases: Vec<i32>,
}

/// Images in the layout of the kernels: four bytes a word.
#[derive(Debug, Default)]
pub(crate) struct ByteImages {
    words: Vec<u32>,
}

/// A kernel's input: `steps` words for each image, `steps` steps for each group.
pub(super) struct Task<'a> {
    pub(super) steps: usize,
    pub(super) words: &'a [u32],
    pub(super) data: &'a [Step],
    pub(super) biases: &'a [i32],
    /// `[images, groups * GROUP]`.
    pub(super) out: &'a mut [i32],
}

impl BytePanel {
    /// A panel of rows of `len` bytes (at least 1, at most [`MAX_BYTES`]), the last group filled up
    /// with zeros.
    pub(crate) fn new(rows: &[u8], len: usize) -> Self {
        assert!((1..=MAX_BYTES).contains(&len), "rows of 1 to {MAX_BYTES} bytes");
        let steps = len.div_ceil(STEP);
        let groups = (rows.len() / len).div_ceil(GROUP);
        let mut data = vec![Step([0; GROUP * STEP]); groups * steps];
        let mut biases = vec![0; groups * GROUP];
        for (r, row) in rows.chunks_exact(len).enumerate() {
            let (group, place) = (r / GROUP, r % GROUP * STEP);
            for (step, bytes) in row.chunks(STEP).enumerate() {
                data[group * steps + step].0[place..place + bytes.len()].copy_from_slice(bytes);
            }
            biases[r] = 128 * row.iter().map(|&byte| i32::from(byte)).sum::<i32>();
        }
        Self { data, steps, biases }
    }

    /// Byte `at` of row `row`.
    pub(crate) fn byte(&self, row: usize, at: usize) -> u8 {
        self.data[row / GROUP * self.steps + at / STEP].0[row % GROUP * STEP + at % STEP]
    }

    /// Lays out images (each as long as a row) for [`BytePanel::dots`] with the same `isa`.
    pub(crate) fn lay_out(&self, isa: Isa, images: &[&[u8]], out: &mut ByteImages) {
        let flip = Product::of(isa).flip();
        out.words.clear();
        for image in images {
            out.words.extend(image.chunks(STEP).map(|bytes| {
                let mut word = [0; STEP];
                word[..bytes.len()].copy_from_slice(bytes);
                u32::from_le_bytes(word) ^ flip
            }));
        }
    }

    /// Every dot product of an image with a row of the groups from `first` on, `out` being
    /// `[images, groups * GROUP]`: its length determines the number of groups. Without images or
    /// groups `out` is empty.
    pub(crate) fn dots(&self, isa: Isa, images: &ByteImages, first: usize, out: &mut [i32]) {
        if out.is_empty() {
            return;
        }
        let steps = self.steps;
        let rows = out.len() / (images.words.len() / steps);
        let (start, end) = (first * GROUP, first * GROUP + rows);
        let data = &self.data[first * steps..end / GROUP * steps];
        let task =
            Task { steps, words: &images.words, data, biases: &self.biases[start..end], out };
        match Product::of(isa) {
            Product::Portable => portable(task),
            #[cfg(target_arch = "x86_64")]
            Product::Avx2(proof) => proof.dots(task),
            #[cfg(target_arch = "x86_64")]
            Product::Vnni(proof) => proof.dots(task),
        }
    }
}

/// The instructions for products.
#[derive(Clone, Copy)]
enum Product {
    Portable,
    #[cfg(target_arch = "x86_64")]
    Avx2(super::x86_bytes::Avx2),
    #[cfg(target_arch = "x86_64")]
    Vnni(super::x86_bytes::Vnni),
}

impl Product {
    /// The fastest for this instruction set.
    fn of(isa: Isa) -> Self {
        match isa.0 {
            #[cfg(target_arch = "x86_64")]
            Kind::Avx512(_) => super::x86_bytes::Vnni::detect()
                .map(Self::Vnni)
                .or_else(|| super::x86_bytes::Avx2::detect().map(Self::Avx2))
                .unwrap_or(Self::Portable),
            #[cfg(target_arch = "x86_64")]
            Kind::Avx2(_) => super::x86_bytes::Avx2::detect().map_or(Self::Portable, Self::Avx2),
            _ => Self::Portable,
        }
    }

    /// The mask from an image's bytes to the kernel's. VNNI multiplies unsigned bytes with signed
    /// ones, so 128 is subtracted (by flipping the highest bit) and the bias added.
    fn flip(self) -> u32 {
        match self {
            #[cfg(target_arch = "x86_64")]
            Self::Vnni(_) => 0x8080_8080,
            _ => 0,
        }
    }
}

fn portable(task: Task<'_>) {
    let Task { steps, words, data, out, .. } = task;
    let row = data.len() / steps * GROUP;
    for (words, out) in words.chunks_exact(steps).zip(out.chunks_exact_mut(row)) {
        for (group, out) in data.chunks_exact(steps).zip(out.as_chunks_mut::<GROUP>().0) {
            *out = [0; GROUP];
            for (word, step) in words.iter().zip(group) {
                let word = word.to_le_bytes().map(i32::from);
                for (sum, bytes) in out.iter_mut().zip(step.0.as_chunks::<STEP>().0) {
                    for (&x, &s) in word.iter().zip(bytes) {
                        *sum += x * i32::from(s);
                    }
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn groups(panel: &BytePanel) -> usize {
        panel.biases.len() / GROUP
    }

    fn noise(count: usize, mut state: u32) -> Vec<u8> {
        let mut next = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            // Many extreme values, for which sums could saturate.
            match state >> 28 {
                0..5 => 255,
                5 => 0,
                _ => (state >> 16) as u8,
            }
        };
        (0..count).map(|_| next()).collect()
    }

    #[test]
    fn every_isa_gives_the_plain_sums_of_products() {
        for (len, rows, count) in [(1, 1, 1), (5, 17, 3), (784, 70, 19), (64, 129, 8)] {
            let vectors = noise(len * rows, 7);
            let images = noise(len * count, 9);
            let images: Vec<&[u8]> = images.chunks_exact(len).collect();
            let panel = BytePanel::new(&vectors, len);
            for isa in Isa::available() {
                let mut packed = ByteImages::default();
                panel.lay_out(isa, &images, &mut packed);
                let mut out = vec![-1; count * groups(&panel) * GROUP];
                panel.dots(isa, &packed, 0, &mut out);
                for (i, image) in images.iter().enumerate() {
                    for (r, row) in vectors.chunks_exact(len).enumerate() {
                        let plain: i32 =
                            image.iter().zip(row).map(|(&x, &s)| i32::from(x) * i32::from(s)).sum();
                        assert_eq!(out[i * groups(&panel) * GROUP + r], plain, "{isa:?}");
                    }
                }
            }
        }
    }

    #[test]
    fn no_images_or_no_groups_have_no_products() {
        let panel = BytePanel::new(&noise(40 * 5, 1), 5);
        for isa in Isa::available() {
            let mut none = ByteImages::default();
            panel.lay_out(isa, &[], &mut none);
            panel.dots(isa, &none, 0, &mut []);
            panel.dots(isa, &none, groups(&panel), &mut []);
            let mut one = ByteImages::default();
            panel.lay_out(isa, &[&[1; 5]], &mut one);
            panel.dots(isa, &one, 1, &mut []);
        }
    }

    #[test]
    fn groups_in_the_middle_are_those_of_the_whole() {
        let (len, rows) = (30, 90);
        let vectors = noise(len * rows, 3);
        let image = noise(len, 4);
        let panel = BytePanel::new(&vectors, len);
        assert_eq!((groups(&panel), panel.byte(89, 29)), (6, vectors[len * rows - 1]));
        for isa in Isa::available() {
            let mut packed = ByteImages::default();
            panel.lay_out(isa, &[&image], &mut packed);
            let mut whole = vec![0; 6 * GROUP];
            panel.dots(isa, &packed, 0, &mut whole);
            let mut part = vec![0; 3 * GROUP];
            panel.dots(isa, &packed, 2, &mut part);
            assert_eq!(part, whole[2 * GROUP..5 * GROUP], "{isa:?}");
        }
    }
}
