//! See `afterimage_classifier::fuzzing::model_onnx`.
#![no_main]
afterimage_fuzz::target!(afterimage_classifier, "model_onnx");
