//! Hostile and vanished peers beside a good client, with and without TLS.

#![allow(clippy::unwrap_used)]
#![allow(unreachable_pub, reason = "a test binary has no outside")]

mod floods;
mod site;
mod slow;
