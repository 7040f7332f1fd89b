//! The canary, a planted bug: see `afterimage_fuzz::canary`.
#![no_main]
libfuzzer_sys::fuzz_target!(|data: &[u8]| afterimage_fuzz::canary(data));
