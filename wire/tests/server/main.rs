//! The server against good and bad clients.

#![allow(clippy::unwrap_used, reason = "tests panic")]

mod answers;
mod ends;
mod limits;
mod puppet;
