//! See `afterimage_classifier::fuzzing::shipped_model`.
#![no_main]
afterimage_fuzz::target!(afterimage_classifier, "shipped_model");
