//! The memo: it answers repeated requests to a model from a store.
//!
//! An input is a row of bytes; an answer is a label or bytes. [`Memo`] is the library: add models
//! and [`ask`](Memo::ask). [`MemoService`] puts one model of a memo behind a TCP listener.
//!
//! The way of a miss:
//!
//! 1. A front end hands rows to the memo: [`Memo::submit`], or a batch of the TCP service.
//! 2. [`key`] hashes each row under the model's present keys. `models` holds these keys and follows
//!    the upstream's model.
//! 3. `lookup` reads a store in this process. A stored answer is used only if its seal proves that
//!    this model gave it for these bytes. A hit is answered here.
//! 4. Every other row has to wait. `shares` limits the number and the bytes of waiting rows, for
//!    all clients and for each. A row above a limit gets the status `overloaded`.
//! 5. The row joins a flight ([`flights`]), the one call for all equal rows. The first waiter of a
//!    flight gets a permit, the duty to make the call; `begun` holds the duties of a batch. Later
//!    equal rows only wait. A remote [`store`] is read now, so that equal rows share the lookup; a
//!    hit ends the flight.
//! 6. The calls of the batch go to the [`upstream`]: a model in this process, or a [`pool`] of
//!    endpoints. A `flight` is the receiver of one call. Before costly work the upstream asks
//!    whether the answer is still wanted; `deadlines` removes the waiters whose time is over.
//! 7. The answer is checked against the model, sealed, and written to the store. Then the flight
//!    completes and each waiter gets its reply. A failure goes to each waiter and to no store.
//!
//! A [`Reply`](afterimage_core::Reply) owns each duty on this way, so that a panic or a dropped
//! call ends in a failure, and each waiter gets a reply.
//!
//! A model check (`--cfg loom`) compiles the flights and what they need; tokio does not build
//! there.

#![forbid(unsafe_code)]

pub mod flights;
#[doc(hidden)]
pub mod single_task;
mod sync;

macro_rules! outside_the_model_check {
    ($($item:item)*) => { $(#[cfg(not(loom))] $item)* };
}

outside_the_model_check! {
    mod audit;
    mod begun;
    pub mod breaker;
    mod bypass;
    mod deadlines;
    mod epoch;
    mod flight;
    mod inner;
    pub mod key;
    pub mod latency;
    mod lookup;
    mod memo;
    pub mod metrics;
    mod models;
    pub mod pool;
    mod request;
    pub mod service;
    mod shares;
    pub mod store;
    pub mod upstream;
    mod waiter;

    #[doc(hidden)]
    pub use deadlines::SWEEP_EVERY;
    pub use epoch::CHECK_EVERY;
    pub use inner::MemoOptions;
    pub use key::Secret;
    pub use memo::Memo;
    pub use models::ModelOptions;
    pub use request::{Context, Directives, MAX_ROWS, Request};
    pub use service::MemoService;
    pub use store::Store;
    pub use upstream::Upstream;
}
