//! What this process has in physical memory, on Linux.

use std::error::Error;
use std::fs;

/// Bytes, as the system counts them.
pub(crate) fn resident_bytes() -> Result<u64, Box<dyn Error>> {
    let status = fs::read_to_string("/proc/self/status")?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let kib = line.and_then(|line| line.trim().strip_suffix(" kB")).ok_or("no VmRSS")?;
    Ok(kib.parse::<u64>()? << 10)
}
