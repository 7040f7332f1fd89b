//! The subcommands, one file each.

pub(crate) mod bench;
pub(crate) mod cache;
pub(crate) mod classifier;
pub(crate) mod classify;
pub(crate) mod demo;
pub(crate) mod doctor;
pub(crate) mod estimate;
pub(crate) mod eval;
pub(crate) mod forget;
pub(crate) mod gateway;
pub(crate) mod import;
pub(crate) mod install;
pub(crate) mod jobs;
pub(crate) mod key;
pub(crate) mod memo;
pub(crate) mod models;
pub(crate) mod ping;
pub(crate) mod proxy;
pub(crate) mod serve;
pub(crate) mod snapshot;
pub(crate) mod stats;
pub(crate) mod stream;
pub(crate) mod train;
