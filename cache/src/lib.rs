//! A bounded, set-associative hash table from 64-bit keys to 64-bit values, and its service.
//!
//! [`Table`] is the table: memory taken once, readers that never block on writers, eviction inside
//! the bucket. It knows nothing of what its keys and values mean.

// All of it is in `memory`.
#![deny(unsafe_code)]

#[cfg(not(loom))]
mod background;
mod bucket;
#[cfg(all(test, loom))]
mod bucket_model;
#[cfg(not(loom))]
pub mod byte_store;
#[cfg(not(loom))]
mod duel;
mod eviction;
mod hash;
mod line;
#[cfg(not(loom))]
#[allow(unsafe_code)]
mod memory;
#[cfg(not(loom))]
pub mod service;
#[cfg(not(loom))]
pub mod snapshot;
#[cfg(not(loom))]
mod stats;
mod sync;
#[cfg(not(loom))]
pub mod table;

#[cfg(not(loom))]
pub use background::populate_in_background;
#[cfg(not(loom))]
pub use byte_store::{Admission, ByteStore, ByteStoreStats, Stored};
pub use hash::Hashed;
#[cfg(not(loom))]
pub use service::CacheService;
#[cfg(not(loom))]
pub use snapshot::{SnapshotFile, SnapshotHandle, SnapshotWriter};
#[cfg(not(loom))]
pub use stats::Stats;
#[cfg(not(loom))]
pub use table::{Capacity, Entry, Insert, Near, Table, TableError};
