//! See `afterimage_classifier::fuzzing::model_text`.
#![no_main]
afterimage_fuzz::target!(afterimage_classifier, "model_text");
