//! The gRPC encoding: `ModelInferRequest` and `ModelInferResponse`, scanned in place.
//!
//! Protobuf lets a field come twice, in which case the last one wins or both are merged, and lets a
//! field have another wire type, in which case readers skip it. Clients do neither, so both are
//! errors here. Unknown fields are part of the key.

use std::ops::Range;

use bytes::{BufMut, Bytes};
use smallvec::SmallVec;

use super::http::{check_names, is_shared};
use super::tensor::{self, Form, Tensor};
use super::{Datatype, Error, Extra, Parameters, Request, RequestedOutput, Response, Value, field};

/// A field's value, by wire type.
pub(crate) enum Payload {
    Varint(u64),
    Fixed64([u8; 8]),
    Fixed32([u8; 4]),
    Len(Range<usize>),
}

/// A message inside a body.
#[derive(Clone)]
pub(crate) struct Message<'a> {
    body: &'a Bytes,
    at: usize,
    end: usize,
}

impl<'a> Message<'a> {
    pub(crate) fn new(body: &'a Bytes) -> Self {
        Message { body, at: 0, end: body.len() }
    }

    fn within(body: &'a Bytes, range: Range<usize>) -> Self {
        Message { body, at: range.start, end: range.end }
    }

    fn error(&self, expected: &'static str) -> Error {
        Error::Protobuf { offset: self.at, expected }
    }

    fn take(&mut self, len: u64) -> Result<Range<usize>, Error> {
        if len > (self.end - self.at) as u64 {
            return Err(self.error("as many bytes as the length says"));
        }
        let start = self.at;
        self.at += len as usize;
        Ok(start..self.at)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], Error> {
        let range = self.take(N as u64)?;
        Ok(self.body[range].try_into().expect("the range has N bytes"))
    }

    fn varint(&mut self) -> Result<u64, Error> {
        let mut value = 0u64;
        for shift in (0..64).step_by(7) {
            let byte = *self.body[..self.end]
                .get(self.at)
                .ok_or_else(|| self.error("the rest of an integer"))?;
            self.at += 1;
            let bits = u64::from(byte & 0x7f);
            if shift == 63 && bits > 1 {
                break;
            }
            value |= bits << shift;
            if byte < 0x80 {
                return Ok(value);
            }
        }
        Err(self.error("an integer of at most 64 bits"))
    }

    /// The next field: its number, its value, and its bytes with the tag.
    pub(crate) fn next(&mut self) -> Result<Option<(u64, Payload, Range<usize>)>, Error> {
        if self.at == self.end {
            return Ok(None);
        }
        let start = self.at;
        let tag = self.varint()?;
        let payload = match tag & 7 {
            0 => Payload::Varint(self.varint()?),
            1 => Payload::Fixed64(self.array()?),
            2 => {
                let len = self.varint()?;
                Payload::Len(self.take(len)?)
            }
            5 => Payload::Fixed32(self.array()?),
            _ => return Err(self.error("a known wire type")),
        };
        if tag >> 3 == 0 || tag > u64::from(u32::MAX) {
            return Err(self.error("a field number"));
        }
        Ok(Some((tag >> 3, payload, start..self.at)))
    }

    fn range(&self, payload: Payload) -> Result<Range<usize>, Error> {
        match payload {
            Payload::Len(range) => Ok(range),
            _ => Err(self.error("a field with a length")),
        }
    }

    /// A string that has not come before.
    pub(crate) fn text(&self, payload: Payload, into: &mut Option<String>) -> Result<(), Error> {
        let range = self.range(payload)?;
        let text = str::from_utf8(&self.body[range]).map_err(|_| self.error("UTF-8"))?;
        if into.replace(text.to_owned()).is_some() {
            return Err(self.error("each field once"));
        }
        Ok(())
    }

    pub(crate) fn inner(&self, payload: Payload) -> Result<Message<'a>, Error> {
        Ok(Message::within(self.body, self.range(payload)?))
    }

    /// Bytes of the body.
    pub(crate) fn bytes(&self, range: Range<usize>) -> &'a [u8] {
        &self.body[range]
    }

    fn slice(&self, range: Range<usize>) -> Bytes {
        self.body.slice(range)
    }

    fn extra(&self, range: Range<usize>) -> Extra {
        Extra::Protobuf(self.slice(range))
    }

    /// Reads an entry of a map of parameters.
    fn parameter(&self, payload: Payload, into: &mut Parameters) -> Result<(), Error> {
        let mut entry = self.inner(payload)?;
        let (mut name, mut value) = (None, None);
        while let Some((number, payload, _)) = entry.next()? {
            match number {
                1 => entry.text(payload, &mut name)?,
                2 if value.is_none() => value = Some(entry.inner(payload)?.value()?),
                _ => return Err(entry.error("one name and one value")),
            }
        }
        let value = value.ok_or_else(|| entry.error("a value"))?;
        into.push(name.unwrap_or_default(), value);
        Ok(())
    }

    /// Reads an `InferParameter`.
    fn value(&mut self) -> Result<Value, Error> {
        let found = self.next()?.ok_or_else(|| self.error("a value"))?;
        let value = match found {
            (1, Payload::Varint(value), _) => Value::Bool(value != 0),
            (2, Payload::Varint(value), _) => Value::Int(value.cast_signed()),
            (3, payload @ Payload::Len(_), _) => {
                let mut text = None;
                self.text(payload, &mut text)?;
                Value::String(text.unwrap_or_default())
            }
            (4, Payload::Fixed64(value), _) => Value::Double(u64::from_le_bytes(value)),
            (5, Payload::Varint(value), _) => Value::Uint(value),
            _ => return Err(self.error("a known type of value")),
        };
        if self.at == self.end { Ok(value) } else { Err(self.error("one value")) }
    }

    /// Reads `InferInputTensor` or `InferOutputTensor`. The data is empty unless it has typed
    /// contents.
    fn tensor(mut self) -> Result<Tensor, Error> {
        let (mut name, mut datatype, mut contents) = (None, None, None);
        let mut shape = SmallVec::new();
        let mut parameters = Parameters::default();
        let mut extras = Vec::new();
        while let Some((number, payload, range)) = self.next()? {
            match number {
                1 => self.text(payload, &mut name)?,
                2 => self.text(payload, &mut datatype)?,
                3 => self.numbers(payload, |value| {
                    let size = value.cast_signed();
                    shape.push(u64::try_from(size).map_err(|_| field("shape", "negative"))?);
                    Ok(())
                })?,
                4 => self.parameter(payload, &mut parameters)?,
                5 if contents.is_none() => contents = Some(self.inner(payload)?),
                5 => return Err(self.error("contents once")),
                _ => extras.push(self.extra(range)),
            }
        }
        finish_parameters(&mut parameters)?;
        let datatype = Datatype::named(&datatype.unwrap_or_default());
        let datatype = datatype.ok_or_else(|| field("datatype", "unknown"))?;
        let mut data = Vec::new();
        if let Some(mut contents) = contents {
            contents.contents(datatype, &mut data)?;
        }
        Ok(Tensor {
            name: name.unwrap_or_default(),
            datatype,
            shape,
            parameters,
            extras,
            data: data.into(),
            spelling: None,
            form: Form::Typed,
        })
    }

    /// Reads repeated integers, packed or not.
    fn numbers(
        &self,
        payload: Payload,
        mut put: impl FnMut(u64) -> Result<(), Error>,
    ) -> Result<(), Error> {
        if let Payload::Varint(value) = payload {
            return put(value);
        }
        let mut packed = self.inner(payload)?;
        while packed.at < packed.end {
            put(packed.varint()?)?;
        }
        Ok(())
    }

    /// Reads `InferTensorContents`: elements of the one field that the datatype belongs to.
    fn contents(&mut self, datatype: Datatype, out: &mut Vec<u8>) -> Result<(), Error> {
        let wrong = || field("contents", "a number does not fit the datatype");
        while let Some((number, payload, _)) = self.next()? {
            let expected = contents_field(datatype);
            if Some(number) != expected {
                return Err(field("contents", "the field of another datatype"));
            }
            match (datatype, payload) {
                (Datatype::Bytes, payload) => {
                    let range = self.range(payload)?;
                    let len = u32::try_from(range.len()).map_err(|_| wrong())?;
                    out.put_u32_le(len);
                    out.put_slice(&self.body[range]);
                }
                (Datatype::Fp32, Payload::Fixed32(value)) => out.put_slice(&value),
                (Datatype::Fp64, Payload::Fixed64(value)) => out.put_slice(&value),
                (Datatype::Fp32 | Datatype::Fp64, Payload::Len(range)) => {
                    let size = datatype.size().unwrap_or(1);
                    if range.len() % size != 0 {
                        return Err(self.error("whole floats"));
                    }
                    out.put_slice(&self.body[range]);
                }
                (Datatype::Fp32 | Datatype::Fp64, _) => return Err(self.error("floats")),
                (_, payload) => self.numbers(payload, |value| {
                    put_integer(out, datatype, value).ok_or_else(wrong)
                })?,
            }
        }
        Ok(())
    }
}

/// The field of `InferTensorContents` for a datatype.
fn contents_field(datatype: Datatype) -> Option<u64> {
    Some(match datatype {
        Datatype::Bool => 1,
        Datatype::Int8 | Datatype::Int16 | Datatype::Int32 => 2,
        Datatype::Int64 => 3,
        Datatype::Uint8 | Datatype::Uint16 | Datatype::Uint32 => 4,
        Datatype::Uint64 => 5,
        Datatype::Fp32 => 6,
        Datatype::Fp64 => 7,
        Datatype::Bytes => 8,
        Datatype::Fp16 | Datatype::Bf16 => return None,
    })
}

/// Appends an integer from its varint; `None` if it does not fit.
fn put_integer(out: &mut Vec<u8>, datatype: Datatype, value: u64) -> Option<()> {
    let signed = value.cast_signed();
    match datatype {
        Datatype::Bool => out.put_u8(u8::from(value != 0)),
        Datatype::Int8 => out.put_i8(signed.try_into().ok()?),
        Datatype::Int16 => out.put_i16_le(signed.try_into().ok()?),
        Datatype::Int32 => out.put_i32_le(signed.try_into().ok()?),
        Datatype::Uint8 => out.put_u8(value.try_into().ok()?),
        Datatype::Uint16 => out.put_u16_le(value.try_into().ok()?),
        Datatype::Uint32 => out.put_u32_le(value.try_into().ok()?),
        Datatype::Int64 | Datatype::Uint64 => out.put_u64_le(value),
        Datatype::Fp16 | Datatype::Bf16 | Datatype::Fp32 | Datatype::Fp64 | Datatype::Bytes => {
            return None;
        }
    }
    Some(())
}

/// Orders parameters and refuses a name that comes twice.
fn finish_parameters(parameters: &mut Parameters) -> Result<(), Error> {
    parameters.sort();
    check_names(parameters.iter().map(|(name, _)| name))
}

/// Gives tensors their raw contents, and checks the length of all data. A tensor in shared memory
/// has no entry.
fn attach(tensors: &mut [Tensor], raw: Vec<Bytes>) -> Result<(), Error> {
    let is_raw = !raw.is_empty();
    let mut raw = raw.into_iter();
    for tensor in tensors.iter_mut().filter(|tensor| !is_shared(&tensor.parameters)) {
        if is_raw {
            if !tensor.data.is_empty() {
                return Err(field("contents", "both raw and typed"));
            }
            let data = raw.next();
            tensor.data = data.ok_or_else(|| field("raw contents", "fewer than tensors"))?;
            tensor.form = Form::Binary;
        }
        tensor::check_len(tensor.datatype, &tensor.shape, tensor.data.len())?;
        let is_typed_bytes = !is_raw && tensor.datatype == Datatype::Bytes;
        if is_typed_bytes && tensor.elements().is_none() {
            return Err(field("contents", "the number of elements does not fit the shape"));
        }
    }
    if raw.next().is_some() {
        return Err(field("raw contents", "more than tensors"));
    }
    check_names(tensors.iter().map(|tensor| &*tensor.name))
}

/// A string that protobuf does not distinguish from no string.
fn filled(text: Option<String>) -> Option<String> {
    text.filter(|text| !text.is_empty())
}

/// Reads the name and the version in a message that has them as its fields 1 and 2. Other fields
/// are skipped.
pub(super) fn parse_named(body: &Bytes) -> Result<(Option<String>, Option<String>), Error> {
    let mut message = Message::new(body);
    let (mut name, mut version) = (None, None);
    while let Some((number, payload, _)) = message.next()? {
        match number {
            1 => message.text(payload, &mut name)?,
            2 => message.text(payload, &mut version)?,
            _ => {}
        }
    }
    Ok((filled(name), filled(version)))
}

pub(super) fn parse_request(body: &Bytes) -> Result<Request, Error> {
    let mut message = Message::new(body);
    let mut request = Request::default();
    let mut raw = Vec::new();
    while let Some((number, payload, range)) = message.next()? {
        match number {
            1 => message.text(payload, &mut request.model)?,
            2 => message.text(payload, &mut request.version)?,
            3 => message.text(payload, &mut request.id)?,
            4 => message.parameter(payload, &mut request.parameters)?,
            5 => request.inputs.push(message.inner(payload)?.tensor()?),
            6 => request.outputs.push(parse_output(message.inner(payload)?)?),
            7 => raw.push(message.slice(message.range(payload)?)),
            _ => request.extras.push(message.extra(range)),
        }
    }
    request.model = filled(request.model);
    request.version = filled(request.version);
    request.id = filled(request.id);
    finish_parameters(&mut request.parameters)?;
    attach(&mut request.inputs, raw)?;
    check_names(request.outputs.iter().map(|output| &*output.name))?;
    Ok(request)
}

fn parse_output(mut message: Message<'_>) -> Result<RequestedOutput, Error> {
    let mut name = None;
    let mut parameters = Parameters::default();
    let mut extras = Vec::new();
    while let Some((number, payload, range)) = message.next()? {
        match number {
            1 => message.text(payload, &mut name)?,
            2 => message.parameter(payload, &mut parameters)?,
            _ => extras.push(message.extra(range)),
        }
    }
    finish_parameters(&mut parameters)?;
    Ok(RequestedOutput { name: name.unwrap_or_default(), parameters, extras, binary: None })
}

pub(super) fn parse_response(body: &Bytes) -> Result<Response, Error> {
    let mut message = Message::new(body);
    let mut response = Response::default();
    let mut raw = Vec::new();
    while let Some((number, payload, range)) = message.next()? {
        match number {
            1 => message.text(payload, &mut response.model)?,
            2 => message.text(payload, &mut response.version)?,
            3 => message.text(payload, &mut response.id)?,
            4 => message.parameter(payload, &mut response.parameters)?,
            5 => response.outputs.push(message.inner(payload)?.tensor()?),
            6 => raw.push(message.slice(message.range(payload)?)),
            _ => response.extras.push(message.extra(range)),
        }
    }
    response.model = filled(response.model);
    response.version = filled(response.version);
    response.id = filled(response.id);
    finish_parameters(&mut response.parameters)?;
    attach(&mut response.outputs, raw)?;
    Ok(response)
}

pub(crate) fn put_varint(out: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        out.push(value as u8 | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
}

pub(crate) fn put_len(out: &mut Vec<u8>, number: u64, bytes: &[u8]) {
    put_varint(out, number << 3 | 2);
    put_varint(out, bytes.len() as u64);
    out.put_slice(bytes);
}

pub(super) fn put_text(out: &mut Vec<u8>, number: u64, text: &str) {
    if !text.is_empty() {
        put_len(out, number, text.as_bytes());
    }
}

/// Writes a map of parameters; `None` if a value has no type in gRPC.
fn put_parameters(out: &mut Vec<u8>, number: u64, parameters: &Parameters) -> Option<()> {
    let (mut entry, mut value) = (Vec::new(), Vec::new());
    for (name, parameter) in parameters.iter() {
        value.clear();
        match parameter {
            Value::Bool(flag) => value.put_slice(&[1 << 3, u8::from(*flag)]),
            Value::Int(number) => {
                value.push(2 << 3);
                put_varint(&mut value, number.cast_unsigned());
            }
            Value::String(text) => put_len(&mut value, 3, text.as_bytes()),
            Value::Double(bits) => {
                value.push(4 << 3 | 1);
                value.put_u64_le(*bits);
            }
            Value::Uint(number) => {
                value.push(5 << 3);
                put_varint(&mut value, *number);
            }
            Value::Spelled(_) | Value::Json(_) => return None,
        }
        entry.clear();
        put_len(&mut entry, 1, name.as_bytes());
        put_len(&mut entry, 2, &value);
        put_len(out, number, &entry);
    }
    Some(())
}

/// Writes unknown fields; `None` for one of JSON, unless it is `null`.
fn put_extras(out: &mut Vec<u8>, extras: &[Extra]) -> Option<()> {
    for extra in extras {
        match extra {
            Extra::Protobuf(field) => out.put_slice(field),
            Extra::Json(_, value) if value == "null" => {}
            Extra::Json(..) => return None,
        }
    }
    Some(())
}

fn put_tensor(out: &mut Vec<u8>, number: u64, tensor: &Tensor, typed: bool) -> Option<()> {
    let mut message = Vec::with_capacity(128);
    put_text(&mut message, 1, &tensor.name);
    put_text(&mut message, 2, tensor.datatype.name());
    let mut packed = Vec::new();
    tensor.shape.iter().for_each(|size| put_varint(&mut packed, *size));
    if !packed.is_empty() {
        put_len(&mut message, 3, &packed);
    }
    put_parameters(&mut message, 4, &tensor.parameters)?;
    if typed && !tensor.data.is_empty() {
        put_len(&mut message, 5, &typed_contents(tensor)?);
    }
    put_extras(&mut message, &tensor.extras)?;
    put_len(out, number, &message);
    Some(())
}

/// The elements as `InferTensorContents`; `None` for 16-bit floats, and for damaged data.
fn typed_contents(tensor: &Tensor) -> Option<Vec<u8>> {
    let number = contents_field(tensor.datatype)?;
    let mut contents = Vec::with_capacity(tensor.data.len() + 16);
    if tensor.datatype == Datatype::Bytes {
        for element in tensor.elements()? {
            put_len(&mut contents, number, &tensor.data[element]);
        }
        return Some(contents);
    }
    let mut packed = Vec::new();
    let data = &tensor.data[..];
    let put = &mut packed;
    let extend = |put: &mut Vec<u8>, value: i64| put_varint(put, value.cast_unsigned());
    match tensor.datatype {
        Datatype::Bool => data.iter().for_each(|v| put.push(u8::from(*v != 0))),
        Datatype::Uint8 => data.iter().for_each(|v| put_varint(put, u64::from(*v))),
        Datatype::Int8 => data.iter().for_each(|v| extend(put, i64::from(v.cast_signed()))),
        Datatype::Int16 => chunks(data).for_each(|v| extend(put, i16::from_le_bytes(v).into())),
        Datatype::Int32 => chunks(data).for_each(|v| extend(put, i32::from_le_bytes(v).into())),
        Datatype::Uint16 => {
            chunks(data).for_each(|v| put_varint(put, u16::from_le_bytes(v).into()))
        }
        Datatype::Uint32 => {
            chunks(data).for_each(|v| put_varint(put, u32::from_le_bytes(v).into()))
        }
        Datatype::Int64 | Datatype::Uint64 => {
            chunks(data).for_each(|v| put_varint(put, u64::from_le_bytes(v)));
        }
        _ => put.put_slice(data),
    }
    put_len(&mut contents, number, &packed);
    Some(contents)
}

fn chunks<const N: usize>(data: &[u8]) -> impl Iterator<Item = [u8; N]> {
    data.as_chunks().0.iter().copied()
}

pub(super) fn write_request(request: &Request) -> Option<Bytes> {
    let len: usize = request.inputs.iter().map(|input| input.data.len()).sum();
    let mut out = Vec::with_capacity(256 + len);
    put_text(&mut out, 1, request.model.as_deref().unwrap_or_default());
    put_text(&mut out, 2, request.version.as_deref().unwrap_or_default());
    put_text(&mut out, 3, request.id.as_deref().unwrap_or_default());
    put_parameters(&mut out, 4, &request.parameters)?;
    let typed = request.inputs.iter().all(|input| input.form == Form::Typed);
    for input in &request.inputs {
        if input.spelling.is_some() {
            return None;
        }
        put_tensor(&mut out, 5, input, typed)?;
    }
    for output in &request.outputs {
        let mut message = Vec::new();
        put_text(&mut message, 1, &output.name);
        put_parameters(&mut message, 2, &output.parameters)?;
        put_extras(&mut message, &output.extras)?;
        put_len(&mut out, 6, &message);
    }
    if !typed {
        put_raw(&mut out, 7, &request.inputs);
    }
    put_extras(&mut out, &request.extras)?;
    Some(out.into())
}

fn put_raw(out: &mut Vec<u8>, number: u64, tensors: &[Tensor]) {
    for tensor in tensors.iter().filter(|tensor| !is_shared(&tensor.parameters)) {
        put_len(out, number, &tensor.data);
    }
}

pub(super) fn write_response(response: &Response, id: Option<&str>, form: Form) -> Option<Bytes> {
    let len: usize = response.outputs.iter().map(|output| output.data.len()).sum();
    let mut out = Vec::with_capacity(256 + len);
    put_text(&mut out, 1, response.model.as_deref().unwrap_or_default());
    put_text(&mut out, 2, response.version.as_deref().unwrap_or_default());
    put_text(&mut out, 3, id.unwrap_or_default());
    put_parameters(&mut out, 4, &response.parameters)?;
    let can_be_typed = |output: &Tensor| contents_field(output.datatype).is_some();
    let typed = form == Form::Typed && response.outputs.iter().all(can_be_typed);
    for output in &response.outputs {
        put_tensor(&mut out, 5, output, typed)?;
    }
    if !typed {
        put_raw(&mut out, 6, &response.outputs);
    }
    put_extras(&mut out, &response.extras)?;
    Some(out.into())
}
