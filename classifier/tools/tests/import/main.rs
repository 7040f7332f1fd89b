//! Import of text models and ONNX files, valid and invalid. `original_tools.rs` runs the original
//! tools.

#![allow(clippy::unwrap_used, reason = "a failed step fails the test")]

mod examples;
mod onnx;

use afterimage_classifier::{Model, Shape};
use afterimage_classifier_tools::{ImportOptions, Imported, Sample, Scale};

fn options() -> ImportOptions {
    let shape = Some(Shape::new(&[2, 2]).unwrap());
    ImportOptions { shape, divisor: Some(1.0), ..ImportOptions::default() }
}

fn import(text: &str) -> Model {
    Imported::from_bytes(text.as_bytes(), &options()).unwrap().model
}

fn scores(model: &Model, image: &[u8]) -> Vec<f32> {
    model.scores(&[image]).unwrap().into_raw_vec_and_offset().0
}

const LIBLINEAR: &str = "solver_type L2R_L2LOSS_SVC_DUAL\nnr_class 3\nlabel 7 0 300\n\
    nr_feature 3\nbias 2\nw\n1 0 -1 \n0 1 -1 \n0 0 5.5e-1 \n-2 0.25 0 \n";
const BINARY: &str = "solver_type L2R_LR\nnr_class 2\nlabel 1 0\nnr_feature 4\nbias -1\nw\n\
    1 \n-1 \n0 \n0 \n";
const LIBSVM: &str = "svm_type c_svc\nkernel_type linear\nnr_class 2\ntotal_sv 2\nrho -0.5\n\
    label 4 9\nprobA -1.5\nprobB 0\nnr_sv 1 1\nSV\n0.5 1:2 4:1 \n-0.5 2:2 4:1 \n";
const RBF: &str = "svm_type nu_svc\nkernel_type rbf\ngamma 0.5\nnr_class 3\ntotal_sv 4\n\
    rho 0.1 0 -0.25\nlabel 4 9 2\nnr_sv 2 1 1\nSV\n0.5 1 1:0.2 4:1 \n0.25 0 \n\
    -1 0.5 2:0.494118 \n-1 -0.5 1:0.6 3:1 \n";

fn error_with(text: &[u8], options: &ImportOptions) -> String {
    let error = Imported::from_bytes(text, options).unwrap_err().to_string();
    assert!(!error.contains('\n'), "one line: {error}");
    error
}

fn error(text: &str) -> String {
    error_with(text.as_bytes(), &options())
}

#[test]
fn liblinear_weights_labels_and_bias_are_taken_over() {
    let model = import(LIBLINEAR);
    assert_eq!(model.labels(), [7, 0, 300]);
    // Column by column: the weights on 3, 5, 2, nothing on the last byte, twice the last line.
    assert_eq!(scores(&model, &[3, 5, 2, 9]), [3.0 - 4.0, 5.0 + 0.5, -3.0 - 5.0 + 1.1]);
    assert_eq!(model.classify(&[19, 5, 2, 9]).unwrap(), 7);
    let read = Model::from_bytes(&model.to_bytes()).unwrap();
    assert_eq!(read.digest(), model.digest());
}

#[test]
fn a_binary_model_answers_as_the_original_does_also_at_zero() {
    let model = import(BINARY);
    assert_eq!(model.labels(), [1, 0]);
    assert_eq!(model.classify(&[2, 1, 0, 0]).unwrap(), 1);
    assert_eq!(model.classify(&[1, 2, 0, 0]).unwrap(), 0);
    // `predict` of both programs: the first label only above zero.
    assert_eq!(model.classify(&[1, 1, 0, 0]).unwrap(), 0);
}

#[test]
fn crammer_and_singer_answers_by_the_first_weight_vector() {
    let model = import(
        "solver_type MCSVM_CS\nnr_class 2\nlabel 3 8\nnr_feature 1\nbias 1\nw\n-1 -2 \n9 20 \n",
    );
    // `predict` does not ask which of the two scores is the greater.
    assert_eq!(model.classify(&[5, 0, 0, 0]).unwrap(), 3);
    assert_eq!(scores(&model, &[10, 0, 0, 0]), [-1.0, 1.0]);
    assert_eq!(model.classify(&[10, 0, 0, 0]).unwrap(), 8);
    assert_eq!(model.classify(&[12, 0, 0, 0]).unwrap(), 8);
}

#[test]
fn libsvm_classes_vote_pair_by_pair() {
    let model = import(LIBSVM);
    assert_eq!(model.labels(), [4, 9]);
    // w = (1, −1, 0, 0), b = 0.5.
    assert_eq!(model.classify(&[3, 1, 8, 7]).unwrap(), 4);
    assert_eq!(model.classify(&[0, 1, 8, 7]).unwrap(), 9);
    assert_eq!(scores(&model, &[0, 1, 8, 7]), [0.0, 1.0]);
    let read = Model::from_bytes(&model.to_bytes()).unwrap();
    assert_eq!((read.digest(), read.to_bytes()), (model.digest(), model.to_bytes()));
}

#[test]
fn derives_the_divisor_from_the_support_vectors() {
    let options = ImportOptions { divisor: None, ..options() };
    let import = |text: &str| Imported::from_bytes(text.as_bytes(), &options);
    let rbf = import(RBF).unwrap();
    assert_eq!((rbf.divisor, rbf.features, rbf.labels.join(" ")), (255.0, 4, "4 9 2".to_owned()));
    assert!(rbf.model.description().contains("4 support vectors (bytes)"), "{rbf}");
    assert_eq!(rbf.byte(1, 0.494118), Some(126));
    // 0.494 is no byte over 255: the vectors are kept as numbers.
    let odd = import(&RBF.replace("0.494118", "0.4955")).unwrap();
    assert!(odd.model.description().ends_with("4 support vectors"), "{odd}");
    let bytes = import(&RBF.replace("0.494118", "200").replace("0.2", "51").replace("0.6", "9"));
    assert_eq!(bytes.unwrap().divisor, 1.0);
    let scaled = import(&RBF.replace("0.494118", "-0.5")).unwrap_err().to_string();
    assert!(
        scaled.contains("feature 2 of a support vector") && scaled.contains("--divisor"),
        "{scaled}"
    );
}

/// Weights alone do not tell bytes from bytes over 255, and the answers may be all but the same.
#[test]
fn a_divisor_that_nothing_shows_is_said_to_be_assumed() {
    let said = |file: &[u8], divisor| {
        let options = ImportOptions { divisor, ..options() };
        let printed = Imported::from_bytes(file, &options).unwrap().to_string();
        printed.contains("bytes over 255, a guess: the file does not show it (--divisor)\n")
    };
    assert!(said(LIBLINEAR.as_bytes(), None) && !said(LIBLINEAR.as_bytes(), Some(255.0)));
    assert!(!said(RBF.as_bytes(), None));
    for (name, file) in examples::files() {
        assert_eq!(said(&file, None), name == "one_row", "{name}");
    }
}

#[test]
fn refuses_labels_beyond_16_bits_unless_others_are_given() {
    let text = BINARY.replace("label 1 0", "label +1 -1");
    let refusal = error(&text);
    assert!(refusal.contains("\"-1\"") && refusal.contains("--labels"), "{refusal}");
    let given = ImportOptions { labels: Some(vec![1, 0]), ..options() };
    let imported = Imported::from_bytes(text.as_bytes(), &given).unwrap();
    assert_eq!(
        (imported.model.labels(), imported.labels.join(" ")),
        (&[1, 0][..], "+1 -1".to_owned())
    );
    assert!(imported.to_string().contains("\nanswers   1 0\n"), "{imported}");
    let few = ImportOptions { labels: Some(vec![1]), ..options() };
    assert!(error_with(text.as_bytes(), &few).contains("one for each of the model's 2"));
}

#[test]
fn what_cannot_be_imported_is_refused_with_its_line() {
    for (text, part) in [
        (LIBLINEAR.replace("solver_type", "solver"), "neither a text model"),
        (
            LIBLINEAR.replace("L2LOSS_SVC_DUAL", "L2LOSS_SVR"),
            "line 1: solver \"L2R_L2LOSS_SVR\" does not",
        ),
        (LIBLINEAR.replace("L2R_L2LOSS_SVC_DUAL", "ONECLASS_SVM"), "does not classify"),
        (
            LIBLINEAR.replace("nr_feature 3", "nr_feature 5"),
            "line 4: nr_feature 5 is beyond the 4 bytes of a 2x2 image (--shape)",
        ),
        (LIBLINEAR.replace("bias 2\n", ""), "bias must come before w"),
        (LIBLINEAR.replace("nr_feature 3", "nr_feature 3.5"), "\"3.5\" is not a whole number"),
        (LIBLINEAR.replace("nr_class 3", "nr_class 4"), "agree"),
        (LIBLINEAR.replace("nr_class 3", "nr_class 99999"), "2 to 65535"),
        (LIBLINEAR.replace("300", "65536"), "\"65536\""),
        (LIBLINEAR.replace("7 0 300", "7 0 7"), "7 twice"),
        (LIBLINEAR.replace("5.5e-1", "inf"), "line 9: \"inf\" is not a finite number"),
        (LIBLINEAR.replace("5.5e-1", "5 6"), "line 9: more than 3 weights"),
        (LIBLINEAR.replace("bias 2", "bias -1"), "more follows"),
        (LIBLINEAR.replace("-2 0.25 0 \n", ""), "line 10: the file ends too early"),
        (LIBSVM.replace("linear", "precomputed"), "needs its training data"),
        (LIBSVM.replace("linear", "cubic"), "kernel \"cubic\" is unknown"),
        (LIBSVM.replace("c_svc", "epsilon_svr"), "line 1: svm_type \"epsilon_svr\" does not"),
        (LIBSVM.replace("c_svc", "one_class"), "does not classify"),
        (LIBSVM.replace("nr_class 2", "nr_class 10"), "2 labels before SV; 10 are needed"),
        (LIBSVM.replace("nr_sv 1 1", "nr_sv 1 2"), "3 support vectors in nr_sv before SV; 2 are"),
        (LIBSVM.replace("nr_sv 1 1\n", ""), "0 numbers in nr_sv"),
        (LIBSVM.replace("4:1", "5:1"), "feature 5 is beyond the 4 bytes of a 2x2 image (--shape)"),
        (LIBSVM.replace("1:2 4:1", "2:2 2:1"), "line 11: feature 2 comes after feature 2"),
        (LIBSVM.replace("1:2", "0:2"), "features are counted from 1"),
        (LIBSVM.replace("1:2", "x:2"), "\"x\" is not a whole number"),
        (LIBSVM.replace("4:1", "4"), "line 11: \"4\" is not like 12:0.5"),
        (LIBSVM.replace("0.5 1:2", "nan 1:2"), "line 11: \"nan\" is not a finite number"),
        (LIBSVM.replace("rho -0.5\n", ""), "0 numbers in rho before SV; 1 are needed"),
        (RBF.replace("gamma 0.5", "gamma -0.5"), "gamma: expected a finite number, not negative"),
        (RBF.replace("gamma 0.5", "degree 101"), "0 to 100"),
        (RBF.replace("gamma 0.5\n", ""), "a rbf kernel needs a line gamma before SV"),
        (kernel("polynomial", &["gamma", "coef0"]), "needs a line degree"),
        (kernel("polynomial", &["gamma", "degree"]), "needs a line coef0"),
        (kernel("polynomial", &["degree", "coef0"]), "needs a line gamma"),
        (kernel("sigmoid", &["gamma"]), "needs a line coef0"),
        (kernel("sigmoid", &["coef0"]), "needs a line gamma"),
        (RBF.replace("svm_type nu_svc\n", ""), "svm_type and kernel_type must come before SV"),
        (RBF.replace("kernel_type rbf\n", ""), "svm_type and kernel_type must come before SV"),
        (RBF.replace("svm_type", "\u{feff}svm_type"), "byte-order mark (UTF-8)"),
        (RBF.replace("-1 -0.5 1:0.6", "-1"), "\"3:1\" is not a finite number"),
        (String::new(), "neither a text model"),
    ] {
        let error = error(&text);
        assert!(error.contains(part), "{error:?} should contain {part:?}");
    }
}

/// [`RBF`] with another kernel and these parameters.
fn kernel(name: &str, parameters: &[&str]) -> String {
    let lines: String = parameters.iter().map(|name| format!("{name} 1\n")).collect();
    RBF.replace("rbf\ngamma 0.5\n", &format!("{name}\n{lines}"))
}

#[test]
fn kernels_with_all_their_parameters_are_imported() {
    for (name, parameters) in [
        ("linear", &[][..]),
        ("polynomial", &["gamma", "coef0", "degree"]),
        ("rbf", &["gamma"]),
        ("sigmoid", &["gamma", "coef0"]),
    ] {
        import(&kernel(name, parameters).replace("0.494118", "0"));
    }
}

fn warnings(text: &str, options: &ImportOptions) -> String {
    Imported::from_bytes(text.as_bytes(), options).unwrap().warnings.join("\n")
}

#[test]
fn a_file_cut_in_its_last_line_gives_a_warning() {
    for (text, cut) in [
        (LIBLINEAR, " \n"),
        (BINARY, " \n"),
        (LIBSVM, ".5 2:2 4:1 \n"),
        (RBF, " 3:1 \n"),
        (RBF, ":1 \n"),
    ] {
        let whole = ImportOptions { divisor: None, ..options() };
        assert!(!warnings(text, &whole).contains("may be cut"), "{text}");
        let cut = text.strip_suffix(cut).unwrap();
        match Imported::from_bytes(cut.as_bytes(), &whole) {
            Ok(imported) => assert!(imported.warnings[0].contains("may be cut"), "{cut}"),
            Err(error) => assert!(error.to_string().contains("like 12:0.5"), "{error}"),
        }
    }
    let scaled = |ranges| {
        let scale = Some(Scale::parse(ranges).unwrap());
        warnings(BINARY, &ImportOptions { scale, ..options() })
    };
    assert_eq!(scaled(RANGES), "");
    assert!(scaled(RANGES.trim_end()).starts_with("range file: the last line"));
}

#[test]
fn a_probability_model_is_said_to_follow_votes() {
    let warning = warnings(LIBSVM, &options());
    assert!(warning.contains("-b 1") && warning.contains("follow the votes"), "{warning}");
    assert_eq!(warnings(&LIBSVM.replace("probA -1.5\nprobB 0\n", ""), &options()), "");
}

#[test]
fn other_formats_are_named() {
    for (file, part) in [
        (&b"\xff\xfes\0v\0m\0"[..], "byte-order mark (UTF-16)"),
        (b"\x80\x04\x95\x10", "Python pickle"),
        (&Model::raw().to_bytes(), "a safetensors file"),
    ] {
        let error = error_with(file, &options());
        assert!(error.contains(part), "{error:?} should contain {part:?}");
    }
    let (_, onnx) = examples::files().swap_remove(0);
    for (file, tool) in
        [(RBF.as_bytes(), "LIBSVM"), (LIBLINEAR.as_bytes(), "LIBLINEAR"), (&onnx, "ONNX")]
    {
        let error = Model::from_bytes(file).unwrap_err().to_string();
        assert!(error.contains(tool) && error.contains("afterimage import FILE"), "{error}");
    }
}

#[test]
fn a_header_larger_than_its_text_allocates_nothing() {
    let options = ImportOptions { shape: Some(Shape::new(&[2048, 2048]).unwrap()), ..options() };
    let labels = (0..4096).map(|l| l.to_string()).collect::<Vec<_>>().join(" ");
    let text = LIBLINEAR
        .replace("nr_class 3", "nr_class 4096")
        .replace("7 0 300", &labels)
        .replace("nr_feature 3", "nr_feature 4194304");
    assert!(error_with(text.as_bytes(), &options).contains("are not there"));
    let text = format!(
        "solver_type MCSVM_CS\nnr_class 4096\nlabel {labels}\nnr_feature 1\nbias -1\nw\n{}\n",
        "1 ".repeat(4096)
    );
    let error = error_with(text.as_bytes(), &options);
    assert!(error.contains("17179869184 weights; the limit is 134217728"), "{error}");
    let text = LIBSVM
        .replace("total_sv 2", "total_sv 4000000000")
        .replace("nr_sv 1 1", "nr_sv 2000000000 2000000000");
    assert!(error_with(text.as_bytes(), &options).contains("line 13: the file ends too early"));
    // A vector of nothing is two bytes of text, and four million of the model.
    let text = LIBSVM.replace("nr_sv 1 1", "nr_sv 500 500").replace("total_sv 2", "total_sv 1000");
    let text = text.split_once("SV\n").unwrap().0.to_owned() + "SV\n" + &"1\n".repeat(1000);
    assert!(error_with(text.as_bytes(), &options).contains("support vectors: expected at most"));
}

#[test]
fn no_truncation_panics() {
    let texts = [LIBLINEAR, BINARY, LIBSVM, RBF].map(|text| text.as_bytes().to_vec());
    let files = texts.into_iter().chain(examples::files().into_iter().map(|(_, file)| file));
    for file in files {
        for len in 0..file.len() {
            let _ = Imported::from_bytes(&file[..len], &options());
        }
        assert!(Imported::from_bytes(&file[..file.len() / 2], &options()).is_err());
        for at in 0..file.len() {
            for flip in [1, 8, 0x80, 0xff] {
                let mut mutated = file.clone();
                mutated[at] ^= flip;
                let _ = Imported::from_bytes(&mutated, &options());
            }
        }
    }
}

/// Of 2 × 2 bytes the first goes from 0 to 200, the third from 50 to 250, and the others are always
/// the same.
const RANGES: &str = "x\n-1 1\n1 0 200\n3 50 250\n";

#[test]
fn what_svm_scale_scaled_is_scaled_before_it_is_scored() {
    let scale = Some(Scale::parse(RANGES).unwrap());
    let options = ImportOptions { divisor: None, scale, ..options() };
    let import = |text: &str| Imported::from_bytes(text.as_bytes(), &options).unwrap();
    let linear = import(LIBLINEAR);
    assert_eq!(linear.divisor, 1.0);
    assert!(linear.origin.ends_with("bias 2, scaled by svm-scale to -1 to 1)"), "{linear}");
    // Features 0.25, 0, -0.6: a constant feature is zero.
    let expected = [0.25 - 4.0, 0.5, -0.25 - 0.6 * 0.55].map(|score: f64| score as f32);
    assert_eq!(scores(&linear.model, &[125, 77, 90, 9]), expected);
    let text = LIBSVM.replace("1:2 4:1", "1:0.25 3:-0.6").replace("2:2 4:1", "1:-1 3:1");
    let kernel = import(&text);
    assert!(kernel.model.description().ends_with("2 support vectors"), "{kernel}");
    // Half of the first vector's dot product less half of the second's, and 0.5.
    assert_eq!(kernel.model.classify(&[125, 0, 90, 0]).unwrap(), 4);
    assert_eq!(kernel.model.classify(&[0, 0, 250, 0]).unwrap(), 9);
    for imported in [&linear, &kernel] {
        let bytes = imported.model.to_bytes();
        let read = Model::from_bytes(&bytes).unwrap();
        assert_eq!((read.digest(), read.to_bytes()), (imported.model.digest(), bytes));
    }
    // The scaled text is the sample; what it leaves out is 0, which is byte 100 of the first
    // feature.
    let sample = Sample::parse("4 1:0.25 3:-0.6\n9 1:-1 3:1\n9 3:1\n", &kernel).unwrap();
    assert_eq!(sample.agreement(&kernel).unwrap().agree, 3);
    for (text, part) in [
        ("4 1:0.254\n", "feature 1 is 0.254, not a byte"),
        ("4 2:0.5 3:1\n", "feature 2 is 0.5, not a byte"),
    ] {
        let error = Sample::parse(text, &kernel).unwrap_err().to_string();
        assert!(error.contains(part), "{error:?} should contain {part:?}");
    }
    let refusal = error_with(text.replace("3:-0.6", "3:-1.6").as_bytes(), &options);
    assert!(refusal.contains("feature 3 of a support vector: expected -1.5 to 1"), "{refusal}");
    let refusal = error_with(text.replace("1:0.25", "2:0.25").as_bytes(), &options);
    assert!(refusal.contains("feature 2 of a support vector: expected 0 to 0"), "{refusal}");
    let (_, onnx) = examples::files().swap_remove(0);
    assert!(error_with(&onnx, &options).contains("for text models"));
    let unscaled = ImportOptions { scale: None, ..options };
    assert!(error_with(text.as_bytes(), &unscaled).contains("--scale for what svm-scale scaled"));
}

#[test]
fn a_sample_is_answered_and_compared() {
    let imported = Imported::from_bytes(BINARY.as_bytes(), &options()).unwrap();
    let sample = Sample::parse("+1 1:5 2:1\n0 1:5 2:9\n1 2:7\n", &imported).unwrap();
    let agreement = sample.agreement(&imported).unwrap();
    assert_eq!((agreement.images, agreement.agree), (3, 2));
    assert_eq!(agreement.to_string(), "2 of 3 (66.67 %)\n  image 3: 1 given, 0 answered");
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("predictions");
    std::fs::write(&path, "1\n0\n0\n").unwrap();
    let predicted = sample.with_predictions(&path).unwrap();
    assert_eq!(predicted.agreement(&imported).unwrap().agree, 3);
    std::fs::write(&path, "1\n0\n").unwrap();
    assert!(
        sample.with_predictions(&path).unwrap_err().to_string().contains("expected 3, found 2")
    );
    for (text, part) in [
        ("1 1:2\n1 1:0.5\n", "line 2: feature 1 is 0.5, not a byte over 1"),
        ("1 5:2\n", "feature 5 is beyond the 4 bytes of a 2x2 image (--shape)"),
        ("1 2:2 1:2\n", "feature 1 comes after feature 2"),
        ("", "the sample has no images"),
        ("1 2\n", "not like"),
        ("1 1:1\n\n1 1:1\n", "line 2: a line without a label"),
    ] {
        let error = Sample::parse(text, &imported).unwrap_err().to_string();
        assert!(error.contains(part), "{error:?} should contain {part:?}");
    }
}
