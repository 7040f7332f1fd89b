//! See `afterimage_classifier::fuzzing::model_file`.
#![no_main]
afterimage_fuzz::target!(afterimage_classifier, "model_file");
