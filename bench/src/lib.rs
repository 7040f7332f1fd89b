//! The load generator: schedules, targets, checked answers and latency histograms.
