//! Models trained with LIBLINEAR or LIBSVM, read from the text files their `train` programs write.
//!
//! LIBLINEAR (R.-E. Fan et al., JMLR 9, 2008): every classification solver; one weight vector per class, the
//! greatest score answers, just as here. LIBSVM (C.-C. Chang and C.-J. Lin, ACM TIST 2, 2011): `c_svc` or `nu_svc` with
//! a linear kernel and two classes. With more classes LIBSVM lets every pair of classes vote, which is another
//! decision than ours and is refused rather than imitated.
//!
//! Feature `j` of the file (counted from 1) is byte `j − 1` of the image over the divisor. Files end with the last
//! feature that was ever non-zero in training; bytes beyond it have no weight. Weights become `f32`; where two
//! classes score the same but for the seventh digit, an answer may differ from the original's.

use std::fs::File;
use std::path::Path;

use ndarray::{Array1, Array2};

use crate::error::ModelError;
use crate::features::{FeatureMap, RawPixels};
use crate::input::bounded;
use crate::model::{Metadata, Model};
use crate::model_file::MAX_MODEL_FILE_BYTES;
use crate::shape::Shape;
use crate::svm::{LinearSvm, MAX_CLASSES};

/// Most weights of an imported model: what the largest model file has room for.
const MAX_WEIGHTS: usize = MAX_MODEL_FILE_BYTES as usize / size_of::<f32>();

/// What a text model does not say about itself.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ImportOptions {
    /// The shape of the images.
    pub shape: Shape,
    /// What bytes were divided by to make features: 255 when they went from 0 to 1, 1 when they were the bytes.
    pub divisor: f32,
}

impl Model {
    /// Reads a LIBLINEAR or LIBSVM model file; it says itself which of the two it is.
    ///
    /// # Errors
    /// [`ModelError`], naming the file, and for what is wrong in it the line.
    pub fn import(path: &Path, options: &ImportOptions) -> Result<Self, ModelError> {
        let io = |source| ModelError::Io { path: path.to_owned(), source };
        let in_file =
            |source| ModelError::InFile { path: path.to_owned(), source: Box::new(source) };
        let file = File::open(path).map_err(io)?;
        let bytes = bounded::read_at_most(file, MAX_MODEL_FILE_BYTES, "model file")
            .map_err(|error| in_file(error.into()))?;
        let text = std::str::from_utf8(&bytes)
            .map_err(|_| in_file(Lines::new("").error("the file is not text")))?;
        Self::import_text(text, options).map_err(in_file)
    }

    /// Reads a model from the text of a LIBLINEAR or LIBSVM model file.
    ///
    /// # Errors
    /// [`ModelError::Text`], naming the line; others when the numbers make no model.
    pub fn import_text(text: &str, options: &ImportOptions) -> Result<Self, ModelError> {
        let mut lines = Lines::new(text);
        let machines = match lines.text.split_ascii_whitespace().next() {
            Some("solver_type") => read_liblinear(&mut lines, options.shape)?,
            Some("svm_type") => read_libsvm(&mut lines, options.shape)?,
            _ => return Err(lines.error("neither a LIBLINEAR nor a LIBSVM model starts like this")),
        };
        let map = FeatureMap::Raw(RawPixels::new(options.shape, options.divisor)?);
        let svm = LinearSvm::new(machines.weights, machines.intercepts)?;
        let metadata =
            Metadata { note: format!("imported from {}", machines.origin), ..Metadata::default() };
        Self::new(map, svm, machines.labels, metadata)
    }
}

struct Machines {
    origin: String,
    labels: Vec<u16>,
    weights: Array2<f32>,
    intercepts: Array1<f32>,
}

impl Machines {
    /// Two machines out of one, whose positive side is the first label. Both programs answer with the second label
    /// at zero; so it comes first here, where the first of equals answers.
    fn of_one(origin: String, labels: [u16; 2], weights: &[f64], intercept: f64) -> Self {
        let sides = [-1.0, 1.0];
        Self {
            origin,
            labels: vec![labels[1], labels[0]],
            weights: Array2::from_shape_fn((2, weights.len()), |(side, j)| {
                (sides[side] * weights[j]) as f32
            }),
            intercepts: sides.iter().map(|side| (side * intercept) as f32).collect(),
        }
    }
}

fn read_liblinear(lines: &mut Lines<'_>, shape: Shape) -> Result<Machines, ModelError> {
    let (mut solver, mut labels, mut classes, mut features, mut bias) =
        (String::new(), Vec::new(), 0, 0, -1.0);
    loop {
        let (key, values) = lines.key_and_values()?;
        match key {
            "solver_type" => values.clone_into(&mut solver),
            "nr_class" => classes = lines.count(values, 2, MAX_CLASSES)?,
            "label" => labels = lines.labels(values)?,
            "nr_feature" => features = lines.count(values, 1, shape.len())?,
            "bias" => bias = lines.number(values)?,
            "w" => break,
            _ => return Err(lines.error(format!("{key:?} is unknown in a LIBLINEAR model"))),
        }
    }
    if !(solver.contains("SVC")
        || solver.ends_with("_LR")
        || solver.contains("LR_DUAL")
        || solver == "MCSVM_CS")
        || solver.contains("ONECLASS")
    {
        return Err(lines.error(format!("solver {solver:?} does not classify")));
    }
    if labels.len() != classes || features == 0 {
        return Err(lines.error("nr_class, label and nr_feature must come before w and agree"));
    }
    let machines = if classes == 2 && solver != "MCSVM_CS" { 1 } else { classes };
    let rows = features + usize::from(bias >= 0.0);
    // A weight takes two bytes at least, so the text bounds the allocation.
    if rows.saturating_mul(machines) > lines.text.len() {
        return Err(lines.error(format!("{rows} lines of {machines} weights are not there")));
    }
    // Each class has a weight for every byte of an image, also where the file has one line only.
    let (weights, limit) = (machines.saturating_mul(shape.len()), MAX_WEIGHTS);
    if weights > limit {
        return Err(lines.error(format!(
            "{machines} classes of images of {shape} make {weights} weights; the limit is {limit}"
        )));
    }
    let mut weights = vec![vec![0.0; shape.len()]; machines];
    let mut intercepts = vec![0.0; machines];
    for j in 0..rows {
        let line = lines.next_line()?;
        let mut numbers = line.split_ascii_whitespace();
        for (weights, intercept) in weights.iter_mut().zip(&mut intercepts) {
            let number = lines.number(numbers.next().unwrap_or_default())?;
            if j < features {
                weights[j] = number;
            } else {
                *intercept = number * bias;
            }
        }
        if numbers.next().is_some() {
            return Err(lines.error(format!("more than {machines} weights")));
        }
    }
    lines.end()?;
    let origin = format!("LIBLINEAR ({solver})");
    if let ([weights], &[first, second]) = (weights.as_slice(), labels.as_slice()) {
        return Ok(Machines::of_one(origin, [first, second], weights, intercepts[0]));
    }
    Ok(Machines {
        origin,
        labels,
        weights: Array2::from_shape_fn((machines, shape.len()), |(c, j)| weights[c][j] as f32),
        intercepts: intercepts.into_iter().map(|intercept| intercept as f32).collect(),
    })
}

fn read_libsvm(lines: &mut Lines<'_>, shape: Shape) -> Result<Machines, ModelError> {
    let (mut kernel, mut labels, mut classes, mut vectors, mut rho) =
        (String::new(), Vec::new(), 0, 0, f64::NAN);
    loop {
        let (key, values) = lines.key_and_values()?;
        match key {
            "svm_type" if !["c_svc", "nu_svc"].contains(&values) => {
                return Err(lines.error(format!("svm_type {values:?} does not classify")));
            }
            "kernel_type" => values.clone_into(&mut kernel),
            "nr_class" => {
                classes = lines.count(values, 2, MAX_CLASSES)?;
                if classes > 2 {
                    return Err(lines.error(format!(
                        "{classes} classes vote pair by pair in LIBSVM, which is not one against \
                         the rest; train with LIBLINEAR instead"
                    )));
                }
            }
            "total_sv" => vectors = lines.count(values, 1, usize::MAX)?,
            "rho" => rho = lines.number(values)?,
            "label" => labels = lines.labels(values)?,
            "SV" => break,
            // What other kernels, and probabilities, need.
            "svm_type" | "nr_sv" | "gamma" | "degree" | "coef0" | "probA" | "probB"
            | "prob_density_marks" => {}
            _ => return Err(lines.error(format!("{key:?} is unknown in a LIBSVM model"))),
        }
    }
    if kernel != "linear" {
        return Err(lines.error(format!("kernel {kernel:?} is not linear")));
    }
    let &[first, second] = labels.as_slice() else {
        return Err(lines.error("two labels must come before SV"));
    };
    if classes != 2 || rho.is_nan() {
        return Err(lines.error("nr_class and rho must come before SV"));
    }
    let mut weights = vec![0.0; shape.len()];
    for _ in 0..vectors {
        let line = lines.next_line()?;
        let mut fields = line.split_ascii_whitespace();
        let coefficient = lines.number(fields.next().unwrap_or_default())?;
        for field in fields {
            let Some((index, value)) = field.split_once(':') else {
                return Err(lines.error(format!("{field:?} is not like 12:0.5")));
            };
            let index = lines.count(index, 1, shape.len())?;
            weights[index - 1] += coefficient * lines.number(value)?;
        }
    }
    lines.end()?;
    Ok(Machines::of_one("LIBSVM (linear)".to_owned(), [first, second], &weights, -rho))
}

/// The lines of a text, counted.
struct Lines<'a> {
    /// What is still to be read.
    text: &'a str,
    /// The number of the line last read, from 1.
    line: usize,
}

impl<'a> Lines<'a> {
    fn new(text: &'a str) -> Self {
        Self { text, line: 0 }
    }

    fn error(&self, detail: impl Into<String>) -> ModelError {
        ModelError::Text { line: self.line.max(1), detail: detail.into() }
    }

    fn next_line(&mut self) -> Result<&'a str, ModelError> {
        self.line += 1;
        if self.text.is_empty() {
            return Err(self.error("the file ends too early"));
        }
        let (line, rest) = self.text.split_once('\n').unwrap_or((self.text, ""));
        self.text = rest;
        Ok(line.trim_end())
    }

    fn key_and_values(&mut self) -> Result<(&'a str, &'a str), ModelError> {
        let line = self.next_line()?;
        Ok(line.split_once(' ').unwrap_or((line, "")))
    }

    fn end(&mut self) -> Result<(), ModelError> {
        self.line += 1;
        if self.text.trim_ascii().is_empty() {
            Ok(())
        } else {
            Err(self.error("the model ends, but more follows"))
        }
    }

    fn count(&self, text: &str, min: usize, max: usize) -> Result<usize, ModelError> {
        let count = text.trim_ascii().parse::<usize>().ok();
        count.filter(|count| (min..=max).contains(count)).ok_or_else(|| {
            self.error(format!("{:?} is not a number from {min} to {max}", shorten(text)))
        })
    }

    fn number(&self, text: &str) -> Result<f64, ModelError> {
        let number = text.trim_ascii().parse::<f64>().ok();
        number
            .filter(|number| number.is_finite())
            .ok_or_else(|| self.error(format!("{:?} is not a finite number", shorten(text))))
    }

    fn labels(&self, text: &str) -> Result<Vec<u16>, ModelError> {
        let label = |text: &str| {
            text.parse().map_err(|_| {
                self.error(format!("label {:?} is not from 0 to 65535", shorten(text)))
            })
        };
        text.split_ascii_whitespace().take(MAX_CLASSES + 1).map(label).collect()
    }
}

/// As much of a text as an error message has room for.
fn shorten(text: &str) -> String {
    text.chars().take(40).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn options() -> ImportOptions {
        ImportOptions { shape: Shape::new(&[2, 2]).unwrap(), divisor: 1.0 }
    }

    const LIBLINEAR: &str = "solver_type L2R_L2LOSS_SVC_DUAL\nnr_class 3\nlabel 7 0 300\n\
        nr_feature 3\nbias 2\nw\n1 0 -1 \n0 1 -1 \n0 0 5.5e-1 \n-2 0.25 0 \n";
    const BINARY: &str = "solver_type L2R_LR\nnr_class 2\nlabel 1 0\nnr_feature 4\nbias -1\nw\n\
        1 \n-1 \n0 \n0 \n";
    const LIBSVM: &str = "svm_type c_svc\nkernel_type linear\nnr_class 2\ntotal_sv 2\nrho -0.5\n\
        label 4 9\nnr_sv 1 1\nSV\n0.5 1:2 4:1 \n-0.5 2:2 4:1 \n";

    fn error(text: &str) -> String {
        let error = Model::import_text(text, &options()).unwrap_err().to_string();
        assert!(!error.contains('\n'), "one line: {error}");
        error
    }

    #[test]
    fn liblinear_weights_labels_and_bias_are_taken_over() {
        let model = Model::import_text(LIBLINEAR, &options()).unwrap();
        assert_eq!(model.labels(), [7, 0, 300]);
        let scores = model.scores(&[&[3, 5, 2, 9]]).unwrap();
        // Column by column: the weights on 3, 5, 2, nothing on the last byte, twice the last line.
        assert_eq!(scores.as_slice().unwrap(), [3.0 - 4.0, 5.0 + 0.5, -3.0 - 5.0 + 1.1]);
        assert_eq!(model.classify(&[19, 5, 2, 9]).unwrap(), 7);
        let read = Model::from_bytes(&model.to_bytes()).unwrap();
        assert_eq!(read.digest(), model.digest());
    }

    #[test]
    fn a_binary_model_answers_as_the_original_does_also_at_zero() {
        let model = Model::import_text(BINARY, &options()).unwrap();
        assert_eq!(model.classify(&[2, 1, 0, 0]).unwrap(), 1);
        assert_eq!(model.classify(&[1, 2, 0, 0]).unwrap(), 0);
        // `predict` of both programs: the first label only above zero.
        assert_eq!(model.classify(&[1, 1, 0, 0]).unwrap(), 0);
    }

    #[test]
    fn crammer_and_singers_solver_has_a_weight_vector_for_each_of_two_classes_too() {
        let text =
            "solver_type MCSVM_CS\nnr_class 2\nlabel 3 8\nnr_feature 1\nbias 1\nw\n1 2 \n9 0 \n";
        let model = Model::import_text(text, &options()).unwrap();
        assert_eq!(model.scores(&[&[5, 0, 0, 0]]).unwrap().as_slice().unwrap(), [14.0, 10.0]);
        assert_eq!(model.classify(&[5, 0, 0, 0]).unwrap(), 3);
        assert_eq!(model.classify(&[50, 0, 0, 0]).unwrap(), 8);
    }

    #[test]
    fn libsvm_support_vectors_become_one_weight_vector() {
        let model = Model::import_text(LIBSVM, &options()).unwrap();
        let scores = model.scores(&[&[3, 1, 8, 7]]).unwrap();
        // w = (1, −1, 0, 0), b = 0.5; the second label's machine comes first.
        assert_eq!(scores.as_slice().unwrap(), [-2.5, 2.5]);
        assert_eq!(model.classify(&[3, 1, 8, 7]).unwrap(), 4);
        assert_eq!(model.classify(&[0, 1, 8, 7]).unwrap(), 9);
    }

    #[test]
    fn what_cannot_be_imported_is_refused_with_its_line() {
        for (text, part) in [
            (LIBLINEAR.replace("solver_type", "solver"), "line 1: neither"),
            (LIBLINEAR.replace("L2LOSS_SVC_DUAL", "L2LOSS_SVR"), "does not classify"),
            (LIBLINEAR.replace("L2R_L2LOSS_SVC_DUAL", "ONECLASS_SVM"), "does not classify"),
            (LIBLINEAR.replace("nr_feature 3", "nr_feature 5"), "line 4: \"5\" is not a number"),
            (LIBLINEAR.replace("nr_class 3", "nr_class 4"), "agree"),
            (LIBLINEAR.replace("nr_class 3", "nr_class 99999"), "2 to 4096"),
            (LIBLINEAR.replace("300", "-1"), "line 3: label \"-1\""),
            (LIBLINEAR.replace("7 0 300", "7 0 7"), "7 twice"),
            (LIBLINEAR.replace("5.5e-1", "inf"), "line 9: \"inf\" is not a finite number"),
            (LIBLINEAR.replace("5.5e-1", "5 6"), "line 9: more than 3 weights"),
            (LIBLINEAR.replace("bias 2", "bias -1"), "more follows"),
            (LIBLINEAR.replace("-2 0.25 0 \n", ""), "line 10: the file ends too early"),
            (LIBSVM.replace("linear", "rbf"), "kernel \"rbf\" is not linear"),
            (LIBSVM.replace("c_svc", "epsilon_svr"), "does not classify"),
            (LIBSVM.replace("nr_class 2", "nr_class 10"), "vote pair by pair"),
            (LIBSVM.replace("4:1", "5:1"), "\"5\" is not a number from 1 to 4"),
            (LIBSVM.replace("4:1", "4"), "not like 12:0.5"),
            (LIBSVM.replace("total_sv 2", "total_sv 18446744073709551615"), "too early"),
            (LIBSVM.replace("rho -0.5\n", ""), "rho"),
        ] {
            let error = error(&text);
            assert!(error.contains(part), "{error:?} should contain {part:?}");
        }
    }

    #[test]
    fn a_header_promising_more_weights_than_the_text_holds_allocates_nothing() {
        let options = ImportOptions { shape: Shape::new(&[2048, 2048]).unwrap(), divisor: 1.0 };
        let text = LIBLINEAR
            .replace("nr_class 3", "nr_class 4096")
            .replace("7 0 300", &(0..4096).map(|l| l.to_string()).collect::<Vec<_>>().join(" "))
            .replace("nr_feature 3", "nr_feature 4194304");
        let error = Model::import_text(&text, &options).unwrap_err().to_string();
        assert!(error.contains("are not there"), "{error}");
    }

    #[test]
    fn many_classes_of_large_images_are_refused_before_memory_is_taken() {
        let options = ImportOptions { shape: Shape::new(&[2048, 2048]).unwrap(), divisor: 1.0 };
        let labels = (0..4096).map(|l| l.to_string()).collect::<Vec<_>>().join(" ");
        let text = format!(
            "solver_type MCSVM_CS\nnr_class 4096\nlabel {labels}\nnr_feature 1\nbias -1\nw\n{}\n",
            "1 ".repeat(4096)
        );
        let error = Model::import_text(&text, &options).unwrap_err().to_string();
        assert!(error.contains("17179869184 weights; the limit is 67108864"), "{error}");
    }

    #[test]
    fn no_truncation_panics() {
        for text in [LIBLINEAR, BINARY, LIBSVM] {
            for len in 0..text.len() - 3 {
                let _ = Model::import_text(&text[..len], &options());
            }
            assert!(Model::import_text(&text[..text.len() / 2], &options()).is_err());
        }
    }
}
