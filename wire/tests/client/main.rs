//! The client against a server that does what each test tells it to.

#![allow(unreachable_pub, reason = "a test binary has no outside")]
#![allow(clippy::unwrap_used, reason = "a test's helpers fail by panicking, as the test does")]

mod blocking;
mod both_ends;
mod callbacks;
mod calls;
mod chaos;
mod handshake;
mod lifecycle;
mod limits;
mod loss;
mod replies;
mod server;
