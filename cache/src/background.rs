//! Work beside the serving: its priority, and the table's memory, taken before somebody waits for it.

use std::sync::Arc;
use std::thread;
use std::time::Instant;

use crate::table::Table;

/// How much a background thread's claim to a core is lowered (its *nice* value): to about a ninth of a reader's, so that
/// its work takes what serving leaves and still goes on where nothing is left.
#[cfg(target_os = "linux")]
const NICE: i32 = 10;

/// Serving goes before the calling thread's work, where there are fewer cores than threads that want one.
pub(crate) fn yield_to_readers() {
    // Of the calling thread alone, as Linux means it.
    #[cfg(target_os = "linux")]
    if let Err(error) = rustix::process::setpriority_process(None, NICE) {
        let thread = thread::current();
        let name = thread.name().unwrap_or("a background");
        tracing::debug!("the {name} thread keeps its priority: {error}");
    }
}

/// [`Table::populate`] on a thread of its own, behind whatever serves. It ends when all is done, or when nobody else has
/// the table any more. What goes wrong is logged and changes nothing.
pub fn populate_in_background(table: &Arc<Table>) {
    let table = Arc::clone(table);
    let work = move || {
        yield_to_readers();
        let started = Instant::now();
        match table.populate(|| Arc::strong_count(&table) > 1) {
            Ok(()) => {
                tracing::debug!("the table's memory is there, after {:.1?}", started.elapsed())
            }
            Err(error) => tracing::debug!("the table's memory comes as it is needed: {error}"),
        }
    };
    if let Err(error) = thread::Builder::new().name("populate".into()).spawn(work) {
        tracing::debug!("the table's memory comes as it is needed: {error}");
    }
}

#[cfg(all(test, target_os = "linux", not(miri)))]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::table::Capacity;

    const BYTES: u64 = 64 << 20;

    /// Bytes that this process has in physical memory.
    fn resident() -> u64 {
        let status = std::fs::read_to_string("/proc/self/status").expect("Linux has it");
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
        let kib = line.and_then(|rest| rest.trim().strip_suffix(" kB")).expect("`VmRSS: 123 kB`");
        kib.parse::<u64>().expect("a number") << 10
    }

    #[test]
    fn memory_is_there_before_it_is_written_to_and_what_was_written_stays() {
        let table = Arc::new(Table::new(Capacity::Bytes(BYTES)).expect("memory"));
        table.insert(7, 8);
        let before = resident();
        table.populate(|| false).expect("nothing to do");
        assert!(resident() - before < BYTES / 2, "told not to");
        populate_in_background(&table);
        let deadline = Instant::now() + Duration::from_secs(60);
        while Arc::strong_count(&table) > 1 {
            assert!(Instant::now() < deadline, "it ends");
            thread::sleep(Duration::from_millis(1));
        }
        // Not all of it is new: the entry's page was there.
        assert!(resident() - before > BYTES / 4 * 3);
        assert_eq!(table.get(7), Some(8));
    }
}
