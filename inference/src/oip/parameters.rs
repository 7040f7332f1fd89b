//! Parameters of requests, inputs and outputs.

use bytes::Bytes;

use super::{Error, field};
use crate::json::{self, Kind, Scanner};

/// The value of a parameter. Servers distinguish the types, so 1, 1.0 and true are different.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Value {
    /// A boolean.
    Bool(bool),
    /// An integer that fits in 64 bits with a sign.
    Int(i64),
    /// An integer without a sign: a larger one, or one of gRPC's own type for it.
    Uint(u64),
    /// The bits of a float.
    Double(u64),
    /// A float that readers of JSON round differently: its spelling.
    Spelled(String),
    /// A string.
    String(String),
    /// Any other JSON value, without white space.
    Json(Bytes),
}

/// Parameters, ordered by name.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Parameters(pub(crate) Vec<(String, Value)>);

impl Parameters {
    /// The value of this name.
    #[must_use]
    pub fn get(&self, name: &str) -> Option<&Value> {
        self.0.iter().find(|(known, _)| known == name).map(|(_, value)| value)
    }

    /// All of them, ordered by name.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &Value)> {
        self.0.iter().map(|(name, value)| (name.as_str(), value))
    }

    /// Whether there is none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Removes the value of this name.
    pub(crate) fn take(&mut self, name: &str) -> Option<Value> {
        let at = self.0.iter().position(|(known, _)| known == name)?;
        Some(self.0.remove(at).1)
    }

    /// Adds a value. The caller has checked that the name is new.
    pub(crate) fn push(&mut self, name: String, value: Value) {
        self.0.push((name, value));
    }

    pub(crate) fn sort(&mut self) {
        self.0.sort_unstable_by(|one, two| one.0.cmp(&two.0));
    }

    /// Reads a JSON object.
    pub(crate) fn scan(scanner: &mut Scanner<'_>) -> Result<Self, Error> {
        let mut parameters = Parameters::default();
        scanner.object(|scanner, name| {
            parameters.push(name.to_owned(), Value::scan(scanner)?);
            Ok(())
        })?;
        parameters.sort();
        Ok(parameters)
    }

    /// Appends `"parameters":{…},` if there is a parameter. `more` is a transport parameter.
    pub(crate) fn write_member(&self, out: &mut Vec<u8>, more: Option<(&str, Value)>) {
        if self.is_empty() && more.is_none() {
            return;
        }
        out.extend_from_slice(b"\"parameters\":");
        let more = more.iter().map(|(name, value)| (*name, value));
        let mut separator = b'{';
        for (name, value) in self.iter().chain(more) {
            out.push(separator);
            separator = b',';
            json::write_string(out, name);
            out.push(b':');
            value.write_json(out);
        }
        out.extend_from_slice(b"},");
    }
}

impl Value {
    fn scan(scanner: &mut Scanner<'_>) -> Result<Self, Error> {
        Ok(match scanner.kind()? {
            Kind::Bool => Value::Bool(scanner.bool()?),
            Kind::String => Value::String(scanner.string()?.into_owned()),
            Kind::Number => {
                let number = scanner.number()?;
                if number.is_negative_zero() {
                    return Err(field("parameters", "servers disagree about -0"));
                }
                if let Some(value) = number.to_i64() {
                    Value::Int(value)
                } else if let Some(value) = number.to_u64() {
                    Value::Uint(value)
                } else if number.is_exact() {
                    Value::Double(number.to_f64().to_bits())
                } else {
                    Value::Spelled(number.text.to_owned())
                }
            }
            Kind::Object | Kind::Array | Kind::Null | Kind::Word => {
                let mut value = Vec::new();
                scanner.copy_value(&mut value)?;
                Value::Json(value.into())
            }
        })
    }

    pub(crate) fn write_json(&self, out: &mut Vec<u8>) {
        match self {
            Value::Bool(value) => out.extend_from_slice(if *value { b"true" } else { b"false" }),
            Value::Int(value) => json::write_integer(out, *value),
            Value::Uint(value) => json::write_integer(out, *value),
            Value::Double(bits) => json::write_float(out, f64::from_bits(*bits)),
            Value::Spelled(text) => out.extend_from_slice(text.as_bytes()),
            Value::String(text) => json::write_string(out, text),
            Value::Json(value) => out.extend_from_slice(value),
        }
    }

    /// The value if it is an integer that is not negative.
    pub(crate) fn as_size(&self) -> Option<usize> {
        match self {
            Value::Int(value) => usize::try_from(*value).ok(),
            Value::Uint(value) => usize::try_from(*value).ok(),
            _ => None,
        }
    }
}
