//! Inference protocols in front of a memo.
//!
//! * [`oip`]: requests and responses of the Open Inference Protocol v2, as values that do not
//!   depend on their encoding.

#![forbid(unsafe_code)]

mod json;
pub mod oip;

/// The examples of the README, as tests.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
