//! Processes that write a file until the test kills them.
//!
//! The test binary starts itself with one test only. That test takes the path from [`path`], and
//! does nothing without it.

use std::ffi::OsString;
use std::fs;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::thread::sleep;
use std::time::Duration;

/// The variable with the path that the process writes to.
const PATH: &str = "AFTERIMAGE_TEST_WRITES_TO";

/// The path that this process should write to until it is killed; `None` in any other process.
pub fn path() -> Option<OsString> {
    std::env::var_os(PATH)
}

/// Starts `test` as a process that writes `path`, once in each of `rounds`. Kills it when the file
/// exists and a time has passed, `first` and `step` more in each round. Calls `killed` then.
///
/// Panics unless at least one process was killed while it wrote a temporary file.
pub fn in_rounds(
    test: &str,
    path: &Path,
    rounds: u32,
    [first, step]: [Duration; 2],
    mut started: impl FnMut(&Child),
    mut killed: impl FnMut(),
) {
    let mut in_the_middle = 0;
    for round in 0..rounds {
        let mut writer = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", test])
            .env(PATH, path)
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        while !path.exists() {
            assert_eq!(writer.try_wait().unwrap(), None, "the writer ended by itself");
            sleep(Duration::from_millis(1));
        }
        started(&writer);
        sleep(first + step * round);
        writer.kill().unwrap();
        writer.wait().unwrap();
        let files = fs::read_dir(path.parent().unwrap()).unwrap().flatten();
        let is_temporary = |name: OsString| name.to_string_lossy().contains(".tmp-");
        in_the_middle += files.filter(|file| is_temporary(file.file_name())).count();
        killed();
    }
    println!("{in_the_middle} of {rounds} were killed during a write");
    assert!(in_the_middle > 0, "no writer was killed during a write");
}
