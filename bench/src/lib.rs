//! The load generator: schedules, targets, checked answers and latency histograms.
//!
//! A [`Plan`] says what to ask whom, in which order and how fast; [`run`] does it and gives a
//! [`Report`]. Every answer is checked: a run with a wrong one has no figures.
//!
//! Two latencies are kept of each request. The one *from due* runs from the moment the request was
//! to be sent; a server that stalls makes all that was due meanwhile late, and this one shows it.
//! The one *from sent* runs from the moment the request was handed to the kernel; it shows what the
//! server did with what it got. In a closed loop a request is due when the answer before it has
//! come, so the two hardly differ.

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
mod peer;
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

pub use address::{Address, Login, redacted, redacted_command};
pub use dialect::Dialect;
pub use error::BenchError;
pub use load::{Progress, greet, run};
pub use outcome::{Latencies, Outcome};
pub use peer::Peer;
pub use plan::{
    Arrivals, Cancel, DEFAULT_TIMEOUT, MAX_BATCH, MAX_CONNECTIONS, MAX_DEPTH, Mode, Plan, Span,
    Target,
};
pub use report::Report;
pub use tally::WrongAnswer;
