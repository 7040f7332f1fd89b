//! Helpers that the tests of several crates share. No product code depends on this crate.

#![allow(clippy::missing_panics_doc, clippy::unwrap_used, reason = "tests panic")]

pub mod doubles;
#[cfg(feature = "fuzz")]
pub mod fuzz;
pub mod inference;
pub mod killed;
pub mod memory;
pub mod pki;
pub mod services;
pub mod vectors;
