//! Files of any size in bounded memory: records out of unbounded bytes, folds with exact results,
//! and checkpoints that continue them.
//!
//! Bytes pass through these parts:
//!
//! 1. A [`split::Splitter`] finds records. Its state is a few dozen bytes.
//! 2. A [`fold::Fold`] takes the records and keeps a small state: a mean, quantiles, a count.
//! 3. A [`run::Run`] drives both, and counts. It does no I/O.
//! 4. A [`checkpoint::Checkpoint`] is the state of a run after a whole record. A run that continues
//!    at a checkpoint has the same result, bit for bit, as one that was never interrupted.
//!
//! [`service`] offers runs over the streams of the TCP protocol, and [`client`] sends files to it.
#![deny(unsafe_code)]

pub mod checkpoint;
pub mod classify;
pub mod client;
pub mod fold;
pub mod folder;
pub mod message;
pub mod metrics;
pub mod record;
pub mod run;
pub mod service;
pub mod split;

#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
