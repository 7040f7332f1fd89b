//! Jobs: slow work with an id, run by workers, its results remembered.
//!
//! A *definition* is a predefined kind of work. A client submits a *job* of a definition, an input
//! of bytes, and gets an id. Workers pull jobs, run them, and report results. The result of a job
//! is remembered under its definition, version, input and the worker's code: the same input again
//! is answered at once, and while a job runs, an equal one joins it.
//!
//! * [`machine`]: the life of one job, pure.
//! * [`Engine`]: all jobs of a server: queue, leases, memory of results. Pure, too.
//! * [`Store`]: where jobs, results and events are kept; [`Sqlite`] is a file.
//! * [`Server`]: an engine and a store behind one thread, which commits for all callers at once.
//! * [`JobService`]: a server on the TCP protocol. [`Client`] and [`Worker`] are its other side.
//!
//! This crate knows no HTTP, no memo and no images.

#![forbid(unsafe_code)]

mod action;
mod client;
mod definition;
pub mod engine;
mod id;
mod job;
pub mod machine;
pub mod message;
pub mod metrics;
mod program;
pub mod server;
mod service;
mod sqlite;
mod store;
pub mod worker;

pub use action::{Action, Code, ResultKey};
pub use client::{Client, JobsError, Submission};
pub use definition::{Definition, MAX_NAME};
pub use engine::{Attach, Changes, Engine, Grant, Submit, Submitted, Verdict};
pub use id::{Ids, InvalidId, JobId};
pub use job::{Job, Lease, Outcome, Refused, State, Timestamp, Token, WorkerId};
pub use machine::Command;
pub use program::Program;
pub use server::{Server, ServerOptions};
pub use service::JobService;
pub use sqlite::Sqlite;
pub use store::{Event, Filter, Kind, Record, Recovered, Row, Store, StoreError};
pub use worker::{Handler, Task, Worker};

/// The examples of the README, as tests.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
