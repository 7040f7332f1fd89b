//! The client against a fake server, and against the real one.

#![allow(unreachable_pub, reason = "a test binary has no outside")]
#![allow(clippy::unwrap_used, reason = "tests panic")]

mod blocking;
mod both_ends;
mod bytes;
mod callbacks;
mod calls;
mod chaos;
mod handshake;
mod lifecycle;
mod limits;
mod loss;
mod replies;
mod server;
