//! Requests for embeddings.

use bytes::{BufMut, Bytes};

use crate::json::{self, Kind, Scanner};
use crate::oip::{Error, field};

/// The version of the key's format.
const VERSION: u8 = 1;

/// A request for embeddings.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Request {
    /// The name of the model.
    pub model: Option<String>,
    /// The inputs, in the order of the request. All are of one kind.
    pub inputs: Vec<Input>,
    /// Whether the input is not in a list.
    pub is_single: bool,
    /// The format of the embeddings in the response.
    pub format: Format,
    /// The client's user. It does not change the answer.
    pub user: Option<String>,
    /// All other fields, ordered by name: the values are JSON without white space.
    pub extras: Vec<(String, Bytes)>,
    /// Whether the body has a format.
    has_format: bool,
}

/// One input.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Input {
    /// A text.
    Text(String),
    /// A list of tokens.
    Tokens(Vec<u64>),
}

impl Input {
    /// The number of tokens in the request; `None` for a text.
    pub(crate) fn token_count(&self) -> Option<u64> {
        match self {
            Input::Text(_) => None,
            Input::Tokens(tokens) => Some(tokens.len() as u64),
        }
    }
}

/// The format of embeddings in a response.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Format {
    /// A JSON list of numbers.
    #[default]
    Float,
    /// The numbers as base64 of 32-bit floats, little-endian.
    Base64,
}

impl Request {
    /// Reads the body of a request.
    ///
    /// # Errors
    /// If the body is not understood in full. Forward it unchanged.
    pub fn parse(body: &[u8]) -> Result<Self, Error> {
        let mut scanner = Scanner::new(text(body)?);
        let mut request = Request {
            model: None,
            inputs: Vec::new(),
            is_single: false,
            format: Format::Float,
            user: None,
            extras: Vec::new(),
            has_format: false,
        };
        scanner.object(|scanner, key| {
            match (key, scanner.kind()?) {
                ("model", Kind::String) => request.model = Some(scanner.string()?.into_owned()),
                ("user", Kind::String) => request.user = Some(scanner.string()?.into_owned()),
                ("input", kind) => request.scan_input(scanner, kind)?,
                (_, kind) => {
                    let format = scan_format(&mut scanner.clone(), key, kind);
                    let mut value = Vec::new();
                    scanner.copy_value(&mut value)?;
                    match format {
                        Some(format) => (request.format, request.has_format) = (format, true),
                        None => request.extras.push((key.to_owned(), value.into())),
                    }
                }
            }
            Ok(())
        })?;
        scanner.end()?;
        if request.inputs.is_empty() {
            return Err(field("input", "missing or empty"));
        }
        request.extras.sort();
        Ok(request)
    }

    fn scan_input(&mut self, scanner: &mut Scanner<'_>, kind: Kind) -> Result<(), Error> {
        if kind == Kind::String {
            self.is_single = true;
            self.inputs.push(Input::Text(scanner.string()?.into_owned()));
            return Ok(());
        }
        let mut tokens = Vec::new();
        scanner.array(|scanner| {
            match scanner.kind()? {
                Kind::Number => tokens.push(scan_token(scanner)?),
                Kind::String => {
                    self.inputs.push(Input::Text(scanner.string()?.into_owned()));
                }
                _ => {
                    let mut tokens = Vec::new();
                    scanner.array(|scanner| {
                        tokens.push(scan_token(scanner)?);
                        Ok(())
                    })?;
                    self.inputs.push(Input::Tokens(tokens));
                }
            }
            Ok(())
        })?;
        if !tokens.is_empty() {
            if !self.inputs.is_empty() {
                return Err(field("input", "tokens beside other inputs"));
            }
            self.is_single = true;
            self.inputs.push(Input::Tokens(tokens));
        }
        let is_text = |input: &Input| matches!(input, Input::Text(_));
        let texts = self.inputs.iter().filter(|input| is_text(input)).count();
        if texts != 0 && texts != self.inputs.len() {
            return Err(field("input", "texts beside tokens"));
        }
        Ok(())
    }

    /// The key of one row: everything that can change its embedding. It does not depend on the
    /// other rows.
    ///
    /// # Panics
    /// If there is no such row.
    #[must_use]
    pub fn key_bytes(&self, row: usize) -> Bytes {
        let mut key = Vec::with_capacity(128);
        key.push(VERSION);
        put(&mut key, self.model.as_deref().unwrap_or_default().as_bytes());
        key.put_u64_le(self.extras.len() as u64);
        for (name, value) in &self.extras {
            put(&mut key, name.as_bytes());
            put(&mut key, value);
        }
        match &self.inputs[row] {
            Input::Text(text) => {
                key.push(0);
                put(&mut key, text.as_bytes());
            }
            Input::Tokens(tokens) => {
                key.push(1);
                tokens.iter().for_each(|token| key.put_u64_le(*token));
            }
        }
        key.into()
    }

    /// The request for these rows, in this order. A list stays a list, so that `["a"]` does not
    /// become `"a"`, and `[[5]]` does not become `[5]`.
    ///
    /// # Panics
    /// If there is no such row.
    #[must_use]
    pub fn select(&self, rows: &[usize]) -> Request {
        let inputs = rows.iter().map(|row| self.inputs[*row].clone()).collect();
        Request { inputs, is_single: self.is_single && rows.len() == 1, ..self.clone() }
    }

    /// Writes the body.
    #[must_use]
    pub fn to_json(&self) -> Bytes {
        let mut out = Vec::with_capacity(256);
        out.push(b'{');
        for (name, text) in [("model", &self.model), ("user", &self.user)] {
            if let Some(text) = text {
                json::write_string(&mut out, name);
                out.push(b':');
                json::write_string(&mut out, text);
                out.push(b',');
            }
        }
        if self.has_format {
            out.extend_from_slice(match self.format {
                Format::Float => b"\"encoding_format\":\"float\",",
                Format::Base64 => b"\"encoding_format\":\"base64\",",
            });
        }
        for (name, value) in &self.extras {
            json::write_string(&mut out, name);
            out.push(b':');
            out.extend_from_slice(value);
            out.push(b',');
        }
        out.extend_from_slice(b"\"input\":");
        if !self.is_single {
            out.push(b'[');
        }
        for (at, input) in self.inputs.iter().enumerate() {
            if at > 0 {
                out.push(b',');
            }
            match input {
                Input::Text(text) => json::write_string(&mut out, text),
                Input::Tokens(tokens) => {
                    out.push(b'[');
                    for (at, token) in tokens.iter().enumerate() {
                        if at > 0 {
                            out.push(b',');
                        }
                        json::write_integer(&mut out, *token);
                    }
                    out.push(b']');
                }
            }
        }
        out.extend_from_slice(if self.is_single { b"}" } else { b"]}" });
        out.into()
    }
}

/// A known format; other formats are part of the key.
fn scan_format(scanner: &mut Scanner<'_>, key: &str, kind: Kind) -> Option<Format> {
    if key != "encoding_format" || kind != Kind::String {
        return None;
    }
    match &*scanner.string().ok()? {
        "float" => Some(Format::Float),
        "base64" => Some(Format::Base64),
        _ => None,
    }
}

fn scan_token(scanner: &mut Scanner<'_>) -> Result<u64, Error> {
    let number = scanner.number()?;
    let token = number.to_u64().filter(|_| !number.negative);
    token.ok_or_else(|| field("input", "not a token"))
}

fn put(out: &mut Vec<u8>, bytes: &[u8]) {
    out.put_u64_le(bytes.len() as u64);
    out.put_slice(bytes);
}

/// The text of a body.
pub(super) fn text(body: &[u8]) -> Result<&str, Error> {
    str::from_utf8(body)
        .map_err(|error| Error::Json { offset: error.valid_up_to(), expected: "UTF-8" })
}
