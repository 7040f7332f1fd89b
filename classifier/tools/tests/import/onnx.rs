//! ONNX files, valid and invalid.

use prost::Message;

use afterimage_classifier_tools::onnx_proto::*;

use super::*;

#[test]
fn refuses_an_onnx_file_of_empty_messages_undecoded() {
    // A graph of nodes of two bytes each.
    let nodes = [0x0a, 0].repeat(1 << 20);
    let file = [&[0x3a, 0x80, 0x80, 0x80, 0x01][..], &nodes].concat();
    let error = error_with(&file, &options());
    assert!(error.contains("1048577 parts; the limit is 1048576"), "{error}");
}

#[test]
fn onnx_files_are_imported_whole() {
    let options = ImportOptions { divisor: Some(255.0), ..options() };
    for (name, file) in examples::files() {
        let imported = Imported::from_bytes(&file, &options).unwrap();
        assert_eq!(imported.features, 4, "{name}");
        assert!(imported.origin.contains("test 1"), "{imported}");
        let bytes = imported.model.to_bytes();
        let read = Model::from_bytes(&bytes).unwrap();
        assert_eq!((read.digest(), read.to_bytes()), (imported.model.digest(), bytes), "{name}");
        let of_bytes = imported.model.description().contains("(bytes)");
        assert_eq!(of_bytes, ["rbf", "poly", "sigmoid", "linear_kernel"].contains(&name), "{name}");
    }
}

/// Sums by hand: rho is added in ONNX; coefficients stand by class.
#[test]
fn onnx_votes_and_scores_are_those_of_its_document() {
    let import = |name: &str, divisor| {
        let options = ImportOptions { divisor: Some(divisor), ..options() };
        let (_, file) = examples::files().into_iter().find(|(n, _)| *n == name).unwrap();
        Imported::from_bytes(&file, &options).unwrap().model
    };
    let model = import("linear_kernel", 255.0);
    assert_eq!(model.labels(), [7, 0, 300]);
    // x = (1, 0, 0, 0), so K = (0.2, 0, 1, 0.2); the pairs are 0.2 + 0.25·1 + 0.125, 0.2·0.25 … by
    // row and class.
    let k = [0.2, 0.0, 1.0, 0.2];
    let pair_01 = 1.0 * k[0] + 0.5 * k[1] - k[2] + 0.125;
    let pair_02 = 0.25 * k[0] + k[1] - 0.5 * k[3] - 0.25;
    let pair_12 = 0.75 * k[2] - k[3] + 0.0625;
    assert!(pair_01 < 0.0 && pair_02 < 0.0 && pair_12 > 0.0);
    assert_eq!(scores(&model, &[255, 0, 0, 0]), [0.0, 2.0, 1.0]);
    assert_eq!(model.classify(&[255, 0, 0, 0]).unwrap(), 0);
    // One row: above zero the second label, at zero the first.
    let one = import("one_row", 1.0);
    assert_eq!(one.classify(&[2, 0, 0, 0]).unwrap(), 9);
    assert_eq!(one.classify(&[1, 1, 0, 0]).unwrap(), 4);
    // Two rows: the first of equals.
    let two = import("two_rows", 1.0);
    assert_eq!(two.classify(&[0, 1, 0, 0]).unwrap(), 9);
    assert_eq!(two.classify(&[1, 1, 0, 0]).unwrap(), 4);
    assert_eq!(scores(&two, &[2, 0, 0, 0]), [1.0, -1.0]);
    // The scaler: (x/255 − offset) · scale. A sample has x/255.
    let (_, file) = examples::files().into_iter().find(|(name, _)| *name == "scaled").unwrap();
    let given = ImportOptions { divisor: Some(255.0), ..options() };
    let imported = Imported::from_bytes(&file, &given).unwrap();
    assert_eq!((imported.byte(0, 0.2), imported.byte(3, 1.0)), (Some(51), Some(255)));
    let scaled = import("scaled", 255.0);
    assert_eq!(
        scaled.description(),
        "rbf kernel, one machine for each pair of classes, 4 support vectors"
    );
}

/// Two in every encoding of a tensor.
fn encodings() -> Vec<(String, TensorProto)> {
    let of = |data_type| TensorProto { data_type, ..TensorProto::default() };
    let raw =
        |data_type, raw_data: &[u8]| TensorProto { raw_data: raw_data.into(), ..of(data_type) };
    let mut all = vec![
        TensorProto { float_data: vec![2.0], ..of(FLOAT) },
        TensorProto { double_data: vec![2.0], ..of(DOUBLE) },
        TensorProto { int32_data: vec![0x4000], ..of(FLOAT16) },
        TensorProto { int32_data: vec![0x4000], ..of(BFLOAT16) },
        TensorProto { int64_data: vec![2], ..of(INT64) },
        raw(FLOAT, &2_f32.to_le_bytes()),
        raw(DOUBLE, &2_f64.to_le_bytes()),
        raw(FLOAT16, &[0, 0x40]),
        raw(BFLOAT16, &[0, 0x40]),
        raw(UINT8, &[2]),
        raw(INT8, &[2]),
        raw(UINT16, &[2, 0]),
        raw(INT16, &[2, 0]),
        raw(INT32, &2_i32.to_le_bytes()),
        raw(UINT32, &2_u32.to_le_bytes()),
        raw(INT64, &2_i64.to_le_bytes()),
        raw(UINT64, &2_u64.to_le_bytes()),
    ];
    for data_type in [UINT8, INT8, UINT16, INT16, INT32] {
        all.push(TensorProto { int32_data: vec![2], ..of(data_type) });
    }
    for data_type in [UINT32, UINT64] {
        all.push(TensorProto { uint64_data: vec![2], ..of(data_type) });
    }
    // One number for all features, or one for each.
    let shaped = |dims: &[i64]| TensorProto {
        dims: dims.to_vec(),
        double_data: vec![2.0; dims.iter().product::<i64>() as usize],
        ..of(DOUBLE)
    };
    all.extend([shaped(&[1]), shaped(&[1, 1]), shaped(&[4]), shaped(&[1, 4])]);
    all.into_iter().map(|tensor| (format!("{tensor:?}"), tensor)).collect()
}

/// A graph that divides by `two` before two linear machines.
fn divided(nodes: Vec<NodeProto>, initializers: Vec<TensorProto>) -> Vec<u8> {
    let by = examples::node("Div", &["X", "two"], &["halves"], vec![]);
    let mut model =
        examples::model([nodes, vec![by, examples::linear("halves", 2)]].concat(), "label");
    model.graph.as_mut().unwrap().initializer.extend(initializers);
    model.encode_to_vec()
}

#[test]
fn a_constant_is_the_same_in_every_encoding() {
    let given = ImportOptions { divisor: Some(1.0), ..options() };
    let import = |file: &[u8]| Imported::from_bytes(file, &given).map(|it| it.model.digest());
    let (_, halved) = examples::files().into_iter().find(|(name, _)| *name == "two_rows").unwrap();
    let expected = import(&halved).unwrap();
    let constant = |attribute| examples::node("Constant", &[], &["two"], vec![attribute]);
    for (what, tensor) in encodings() {
        let named = TensorProto { name: "two".to_owned(), ..tensor.clone() };
        assert_eq!(import(&divided(vec![], vec![named.clone()])).unwrap(), expected, "{what}");
        let value =
            AttributeProto { name: "value".to_owned(), t: Some(tensor), ..Default::default() };
        let file = divided(vec![constant(value)], vec![]);
        assert_eq!(import(&file).unwrap(), expected, "{what} in a node");
        // Integers reach a division of floats through a cast.
        let named = TensorProto { name: "integer".to_owned(), ..named };
        let to = AttributeProto { name: "to".to_owned(), i: 1, ..Default::default() };
        let cast = examples::node("Cast", &["integer"], &["cast"], vec![to]);
        let identity = examples::node("Identity", &["cast"], &["two"], vec![]);
        let file = divided(vec![cast, identity], vec![named]);
        assert_eq!(import(&file).unwrap(), expected, "{what} after a cast");
    }
    for value in [
        AttributeProto { name: "value_float".to_owned(), f: 2.0, ..Default::default() },
        AttributeProto {
            name: "value_floats".to_owned(),
            floats: vec![2.0; 4],
            ..Default::default()
        },
        AttributeProto { name: "value_int".to_owned(), i: 2, ..Default::default() },
        AttributeProto { name: "value_ints".to_owned(), ints: vec![2], ..Default::default() },
    ] {
        assert_eq!(
            import(&divided(vec![constant(value.clone())], vec![])).unwrap(),
            expected,
            "{value:?}"
        );
    }
}

#[test]
fn constants_that_cannot_be_read_are_refused() {
    let error = |tensor: TensorProto| {
        let named = TensorProto { name: "two".to_owned(), ..tensor };
        error_with(&divided(vec![], vec![named]), &options())
    };
    let double = TensorProto { data_type: DOUBLE, double_data: vec![2.0; 4], ..Default::default() };
    for (error, part) in [
        (error(TensorProto { data_location: EXTERNAL, ..double.clone() }), "in another file"),
        (error(TensorProto { data_type: 8, ..double.clone() }), "unsupported type 8"),
        (error(TensorProto { dims: vec![3], ..double.clone() }), "4 numbers for dimensions [3]"),
        (error(TensorProto { dims: vec![-2, -2], ..double.clone() }), "differs between images"),
        (error(TensorProto { dims: vec![i64::MAX, 4], ..double.clone() }), "4 numbers for"),
        (error(TensorProto { dims: vec![4, 1], ..double.clone() }), "differs between images"),
        (error(TensorProto { raw_data: vec![0; 7], ..double }), "0 numbers for"),
        (error_with(&divided(vec![], vec![]), &options()), "Div without a constant operand"),
    ] {
        assert!(error.contains(part), "{error:?} should contain {part:?}");
    }
}

#[test]
fn a_constant_less_the_features_is_a_negative_scale() {
    let from = TensorProto { name: "two".to_owned(), ..encodings().swap_remove(0).1 };
    let less = examples::node("Sub", &["two", "X"], &["rest"], vec![]);
    let mut model = examples::model(vec![less, examples::linear("rest", 2)], "label");
    model.graph.as_mut().unwrap().initializer.push(from);
    let options = ImportOptions { divisor: Some(1.0), ..options() };
    let model = Imported::from_bytes(&model.encode_to_vec(), &options).unwrap().model;
    // Weights 1, -1, 0.5, 0 on 2 - x.
    assert_eq!(scores(&model, &[1, 3, 4, 9]), [1.0 + 1.0 - 1.0, -1.0 - 1.0 + 1.0]);
}

#[test]
fn onnx_files_of_other_models_are_refused() {
    let import = |nodes: Vec<_>, output: &str| {
        error_with(&examples::model(nodes, output).encode_to_vec(), &options())
    };
    let other = |operation: &str, input: &str, output: &str| {
        examples::node(operation, &[input], &[output], vec![])
    };
    let with = |change: &dyn Fn(&mut examples::Attributes)| {
        let mut node = examples::svm("X", "RBF");
        change(&mut node.attribute);
        import(vec![node], "label")
    };
    for (error, part) in [
        (import(vec![other("TreeEnsembleClassifier", "X", "label")], "label"), "TreeEnsemble"),
        (import(vec![examples::svm("X", "RBF"), examples::svm("X", "RBF")], "label"), "one SVM"),
        (import(vec![examples::svm("X", "RBF")], "scores"), "its first output"),
        (import(vec![examples::svm("X", "RBF"), other("Neg", "label", "out")], "out"), "is of Neg"),
        (
            import(vec![other("Normalizer", "X", "n"), examples::svm("n", "RBF")], "label"),
            "Normalizer before",
        ),
        (
            import(vec![other("Identity", "a", "a"), examples::svm("a", "RBF")], "label"),
            "more than 16",
        ),
        (import(vec![examples::svm("Y", "RBF")], "label"), "is not an input"),
        (import(vec![examples::svm("X", "CUBIC")], "label"), "kernel \"CUBIC\""),
        (with(&|all| all[7].ints = vec![1, 1]), "vectors_per_class holds 2"),
        (with(&|all| all[7].ints = vec![1, -1, 4]), "not from 0"),
        (with(&|all| all[6].floats.truncate(15)), "15 numbers"),
        (with(&|all| all[6].floats.truncate(12)), "takes 3 features, the graph's input has 4"),
        (with(&|all| all[6].floats[3] = f32::NAN), "support vector"),
        (with(&|all| all[1].floats[3] = f32::INFINITY), "finite"),
        (with(&|all| all[2].floats.truncate(1)), "kernel_params holds 1"),
        (with(&|all| all[5].floats.truncate(2)), "kernel.rho"),
        (with(&|all| all[0].ints[1] = -5), "--labels"),
        (with(&|all| all[0].name = "other".to_owned()), "class labels are missing"),
    ] {
        assert!(error.contains(part), "{error:?} should contain {part:?}");
    }
    let large = ImportOptions { shape: Some(Shape::MNIST), ..options() };
    let (_, file) = examples::files().swap_remove(0);
    assert!(
        error_with(&file, &large)
            .contains("takes 4 features; images of 28x28 have 784 bytes (--shape)")
    );
    let alone = Imported::from_bytes(&file, &ImportOptions::default()).unwrap();
    assert_eq!(alone.model.shape(), Shape::new(&[4]).unwrap());
}
