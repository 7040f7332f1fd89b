//! Fuzz targets of the protocol and of both ends of a connection.
//!
//! Each target is a function that takes any bytes and panics if a property does not hold. `fuzz/`
//! runs them under libFuzzer; the tests run them on a stable toolchain, on the golden vectors, the
//! regressions and seeded mutations of both. `fuzz/README.md` lists the properties.

mod client_stream;
mod codec;
mod seeds;
mod server_model;
mod server_stream;
mod server_streams;

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
        // A StatsReq of 16 bytes gets a reply of about 400 bytes, which the server, the pipe and
        // the check each hold.
        memory_per_byte: 512,
    },
    Target {
        name: "server_streams",
        body: server_streams,
        seeds: seeds::server_streams,
        // Two bytes open a stream, which has a task, and a third one lets it send.
        memory_per_byte: 4096,
    },
    Target {
        name: "client_stream",
        body: client_stream,
        seeds: seeds::client_stream,
        // Every two bytes of script may open a connection with its own receive buffer, but four
        // bytes end one, and that is within the base.
        memory_per_byte: 1024,
    },
];

/// The decoders on raw bytes: no panic, consistent lengths, and each decoded message survives a
/// round trip.
pub fn decode_raw(data: &[u8]) {
    codec::decode_raw(data);
}

/// A message made of the input's bytes survives a round trip, and no proper prefix of its frame is
/// a frame.
pub fn round_trip(data: &[u8]) {
    codec::round_trip(data);
}

/// However a stream is cut, it decodes to the same frames and fails at the same place.
pub fn split_invariance(data: &[u8]) {
    codec::split_invariance(data);
}

/// The server against a hostile stream of bytes, on virtual time: it ends, and sends exactly the
/// replies that an independent reading of `PROTOCOL.md` demands.
pub fn server_stream(data: &[u8]) {
    server_stream::server_stream(data);
}

/// The streams of a server against a hostile client, on virtual time: the server stays within the
/// credit, ends each stream once, and answers the last Ping.
pub fn server_streams(data: &[u8]) {
    server_streams::server_streams(data);
}

/// The client against a hostile server, on virtual time: every call ends once and in time, with an
/// answer that the server gave to this call, or with an error.
pub fn client_stream(data: &[u8]) {
    client_stream::client_stream(data);
}
