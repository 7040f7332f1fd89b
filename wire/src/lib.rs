//! The Afterimage protocol: a server half, a client half, and the messages between them.
//!
//! An Afterimage server answers requests over TCP: a classifier gives the label of an image, a memo
//! does the same and answers repeated images from its store, a cache service maps 64-bit keys to
//! 64-bit values. This crate connects programs to such servers, and lets a program be one.
//!
//! * [`client`]: [`Client`], [`CacheClient`] and [`Admin`] on a [`Connection`] for any number of
//!   concurrent callers, with deadlines and reconnection.
//! * [`blocking`]: the same clients without an async runtime.
//! * [`server`]: [`Server`](server::Server) accepts connections and hands requests to a
//!   [`Service`](server::Service) in batches.
//! * [`proto`]: header, messages and codec, without I/O and without a clock. `PROTOCOL.md` beside
//!   this crate is the reference.
//! * [`stream`]: bytes of any length in both directions, with credit and progress.
//! * [`tls`]: TLS 1.3 for both halves, with certificates that are reloaded when their files change.
//! * [`splitmix`]: random numbers for jitter, sampling and tests.
//!
//! # A client
//!
//! ```no_run
//! use afterimage_wire::{Client, ClientOptions};
//!
//! # async fn example() -> Result<(), Box<dyn std::error::Error>> {
//! let client = Client::connect("127.0.0.1:7400", ClientOptions::new()).await?;
//! let answer = client.classify(&[0; 28 * 28]).await?;
//! println!("label {}, {:?}", answer.label, answer.origin);
//! # Ok(()) }
//! ```
//!
//! [`blocking::Client`] has the same calls for threads and a plain `fn main`.
//!
//! # Cargo features
//!
//! All are on by default. Without them the crate has the async clients over plain TCP.
//!
//! | feature | adds |
//! | --- | --- |
//! | `server` | [`server`] and [`prometheus`] |
//! | `tls` | [`tls`], for the halves that are built |
//! | `blocking` | [`blocking`] |
//!
//! # A server
//!
//! A service that answers each image with its first byte, and a client that asks it:
//!
//! ```
//! use std::sync::Arc;
//!
//! use afterimage_wire::proto::message::{Classification, Origin};
//! use afterimage_wire::proto::{Role, stats::Stats};
//! use afterimage_wire::server::{Batch, Identity, Op, Server, ServerOptions, Service};
//! use afterimage_wire::{Client, ClientOptions};
//!
//! struct FirstByte;
//!
//! impl Service for FirstByte {
//!     fn identity(&self) -> Identity {
//!         Identity::without_model(Role::Classifier)
//!     }
//!
//!     fn handle(&self, batch: &mut Batch<'_>) {
//!         for (index, request) in batch.requests().iter().enumerate() {
//!             if let Op::Classify { image: [first, ..] } = request.op {
//!                 let label = u16::from(*first);
//!                 batch.label(index, Classification { label, origin: Origin::Miss });
//!             }
//!         }
//!     }
//!
//!     fn stats(&self, _: &mut Stats) {}
//! }
//!
//! # #[tokio::main(flavor = "current_thread")]
//! # async fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let server = Server::bind("127.0.0.1:0", Arc::new(FirstByte), ServerOptions::default()).await?;
//! let address = server.local_addr()?;
//! tokio::spawn(server.serve(std::future::pending()));
//!
//! let client = Client::connect(address, ClientOptions::new()).await?;
//! assert_eq!(client.classify(&[7, 1, 2]).await?.label, 7);
//! # Ok(()) }
//! ```
//!
//! # Errors
//!
//! A call fails with a [`CallError`]; [`client::Report`] prints it with its causes in one line:
//! `cannot connect to 127.0.0.1:7400: Connection refused (os error 111)`.

#![forbid(unsafe_code)]

#[cfg(feature = "blocking")]
pub mod blocking;
pub mod client;
#[cfg(feature = "server")]
pub mod prometheus;
#[cfg_attr(not(feature = "server"), allow(dead_code, reason = "the server encodes replies"))]
pub mod proto;
mod sched;
#[cfg(feature = "server")]
pub mod server;
pub mod splitmix;
pub mod stream;
pub mod text;
#[cfg(feature = "tls")]
pub mod tls;

pub use client::{Admin, CacheClient, CallError, CallOptions, Client, ClientOptions, Connection};
pub use proto::Status;
pub use sched::corked;
