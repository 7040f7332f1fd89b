//! See `afterimage_wire::fuzzing::server_stream`.
#![no_main]
afterimage_fuzz::target!(afterimage_wire, "server_stream");
