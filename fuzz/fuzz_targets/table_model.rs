//! The target `table_model` of `afterimage_testkit::fuzz`.
#![no_main]
afterimage_fuzz::target!("table_model");
