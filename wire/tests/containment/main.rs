//! Peers that mean no good, or are gone without a word, beside a client that goes on getting its
//! answers: everything here with and without TLS.

#![allow(clippy::unwrap_used)]
#![allow(unreachable_pub, reason = "a test binary has no outside")]

mod floods;
mod house;
mod slow;
