//! Responses.

use bytes::Bytes;

use super::{
    Encoded, Error, Extra, Form, OutputEncoding, Parameters, Tensor, grpc, http, rows, stored,
};

/// A response to a request for inference.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Response {
    /// The model's name.
    pub model: Option<String>,
    /// The model's version.
    pub version: Option<String>,
    /// The id. It is not stored.
    pub id: Option<String>,
    /// The parameters.
    pub parameters: Parameters,
    /// The outputs, in the order of the response.
    pub outputs: Vec<Tensor>,
    /// Unknown fields.
    pub extras: Vec<Extra>,
}

impl Response {
    /// Reads the body of a response over HTTP. `json_len` is the header
    /// `Inference-Header-Content-Length`.
    ///
    /// # Errors
    /// If the body is not understood in full. Forward it unchanged, and do not store it.
    pub fn parse(body: Bytes, json_len: Option<usize>) -> Result<Self, Error> {
        http::parse_response(&body, json_len)
    }

    /// Reads the `ModelInferResponse` of a gRPC call. The outputs share the memory of the message.
    ///
    /// # Errors
    /// If the message is not understood in full. Forward it unchanged, and do not store it.
    pub fn parse_grpc(message: Bytes) -> Result<Self, Error> {
        grpc::parse_response(&message)
    }

    /// The stored form: everything but the id.
    #[must_use]
    pub fn to_bytes(&self) -> Bytes {
        stored::write(self)
    }

    /// Reads the stored form. The outputs share its memory.
    ///
    /// # Errors
    /// If it is damaged, or of another version.
    pub fn from_bytes(bytes: Bytes) -> Result<Self, Error> {
        stored::read(&bytes)
    }

    /// Writes the body of a response over HTTP, with the id of the request that it answers. `None`
    /// if a wanted JSON output cannot be JSON (16-bit floats, bytes that are not UTF-8), or if a
    /// field is known to gRPC only.
    #[must_use]
    pub fn render(&self, id: Option<&str>, wanted: &OutputEncoding) -> Option<Encoded> {
        http::write_response(self, id, wanted)
    }

    /// Writes the `ModelInferResponse` of a gRPC call, with the id of the request that it answers.
    /// [`Form::Typed`] puts the outputs into typed contents, unless one of them has 16-bit floats;
    /// any other form is raw contents. `None` if a field is known to JSON only.
    #[must_use]
    pub fn render_grpc(&self, id: Option<&str>, form: Form) -> Option<Bytes> {
        grpc::write_response(self, id, form)
    }

    /// The responses to the single rows of a request with `rows` rows. `None` unless each output
    /// has this number as its first dimension.
    #[must_use]
    pub fn split_rows(&self, rows: usize) -> Option<Vec<Response>> {
        rows::split(self, rows)
    }

    /// The response to several rows, in order, from the responses to each. `None` if they differ in
    /// anything but the data.
    #[must_use]
    pub fn assemble<'a>(rows: impl IntoIterator<Item = &'a Response>) -> Option<Response> {
        rows::assemble(rows)
    }
}
