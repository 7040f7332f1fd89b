//! See `afterimage_wire::fuzzing::split_invariance`.
#![no_main]
afterimage_fuzz::target!(afterimage_wire, "split_invariance");
