//! Helpers that the tests of several crates share. No product code depends on this crate.

#![allow(clippy::missing_panics_doc, clippy::unwrap_used, reason = "tests panic")]

pub mod counting;
pub mod endless;
pub mod first_byte;
#[cfg(feature = "fuzz")]
pub mod fuzz;
pub mod pki;
pub mod resident;
pub mod vectors;
