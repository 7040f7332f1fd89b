//! What all fuzz programs share: they plant their seeds, bound the memory of each run, and call the target.

#[path = "../../src/fuzzing.rs"]
mod fuzzing;
mod memory;
#[path = "../../src/settings.rs"]
mod settings;

use std::fs;
use std::path::Path;

use clap::{Arg, ArgAction, Command, value_parser};

/// The environment variable that names the folder into which a program writes its target's seeds before it
/// begins.
const SEEDS_TO: &str = "AFTERIMAGE_FUZZ_SEEDS_TO";

/// A fuzz program for the target `$name` of the crate `$krate`.
#[macro_export]
macro_rules! target {
    ($krate:ident, $name:literal) => {
        // Each crate has a `Target` of its own; only its fields are of interest.
        static TARGET: ::std::sync::LazyLock<$krate::fuzzing::support::Target> =
            ::std::sync::LazyLock::new(|| {
                let mut targets = $krate::fuzzing::TARGETS.iter();
                *targets.find(|target| target.name == $name).expect("the crate has this target")
            });
        ::libfuzzer_sys::fuzz_target!(
            init: $crate::plant(TARGET.seeds),
            |data: &[u8]| {
                let base = $krate::fuzzing::support::MEMORY_BASE;
                $crate::run(TARGET.body, data, base + TARGET.memory_per_byte * data.len());
            }
        );
    };
}

/// Writes seeds where [`SEEDS_TO`] says; does nothing when it says nothing.
///
/// # Panics
/// When they cannot be written.
pub fn plant(seeds: fn() -> Vec<(String, Vec<u8>)>) {
    let Some(folder) = std::env::var_os(SEEDS_TO) else {
        return;
    };
    let folder = Path::new(&folder);
    fs::create_dir_all(folder).expect("the corpus can be made");
    for (name, bytes) in seeds() {
        fs::write(folder.join(name), bytes).expect("a seed can be written");
    }
}

/// Calls `body`, and panics if at any moment it held more than `limit_bytes` that it allocated.
pub fn run(body: fn(&[u8]), data: &[u8], limit_bytes: usize) {
    let peak_bytes = memory::peak_of(|| body(data));
    assert!(
        peak_bytes <= limit_bytes,
        "{peak_bytes} bytes were allocated at once for {} bytes of input; the limit is {limit_bytes}",
        data.len()
    );
}

/// The settings file, with flags of every sort that the program has.
///
/// # Panics
/// When something that must hold does not: see `src/fuzzing.rs`.
pub fn settings_file(data: &[u8]) {
    let body = |data: &[u8]| {
        let service = |name: &'static str| {
            Command::new(name)
                .arg(Arg::new("listen").long("listen").default_value("127.0.0.1:7400"))
                .arg(Arg::new("insecure").long("insecure").action(ArgAction::SetTrue))
                .arg(
                    Arg::new("max_connections")
                        .long("max-connections")
                        .default_value("4096")
                        .value_parser(value_parser!(usize)),
                )
                .arg(
                    Arg::new("classifier")
                        .long("classifier")
                        .action(ArgAction::Append)
                        .required(true),
                )
                .arg(Arg::new("level").long("level").value_parser(["low", "high"]))
        };
        let command = Command::new("afterimage")
            .arg(Arg::new("config").long("config").global(true))
            .subcommand_required(true)
            .subcommand(service("cache"))
            .subcommand(service("memo"));
        fuzzing::settings_of(data, command);
    };
    // A table of TOML is a map of texts and values, and each flag's text is copied some times.
    run(body, data, fuzzing::support::MEMORY_BASE + 1024 * data.len());
}

/// What [`settings_file`] begins with.
pub fn settings_file_seeds() -> Vec<(String, Vec<u8>)> {
    fuzzing::seeds()
}

/// Panics for inputs that begin with four certain bytes. Nobody guesses four bytes in seconds: a fuzzer
/// gets there by learning from each comparison, or its instrumentation does not work.
///
/// # Panics
/// That is what it is for.
pub fn canary(data: &[u8]) {
    let mut learned = 0;
    for (byte, expected) in data.iter().zip(b"\x8fMi\x02") {
        if byte != expected {
            return;
        }
        learned += 1;
    }
    assert!(learned < 4, "the canary sings");
}
