//! Types that every crate of the workspace shares. They do no I/O and read no clock.
//!
//! * [`Reply`] is the duty to answer one request: exactly once, also when code panics or forgets it.
//! * [`FairQueue`] serves clients in turn, so that one busy client does not delay the others.
//! * [`ByteBudget`] bounds the bytes that waiting requests and buffers hold.

#![forbid(unsafe_code)]

pub mod budget;
pub mod fair;
pub mod reply;

pub use budget::{ByteBudget, BytePermit};
pub use fair::{ClientId, FairQueue, Refused};
pub use reply::{Outcome, Reply, Sink, Wanted};
