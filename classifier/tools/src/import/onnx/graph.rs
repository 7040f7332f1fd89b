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
    for step in steps.into_iter().rev() {
        apply(graph, step, &mut scaling)?;
    }
    Ok(Path { classifier: node, scaling, declared: declared_features(input) })
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
        "Cast" => match attribute(step, "to").map(|to| to.i) {
            Some(to) if [FLOAT.into(), DOUBLE.into()].contains(&to) => Ok(()),
            to => {
                Err(refuse(format!("Cast to type {to:?} before the classifier is not supported")))
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
