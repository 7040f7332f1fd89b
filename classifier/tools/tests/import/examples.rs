//! Small ONNX files.

use afterimage_classifier_tools::onnx_proto::*;
use prost::Message;

/// A node's parameters.
pub(crate) type Attributes = Vec<AttributeProto>;

fn ints(name: &str, ints: &[i64]) -> AttributeProto {
    AttributeProto { name: name.to_owned(), ints: ints.to_vec(), ..AttributeProto::default() }
}

fn floats(name: &str, floats: &[f32]) -> AttributeProto {
    AttributeProto { name: name.to_owned(), floats: floats.to_vec(), ..AttributeProto::default() }
}

fn text(name: &str, text: &str) -> AttributeProto {
    AttributeProto { name: name.to_owned(), s: text.into(), ..AttributeProto::default() }
}

pub(crate) fn node(
    operation: &str,
    input: &[&str],
    output: &[&str],
    attribute: Vec<AttributeProto>,
) -> NodeProto {
    let names = |names: &[&str]| names.iter().map(|&name| name.to_owned()).collect();
    NodeProto {
        input: names(input),
        output: names(output),
        op_type: operation.to_owned(),
        attribute,
    }
}

fn value(name: &str, dims: &[i64]) -> ValueInfoProto {
    let dim = dims.iter().map(|&dim_value| DimensionProto { dim_value }).collect();
    let tensor_type = Some(TensorTypeProto { shape: Some(ShapeProto { dim }) });
    ValueInfoProto { name: name.to_owned(), r#type: Some(TypeProto { tensor_type }) }
}

/// A model of four features with these nodes, from `X` to `output`.
pub(crate) fn model(node: Vec<NodeProto>, output: &str) -> ModelProto {
    let mul = TensorProto {
        data_type: FLOAT,
        raw_data: 0.5_f32.to_le_bytes().into(),
        name: "half".to_owned(),
        ..TensorProto::default()
    };
    ModelProto {
        // The version of the format: 8 for ONNX 1.10 and later.
        ir_version: 8,
        producer_name: "test".to_owned(),
        producer_version: "1".to_owned(),
        graph: Some(GraphProto {
            node,
            initializer: vec![mul],
            input: vec![value("X", &[0, 4])],
            output: vec![value(output, &[0])],
            sparse_initializer: vec![],
        }),
    }
}

/// An SVM of three classes; two vectors of the first, one of each other.
pub(crate) fn svm(input: &str, kernel: &str) -> NodeProto {
    let vectors = [0.2, 0.0, 1.0, 0.4, 0.0, 0.6, 1.0, 0.8, 1.0, 1.0, 0.0, 0.0, 0.2, 0.2, 0.2, 0.8];
    let attributes = vec![
        ints("classlabels_ints", &[7, 0, 300]),
        floats("coefficients", &[1.0, 0.5, -1.0, -0.5, 0.25, 1.0, 0.75, -1.0]),
        floats("kernel_params", &[0.5, 0.125, 2.0]),
        text("kernel_type", kernel),
        text("post_transform", "NONE"),
        floats("rho", &[0.125, -0.25, 0.0625]),
        floats("support_vectors", &vectors),
        ints("vectors_per_class", &[2, 1, 1]),
    ];
    node("SVMClassifier", &[input], &["label", "scores"], attributes)
}

/// Linear machines of two classes, in one row or two.
pub(crate) fn linear(input: &str, rows: usize) -> NodeProto {
    let coefficients = [1.0, -1.0, 0.5, 0.0, -1.0, 1.0, -0.5, 0.0];
    let attributes = vec![
        ints("classlabels_ints", &[4, 9]),
        floats("coefficients", &coefficients[..4 * rows]),
        floats("intercepts", &[0.0, 0.0][..rows]),
    ];
    node("LinearClassifier", &[input], &["label", "scores"], attributes)
}

pub(crate) fn scaler(input: &str, output: &str) -> NodeProto {
    let attributes =
        vec![floats("offset", &[0.1, 0.2, 0.3, 0.4]), floats("scale", &[2.0, 3.0, 2.0, 2.0])];
    node("Scaler", &[input], &[output], attributes)
}

/// Files that can be imported, each with a name.
pub(crate) fn files() -> Vec<(&'static str, Vec<u8>)> {
    let cast = |input: &str, output: &str, to| {
        let to = AttributeProto { name: "to".to_owned(), i: to, ..AttributeProto::default() };
        node("Cast", &[input], &[output], vec![to])
    };
    [
        ("rbf", model(vec![svm("X", "RBF"), cast("label", "out", 7)], "out")),
        ("poly", model(vec![svm("X", "POLY")], "label")),
        ("sigmoid", model(vec![svm("X", "SIGMOID")], "label")),
        ("linear_kernel", model(vec![svm("X", "LINEAR")], "label")),
        ("scaled", model(vec![scaler("X", "scaled"), svm("scaled", "RBF")], "label")),
        ("one_row", model(vec![linear("X", 1)], "label")),
        (
            "two_rows",
            model(
                vec![
                    cast("X", "floats", 1),
                    node("Mul", &["floats", "half"], &["halves"], vec![]),
                    linear("halves", 2),
                ],
                "label",
            ),
        ),
    ]
    .map(|(name, model)| (name, model.encode_to_vec()))
    .into()
}
