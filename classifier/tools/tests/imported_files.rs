//! Model files of imported models, valid and invalid.

#![allow(clippy::unwrap_used, reason = "a failed step fails the test")]

use afterimage_classifier::tensors::{self, Tensor, Tensors, Texts};
use afterimage_classifier::{Model, Shape};
use afterimage_classifier_tools::{ImportOptions, Imported, Scale};

/// The text of a small kernel model of LIBSVM's, bytes and numbers as its vectors.
fn imported() -> Vec<Model> {
    let rbf = "svm_type c_svc\nkernel_type rbf\ngamma 0.5\nnr_class 3\ntotal_sv 4\nrho 0.1 0 0\n\
        label 4 9 2\nnr_sv 2 1 1\nSV\n0.5 1 1:0.2 2:1 \n0.25 0 \n-1 0.5 2:0.4 \n-1 -0.5 1:0.6 \n";
    let linear = "solver_type L2R_LR\nnr_class 2\nlabel 1 0\nnr_feature 2\nbias -1\nw\n1 \n-1 \n";
    let shape = Some(Shape::new(&[2]).unwrap());
    let options = ImportOptions { shape, ..ImportOptions::default() };
    let import = |text: &str| Imported::from_bytes(text.as_bytes(), &options).unwrap().model;
    let scale = Some(Scale::parse("x\n-1 1\n1 0 255\n2 3 255\n").unwrap());
    let scaled = ImportOptions { scale, ..options.clone() };
    vec![
        import(rbf),
        import(&rbf.replace("0.4 ", "0.4011 ")),
        import(&rbf.replace("0.4 ", "0.49411765 ")),
        import(linear),
        Imported::from_bytes(linear.as_bytes(), &scaled).unwrap().model,
    ]
}

#[test]
fn an_imported_model_round_trips_and_its_digest_covers_it() {
    let mut digests = Vec::new();
    for model in imported() {
        let bytes = model.to_bytes();
        let read = Model::from_bytes(&bytes).unwrap();
        assert_eq!((read.digest(), read.to_bytes()), (model.digest(), bytes.clone()));
        assert_eq!(read.metadata(), model.metadata());
        assert!(read.metadata().note.starts_with("imported from LIB"));
        let (tensors, texts) = tensors::decode(&bytes).unwrap();
        assert_eq!(texts["format_version"], "2");
        digests.push(model.digest());
        for name in tensors.keys() {
            let mut changed = tensors.clone();
            let tensor = changed.get_mut(name).unwrap();
            match &mut tensor.values {
                // A vector more in one class and one fewer in the next.
                tensors::Values::U32(values) => values.swap(0, 1),
                tensors::Values::U8(values) => values[0] ^= 1,
                tensors::Values::F64(values) => values[0] += 0.125,
                tensors::Values::F32(_) => unreachable!("none of these"),
            }
            let other = Model::from_bytes(&tensors::encode(&changed, &texts)).unwrap();
            digests.push(other.digest());
        }
        for (name, value) in [("kernel", "sigmoid"), ("shape", "1x2")] {
            let mut changed = texts.clone();
            if changed.contains_key(name) {
                changed.insert(name.to_owned(), value.to_owned());
                digests.push(
                    Model::from_bytes(&tensors::encode(&tensors, &changed)).unwrap().digest(),
                );
            }
        }
    }
    let all = digests.len();
    digests.sort_unstable_by_key(|digest| digest.0);
    digests.dedup();
    assert_eq!(digests.len(), all);
}

#[test]
fn refuses_a_broken_imported_file_and_names_the_cause() {
    type Change<'a> = &'a dyn Fn(&mut Tensors, &mut Texts);
    let model = imported().swap_remove(0);
    let (tensors, texts) = tensors::decode(&model.to_bytes()).unwrap();
    let text = |name: &'static str, value: &'static str| {
        move |_: &mut Tensors, texts: &mut Texts| {
            texts.insert(name.into(), value.into());
        }
    };
    let changes: [(Change<'_>, &str); 10] = [
        (&text("format_version", "1"), "expected raw or conv"),
        (&text("features", "conv"), "expected weights or kernel"),
        (&text("features", "weights"), "linear.weights"),
        (&text("kernel", "cubic"), "linear, polynomial, rbf or sigmoid"),
        (&text("shape", "3"), "[4, 3]"),
        (&text("labels", "1,2"), "kernel.counts"),
        (&text("labels", "1"), "2 to 65535"),
        (&|tensors, _| drop(tensors.remove("pixels.table")), "pixels.table"),
        (
            &|tensors, _| {
                let counts = vec![u32::MAX; 3];
                tensors.insert("kernel.counts".into(), Tensor::new(&[3], counts));
            },
            "[12884901885, 2]",
        ),
        (
            &|tensors, _| {
                tensors.insert("kernel.rho".into(), Tensor::new(&[3], vec![0_f32; 3]));
            },
            "expected F64, found F32",
        ),
    ];
    for (change, part) in changes {
        let (mut tensors, mut texts) = (tensors.clone(), texts.clone());
        change(&mut tensors, &mut texts);
        let error = Model::from_bytes(&tensors::encode(&tensors, &texts)).unwrap_err().to_string();
        assert!(error.contains(part) && !error.contains('\n'), "{error:?} should contain {part:?}");
    }
    for model in imported() {
        let bytes = model.to_bytes();
        for at in 0..bytes.len() {
            assert!(Model::from_bytes(&bytes[..at]).is_err(), "{at} bytes");
            if at % 7 == 0 {
                let mut mutated = bytes.clone();
                mutated[at] ^= 0xff;
                let _ = Model::from_bytes(&mutated);
            }
        }
    }
}
