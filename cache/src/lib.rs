#![doc = include_str!("../README.md")]
// `memory` alone contains unsafe code.
#![deny(unsafe_code)]

mod bucket;
mod eviction;
mod hash;
mod layout;
mod line;

pub use hash::Hashed;

// The loom model (`--cfg loom`) covers one bucket. A table of them needs zeroed memory, which is no
// valid state of loom's atomics, and the service needs tokio, which loom cannot run.
cfg_if::cfg_if! {
    if #[cfg(loom)] {
        /// Loom's atomics, which run every interleaving that the memory model allows.
        mod sync {
            pub(crate) use loom::sync::atomic::{AtomicU64, Ordering, fence};
            pub(crate) use loom::{hint::spin_loop, thread::yield_now};
        }
    } else {
        mod background;
        pub mod byte_store;
        pub mod disk;
        mod duel;
        #[allow(unsafe_code)]
        mod memory;
        pub mod metrics;
        pub mod service;
        pub mod snapshot;
        mod stats;
        pub mod table;

        /// The atomics of the standard library.
        mod sync {
            pub(crate) use std::sync::atomic::{AtomicU64, Ordering, fence};
            pub(crate) use std::{hint::spin_loop, thread::yield_now};
        }

        pub use background::{populate_in_background, return_free_memory};
        pub use byte_store::{Admission, ByteStore, ByteStoreStats, Stored};
        pub use disk::DiskLog;
        pub use service::CacheService;
        pub use snapshot::{SnapshotFile, SnapshotHandle, SnapshotWriter};
        pub use stats::Stats;
        pub use table::{Capacity, Entry, Insert, Near, Table, TableError};
    }
}
