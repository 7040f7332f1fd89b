//! The memo: a service that answers repeated classifier requests from a store.
//!
//! An input is bytes and an answer is an integer. A request passes these modules: [`service`]
//! takes a batch, [`key`] hashes each input under the classifier's current model, and [`store`]
//! looks the hash up. On a miss, [`flights`] makes one call for all equal inputs. The call goes to
//! an [`upstream`] classifier, either in this process or behind a [`pool`] of endpoints.
//! [`latency`] and the counters in [`service`] measure all of it.
//!
//! A stored answer is used only if its seal proves that this model gave it for these bytes. The
//! documentation of [`key`] describes the seal.
//!
//! A model check (`--cfg loom`) compiles the flights and what they need; tokio does not build
//! there.

#![forbid(unsafe_code)]

pub mod flights;
#[doc(hidden)]
pub mod single_task;
mod sync;

#[cfg(not(loom))]
mod audit;
#[cfg(not(loom))]
pub mod breaker;
#[cfg(not(loom))]
mod bypass;
#[cfg(not(loom))]
pub mod key;
#[cfg(not(loom))]
pub mod latency;
#[cfg(not(loom))]
pub mod pool;
#[cfg(not(loom))]
pub mod service;
#[cfg(not(loom))]
pub mod store;
#[cfg(not(loom))]
pub mod upstream;

#[cfg(not(loom))]
pub use key::{ModelId, Secret};
#[cfg(not(loom))]
pub use service::{MemoOptions, MemoService};
#[cfg(not(loom))]
pub use store::Store;
#[cfg(not(loom))]
pub use upstream::Classifier;
