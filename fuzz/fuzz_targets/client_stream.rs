//! See `afterimage_wire::fuzzing::client_stream`.
#![no_main]
afterimage_fuzz::target!(afterimage_wire, "client_stream");
