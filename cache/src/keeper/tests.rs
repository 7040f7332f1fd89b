use std::sync::mpsc;
use std::time::Instant;

use afterimage_wire::proto::stats::{Stats, Value};

use super::*;
use crate::Capacity;

fn table() -> Arc<Table> {
    Arc::new(Table::new(Capacity::Entries(1000)).unwrap())
}

fn file() -> (tempfile::TempDir, PathBuf) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("table.snapshot");
    (folder, path)
}

#[test]
fn what_one_keeper_writes_at_its_end_the_next_one_loads() {
    let (_folder, path) = file();
    let before = table();
    let keeper = Keeper::start(Arc::clone(&before), &path, None).unwrap();
    before.insert(1, 10);
    assert_eq!(keeper.finish().unwrap().entries, 1);
    let after = table();
    let _keeper = Keeper::start(Arc::clone(&after), &path, None).unwrap();
    assert_eq!(after.get(1), Some(10));
}

#[test]
fn writes_by_itself_while_it_lives_and_tells_of_it() {
    let (_folder, path) = file();
    let table = table();
    table.insert(1, 10);
    let keeper = Keeper::start(Arc::clone(&table), &path, Some(Duration::from_millis(5))).unwrap();
    let handle = keeper.handle();
    let written = || {
        let mut stats = Stats::default();
        handle.stats(&mut stats);
        stats.counter_value("snapshots_written")
    };
    let deadline = Instant::now() + Duration::from_secs(30);
    while written() < 2 {
        assert!(Instant::now() < deadline, "no snapshot was written");
        std::thread::sleep(Duration::from_millis(1));
    }
    drop(keeper);
    let last = written();
    std::thread::sleep(Duration::from_millis(50));
    assert_eq!(written(), last, "a dropped keeper writes no more");
}

#[test]
fn a_file_that_is_no_snapshot_is_left_alone_and_a_place_for_none_is_refused_at_the_start() {
    let (folder, path) = file();
    for content in [&b"token"[..], b"not a snapshot", &[0; 100]] {
        std::fs::write(&path, content).unwrap();
        let error = Keeper::start(table(), &path, None).unwrap_err();
        assert!(matches!(error, BadPlace::Occupied { .. }), "{error}");
        assert_eq!(std::fs::read(&path).unwrap(), content);
    }
    for place in [folder.path().to_owned(), folder.path().join("none").join("file")] {
        let error = Keeper::start(table(), &place, None).unwrap_err();
        assert!(matches!(error, BadPlace::NotWritable { .. }), "{error}");
    }
}

#[test]
fn a_damaged_file_is_a_cold_start_and_a_failed_write_is_counted() {
    let (folder, path) = file();
    std::fs::write(&path, snapshot::format::MAGIC).unwrap();
    let table = table();
    let keeper = Keeper::start(Arc::clone(&table), &path, None).unwrap();
    assert_eq!(table.len(), 0);
    drop(folder);
    assert!(keeper.write().is_err());
    let mut stats = Stats::default();
    keeper.handle().stats(&mut stats);
    assert_eq!(stats.counter_value("snapshots_failed"), 1);
}

/// The outcome of a request, when it comes.
fn request(handle: &KeeperHandle) -> mpsc::Receiver<Result<Written, RequestError>> {
    let (sender, receiver) = mpsc::channel();
    handle.request(move |outcome| sender.send(outcome).unwrap());
    receiver
}

const PATIENCE: Duration = Duration::from_secs(60);

#[test]
fn a_snapshot_is_written_when_it_is_asked_for_and_its_age_is_known_to_the_next_keeper() {
    let (_folder, path) = file();
    let before = table();
    let keeper = Keeper::start(Arc::clone(&before), &path, None).unwrap();
    before.insert(1, 10);
    let written = request(&keeper.handle()).recv_timeout(PATIENCE).unwrap().unwrap();
    assert_eq!((written.report.entries, written.joined), (1, false));
    assert_eq!(written.report.bytes, std::fs::metadata(&path).unwrap().len());
    drop(keeper);

    let hour = Duration::from_secs(3600);
    File::open(&path).unwrap().set_modified(SystemTime::now() - hour).unwrap();
    let after = table();
    let keeper = Keeper::start(Arc::clone(&after), &path, None).unwrap();
    assert_eq!(after.get(1), Some(10));
    let mut stats = Stats::default();
    keeper.handle().stats(&mut stats);
    let Some(&Value::Gauge(age_ms)) = stats.get("snapshot_age_ms") else { panic!("no age") };
    assert!((3_600_000..2 * 3_600_000).contains(&age_ms), "{age_ms} ms");
    assert_eq!(stats.get("snapshot_entries"), Some(&Value::Gauge(1)));
}

#[test]
fn who_asks_while_a_snapshot_is_written_joins_it() {
    let (_folder, path) = file();
    let keeper = Keeper::start(table(), &path, None).unwrap();
    let handle = keeper.handle();
    let is_running = || {
        let mut stats = Stats::default();
        handle.stats(&mut stats);
        stats.get("snapshot_running") == Some(&Value::Gauge(1))
    };
    let (first, others) = {
        let _holds_it_up = snapshot::WRITING.lock().unwrap();
        let first = request(&handle);
        let deadline = Instant::now() + PATIENCE;
        while !is_running() {
            assert!(Instant::now() < deadline, "it does not begin");
            std::thread::yield_now();
        }
        (first, [request(&handle), request(&handle)])
    };
    assert!(!first.recv_timeout(PATIENCE).unwrap().unwrap().joined);
    for other in others {
        assert!(other.recv_timeout(PATIENCE).unwrap().unwrap().joined);
    }
    let mut stats = Stats::default();
    handle.stats(&mut stats);
    assert_eq!(stats.counter_value("snapshots_written"), 1);
    assert!(!request(&handle).recv_timeout(PATIENCE).unwrap().unwrap().joined, "a new one");
}

#[test]
fn a_request_that_cannot_be_met_is_told_why() {
    let (folder, path) = file();
    let keeper = Keeper::start(table(), &path, None).unwrap();
    let handle = keeper.handle();
    drop(folder);
    let failed = request(&handle).recv_timeout(PATIENCE).unwrap();
    assert!(matches!(failed, Err(RequestError::Failed(_))), "{failed:?}");

    let crowd: Vec<_> = {
        let _holds_it_up = snapshot::WRITING.lock().unwrap();
        let crowd = (0..1025).map(|_| request(&handle)).collect::<Vec<_>>();
        let last = crowd[1024].recv_timeout(PATIENCE).unwrap();
        assert!(matches!(last, Err(RequestError::Crowded { limit: 1024 })), "{last:?}");
        crowd
    };
    for one in &crowd[..1024] {
        one.recv_timeout(PATIENCE).unwrap().unwrap_err();
    }
    drop(keeper);
    let late = request(&handle).recv_timeout(PATIENCE).unwrap();
    assert!(matches!(late, Err(RequestError::Stopped)), "{late:?}");
}
