//! Named arrays of numbers, as they stand in a safetensors file, and the container's reading and
//! writing.

use std::collections::BTreeMap;

use safetensors::{Dtype, SafeTensors};
use serde_json::{Value, json};

use crate::error::ModelError;

/// Arrays by name, in the order of their names.
pub type Tensors = BTreeMap<String, Tensor>;

/// Texts by name: the container's metadata.
pub type Texts = BTreeMap<String, String>;

/// The container aligns its data to this many bytes.
const ALIGNMENT: usize = 8;

/// A row-major array.
#[derive(Clone, Debug, PartialEq)]
pub struct Tensor {
    pub shape: Vec<usize>,
    pub values: Values,
}

/// An array's numbers, of one of the types that model files have.
#[derive(Clone, Debug, PartialEq)]
pub enum Values {
    U8(Vec<u8>),
    U32(Vec<u32>),
    F32(Vec<f32>),
    F64(Vec<f64>),
}

/// A type that an array's numbers may have.
pub trait Element: Sized {
    /// Its name in a file.
    const NAME: &'static str;
    fn wrap(values: Vec<Self>) -> Values;
    fn unwrap(values: Values) -> Option<Vec<Self>>;
}

macro_rules! elements {
    ($($variant:ident: $type:ty, $name:literal;)*) => {
        $(impl Element for $type {
            const NAME: &'static str = $name;
            fn wrap(values: Vec<Self>) -> Values {
                Values::$variant(values)
            }
            fn unwrap(values: Values) -> Option<Vec<Self>> {
                if let Values::$variant(values) = values { Some(values) } else { None }
            }
        })*

        impl Values {
            /// The name of their type in a file.
            pub fn type_name(&self) -> &'static str {
                match self { $(Self::$variant(_) => $name),* }
            }

            /// Their bytes, little-endian, piece by piece.
            pub fn for_each_bytes(&self, mut take: impl FnMut(&[u8])) {
                match self {
                    $(Self::$variant(values) => {
                        values.iter().for_each(|value| take(&value.to_le_bytes()));
                    })*
                }
            }

            fn byte_len(&self) -> usize {
                match self { $(Self::$variant(values) => size_of_val(values.as_slice())),* }
            }

            fn read(dtype: Dtype, bytes: &[u8]) -> Option<Self> {
                match dtype {
                    $(Dtype::$variant => Some(Self::$variant(
                        bytes.as_chunks().0.iter().map(|&value| <$type>::from_le_bytes(value)).collect(),
                    )),)*
                    _ => None,
                }
            }
        }
    };
}

elements! {
    U8: u8, "U8";
    U32: u32, "U32";
    F32: f32, "F32";
    F64: f64, "F64";
}

impl Values {
    /// The first number that is not finite, and its place.
    fn not_finite(&self) -> Option<(usize, f64)> {
        match self {
            Self::U8(_) | Self::U32(_) => None,
            Self::F32(values) => first_not_finite(values.iter().map(|&value| value.into())),
            Self::F64(values) => first_not_finite(values.iter().copied()),
        }
    }
}

fn first_not_finite(values: impl Iterator<Item = f64>) -> Option<(usize, f64)> {
    values.enumerate().find(|(_, value)| !value.is_finite())
}

/// An error for the first of `values` that is not finite.
pub fn check_finite<T: Copy + Into<f64>>(
    tensor: &str,
    values: impl IntoIterator<Item = T>,
) -> Result<(), ModelError> {
    match first_not_finite(values.into_iter().map(Into::into)) {
        None => Ok(()),
        Some((index, value)) => {
            Err(ModelError::NotFinite { tensor: tensor.to_owned(), index, value })
        }
    }
}

impl Tensor {
    pub fn new<T: Element>(shape: &[usize], values: Vec<T>) -> Self {
        debug_assert_eq!(shape.iter().product::<usize>(), values.len());
        Self { shape: shape.to_vec(), values: T::wrap(values) }
    }

    /// Takes `name` out of `tensors`; it must have this shape and this type.
    pub fn take<T: Element>(
        tensors: &mut Tensors,
        name: &str,
        shape: &[usize],
    ) -> Result<Vec<T>, ModelError> {
        let what = || format!("shape of tensor {name:?}");
        let tensor = tensors
            .remove(name)
            .ok_or_else(|| ModelError::mismatch(what(), format!("{shape:?}"), "no such tensor"))?;
        if tensor.shape != shape {
            let found = format!("{:?}", tensor.shape);
            return Err(ModelError::mismatch(what(), format!("{shape:?}"), found));
        }
        let found = tensor.values.type_name();
        T::unwrap(tensor.values)
            .ok_or_else(|| ModelError::mismatch(format!("type of tensor {name:?}"), T::NAME, found))
    }
}

/// The bytes of a safetensors file. The same tensors and texts always give the same bytes: names in
/// order, data in the order of the names.
pub fn encode(tensors: &Tensors, texts: &Texts) -> Vec<u8> {
    let mut bytes = header(tensors, texts);
    for tensor in tensors.values() {
        tensor.values.for_each_bytes(|value| bytes.extend_from_slice(value));
    }
    bytes
}

/// How many bytes [`encode`] gives.
pub fn encoded_len(tensors: &Tensors, texts: &Texts) -> u64 {
    let data: usize = tensors.values().map(|tensor| tensor.values.byte_len()).sum();
    (header(tensors, texts).len() + data) as u64
}

/// All that comes before the data.
fn header(tensors: &Tensors, texts: &Texts) -> Vec<u8> {
    let mut header = BTreeMap::from([("__metadata__".to_owned(), json!(texts))]);
    let mut offset = 0;
    for (name, tensor) in tensors {
        let end = offset + tensor.values.byte_len();
        // An array of pairs is written in order, so no map of the JSON library decides about bytes.
        let entry = json!({
            "data_offsets": [offset, end], "dtype": tensor.values.type_name(), "shape": tensor.shape,
        });
        header.insert(name.clone(), entry);
        offset = end;
    }
    let mut text = serialize_sorted(&header);
    text.resize(text.len().next_multiple_of(ALIGNMENT), b' ');
    let mut bytes = (text.len() as u64).to_le_bytes().to_vec();
    bytes.extend(text);
    bytes
}

/// Reads a safetensors file. Every tensor must be of a type in [`Values`], and finite.
pub fn decode(bytes: &[u8]) -> Result<(Tensors, Texts), ModelError> {
    let container = |error: safetensors::SafeTensorError| ModelError::Container(error.to_string());
    let (_, metadata) = SafeTensors::read_metadata(bytes).map_err(container)?;
    let file = SafeTensors::deserialize(bytes).map_err(container)?;
    let mut tensors = Tensors::new();
    for (name, view) in file.iter() {
        let values = Values::read(view.dtype(), view.data()).ok_or_else(|| {
            let found = format!("{:?}", view.dtype());
            ModelError::mismatch(format!("type of tensor {name:?}"), "U8, U32, F32 or F64", found)
        })?;
        if let Some((index, value)) = values.not_finite() {
            return Err(ModelError::NotFinite { tensor: name.to_owned(), index, value });
        }
        tensors.insert(name.to_owned(), Tensor { shape: view.shape().to_vec(), values });
    }
    let texts = metadata.metadata().iter().flatten();
    Ok((tensors, texts.map(|(name, text)| (name.clone(), text.clone())).collect()))
}

/// JSON with the keys of every object in order, for any map that the library was built with.
fn serialize_sorted(header: &BTreeMap<String, Value>) -> Vec<u8> {
    fn write(value: &Value, out: &mut String) {
        if let Value::Object(map) = value {
            let mut entries: Vec<_> = map.iter().collect();
            entries.sort_by_key(|(name, _)| name.as_str());
            write_entries(entries.into_iter(), out);
        } else {
            out.push_str(&value.to_string());
        }
    }
    fn write_entries<'a>(entries: impl Iterator<Item = (&'a String, &'a Value)>, out: &mut String) {
        out.push('{');
        for (i, (name, value)) in entries.enumerate() {
            if i > 0 {
                out.push(',');
            }
            out.push_str(&Value::from(name.as_str()).to_string());
            out.push(':');
            write(value, out);
        }
        out.push('}');
    }
    let mut out = String::new();
    write_entries(header.iter(), &mut out);
    out.into_bytes()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn example() -> (Tensors, Texts) {
        let tensors = Tensors::from([
            ("b".to_owned(), Tensor::new(&[2, 1], vec![1.5_f32, -0.0])),
            ("a".to_owned(), Tensor::new(&[1], vec![3.0_f32])),
        ]);
        (tensors, Texts::from([("z".to_owned(), "\"q\"\n".to_owned()), ("y".into(), "é".into())]))
    }

    #[test]
    fn what_is_written_is_read_back_and_written_alike() {
        let (tensors, texts) = example();
        let bytes = encode(&tensors, &texts);
        let (tensors_read, texts_read) = decode(&bytes).unwrap();
        assert_eq!((&tensors_read, &texts_read), (&tensors, &texts));
        assert_eq!(encode(&tensors_read, &texts_read), bytes);
    }

    #[test]
    fn data_is_aligned_and_keys_stand_in_order() {
        let (tensors, texts) = example();
        let bytes = encode(&tensors, &texts);
        let header = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
        assert_eq!(header % ALIGNMENT, 0);
        assert_eq!(bytes.len(), 8 + header + 12);
        assert_eq!(bytes.len() as u64, encoded_len(&tensors, &texts));
        let text = std::str::from_utf8(&bytes[8..8 + header]).unwrap();
        let places: Vec<_> = ["__metadata__", "\"y\"", "\"z\"", "\"a\"", "\"b\"", "\"shape\""]
            .map(|key| text.find(key).unwrap())
            .into();
        assert!(places[..5].is_sorted(), "{text}");
    }

    #[test]
    fn rejects_other_types_infinities_and_every_truncation() {
        let (tensors, texts) = example();
        let bytes = encode(&tensors, &texts);
        for len in 0..bytes.len() {
            assert!(decode(&bytes[..len]).is_err(), "{len} bytes");
        }
        let mut infinite = bytes.clone();
        let at = bytes.len() - 4;
        infinite[at..].copy_from_slice(&f32::INFINITY.to_le_bytes());
        assert!(matches!(decode(&infinite), Err(ModelError::NotFinite { index: 1, .. })));
        let text = String::from_utf8_lossy(&bytes).replacen("F32", "I32", 1);
        // The replacement keeps the length, but lossy text may not: build it from bytes.
        assert!(text.contains("I32"));
        let mut integers = bytes;
        let at = integers.windows(3).position(|three| three == b"F32").unwrap();
        integers[at] = b'I';
        assert!(matches!(decode(&integers), Err(ModelError::Mismatch { .. })));
    }
}
