//! The memo: it stands in a classifier's place, speaks its protocol, and remembers its answers.
//!
//! To the memo an image is bytes and an answer is an integer. A request's way through the files:
//! [`service`] takes a batch, [`key`] hashes each image under the classifier's current model,
//! [`store`] is asked for the hash, and on a miss [`flights`] makes sure that one call goes to the
//! [`upstream`], however many ask. [`latency`] and the counters in [`service`] see it all.
//!
//! A remembered answer is believed only when its seal proves that it was given for these very
//! bytes by this very model: see [`key`].

#![forbid(unsafe_code)]

#[cfg(not(loom))]
mod audit;
#[cfg(not(loom))]
pub mod breaker;
#[cfg(not(loom))]
mod clock;
#[cfg(all(test, not(loom)))]
mod collisions;
mod duty;
pub mod flights;
#[cfg(all(test, loom))]
mod flights_model;
#[cfg(all(test, not(loom)))]
mod forgeries;
#[cfg(not(loom))]
pub mod key;
#[cfg(not(loom))]
pub mod latency;
#[cfg(all(test, not(loom)))]
mod plant;
#[cfg(not(loom))]
pub mod service;
#[cfg(all(test, not(loom)))]
mod simulation;
#[cfg(not(loom))]
pub mod store;
mod sync;
#[cfg(not(loom))]
pub mod upstream;
#[cfg(not(loom))]
mod worth;

#[cfg(not(loom))]
pub use key::{ModelId, Secret};
#[cfg(not(loom))]
pub use service::{MemoOptions, MemoService};
#[cfg(not(loom))]
pub use store::Store;
#[cfg(not(loom))]
pub use upstream::Classifier;
