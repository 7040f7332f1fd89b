//! The resident memory of this process, on Linux.

use std::fs;

/// Bytes of this process in physical memory.
pub fn resident_bytes() -> u64 {
    let status = fs::read_to_string("/proc/self/status").expect("Linux has this file");
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let kib = line.and_then(|line| line.trim().strip_suffix(" kB")).expect("a line with VmRSS");
    kib.parse::<u64>().expect("a number") << 10
}
