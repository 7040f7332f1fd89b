//! The quadratic expansion: 100 components and all their 5050 products, so that a linear machine on
//! these 5150 features is a quadratic one on the components. (It is the explicit map of a
//! polynomial kernel of degree two; see C.-J. Hsieh's group: Y.-W. Chang et al., "Training and
//! Testing Low-degree Polynomial Data Mappings via Linear SVM", JMLR 11, 2010.)
//!
//! The features in order: for every component `a` in turn `z_a²`, then `√2·z_a·z_b` for `b` from `a
//! + 1` on; then the components themselves. The √2 makes the inner product of two expansions
//! `(z·z')² + z·z'`.

use std::f32::consts::SQRT_2;

use super::plane::chunk_at;
use super::project::{COMPONENTS, Components};
use crate::kernels::{Chunk, LANES, Simd, chunks};

/// Products of two components.
const PRODUCTS: usize = COMPONENTS * (COMPONENTS + 1) / 2;
/// Features.
pub const EXPANDED: usize = PRODUCTS + COMPONENTS;
/// Chunks of the features, zero in the padding.
pub const EXPANDED_CHUNKS: usize = chunks(EXPANDED);

/// The features of one image into `out`, `[EXPANDED_CHUNKS]`.
#[inline(always)]
pub(super) fn expand<S: Simd>(simd: S, components: &Components, out: &mut [Chunk]) {
    // Room to read a whole chunk from any component on.
    let mut z = [0.0; COMPONENTS + 2 * LANES];
    z[..COMPONENTS].copy_from_slice(&components.as_flattened()[..COMPONENTS]);
    let out = out.as_flattened_mut();
    let mut at = 0;
    for a in 0..COMPONENTS {
        // A row's last chunk may reach into the next row, which then overwrites it, or into the
        // components at the end, which are written last.
        let scale = simd.splat(SQRT_2 * z[a]);
        for b in (a..COMPONENTS).step_by(LANES) {
            let to = out[at + b - a..].first_chunk_mut().expect("rows end before the components");
            simd.store(simd.mul(scale, simd.load(chunk_at(&z, b))), to);
        }
        out[at] = z[a] * z[a];
        at += COMPONENTS - a;
    }
    out[PRODUCTS..EXPANDED].copy_from_slice(&z[..COMPONENTS]);
    out[EXPANDED..].fill(0.0);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::{Isa, Kernel};

    struct Expand<'a>(&'a Components);

    impl Kernel for Expand<'_> {
        type Output = Vec<Chunk>;
        #[inline(always)]
        fn run<S: Simd>(self, simd: S) -> Self::Output {
            let mut out = vec![[7.0; LANES]; EXPANDED_CHUNKS];
            expand(simd, self.0, &mut out);
            out
        }
    }

    fn components(seed: f32) -> Components {
        let mut z = [[0.0; LANES]; chunks(COMPONENTS)];
        for (i, z) in z.as_flattened_mut()[..COMPONENTS].iter_mut().enumerate() {
            *z = (i as f32 * seed) % 0.37 - 0.2;
        }
        z
    }

    #[test]
    fn features_stand_in_the_order_documented() {
        let z = components(0.0123);
        let out = Isa::best().run(Expand(&z));
        let (z, out) = (z.as_flattened(), out.as_flattened());
        let mut expected = Vec::new();
        for a in 0..100 {
            expected.push(z[a] * z[a]);
            expected.extend((a + 1..100).map(|b| (SQRT_2 * z[a]) * z[b]));
        }
        expected.extend_from_slice(&z[..100]);
        assert_eq!(out[..EXPANDED], expected);
        assert_eq!(EXPANDED, 5150);
        assert!(out[EXPANDED..].iter().all(|&padding| padding == 0.0));
    }

    #[test]
    fn the_inner_product_is_the_kernel_of_degree_two() {
        let (x, y) = (components(0.0123), components(0.0457));
        let dot = |a: &[f32], b: &[f32]| -> f64 {
            a.iter().zip(b).map(|(&a, &b)| f64::from(a) * f64::from(b)).sum()
        };
        let linear = dot(x.as_flattened(), y.as_flattened());
        let (x, y) = (Isa::best().run(Expand(&x)), Isa::best().run(Expand(&y)));
        let expanded = dot(x.as_flattened(), y.as_flattened());
        assert!((expanded - (linear * linear + linear)).abs() < 1e-5);
    }

    #[test]
    fn every_isa_gives_the_same_bits() {
        let z = components(0.0123);
        let expected = Isa::available()[0].run(Expand(&z));
        for isa in Isa::available() {
            assert_eq!(isa.run(Expand(&z)), expected, "{isa:?}");
        }
    }
}
