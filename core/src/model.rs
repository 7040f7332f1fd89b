//! Identity of a model, under which its answers are stored, and the shape of its input.

use std::fmt;

use arrayvec::ArrayVec;
use sha2::{Digest, Sha256};

/// Bytes of a model's digest (SHA-256).
pub const DIGEST_LEN: usize = 32;

/// The number of labels that 16 bits can distinguish.
pub const MAX_CLASSES: u32 = 1 << 16;

/// The kind of a model's answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum AnswerKind {
    /// Labels below this number: 1 to [`MAX_CLASSES`].
    Label {
        /// The number of classes.
        classes: u32,
    },
    /// Bytes.
    Bytes,
}

/// A model, exactly: two models with one identity give the same answers.
///
/// The digest says which weights answer. A server that states its own digest is believed. For any
/// other the digest is derived from what is known of it ([`ModelId::derived`]); that is weaker,
/// since such a server can replace a model without a trace.
#[derive(Clone, PartialEq, Eq, Hash)]
pub struct ModelId {
    /// The name that requests use. Empty for a server with a single model.
    pub name: String,
    /// The version that answers. Empty where the server has none.
    pub version: String,
    /// The digest. All zeros for a server that states none: then nothing is stored.
    pub digest: [u8; DIGEST_LEN],
    /// The shape of one input, if the model declares it. Inputs of another length are refused.
    pub input: Option<Shape>,
    /// The kind of its answers.
    pub answers: AnswerKind,
}

impl ModelId {
    /// A model without a name that answers with labels.
    pub fn labels(digest: [u8; DIGEST_LEN], input: Option<Shape>, classes: u32) -> Self {
        let (name, version) = (String::new(), String::new());
        ModelId { name, version, digest, input, answers: AnswerKind::Label { classes } }
    }

    /// A model of this name that answers with bytes.
    pub fn bytes(name: impl Into<String>, digest: [u8; DIGEST_LEN]) -> Self {
        let (name, version) = (name.into(), String::new());
        ModelId { name, version, digest, input: None, answers: AnswerKind::Bytes }
    }

    /// The digest of a model whose server states none, from what is known of it: `endpoint`, name,
    /// version, metadata, and an epoch that the operator or a detected change counts up. It does
    /// not cover the weights.
    ///
    /// ```
    /// use afterimage_core::ModelId;
    ///
    /// let digest = |epoch| ModelId::derived("http://triton:8000", "resnet", "1", b"{}", epoch);
    /// assert_eq!(digest(0), digest(0));
    /// assert_ne!(digest(0), digest(1), "a new epoch is a new key space");
    /// ```
    pub fn derived(
        endpoint: &str,
        name: &str,
        version: &str,
        metadata: &[u8],
        epoch: u64,
    ) -> [u8; DIGEST_LEN] {
        let mut hasher = Sha256::new();
        hasher.update(b"afterimage model v1");
        let epoch = epoch.to_le_bytes();
        for part in [endpoint.as_bytes(), name.as_bytes(), version.as_bytes(), metadata, &epoch] {
            hasher.update((part.len() as u64).to_le_bytes());
            hasher.update(part);
        }
        hasher.finalize().into()
    }

    /// Bytes of one input, if the model declares a shape.
    pub fn input_len(&self) -> Option<usize> {
        self.input.as_ref().and_then(Shape::byte_len)
    }

    /// The number of classes of a model that answers with labels, else 0.
    pub fn classes(&self) -> u32 {
        match self.answers {
            AnswerKind::Label { classes } => classes,
            AnswerKind::Bytes => 0,
        }
    }

    /// The reason why answers of this model cannot be stored; `None` if they can.
    pub fn objection(&self) -> Option<String> {
        if self.digest == [0; DIGEST_LEN] {
            return Some(incomplete("no digest of its model"));
        }
        if self.input_len() == Some(0) {
            return Some(incomplete("an input of 0 bytes"));
        }
        match self.answers {
            AnswerKind::Label { classes } if !(1..=MAX_CLASSES).contains(&classes) => {
                Some(incomplete(&format!("{classes} classes")))
            }
            _ => None,
        }
    }
}

/// The text names the missing property and the requirement of the memo.
fn incomplete(found: &str) -> String {
    format!(
        "the classifier reports {found}; a memo requires a model digest other than zero, inputs of \
         at least one byte, and 1 to {MAX_CLASSES} classes"
    )
}

impl fmt::Debug for ModelId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let ModelId { name, version, digest, input, answers } = self;
        write!(f, "ModelId({name:?} {version:?} ")?;
        for byte in &digest[..8] {
            write!(f, "{byte:02x}")?;
        }
        write!(f, "… {input:?} {answers:?})")
    }
}

/// Dimensions of the largest [`Shape`]: batch, channel, row and column of images.
pub const MAX_DIMS: usize = 4;

/// The extent of an input array of bytes, outermost dimension first: `[28, 28]` for a digit.
/// A shape without dimensions means "not known".
///
/// ```
/// let shape = afterimage_core::Shape::new(&[28, 28]).unwrap();
/// assert_eq!((shape.byte_len(), shape.to_string().as_str()), (Some(784), "28×28"));
/// ```
#[derive(Clone, PartialEq, Eq, Hash, Default)]
pub struct Shape(ArrayVec<u32, MAX_DIMS>);

impl Shape {
    /// A shape of these dimensions; `None` for more than [`MAX_DIMS`] of them.
    pub fn new(dims: &[u32]) -> Option<Self> {
        ArrayVec::try_from(dims).ok().map(Shape)
    }

    /// The dimensions, outermost first.
    pub fn dims(&self) -> &[u32] {
        &self.0
    }

    /// Bytes of one input of this shape; `None` when the shape is not known, or the number exceeds
    /// a `usize`.
    pub fn byte_len(&self) -> Option<usize> {
        if self.0.is_empty() {
            return None;
        }
        self.0.iter().try_fold(1usize, |len, &dim| len.checked_mul(dim as usize))
    }
}

impl fmt::Display for Shape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, dim) in self.0.iter().enumerate() {
            write!(f, "{}{dim}", if i == 0 { "" } else { "×" })?;
        }
        Ok(())
    }
}

impl fmt::Debug for Shape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Shape({:?})", self.dims())
    }
}
