//! The target `model_onnx` of `afterimage_testkit::fuzz`.
#![no_main]
afterimage_fuzz::target!("model_onnx");
