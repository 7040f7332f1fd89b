//! The memo's promises, over real sockets, with a classifier that does as the test says.

#![allow(clippy::unwrap_used)]

mod burst;
#[path = "../common/mod.rs"]
mod common;
mod flush;
mod inference;
mod nonsense;
mod once;
mod puppet;
mod remote_bytes;
mod right;
mod trouble;
