//! Text files of LIBLINEAR (R.-E. Fan et al., "LIBLINEAR: A Library for Large Linear
//! Classification", JMLR 9, 2008), for every solver that classifies. There is one weight vector for
//! each class, and the highest score gives the answer. Two classes have a single vector. Crammer
//! and Singer's solver writes two vectors in this case, and `predict` uses only the first one.

use afterimage_classifier::pixels::Pixels;
use afterimage_classifier::scoring::Scoring;
use afterimage_classifier::weights::Weights;
use afterimage_classifier::{MAX_CLASSES, MAX_MODEL_FILE_BYTES, ModelError, Shape};

use super::lines::{CUT, Lines, beyond};
use super::{ImportOptions, USUAL_DIVISOR, UnlabelledModel};

/// The solvers that classify: `-s` 0 to 7.
const SOLVERS: [&str; 8] = [
    "L2R_LR",
    "L2R_L2LOSS_SVC_DUAL",
    "L2R_L2LOSS_SVC",
    "L2R_L1LOSS_SVC_DUAL",
    CRAMMER_SINGER,
    "L1R_L2LOSS_SVC",
    "L1R_LR",
    "L2R_LR_DUAL",
];
const CRAMMER_SINGER: &str = "MCSVM_CS";

/// Most weights: the limit of the largest model file.
const MAX_WEIGHTS: usize = MAX_MODEL_FILE_BYTES as usize / size_of::<f64>();

struct Header {
    solver: String,
    labels: Vec<String>,
    classes: usize,
    features: usize,
    bias: f64,
}

pub(super) fn read(
    lines: &mut Lines<'_>,
    options: &ImportOptions,
) -> Result<UnlabelledModel, ModelError> {
    let shape = options.shape.unwrap_or(Shape::MNIST);
    let is_cut = lines.is_cut();
    let Header { solver, labels, classes, features, bias } = read_header(lines, shape)?;
    let machines = if classes == 2 { 1 } else { classes };
    let columns = if solver == CRAMMER_SINGER { classes } else { machines };
    let rows = features + usize::from(bias >= 0.0);
    // A weight takes at least two bytes of text, so the text limits the allocation.
    if rows.saturating_mul(columns) > lines.text.len() {
        return Err(lines.error(format!("{rows} lines of {columns} weights are not there")));
    }
    // Each class has a weight for every byte of an image, also if the file has one line only.
    let (dims, limit) = (shape.len(), MAX_WEIGHTS);
    if machines.saturating_mul(dims) > limit {
        return Err(lines.error(format!(
            "{machines} classes of images of {shape} make {} weights; the limit is {limit}",
            machines.saturating_mul(dims)
        )));
    }
    let mut weights = vec![0.0; machines * dims];
    let mut intercepts = vec![0.0; machines];
    for j in 0..rows {
        let line = lines.next_line()?;
        let mut numbers = line.split_ascii_whitespace();
        for column in 0..columns {
            let number = lines.number(numbers.next().unwrap_or_default())?;
            match column {
                column if column >= machines => {}
                machine if j < features => weights[machine * dims + j] = number,
                machine => intercepts[machine] = number * bias,
            }
        }
        if numbers.next().is_some() {
            return Err(lines.error(format!("more than {columns} weights")));
        }
    }
    lines.end()?;
    let (divisor, pixels) = match &options.scale {
        Some(scale) => scale.pixels(options.divisor, dims)?,
        None => {
            let divisor = options.divisor.unwrap_or(USUAL_DIVISOR);
            (divisor, Pixels::divided(divisor, false)?)
        }
    };
    let scaled = options.scale.as_ref().map_or(String::new(), |scale| format!(", {scale}"));
    let weights = Weights::new(pixels.clone(), dims, &weights, intercepts)?;
    let bias = if bias >= 0.0 { format!("bias {bias}") } else { "no bias".to_owned() };
    Ok(UnlabelledModel {
        origin: format!("LIBLINEAR ({solver}, {bias}{scaled})"),
        labels,
        shape,
        features,
        divisor,
        assumed: options.divisor.is_none() && options.scale.is_none(),
        warnings: if is_cut { vec![CUT.to_owned()] } else { Vec::new() },
        pixels,
        scoring: Scoring::Weights(weights),
    })
}

fn read_header(lines: &mut Lines<'_>, shape: Shape) -> Result<Header, ModelError> {
    let mut header =
        Header { solver: String::new(), labels: vec![], classes: 0, features: 0, bias: 0.0 };
    let mut bias = None;
    loop {
        let (key, values) = lines.key_and_values()?;
        match key {
            "solver_type" if SOLVERS.contains(&values) => values.clone_into(&mut header.solver),
            "solver_type" => {
                return Err(lines.error(format!("solver {values:?} does not classify")));
            }
            "nr_class" => header.classes = lines.count(values, 2, MAX_CLASSES)?,
            "label" => header.labels = Lines::labels(values),
            "nr_feature" => {
                header.features = lines.count(values, 1, usize::MAX)?;
                if header.features > shape.len() {
                    return Err(lines.error(beyond("nr_feature", header.features, shape)));
                }
            }
            "bias" => bias = Some(lines.number(values)?),
            "w" => break,
            _ => return Err(lines.error(format!("{key:?} is unknown in a LIBLINEAR model"))),
        }
    }
    if header.labels.len() != header.classes || header.features == 0 {
        return Err(lines.error("nr_class, label and nr_feature must come before w and agree"));
    }
    if header.solver.is_empty() {
        return Err(lines.error("solver_type must come before w"));
    }
    // Without the bias the number of weights is not known: -1 means no bias, another number means
    // one more row.
    header.bias = bias.ok_or_else(|| lines.error("bias must come before w"))?;
    Ok(header)
}
