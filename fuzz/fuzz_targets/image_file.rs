//! See `afterimage_classifier::fuzzing::image_file`.
#![no_main]
afterimage_fuzz::target!(afterimage_classifier, "image_file");
