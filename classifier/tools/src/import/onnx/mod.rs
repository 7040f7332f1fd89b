//! ONNX files with an `ai.onnx.ml` `SVMClassifier` or `LinearClassifier`, as skl2onnx writes them
//! for `SVC`, `NuSVC`, `LinearSVC`, `LogisticRegression` and similar models of scikit-learn, with
//! or without a scaler.
//!
//! The label equals that of ONNX Runtime. An `SVMClassifier` counts votes of pairs of classes, also
//! in a model with probabilities, and the first of equals wins. A `LinearClassifier` takes the
//! highest score, and the first of equals, for any `post_transform`. ONNX Runtime computes in `f32`
//! and rounds in an order of its own. This module uses `f64`. So labels may differ where only
//! rounding decides.

use afterimage_classifier::kernels::MAX_BYTES;
use afterimage_classifier::pairwise::{
    KernelFunction, Pairwise, Parts, VectorValues, whole_degree,
};
use afterimage_classifier::pixels::{Learnt, Pixels};
use afterimage_classifier::scoring::Scoring;
use afterimage_classifier::weights::Weights;
use afterimage_classifier::{MAX_CLASSES, MAX_INPUT_LEN, ModelError, Shape};
use prost::Message;

use self::graph::{Scaling, attribute, floats, path, refuse};
use self::proto::{ModelProto, NodeProto};
use super::libsvm::describe;
use super::lines::shorten;
use super::{ImportOptions, USUAL_DIVISOR, UnlabelledModel, check_range, check_size, learn_pixels};

mod graph;
#[doc(hidden)]
pub mod proto;

/// A scaler with a smaller scale is for bytes. Pixels from 0 to 1 have a deviation of at most ½, so
/// their scale to deviation 1 is at least 1. And hardly any images have no pixel with a deviation
/// above 2 of 255.
const BYTES_BELOW: f64 = 0.5;

/// Facts of a model about its images.
struct Input<'a> {
    shape: Shape,
    scaling: &'a Scaling,
    options: &'a ImportOptions,
}

pub(super) fn read(bytes: &[u8], options: &ImportOptions) -> Result<UnlabelledModel, ModelError> {
    let strange = || refuse(other_format(bytes));
    let parts = parts(bytes).ok_or_else(strange)?;
    if parts > MAX_PARTS {
        return Err(refuse(format!("it has {parts} parts; the limit is {MAX_PARTS}")));
    }
    if options.scale.is_some() {
        return Err(refuse(
            "svm-scale's ranges are for text models; an ONNX file has its own scaler",
        ));
    }
    let model = ModelProto::decode(bytes).map_err(|_| strange())?;
    let graph = model.graph.as_ref().ok_or_else(strange)?;
    let path = path(graph)?;
    let node = path.classifier;
    let labels = labels(node)?;
    let features = features(node, labels.len())?;
    if let Some(declared) = path.declared.filter(|&declared| declared != features) {
        return Err(refuse(format!(
            "the classifier takes {features} features, the graph's input has {declared}"
        )));
    }
    let shape = match options.shape {
        Some(shape) => shape,
        None if features == Shape::MNIST.len() => Shape::MNIST,
        None => Shape::new(&[u32::try_from(features).unwrap_or(u32::MAX)])?,
    };
    if shape.len() != features {
        return Err(refuse(format!(
            "it takes {features} features; images of {shape} have {} bytes (--shape)",
            shape.len()
        )));
    }
    let input = Input { shape, scaling: &path.scaling, options };
    let producer = match model.producer_name.as_str() {
        "" => "an unnamed tool".to_owned(),
        name => format!("{} {}", shorten(name), shorten(&model.producer_version)),
    };
    match node.op_type.as_str() {
        "SVMClassifier" => read_svm(node, &input, labels, &producer),
        _ => read_linear(node, &input, labels, &producer),
    }
}

/// An error text for bytes that are not an ONNX graph.
fn other_format(bytes: &[u8]) -> &'static str {
    match bytes {
        [0x80, 2..=5, ..] => {
            "it is a Python pickle; export the model to ONNX first, for example with skl2onnx"
        }
        [_, _, _, _, _, _, _, _, b'{', ..] => {
            "it is a safetensors file; a model of this program needs no import (--model FILE)"
        }
        _ => "it is neither a text model of LIBSVM or LIBLINEAR nor an ONNX graph",
    }
}

fn labels(node: &NodeProto) -> Result<Vec<String>, ModelError> {
    let labels = |name| attribute(node, name);
    let mut labels: Vec<String> = match (labels("classlabels_ints"), labels("classlabels_strings"))
    {
        (Some(ints), None) => ints.ints.iter().map(i64::to_string).collect(),
        (None, Some(strings)) => {
            strings.strings.iter().map(|label| shorten(&String::from_utf8_lossy(label))).collect()
        }
        _ => return Err(refuse("the class labels are missing, or have two types")),
    };
    if labels.is_empty() && node.op_type == "LinearClassifier" {
        labels = vec!["0".to_owned(), "1".to_owned()];
    }
    if !(2..=MAX_CLASSES).contains(&labels.len()) {
        return Err(refuse(format!("{} classes; there may be 2 to {MAX_CLASSES}", labels.len())));
    }
    Ok(labels)
}

/// The number of features, from the number of coefficients.
fn features(node: &NodeProto, classes: usize) -> Result<usize, ModelError> {
    let (numbers, rows) = match node.op_type.as_str() {
        "SVMClassifier" => {
            let counts = counts(node, classes)?;
            (floats(node, "support_vectors").len(), counts.iter().map(|&n| n as usize).sum())
        }
        _ => (floats(node, "coefficients").len(), floats(node, "intercepts").len()),
    };
    if rows == 0 || numbers == 0 || !numbers.is_multiple_of(rows) {
        return Err(refuse(format!("{numbers} numbers do not make {rows} rows of features")));
    }
    let features = numbers / rows;
    if features > MAX_INPUT_LEN {
        return Err(refuse(format!("{features} features; the limit is {MAX_INPUT_LEN}")));
    }
    Ok(features)
}

fn counts(node: &NodeProto, classes: usize) -> Result<Vec<u32>, ModelError> {
    let counts = attribute(node, "vectors_per_class").map_or(&[][..], |counts| &counts.ints);
    if counts.len() != classes {
        let found = counts.len();
        return Err(refuse(format!(
            "vectors_per_class holds {found} numbers for {classes} classes"
        )));
    }
    let count = |&count: &i64| u32::try_from(count).ok();
    let counts: Option<Vec<u32>> = counts.iter().map(count).collect();
    counts
        .ok_or_else(|| refuse("vectors_per_class holds a number that is not from 0 to 4294967295"))
}

fn double(values: &[f32]) -> Vec<f64> {
    values.iter().map(|&value| value.into()).collect()
}

fn read_svm(
    node: &NodeProto,
    input: &Input<'_>,
    labels: Vec<String>,
    producer: &str,
) -> Result<UnlabelledModel, ModelError> {
    let function = function(node)?;
    let counts = counts(node, labels.len())?;
    let values = floats(node, "support_vectors");
    let dims = input.shape.len();
    let (divisor, pixels, vectors) = input.vectors(values, dims)?;
    let pairwise = Pairwise::new(Parts {
        pixels: pixels.clone(),
        function,
        dims,
        vectors,
        counts,
        coefficients: double(floats(node, "coefficients")),
        // ONNX adds the constant that LIBSVM subtracts.
        rho: floats(node, "rho").iter().map(|&rho| -f64::from(rho)).collect(),
    })?;
    Ok(UnlabelledModel {
        origin: format!("ONNX of {producer} (SVMClassifier, {})", describe(&function)),
        labels,
        shape: input.shape,
        features: dims,
        divisor,
        assumed: false,
        warnings: Vec::new(),
        pixels: input.taken(divisor, pixels)?,
        scoring: Scoring::Pairwise(Box::new(pairwise)),
    })
}

fn function(node: &NodeProto) -> Result<KernelFunction, ModelError> {
    let kernel = attribute(node, "kernel_type").map_or(&b"LINEAR"[..], |kernel| &kernel.s);
    let parameters = double(floats(node, "kernel_params"));
    let parameters = || match parameters[..] {
        [gamma, coef0, degree] => Ok((gamma, coef0, degree)),
        _ => Err(refuse(format!("kernel_params holds {} numbers; 3 are needed", parameters.len()))),
    };
    match kernel {
        b"LINEAR" => Ok(KernelFunction::Linear),
        b"POLY" => {
            let (gamma, coef0, degree) = parameters()?;
            Ok(KernelFunction::Polynomial { gamma, coef0, degree: whole_degree(degree)? })
        }
        b"RBF" => Ok(KernelFunction::Rbf { gamma: parameters()?.0 }),
        b"SIGMOID" => {
            let (gamma, coef0, _) = parameters()?;
            Ok(KernelFunction::Sigmoid { gamma, coef0 })
        }
        other => {
            let other = shorten(&String::from_utf8_lossy(other));
            Err(refuse(format!("kernel {other:?} is unknown")))
        }
    }
}

fn read_linear(
    node: &NodeProto,
    input: &Input<'_>,
    mut labels: Vec<String>,
    producer: &str,
) -> Result<UnlabelledModel, ModelError> {
    let intercepts = double(floats(node, "intercepts"));
    let expected = if labels.len() == 2 && intercepts.len() == 1 { 1 } else { labels.len() };
    if intercepts.len() != expected {
        let (found, labels) = (intercepts.len(), labels.len());
        return Err(refuse(format!("{found} intercepts for {labels} class labels")));
    }
    if intercepts.len() == 1 {
        // A positive score means the second label in this file, and the first label in `Weights`.
        labels.swap(0, 1);
    }
    let dims = input.shape.len();
    check_size(intercepts.len(), dims, size_of::<f64>())?;
    let divisor = input.divisor();
    let pixels = input.pixels(divisor)?;
    let coefficients = double(floats(node, "coefficients"));
    let weights = Weights::new(pixels.clone(), dims, &coefficients, intercepts)?;
    Ok(UnlabelledModel {
        origin: format!("ONNX of {producer} (LinearClassifier)"),
        labels,
        shape: input.shape,
        features: dims,
        divisor,
        assumed: input.options.divisor.is_none() && input.is_plain(),
        warnings: Vec::new(),
        pixels: input.taken(divisor, pixels)?,
        scoring: Scoring::Weights(weights),
    })
}

impl Input<'_> {
    /// Whether features reach the classifier unchanged.
    fn is_plain(&self) -> bool {
        self.scaling.scale == [1.0] && self.scaling.offset == [0.0]
    }

    /// The divisor of bytes before the scaling of the graph.
    fn divisor(&self) -> f64 {
        let least = self.scaling.scale.iter().fold(f64::INFINITY, |a, b| a.min(b.abs()));
        self.options.divisor.unwrap_or(if least < BYTES_BELOW { 1.0 } else { USUAL_DIVISOR })
    }

    fn pixels(&self, divisor: f64) -> Result<Pixels, ModelError> {
        let plain = Pixels::divided(divisor, true)?;
        if self.is_plain() {
            return Ok(plain);
        }
        let dims = self.shape.len();
        let Scaling { scale, offset } = self.scaling;
        let spread = |values: &[f64], by: f64| match values {
            [value] => Ok(vec![value / by; dims]),
            values if values.len() == dims => Ok(values.iter().map(|value| value / by).collect()),
            values => Err(refuse(format!("{} numbers scale {dims} features", values.len()))),
        };
        Pixels::lines(spread(scale, divisor)?, spread(offset, 1.0)?)
    }

    /// The values of bytes at the input of the graph; `pixels` are their values at the classifier.
    fn taken(&self, divisor: f64, pixels: Pixels) -> Result<Pixels, ModelError> {
        if self.is_plain() { Ok(pixels) } else { Pixels::divided(divisor, true) }
    }

    /// Support vectors, as bytes if possible.
    fn vectors(
        &self,
        values: &[f32],
        dims: usize,
    ) -> Result<(f64, Pixels, VectorValues), ModelError> {
        let count = values.len() / dims;
        if self.is_plain() && dims <= MAX_BYTES {
            let nonzero = values.iter().filter(|value| **value != 0.0).map(|&value| value.into());
            let (divisor, learnt) = learn_pixels(self.options.divisor, true, nonzero)?;
            if let Some(Learnt { pixels, of_vectors, bytes }) = learnt {
                check_size(count, dims, size_of::<u8>())?;
                let mut bytes = bytes.into_iter();
                let byte = |value: &f32| match *value {
                    0.0 => 0,
                    _ => bytes.next().unwrap_or_default(),
                };
                let bytes = values.iter().map(byte).collect();
                return Ok((divisor, pixels, VectorValues::U8(bytes, of_vectors)));
            }
        }
        check_size(count, dims, size_of::<f32>())?;
        let divisor = self.divisor();
        let pixels = self.pixels(divisor)?;
        for (at, &value) in values.iter().enumerate() {
            check_range(&pixels, at % dims, value.into())?;
        }
        Ok((divisor, pixels, VectorValues::F32(values.to_vec())))
    }
}

/// Most messages, texts and integers in a file. 65,535 labels and as many counts of vectors are far
/// below it, and a hundred bytes for each are acceptable.
pub(super) const MAX_PARTS: usize = 1 << 20;

/// The kinds of fields that take more space in memory than in the file.
enum Field {
    Text,
    Integers,
    Message(Fields),
}

type Fields = &'static [(u64, Field)];

/// The repeated fields of `proto.rs`.
const MODEL: Fields = &[(7, Field::Message(GRAPH))];
const GRAPH: Fields = &[
    (1, Field::Message(NODE)),
    (5, Field::Message(TENSOR)),
    (11, Field::Message(VALUE)),
    (12, Field::Message(VALUE)),
];
const NODE: Fields = &[(1, Field::Text), (2, Field::Text), (5, Field::Message(ATTRIBUTE))];
const ATTRIBUTE: Fields = &[(5, Field::Message(TENSOR)), (8, Field::Integers), (9, Field::Text)];
const TENSOR: Fields =
    &[(1, Field::Integers), (5, Field::Integers), (7, Field::Integers), (11, Field::Integers)];
const VALUE: Fields = &[(2, Field::Message(TYPE))];
const TYPE: Fields = &[(1, Field::Message(TENSOR_TYPE))];
const TENSOR_TYPE: Fields = &[(2, Field::Message(SHAPE))];
const SHAPE: Fields = &[(1, Field::Message(&[]))];

/// The number of parts in the bytes of a model; `None` if they are not a message. A group, which no
/// ONNX file has, is not counted as a message.
pub(super) fn parts(bytes: &[u8]) -> Option<usize> {
    of_message(bytes, MODEL)
}

fn of_message(mut bytes: &[u8], fields: Fields) -> Option<usize> {
    let mut parts = 0;
    while !bytes.is_empty() {
        let key = varint(&mut bytes)?;
        let (inside, integers) = match key & 7 {
            0 => varint(&mut bytes).map(|_| (&[][..], 1))?,
            1 => (bytes.split_off(..8)?, 0),
            2 => {
                let len = usize::try_from(varint(&mut bytes)?).ok()?;
                let inside = bytes.split_off(..len)?;
                // A packed integer takes at least one byte.
                (inside, len)
            }
            5 => (bytes.split_off(..4)?, 0),
            _ => return None,
        };
        parts += match fields.iter().find(|(number, _)| *number == key >> 3) {
            None => 0,
            Some((_, Field::Text)) => 1,
            Some((_, Field::Integers)) => integers,
            Some((_, Field::Message(fields))) => 1 + of_message(inside, fields)?,
        };
    }
    Some(parts)
}

/// Removes an integer with seven bits in each byte from the front.
fn varint(bytes: &mut &[u8]) -> Option<u64> {
    let mut value = 0;
    for shift in (0..64).step_by(7) {
        let byte = *bytes.split_off_first()?;
        value |= u64::from(byte & 0x7f) << shift;
        if byte < 0x80 {
            return Some(value);
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use prost::Message;

    use super::proto::*;
    use super::*;

    #[test]
    fn parts_are_messages_texts_and_integers() {
        let attribute = AttributeProto { ints: vec![7, 0, 300], ..AttributeProto::default() };
        let node = NodeProto {
            input: vec!["X".to_owned()],
            output: vec!["label".to_owned(), "scores".to_owned()],
            op_type: "SVMClassifier".to_owned(),
            attribute: vec![attribute.clone(), attribute],
        };
        let dim = [0, 4].map(|dim_value| DimensionProto { dim_value }).to_vec();
        let tensor_type = Some(TensorTypeProto { shape: Some(ShapeProto { dim }) });
        let input =
            ValueInfoProto { name: "X".to_owned(), r#type: Some(TypeProto { tensor_type }) };
        let graph = GraphProto {
            node: vec![node],
            initializer: vec![TensorProto::default()],
            input: vec![input],
            output: vec![ValueInfoProto::default()],
        };
        let model = ModelProto { graph: Some(graph), ..ModelProto::default() };
        // The graph; its node with three names, two attributes and six integers; a constant; the
        // input with a type, a tensor type, a shape and two dimensions; the output.
        assert_eq!(parts(&model.encode_to_vec()), Some(1 + (1 + 3 + 2 + 6) + 1 + 6 + 1));
        assert_eq!(parts(&[]), Some(0));
    }

    #[test]
    fn packed_integers_count_each() {
        // ModelProto { graph { node { attribute { ints: [1, 2, 3] } } } }, packed.
        let file = [0x3a, 9, 0x0a, 7, 0x2a, 5, 0x42, 3, 1, 2, 3];
        let model = ModelProto::decode(&file[..]).unwrap();
        assert_eq!(model.graph.unwrap().node[0].attribute[0].ints, [1, 2, 3]);
        assert_eq!(parts(&file), Some(3 + 3));
    }

    #[test]
    fn what_is_cut_short_or_a_group_is_no_message() {
        for bytes in [
            &[0x80][..],
            &[0x3a, 5, 0],
            &[0x0d, 0, 0, 0],
            &[0x09, 0, 0, 0],
            &[0x3b, 0x3c],
            &[0x3a, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x01],
            &[0xff; 11],
        ] {
            assert_eq!(parts(bytes), None, "{bytes:?}");
        }
    }
}
