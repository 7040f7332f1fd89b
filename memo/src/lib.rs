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

pub mod breaker;
pub mod flights;
pub mod key;
pub mod latency;
pub mod service;
pub mod store;
pub mod upstream;

pub use key::{ModelId, Secret};
pub use service::{MemoOptions, MemoService};
pub use store::Store;
pub use upstream::Classifier;
