//! The golden vectors of `wire/vectors` against the codec and against a running server.

#![allow(clippy::unwrap_used, reason = "tests panic")]

mod codec;
mod server;

use afterimage_wire::proto::Frame;

/// The frame of a valid vector.
fn decode(bytes: &[u8]) -> Frame<'_> {
    let frame = Frame::decode(bytes, u32::MAX).expect("no body is above this limit");
    frame.expect("the vector is a whole frame")
}
