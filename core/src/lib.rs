//! Types that every crate of the workspace shares. They do no I/O, except in
//! [`file`](mod@file), and read no clock.
//!
//! * [`Answer`], [`Failure`] with its [`Status`], and [`ModelId`] are what a request comes to.
//! * [`Reply`] is the duty to answer one request: exactly once, also when code panics or forgets
//!   it.
//! * [`FairQueue`] serves clients in turn, so that one busy client does not delay the others.
//! * [`ByteBudget`] bounds the bytes that waiting requests and buffers hold.
//! * [`Metric`] describes a number that a service counts or measures.
//! * [`Tally`] limits how often an event is logged.
//! * [`file`](mod@file) reads the files that users name, within limits.
//! * [`transparency`] puts transparent pictures on a ground.

#![forbid(unsafe_code)]

pub mod answer;
pub mod budget;
pub mod fair;
pub mod file;
mod gather;
pub mod metric;
pub mod model;
pub mod reply;
pub mod status;
pub mod tally;
pub mod transparency;

pub use answer::{Answer, Computed, Origin, Response, RowAnswer, RowReply, Rows};
pub use budget::{ByteBudget, BytePermit};
pub use fair::{ClientId, FairQueue, Refused, Tenant};
pub use gather::gather;
pub use metric::Metric;
pub use model::{AnswerKind, ModelId, Shape};
pub use reply::{Outcome, Reply, Sink, Wanted, Watch};
pub use status::{Failure, Status};
pub use tally::Tally;

/// The examples of the README, as tests.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
