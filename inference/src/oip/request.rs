//! Requests.

use std::fmt;

use bytes::Bytes;

use super::fields::{Place, Role, role};
use super::key::{self, KeyParts};
use super::rows::Rows;
use super::tensor::Form;
use super::{Encoded, Error, Extra, Parameters, Tensor, Value, grpc, http};

/// A request for inference.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Request {
    /// The id of the request, which the response repeats.
    pub id: Option<String>,
    /// The name of the model, if the body has one. It is part of the key: see
    /// [`for_model`](Self::for_model).
    pub model: Option<String>,
    /// The version of the model, if the message has one. It is part of the key: see
    /// [`take_model`](Self::take_model).
    pub version: Option<String>,
    /// The parameters, without those of the transport.
    pub parameters: Parameters,
    /// The inputs, in the order of the request.
    pub inputs: Vec<Tensor>,
    /// The requested outputs, in the order of the request. Empty for all outputs.
    pub outputs: Vec<RequestedOutput>,
    /// Unknown fields.
    pub extras: Vec<Extra>,
    /// `binary_data_output`: whether outputs without a choice of their own are binary.
    pub binary_output: Option<bool>,
}

/// An output that a request asks for.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct RequestedOutput {
    /// The name.
    pub name: String,
    /// The parameters, without those of the transport.
    pub parameters: Parameters,
    /// Unknown fields.
    pub extras: Vec<Extra>,
    /// `binary_data`: whether the output is binary.
    pub binary: Option<bool>,
}

/// Why the response to a request is never stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Refusal {
    /// The model keeps state between the requests of a sequence.
    Sequence,
    /// Inputs or outputs are in memory that the request does not contain.
    SharedMemory,
    /// The client expects a stream of responses.
    Stream,
    /// The answer is drawn at random: a temperature and no seed.
    Sampling,
}

impl Refusal {
    /// One word for logs, metrics and `Cache-Status`.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Refusal::Sequence => "sequence",
            Refusal::SharedMemory => "shared-memory",
            Refusal::Stream => "stream",
            Refusal::Sampling => "sampling",
        }
    }
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// How to write the inputs of a request over HTTP.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Encoding {
    /// Each input in the form in which it arrived.
    #[default]
    AsReceived,
    /// As JSON where JSON can hold the elements.
    Json,
    /// As bytes behind the JSON, except numbers whose spelling matters.
    Binary,
}

/// Which outputs a client wants as binary tensors.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct OutputEncoding {
    /// For outputs that are not in `outputs`.
    pub binary: bool,
    /// For single outputs, by name.
    pub outputs: Vec<(String, bool)>,
}

impl OutputEncoding {
    /// All outputs as JSON.
    #[must_use]
    pub fn json() -> Self {
        OutputEncoding::default()
    }

    /// All outputs as binary tensors.
    #[must_use]
    pub fn binary() -> Self {
        OutputEncoding { binary: true, outputs: Vec::new() }
    }

    /// Whether an output is binary.
    #[must_use]
    pub fn is_binary(&self, output: &str) -> bool {
        let own = self.outputs.iter().find(|(name, _)| name == output);
        own.map_or(self.binary, |(_, binary)| *binary)
    }
}

impl Request {
    /// Reads the body of a request over HTTP. `json_len` is the header
    /// `Inference-Header-Content-Length`: the length of the JSON before the binary tensors.
    ///
    /// # Errors
    /// If the body is not understood in full. Forward it unchanged.
    pub fn parse(body: Bytes, json_len: Option<usize>) -> Result<Self, Error> {
        http::parse_request(&body, json_len)
    }

    /// Reads the `ModelInferRequest` of a gRPC call. The inputs share the memory of the message.
    ///
    /// # Errors
    /// If the message is not understood in full. Forward it unchanged.
    pub fn parse_grpc(message: Bytes) -> Result<Self, Error> {
        grpc::parse_request(&message)
    }

    /// The id of the request.
    #[must_use]
    pub fn id(&self) -> Option<&str> {
        self.id.as_deref()
    }

    /// The same request to a model that is already known, for example from the path. A body that
    /// repeats the model's name then has the same key as one without it.
    #[must_use]
    pub fn for_model(mut self, name: &str) -> Self {
        if self.model.as_deref() == Some(name) {
            self.model = None;
        }
        self
    }

    /// Takes name and version of the model out of a message of gRPC. An HTTP request has them in
    /// its path. The key is then the same for both; keep the model apart.
    pub fn take_model(&mut self) -> (Option<String>, Option<String>) {
        (self.model.take(), self.version.take())
    }

    /// The key, without a copy of the data: everything that can change the answer, the same for all
    /// encodings. The model of the path is not part of it.
    #[must_use]
    pub fn key_parts(&self) -> KeyParts {
        key::parts(self)
    }

    /// [`key_parts`](Self::key_parts) as one sequence of bytes.
    #[must_use]
    pub fn key_bytes(&self) -> Bytes {
        self.key_parts().concat()
    }

    /// Why the response must not be stored; `None` if it can be.
    #[must_use]
    pub fn refusal(&self) -> Option<Refusal> {
        let own = self.parameters.iter().map(|(name, _)| (Place::RequestParameter, name));
        let inputs = self.inputs.iter().flat_map(|input| {
            input.parameters.iter().map(|(name, _)| (Place::InputParameter, name))
        });
        let outputs = self.outputs.iter().flat_map(|output| {
            output.parameters.iter().map(|(name, _)| (Place::OutputParameter, name))
        });
        let refused =
            own.chain(inputs).chain(outputs).find_map(|(place, name)| match role(place, name) {
                Role::Sequence => Some(Refusal::Sequence),
                Role::SharedMemory => Some(Refusal::SharedMemory),
                Role::Stream => Some(Refusal::Stream),
                _ => None,
            });
        refused.or_else(|| self.is_sampled().then_some(Refusal::Sampling))
    }

    fn is_sampled(&self) -> bool {
        let is_zero = |value: &Value| match value {
            Value::Int(value) => *value == 0,
            Value::Uint(value) => *value == 0,
            Value::Double(bits) => f64::from_bits(*bits) == 0.0,
            _ => false,
        };
        self.parameters.get("temperature").is_some_and(|value| !is_zero(value))
            && self.parameters.get("seed").is_none()
            && self.parameters.get("random_seed").is_none()
    }

    /// The rows, if all inputs have the same first dimension and it is not 0.
    #[must_use]
    pub fn split_rows(&self) -> Option<Rows> {
        Rows::of(self)
    }

    /// How the client wants the outputs.
    #[must_use]
    pub fn wanted_encoding(&self) -> OutputEncoding {
        let own = |output: &RequestedOutput| Some((output.name.clone(), output.binary?));
        OutputEncoding {
            binary: self.binary_output.unwrap_or(false),
            outputs: self.outputs.iter().filter_map(own).collect(),
        }
    }

    /// Whether an input arrived as binary data.
    #[must_use]
    pub fn is_binary(&self) -> bool {
        self.inputs.iter().any(|input| input.form == Form::Binary)
    }

    /// Writes the `ModelInferRequest` of a gRPC call. `None` if a field has no form in gRPC: an
    /// unknown field of JSON, or a number whose spelling matters.
    #[must_use]
    pub fn to_grpc(&self) -> Option<Bytes> {
        grpc::write_request(self)
    }

    /// Writes the body of a request over HTTP. `None` if a field has no form in JSON: an unknown
    /// field of gRPC.
    #[must_use]
    pub fn to_http(&self, encoding: Encoding) -> Option<Encoded> {
        http::write_request(self, encoding)
    }
}
