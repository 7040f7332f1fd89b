//! ONNX files, good and bad.

use prost::Message;

use super::super::onnx::examples;
use super::*;

#[test]
fn an_onnx_file_of_nothing_but_empty_messages_is_refused_before_it_is_decoded() {
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
        let imported = Model::import_bytes(&file, &options).unwrap();
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
        Model::import_bytes(&file, &options).unwrap().model
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
    let imported = Model::import_bytes(&file, &given).unwrap();
    assert_eq!((imported.byte(0, 0.2), imported.byte(3, 1.0)), (Some(51), Some(255)));
    let scaled = import("scaled", 255.0);
    assert_eq!(
        scaled.description(),
        "rbf kernel, one machine for each pair of classes, 4 support vectors"
    );
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
        (import(vec![examples::svm("Y", "RBF")], "label"), "is no input"),
        (import(vec![examples::svm("X", "CUBIC")], "label"), "kernel \"CUBIC\""),
        (with(&|all| all[7].ints = vec![1, 1]), "vectors_per_class holds 2"),
        (with(&|all| all[7].ints = vec![1, -1, 4]), "count nothing"),
        (with(&|all| all[6].floats.truncate(15)), "15 numbers"),
        (with(&|all| all[6].floats.truncate(12)), "takes 3 features, the input others"),
        (with(&|all| all[6].floats[3] = f32::NAN), "support vector"),
        (with(&|all| all[1].floats[3] = f32::INFINITY), "finite"),
        (with(&|all| all[2].floats.truncate(1)), "kernel_params holds 1"),
        (with(&|all| all[5].floats.truncate(2)), "kernel.rho"),
        (with(&|all| all[0].ints[1] = -5), "--labels"),
        (with(&|all| all[0].name = "other".to_owned()), "no class labels"),
    ] {
        assert!(error.contains(part), "{error:?} should contain {part:?}");
    }
    let large = ImportOptions { shape: Some(Shape::MNIST), ..options() };
    let (_, file) = examples::files().swap_remove(0);
    assert!(error_with(&file, &large).contains("takes 4 features; images of 28x28"));
    let alone = Model::import_bytes(&file, &ImportOptions::default()).unwrap();
    assert_eq!(alone.model.shape(), Shape::new(&[4]).unwrap());
}
