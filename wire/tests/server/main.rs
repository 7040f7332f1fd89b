//! The server half against clients that behave and clients that do not.

#![allow(clippy::unwrap_used)]
mod answers;
mod ends;
mod limits;
mod puppet;
mod refusals;
