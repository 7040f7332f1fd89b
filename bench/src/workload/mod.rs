//! Workloads: populations of images or keys, and access patterns.

mod access;
mod fresh;
mod population;
pub mod spec;

pub use access::Access;
pub(crate) use access::{Draw, Pattern};
pub(crate) use fresh::{Fresh, STAMP_LEN};
pub use population::{Answers, Keys, MAX_POPULATION, Population, PopulationError};
pub use spec::Spec;
