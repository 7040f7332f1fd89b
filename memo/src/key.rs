//! Which entry of a store belongs to an image, and how an entry proves that it does.
//!
//! Whoever can choose images must not be able to find two with one key, and whoever can write into
//! the store must not be able to make the memo say a wrong label. Both rest on a secret:
//!
//! * The **hash** of an image is HighwayHash-256 (Alakuijala, Cox, Wassenberg: "Fast keyed
//!   hash/pseudo-random function using SIMD multiply and permute", arXiv:1612.06257) under a key
//!   that is itself derived from the secret by the same function over a domain tag, the model's
//!   digest and the input's shape, each with its length before it. So the hash depends on secret,
//!   model, shape and image, and the model costs nothing per request.
//! * Its first 64 bits are the **key** in the store. They are no secret. The first 128 tell images
//!   apart within the memo. The rest never leaves it.
//! * The **value** is `tag << 16 | label`. The 48-bit tag is a one-time authenticator (Wegman and
//!   Carter, "New hash functions and their use in authentication and set equality", JCSS 22, 1981)
//!   whose one-time key are the hash's last two words, `a` and `b`: the upper 48 bits of `a · label
//!   + b` modulo 2⁶⁴, which for labels of 16 bits is a strongly universal function (Dietzfelbinger,
//!   "Universal hashing and k-wise independent random variables via integer arithmetic without
//!   primes", STACS 1996: 64 ≥ 16 + 48 − 1). Whoever has seen the value of one label makes that of
//!   another, of another key or of another model with probability 2⁻⁴⁸. Should a classifier give
//!   one image two labels, then who has seen both values may come to know `a` and `b`: of this
//!   image, and of no other.

use std::fmt;

use afterimage_wire::proto::Shape;
use highway::{HighwayHash, HighwayHasher, Key};

/// Bytes of a secret.
pub const SECRET_LEN: usize = 32;

/// Bits of a value that hold the label; the rest is the tag.
const LABEL_BITS: u32 = 16;

/// Classes that a label can tell apart.
pub const MAX_CLASSES: u32 = 1 << LABEL_BITS;

/// What the image key is derived from, before the model: changed with anything that changes values,
/// so that memos of different builds do not believe each other rather than misunderstand.
const KEY_DOMAIN: &[u8] = b"afterimage key v2";

/// What the hashes of a memo depend on. Memos that share a store share it. Never printed.
#[derive(Clone)]
pub struct Secret([u8; SECRET_LEN]);

impl Secret {
    /// A secret of these bytes, which should be random ones.
    pub fn new(bytes: [u8; SECRET_LEN]) -> Self {
        Secret(bytes)
    }

    /// A fresh one from the operating system.
    ///
    /// # Errors
    /// When the operating system has no randomness to give.
    pub fn random() -> Result<Self, rand::rngs::SysError> {
        let mut bytes = [0; SECRET_LEN];
        rand::TryRng::try_fill_bytes(&mut rand::rngs::SysRng, &mut bytes)?;
        Ok(Secret(bytes))
    }

    /// The secret in a file: [`SECRET_LEN`] bytes, or twice as many hexadecimal digits and white
    /// space around them.
    ///
    /// # Errors
    /// [`BadSecret`] for anything else.
    pub fn parse(file: &[u8]) -> Result<Self, BadSecret> {
        if let Ok(bytes) = file.try_into() {
            return Ok(Secret(bytes));
        }
        let digits = file.trim_ascii();
        if digits.len() != 2 * SECRET_LEN {
            return Err(BadSecret { len: digits.len() });
        }
        let mut bytes = [0; SECRET_LEN];
        for (byte, digits) in bytes.iter_mut().zip(digits.chunks_exact(2)) {
            let text = str::from_utf8(digits).map_err(|_| BadSecret { len: 2 * SECRET_LEN })?;
            let is_hex = digits.iter().all(u8::is_ascii_hexdigit);
            *byte = match u8::from_str_radix(text, 16) {
                Ok(byte) if is_hex => byte,
                _ => return Err(BadSecret { len: 2 * SECRET_LEN }),
            };
        }
        Ok(Secret(bytes))
    }

    fn key(&self) -> Key {
        let mut words = [0; 4];
        for (word, bytes) in words.iter_mut().zip(self.0.chunks_exact(8)) {
            *word = u64::from_le_bytes(bytes.try_into().expect("chunks of 8 bytes"));
        }
        Key(words)
    }
}

/// A file that holds no secret.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a secret is 32 bytes or 64 hexadecimal digits; this is neither, with {len} bytes")]
pub struct BadSecret {
    /// Bytes found, without white space around them.
    pub len: usize,
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret(…)")
    }
}

/// Which model gives the answers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ModelId {
    /// The model's digest, as its `Welcome` says.
    pub digest: [u8; 32],
    /// The input that it takes.
    pub shape: Shape,
    /// How many classes it tells apart: 1 to [`MAX_CLASSES`].
    pub classes: u32,
}

impl ModelId {
    /// Why answers of this model cannot be remembered; `None` when they can.
    pub fn objection(&self) -> Option<String> {
        if self.digest == [0; 32] {
            return Some(incomplete("no digest of its model"));
        }
        if self.shape.byte_len().is_none_or(|len| len == 0) {
            return Some(incomplete("no input shape"));
        }
        if !(1..=MAX_CLASSES).contains(&self.classes) {
            return Some(incomplete(&format!("{} classes", self.classes)));
        }
        None
    }
}

/// Says what is missing in a classifier's `Welcome`, and what a memo requires.
fn incomplete(found: &str) -> String {
    format!(
        "the classifier reports {found}; a memo requires a model digest other than zero, an input \
         shape, and 1 to {MAX_CLASSES} classes"
    )
}

/// The hash of one image under one model.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ImageHash([u64; 4]);

impl ImageHash {
    /// The key in the store.
    #[inline]
    pub fn cache_key(self) -> u64 {
        self.0[0]
    }

    /// 128 bits that tell images apart within the memo.
    #[inline]
    pub fn identity(self) -> u128 {
        u128::from(self.0[1]) << 64 | u128::from(self.0[0])
    }

    /// The tag of a label, in its place above the label's bits.
    #[inline]
    fn tag(self, label: u16) -> u64 {
        let [.., a, b] = self.0;
        a.wrapping_mul(label.into()).wrapping_add(b) >> LABEL_BITS << LABEL_BITS
    }
}

/// Keys and seals for the answers of one model.
pub struct KeySpace {
    model: ModelId,
    image_len: usize,
    /// Under the model's key, with nothing hashed yet. To copy it is cheaper than to begin anew,
    /// which asks the CPU what it can each time.
    hasher: HighwayHasher,
}

impl KeySpace {
    /// The keys of `model` under `secret`.
    ///
    /// # Errors
    /// [`ModelId::objection`], when there is one.
    pub fn new(secret: &Secret, model: ModelId) -> Result<Self, String> {
        if let Some(objection) = model.objection() {
            return Err(objection);
        }
        let mut shape = Vec::new();
        for dim in model.shape.dims() {
            shape.extend_from_slice(&dim.to_le_bytes());
        }
        let image_key = Key(derive(secret, &[KEY_DOMAIN, &model.digest, &shape]).finalize256());
        let image_len = model.shape.byte_len().expect("`objection` looks at the shape");
        Ok(KeySpace { model, image_len, hasher: HighwayHasher::new(image_key) })
    }

    /// The model that these keys belong to.
    pub fn model(&self) -> &ModelId {
        &self.model
    }

    /// Bytes that an image must have.
    #[inline]
    pub fn image_len(&self) -> usize {
        self.image_len
    }

    /// The hash of an image of [`image_len`](Self::image_len) bytes.
    #[inline]
    pub fn hash(&self, image: &[u8]) -> ImageHash {
        ImageHash(self.hasher.clone().hash256(image))
    }

    /// The value to store for an image with this label, which should be one of the model's.
    pub fn seal(&self, hash: ImageHash, label: u16) -> i64 {
        (hash.tag(label) | u64::from(label)).cast_signed()
    }

    /// The label in a stored value; `None` when the value was not made by [`seal`](Self::seal) for
    /// this image, this model and this secret, or the model has no such label.
    #[inline]
    pub fn open(&self, hash: ImageHash, value: i64) -> Option<u16> {
        let value = value.cast_unsigned();
        let label = value as u16;
        if u32::from(label) >= self.model.classes {
            return None;
        }
        (hash.tag(label) | u64::from(label) == value).then_some(label)
    }
}

impl fmt::Debug for KeySpace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("KeySpace").field("model", &self.model).finish_non_exhaustive()
    }
}

/// A hash over parts, each with its length before it.
fn derive(secret: &Secret, parts: &[&[u8]]) -> HighwayHasher {
    let mut hasher = HighwayHasher::new(secret.key());
    for part in parts {
        hasher.append(&(part.len() as u64).to_le_bytes());
        hasher.append(part);
    }
    hasher
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn model(digest: u8, dims: &[u32]) -> ModelId {
        ModelId { digest: [digest; 32], shape: Shape::new(dims).unwrap(), classes: 10 }
    }

    fn space(secret: u8, digest: u8, dims: &[u32]) -> KeySpace {
        KeySpace::new(&Secret::new([secret; 32]), model(digest, dims)).unwrap()
    }

    #[test]
    fn a_sealed_label_opens_for_its_image_and_for_no_other_label_image_model_shape_or_secret() {
        let home = space(1, 1, &[2, 2]);
        let hash = home.hash(b"abcd");
        for label in 0..10 {
            let value = home.seal(hash, label);
            assert_eq!(home.open(hash, value), Some(label));
            assert_eq!(home.open(home.hash(b"abce"), value), None);
            for other in [space(2, 1, &[2, 2]), space(1, 2, &[2, 2]), space(1, 1, &[4])] {
                assert_ne!(other.hash(b"abcd"), hash);
                assert_eq!(other.open(other.hash(b"abcd"), value), None);
            }
            for bit in 0..64 {
                assert_eq!(home.open(hash, value ^ (1 << bit)), None, "bit {bit} flipped");
            }
        }
    }

    #[test]
    fn two_images_with_one_cache_key_do_not_get_each_others_label() {
        let home = space(1, 1, &[4]);
        let a = ImageHash([7, 0, 9, 1 << 20]);
        let b = ImageHash([7, 0, 9, 1 << 21]);
        assert_eq!(home.open(b, home.seal(a, 3)), None);
    }

    #[test]
    fn images_with_one_store_key_have_flights_of_their_own() {
        let (a, b) = (ImageHash([7, 1, 0, 0]), ImageHash([7, 2, 0, 0]));
        assert_eq!(a.cache_key(), b.cache_key());
        assert_ne!(a.identity(), b.identity());
    }

    #[test]
    fn two_labels_of_one_image_do_not_tell_those_of_another() {
        let home = space(1, 1, &[4]);
        let known = [3, 8].map(|label| home.seal(home.hash(b"seen"), label));
        let other = home.hash(b"next");
        // What makes the one label's value of the one image out of the other's, and so would of any
        // image, were the tag a sum of the image's part and the label's.
        let by_sum = home.seal(other, 3).wrapping_add(known[1].wrapping_sub(known[0]));
        let by_bits = home.seal(other, 3) ^ known[0] ^ known[1];
        for forged in [by_sum, by_bits] {
            assert_eq!(forged as u16, 8);
            assert_eq!(home.open(other, forged), None);
        }
        assert_eq!(home.open(other, home.seal(other, 8)), Some(8));
    }

    #[test]
    fn the_hash_is_pinned_so_that_memos_of_different_builds_share_a_store() {
        let home = space(7, 9, &[28, 28]);
        let image: Vec<u8> = (0..784u32).map(|i| (i * i / 7) as u8).collect();
        let hash = home.hash(&image);
        assert_eq!(hash.identity(), PINNED_HASH);
        assert_eq!(home.seal(hash, 3), PINNED_VALUE);
    }

    const PINNED_HASH: u128 = 65_204_615_212_618_574_057_416_461_708_418_670_710;
    const PINNED_VALUE: i64 = 2_935_715_307_423_727_619;

    #[test]
    fn models_that_cannot_be_remembered_are_refused() {
        let secret = Secret::new([0; 32]);
        let good = model(1, &[28, 28]);
        for bad in [
            ModelId { digest: [0; 32], ..good.clone() },
            ModelId { shape: Shape::default(), ..good.clone() },
            ModelId { shape: Shape::new(&[0]).unwrap(), ..good.clone() },
            ModelId { classes: 0, ..good.clone() },
            ModelId { classes: MAX_CLASSES + 1, ..good.clone() },
        ] {
            assert!(KeySpace::new(&secret, bad).is_err());
        }
        assert!(KeySpace::new(&secret, ModelId { classes: MAX_CLASSES, ..good }).is_ok());
    }

    #[test]
    fn a_secret_is_read_from_bytes_and_from_hexadecimal_digits() {
        let bytes: [u8; 32] = std::array::from_fn(|i| (i * 9) as u8);
        let hex: String = bytes.iter().map(|byte| format!("{byte:02X}")).collect();
        assert_eq!(Secret::parse(&bytes).unwrap().0, bytes);
        assert_eq!(Secret::parse(format!(" {hex}\n").as_bytes()).unwrap().0, bytes);
        let wrong = [String::new(), hex[1..].to_owned(), format!("+{}", &hex[1..]), "é".repeat(32)];
        for wrong in wrong {
            assert!(Secret::parse(wrong.as_bytes()).is_err(), "{wrong:?}");
        }
    }

    #[test]
    fn a_secret_is_never_printed() {
        assert_eq!(format!("{:?}", Secret::new([0x41; 32])), "Secret(…)");
    }

    proptest! {
        #[test]
        fn a_random_value_is_not_believed(value: i64, a: u64, b: u64) {
            let home = space(1, 1, &[4]);
            prop_assert_eq!(home.open(ImageHash([0, 0, a, b]), value), None);
        }

        #[test]
        fn rejects_the_value_of_a_nearly_equal_hash(a: u64, b: u64, bit in 16u32..64, label in 0u16..10) {
            // The lowest sixteen bits of `b` are not in the tag.
            let home = space(1, 1, &[4]);
            let value = home.seal(ImageHash([0, 0, a, b]), label);
            prop_assert_eq!(home.open(ImageHash([0, 0, a, b ^ 1 << bit]), value), None);
        }

        #[test]
        fn images_of_one_byte_difference_differ_in_each_word(at in 0usize..784, by in 1u8..) {
            let home = space(1, 1, &[28, 28]);
            let mut image = vec![0; 784];
            let before = home.hash(&image);
            image[at] ^= by;
            let after = home.hash(&image);
            prop_assert!(before.0.iter().zip(after.0).all(|(before, after)| *before != after));
        }
    }
}
