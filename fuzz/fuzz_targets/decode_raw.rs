//! See `afterimage_wire::fuzzing::decode_raw`.
#![no_main]
afterimage_fuzz::target!(afterimage_wire, "decode_raw");
