//! Path through an ONNX graph from its input to the classifier, and from there to the label.

use afterimage_classifier::ModelError;

use super::proto::{AttributeProto, DOUBLE, FLOAT, GraphProto, NodeProto, ValueInfoProto, *};
use crate::import::lines::shorten;

/// The nodes that classify.
const CLASSIFIERS: [&str; 2] = ["SVMClassifier", "LinearClassifier"];

/// Most nodes between the input and the classifier: a scaler takes one or two.
pub(super) const MAX_STEPS: usize = 16;

pub(super) fn refuse(detail: impl Into<String>) -> ModelError {
    ModelError::Onnx(detail.into())
}

/// The transformation of every feature before the classifier: `scale · x + offset`, with one number
/// for all features or one for each.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Scaling {
    pub(super) scale: Vec<f64>,
    pub(super) offset: Vec<f64>,
}

impl Scaling {
    fn then(&mut self, scale: &[f64], offset: &[f64]) -> Result<(), ModelError> {
        let len =
            [scale.len(), offset.len(), self.scale.len(), self.offset.len()].into_iter().max();
        let len = len.unwrap_or(1);
        let at = |values: &[f64], j: usize| match values {
            [value] => Ok(*value),
            values => values.get(j).copied().ok_or_else(|| {
                refuse(format!("{} and {len} numbers scale the same features", values.len()))
            }),
        };
        let mut scaling = Self { scale: Vec::new(), offset: Vec::new() };
        for j in 0..len {
            let (by, plus) = (at(scale, j)?, at(offset, j)?);
            scaling.scale.push(at(&self.scale, j)? * by);
            scaling.offset.push(at(&self.offset, j)? * by + plus);
        }
        *self = scaling;
        Ok(())
    }
}

/// The node that classifies, and the path to it.
pub(super) struct Path<'a> {
    pub(super) classifier: &'a NodeProto,
    pub(super) scaling: Scaling,
    /// The declared number of features of the graph's input.
    pub(super) declared: Option<usize>,
    /// The 16-bit type that the graph rounds features to, if it does.
    pub(super) rounds_to: Option<&'static str>,
}

pub(super) fn path(graph: &GraphProto) -> Result<Path<'_>, ModelError> {
    let is_classifier = |node: &&NodeProto| CLASSIFIERS.contains(&node.op_type.as_str());
    let mut classifiers = graph.node.iter().filter(is_classifier);
    let (Some(node), None) = (classifiers.next(), classifiers.next()) else {
        let operations: Vec<_> =
            graph.node.iter().take(5).map(|node| shorten(&node.op_type)).collect();
        return Err(refuse(format!(
            "there must be one SVMClassifier or LinearClassifier; its nodes are {}",
            operations.join(", ")
        )));
    };
    check_output(graph, node)?;
    let mut steps = Vec::new();
    let mut name = input(node)?;
    while let Some(step) = graph.node.iter().find(|step| step.output.iter().any(|out| out == name))
    {
        if steps.len() == MAX_STEPS {
            return Err(refuse(format!("more than {MAX_STEPS} nodes before the classifier")));
        }
        steps.push(step);
        name = variable(graph, step)?;
    }
    let Some(input) = graph.input.iter().find(|input| input.name == name) else {
        return Err(refuse(format!(
            "the classifier takes {:?}, which is not an input of the graph",
            shorten(name)
        )));
    };
    let mut scaling = Scaling { scale: vec![1.0], offset: vec![0.0] };
    let mut rounds_to = None;
    for step in steps.into_iter().rev() {
        apply(graph, step, &mut scaling)?;
        let to = cast_type(step);
        rounds_to = rounds_to.or(to.filter(|&to| is_short(to)).map(type_name));
    }
    Ok(Path { classifier: node, scaling, declared: declared_features(input), rounds_to })
}

fn declared_features(input: &ValueInfoProto) -> Option<usize> {
    let shape = input.r#type.as_ref()?.tensor_type.as_ref()?.shape.as_ref()?;
    usize::try_from(shape.dim.last()?.dim_value).ok().filter(|&features| features > 0)
}

pub(super) fn attribute<'a>(node: &'a NodeProto, name: &str) -> Option<&'a AttributeProto> {
    node.attribute.iter().find(|attribute| attribute.name == name)
}

pub(super) fn floats<'a>(node: &'a NodeProto, name: &str) -> &'a [f32] {
    attribute(node, name).map_or(&[], |attribute| &attribute.floats)
}

/// Checks that the graph's first output is the classifier's first output, the label, after any
/// casts.
fn check_output(graph: &GraphProto, node: &NodeProto) -> Result<(), ModelError> {
    let mut name = graph.output.first().map_or("", |output| output.name.as_str());
    let label = node.output.first().map_or("", String::as_str);
    for _ in 0..MAX_STEPS {
        if name == label && !label.is_empty() {
            return Ok(());
        }
        let producer = graph.node.iter().find(|step| step.output.iter().any(|out| out == name));
        match producer {
            Some(step) if ["Cast", "Identity"].contains(&step.op_type.as_str()) => {
                name = input(step)?;
            }
            Some(step) => {
                let operation = shorten(&step.op_type);
                return Err(refuse(format!(
                    "its first output is of {operation}, not the classifier's label"
                )));
            }
            None => break,
        }
    }
    Err(refuse("its first output is not the classifier's label"))
}

pub(super) fn input(node: &NodeProto) -> Result<&str, ModelError> {
    let operation = || shorten(&node.op_type);
    node.input
        .first()
        .map(String::as_str)
        .ok_or_else(|| refuse(format!("{} has no input", operation())))
}

/// The input of a step, without its constants.
fn variable<'a>(graph: &GraphProto, step: &'a NodeProto) -> Result<&'a str, ModelError> {
    match step.input.as_slice() {
        [first, second] if constant(graph, first)?.is_some() => Ok(second),
        _ => input(step),
    }
}

fn apply(graph: &GraphProto, step: &NodeProto, scaling: &mut Scaling) -> Result<(), ModelError> {
    let double = |values: &[f32]| values.iter().map(|&value| f64::from(value)).collect::<Vec<_>>();
    match step.op_type.as_str() {
        "Identity" => Ok(()),
        "Cast" => match cast_type(step) {
            Some(FLOAT | DOUBLE | FLOAT16 | BFLOAT16) => Ok(()),
            to => {
                let to = to.map_or("no type", type_name);
                Err(refuse(format!("Cast to {to} before the classifier is not supported")))
            }
        },
        "Scaler" => {
            let (offset, scale) = (double(floats(step, "offset")), double(floats(step, "scale")));
            if offset.is_empty() || scale.is_empty() {
                return Err(refuse("Scaler without offset or scale"));
            }
            let less: Vec<_> = offset.iter().map(|offset| -offset).collect();
            scaling.then(&[1.0], &less)?;
            scaling.then(&scale, &[0.0])
        }
        "Mul" | "Add" | "Sub" | "Div" => {
            let [first, second] = step.input.as_slice() else {
                return Err(refuse(format!("{} does not have two inputs", step.op_type)));
            };
            let of_each = |values: Vec<f64>, change: fn(f64) -> f64| -> Vec<f64> {
                values.into_iter().map(change).collect()
            };
            let operands = (constant(graph, first)?, constant(graph, second)?);
            match (step.op_type.as_str(), operands) {
                ("Mul", (None, Some(by)) | (Some(by), None)) => scaling.then(&by, &[0.0]),
                ("Add", (None, Some(plus)) | (Some(plus), None)) => scaling.then(&[1.0], &plus),
                ("Sub", (None, Some(less))) => scaling.then(&[1.0], &of_each(less, |less| -less)),
                ("Sub", (Some(from), None)) => scaling.then(&[-1.0], &from),
                ("Div", (None, Some(by))) => scaling.then(&of_each(by, |by| 1.0 / by), &[0.0]),
                (operation, _) => Err(refuse(format!("{operation} without a constant operand"))),
            }
        }
        other => {
            let other = shorten(other);
            Err(refuse(format!("{other} before the classifier is not supported")))
        }
    }
}

/// The numbers of the constant with this name: a single one, or one for each feature. `None` if the
/// value is not constant.
pub(super) fn constant(graph: &GraphProto, name: &str) -> Result<Option<Vec<f64>>, ModelError> {
    let mut name = name;
    let mut casts = Vec::new();
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
                    casts.push(cast_type(node));
                    name = input(node)?;
                    continue;
                }
                _ if graph.sparse_initializer.iter().any(|it| it.is_named(name)) => {
                    let name = shorten(name);
                    return Err(refuse(format!(
                        "constant {name:?} is sparse, which is not supported"
                    )));
                }
                _ => return Ok(None),
            }
        };
        // The last one that was found is the first one of the graph.
        let mut casts = casts.into_iter().rev();
        return casts.try_fold(found, cast).map(Some);
    }
    Ok(None)
}

/// The type that a `Cast` node casts to.
fn cast_type(node: &NodeProto) -> Option<i32> {
    let to = attribute(node, "to").filter(|_| node.op_type == "Cast")?;
    i32::try_from(to.i).ok()
}

/// A constant in another type.
fn cast(values: Vec<f64>, to: Option<i32>) -> Result<Vec<f64>, ModelError> {
    let round: fn(f64) -> f64 = match to {
        Some(DOUBLE) => |value| value,
        Some(FLOAT) => |value| f64::from(value as f32),
        Some(FLOAT16) => |value| rounded(value, 10, -14, 65_520.0),
        Some(BFLOAT16) => |value| rounded(value, 7, -126, f64::from(f32::MAX)),
        Some(INT32 | INT64) => f64::trunc,
        to => {
            let to = to.map_or("no type", type_name);
            return Err(refuse(format!("Cast of a constant to {to} is not supported")));
        }
    };
    Ok(values.into_iter().map(round).collect())
}

/// The nearest float with so many bits of fraction. The smallest exponent is that of normal
/// numbers; values from `limit` on are infinite.
fn rounded(value: f64, fraction: i32, min_exponent: i32, limit: f64) -> f64 {
    if value == 0.0 || !value.is_finite() {
        return value;
    }
    if value.abs() >= limit {
        return f64::INFINITY.copysign(value);
    }
    let exponent = (value.abs().log2().floor() as i32).max(min_exponent);
    let unit = f64::powi(2.0, exponent - fraction);
    (value / unit).round_ties_even() * unit
}

fn is_short(to: i32) -> bool {
    [FLOAT16, BFLOAT16].contains(&to)
}

/// The name of a type of tensors in the ONNX documents.
fn type_name(data_type: i32) -> &'static str {
    match data_type {
        FLOAT => "float",
        UINT8 => "uint8",
        INT8 => "int8",
        UINT16 => "uint16",
        INT16 => "int16",
        INT32 => "int32",
        INT64 => "int64",
        8 => "string",
        BOOL => "bool",
        FLOAT16 => "float16",
        DOUBLE => "double",
        UINT32 => "uint32",
        UINT64 => "uint64",
        14 | 15 => "a complex type",
        BFLOAT16 => "bfloat16",
        17..=20 => "an 8-bit float",
        21 | 22 => "a 4-bit integer",
        _ => "an unknown type",
    }
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
            let other = type_name(other);
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
        // Every finite half float is its own nearest one, and so is the middle to an even one.
        for bits in 0..0x7c00 {
            let value = half(bits);
            assert_eq!(rounded(value, 10, -14, 65_520.0), value, "{bits:#x}");
            let middle = f64::midpoint(value, half(bits + 1));
            let even = half(bits + (bits & 1));
            if bits < 0x7bff {
                assert_eq!(rounded(-middle, 10, -14, 65_520.0), -even, "{bits:#x}");
            }
        }
        assert_eq!(rounded(65_520.0, 10, -14, 65_520.0), f64::INFINITY);
        assert_eq!((brain(0x3f80), brain(0xc040)), (1.0, -3.0));
    }
}
