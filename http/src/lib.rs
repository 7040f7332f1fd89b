//! An HTTP listener with limits, for every HTTP service of the workspace.
//!
//! [`serve`] accepts connections and runs a service on them: any [`hyper::service::Service`], or a
//! router of `axum` through `hyper_util::service::TowerToHyperService`. The version of HTTP is
//! detected: HTTP/1.1, HTTP/2 over TLS, and HTTP/2 with prior knowledge.
//!
//! [`serve_streams`] gives the streams of HTTP/2 to a [`StreamService`] as they are, for gRPC.
//!
//! The listener owns everything that a hostile or a slow client can exhaust: connections in total
//! and of one address, header fields and their bytes, streams of an HTTP/2 connection and their
//! resets, the time for a TLS handshake, for a header, and between two parts of a body, and the
//! time in which a client reads no response. [`HttpOptions`] names each limit with its reason.
//!
//! An HTTP/1.1 request with both `Content-Length` and `Transfer-Encoding` gets 400, and its
//! connection is closed: two servers could disagree where the next request begins.
//!
//! [`Collected`] is a request's body in memory, within a limit and a
//! [`ByteBudget`](afterimage_core::ByteBudget). A body that does not fit is handed back, so that a
//! proxy can still forward it.
//!
//! This crate knows no model, no memo and no route.

#![forbid(unsafe_code)]

mod body;
mod connection;
mod framing;
mod listener;
mod options;
mod places;
mod refusal;
mod respond;
mod streams;
mod transport;

pub use body::{Collected, RequestBody, Rest, StallError, Uncollected};
pub use connection::serve;
pub use listener::Peer;
pub use options::HttpOptions;
pub use respond::Respond;
pub use streams::{StreamService, serve_streams};
#[doc(hidden)]
pub use transport::Charged;

/// The examples of the README, as tests.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
