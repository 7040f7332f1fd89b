//! Processes that die, hang and come back while load runs. What a memo promises of itself (see
//! `docs/reliability.md`) is asked of real processes over real sockets here.

#![allow(clippy::unwrap_used)]

mod cache;
mod classifier;
#[path = "../common/mod.rs"]
mod common;
mod memo;
mod models;
mod services;
