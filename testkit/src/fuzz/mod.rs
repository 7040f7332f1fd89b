//! Shared parts of all fuzz targets: the target type, a reader that turns bytes into choices, and a
//! small fuzzer for the ordinary test run.
//!
//! The modules below hold the targets of each crate.

pub mod cache;
pub mod classifier;
pub mod inference;
pub mod streams;
pub mod wire;

use std::ffi::OsString;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::{env, fs, process};

use afterimage::settings::{apply, misplaced};
pub use afterimage_wire::splitmix::SplitMix64 as Rng;

/// A fuzz target.
#[derive(Clone, Copy, Debug)]
pub struct Target {
    /// Its name, also that of its corpus and its regressions.
    pub name: &'static str,
    /// Takes any bytes, and panics if a property does not hold.
    pub body: fn(&[u8]),
    /// Initial inputs.
    pub seeds: fn() -> Vec<Seed>,
    /// Bytes that may be allocated at once for each byte of input, in addition to [`MEMORY_BASE`].
    pub memory_per_byte: usize,
}

/// An initial input: a name that is a valid file name, and the bytes.
pub type Seed = (String, Vec<u8>);

/// Bytes that every target may allocate for any input: buffers of fixed size, a runtime, a table,
/// the shipped model.
pub const MEMORY_BASE: usize = 16 << 20;

/// Every target of every crate.
pub fn targets() -> impl Iterator<Item = Target> {
    let settings =
        Target { name: "settings", body: settings, seeds: settings_seeds, memory_per_byte: 1024 };
    [wire::TARGETS, cache::TARGETS, classifier::TARGETS, inference::TARGETS, streams::TARGETS]
        .into_iter()
        .flatten()
        .copied()
        .chain([settings])
}

/// The target of this name.
///
/// # Panics
/// If no target has this name.
#[must_use]
pub fn named(name: &str) -> Target {
    targets().find(|target| target.name == name).expect("there is a target of this name")
}

/// Turns bytes into choices. After the last byte, all choices are zero, so that a shortened input
/// is still valid.
#[derive(Clone, Debug)]
pub struct Source<'a> {
    rest: &'a [u8],
}

impl<'a> Source<'a> {
    /// Reads from the start of `bytes`.
    pub fn new(bytes: &'a [u8]) -> Self {
        Source { rest: bytes }
    }

    /// Whether all bytes were used.
    pub fn is_empty(&self) -> bool {
        self.rest.is_empty()
    }

    /// The next `N` bytes, with zeros after the end.
    pub fn array<const N: usize>(&mut self) -> [u8; N] {
        let mut array = [0; N];
        let bytes = self.bytes(N);
        array[..bytes.len()].copy_from_slice(bytes);
        array
    }

    /// A byte.
    pub fn u8(&mut self) -> u8 {
        self.array::<1>()[0]
    }

    /// Two bytes, little-endian.
    pub fn u16(&mut self) -> u16 {
        u16::from_le_bytes(self.array())
    }

    /// Four bytes, little-endian.
    pub fn u32(&mut self) -> u32 {
        u32::from_le_bytes(self.array())
    }

    /// Eight bytes, little-endian.
    pub fn u64(&mut self) -> u64 {
        u64::from_le_bytes(self.array())
    }

    /// A byte's lowest bit.
    pub fn flag(&mut self) -> bool {
        self.u8() & 1 != 0
    }

    /// A number below `bound` (which is at least 1), from two bytes.
    pub fn below(&mut self, bound: usize) -> usize {
        usize::from(self.u16()) % bound
    }

    /// At most `len` bytes: fewer at the end.
    pub fn bytes(&mut self, len: usize) -> &'a [u8] {
        let (bytes, rest) = self.rest.split_at(len.min(self.rest.len()));
        self.rest = rest;
        bytes
    }

    /// All remaining bytes.
    pub fn rest(&mut self) -> &'a [u8] {
        std::mem::take(&mut self.rest)
    }
}

/// A path for one file, removed at the end.
struct Temporary(PathBuf);

impl Temporary {
    fn new() -> Self {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        // In a file system in memory, a file needs no disk access.
        let memory = Path::new("/dev/shm");
        let folder = if memory.is_dir() { memory.to_owned() } else { env::temp_dir() };
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        Temporary(folder.join(format!("afterimage-fuzz-{}-{number}", process::id())))
    }
}

impl Drop for Temporary {
    fn drop(&mut self) {
        // The file may not exist.
        let _ = fs::remove_file(&self.0);
    }
}

/// Runs [`exercise`] for the target of this name.
///
/// # Panics
/// As [`exercise`], and if there is no such target.
pub fn exercise_named(name: &str, mutations: usize) {
    exercise(&named(name), mutations);
}

/// The ordinary test run of a target, on any toolchain: its seeds, its regressions, and `mutations`
/// mutations of them. It is the same on every run. A failing input is printed in hexadecimal.
///
/// # Panics
/// If the target's body panics, or if it has no seeds.
pub fn exercise(target: &Target, mutations: usize) {
    let mut inputs = (target.seeds)();
    assert!(!inputs.is_empty(), "{} has seeds", target.name);
    inputs.extend(regressions(target.name));
    for (name, input) in &inputs {
        run(target, name, input);
    }
    let mut rng =
        Rng(target.name.bytes().fold(7, |seed: u64, byte| seed.rotate_left(8) ^ u64::from(byte)));
    for round in 0..mutations {
        let (name, input) = &inputs[rng.index(inputs.len())];
        let (_, other) = &inputs[rng.index(inputs.len())];
        let mutated = mutate(input.clone(), other, &mut rng);
        run(target, &format!("mutation {round}, of {name},"), &mutated);
    }
}

/// The files in `fuzz/regressions/` for the target of this name.
pub fn regressions(target: &str) -> Vec<Seed> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../fuzz/regressions").join(target);
    let mut files: Vec<PathBuf> = match fs::read_dir(&folder) {
        Ok(listing) => listing.flatten().map(|file| file.path()).collect(),
        Err(_) => Vec::new(), // No regression yet.
    };
    files.sort();
    files
        .into_iter()
        .map(|path| {
            let bytes = fs::read(&path).expect("a regression can be read");
            (path.file_name().unwrap_or_default().to_string_lossy().into_owned(), bytes)
        })
        .collect()
}

fn run(target: &Target, what: &str, input: &[u8]) {
    if let Err(panic) = catch_unwind(AssertUnwindSafe(|| (target.body)(input))) {
        let hex: String = input.iter().map(|byte| format!("{byte:02x}")).collect();
        eprintln!("{}: {what} fails; the input in hexadecimal:\n{hex}", target.name);
        resume_unwind(panic);
    }
}

/// Mutates an input in some of libFuzzer's ways.
fn mutate(mut input: Vec<u8>, other: &[u8], rng: &mut Rng) -> Vec<u8> {
    const ODD: [u8; 8] = [0x00, 0x01, 0x7f, 0x80, 0xff, 0xfe, 0x10, 0x20];
    for _ in 0..1 + rng.index(6) {
        let at = rng.index(input.len() + 1);
        match rng.index(8) {
            0 => input.truncate(at),
            1 => input.insert(at, rng.number() as u8),
            2 => {
                // The start of this input, then the end of the other.
                input.truncate(at);
                input.extend_from_slice(&other[rng.index(other.len() + 1)..]);
            }
            3 => {
                let piece = input[at..(at + rng.index(32)).min(input.len())].to_vec();
                let to = rng.index(input.len() + 1);
                input.splice(to..to, piece);
            }
            4 => drop(input.drain(at..(at + rng.index(16)).min(input.len()))),
            kind => {
                if let Some(byte) = input.get_mut(at) {
                    *byte = match kind {
                        5 => *byte ^ (1 << rng.index(8)),
                        6 => rng.number() as u8,
                        _ => ODD[rng.index(ODD.len())],
                    };
                }
            }
        }
        // Repeated splices must not grow the input without bound.
        input.truncate(8192);
    }
    input
}

/// Any text as the settings file of `command`, whose subcommand `cache` has a flag `--listen`. The
/// settings are accepted or refused with a reason, and a given flag overrides them.
fn settings(data: &[u8]) {
    let command = afterimage::command();
    let text = String::from_utf8_lossy(data);
    let file = Temporary::new();
    fs::write(&file.0, text.as_bytes()).expect("a temporary file can be written");
    let args = [OsString::from("--config"), file.0.clone().into()];
    let is_toml = text.parse::<toml::Table>().is_ok();
    let names: Vec<String> =
        command.get_subcommands().map(|sub| sub.get_name().to_owned()).collect();
    let command = match apply(command, args.iter().cloned()) {
        Ok(command) => command,
        Err(error) => return assert!(error.to_string().contains("settings file"), "{error:#}"),
    };
    assert!(is_toml, "invalid TOML was accepted");
    for name in &names {
        // The flags check their own settings. A wrong one is an error with a text, which names the
        // file if the setting is in it.
        if let Err(error) = command.clone().try_get_matches_from(["afterimage", name]) {
            assert!(!error.to_string().is_empty());
            if let Some(error) = misplaced(&command, &error, &args) {
                assert!(error.to_string().contains("settings file"), "{error:#}");
            }
        }
    }
    let given = ["afterimage", "cache", "--listen", "192.0.2.1:1"];
    if let Ok(matches) = command.try_get_matches_from(given) {
        let (_, cache) = matches.subcommand().expect("a subcommand was given");
        let listen = cache.get_one::<String>("listen").map(String::as_str);
        assert_eq!(listen, Some("192.0.2.1:1"), "a flag beats the file");
    }
}

/// Files with valid settings and with wrong ones.
fn settings_seeds() -> Vec<Seed> {
    [
        ("empty", ""),
        ("listen", "[cache]\nlisten = \"127.0.0.1:1\"\n"),
        ("flag", "[cache]\ninsecure = true\nmax-connections = 7\n[memo]\nlisten = \"[::1]:2\"\n"),
        ("list", "[memo]\nclassifier = [\"127.0.0.1:1\", \"127.0.0.1:2\"]\n"),
        ("wrong_type", "[cache]\nlisten = {}\nmax-connections = 1.5\n"),
        ("unknown", "[cash]\nlisten = 1\n"),
        ("outside", "listen = 1\n"),
        ("truth", "[cache]\ninsecure = \"maybe\"\nlisten = \"\"\"a\nb\"\"\"\n"),
        ("date", "[cache]\nlisten = 1979-05-27T07:32:00Z\nmax-connections = [[1], []]\n"),
        ("unicode", "# é\n[cache]\nlisten = '\u{1F680}'\n"),
    ]
    .map(|(name, text)| (name.to_owned(), text.as_bytes().to_vec()))
    .into()
}
