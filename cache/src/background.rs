//! Background threads: their priority, the early allocation of a table's memory, and the return of
//! free memory.

use std::fs;
use std::path::Path;
use std::sync::Arc;
use std::thread;
use std::time::Instant;

use crate::table::Table;

/// The nice value of a background thread. It gets about a ninth of the CPU time of a reader on the
/// same core, so it still makes progress on a busy machine.
#[cfg(target_os = "linux")]
const NICE: i32 = 10;

/// Lowers the priority of the calling thread below that of the threads that serve.
pub(crate) fn yield_to_readers() {
    // On Linux this applies to the calling thread only.
    #[cfg(target_os = "linux")]
    if let Err(error) = rustix::process::setpriority_process(None, NICE) {
        let thread = thread::current();
        let name = thread.name().unwrap_or("a background");
        tracing::debug!("cannot lower the priority of the {name} thread: {error}");
    }
}

/// Pauses of the thread that populates a table, as a multiple of its work: it takes a fifth of a
/// core.
const PAUSE: u32 = 4;

/// Runs [`Table::populate`] on a thread with pauses. The thread ends when all memory is allocated,
/// or when its reference to the table is the last. A table that is larger than the free memory is
/// not populated: its memory grows as it fills. Errors are logged and have no effect.
///
/// Until then the first touch of a page by another thread allocates a small page: to clear a huge
/// one takes longer than a client waits for a lookup.
///
/// The thread keeps its priority. With a low one it waits for a processor while it holds the
/// system's locks for a page, and threads that serve wait for these locks.
pub fn populate_in_background(table: &Arc<Table>) {
    let (bytes, free) = (table.memory_bytes(), free_memory(Path::new("/")));
    if bytes > free {
        return tracing::warn!(
            "the table needs {bytes} bytes when full, but only {free} are free; use a smaller --memory"
        );
    }
    let table = Arc::clone(table);
    let work = move || {
        let started = Instant::now();
        let mut resumed = started;
        table.populate(|| {
            thread::sleep(resumed.elapsed() * PAUSE);
            resumed = Instant::now();
            Arc::strong_count(&table) > 1
        });
        tracing::debug!("allocated the table's memory in {:.1?}", started.elapsed());
    };
    if let Err(error) = thread::Builder::new().name("populate".into()).spawn(work) {
        tracing::debug!("cannot allocate the table's memory in advance: {error}");
    }
}

/// Returns free memory of the allocator to the system. The allocator keeps it else as long as a
/// block behind it is in use. It takes milliseconds, so call it on a thread that may block.
pub fn return_free_memory() {
    crate::memory::return_free_memory();
}

/// Bytes that this process can still allocate: free memory of the machine, or less if a control
/// group (of a container or a service) has a lower limit. Read from the files below `root` on
/// Linux: `proc(5)`, `cgroups(7)`. `u64::MAX` if no limit is known.
fn free_memory(root: &Path) -> u64 {
    let read = |path: &Path| fs::read_to_string(path).ok();
    let number = |path: &Path| read(path)?.trim().parse::<u64>().ok();
    let free = || {
        let text = read(&root.join("proc/meminfo"))?;
        let kib = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
        Some(kib.trim().strip_suffix(" kB")?.parse::<u64>().ok()? << 10)
    };
    let mut least = free().unwrap_or(u64::MAX);
    for line in read(&root.join("proc/self/cgroup")).unwrap_or_default().lines() {
        let mut fields = line.splitn(3, ':').skip(1);
        let (Some(controllers), Some(path)) = (fields.next(), fields.next()) else { continue };
        let (mount, limit, usage) = match controllers {
            "" => ("sys/fs/cgroup", "memory.max", "memory.current"),
            "memory" => ("sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes"),
            _ => continue,
        };
        // The limits of all parent groups apply, too. The last parent is the mount point.
        for group in Path::new(path.trim_start_matches('/')).ancestors() {
            let group = root.join(mount).join(group);
            if let Some(limit) = number(&group.join(limit)) {
                let used = number(&group.join(usage)).unwrap_or(0);
                least = least.min(limit.saturating_sub(used));
            }
        }
    }
    least
}

#[cfg(all(test, not(miri)))]
mod tests {
    use super::*;

    /// The free memory of a system with these files.
    fn free_with(files: &[(&str, &str)]) -> u64 {
        let root = tempfile::tempdir().expect("a folder");
        for (path, text) in files {
            let path = root.path().join(path);
            fs::create_dir_all(path.parent().expect("a parent folder")).expect("a folder");
            fs::write(path, text).expect("a file");
        }
        free_memory(root.path())
    }

    #[test]
    fn the_least_limit_of_machine_and_groups_counts() {
        let machine =
            ("proc/meminfo", "MemTotal: 9 kB\nMemAvailable:     1000 kB\nBuffers: 1 kB\n");
        assert_eq!(free_with(&[]), u64::MAX);
        assert_eq!(free_with(&[machine]), 1_024_000);
        let second = [
            machine,
            ("proc/self/cgroup", "0::/outer/inner\n"),
            ("sys/fs/cgroup/outer/inner/memory.max", "max\n"),
            ("sys/fs/cgroup/outer/memory.max", "5000\n"),
            ("sys/fs/cgroup/outer/memory.current", "1500\n"),
        ];
        assert_eq!(free_with(&second), 3500);
        // A container sees its own group at the mount point.
        let first = [
            machine,
            ("proc/self/cgroup", "5:cpu:/a\n4:memory:/b/c\n0::/\n"),
            ("sys/fs/cgroup/memory/memory.limit_in_bytes", "700\n"),
            ("sys/fs/cgroup/memory/memory.usage_in_bytes", "900\n"),
        ];
        assert_eq!(free_with(&first), 0);
        assert_eq!(free_with(&[machine, ("proc/self/cgroup", "nonsense\n0:\n")]), 1_024_000);
    }
}
