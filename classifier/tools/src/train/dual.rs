//! Linear SVMs with squared hinge loss by dual coordinate descent: C.-J. Hsieh, K.-W. Chang, C.-J.
//! Lin, S. S. Keerthi, S. Sundararajan, "A Dual Coordinate Descent Method for Large-scale Linear
//! SVM", ICML 2008, algorithm 1 with the random order of its section 3.2; it is LIBLINEAR's solver
//! 1.
//!
//! For every class, with y = +1 for its own inputs and −1 for all others, it minimizes
//!
//! ```text
//! ½‖w‖² + C Σ max(0, 1 − y w·x)²
//! ```
//!
//! It visits the inputs and solves for one dual variable α ≥ 0 at a time, with w = Σ α y x. A pass
//! costs a dot product for each input and class, and an update only where α changes.
//!
//! Classes are independent and visit the inputs in the same order. So their distribution to threads
//! does not change the result. (Shrinking, section 3.3 of the paper, is not used: with it the order
//! of visits would depend on each class's own history.)

use std::sync::atomic::{AtomicU64, Ordering};

use afterimage_classifier::kernels::{AddScaled, Chunk, Chunks, Dots, Isa, chunks};
use afterimage_classifier::{LinearSvm, ModelError};
use ndarray::{Array1, Array2};
use rayon::prelude::*;

use super::Progress;
use super::random::Random;

/// Inputs between two reports of progress.
const REPORT_EVERY: usize = 1 << 14;

/// The problem to solve.
pub(crate) struct Problem<'a, R> {
    /// The inputs.
    pub(crate) rows: &'a R,
    /// The class of each input, below `class_count`.
    pub(crate) classes: &'a [u16],
    pub(crate) class_count: usize,
    /// The weight of the loss, C.
    pub(crate) c: f64,
    /// The constant feature of every input. Its weight becomes the intercept.
    pub(crate) bias: f32,
    /// Most passes over the inputs.
    pub(crate) epochs: usize,
    /// A class is settled if no projected gradient of a whole pass exceeds this.
    pub(crate) tolerance: f32,
    pub(crate) seed: u64,
}

/// The inputs of a problem, computed on demand: a feature map may have thousands of features for
/// every byte of an input.
pub(crate) trait Rows: Sync {
    /// The number of features of an input.
    fn dims(&self) -> usize;
    /// Writes the features of input `index` to `row` (`chunks(dims)`), with zeros in the padding.
    fn write(&self, isa: Isa, index: usize, row: &mut [Chunk]);
    /// Their squared norm.
    fn squared_norm(&self, isa: Isa, index: usize) -> f32;
}

/// Solves for all classes, on the threads of the current rayon pool.
pub(crate) fn solve<R: Rows>(
    problem: &Problem<'_, R>,
    stage: &'static str,
    progress: &(dyn Fn(Progress) + Sync),
) -> Result<LinearSvm, ModelError> {
    let Problem { rows, class_count, bias, .. } = *problem;
    let isa = Isa::best();
    // The growth of the gradient of a dual variable for each unit: ‖x‖² + 1/(2C).
    let curvatures: Vec<f32> = (0..problem.classes.len())
        .into_par_iter()
        .map(|i| {
            let norm = f64::from(rows.squared_norm(isa, i)) + f64::from(bias) * f64::from(bias);
            (norm + 0.5 / problem.c) as f32
        })
        .collect();
    let group = class_count.div_ceil(rayon::current_num_threads()).max(1);
    let groups = class_count.div_ceil(group);
    let steps = problem.classes.len().div_ceil(REPORT_EVERY);
    let done = AtomicU64::new(0);
    let report = || {
        let done = done.fetch_add(1, Ordering::Relaxed) + 1;
        progress(Progress { stage, done, total: (problem.epochs * groups * steps) as u64 });
    };
    let solved: Vec<Group> = (0..groups)
        .into_par_iter()
        .map(|g| {
            let mut group = Group::new(problem, g * group..class_count.min((g + 1) * group));
            for epoch in 0..problem.epochs {
                if group.pass(isa, problem, &curvatures, epoch, &report) {
                    break;
                }
            }
            group
        })
        .collect();

    let dims = rows.dims();
    let mut weights = Vec::with_capacity(class_count * dims);
    let mut intercepts = Vec::with_capacity(class_count);
    for group in &solved {
        for row in group.weights.chunks_exact(group.row) {
            weights.extend_from_slice(&row.as_flattened()[..dims]);
        }
        intercepts.extend(group.machines.iter().map(|machine| machine.bias_weight * bias));
    }
    let weights = Array2::from_shape_vec((class_count, dims), weights)
        .map_err(|error| ModelError::mismatch("svm.weights", "a matrix", error))?;
    LinearSvm::new(weights, Array1::from(intercepts))
}

/// Machines that are solved together on one thread, so that each input is computed once for all of
/// them.
struct Group {
    /// Chunks of one machine's weights.
    row: usize,
    /// `[machines, row]`.
    weights: Chunks,
    machines: Vec<Machine>,
    input: Chunks,
    scores: Vec<f32>,
}

struct Machine {
    class: u16,
    alphas: Vec<f32>,
    bias_weight: f32,
    settled: bool,
}

impl Group {
    fn new<R: Rows>(problem: &Problem<'_, R>, classes: std::ops::Range<usize>) -> Self {
        let row = chunks(problem.rows.dims());
        let machine = |class| Machine {
            class: class as u16,
            alphas: vec![0.0; problem.classes.len()],
            bias_weight: 0.0,
            settled: false,
        };
        Self {
            row,
            weights: Chunks::zeros(classes.len() * row),
            scores: vec![0.0; classes.len()],
            machines: classes.map(machine).collect(),
            input: Chunks::zeros(row),
        }
    }

    /// Makes one pass over all inputs. Returns whether every machine has settled.
    fn pass<R: Rows>(
        &mut self,
        isa: Isa,
        problem: &Problem<'_, R>,
        curvatures: &[f32],
        epoch: usize,
        report: &impl Fn(),
    ) -> bool {
        let Self { row, weights, machines, input, scores } = self;
        let row = *row;
        let diagonal = (0.5 / problem.c) as f32;
        let order =
            Random::new(problem.seed, b"dcd pass", epoch as u64).permutation(problem.classes.len());
        let mut worst = vec![0.0_f32; machines.len()];
        for (step, i) in order.into_iter().enumerate() {
            let i = i as usize;
            if step % REPORT_EVERY == 0 {
                report();
            }
            problem.rows.write(isa, i, input);
            isa.run(Dots { row, x: input, w: weights, out: scores });
            for (m, machine) in machines.iter_mut().enumerate() {
                if machine.settled {
                    continue;
                }
                let y = if machine.class == problem.classes[i] { 1.0 } else { -1.0 };
                let alpha = machine.alphas[i];
                let margin = y * (scores[m] + machine.bias_weight * problem.bias);
                let gradient = margin - 1.0 + alpha * diagonal;
                let projected = if alpha > 0.0 { gradient } else { gradient.min(0.0) };
                if projected == 0.0 {
                    continue;
                }
                worst[m] = worst[m].max(projected.abs());
                let next = (alpha - gradient / curvatures[i]).max(0.0);
                machine.alphas[i] = next;
                let factor = (next - alpha) * y;
                machine.bias_weight += factor * problem.bias;
                let w = &mut weights[m * row..(m + 1) * row];
                isa.run(AddScaled { w, factor, x: input });
            }
        }
        for (machine, worst) in machines.iter_mut().zip(worst) {
            machine.settled |= worst <= problem.tolerance;
        }
        machines.iter().all(|machine| machine.settled)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Points(Vec<Vec<f32>>);

    impl Rows for Points {
        fn dims(&self) -> usize {
            self.0[0].len()
        }
        fn write(&self, _: Isa, index: usize, row: &mut [Chunk]) {
            row.as_flattened_mut()[..self.dims()].copy_from_slice(&self.0[index]);
        }
        fn squared_norm(&self, _: Isa, index: usize) -> f32 {
            self.0[index].iter().map(|x| x * x).sum()
        }
    }

    /// Two overlapping clouds and a third apart, in 20 dimensions.
    fn clouds() -> (Points, Vec<u16>) {
        let mut random = Random::new(3, b"a test..", 0);
        let mut uniform = || random.below(1 << 20) as f32 / (1 << 20) as f32 - 0.5;
        let classes: Vec<u16> = (0..300).map(|i| i % 3).collect();
        let point = |&class: &u16| {
            (0..20).map(|j| uniform() + f32::from(class) * if j < 3 { 0.25 } else { 0.0 }).collect()
        };
        (Points(classes.iter().map(point).collect()), classes)
    }

    fn problem<'a>(rows: &'a Points, classes: &'a [u16]) -> Problem<'a, Points> {
        Problem {
            rows,
            classes,
            class_count: 3,
            c: 0.7,
            bias: 1.0,
            epochs: 1000,
            tolerance: 1e-4,
            seed: 1,
        }
    }

    #[test]
    fn reaches_the_minimum_where_the_gradient_vanishes() {
        let (rows, classes) = clouds();
        let svm = solve(&problem(&rows, &classes), "test", &|_| {}).unwrap();
        for class in 0..3 {
            // The primal gradient: w − 2C Σ max(0, 1 − y s) y x, with the bias as one more feature.
            let w = svm.weights().row(class).to_vec();
            let b = svm.intercepts()[class];
            let mut gradient: Vec<f32> = w.iter().copied().chain([b]).collect();
            for (x, &label) in rows.0.iter().zip(&classes) {
                let y = if usize::from(label) == class { 1.0 } else { -1.0 };
                let score: f32 = w.iter().zip(x).map(|(w, x)| w * x).sum::<f32>() + b;
                let loss = (1.0 - y * score).max(0.0);
                for (g, x) in gradient.iter_mut().zip(x.iter().chain([&1.0])) {
                    *g -= 2.0 * 0.7 * loss * y * x;
                }
            }
            let norm = w.iter().map(|w| w * w).sum::<f32>().sqrt();
            assert!(norm > 0.5, "the problem is not trivial: ‖w‖ = {norm}");
            for g in gradient {
                assert!(g.abs() < 2e-2 * norm, "gradient {g} at ‖w‖ = {norm}");
            }
        }
    }

    #[test]
    fn solves_the_readmes_example() {
        let rows = Points(vec![vec![2.0, 1.0], vec![1.0, 2.0], vec![4.0, 0.0]]);
        let problem = Problem {
            class_count: 2,
            c: 0.5,
            bias: 0.0,
            tolerance: 1e-6,
            ..problem(&rows, &[0, 1, 0])
        };
        let svm = solve(&problem, "test", &|_| {}).unwrap();
        for (weight, expected) in svm.weights().row(0).iter().zip([0.5, -0.5]) {
            assert!((weight - expected).abs() < 1e-5, "{weight} should be {expected}");
        }
    }

    #[test]
    fn gives_the_same_bits_on_any_number_of_threads() {
        let (rows, classes) = clouds();
        let solve_on = |threads| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            let svm = pool.install(|| solve(&problem(&rows, &classes), "test", &|_| {}).unwrap());
            let bits: Vec<u32> =
                svm.weights().iter().chain(&svm.intercepts()).map(|w| w.to_bits()).collect();
            bits
        };
        let alone = solve_on(1);
        for threads in [2, 3, 7] {
            assert_eq!(solve_on(threads), alone, "{threads} threads");
        }
    }

    #[test]
    fn another_seed_gives_other_bits() {
        let (rows, classes) = clouds();
        let first = solve(&problem(&rows, &classes), "test", &|_| {}).unwrap();
        let other = Problem { seed: 2, ..problem(&rows, &classes) };
        let second = solve(&other, "test", &|_| {}).unwrap();
        assert_ne!(first.weights(), second.weights());
    }
}
