//! Keys and seals: which entry of a store belongs to a row, and how an entry proves it.
//!
//! A client that chooses rows must not find two with one key. An attacker with write access to the
//! store must not make the memo give a wrong answer. Both rest on a secret:
//!
//! * The **hash** of a row is HighwayHash-256 (Alakuijala, Cox, Wassenberg: "Fast keyed
//!   hash/pseudo-random function using SIMD multiply and permute", arXiv:1612.06257). Its key is
//!   derived from the secret by the same function over a domain tag, the model's digest, the
//!   input's shape and the epoch, each with its length before it. So the hash depends on secret,
//!   model, epoch and row, and the model costs nothing per request.
//! * Its first 64 bits are the **key** in a store of labels, its first 128 bits the key in a store
//!   of bytes. They are no secret. The rest never leaves the memo.
//! * The stored value of a **label** is `tag << 16 | label`. The 48-bit tag is a one-time
//!   authenticator (Wegman and Carter, "New hash functions and their use in authentication and set
//!   equality", JCSS 22, 1981). Its one-time key is the hash's last two words, `a` and `b`: the
//!   upper 48 bits of `a · label + b` modulo 2⁶⁴, which for labels of 16 bits is a strongly
//!   universal function (Dietzfelbinger, "Universal hashing and k-wise independent random variables
//!   via integer arithmetic without primes", STACS 1996: 64 ≥ 16 + 48 − 1). With the value of one
//!   label, an attacker forges that of another label, key or model with probability 2⁻⁴⁸. If a
//!   model gives one row two labels, both values together reveal `a` and `b` of this row, and of no
//!   other row.
//! * A **label with a time to live** has a shorter tag and its expiry before the label: 36 bits of
//!   tag, 12 of expiry, 16 of label (`Expiry`). The tag has two parts, both HighwayHash under a
//!   second derived key over the row's whole hash: 4 bits cover the bits that are stored, 32 the
//!   complete expiry. A value of the row whose time is over matches the first part only, however
//!   old it is, so it is not counted as a forgery. An attacker may learn from that count whether
//!   the first part fits: a forgery succeeds with probability 2⁻³². A memo reads this form from
//!   each store, so the bound holds for labels without a time to live, too.
//! * The stored value of **bytes** is the answer, the [`Lifetime`] and a 128-bit MAC:
//!   HighwayHash-128, under a second derived key, of the row's whole hash, the answer and the
//!   lifetime. A forgery succeeds with probability 2⁻¹²⁸ as far as HighwayHash is a pseudo-random
//!   function. A store that keeps a value for too long, or returns an older value of the same row,
//!   cannot extend its lifetime.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use afterimage_core::ModelId;
use afterimage_core::model::AnswerKind;
use bytes::Bytes;
use highway::{HighwayHash, HighwayHasher, Key};
use subtle::ConstantTimeEq;

/// Bytes of a secret.
pub const SECRET_LEN: usize = 32;

/// Bits of a stored label that hold the label; the rest is the tag.
const LABEL_BITS: u32 = 16;

/// Bits of the tag of a label with a time to live that cover the stored bits: the highest ones.
/// They only tell an old value from a forged one, so most bits of the tag are for the expiry.
const ROW_TAG_BITS: u32 = 4;

/// Bits of its tag that cover the complete expiry.
const TIME_TAG_BITS: u32 = 64 - LABEL_BITS - Expiry::BITS - ROW_TAG_BITS;

/// Bytes of the MAC behind stored bytes.
pub const MAC_LEN: usize = 16;

/// Domains that keys are derived in. A change of anything that changes stored values changes the
/// domain, so that memos of different builds miss each other's entries and do not misread them.
const KEY_DOMAIN: &[u8] = b"afterimage key v2";
const SEAL_DOMAIN: &[u8] = b"afterimage seal v2";
const PURPOSE_DOMAIN: &[u8] = b"afterimage purpose v1";

/// The secret of a memo's hashes. Memos that share a store share it. Never printed.
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

    /// A key for another purpose, which reveals nothing about the secret.
    pub fn derive(&self, purpose: &[u8]) -> [u8; 32] {
        let mut hasher = HighwayHasher::new(self.key());
        hasher.append(PURPOSE_DOMAIN);
        hasher.append(purpose);
        let mut key = [0; 32];
        for (bytes, word) in key.chunks_exact_mut(8).zip(hasher.finalize256()) {
            bytes.copy_from_slice(&word.to_le_bytes());
        }
        key
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
#[error("it has {len} bytes; a secret is 32 bytes or 64 hexadecimal digits")]
pub struct BadSecret {
    /// Bytes found, without white space around them.
    pub len: usize,
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret(…)")
    }
}

/// The hash of one row under one model.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RowHash([u64; 4]);

impl RowHash {
    /// The key in a store of labels.
    #[inline]
    pub fn store_key(self) -> u64 {
        self.0[0]
    }

    /// 128 bits that identify a row: the key of flights and of stores of bytes.
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

/// The value of a deleted label. No row has it as its sealed label, except with a
/// probability of 2⁻⁴⁸.
pub const FORGOTTEN: i64 = 0;

/// When an answer of bytes was stored, and for how long it is used. Part of the stored value, and
/// covered by its seal.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Lifetime {
    /// Seconds since 1970.
    stored_s: u64,
    /// 0 for no limit.
    ttl_s: u32,
}

/// Bytes of a lifetime in a stored value: both numbers, little-endian.
const LIFETIME_LEN: usize = size_of::<u64>() + size_of::<u32>();

impl Lifetime {
    /// From this time on, in seconds since 1970. A time to live counts in whole seconds, at least
    /// one.
    pub fn new(stored_s: u64, ttl: Option<Duration>) -> Self {
        let ttl_s = ttl.map_or(0, |ttl| u32::try_from(ttl.as_secs().max(1)).unwrap_or(u32::MAX));
        Lifetime { stored_s, ttl_s }
    }

    /// Whether the answer has a time to live.
    pub(crate) fn is_limited(self) -> bool {
        self.ttl_s != 0
    }

    /// The age at this time, in seconds since 1970; `None` when the time to live is over. The clock
    /// of the memo that stored the answer may be ahead: then the age is zero.
    pub fn age(self, now_s: u64) -> Option<Duration> {
        let age_s = now_s.saturating_sub(self.stored_s);
        let is_over = self.is_limited() && age_s >= u64::from(self.ttl_s);
        (!is_over).then_some(Duration::from_secs(age_s))
    }

    fn to_bytes(self) -> [u8; LIFETIME_LEN] {
        let mut bytes = [0; LIFETIME_LEN];
        let (stored, ttl) = bytes.split_at_mut(size_of::<u64>());
        stored.copy_from_slice(&self.stored_s.to_le_bytes());
        ttl.copy_from_slice(&self.ttl_s.to_le_bytes());
        bytes
    }

    fn parse(bytes: &[u8]) -> Option<Self> {
        let (stored, ttl) = bytes.split_first_chunk()?;
        let (stored_s, ttl_s) = (u64::from_le_bytes(*stored), ttl.try_into().ok()?);
        Some(Lifetime { stored_s, ttl_s: u32::from_le_bytes(ttl_s) })
    }
}

/// Bytes that a stored value has beside the answer.
pub const SEAL_LEN: usize = LIFETIME_LEN + MAC_LEN;

/// The end of a label's time to live, in units of 8^`scale` seconds since 1970.
///
/// A stored value has the scale and the lowest 9 bits of the number of units. The reader takes the
/// number that is nearest to the present; the seal covers the whole number. So the time is rounded
/// down by at most 4 %, or to a second.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Expiry {
    scale: u64,
    units: u64,
}

impl Expiry {
    const UNIT_BITS: u32 = 9;
    const SCALE_BITS: u32 = 3;
    const BITS: u32 = Self::UNIT_BITS + Self::SCALE_BITS;
    /// Half of the range of the stored units, less 6 % for clocks that differ.
    const MAX_UNITS: u64 = 240;

    fn new(now_s: u64, ttl: Duration) -> Self {
        let last = (1 << Self::SCALE_BITS) - 1;
        let ttl_s = ttl.as_secs().clamp(1, Self::MAX_UNITS << (3 * last));
        let fits = |scale: &u64| ttl_s >> (3 * scale) <= Self::MAX_UNITS;
        let scale = (0..last).find(fits).unwrap_or(last);
        Expiry { scale, units: now_s.saturating_add(ttl_s) >> (3 * scale) }
    }

    /// The expiry with these stored bits that is nearest to the present.
    fn parse(bits: u64, now_s: u64) -> Self {
        let range = 1 << Self::UNIT_BITS;
        let scale = bits >> Self::UNIT_BITS & ((1 << Self::SCALE_BITS) - 1);
        let now = now_s >> (3 * scale);
        let ahead = bits.wrapping_sub(now) % range;
        let behind = if ahead > range / 2 { range } else { 0 };
        Expiry { scale, units: (now + ahead).saturating_sub(behind) }
    }

    /// The bits that are stored.
    fn bits(self) -> u64 {
        (self.scale << Self::UNIT_BITS) | (self.units % (1 << Self::UNIT_BITS))
    }

    fn is_over(self, now_s: u64) -> bool {
        now_s >> (3 * self.scale) >= self.units
    }
}

/// A stored label with a time to live.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Timed {
    /// The label; its time is not over.
    Label(u16),
    /// The value is the row's, and its time is over.
    Expired,
    /// The value was not made for this row, this model and this secret.
    Forged,
}

/// Keys and seals for the answers of one model in one epoch.
pub struct KeySpace {
    model: Arc<ModelId>,
    input_len: Option<usize>,
    answers_with_bytes: bool,
    /// Under the model's key, with nothing hashed yet. A copy is cheaper than a new one, which
    /// detects the features of the CPU each time.
    hasher: HighwayHasher,
    /// The same for the seals of bytes.
    sealer: HighwayHasher,
}

impl KeySpace {
    /// The keys of `model` under `secret` in `epoch`. A model's answers of an earlier epoch are
    /// not found any more.
    ///
    /// # Errors
    /// [`ModelId::objection`], when there is one.
    pub fn new(secret: &Secret, model: Arc<ModelId>, epoch: u64) -> Result<Self, String> {
        if let Some(objection) = model.objection() {
            return Err(objection);
        }
        let shape = shape_bytes(&model);
        let epoch = epoch.to_le_bytes();
        let parts = [&model.digest[..], &shape, &epoch];
        // Epoch 0 is left out: stores that were filled before there were epochs stay valid.
        let parts = if epoch == [0; 8] { &parts[..2] } else { &parts };
        let row_key = Key(derive(secret, KEY_DOMAIN, parts));
        let seal_key = Key(derive(secret, SEAL_DOMAIN, parts));
        let (hasher, sealer) = (HighwayHasher::new(row_key), HighwayHasher::new(seal_key));
        let answers_with_bytes = model.answers == AnswerKind::Bytes;
        Ok(KeySpace { input_len: model.input_len(), answers_with_bytes, model, hasher, sealer })
    }

    /// The model that these keys belong to.
    pub fn model(&self) -> &Arc<ModelId> {
        &self.model
    }

    /// Bytes that a row must have, if the model declares it.
    #[inline]
    pub fn input_len(&self) -> Option<usize> {
        self.input_len
    }

    /// The key of a row's flight. Two models may have one digest and other kinds of answers, such
    /// as the label and the scores of one classifier: their calls are not shared.
    #[inline]
    pub fn flight(&self, hash: RowHash) -> u128 {
        hash.identity() ^ u128::from(self.answers_with_bytes)
    }

    /// The hash of a row.
    #[inline]
    pub fn hash(&self, row: &[u8]) -> RowHash {
        RowHash(self.hasher.clone().hash256(row))
    }

    /// The value to store for a row with this label, which should be one of the model's.
    pub fn seal(&self, hash: RowHash, label: u16) -> i64 {
        (hash.tag(label) | u64::from(label)).cast_signed()
    }

    /// The label in a stored value; `None` when the value was not made by [`seal`](Self::seal) for
    /// this row, this model and this secret, or the model has no such label.
    #[inline]
    pub fn open(&self, hash: RowHash, value: i64) -> Option<u16> {
        let value = value.cast_unsigned();
        let label = value as u16;
        if u32::from(label) >= self.model.classes() {
            return None;
        }
        (hash.tag(label) | u64::from(label) == value).then_some(label)
    }

    /// The value to store for a row with this label, which is used for this time: in whole seconds,
    /// at least one, and up to 4 % shorter.
    pub fn seal_timed(&self, hash: RowHash, label: u16, now_s: u64, ttl: Duration) -> i64 {
        self.timed(hash, label, Expiry::new(now_s, ttl)).cast_signed()
    }

    /// The label in a value that [`seal_timed`](Self::seal_timed) made for this row.
    pub fn open_timed(&self, hash: RowHash, value: i64, now_s: u64) -> Timed {
        let value = value.cast_unsigned();
        let label = value as u16;
        let expiry = Expiry::parse(value >> LABEL_BITS, now_s);
        let expected = self.timed(hash, label, expiry);
        if u32::from(label) >= self.model.classes() || (expected ^ value) >> (64 - ROW_TAG_BITS) != 0 {
            return Timed::Forged;
        }
        match expected == value && !expiry.is_over(now_s) {
            true => Timed::Label(label),
            false => Timed::Expired,
        }
    }

    /// A label with its expiry below a tag of two parts.
    fn timed(&self, hash: RowHash, label: u16, expiry: Expiry) -> u64 {
        let stored = expiry.bits() << LABEL_BITS | u64::from(label);
        let part = |len: u32, units: &[u8]| {
            let mut sealer = self.sealer.clone();
            for word in hash.0 {
                sealer.append(&word.to_le_bytes());
            }
            sealer.append(&stored.to_le_bytes()[..4]);
            sealer.append(units);
            sealer.finalize64() >> (64 - len)
        };
        let row = part(ROW_TAG_BITS, &[]);
        let time = part(TIME_TAG_BITS, &expiry.units.to_le_bytes()[..6]);
        row << (64 - ROW_TAG_BITS) | time << (LABEL_BITS + Expiry::BITS) | stored
    }

    /// The value to store for a row with this answer: the answer, its lifetime, and the MAC.
    pub fn seal_bytes(&self, hash: RowHash, answer: &[u8], lifetime: Lifetime) -> Bytes {
        let mut sealed = Vec::with_capacity(answer.len() + SEAL_LEN);
        sealed.extend_from_slice(answer);
        sealed.extend_from_slice(&lifetime.to_bytes());
        let mac = self.mac(hash, &sealed);
        sealed.extend_from_slice(&mac);
        sealed.into()
    }

    /// The answer in a stored value, without a copy, and its lifetime; `None` when the value was
    /// not made by [`seal_bytes`](Self::seal_bytes) for this row, this model and this secret.
    pub fn open_bytes(&self, hash: RowHash, sealed: &Bytes) -> Option<(Bytes, Lifetime)> {
        let (content, mac) = sealed.split_last_chunk::<MAC_LEN>()?;
        let (answer, lifetime) = content.split_last_chunk::<LIFETIME_LEN>()?;
        if !bool::from(self.mac(hash, content).ct_eq(mac)) {
            return None;
        }
        Some((sealed.slice(..answer.len()), Lifetime::parse(lifetime)?))
    }

    /// The MAC of an answer with its lifetime.
    fn mac(&self, hash: RowHash, content: &[u8]) -> [u8; MAC_LEN] {
        let mut sealer = self.sealer.clone();
        for word in hash.0 {
            sealer.append(&word.to_le_bytes());
        }
        sealer.append(content);
        let [low, high] = sealer.finalize128();
        (u128::from(high) << 64 | u128::from(low)).to_le_bytes()
    }
}

impl fmt::Debug for KeySpace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("KeySpace").field("model", &self.model).finish_non_exhaustive()
    }
}

/// The dimensions of a model's input, as part of a derived key.
pub(crate) fn shape_bytes(model: &ModelId) -> Vec<u8> {
    model.input.iter().flat_map(|shape| shape.dims()).flat_map(|dim| dim.to_le_bytes()).collect()
}

/// A hash over parts, each with its length before it.
pub(crate) fn derive(secret: &Secret, domain: &[u8], parts: &[&[u8]]) -> [u64; 4] {
    let mut hasher = HighwayHasher::new(secret.key());
    for part in [domain].iter().chain(parts) {
        hasher.append(&(part.len() as u64).to_le_bytes());
        hasher.append(part);
    }
    hasher.finalize256()
}

#[cfg(test)]
mod tests {
    use afterimage_core::Shape;
    use afterimage_core::model::MAX_CLASSES;

    use super::*;
    use proptest::prelude::*;

    fn model(digest: u8, dims: &[u32]) -> ModelId {
        ModelId::labels([digest; 32], Shape::new(dims), 10)
    }

    fn space(secret: u8, digest: u8, dims: &[u32]) -> KeySpace {
        KeySpace::new(&Secret::new([secret; 32]), Arc::new(model(digest, dims)), 0).unwrap()
    }

    #[test]
    fn a_sealed_label_opens_for_its_own_input_and_model_only() {
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
    fn a_timed_label_opens_until_its_time_is_over() {
        let home = space(1, 1, &[4]);
        let hash = home.hash(b"abcd");
        let now_s = 1_800_000_123;
        let year = 366 * 24 * 3600;
        for ttl_s in [1, 2, 3, 60, 239, 240, 241, 255, 300, 1919, 1920, 1921, 86_400, year] {
            let value = home.seal_timed(hash, 7, now_s, Duration::from_secs(ttl_s));
            let open = |at| home.open_timed(hash, value, at);
            assert_eq!(home.open(hash, value), None, "it is no label without a time");
            assert_eq!(open(now_s), Timed::Label(7), "{ttl_s}");
            assert_eq!(open(now_s + ttl_s * 96 / 100 - u64::from(ttl_s < 25)), Timed::Label(7));
            for later in [0, 1, 5, 600, 100_000, 3 * year] {
                assert_eq!(open(now_s + ttl_s + later), Timed::Expired, "{ttl_s} + {later}");
            }
            // The clock of the memo that reads may be behind.
            assert_eq!(open(now_s - ttl_s / 20), Timed::Label(7), "{ttl_s}");
        }
    }

    #[test]
    fn a_timed_label_opens_for_its_own_input_and_model_only() {
        let home = space(1, 1, &[2, 2]);
        let (hash, now_s) = (home.hash(b"abcd"), 1_800_000_123);
        let value = home.seal_timed(hash, 7, now_s, Duration::from_secs(3600));
        let is_label = |opened| matches!(opened, Timed::Label(_));
        assert!(!is_label(home.open_timed(home.hash(b"abce"), value, now_s)));
        for other in [space(2, 1, &[2, 2]), space(1, 2, &[2, 2]), space(1, 1, &[4])] {
            assert!(!is_label(other.open_timed(other.hash(b"abcd"), value, now_s)));
        }
        for bit in 0..64 {
            let opened = home.open_timed(hash, value ^ (1 << bit), now_s);
            assert!(!is_label(opened), "bit {bit} flipped: {opened:?}");
        }
        let plain = home.seal(hash, 7);
        assert!(!is_label(home.open_timed(hash, plain, now_s)));
    }

    /// A value that repeats the tag of its row for another time does not open: with a short part
    /// for the time, some of these would.
    #[test]
    fn an_expired_label_does_not_open_when_its_time_comes_round() {
        let home = space(1, 1, &[4]);
        let now_s = 1_800_000_123;
        let again = |row: u32| -> usize {
            let hash = home.hash(&row.to_le_bytes());
            let value = home.seal_timed(hash, 7, now_s, Duration::from_secs(60));
            // The stored part of the expiry is the same each 512 units of one second.
            let opened = |round: u64| home.open_timed(hash, value, now_s + round * 512);
            (1..=8).filter(|&round| matches!(opened(round), Timed::Label(_))).count()
        };
        assert_eq!((0..100_000).map(again).sum::<usize>(), 0);
    }

    #[test]
    fn two_images_with_one_cache_key_do_not_get_each_others_label() {
        let home = space(1, 1, &[4]);
        let a = RowHash([7, 0, 9, 1 << 20]);
        let b = RowHash([7, 0, 9, 1 << 21]);
        assert_eq!(home.open(b, home.seal(a, 3)), None);
    }

    #[test]
    fn images_with_one_store_key_have_flights_of_their_own() {
        let (a, b) = (RowHash([7, 1, 0, 0]), RowHash([7, 2, 0, 0]));
        assert_eq!(a.store_key(), b.store_key());
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
    fn the_hash_is_pinned_across_builds() {
        let home = space(7, 9, &[28, 28]);
        let image: Vec<u8> = (0..784u32).map(|i| (i * i / 7) as u8).collect();
        let hash = home.hash(&image);
        assert_eq!(hash.identity(), PINNED_HASH);
        assert_eq!(home.seal(hash, 3), PINNED_VALUE);
    }

    const PINNED_HASH: u128 = 65_204_615_212_618_574_057_416_461_708_418_670_710;
    const PINNED_VALUE: i64 = 2_935_715_307_423_727_619;

    #[test]
    fn models_without_a_usable_identity_are_refused() {
        let secret = Secret::new([0; 32]);
        let keys = |model| KeySpace::new(&secret, Arc::new(model), 0);
        let good = model(1, &[28, 28]);
        let classes = |classes| AnswerKind::Label { classes };
        for bad in [
            ModelId { digest: [0; 32], ..good.clone() },
            ModelId { input: Shape::new(&[0]), ..good.clone() },
            ModelId { answers: classes(0), ..good.clone() },
            ModelId { answers: classes(MAX_CLASSES + 1), ..good.clone() },
        ] {
            assert!(keys(bad).is_err());
        }
        assert!(keys(ModelId { answers: classes(MAX_CLASSES), ..good.clone() }).is_ok());
        assert!(keys(ModelId { input: None, ..good }).is_ok(), "inputs of any length");
    }

    #[test]
    fn an_epoch_is_a_key_space_of_its_own() {
        let secret = Secret::new([1; 32]);
        let keys = |epoch| KeySpace::new(&secret, Arc::new(model(1, &[4])), epoch).unwrap();
        let (before, after) = (keys(0), keys(1));
        assert_ne!(before.hash(b"abcd"), after.hash(b"abcd"));
        let value = before.seal(before.hash(b"abcd"), 3);
        assert_eq!(after.open(after.hash(b"abcd"), value), None);
    }

    #[test]
    fn sealed_bytes_open_for_their_row_model_and_secret_only() {
        let home = space(1, 1, &[4]);
        let hash = home.hash(b"abcd");
        let lifetime = Lifetime::new(1_700_000_000, Some(Duration::from_secs(60)));
        for answer in [&b""[..], b"7", &[9; 1000]] {
            let sealed = home.seal_bytes(hash, answer, lifetime);
            assert_eq!(sealed.len(), answer.len() + SEAL_LEN);
            let opened = Some((Bytes::copy_from_slice(answer), lifetime));
            assert_eq!(home.open_bytes(hash, &sealed), opened);
            assert_eq!(home.open_bytes(home.hash(b"abce"), &sealed), None);
            for other in [space(2, 1, &[4]), space(1, 2, &[4]), space(1, 1, &[2, 2])] {
                assert_eq!(other.open_bytes(other.hash(b"abcd"), &sealed), None);
                assert_eq!(other.open_bytes(hash, &sealed), None, "the MAC has a key of its own");
            }
            // The lifetime is covered, too.
            for at in 0..sealed.len() {
                let mut changed = sealed.to_vec();
                changed[at] ^= 1;
                assert_eq!(home.open_bytes(hash, &changed.into()), None, "byte {at}");
            }
            let shorter = sealed.slice(..sealed.len() - 1);
            assert_eq!(home.open_bytes(hash, &shorter), None);
        }
        for len in [0, MAC_LEN - 1, MAC_LEN, SEAL_LEN - 1] {
            assert_eq!(home.open_bytes(hash, &vec![0; len].into()), None);
        }
    }

    #[test]
    fn a_lifetime_ends_to_the_second() {
        let age = |lifetime: Lifetime, now| lifetime.age(now).map(|age| age.as_secs());
        let limited = |ttl| Lifetime::new(1000, Some(Duration::from_millis(ttl)));
        let ages = [(999, Some(0)), (1000, Some(0)), (1059, Some(59)), (1060, None)];
        for (now, expected) in ages {
            assert_eq!(age(limited(60_000), now), expected, "{now}");
        }
        assert_eq!((age(limited(0), 1000), age(limited(0), 1001)), (Some(0), None));
        assert_eq!(age(Lifetime::new(1000, None), u64::MAX), Some(u64::MAX - 1000));
        assert_eq!(age(Lifetime::new(u64::MAX, Some(Duration::MAX)), 0), Some(0));
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
            prop_assert_eq!(home.open(RowHash([0, 0, a, b]), value), None);
        }

        #[test]
        fn rejects_the_value_of_a_nearly_equal_hash(a: u64, b: u64, bit in 16u32..64, label in 0u16..10) {
            // The lowest sixteen bits of `b` are not in the tag.
            let home = space(1, 1, &[4]);
            let value = home.seal(RowHash([0, 0, a, b]), label);
            prop_assert_eq!(home.open(RowHash([0, 0, a, b ^ 1 << bit]), value), None);
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
