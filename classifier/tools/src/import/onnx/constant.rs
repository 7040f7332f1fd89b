//! The numbers of an ONNX constant: an initializer or a `Constant` node, in any encoding that ONNX
//! Runtime reads.

use afterimage_classifier::ModelError;

use super::graph::{MAX_STEPS, attribute, input, refuse};
use super::proto::*;
use crate::import::lines::shorten;

/// The numbers of the constant with this name: a single one, or one for each feature. `None` if the
/// value is not constant.
pub(super) fn constant(graph: &GraphProto, name: &str) -> Result<Option<Vec<f64>>, ModelError> {
    let mut name = name;
    let mut rounds_to_single = false;
    for _ in 0..MAX_STEPS {
        let found = if let Some(tensor) = graph.initializer.iter().find(|it| it.name == name) {
            tensor_values(tensor)?
        } else {
            let producer = graph.node.iter().find(|node| node.output.iter().any(|out| out == name));
            match producer.map(|node| (node, node.op_type.as_str())) {
                Some((node, "Constant")) => node_values(node)?,
                Some((node, "Identity")) => {
                    name = input(node)?;
                    continue;
                }
                Some((node, "Cast")) => {
                    match attribute(node, "to").map(|to| to.i) {
                        Some(to) if to == i64::from(FLOAT) => rounds_to_single = true,
                        Some(to) if to == i64::from(DOUBLE) => {}
                        _ => return Ok(None),
                    }
                    name = input(node)?;
                    continue;
                }
                _ => return Ok(None),
            }
        };
        let round = |value: f64| if rounds_to_single { f64::from(value as f32) } else { value };
        return Ok(Some(found.into_iter().map(round).collect()));
    }
    Ok(None)
}

/// The numbers of a `Constant` node.
fn node_values(node: &NodeProto) -> Result<Vec<f64>, ModelError> {
    if let Some(value) = attribute(node, "value") {
        let tensor = value.t.as_ref();
        return tensor_values(tensor.ok_or_else(|| refuse("a Constant node without a tensor"))?);
    }
    let single = |value: &f32| f64::from(*value);
    if let Some(value) = attribute(node, "value_float") {
        Ok(vec![value.f.into()])
    } else if let Some(values) = attribute(node, "value_floats") {
        Ok(values.floats.iter().map(single).collect())
    } else if let Some(value) = attribute(node, "value_int") {
        Ok(vec![value.i as f64])
    } else if let Some(values) = attribute(node, "value_ints") {
        Ok(values.ints.iter().map(|&value| value as f64).collect())
    } else {
        Err(refuse("a Constant node without numbers (sparse values and texts are not supported)"))
    }
}

fn tensor_values(tensor: &TensorProto) -> Result<Vec<f64>, ModelError> {
    let name = || shorten(&tensor.name);
    if tensor.data_location == EXTERNAL {
        return Err(refuse(format!(
            "constant {:?} is in another file; save the model with its data inside",
            name()
        )));
    }
    let TensorProto { raw_data: raw, int32_data, int64_data, uint64_data, .. } = tensor;
    let values: Vec<f64> = match tensor.data_type {
        FLOAT if raw.is_empty() => tensor.float_data.iter().map(|&value| value.into()).collect(),
        DOUBLE if raw.is_empty() => tensor.double_data.clone(),
        // Only the low 16 bits of each number count.
        FLOAT16 if raw.is_empty() => int32_data.iter().map(|&bits| half(bits as u16)).collect(),
        BFLOAT16 if raw.is_empty() => int32_data.iter().map(|&bits| brain(bits as u16)).collect(),
        UINT8 | INT8 | UINT16 | INT16 | INT32 | BOOL if raw.is_empty() => {
            int32_data.iter().map(|&value| value.into()).collect()
        }
        INT64 if raw.is_empty() => int64_data.iter().map(|&value| value as f64).collect(),
        UINT32 | UINT64 if raw.is_empty() => {
            uint64_data.iter().map(|&value| value as f64).collect()
        }
        FLOAT => from_raw(raw, |bytes| f32::from_le_bytes(bytes).into()),
        DOUBLE => from_raw(raw, f64::from_le_bytes),
        FLOAT16 => from_raw(raw, |bytes| half(u16::from_le_bytes(bytes))),
        BFLOAT16 => from_raw(raw, |bytes| brain(u16::from_le_bytes(bytes))),
        UINT8 | BOOL => from_raw(raw, |bytes| u8::from_le_bytes(bytes).into()),
        INT8 => from_raw(raw, |bytes| i8::from_le_bytes(bytes).into()),
        UINT16 => from_raw(raw, |bytes| u16::from_le_bytes(bytes).into()),
        INT16 => from_raw(raw, |bytes| i16::from_le_bytes(bytes).into()),
        INT32 => from_raw(raw, |bytes| i32::from_le_bytes(bytes).into()),
        UINT32 => from_raw(raw, |bytes| u32::from_le_bytes(bytes).into()),
        INT64 => from_raw(raw, |bytes| i64::from_le_bytes(bytes) as f64),
        UINT64 => from_raw(raw, |bytes| u64::from_le_bytes(bytes) as f64),
        other => {
            return Err(refuse(format!("constant {:?} has the unsupported type {other}", name())));
        }
    };
    let count = tensor.dims.iter().try_fold(1_i64, |count, &dim| count.checked_mul(dim));
    if values.is_empty() || count != i64::try_from(values.len()).ok() {
        let (found, dims) = (values.len(), &tensor.dims[..tensor.dims.len().min(8)]);
        return Err(refuse(format!(
            "constant {:?} has {found} numbers for dimensions {dims:?}",
            name()
        )));
    }
    // A scaler has one number, or one for each feature: the last dimension.
    if tensor.dims.split_last().is_some_and(|(_, outer)| outer.iter().any(|&dim| dim != 1)) {
        return Err(refuse(format!("constant {:?} differs between images", name())));
    }
    Ok(values)
}

/// The numbers in little-endian bytes. An incomplete last number is not counted, so the count then
/// differs from the dimensions.
fn from_raw<const N: usize>(raw: &[u8], number: impl Fn([u8; N]) -> f64) -> Vec<f64> {
    let (chunks, rest) = raw.as_chunks();
    if rest.is_empty() { chunks.iter().map(|&bytes| number(bytes)).collect() } else { Vec::new() }
}

/// A 16-bit float of IEEE 754: 5 bits of exponent, 10 of fraction.
fn half(bits: u16) -> f64 {
    let sign = if bits & 0x8000 == 0 { 1.0 } else { -1.0 };
    let exponent = i32::from(bits >> 10 & 0x1f);
    let fraction = f64::from(bits & 0x3ff);
    sign * match exponent {
        0 => fraction * f64::powi(2.0, -24),
        0x1f if fraction == 0.0 => f64::INFINITY,
        0x1f => f64::NAN,
        _ => (1024.0 + fraction) * f64::powi(2.0, exponent - 25),
    }
}

/// A `bfloat16`: the upper half of a 32-bit float.
fn brain(bits: u16) -> f64 {
    f32::from_bits(u32::from(bits) << 16).into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn half_floats_have_their_ieee_values() {
        for (bits, value) in [
            (0x3c00, 1.0),
            (0xc000, -2.0),
            (0x3555, 0.333_251_953_125),
            (0x7bff, 65_504.0),
            (0x0400, 6.103_515_625e-5),
            (0x0001, 5.960_464_477_539_063e-8),
            (0x8000, 0.0),
            (0x7c00, f64::INFINITY),
        ] {
            assert_eq!(half(bits), value, "{bits:#x}");
        }
        assert!(half(0x7c01).is_nan());
        assert_eq!((brain(0x3f80), brain(0xc040)), (1.0, -3.0));
    }
}
