//! Fuzz targets of the protocol and of both ends of a connection: functions that take any bytes and
//! panic when something that must hold does not.
//!
//! `fuzz/` runs them under libFuzzer, the tests here run them on a stable toolchain, on the golden
//! vectors, the regressions and seeded mutations of both. `fuzz/README.md` tells what each of them
//! asserts.

mod client_stream;
mod codec;
mod seeds;
mod server_model;
mod server_stream;

use super::Target;

/// Every target of this crate.
pub const TARGETS: &[Target] = &[
    Target {
        name: "decode_raw",
        body: decode_raw,
        seeds: seeds::decode_raw,
        // An empty counter's 14 bytes become an entry of 56 in a list that doubles as it grows,
        // beside the encoding that is compared.
        memory_per_byte: 64,
    },
    Target { name: "round_trip", body: round_trip, seeds: seeds::round_trip, memory_per_byte: 64 },
    Target {
        name: "split_invariance",
        body: split_invariance,
        seeds: seeds::split_invariance,
        memory_per_byte: 64,
    },
    Target {
        name: "server_stream",
        body: server_stream,
        seeds: seeds::server_stream,
        // A StatsReq of 16 bytes is answered with some 400, which are held by the server, by the
        // pipe and by whoever compares them.
        memory_per_byte: 512,
    },
    Target {
        name: "client_stream",
        body: client_stream,
        seeds: seeds::client_stream,
        // Every two bytes of script may open a connection, with a receive buffer of its own, but
        // four finish at once, and that is within the base.
        memory_per_byte: 1024,
    },
];

/// The decoders on raw bytes: no panic, lengths that add up, and what was understood is encoded and
/// understood again as the same.
pub fn decode_raw(data: &[u8]) {
    codec::decode_raw(data);
}

/// A message made of bytes survives encoding and decoding, and no proper prefix of its frame is a
/// frame.
pub fn round_trip(data: &[u8]) {
    codec::round_trip(data);
}

/// A stream decodes to the same frames, and fails at the same place, however it is cut.
pub fn split_invariance(data: &[u8]) {
    codec::split_invariance(data);
}

/// The server against a hostile stream of bytes, on virtual time: it ends, and says what an
/// independent reading of `PROTOCOL.md` says that it must, once.
pub fn server_stream(data: &[u8]) {
    server_stream::server_stream(data);
}

/// The client against a hostile server, on virtual time: every call ends once and in time, with an
/// answer that the server gave to it and to no other, or an error.
pub fn client_stream(data: &[u8]) {
    client_stream::client_stream(data);
}
