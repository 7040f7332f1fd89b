//! Tensors: inputs of requests and outputs of responses.

use std::ops::Range;

use bytes::{BufMut, Bytes};
use smallvec::SmallVec;

use super::{Datatype, Error, Extra, Parameters, field};
use crate::json::{self, Kind, Number, Scanner};

/// How a tensor's elements arrived.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Form {
    /// As JSON.
    #[default]
    Json,
    /// As bytes: behind the JSON, or in gRPC's raw contents.
    Binary,
    /// In gRPC's typed contents.
    Typed,
}

/// One tensor.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Tensor {
    /// The name, unique among the tensors of a message.
    pub name: String,
    /// The datatype of the elements.
    pub datatype: Datatype,
    /// The size of each dimension.
    pub shape: SmallVec<[u64; 4]>,
    /// The parameters, without those of the transport.
    pub parameters: Parameters,
    /// Unknown fields.
    pub extras: Vec<Extra>,
    /// The elements, row-major and little-endian. An element of [`Datatype::Bytes`] has its length
    /// as 32 bits before it.
    pub data: Bytes,
    /// The elements as JSON numbers with commas between them, if the spelling matters: readers
    /// round these numbers differently, or they have more digits than the datatype.
    pub spelling: Option<Bytes>,
    /// How the elements arrived.
    pub form: Form,
}

/// The direction of a message. Numbers of requests mean what the server reads; numbers of responses
/// mean what the client reads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Direction {
    Request,
    Response,
}

/// The number of elements of a shape.
pub(crate) fn count(shape: &[u64]) -> Result<u64, Error> {
    let mut count = 1u64;
    for size in shape {
        let next = count.checked_mul(*size);
        count = next.ok_or_else(|| field("shape", "the number of elements exceeds 64 bits"))?;
    }
    Ok(count)
}

/// Checks the length of binary data against datatype and shape. Data of [`Datatype::Bytes`] has any
/// length; `Tensor::elements` checks it.
pub(crate) fn check_len(datatype: Datatype, shape: &[u64], len: usize) -> Result<(), Error> {
    let count = count(shape)?;
    let Some(size) = datatype.size() else { return Ok(()) };
    if count.checked_mul(size as u64) == Some(len as u64) {
        Ok(())
    } else {
        Err(field("data", "the length does not fit the shape and the datatype"))
    }
}

impl Tensor {
    /// A tensor without parameters.
    ///
    /// # Errors
    /// If the length of the data does not fit the shape and the datatype.
    pub fn new(
        name: impl Into<String>,
        datatype: Datatype,
        shape: impl IntoIterator<Item = u64>,
        data: impl Into<Bytes>,
    ) -> Result<Self, Error> {
        let (shape, data) = (shape.into_iter().collect::<SmallVec<_>>(), data.into());
        check_len(datatype, &shape, data.len())?;
        Ok(Tensor {
            name: name.into(),
            datatype,
            shape,
            parameters: Parameters::default(),
            extras: Vec::new(),
            data,
            spelling: None,
            form: Form::Binary,
        })
    }

    /// The elements of a [`Datatype::Bytes`] tensor; `None` if the lengths do not add up to the
    /// data, or their number is not that of the shape.
    pub(crate) fn elements(&self) -> Option<Vec<Range<usize>>> {
        let count = usize::try_from(count(&self.shape).ok()?).ok()?;
        // Each element has at least its length.
        if count > self.data.len() / 4 {
            return None;
        }
        let mut elements = Vec::with_capacity(count);
        let mut at = 0usize;
        for _ in 0..count {
            let len = self.data.get(at..at + 4)?.try_into().ok().map(u32::from_le_bytes)?;
            let start = at + 4;
            at = start.checked_add(usize::try_from(len).ok()?)?;
            if at > self.data.len() {
                return None;
            }
            elements.push(start..at);
        }
        (at == self.data.len()).then_some(elements)
    }

    /// Reads JSON data: a flat list, or lists that are nested exactly as the shape says. Servers
    /// disagree about any other nesting.
    pub(crate) fn scan_data(
        scanner: &mut Scanner<'_>,
        datatype: Datatype,
        shape: &[u64],
        direction: Direction,
    ) -> Result<(Bytes, Option<Bytes>), Error> {
        let count = count(shape)?;
        let start = scanner.offset();
        let mut data = Vec::new();
        let mut spelled = false;
        // The text has at least two bytes for each element.
        let capacity = count.min(scanner.remaining() as u64 / 2 + 1) as usize;
        data.reserve(capacity * datatype.size().unwrap_or(8));
        let out = &mut data;
        match datatype {
            Datatype::Bool => {
                elements(scanner, shape, count, |scanner| {
                    out.put_u8(scanner.bool()?.into());
                    Ok(())
                })?;
            }
            Datatype::Uint8 => u8::scan(scanner, shape, count, out)?,
            Datatype::Uint16 => u16::scan(scanner, shape, count, out)?,
            Datatype::Uint32 => u32::scan(scanner, shape, count, out)?,
            Datatype::Uint64 => u64::scan(scanner, shape, count, out)?,
            Datatype::Int8 => i8::scan(scanner, shape, count, out)?,
            Datatype::Int16 => i16::scan(scanner, shape, count, out)?,
            Datatype::Int32 => i32::scan(scanner, shape, count, out)?,
            Datatype::Int64 => i64::scan(scanner, shape, count, out)?,
            Datatype::Fp16 | Datatype::Bf16 => {
                return Err(field("datatype", "16-bit floats have no JSON form"));
            }
            Datatype::Fp32 => elements(scanner, shape, count, |scanner| {
                let (value, number) = float(scanner)?;
                let narrow = value as f32;
                if narrow.is_infinite() && value.is_finite() {
                    return Err(field("data", "a number is too large for FP32"));
                }
                spelled |= match direction {
                    Direction::Request => number.is_some_and(|number| !is_stable(number, value)),
                    // Comparing bits would call each NaN different.
                    Direction::Response => f64::from(narrow) != value && !value.is_nan(),
                };
                out.put_f32_le(narrow);
                Ok(())
            })?,
            Datatype::Fp64 => elements(scanner, shape, count, |scanner| {
                let (value, number) = float(scanner)?;
                spelled |= direction == Direction::Request
                    && number.is_some_and(|number| !number.is_exact());
                out.put_f64_le(value);
                Ok(())
            })?,
            Datatype::Bytes => elements(scanner, shape, count, |scanner| {
                let text = scanner.string()?;
                let len = u32::try_from(text.len());
                out.put_u32_le(len.map_err(|_| field("data", "a string is longer than 4 GiB"))?);
                out.put_slice(text.as_bytes());
                Ok(())
            })?,
        }
        let spelling = spelled.then(|| {
            let text = scanner.since(start).bytes();
            text.filter(|byte| !matches!(byte, b'[' | b']' | b' ' | b'\n' | b'\r' | b'\t'))
                .collect()
        });
        Ok((data.into(), spelling))
    }

    /// Whether the elements can be written as JSON so that a reader gets the same bytes.
    pub(crate) fn fits_json(&self, direction: Direction) -> bool {
        let one_nan = direction == Direction::Response;
        match self.datatype {
            Datatype::Fp16 | Datatype::Bf16 => false,
            Datatype::Bool => self.data.iter().all(|byte| *byte <= 1),
            Datatype::Fp32 => one_nan || self.floats32().all(|v| !v.is_nan() || is_json_nan(v)),
            Datatype::Fp64 => {
                let canonical = f64::NAN.to_bits();
                one_nan || self.floats64().all(|v| !v.is_nan() || v.to_bits() == canonical)
            }
            Datatype::Bytes => {
                let is_text = |range: Range<usize>| str::from_utf8(&self.data[range]).is_ok();
                self.elements().is_some_and(|elements| elements.into_iter().all(is_text))
            }
            _ => true,
        }
    }

    /// The elements as numbers, if they are floats.
    pub(crate) fn numbers(&self) -> Option<Vec<f64>> {
        if let Some(spelling) = &self.spelling {
            let text = str::from_utf8(spelling).ok()?;
            return text.split(',').map(|number| number.parse().ok()).collect();
        }
        let halves = || self.data.as_chunks().0.iter().map(|bytes| u16::from_le_bytes(*bytes));
        match self.datatype {
            Datatype::Fp16 => Some(halves().map(half).collect()),
            Datatype::Bf16 => {
                let wide = |bits| f64::from(f32::from_bits(u32::from(bits) << 16));
                Some(halves().map(wide).collect())
            }
            Datatype::Fp32 => Some(self.floats32().map(f64::from).collect()),
            Datatype::Fp64 => Some(self.floats64().collect()),
            _ => None,
        }
    }

    fn floats32(&self) -> impl Iterator<Item = f32> {
        self.data.as_chunks().0.iter().map(|bytes| f32::from_le_bytes(*bytes))
    }

    fn floats64(&self) -> impl Iterator<Item = f64> {
        self.data.as_chunks().0.iter().map(|bytes| f64::from_le_bytes(*bytes))
    }

    /// Appends the elements as a flat JSON list. [`fits_json`](Self::fits_json) has said yes.
    pub(crate) fn write_data(&self, out: &mut Vec<u8>) {
        out.push(b'[');
        if let Some(spelling) = &self.spelling {
            out.extend_from_slice(spelling);
        } else {
            self.write_numbers(out);
        }
        out.push(b']');
    }

    /// Appends the elements with commas between them.
    pub(crate) fn write_numbers(&self, out: &mut Vec<u8>) {
        let data = &self.data[..];
        match self.datatype {
            Datatype::Bool => join(out, data, |out, value| {
                out.extend_from_slice(if *value == 0 { b"false" } else { b"true" });
            }),
            Datatype::Uint8 => u8::write(out, data),
            Datatype::Uint16 => u16::write(out, data),
            Datatype::Uint32 => u32::write(out, data),
            Datatype::Uint64 => u64::write(out, data),
            Datatype::Int8 => i8::write(out, data),
            Datatype::Int16 => i16::write(out, data),
            Datatype::Int32 => i32::write(out, data),
            Datatype::Int64 => i64::write(out, data),
            Datatype::Fp32 => join(out, data.as_chunks().0, |out, value| {
                json::write_float(out, f64::from(f32::from_le_bytes(*value)));
            }),
            Datatype::Fp64 => join(out, data.as_chunks().0, |out, value| {
                json::write_float(out, f64::from_le_bytes(*value));
            }),
            Datatype::Bytes => {
                let elements = self.elements().unwrap_or_default();
                join(out, &elements, |out, range| {
                    let text = str::from_utf8(&data[range.clone()]);
                    json::write_string(out, text.unwrap_or_default());
                });
            }
            Datatype::Fp16 | Datatype::Bf16 => {}
        }
    }

    /// Appends `"name":…,"datatype":…,"shape":[…],`.
    pub(crate) fn write_head(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(b"\"name\":");
        json::write_string(out, &self.name);
        out.extend_from_slice(b",\"datatype\":\"");
        out.extend_from_slice(self.datatype.name().as_bytes());
        out.extend_from_slice(b"\",\"shape\":[");
        join(out, &self.shape, |out, size| json::write_integer(out, *size));
        out.extend_from_slice(b"],");
    }
}

/// The value of a 16-bit float of IEEE 754.
fn half(bits: u16) -> f64 {
    let (exponent, fraction) = (i32::from(bits >> 10 & 0x1f), f64::from(bits & 0x3ff));
    let size = match exponent {
        0 => fraction * 2f64.powi(-24),
        31 if fraction == 0.0 => f64::INFINITY,
        31 => f64::NAN,
        _ => (1.0 + fraction / 1024.0) * 2f64.powi(exponent - 15),
    };
    if bits >> 15 == 0 { size } else { -size }
}

/// Appends the items with commas between them.
pub(crate) fn join<T>(out: &mut Vec<u8>, items: &[T], mut write: impl FnMut(&mut Vec<u8>, &T)) {
    for (at, item) in items.iter().enumerate() {
        if at > 0 {
            out.push(b',');
        }
        write(out, item);
    }
}

/// Reads `count` elements, flat or nested as the shape says.
fn elements(
    scanner: &mut Scanner<'_>,
    shape: &[u64],
    count: u64,
    mut read: impl FnMut(&mut Scanner<'_>) -> Result<(), Error>,
) -> Result<(), Error> {
    let wrong = || field("data", "the elements do not fit the shape");
    if scanner.begins_nested() {
        return nested(scanner, shape, &mut read);
    }
    let mut found = 0;
    scanner.array(|scanner| {
        found += 1;
        if found > count { Err(wrong()) } else { read(scanner) }
    })?;
    if found == count { Ok(()) } else { Err(wrong()) }
}

fn nested(
    scanner: &mut Scanner<'_>,
    shape: &[u64],
    read: &mut impl FnMut(&mut Scanner<'_>) -> Result<(), Error>,
) -> Result<(), Error> {
    let wrong = || field("data", "the lists are not nested as the shape says");
    let (size, inner) = shape.split_first().ok_or_else(wrong)?;
    let mut found = 0;
    scanner.array(|scanner| {
        found += 1;
        if found > *size {
            return Err(wrong());
        }
        if inner.is_empty() { read(scanner) } else { nested(scanner, inner, read) }
    })?;
    if found == *size { Ok(()) } else { Err(wrong()) }
}

/// An integer as an element.
trait Integer {
    /// Reads JSON numbers, and appends them.
    fn scan(
        scanner: &mut Scanner<'_>,
        shape: &[u64],
        count: u64,
        out: &mut Vec<u8>,
    ) -> Result<(), Error>;

    /// Appends elements as JSON with commas between them.
    fn write(out: &mut Vec<u8>, data: &[u8]);
}

macro_rules! integers {
    ($($kind:ty => $value:ident;)*) => {$(
        impl Integer for $kind {
            fn scan(
                scanner: &mut Scanner<'_>,
                shape: &[u64],
                count: u64,
                out: &mut Vec<u8>,
            ) -> Result<(), Error> {
                elements(scanner, shape, count, |scanner| {
                    let value = scanner.number()?.$value();
                    let value = value.and_then(|value| <$kind>::try_from(value).ok());
                    let value = value.ok_or_else(|| field("data", "a number does not fit the datatype"))?;
                    out.put_slice(&value.to_le_bytes());
                    Ok(())
                })
            }

            fn write(out: &mut Vec<u8>, data: &[u8]) {
                join(out, data.as_chunks().0, |out, value| {
                    json::write_integer(out, <$kind>::from_le_bytes(*value));
                });
            }
        }
    )*};
}

integers! {
    u8 => to_u64;
    u16 => to_u64;
    u32 => to_u64;
    u64 => to_u64;
    i8 => to_i64;
    i16 => to_i64;
    i32 => to_i64;
    i64 => to_i64;
}

/// Reads a float: its value, and its spelling unless it is a word such as `NaN`.
fn float<'a>(scanner: &mut Scanner<'a>) -> Result<(f64, Option<Number<'a>>), Error> {
    if scanner.kind()? == Kind::Word {
        return Ok((scanner.word()?, None));
    }
    let number = scanner.number()?;
    // RapidJSON and Python read the integer 0. Other readers get the float -0.0.
    if number.is_negative_zero() {
        return Err(field("data", "servers disagree about -0"));
    }
    let value = number.to_f64();
    // RapidJSON refuses the number, Python reads infinity.
    if value.is_infinite() {
        return Err(field("data", "a number is too large"));
    }
    Ok((value, Some(number)))
}

/// Whether every reader gets the same `f32`, also one that rounds the last bits of the `f64`
/// differently.
fn is_stable(number: Number<'_>, value: f64) -> bool {
    // Eight units in the last place; RapidJSON is at most three off.
    const SLACK: f64 = 4.0 * f64::EPSILON;
    number.is_exact()
        || value.is_normal() && (value * (1.0 - SLACK)) as f32 == (value * (1.0 + SLACK)) as f32
}

/// Whether the bits are those that readers give to JSON's `NaN`.
fn is_json_nan(value: f32) -> bool {
    value.to_bits() == f32::NAN.to_bits()
}
