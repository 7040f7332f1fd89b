//! The target `embeddings` of `afterimage_testkit::fuzz`.
#![no_main]
afterimage_fuzz::target!("embeddings");
