//! See `afterimage_classifier::fuzzing::idx`.
#![no_main]
afterimage_fuzz::target!(afterimage_classifier, "idx");
