//! Work beside the serving: its priority, and the table's memory, taken before somebody waits for
//! it.

use std::fs;
use std::path::Path;
use std::sync::Arc;
use std::thread;
use std::time::Instant;

use crate::table::Table;

/// How much a background thread's claim to a core is lowered (its *nice* value): to about a ninth
/// of a reader's, so that its work takes what serving leaves and still goes on where nothing is
/// left.
#[cfg(target_os = "linux")]
const NICE: i32 = 10;

/// Serving goes before the calling thread's work, where there are fewer cores than threads that
/// want one.
pub(crate) fn yield_to_readers() {
    // Of the calling thread alone, as Linux means it.
    #[cfg(target_os = "linux")]
    if let Err(error) = rustix::process::setpriority_process(None, NICE) {
        let thread = thread::current();
        let name = thread.name().unwrap_or("a background");
        tracing::debug!("the {name} thread keeps its priority: {error}");
    }
}

/// [`Table::populate`] on a thread of its own, behind whatever serves. It ends when all is done, or
/// when nobody else has the table any more. A table that is larger than the memory that is free is
/// left to grow as it fills. What goes wrong is logged and changes nothing.
pub fn populate_in_background(table: &Arc<Table>) {
    let (bytes, room) = (table.memory_bytes(), room(Path::new("/")));
    if bytes > room {
        return tracing::warn!(
            "the table may take {bytes} bytes, and {room} are free here: its memory comes as it fills"
        );
    }
    let as_it_fills = |error| tracing::debug!("the table's memory comes as it fills: {error}");
    let table = Arc::clone(table);
    let work = move || {
        yield_to_readers();
        let started = Instant::now();
        match table.populate(|| Arc::strong_count(&table) > 1) {
            Ok(()) => {
                tracing::debug!("the table's memory is there, after {:.1?}", started.elapsed())
            }
            Err(error) => as_it_fills(error),
        }
    };
    if let Err(error) = thread::Builder::new().name("populate".into()).spawn(work) {
        as_it_fills(error);
    }
}

/// Bytes that this process may take before it meets the machine's limit, or that of a control group
/// that it is in (a container's, a service's), as the files below `root` say on Linux: `proc(5)`,
/// `cgroups(7)`. Without a limit that is known, all that there could be.
fn room(root: &Path) -> u64 {
    let read = |path: &Path| fs::read_to_string(path).ok();
    let number = |path: &Path| read(path)?.trim().parse::<u64>().ok();
    let free = || {
        let text = read(&root.join("proc/meminfo"))?;
        let kib = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
        Some(kib.trim().strip_suffix(" kB")?.parse::<u64>().ok()? << 10)
    };
    let mut room = free().unwrap_or(u64::MAX);
    for line in read(&root.join("proc/self/cgroup")).unwrap_or_default().lines() {
        let mut fields = line.splitn(3, ':').skip(1);
        let (Some(controllers), Some(path)) = (fields.next(), fields.next()) else { continue };
        let (mount, limit, usage) = match controllers {
            "" => ("sys/fs/cgroup", "memory.max", "memory.current"),
            "memory" => ("sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes"),
            _ => continue,
        };
        // A group is within the limits of those around it; the last of these is where they are
        // mounted.
        for group in Path::new(path.trim_start_matches('/')).ancestors() {
            let group = root.join(mount).join(group);
            if let Some(limit) = number(&group.join(limit)) {
                let used = number(&group.join(usage)).unwrap_or(0);
                room = room.min(limit.saturating_sub(used));
            }
        }
    }
    room
}

#[cfg(all(test, not(miri)))]
mod tests {
    use super::*;

    /// The room in a system of these files.
    fn room_with(files: &[(&str, &str)]) -> u64 {
        let root = tempfile::tempdir().expect("a folder");
        for (path, text) in files {
            let path = root.path().join(path);
            fs::create_dir_all(path.parent().expect("it is in a folder")).expect("a folder");
            fs::write(path, text).expect("a file");
        }
        room(root.path())
    }

    #[test]
    fn the_room_is_the_least_of_the_machines_and_of_all_groups_around_the_process() {
        let machine =
            ("proc/meminfo", "MemTotal: 9 kB\nMemAvailable:     1000 kB\nBuffers: 1 kB\n");
        assert_eq!(room_with(&[]), u64::MAX);
        assert_eq!(room_with(&[machine]), 1_024_000);
        let second = [
            machine,
            ("proc/self/cgroup", "0::/outer/inner\n"),
            ("sys/fs/cgroup/outer/inner/memory.max", "max\n"),
            ("sys/fs/cgroup/outer/memory.max", "5000\n"),
            ("sys/fs/cgroup/outer/memory.current", "1500\n"),
        ];
        assert_eq!(room_with(&second), 3500);
        // A container sees its own group where all of them are mounted.
        let first = [
            machine,
            ("proc/self/cgroup", "5:cpu:/a\n4:memory:/b/c\n0::/\n"),
            ("sys/fs/cgroup/memory/memory.limit_in_bytes", "700\n"),
            ("sys/fs/cgroup/memory/memory.usage_in_bytes", "900\n"),
        ];
        assert_eq!(room_with(&first), 0);
        assert_eq!(room_with(&[machine, ("proc/self/cgroup", "nonsense\n0:\n")]), 1_024_000);
    }
}
