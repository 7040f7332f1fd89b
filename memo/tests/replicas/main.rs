//! Several classifiers behind one memo, over real sockets: balance, failures, draining, retries,
//! and models that disagree.

#![allow(clippy::unwrap_used)]

#[path = "../common/mod.rs"]
mod common;
mod discovery;
mod load;
mod models;
mod rows;
mod trouble;
