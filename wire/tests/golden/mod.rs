//! The golden vectors, read from `vectors/`.

#![allow(dead_code)] // Each test that includes this file uses a part of it.

use std::fs;
use std::path::Path;

use afterimage_wire::proto::Frame;
use serde_json::Value;

/// One file: its name without the ending, and what it says.
pub(crate) struct Vector {
    pub(crate) name: String,
    pub(crate) json: Value,
}

impl Vector {
    pub(crate) fn all(folder: &str) -> Vec<Vector> {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("vectors").join(folder);
        let mut vectors: Vec<Vector> = fs::read_dir(&folder)
            .expect("the folder of vectors is there")
            .map(|entry| entry.expect("its entries can be read").path())
            .map(|path| {
                let name = path.file_stem().expect("a file has a name");
                let text = fs::read(&path).expect("a vector can be read");
                Vector {
                    name: name.to_string_lossy().into_owned(),
                    json: serde_json::from_slice(&text).expect("a vector is JSON"),
                }
            })
            .collect();
        vectors.sort_by(|a, b| a.name.cmp(&b.name));
        assert!(vectors.len() > 50, "{} holds the vectors", folder.display());
        vectors
    }

    pub(crate) fn one(folder: &str, name: &str) -> Vector {
        let mut all = Vector::all(folder);
        all.retain(|vector| vector.name == name);
        all.pop().expect("there is a vector of this name")
    }

    pub(crate) fn text(&self, key: &str) -> &str {
        self.json[key].as_str().expect("this key holds a text")
    }

    pub(crate) fn bytes(&self) -> Vec<u8> {
        let digits = self.text("hex").as_bytes();
        assert_eq!(digits.len() % 2, 0, "{}: odd number of digits", self.name);
        digits
            .chunks(2)
            .map(|pair| {
                let pair = str::from_utf8(pair).expect("hex is ASCII");
                u8::from_str_radix(pair, 16).expect("hex has hex digits only")
            })
            .collect()
    }

    pub(crate) fn max_body(&self) -> u32 {
        let max_body = self.json["max_body"].as_u64().expect("max_body is there");
        max_body.try_into().expect("max_body fits")
    }

    pub(crate) fn about(&self) -> String {
        format!("{}: {}", self.name, self.text("about"))
    }
}

pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

pub(crate) fn decode(bytes: &[u8]) -> Frame<'_> {
    let frame = Frame::decode(bytes, u32::MAX).expect("no body is above this limit");
    frame.expect("the vector is a whole frame")
}
