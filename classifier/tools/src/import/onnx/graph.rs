//! Path through an ONNX graph from its input to the classifier, and from there to the label.

use afterimage_classifier::ModelError;

use super::constant::constant;
use super::proto::{AttributeProto, DOUBLE, FLOAT, GraphProto, NodeProto, ValueInfoProto};
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
                return Err(refuse(format!("{} with other than two inputs", step.op_type)));
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
