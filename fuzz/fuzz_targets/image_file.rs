//! The target `image_file` of `afterimage_testkit::fuzz`.
#![no_main]
afterimage_fuzz::target!("image_file");
