//! See `afterimage_wire::fuzzing::round_trip`.
#![no_main]
afterimage_fuzz::target!(afterimage_wire, "round_trip");
