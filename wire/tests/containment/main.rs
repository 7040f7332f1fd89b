//! Peers that mean no good, or are gone without a word, beside a client that goes on getting its
//! answers: everything here with and without TLS.

#![allow(clippy::unwrap_used)]
#![allow(unreachable_pub, reason = "a test binary has no outside")]

#[path = "../first_byte/mod.rs"]
mod first_byte;
mod floods;
mod house;
#[path = "../pki/mod.rs"]
mod pki;
mod slow;
