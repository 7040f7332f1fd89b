//! Text files of LIBSVM (C.-C. Chang and C.-J. Lin, "LIBSVM: a library for support vector
//! machines", ACM TIST 2, 2011): `c_svc` and `nu_svc` with a linear, polynomial, RBF or sigmoid
//! kernel. Parameters of probabilities are skipped, as by `svm-predict` without `-b 1`.

use afterimage_classifier::kernels::MAX_BYTES;
use afterimage_classifier::pairwise::{KernelFunction, MAX_DEGREE, Pairwise, Parts, VectorValues};
use afterimage_classifier::pixels::{Learnt, Pixels};
use afterimage_classifier::scoring::Scoring;
use afterimage_classifier::{MAX_CLASSES, ModelError, Shape};

use super::lines::{CUT, Lines, shorten};
use super::{ImportOptions, UnlabelledModel, check_range, check_size, learn_pixels};

#[derive(Default)]
struct Header {
    machine: String,
    kernel: String,
    degree: Option<u32>,
    gamma: Option<f64>,
    coef0: Option<f64>,
    /// Whether the model was trained with `-b 1`.
    has_probabilities: bool,
    classes: usize,
    vectors: usize,
    labels: Vec<String>,
    counts: Vec<u32>,
    rho: Vec<f64>,
}

/// Support vectors as in the file: without zeros.
#[derive(Default)]
struct Sparse {
    /// `[vectors, classes − 1]`.
    coefficients: Vec<f64>,
    indices: Vec<u32>,
    values: Vec<f64>,
    /// The end of each vector in `indices` and `values`.
    ends: Vec<usize>,
}

pub(super) fn read(
    lines: &mut Lines<'_>,
    options: &ImportOptions,
) -> Result<UnlabelledModel, ModelError> {
    let shape = options.shape.unwrap_or(Shape::MNIST);
    let dims = shape.len();
    let is_cut = lines.is_cut();
    let header = read_header(lines)?;
    let function = function(lines, &header)?;
    let sparse = read_vectors(lines, &header, shape)?;
    let (divisor, pixels, vectors) = sparse.vectors(dims, options)?;
    let features = sparse.indices.iter().max().map_or(0, |&at| at as usize + 1);
    let pairwise = Pairwise::new(Parts {
        pixels: pixels.clone(),
        function,
        dims,
        vectors,
        counts: header.counts,
        coefficients: transposed(&sparse.coefficients, header.classes - 1),
        rho: header.rho,
    })?;
    let mut warnings = Vec::new();
    if is_cut {
        warnings.push(CUT.to_owned());
    }
    if header.has_probabilities {
        warnings.push(
            "the model has probabilities (svm-train -b 1); labels follow the votes, as of svm-predict \
             without -b 1, whose labels may differ from those with -b 1"
                .to_owned(),
        );
    }
    let scaled = options.scale.as_ref().map_or(String::new(), |scale| format!(", {scale}"));
    Ok(UnlabelledModel {
        origin: format!("LIBSVM ({}, {}{scaled})", header.machine, describe(&function)),
        labels: header.labels,
        shape,
        features,
        divisor,
        assumed: false,
        warnings,
        pixels,
        scoring: Scoring::Pairwise(Box::new(pairwise)),
    })
}

fn read_header(lines: &mut Lines<'_>) -> Result<Header, ModelError> {
    let mut header = Header::default();
    loop {
        let (key, values) = lines.key_and_values()?;
        let pairs = header.classes * header.classes.saturating_sub(1) / 2;
        match key {
            "svm_type" if ["c_svc", "nu_svc"].contains(&values) => {
                values.clone_into(&mut header.machine);
            }
            "svm_type" => {
                let svm_type = shorten(values);
                return Err(lines.error(format!("svm_type {svm_type:?} does not classify")));
            }
            "kernel_type" => values.clone_into(&mut header.kernel),
            "degree" => {
                header.degree = Some(lines.count(values, 0, MAX_DEGREE as usize)? as u32);
            }
            "gamma" => header.gamma = Some(lines.number(values)?),
            "coef0" => header.coef0 = Some(lines.number(values)?),
            "nr_class" => header.classes = lines.count(values, 2, MAX_CLASSES)?,
            "total_sv" => header.vectors = lines.count(values, 1, u32::MAX as usize)?,
            "rho" => header.rho = lines.numbers(values, pairs)?,
            "label" => header.labels = Lines::labels(values),
            "nr_sv" => {
                let most = u32::MAX as usize;
                let counts = values.split_ascii_whitespace().take(MAX_CLASSES + 1);
                header.counts = counts
                    .map(|text| lines.count(text, 0, most).map(|count| count as u32))
                    .collect::<Result<_, _>>()?;
            }
            "probA" | "probB" | "prob_density_marks" => header.has_probabilities = true,
            "SV" => break,
            _ => {
                let key = shorten(key);
                return Err(lines.error(format!("{key:?} is unknown in a LIBSVM model")));
            }
        }
    }
    let Header { classes, vectors, .. } = header;
    let counted: usize = header.counts.iter().map(|&count| count as usize).sum();
    for (what, expected, found) in [
        ("labels", classes, header.labels.len()),
        ("numbers in nr_sv", classes, header.counts.len()),
        ("numbers in rho", classes * classes.saturating_sub(1) / 2, header.rho.len()),
        ("support vectors in nr_sv", vectors, counted),
    ] {
        if expected != found {
            return Err(lines.error(format!("{found} {what} before SV; {expected} are needed")));
        }
    }
    if classes == 0 || vectors == 0 {
        return Err(lines.error("nr_class and total_sv must come before SV"));
    }
    if header.machine.is_empty() || header.kernel.is_empty() {
        return Err(lines.error("svm_type and kernel_type must come before SV"));
    }
    Ok(header)
}

fn function(lines: &Lines<'_>, header: &Header) -> Result<KernelFunction, ModelError> {
    let missing = |name: &str| {
        lines.error(format!("a {} kernel needs a line {name} before SV", shorten(&header.kernel)))
    };
    let gamma = || header.gamma.ok_or_else(|| missing("gamma"));
    let coef0 = || header.coef0.ok_or_else(|| missing("coef0"));
    let degree = || header.degree.ok_or_else(|| missing("degree"));
    match header.kernel.as_str() {
        "linear" => Ok(KernelFunction::Linear),
        "polynomial" => Ok(KernelFunction::Polynomial {
            gamma: gamma()?,
            coef0: coef0()?,
            degree: degree()?,
        }),
        "rbf" => Ok(KernelFunction::Rbf { gamma: gamma()? }),
        "sigmoid" => Ok(KernelFunction::Sigmoid { gamma: gamma()?, coef0: coef0()? }),
        "precomputed" => Err(lines.error(
            "a precomputed kernel needs its training data to compare with, which the model does not have",
        )),
        other => Err(lines.error(format!("kernel {:?} is unknown", shorten(other)))),
    }
}

pub(super) fn describe(function: &KernelFunction) -> String {
    match function {
        KernelFunction::Linear => "linear kernel".to_owned(),
        KernelFunction::Polynomial { gamma, coef0, degree } => {
            format!("polynomial kernel, gamma {gamma}, coef0 {coef0}, degree {degree}")
        }
        KernelFunction::Rbf { gamma } => format!("RBF kernel, gamma {gamma}"),
        KernelFunction::Sigmoid { gamma, coef0 } => {
            format!("sigmoid kernel, gamma {gamma}, coef0 {coef0}")
        }
    }
}

/// Reads the lines after `SV`: coefficients, then `index:value` with ascending indices from 1.
fn read_vectors(
    lines: &mut Lines<'_>,
    header: &Header,
    shape: Shape,
) -> Result<Sparse, ModelError> {
    let mut sparse = Sparse::default();
    for _ in 0..header.vectors {
        let line = lines.next_line()?;
        let mut fields = line.split_ascii_whitespace();
        for _ in 1..header.classes {
            let coefficient = lines.number(fields.next().unwrap_or_default())?;
            sparse.coefficients.push(coefficient);
        }
        let mut last = 0;
        for field in fields {
            let Some((index, value)) = field.split_once(':') else {
                return Err(lines.error(format!("{:?} is not like 12:0.5", shorten(field))));
            };
            let index = lines.feature(index, last, shape)?;
            let value = lines.number(value)?;
            last = index;
            if value != 0.0 {
                // An index is at most the length of a shape.
                sparse.indices.push((index - 1) as u32);
                sparse.values.push(value);
            }
        }
        sparse.ends.push(sparse.values.len());
    }
    lines.end()?;
    Ok(sparse)
}

impl Sparse {
    /// The vectors, as bytes where possible; the divisor; and the features of images' bytes.
    fn vectors(
        &self,
        dims: usize,
        options: &ImportOptions,
    ) -> Result<(f64, Pixels, VectorValues), ModelError> {
        let (divisor, pixels) = match &options.scale {
            Some(scale) => scale.pixels(options.divisor, dims)?,
            None => {
                let values = self.values.iter().copied();
                let (divisor, learnt) = learn_pixels(options.divisor, false, values)?;
                if let Some(Learnt { pixels, of_vectors, bytes }) = learnt
                    && dims <= MAX_BYTES
                {
                    check_size(self.ends.len(), dims, size_of::<u8>())?;
                    let vectors = VectorValues::U8(self.dense(dims, &bytes, 0), of_vectors);
                    return Ok((divisor, pixels, vectors));
                }
                (divisor, Pixels::divided(divisor, false)?)
            }
        };
        check_size(self.ends.len(), dims, size_of::<f64>())?;
        for (&at, &value) in self.indices.iter().zip(&self.values) {
            check_range(&pixels, at as usize, value)?;
        }
        Ok((divisor, pixels, VectorValues::F64(self.dense(dims, &self.values, 0.0))))
    }

    /// `[vectors, dims]` of `values`, one for each value that is not zero.
    fn dense<T: Copy>(&self, dims: usize, values: &[T], zero: T) -> Vec<T> {
        let mut dense = vec![zero; self.ends.len() * dims];
        let mut start = 0;
        for (row, &end) in dense.chunks_exact_mut(dims).zip(&self.ends) {
            for (&at, &value) in self.indices[start..end].iter().zip(&values[start..end]) {
                row[at as usize] = value;
            }
            start = end;
        }
        dense
    }
}

/// `[rows, columns]` from `[columns, rows]`.
fn transposed(values: &[f64], rows: usize) -> Vec<f64> {
    let columns = values.len() / rows;
    (0..rows).flat_map(|row| (0..columns).map(move |column| values[column * rows + row])).collect()
}
