//! The stored form of a response.
//!
//! All fields but the data, then the data of each output. Integers are little-endian; strings and
//! lists have their length before them.

use bytes::{BufMut, Bytes};

use super::key::{put_bytes, put_count, put_extras, put_text, put_value};
use super::tensor::{Form, check_len};
use super::{Datatype, Error, Extra, Parameters, Response, Tensor, Value};

/// The version of the format.
const VERSION: u8 = 1;

pub(super) fn write(response: &Response) -> Bytes {
    let data: usize = response.outputs.iter().map(|output| output.data.len()).sum();
    let mut out = Vec::with_capacity(256 + data);
    out.push(VERSION);
    put_option(&mut out, response.model.as_deref());
    put_option(&mut out, response.version.as_deref());
    put_parameters(&mut out, &response.parameters);
    put_extras(&mut out, &response.extras);
    put_count(&mut out, response.outputs.len());
    for output in &response.outputs {
        put_text(&mut out, &output.name);
        out.push(output.datatype.number());
        out.push(output.form as u8);
        put_count(&mut out, output.shape.len());
        output.shape.iter().for_each(|size| out.put_u64_le(*size));
        put_parameters(&mut out, &output.parameters);
        put_extras(&mut out, &output.extras);
        out.push(u8::from(output.spelling.is_some()));
        if let Some(spelling) = &output.spelling {
            put_bytes(&mut out, spelling);
        }
        put_count(&mut out, output.data.len());
    }
    response.outputs.iter().for_each(|output| out.put_slice(&output.data));
    out.into()
}

fn put_option(out: &mut Vec<u8>, text: Option<&str>) {
    out.push(u8::from(text.is_some()));
    if let Some(text) = text {
        put_text(out, text);
    }
}

fn put_parameters(out: &mut Vec<u8>, parameters: &Parameters) {
    put_count(out, parameters.iter().count());
    for (name, value) in parameters.iter() {
        put_text(out, name);
        put_value(out, value);
    }
}

pub(super) fn read(bytes: &Bytes) -> Result<Response, Error> {
    let mut reader = Reader::new(bytes);
    if reader.byte()? != VERSION {
        return Err(Error::Stored);
    }
    let model = reader.option()?;
    let version = reader.option()?;
    let parameters = reader.parameters()?;
    let extras = reader.extras()?;
    let count = reader.size()?;
    let mut outputs = Vec::new();
    let mut lengths = Vec::new();
    for _ in 0..count {
        let name = reader.text()?;
        let datatype = usize::from(reader.byte()?);
        let datatype = *Datatype::ALL.get(datatype).ok_or(Error::Stored)?;
        let form = match reader.byte()? {
            0 => Form::Json,
            1 => Form::Binary,
            2 => Form::Typed,
            _ => return Err(Error::Stored),
        };
        let dimensions = reader.size()?;
        let shape = (0..dimensions).map(|_| reader.number()).collect::<Result<_, _>>()?;
        let parameters = reader.parameters()?;
        let extras = reader.extras()?;
        let spelling = if reader.byte()? == 0 { None } else { Some(reader.blob()?) };
        lengths.push(reader.size()?);
        let data = Bytes::new();
        let output = Tensor { name, datatype, shape, parameters, extras, data, spelling, form };
        outputs.push(output);
    }
    for (output, len) in outputs.iter_mut().zip(lengths) {
        output.data = reader.take(len)?;
        check_len(output.datatype, &output.shape, len).map_err(|_| Error::Stored)?;
    }
    reader.end()?;
    Ok(Response { model, version, id: None, parameters, outputs, extras })
}

/// A bounds-checked reader of stored bytes.
pub(crate) struct Reader<'a> {
    bytes: &'a Bytes,
    at: usize,
}

impl<'a> Reader<'a> {
    pub(crate) fn new(bytes: &'a Bytes) -> Self {
        Reader { bytes, at: 0 }
    }

    /// Checks that all bytes are read.
    pub(crate) fn end(&self) -> Result<(), Error> {
        if self.at == self.bytes.len() { Ok(()) } else { Err(Error::Stored) }
    }

    fn take(&mut self, len: usize) -> Result<Bytes, Error> {
        let end = self.at.checked_add(len).filter(|end| *end <= self.bytes.len());
        let end = end.ok_or(Error::Stored)?;
        let taken = self.bytes.slice(self.at..end);
        self.at = end;
        Ok(taken)
    }

    pub(crate) fn byte(&mut self) -> Result<u8, Error> {
        let byte = self.bytes.get(self.at).copied().ok_or(Error::Stored)?;
        self.at += 1;
        Ok(byte)
    }

    pub(crate) fn number(&mut self) -> Result<u64, Error> {
        let bytes = self.bytes.get(self.at..).and_then(<[u8]>::first_chunk).ok_or(Error::Stored)?;
        self.at += 8;
        Ok(u64::from_le_bytes(*bytes))
    }

    /// A length or a count. Each counted item has at least one byte.
    pub(crate) fn size(&mut self) -> Result<usize, Error> {
        let size = usize::try_from(self.number()?).map_err(|_| Error::Stored)?;
        if size > self.bytes.len() { Err(Error::Stored) } else { Ok(size) }
    }

    pub(crate) fn blob(&mut self) -> Result<Bytes, Error> {
        let len = self.size()?;
        self.take(len)
    }

    pub(crate) fn text(&mut self) -> Result<String, Error> {
        let bytes = self.blob()?;
        str::from_utf8(&bytes).map(str::to_owned).map_err(|_| Error::Stored)
    }

    fn option(&mut self) -> Result<Option<String>, Error> {
        if self.byte()? == 0 { Ok(None) } else { self.text().map(Some) }
    }

    fn parameters(&mut self) -> Result<Parameters, Error> {
        let count = self.size()?;
        let mut parameters = Parameters::default();
        for _ in 0..count {
            let name = self.text()?;
            let value = match self.byte()? {
                0 => Value::Bool(self.byte()? != 0),
                1 => Value::Int(self.number()?.cast_signed()),
                2 => Value::Uint(self.number()?),
                3 => Value::Double(self.number()?),
                4 => Value::Spelled(self.text()?),
                5 => Value::String(self.text()?),
                6 => Value::Json(self.blob()?),
                _ => return Err(Error::Stored),
            };
            parameters.push(name, value);
        }
        Ok(parameters)
    }

    fn extras(&mut self) -> Result<Vec<Extra>, Error> {
        let count = self.size()?;
        let mut extras = Vec::new();
        for _ in 0..count {
            extras.push(match self.byte()? {
                0 => Extra::Json(self.text()?, self.blob()?),
                1 => Extra::Protobuf(self.blob()?),
                _ => return Err(Error::Stored),
            });
        }
        Ok(extras)
    }
}
