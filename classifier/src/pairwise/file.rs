//! Kernel machines in model files.

use super::votes::pairs;
use super::{KernelFunction, Pairwise, Parts, VectorValues};
use crate::error::ModelError;
use crate::pixels::Pixels;
use crate::svm::MAX_CLASSES;
use crate::tensors::{Tensor, Tensors};

impl Pairwise {
    pub(super) const COEFFICIENTS: &'static str = "kernel.coefficients";
    pub(super) const RHO: &'static str = "kernel.rho";
    const COUNTS: &'static str = "kernel.counts";
    const PARAMETERS: &'static str = "kernel.parameters";

    pub fn add_tensors(&self, tensors: &mut Tensors) {
        self.pixels.add_tensors(tensors);
        let mut insert = |name: &str, tensor: Tensor| tensors.insert(name.to_owned(), tensor);
        let (classes, count) = (self.classes(), self.vectors());
        let counts = self.starts.windows(2).map(|two| (two[1] - two[0]) as u32).collect();
        insert(Self::COUNTS, Tensor::new::<u32>(&[classes], counts));
        insert(Self::RHO, Tensor::new(&[self.rho.len()], self.rho.clone()));
        let coefficients = self.coefficients.clone();
        insert(Self::COEFFICIENTS, Tensor::new(&[classes - 1, count], coefficients));
        let (gamma, coef0, degree) = self.function.parameters();
        insert(Self::PARAMETERS, Tensor::new(&[3], vec![gamma, coef0, f64::from(degree)]));
        self.vectors.values().add_tensors(self.dims, tensors);
    }

    /// The machines of `classes` classes over images of `dims` bytes with the kernel of this name,
    /// taken out of `tensors`.
    pub fn from_tensors(
        kernel: &str,
        classes: usize,
        dims: usize,
        tensors: &mut Tensors,
    ) -> Result<Self, ModelError> {
        if !(2..=MAX_CLASSES).contains(&classes) {
            return Err(ModelError::mismatch("classes", format!("2 to {MAX_CLASSES}"), classes));
        }
        let parameters: Vec<f64> = Tensor::take(tensors, Self::PARAMETERS, &[3])?;
        let function = KernelFunction::named(kernel, parameters[0], parameters[1], parameters[2])?;
        let counts: Vec<u32> = Tensor::take(tensors, Self::COUNTS, &[classes])?;
        let count = counts.iter().map(|&count| count as usize).sum();
        Self::new(Parts {
            pixels: Pixels::from_tensors(dims, tensors)?,
            function,
            dims,
            vectors: VectorValues::from_tensors(count, dims, tensors)?,
            counts,
            coefficients: Tensor::take(tensors, Self::COEFFICIENTS, &[classes - 1, count])?,
            rho: Tensor::take(tensors, Self::RHO, &[pairs(classes)])?,
        })
    }
}
