//! Three ways in which a connection's task cooperates with the other tasks of its thread.
//!
//! tokio polls a task until it returns, and queues a task that is woken again. That is fair between
//! tasks that wait for their sockets. It is not enough for three kinds of work on a connection:
//!
//! * `fairness`: a peer that always has more bytes ready keeps its task runnable, and replies wake
//!   the task early. With [`Rest`], a task that has used its share of bytes sleeps until all other
//!   ready tasks were polled, even if it is woken before.
//! * `pacing`: a burst of TLS handshakes, each worth a thousand answers, is polled before any open
//!   connection. With [`one_poll_per_turn`], each poll of a handshake needs a permit, which comes
//!   back after all other ready tasks were polled.
//! * `cork`: a thread answers many requests of a connection, and each answer wakes the connection's
//!   thread with a system call. [`corked`] collects the wake-ups and sends them together.
//!
//! The first two rest on one property of tokio's schedulers: a task that calls `yield_now` is
//! queued behind every ready task, and the scheduler asks the operating system for events before it
//! polls that task again. tokio does not promise this. The tests of each file and
//! `tests/fairness.rs` fail if a new version changes it. Results would stay right; only latencies
//! under load would suffer.
//!
//! [`corked`] is public, because the threads that answer requests belong to other crates. It is
//! thread-local state and not an argument, so that code between the answering loop and the
//! connection need not pass it on.

mod cork;
mod fairness;
#[cfg(all(feature = "server", feature = "tls"))]
mod pacing;

pub use cork::corked;
#[cfg(feature = "server")]
pub(crate) use cork::wake;
pub(crate) use fairness::Rest;
#[cfg(all(feature = "server", feature = "tls"))]
pub(crate) use pacing::one_poll_per_turn;
