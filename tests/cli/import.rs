//! Models of other tools, from the file that a tool wrote to the labels that a service answers
//! with.

use std::time::Duration;

use afterimage_classifier::Model;
use afterimage_wire::proto::message::{Classification, Origin};
use tempfile::TempDir;

use crate::common::talk::{Raw, within};
use crate::common::{Running, file, folder, run, text};

/// The longest that the part of a test may take that talks to a service.
const LIMIT: Duration = Duration::from_secs(60);

/// Three classes of LIBSVM's with one support vector each; that which is nearest answers. Images
/// are of 2 × 2 bytes.
const LIBSVM: &str = "svm_type c_svc\nkernel_type rbf\ngamma 2\nnr_class 3\ntotal_sv 3\nrho 0 0 0\n\
                      label 65535 300 7\nnr_sv 1 1 1\nSV\n1 1 1:1 \n-1 1 2:1 \n-1 -1 3:0.501961 \n";
const LIBSVM_IMAGES: [([u8; 4], u16); 4] = [
    ([255, 0, 0, 0], 65_535),
    ([0, 200, 0, 0], 300),
    ([0, 0, 128, 0], 7),
    ([200, 190, 0, 9], 65_535),
];

/// An ONNX file with a `LinearClassifier` of two classes: the first pixel weighs for 4, the second
/// for 9.
fn onnx() -> Vec<u8> {
    let floats = |name: &str, values: &[f32]| {
        let values: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        part(5, &[part(1, name.as_bytes()), part(7, &values)].concat())
    };
    let labels = part(5, &[part(1, b"classlabels_ints"), part(8, &[4, 9])].concat());
    let node = [
        part(1, b"X"),
        part(2, b"label"),
        part(4, b"LinearClassifier"),
        labels,
        floats("coefficients", &[1.0, 0.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0]),
        floats("intercepts", &[0.0, 0.125]),
    ];
    let graph =
        [part(1, &node.concat()), part(11, &part(1, b"X")), part(12, &part(1, b"label"))].concat();
    [&[0x08, 8][..], &part(2, b"hand"), &part(3, b"1"), &part(7, &graph)].concat()
}

/// A field of a message of Protocol Buffers that is as long as it says.
fn part(number: u8, inside: &[u8]) -> Vec<u8> {
    let (low, high) = (inside.len() as u8 | 0x80, u8::try_from(inside.len() >> 7).unwrap());
    [&[number << 3 | 2, low, high], inside].concat()
}

/// Imports a file for images of 2 × 2 bytes; returns the model's path and the output.
fn import(folder: &TempDir, model: impl AsRef<[u8]>, more: &[&str]) -> (String, String) {
    let model = file(folder, "theirs", model);
    let out = text(folder.path().join("ours.safetensors"));
    let args = ["import", &model, "--shape", "2x2", "--out", &out];
    let printed = run(&[&args[..], more].concat()).succeeded();
    (out, printed)
}

#[test]
fn imports_a_kernel_model_of_libsvm_and_describes_it() {
    let folder = folder();
    let sample = file(&folder, "sample", "65535 1:1\n300 2:1\n9 3:0.501961\n");
    let predictions = file(&folder, "predictions", "65535\n300\n7\n");
    let more = ["--sample", &sample, "--predictions", &predictions];
    let (out, printed) = import(&folder, LIBSVM, &more);
    let model = Model::read(out.as_ref()).unwrap();
    for said in [
        "LIBSVM (c_svc, RBF kernel, gamma 2)",
        "3 support vectors (bytes)",
        "3, labels 65535 300 7",
        "features  3 of images of 2x2: bytes over 255",
        &model.digest().to_string(),
        "accuracy on the sample: 2 of 3 (66.67 %)\n  image 3: 9 given, 7 answered",
        "agreement with the original tool: 3 of 3 (100.00 %)",
        &format!("wrote {out} ("),
    ] {
        assert!(printed.contains(said), "{said:?} in\n{printed}");
    }
    for (image, label) in LIBSVM_IMAGES {
        assert_eq!(model.classify(&image).unwrap(), label, "{image:?}");
    }
}

#[test]
fn a_model_of_scaled_features_takes_its_range_file() {
    let folder = folder();
    // Bytes from 0 to 200 and from 55 to 255 became −1 to 1; the other two were always the same.
    let ranges = file(&folder, "ranges", "x\n-1 1\n1 0 200\n3 55 255\n");
    let model =
        LIBSVM.replace("1:1", "1:1 3:-1").replace("2:1", "1:-1 3:-1").replace("0.501961", "1");
    let sample = file(&folder, "sample", "65535 1:1 3:-1\n300 1:-0.99 3:-1\n7 3:0.95\n");
    let (out, printed) = import(&folder, &model, &["--scale", &ranges, "--sample", &sample]);
    for said in ["gamma 2, scaled by svm-scale to -1 to 1)", "accuracy on the sample: 3 of 3"] {
        assert!(printed.contains(said), "{said:?} in\n{printed}");
    }
    let model = Model::read(out.as_ref()).unwrap();
    for (image, label) in [([200, 9, 55, 0], 65_535), ([1, 0, 55, 9], 300), ([100, 0, 250, 0], 7)] {
        assert_eq!(model.classify(&image).unwrap(), label, "{image:?}");
    }
}

#[test]
fn import_describes_an_onnx_model_and_uses_given_labels() {
    let folder = folder();
    let (out, printed) = import(&folder, onnx(), &["--labels", "40,90"]);
    for said in ["ONNX of hand 1 (LinearClassifier)", "2, labels 4 9", "answers   40 90"] {
        assert!(printed.contains(said), "{said:?} in\n{printed}");
    }
    let model = Model::read(out.as_ref()).unwrap();
    assert_eq!(model.classify(&[200, 100, 0, 0]).unwrap(), 40);
    assert_eq!(model.classify(&[100, 100, 255, 0]).unwrap(), 90);
}

#[test]
fn a_service_answers_with_an_imported_models_own_labels() {
    let folder = folder();
    let (out, _) = import(&folder, LIBSVM, &[]);
    within(LIMIT, async {
        for command in ["serve", "classifier"] {
            let service = Running::start(&[command, "--model", &out]);
            let (mut raw, welcome) = Raw::open(service.addr(), "").await;
            assert_eq!(welcome.digest, Model::read(out.as_ref()).unwrap().digest().0);
            assert_eq!((welcome.shape.dims(), welcome.classes), (&[2, 2][..], 65_536));
            for (id, (image, class)) in (0..).zip(LIBSVM_IMAGES) {
                let origin = Origin::Miss;
                assert_eq!(
                    raw.classify(id, &image).await,
                    Classification { label: class, origin },
                    "{command}"
                );
            }
            // The memo stores the same labels, the greatest possible label among them.
            if command == "serve" {
                let origin = Origin::Hit;
                for (id, (image, class)) in (10..).zip(LIBSVM_IMAGES) {
                    assert_eq!(
                        raw.classify(id, &image).await,
                        Classification { label: class, origin }
                    );
                }
            }
        }
    });
}

#[test]
fn warns_about_a_probability_model_cut_in_its_last_line() {
    let folder = folder();
    let model = LIBSVM.replace("nr_sv", "probA 1 1 1\nprobB 0 0 0\nnr_sv");
    let path = file(&folder, "theirs", model.trim_end());
    let out = text(folder.path().join("ours.safetensors"));
    let done = run(&["import", &path, "--shape", "2x2", "--out", &out]);
    assert!(done.status.success(), "{done:#?}");
    for warning in
        ["warning: the last line has no line break", "warning: the model has probabilities"]
    {
        assert!(done.stderr.contains(warning), "{done:#?}");
    }
}

#[test]
fn a_service_names_the_command_for_models_of_other_tools() {
    let folder = folder();
    for (name, model) in [("rbf.model", LIBSVM.as_bytes().to_vec()), ("svc.onnx", onnx())] {
        let path = file(&folder, name, model);
        let done = run(&["classifier", "--model", &path]);
        assert_eq!(done.status.code(), Some(1), "{done:#?}");
        // The log comes first.
        let line = done.stderr.lines().last().unwrap_or_default();
        assert!(line.contains(&path) && line.contains("afterimage import FILE"), "{line}");
    }
}

#[test]
fn what_cannot_be_imported_is_one_clear_line_and_writes_nothing() {
    let folder = folder();
    let out = text(folder.path().join("ours.safetensors"));
    let missing = text(folder.path().join("missing"));
    let notes = file(&folder, "notes", "this is no model");
    let names = file(&folder, "names", LIBSVM.replace("65535", "-1"));
    let wide = file(&folder, "wide", LIBSVM.replace("3:0.501961", "5:1"));
    let flat = file(&folder, "flat", LIBSVM.replace("gamma 2\n", ""));
    let marked = file(&folder, "marked", format!("\u{feff}{LIBSVM}"));
    let short = file(&folder, "short", LIBSVM.split_at(LIBSVM.len() - 20).0);
    let cut = file(&folder, "cut", onnx().split_at(100).0);
    for (path, named) in [
        (&missing, "No such file"),
        (&notes, "neither"),
        (&names, "--labels"),
        (&wide, "line 12: feature 5 is beyond the 4 bytes of a 2x2 image (--shape)"),
        (&flat, "needs a line gamma"),
        (&marked, "byte-order mark"),
        (&text(folder.path()), "it is a folder"),
        (&short, "line 12"),
        (&cut, "neither"),
    ] {
        let args = ["import", path, "--shape", "2x2", "--out", &out];
        let line = run(&args).failed_with_a_line();
        assert!(line.contains(path.as_str()) && line.contains(named), "{line}");
        assert!(!std::fs::exists(&out).unwrap(), "{path} was written");
    }
    let good = file(&folder, "good", LIBSVM);
    let broken = file(&folder, "broken", "x\n0 1\n1 5 5\n");
    let args = ["import", &good, "--shape", "2x2", "--scale", &broken, "--out", &out];
    let line = run(&args).failed_with_a_line();
    assert!(line.contains(&broken) && line.contains("line 3"), "{line}");
    let nowhere = ["--out", "/no/such/folder/model"];
    let line = run(&[&["import", &good, "--shape", "2x2"], &nowhere[..]].concat());
    assert!(line.failed_with_a_line().contains("/no/such/folder/model"));
    for shape in ["2xtwo", "0x4", "9999999x9999999"] {
        let done = run(&["import", &good, "--shape", shape]);
        assert!(!done.status.success() && done.stderr.contains(shape), "{done:#?}");
    }
}
