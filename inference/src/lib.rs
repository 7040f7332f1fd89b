//! Afterimage in front of model servers, in their own protocols.
//!
//! [`Proxy`] is an HTTP service in front of one model server, or of several equal ones. The path of
//! a request:
//!
//! 1. `proxy` separates inference calls from all others. The others pass through unchanged
//!    ([`forward`]).
//! 2. `policy` decides whether the answer to a call may be stored. If not, the call passes
//!    through, and `Cache-Status` has the reason.
//! 3. [`oip`] parses the call. Its canonical bytes are the row that the memo hashes: JSON, binary
//!    tensors and compressed bodies of equal content are one row.
//! 4. `models` gives the memo's model: the name and version of the URL, with the identity that the
//!    server reports. It is polled, and known questions (`canary`) are asked again, so that a
//!    replaced model starts a new epoch.
//! 5. The memo answers from its store, or calls an `endpoint` with the client's own request. The
//!    client that asked first gets the server's response as it came; others get one that is made
//!    from the answer, in the encoding that they asked for.
//!
//! The same proxy answers gRPC ([`grpc`]), from the same memory.
//!
//! The crate does not import the classifier, and knows no command line.

#![forbid(unsafe_code)]

mod access;
mod answer;
mod call;
mod called;
mod canary;
mod compare;
mod content;
pub mod embeddings;
mod endpoint;
mod error;
pub mod estimate;
pub mod forward;
pub mod grpc;
mod headers;
mod identity;
mod json;
mod label_endpoint;
pub mod metrics;
mod models;
mod observe;
pub mod oip;
pub mod policy;
mod proxy;
mod purity;
mod statistics;

pub use access::{AccessLog, LogTarget};
pub use called::decoded as decoded_body;
pub use forward::{Replica, Target, TargetError};
pub use grpc::{Channel, GrpcTarget};
pub use label_endpoint::{LabelEndpoint, ModelUrl};
pub use models::{Change, ModelReport};
pub use policy::{Bypass, Sharing};
pub use proxy::{Proxy, ProxyOptions};
pub use purity::{Evidence, RowsMode, Verdict};

/// The examples of the README, as tests.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
