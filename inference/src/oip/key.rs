//! The key of a request: one sequence of bytes for all encodings.
//!
//! The key is a head, and then the data of each input in order. The head has everything else: the
//! unknown fields, the parameters, and of each input the name, the datatype, the shape, and the
//! length of its data. Strings and lists have their length before them, so different requests
//! have different keys. The data comes last, so that a reader can hash it while it arrives.
//!
//! Inputs and outputs stay in the order of the request, because a server can depend on it.

use bytes::{BufMut, Bytes};
use smallvec::SmallVec;

use super::fields::{Place, Role, role};
use super::{Extra, Parameters, Request, Tensor, Value};

/// The version of the format. A change of the format changes it, so that keys of different builds
/// differ.
const VERSION: u8 = 1;

/// The key of a request or of a row, in parts that share memory with the request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KeyParts {
    /// Everything but the data.
    pub head: Bytes,
    /// The data of each input, and the spelling of its numbers where it matters.
    pub data: SmallVec<[Bytes; 4]>,
}

impl KeyParts {
    /// The parts in order.
    pub fn iter(&self) -> impl Iterator<Item = &[u8]> {
        std::iter::once(&self.head[..]).chain(self.data.iter().map(|data| &data[..]))
    }

    /// Bytes of all parts.
    #[must_use]
    pub fn total_len(&self) -> usize {
        self.iter().map(<[u8]>::len).sum()
    }

    /// The parts as one sequence of bytes. This copies the data.
    #[must_use]
    pub fn concat(&self) -> Bytes {
        let mut key = Vec::with_capacity(self.total_len());
        self.iter().for_each(|part| key.extend_from_slice(part));
        key.into()
    }
}

/// The head of a key, with the offsets of the lengths that differ from row to row.
pub(super) struct Head {
    pub(super) bytes: Vec<u8>,
    /// For each input, where the lengths of data and of spelling are.
    pub(super) lengths: SmallVec<[usize; 4]>,
}

impl Head {
    /// Writes the head of a request. `rows` replaces the first dimension of each input.
    pub(super) fn write(request: &Request, rows: Option<u64>) -> Head {
        let mut out = Vec::with_capacity(256);
        let mut lengths = SmallVec::new();
        out.push(VERSION);
        put_text(&mut out, request.model.as_deref().unwrap_or_default());
        put_text(&mut out, request.version.as_deref().unwrap_or_default());
        put_parameters(&mut out, &request.parameters, Place::RequestParameter);
        put_extras(&mut out, &request.extras);
        put_count(&mut out, request.inputs.len());
        for input in &request.inputs {
            put_text(&mut out, &input.name);
            out.push(input.datatype.number());
            put_count(&mut out, input.shape.len());
            for (dimension, size) in input.shape.iter().enumerate() {
                out.put_u64_le(rows.filter(|_| dimension == 0).unwrap_or(*size));
            }
            put_parameters(&mut out, &input.parameters, Place::InputParameter);
            put_extras(&mut out, &input.extras);
            lengths.push(out.len());
            put_lengths(&mut out, input);
        }
        put_count(&mut out, request.outputs.len());
        for output in &request.outputs {
            put_text(&mut out, &output.name);
            put_parameters(&mut out, &output.parameters, Place::OutputParameter);
            put_extras(&mut out, &output.extras);
        }
        Head { bytes: out, lengths }
    }

    /// Sets the lengths of an input's data and spelling.
    pub(super) fn set_lengths(&mut self, input: usize, data: usize, spelling: usize) {
        let at = self.lengths[input];
        self.bytes[at..at + 8].copy_from_slice(&(data as u64).to_le_bytes());
        self.bytes[at + 8..at + 16].copy_from_slice(&(spelling as u64).to_le_bytes());
    }
}

/// The key of a request.
pub(super) fn parts(request: &Request) -> KeyParts {
    let head = Head::write(request, None).bytes.into();
    let mut data = SmallVec::new();
    for input in &request.inputs {
        data.push(input.data.clone());
        data.extend(input.spelling.clone());
    }
    KeyParts { head, data }
}

fn put_lengths(out: &mut Vec<u8>, input: &Tensor) {
    out.put_u64_le(input.data.len() as u64);
    out.put_u64_le(input.spelling.as_ref().map_or(0, Bytes::len) as u64);
}

pub(super) fn put_count(out: &mut Vec<u8>, count: usize) {
    out.put_u64_le(count as u64);
}

pub(super) fn put_bytes(out: &mut Vec<u8>, bytes: &[u8]) {
    put_count(out, bytes.len());
    out.put_slice(bytes);
}

pub(super) fn put_text(out: &mut Vec<u8>, text: &str) {
    put_bytes(out, text.as_bytes());
}

fn put_parameters(out: &mut Vec<u8>, parameters: &Parameters, place: Place) {
    let counts = |(name, value): &(&str, &Value)| match role(place, name) {
        // A server that does not know the parameter as scheduling gives it another type.
        Role::Scheduling => value.as_size().is_none(),
        _ => true,
    };
    put_count(out, parameters.iter().filter(counts).count());
    for (name, value) in parameters.iter().filter(counts) {
        put_text(out, name);
        put_value(out, value);
    }
}

pub(super) fn put_value(out: &mut Vec<u8>, value: &Value) {
    match value {
        Value::Bool(value) => out.put_slice(&[0, u8::from(*value)]),
        Value::Int(value) => {
            out.push(1);
            out.put_i64_le(*value);
        }
        Value::Uint(value) => {
            out.push(2);
            out.put_u64_le(*value);
        }
        Value::Double(bits) => {
            out.push(3);
            out.put_u64_le(*bits);
        }
        Value::Spelled(text) => {
            out.push(4);
            put_text(out, text);
        }
        Value::String(text) => {
            out.push(5);
            put_text(out, text);
        }
        Value::Json(value) => {
            out.push(6);
            put_bytes(out, value);
        }
    }
}

pub(super) fn put_extras(out: &mut Vec<u8>, extras: &[Extra]) {
    put_count(out, extras.len());
    for extra in extras {
        match extra {
            Extra::Json(name, value) => {
                out.push(0);
                put_text(out, name);
                put_bytes(out, value);
            }
            Extra::Protobuf(field) => {
                out.push(1);
                put_bytes(out, field);
            }
        }
    }
}
