//! The client against a server that does what each test tells it to.

#![allow(unreachable_pub, reason = "a test binary has no outside")]

mod calls;
mod server;
