//! The Afterimage protocol and both ends of a connection.
//!
//! * [`proto`] is the protocol itself: header, messages, codec. It does no I/O and reads no clock.
//!   `PROTOCOL.md` beside this crate is its law, the golden vectors in `vectors/` are its proof.
//! * [`client`] is what users add to their own programs: one connection, any number of concurrent
//!   callers. [`blocking`] is the same without an async runtime.
//! * [`server`] takes all that a connection has to say in one batch and answers it in one batch.
//! * [`tls`] secures both, where that is wanted.
//! * [`splitmix`] is the chance that all rooms above share.

#![forbid(unsafe_code)]

pub mod blocking;
pub mod client;
pub mod proto;
mod sched;
pub mod server;
pub mod splitmix;
pub mod text;
pub mod tls;

pub use client::{CallError, CallOptions, Client, ClientOptions};
pub use proto::Status;
pub use sched::corked;
