//! The command line as a person or a script meets it: what it prints, how it fails, where its
//! settings come from, and what it keeps to itself.

#![allow(clippy::unwrap_used)]

#[path = "../common/mod.rs"]
mod common;
mod errors;
mod foreign_text;
mod help;
mod images;
mod secrets;
mod settings;
mod shared;
mod startup;
mod tools;
