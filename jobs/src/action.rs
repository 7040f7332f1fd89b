//! The identity of a computation: the key under which its result is remembered.

use std::fmt;

use sha2::{Digest as _, Sha256};

/// The digest of a worker's code. Results of one code never answer for another one.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Code(pub [u8; 32]);

impl Code {
    /// The code that these parts make, for example the text of a program and its arguments.
    #[must_use]
    pub fn of(parts: &[&[u8]]) -> Self {
        Code(hash("afterimage-jobs code 1", parts))
    }
}

impl fmt::Debug for Code {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0[..6].iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Display for Code {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self, f)
    }
}

/// A definition, its version, and the bytes of an input. Two jobs with one action in flight run
/// once.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Action(pub [u8; 32]);

/// An action and the code that ran it. Its result is remembered under this key.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ResultKey(pub [u8; 32]);

impl Action {
    /// The action of a definition on an input.
    #[must_use]
    pub fn new(definition: &str, version: u32, input: &[u8]) -> Self {
        let parts = [definition.as_bytes(), &version.to_le_bytes(), input];
        Action(hash("afterimage-jobs action 1", &parts))
    }

    /// The key of its result, if this code runs it.
    #[must_use]
    pub fn by(&self, code: Code) -> ResultKey {
        ResultKey(hash("afterimage-jobs result 1", &[&self.0, &code.0]))
    }
}

impl ResultKey {
    /// The first 64 bits: the key of the index in memory. The store has all bits.
    pub(crate) fn short(&self) -> u64 {
        short(&self.0)
    }
}

/// The first 64 bits of the digest of an output. Two outputs of one action are compared by it.
pub(crate) fn output_digest(output: &[u8]) -> u64 {
    short(&hash("afterimage-jobs output 1", &[output]))
}

fn short(digest: &[u8; 32]) -> u64 {
    let [a, b, c, d, e, f, g, h, ..] = *digest;
    u64::from_le_bytes([a, b, c, d, e, f, g, h])
}

/// SHA-256 over a purpose and parts, each with its length before it.
fn hash(purpose: &str, parts: &[&[u8]]) -> [u8; 32] {
    let mut sha = Sha256::new();
    for part in [purpose.as_bytes()].iter().chain(parts) {
        sha.update((part.len() as u64).to_le_bytes());
        sha.update(part);
    }
    sha.finalize().into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_part_changes_the_key_and_boundaries_count() {
        let code = Code::of(&[b"code"]);
        let key =
            |definition, version, input: &[u8]| Action::new(definition, version, input).by(code);
        let keys = [
            key("ab", 1, b"c"),
            key("a", 1, b"bc"),
            key("ab", 2, b"c"),
            key("ab", 1, b"d"),
            Action::new("ab", 1, b"c").by(Code::of(&[b"co", b"de"])),
        ];
        for (i, one) in keys.iter().enumerate() {
            assert!(keys[i + 1..].iter().all(|other| one != other), "{i}");
        }
    }

    /// Computed with Python's hashlib from the description above.
    #[test]
    fn keys_do_not_change_between_versions() {
        let key = Action::new("swap", 1, b"input").by(Code::of(&[b"program"]));
        let hex: String = key.0[..8].iter().map(|byte| format!("{byte:02x}")).collect();
        assert_eq!(hex, "6040ab1dc273f549");
    }
}
