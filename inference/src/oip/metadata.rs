//! What a server says about itself and its models, in JSON and in gRPC.

use bytes::Bytes;
use serde_json::{Value, json};

use super::grpc::{parse_named, put_len, put_text, put_varint};
use super::{Datatype, Error};

/// The server: `GET /v2`, or `ServerMetadata`.
#[derive(Clone, Copy, Debug)]
pub struct ServerMetadata {
    /// The name of the program.
    pub name: &'static str,
    /// The version of the program.
    pub version: &'static str,
    /// Extensions of the protocol that the server has.
    pub extensions: &'static [&'static str],
}

impl ServerMetadata {
    /// The JSON object.
    #[must_use]
    pub fn to_json(&self) -> Value {
        json!({ "name": self.name, "version": self.version, "extensions": self.extensions })
    }

    /// The message `ServerMetadataResponse`.
    #[must_use]
    pub fn to_grpc(&self) -> Vec<u8> {
        let mut out = Vec::new();
        put_text(&mut out, 1, self.name);
        put_text(&mut out, 2, self.version);
        self.extensions.iter().for_each(|extension| put_text(&mut out, 3, extension));
        out
    }
}

/// A model: `GET /v2/models/NAME`, or `ModelMetadata`.
#[derive(Clone, Debug)]
pub struct ModelMetadata {
    /// The model's name.
    pub name: String,
    /// The versions that can be asked.
    pub versions: Vec<String>,
    /// The framework or program that runs the model.
    pub platform: &'static str,
    /// The inputs of a request.
    pub inputs: Vec<TensorMetadata>,
    /// The outputs of a response.
    pub outputs: Vec<TensorMetadata>,
}

/// An input or an output of a model.
#[derive(Clone, Debug)]
pub struct TensorMetadata {
    /// The tensor's name.
    pub name: &'static str,
    /// The type of its elements.
    pub datatype: Datatype,
    /// Its dimensions; -1 for one of any size.
    pub shape: Vec<i64>,
}

impl TensorMetadata {
    fn to_json(&self) -> Value {
        json!({ "name": self.name, "datatype": self.datatype.name(), "shape": self.shape })
    }

    fn to_grpc(&self) -> Vec<u8> {
        let (mut out, mut shape) = (Vec::new(), Vec::new());
        put_text(&mut out, 1, self.name);
        put_text(&mut out, 2, self.datatype.name());
        // A negative `int64` is written as its two's complement.
        self.shape.iter().for_each(|&dim| put_varint(&mut shape, dim.cast_unsigned()));
        put_len(&mut out, 3, &shape);
        out
    }
}

impl ModelMetadata {
    /// The JSON object.
    #[must_use]
    pub fn to_json(&self) -> Value {
        let tensors = |of: &[TensorMetadata]| of.iter().map(TensorMetadata::to_json).collect();
        let (inputs, outputs): (Vec<_>, Vec<_>) = (tensors(&self.inputs), tensors(&self.outputs));
        json!({
            "name": self.name,
            "versions": self.versions,
            "platform": self.platform,
            "inputs": inputs,
            "outputs": outputs,
        })
    }

    /// The message `ModelMetadataResponse`.
    #[must_use]
    pub fn to_grpc(&self) -> Vec<u8> {
        let mut out = Vec::new();
        put_text(&mut out, 1, &self.name);
        self.versions.iter().for_each(|version| put_text(&mut out, 2, version));
        put_text(&mut out, 3, self.platform);
        self.inputs.iter().for_each(|tensor| put_len(&mut out, 4, &tensor.to_grpc()));
        self.outputs.iter().for_each(|tensor| put_len(&mut out, 5, &tensor.to_grpc()));
        out
    }
}

/// The name and the version in a message that asks about a model, such as `ModelReadyRequest`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ModelName {
    /// The name; `None` if it is empty.
    pub name: Option<String>,
    /// The version; `None` if it is empty: the server chooses one.
    pub version: Option<String>,
}

impl ModelName {
    /// Reads the message. Fields other than 1 and 2 are skipped.
    ///
    /// # Errors
    /// If the bytes are not a message, or name or version is not UTF-8 or comes twice.
    pub fn parse_grpc(message: &Bytes) -> Result<Self, Error> {
        let (name, version) = parse_named(message)?;
        Ok(ModelName { name, version })
    }
}

/// A message with one `bool` as its field 1, such as `ServerReadyResponse`.
#[must_use]
pub fn flag_message(value: bool) -> Vec<u8> {
    // Protobuf leaves `false` out.
    if value { vec![1 << 3, 1] } else { Vec::new() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_model_is_described_alike_in_both_encodings() {
        let tensor = |name, shape| TensorMetadata { name, datatype: Datatype::Uint8, shape };
        let model = ModelMetadata {
            name: "m".to_owned(),
            versions: vec!["1".to_owned()],
            platform: "p",
            inputs: vec![tensor("i", vec![-1, 300])],
            outputs: vec![],
        };
        let json = model.to_json();
        assert_eq!(json["inputs"][0]["shape"], json!([-1, 300]));
        assert_eq!(json["outputs"], json!([]));
        let input =
            b"\x0a\x01i\x12\x05UINT8\x1a\x0c\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01\xac\x02";
        let head = b"\x0a\x01m\x12\x011\x1a\x01p\x22\x18";
        assert_eq!(model.to_grpc(), [&head[..], &input[..]].concat());
    }

    #[test]
    fn a_name_is_read_and_empty_means_missing() {
        let read = |bytes: &'static [u8]| ModelName::parse_grpc(&Bytes::from_static(bytes));
        let named = read(b"\x0a\x01m\x12\x013\x18\x07").unwrap();
        assert_eq!(named, ModelName { name: Some("m".into()), version: Some("3".into()) });
        assert_eq!(read(b"\x0a\x00").unwrap(), ModelName::default());
        assert_eq!(read(b"").unwrap(), ModelName::default());
        for wrong in [&b"\x0a\x02m"[..], b"\x0a\x01\xff", b"\x08\x01", b"\x0a\x01m\x0a\x01n"] {
            assert!(read(wrong).is_err(), "{wrong:?}");
        }
    }
}
