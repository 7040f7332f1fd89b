//! The fuzz program of all targets: `FUZZ_TARGET` names the one that it runs.
//!
//! It writes the target's seeds, limits the memory of each run, and calls the target.
#![no_main]

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::fs;
use std::path::Path;
use std::sync::LazyLock;

use afterimage_testkit::fuzz::{MEMORY_BASE, Seed, Target, named, targets};

/// The environment variable that names the target. With `list`, the program prints all names.
const TARGET_NAME: &str = "FUZZ_TARGET";

/// The environment variable that names the folder for the target's seeds.
const SEEDS_TO: &str = "FUZZ_SEEDS_TO";

/// The target that finds the planted bug. It is not in the list of targets.
const CANARY: Target =
    Target { name: "canary", body: canary, seeds: Vec::new, memory_per_byte: 0 };

static TARGET: LazyLock<Target> = LazyLock::new(chosen);

libfuzzer_sys::fuzz_target!(init: write_seeds(TARGET.seeds), |data: &[u8]| run(&TARGET, data));

/// The target that [`TARGET_NAME`] names. Ends the process if it names none.
fn chosen() -> Target {
    let name = std::env::var(TARGET_NAME).unwrap_or_default();
    if name == CANARY.name {
        return CANARY;
    }
    if targets().any(|target| target.name == name) {
        return named(&name);
    }
    for target in targets() {
        println!("{}", target.name);
    }
    if name == "list" {
        std::process::exit(0);
    }
    eprintln!("{TARGET_NAME} is {name:?}; the targets are listed above");
    std::process::exit(2);
}

/// Writes seeds into the folder that [`SEEDS_TO`] names, if the variable is set.
fn write_seeds(seeds: fn() -> Vec<Seed>) {
    let Some(folder) = std::env::var_os(SEEDS_TO) else {
        return;
    };
    let folder = Path::new(&folder);
    fs::create_dir_all(folder).expect("the corpus folder can be created");
    for (name, bytes) in seeds() {
        fs::write(folder.join(name), bytes).expect("a seed can be written");
    }
}

/// Calls the target's body. Panics when it holds more memory at once than the target allows.
fn run(target: &Target, data: &[u8]) {
    let limit_bytes = MEMORY_BASE + target.memory_per_byte * data.len();
    let peak_bytes = peak_of(|| (target.body)(data));
    assert!(
        peak_bytes <= limit_bytes,
        "{peak_bytes} bytes were allocated at once for {} bytes of input; the limit is {limit_bytes}",
        data.len()
    );
}

/// A planted bug: panics for inputs that begin with four certain bytes. Guessing takes too long, so
/// the fuzzer finds them only if its instrumentation reports each comparison.
fn canary(data: &[u8]) {
    let mut learned = 0;
    for (byte, expected) in data.iter().zip(b"\x8fMi\x02") {
        if byte != expected {
            return;
        }
        learned += 1;
    }
    assert!(learned < 4, "the fuzzer found the planted bug");
}

thread_local! {
    /// Bytes allocated minus bytes freed on this thread since the last [`peak_of`] began. Negative
    /// if the thread freed older allocations.
    static HELD: Cell<isize> = const { Cell::new(0) };
    /// The maximum of `HELD`.
    static PEAK: Cell<isize> = const { Cell::new(0) };
}

struct Counting;

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Counts a change of the bytes held. At a thread's end there are no counters, so nothing is
/// counted.
fn count(change: isize) {
    let _ = HELD.try_with(|held| {
        let now = held.get().saturating_add(change);
        held.set(now);
        let _ = PEAK.try_with(|peak| peak.set(peak.get().max(now)));
    });
}

/// A layout's size, which by its contract fits an `isize`.
fn signed(bytes: usize) -> isize {
    isize::try_from(bytes).unwrap_or(isize::MAX)
}

// SAFETY: every call is passed on to `System` as it is, whose contract is the trait's; counting
// touches two thread-local cells, which neither allocate nor unwind.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count(signed(layout.size()));
        // SAFETY: the caller's promises are `System`'s conditions.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        count(signed(layout.size()));
        // SAFETY: as above.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn realloc(&self, old: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        // The old and the new block may exist at the same time.
        count(signed(size));
        count(-signed(layout.size()));
        // SAFETY: as above; `old` came from `System`.
        unsafe { System.realloc(old, layout, size) }
    }

    unsafe fn dealloc(&self, old: *mut u8, layout: Layout) {
        count(-signed(layout.size()));
        // SAFETY: as above.
        unsafe { System.dealloc(old, layout) }
    }
}

/// The maximum number of bytes that `action` held on this thread, of its own allocations.
fn peak_of(action: impl FnOnce()) -> usize {
    HELD.set(0);
    PEAK.set(0);
    action();
    usize::try_from(PEAK.get()).unwrap_or(0)
}
