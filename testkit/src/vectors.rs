//! The golden vectors of the protocol, read from `wire/vectors`.

use std::fs;
use std::path::Path;

use serde_json::Value;

/// One golden vector: a frame, or bytes that are not a valid frame.
#[derive(Clone, Debug)]
pub struct Vector {
    /// The whole JSON object. `wire/vectors/README.md` describes its keys.
    pub json: Value,
}

impl Vector {
    /// All valid vectors.
    #[must_use]
    pub fn valid() -> Vec<Vector> {
        read("valid.jsonl")
    }

    /// All invalid vectors.
    #[must_use]
    pub fn invalid() -> Vec<Vector> {
        read("invalid.jsonl")
    }

    /// The only vector of `vectors` with this name.
    ///
    /// # Panics
    /// Without such a vector.
    #[must_use]
    pub fn named(vectors: &[Vector], name: &str) -> Vector {
        let found = vectors.iter().find(|vector| vector.name() == name);
        found.unwrap_or_else(|| panic!("no vector has the name {name}")).clone()
    }

    /// The name, unique among the valid or the invalid vectors.
    #[must_use]
    pub fn name(&self) -> &str {
        self.text("name")
    }

    /// The name and the comment, for a test's message.
    #[must_use]
    pub fn about(&self) -> String {
        format!("{}: {}", self.name(), self.text("comment"))
    }

    /// The text of a key.
    #[must_use]
    pub fn text(&self, key: &str) -> &str {
        self.json[key].as_str().unwrap_or_else(|| panic!("{key} is not a text in {}", self.json))
    }

    /// The bytes of the frame.
    #[must_use]
    pub fn bytes(&self) -> Vec<u8> {
        let digits = self.text("hex").as_bytes();
        assert_eq!(digits.len() % 2, 0, "{} has an odd number of digits", self.name());
        let pairs = digits.chunks(2).map(|pair| str::from_utf8(pair).unwrap());
        pairs.map(|pair| u8::from_str_radix(pair, 16).expect("hexadecimal digits")).collect()
    }

    /// The receiver's limit on bodies (invalid vectors only).
    #[must_use]
    pub fn max_body(&self) -> u32 {
        let max_body = self.json["max_body"].as_u64().expect("an invalid vector has max_body");
        max_body.try_into().expect("max_body is a u32")
    }
}

fn read(file: &str) -> Vec<Vector> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../wire/vectors").join(file);
    let text = fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    let vectors: Vec<Vector> = text
        .lines()
        .map(|line| Vector { json: serde_json::from_str(line).expect("each line is JSON") })
        .collect();
    assert!(vectors.len() > 50, "{} has {} vectors only", path.display(), vectors.len());
    vectors
}
