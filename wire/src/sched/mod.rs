//! Three ways in which a connection's task cooperates with the other tasks of its thread.
//!
//! tokio polls a task until it returns, and queues a task that is woken again. That is fair between
//! tasks that wait for their sockets, and not enough for three kinds of work on a connection:
//!
//! | file | problem | remedy |
//! | --- | --- | --- |
//! | `fairness` | A peer that always has more bytes ready keeps its task runnable, and its replies wake the task early. | [`Rest`]: after its share of bytes the task sleeps until all other ready tasks were polled, whatever wakes it before. |
//! | `pacing` | A burst of TLS handshakes, each worth a thousand answers, is polled before any open connection. | [`one_poll_per_turn`]: a handshake needs a permit for each poll; the permit comes back after all other ready tasks were polled. |
//! | `cork` | One thread answers many requests of a connection, and each answer wakes the connection's thread with a system call. | [`corked`]: wake-ups are collected and sent together. |
//!
//! All three rest on one property of tokio's schedulers: a task that calls `yield_now` is queued
//! behind every task that is ready, and the scheduler asks the operating system for new events
//! before it polls that task again. tokio does not promise this; the test of each file, and
//! `tests/fairness.rs`, fail if a new version changes it. If the order were lost, results would
//! stay right and only latencies under load would suffer.
//!
//! [`corked`] is public, because the threads that answer requests belong to other crates. It is a
//! thread-local state and not an argument, so that code between the loop that answers and the
//! connection need not know of it.

mod cork;
mod fairness;
mod pacing;

pub use cork::corked;
pub(crate) use cork::wake;
pub(crate) use fairness::Rest;
pub(crate) use pacing::one_poll_per_turn;
