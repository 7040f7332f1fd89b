//! The load generator: schedules, targets, checked answers and latency histograms.
//!
//! A [`Plan`] has the server, the requests, their order and their rate. [`run`] executes it and
//! returns a [`Report`]. Every answer is checked: a run with a wrong answer has no figures.
//!
//! Each request has two latencies. *From due* runs from the moment at which the request was to be
//! sent, so it includes the time that later requests wait while the server stalls. *From sent* runs
//! from the hand-over to the kernel, so it shows the server's own time. In a closed loop a request
//! is due when the answer before it arrives, and the two hardly differ.

#![forbid(unsafe_code)]

mod address;
mod channel;
pub mod compare;
mod connection;
mod dialect;
pub mod digits;
mod error;
pub mod export;
mod flight;
pub mod format;
pub mod html;
mod lane;
mod load;
mod outcome;
mod plan;
pub mod record;
pub mod report;
mod schedule;
pub mod search;
pub mod stats;
mod tally;
pub mod threshold;
mod timeline;
mod worker;
pub mod workload;
mod zipf;

pub use address::{Address, Login, Peer, redacted, redacted_command};
pub use dialect::Dialect;
pub use error::BenchError;
pub use load::{Progress, describe, greet, run};
pub use outcome::{Latencies, Outcome};
pub use plan::{
    Arrivals, Cancel, DEFAULT_TIMEOUT, MAX_BATCH, MAX_CONNECTIONS, MAX_DEPTH, MAX_RATE, Mode, Plan,
    Span, Target,
};
pub use report::Report;
pub use tally::WrongAnswer;
