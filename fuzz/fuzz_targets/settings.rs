//! See `afterimage_fuzz::settings_file`.
#![no_main]
libfuzzer_sys::fuzz_target!(
    init: afterimage_fuzz::plant(afterimage_fuzz::settings_file_seeds),
    |data: &[u8]| afterimage_fuzz::settings_file(data)
);
