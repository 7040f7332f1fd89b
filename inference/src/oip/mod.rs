//! Requests and responses of the Open Inference Protocol v2, independent of their encoding.
//!
//! JSON, JSON with binary tensors, and gRPC of one request give the same [`Request`] and the same
//! [key](Request::key_parts). A [`Response`] is stored once and rendered in the encoding that the
//! client asked for.
//!
//! A body that is unusual is an [`Error`], never a guess: the proxy forwards it unchanged, and the
//! server decides. So a construct that this module does not know cannot lead to a wrong answer.
//!
//! ```
//! use afterimage_inference::oip::Request;
//!
//! let json = r#"{"id": "7", "inputs": [
//!     {"name": "x", "datatype": "FP32", "shape": [1, 2], "data": [0.5, 1]}]}"#;
//! let nested = r#"{"inputs": [
//!     {"name": "x", "shape": [1, 2], "datatype": "FP32", "data": [[5e-1, 1.0]]}]}"#;
//! let one = Request::parse(json.into(), None)?;
//! let two = Request::parse(nested.into(), None)?;
//! assert_eq!(one.id(), Some("7"));
//! assert_eq!(one.key_bytes(), two.key_bytes());
//! # Ok::<(), afterimage_inference::oip::Error>(())
//! ```

mod datatype;
mod fields;
mod grpc;
mod http;
mod key;
mod metadata;
mod parameters;
mod request;
mod response;
mod rows;
mod stored;
mod tensor;

pub use datatype::Datatype;
pub use fields::{FIELDS, Field, Place, Role};
pub use key::KeyParts;
pub use metadata::{ModelMetadata, ModelName, ServerMetadata, TensorMetadata, flag_message};
pub use parameters::{Parameters, Value};
pub use request::{Encoding, OutputEncoding, Refusal, Request, RequestedOutput};
pub use response::Response;
pub use rows::Rows;
pub(crate) use stored::Reader;
pub use tensor::{Form, Tensor};

use bytes::Bytes;

/// Messages of protobuf, scanned in place.
pub(crate) mod protobuf {
    pub(crate) use super::grpc::{Message, Payload, put_len, put_varint};
}

/// A body and, if binary tensors follow the JSON, the length of the JSON
/// (`Inference-Header-Content-Length`).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Encoded {
    /// The body.
    pub body: Bytes,
    /// The length of the JSON at its start; `None` if the whole body is JSON.
    pub json_len: Option<usize>,
}

/// A field that a tensor, a request or a response has and that this module does not know.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Extra {
    /// A member of a JSON object: its key, and its value in one form.
    Json(String, Bytes),
    /// A protobuf field with its tag.
    Protobuf(Bytes),
}

/// A body that is not understood. Forward it unchanged: the server decides.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The text is not the JSON of a request or response.
    #[error("byte {offset} of the JSON: expected {expected}")]
    Json {
        /// The offset in the JSON.
        offset: usize,
        /// The expected text.
        expected: &'static str,
    },
    /// The bytes are not the protobuf message.
    #[error("byte {offset} of the message: expected {expected}")]
    Protobuf {
        /// The offset in the message.
        offset: usize,
        /// The expected bytes.
        expected: &'static str,
    },
    /// A field is missing, or servers disagree about its value.
    #[error("field {field}: {reason}")]
    Field {
        /// The name of the field.
        field: &'static str,
        /// The reason why it is refused.
        reason: &'static str,
    },
    /// Stored bytes are not a response.
    #[error("the stored response is damaged")]
    Stored,
}

/// The greatest difference between the numbers of two stored responses, absolute and in relation to
/// the greatest number of its tensor. `None` if they differ in anything else.
pub(crate) fn distance(one: &Bytes, two: &Bytes) -> Option<(f64, f64)> {
    let read = |bytes: &Bytes| Response::from_bytes(bytes.clone()).ok();
    rows::distance(&read(one)?, &read(two)?)
}

pub(crate) fn field(field: &'static str, reason: &'static str) -> Error {
    Error::Field { field, reason }
}
