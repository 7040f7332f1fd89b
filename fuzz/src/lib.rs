//! Harness of all fuzz programs: writes seeds, limits the memory of each run, and calls the target.

mod memory;

use std::fs;
use std::path::Path;

use afterimage_testkit::fuzz::{MEMORY_BASE, Seed, Target};

/// The environment variable that names the folder for the target's seeds.
const SEEDS_TO: &str = "FUZZ_SEEDS_TO";

/// A fuzz program for the target `$name`.
#[macro_export]
macro_rules! target {
    ($name:literal) => {
        static TARGET: ::std::sync::LazyLock<afterimage_testkit::fuzz::Target> =
            ::std::sync::LazyLock::new(|| afterimage_testkit::fuzz::named($name));
        ::libfuzzer_sys::fuzz_target!(
            init: $crate::write_seeds(TARGET.seeds),
            |data: &[u8]| $crate::run(&TARGET, data)
        );
    };
}

/// Writes seeds into the folder that [`SEEDS_TO`] names, if the variable is set.
///
/// # Panics
/// When a seed cannot be written.
pub fn write_seeds(seeds: fn() -> Vec<Seed>) {
    let Some(folder) = std::env::var_os(SEEDS_TO) else {
        return;
    };
    let folder = Path::new(&folder);
    fs::create_dir_all(folder).expect("the corpus folder can be created");
    for (name, bytes) in seeds() {
        fs::write(folder.join(name), bytes).expect("a seed can be written");
    }
}

/// Calls the target's body.
///
/// # Panics
/// When the body panics, or holds more memory at once than the target allows.
pub fn run(target: &Target, data: &[u8]) {
    let limit_bytes = MEMORY_BASE + target.memory_per_byte * data.len();
    let peak_bytes = memory::peak_of(|| (target.body)(data));
    assert!(
        peak_bytes <= limit_bytes,
        "{peak_bytes} bytes were allocated at once for {} bytes of input; the limit is {limit_bytes}",
        data.len()
    );
}

/// A planted bug: panics for inputs that begin with four certain bytes. Guessing takes too long, so
/// the fuzzer finds them only if its instrumentation reports each comparison.
///
/// # Panics
/// For these inputs.
pub fn canary(data: &[u8]) {
    let mut learned = 0;
    for (byte, expected) in data.iter().zip(b"\x8fMi\x02") {
        if byte != expected {
            return;
        }
        learned += 1;
    }
    assert!(learned < 4, "the fuzzer found the planted bug");
}
