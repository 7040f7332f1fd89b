//! Workloads: populations of images, keys or calls, and access patterns.

mod access;
mod calls;
mod population;
pub mod spec;

pub use access::Access;
pub(crate) use access::{Draw, Pattern};
pub use calls::{Calls, Protocol, recorded};
pub use population::{Answers, Keys, MAX_POPULATION, Population, PopulationError};
pub(crate) use population::{Fresh, STAMP_LEN};
pub use spec::Spec;
