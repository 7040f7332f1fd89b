//! The load generator: schedules, targets, checked answers and latency histograms.

pub mod digits;
pub mod workload;
