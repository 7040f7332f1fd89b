//! Snapshots of real processes: asked for, cut short by SIGKILL at any moment, and with a disk that
//! is full, a folder that is gone and a file that was damaged. Never a wrong value, never a crash.

#![cfg(unix)]

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use afterimage_wire::ClientOptions;
use afterimage_wire::blocking::Client;
use rustix::process::Signal;
use tempfile::TempDir;

use crate::common::{PATIENCE, Running, file, folder, run, text};

/// Entries in the tables of these tests: a snapshot of them takes some milliseconds.
const ENTRIES: u64 = 20_000;

/// The value stored under a key: half of it is the key, the rest the round.
fn value(key: u64, round: u32) -> i64 {
    (key as i64) << 32 | i64::from(round)
}

fn client(cache: &Running) -> Client {
    Client::connect(cache.addr(), ClientOptions::new()).unwrap()
}

/// Writes every key, and returns when the cache has carried that out.
fn fill(client: &Client, round: u32) {
    for key in 0..ENTRIES {
        client.cache().set(key, value(key, round)).unwrap();
        // The queue is bounded, so the writer waits for the cache from time to time.
        if key % 1000 == 999 {
            client.cache().get(key).unwrap();
        }
    }
}

/// The number of keys that the cache finds. Each value must be right.
fn found(client: &Client, rounds: std::ops::RangeInclusive<u32>) -> usize {
    let keys: Vec<u64> = (0..ENTRIES).collect();
    let mut found = 0;
    for keys in keys.chunks(1000) {
        for (key, found_value) in keys.iter().zip(client.cache().get_many(keys).unwrap()) {
            let Some(found_value) = found_value else { continue };
            let round = found_value as u32;
            assert_eq!(found_value, value(*key, round), "key {key} has a value of another key");
            assert!(rounds.contains(&round), "key {key} is of round {round}, not of {rounds:?}");
            found += 1;
        }
    }
    found
}

fn start(snapshot: &str, more: &[&str]) -> Running {
    let args = ["cache", "--entries", "400000", "--threads", "1", "--snapshot", snapshot];
    let args = [&args[..], &["--min-snapshot-interval", "0s"]].concat();
    Running::start(&[&args[..], more].concat())
}

/// The names of the files in a folder.
fn names(folder: &TempDir) -> Vec<String> {
    let entries = fs::read_dir(folder.path()).unwrap();
    let mut names: Vec<String> = entries.map(|entry| text(entry.unwrap().file_name())).collect();
    names.sort();
    names
}

fn place(folder: &TempDir) -> String {
    text(folder.path().join("snapshot"))
}

#[test]
fn a_snapshot_that_was_asked_for_survives_a_crash() {
    let folder = folder();
    let mut cache = start(&place(&folder), &[]);
    fill(&client(&cache), 1);
    let printed = run(&["snapshot", &cache.place()]).succeeded();
    assert!(printed.starts_with("wrote 20,000 entries, 33"), "{printed}");
    cache.kill();
    cache.restart();
    assert_eq!(found(&client(&cache), 1..=1), ENTRIES as usize);
    let stats = run(&["stats", "--over", "0s", &cache.place()]).succeeded();
    assert!(stats.contains("\nSnapshot\n"), "{stats}");
}

#[test]
fn a_memo_with_an_embedded_table_writes_snapshots() {
    let folder = folder();
    let secret = file(&folder, "secret", [7; 32]);
    let args = ["serve", "--memory", "8MiB", "--model", "raw", "--secret-file", &secret];
    let mut memo = Running::start(&[&args[..], &["--snapshot", &place(&folder)]].concat());
    let image = [3; 784];
    let first = client(&memo).classify(&image).unwrap();
    let printed = run(&["snapshot", &memo.place()]).succeeded();
    assert!(printed.starts_with("wrote 1 entries"), "{printed}");
    memo.kill();
    memo.restart();
    let again = client(&memo).classify(&image).unwrap();
    assert_eq!(again.label, first.label);
    assert_eq!(again.origin, afterimage_wire::proto::message::Origin::Hit);
}

#[test]
fn who_keeps_no_snapshot_or_asks_for_a_token_says_so() {
    let folder = folder();
    let cache = Running::start(&["cache", "--memory", "8MiB"]);
    let place_of_cache = cache.place();
    let raw = ["--model", "raw"];
    let classifier = Running::start(&[&["classifier"][..], &raw].concat());
    let memo = ["memo", "--store", &place_of_cache, "--lookup-budget", "1s"];
    let memo = Running::start(&[&memo[..], &raw].concat());
    for (service, says) in
        [(&cache, "--snapshot"), (&classifier, "keeps no snapshot"), (&memo, "has a remote store")]
    {
        let line = run(&["snapshot", &service.place()]).failed_with_a_line();
        assert!(line.contains("unsupported") && line.contains(says), "{line}");
    }
    let token = file(&folder, "token", "sesame");
    let guarded = start(&place(&folder), &["--token-file", &token]);
    let line = run(&["snapshot", &guarded.place()]).failed_with_a_line();
    assert!(line.contains("token"), "{line}");
    assert!(!Path::new(&place(&folder)).exists());
    run(&["snapshot", &guarded.place(), "--token-file", &token]).succeeded();
}

#[test]
fn answers_deleted_by_command_stay_deleted_after_a_restart() {
    let folder = folder();
    let [token, admin] = ["token", "admin"].map(|name| file(&folder, name, name));
    let at = place(&folder);
    let args = ["serve", "--snapshot", &at, "--token-file", &token, "--admin-token-file", &admin];
    let mut memo = Running::start(
        &[&args[..], &["--secret-file", &file(&folder, "secret", "7".repeat(64))]].concat(),
    );
    let classify = |memo: &Running| {
        let server = memo.place();
        let image = "examples/seven.png";
        let args = ["classify", image, "--server", &server, "--token-file", &token];
        let printed = run(&args).succeeded();
        ["hit", "miss"].into_iter().find(|origin| printed.contains(origin)).unwrap()
    };
    let take_back = |memo: &Running, args: &[&str], token: &str| {
        let server = memo.place();
        run(&[args, &["--server", &server, "--token-file", token]].concat())
    };
    assert_eq!((classify(&memo), classify(&memo)), ("miss", "hit"));
    let forget = ["forget", "examples/seven.png"];
    for command in [&forget[..], &["flush"]] {
        let line = take_back(&memo, command, &token).failed_with_a_line();
        assert!(line.contains("unauthorized") && line.contains("admin token"), "{line}");
        assert_eq!(classify(&memo), "hit", "{command:?} without the right");
        let printed = take_back(&memo, command, &admin).succeeded();
        assert!(
            printed.starts_with("deleted the answers of 1 input in")
                || printed.contains("all models"),
            "{printed}"
        );
        assert_eq!((classify(&memo), classify(&memo)), ("miss", "hit"), "{command:?}");
    }
    let line = take_back(&memo, &["flush", "--model", "none"], &admin).failed_with_a_line();
    assert!(line.contains("none"), "{line}");
    take_back(&memo, &["flush"], &admin).succeeded();
    memo.signal(Signal::TERM);
    assert!(memo.wait().success());
    memo.restart();
    assert_eq!((classify(&memo), classify(&memo)), ("miss", "hit"), "flushed before the restart");
}

#[test]
fn snapshots_and_internals_need_the_admin_token() {
    let folder = folder();
    let [token, admin] = ["token", "admin"].map(|name| file(&folder, name, name));
    let tokens = ["--token-file", &token, "--admin-token-file", &admin];
    let cache = start(&place(&folder), &tokens);
    let line = run(&["snapshot", &cache.place(), "--token-file", &token]).failed_with_a_line();
    assert!(
        line.contains("unauthorized: a snapshot needs the admin token; give it with"),
        "{line}"
    );
    assert!(!Path::new(&place(&folder)).exists());
    run(&["snapshot", &cache.place(), "--token-file", &admin]).succeeded();

    let classifier = Running::start(&["classifier", "--model", "raw"]);
    let at = classifier.place();
    let memo = Running::start(&[&["memo", "--classifier", &at][..], &tokens].concat());
    for (token, sees) in [(&token, false), (&admin, true)] {
        let stats = run(&["stats", &memo.place(), "--json", "--token-file", token]).succeeded();
        assert_eq!(stats.contains(&at), sees, "{stats}");
        assert!(stats.contains("\"classifiers\": 1"), "{stats}");
    }
    let same = ["cache", "--token-file", &token, "--admin-token-file", &token];
    let done = run(&same);
    let reason = "--admin-token-file has the token that all clients send";
    assert!(!done.status.success() && done.stderr.contains(reason), "{done:#?}");
}

#[test]
fn a_public_listener_without_a_token_has_no_admin() {
    let folder = folder();
    let public = ["--listen", "0.0.0.0:0", "--insecure"];
    let open = start(&place(&folder), &public);
    let local = format!("127.0.0.1:{}", open.addr().port());
    let line = run(&["snapshot", &local]).failed_with_a_line();
    assert!(line.contains("unauthorized"), "{line}");
    drop(open);
    let admin = file(&folder, "admin", "admin");
    let open = start(&place(&folder), &[&public[..], &["--admin-token-file", &admin]].concat());
    let local = format!("127.0.0.1:{}", open.addr().port());
    run(&["snapshot", &local]).failed_with_a_line();
    run(&["snapshot", &local, "--token-file", &admin]).succeeded();
}

#[test]
fn snapshots_on_request_keep_a_least_interval() {
    let folder = folder();
    let mut cache = Running::start(&["cache", "--memory", "8MiB", "--snapshot", &place(&folder)]);
    run(&["snapshot", &cache.place()]).succeeded();
    let line = run(&["snapshot", &cache.place()]).failed_with_a_line();
    assert!(line.contains("overloaded") && line.contains("the next is possible in "), "{line}");
    assert!(line.contains("the least interval is 10s"), "{line}");
    let written = fs::metadata(place(&folder)).unwrap().modified().unwrap();
    cache.signal(Signal::TERM);
    assert!(cache.wait().success());
    let last = fs::metadata(place(&folder)).unwrap().modified().unwrap();
    assert!(last > written, "the last snapshot does not wait");
}

#[test]
fn a_folder_that_is_gone_costs_the_snapshot_and_nothing_else() {
    let folder = folder();
    let (inside, away) = (folder.path().join("inside"), folder.path().join("away"));
    fs::create_dir(&inside).unwrap();
    let mut cache = start(&text(inside.join("snapshot")), &[]);
    let client = client(&cache);
    fill(&client, 1);
    run(&["snapshot", &cache.place()]).succeeded();
    fs::rename(&inside, &away).unwrap();
    let line = run(&["snapshot", &cache.place()]).failed_with_a_line();
    assert!(line.contains("storage_failed") && line.contains("No such file"), "{line}");
    let folder_name = text(folder.path());
    assert!(!line.contains(&folder_name), "a client is not told of the server's folders: {line}");
    assert_eq!(found(&client, 1..=1), ENTRIES as usize, "it goes on serving");
    fs::rename(&away, &inside).unwrap();
    fill(&client, 2);
    run(&["snapshot", &cache.place()]).succeeded();
    cache.kill();
    cache.restart();
    assert_eq!(found(&self::client(&cache), 2..=2), ENTRIES as usize);
}

/// The disk's end is the process's own limit on files: unlike a small file system it needs no
/// privileges.
#[test]
#[cfg(target_os = "linux")]
fn a_full_disk_costs_the_snapshot_and_nothing_else() {
    use rustix::process::{Pid, Resource, Rlimit, prlimit};
    let folder = folder();
    let mut cache = start(&place(&folder), &[]);
    let client = client(&cache);
    fill(&client, 1);
    run(&["snapshot", &cache.place()]).succeeded();
    let whole = fs::metadata(place(&folder)).unwrap().len();
    let limit = |room: Option<u64>| {
        let pid = Pid::from_raw(cache.pid() as i32);
        prlimit(pid, Resource::Fsize, Rlimit { current: room, maximum: None }).unwrap();
    };
    fill(&client, 2);
    for room in [0, 1, 36, 4096, whole / 2, whole - 1] {
        limit(Some(room));
        let line = run(&["snapshot", &cache.place()]).failed_with_a_line();
        assert!(line.contains("storage_failed") && line.contains("too large"), "{room}: {line}");
        assert_eq!(fs::metadata(place(&folder)).unwrap().len(), whole, "the old one is there");
        assert_eq!(names(&folder), ["snapshot", "snapshot.lock"], "and no unfinished one");
    }
    assert_eq!(found(&client, 2..=2), ENTRIES as usize, "it goes on serving");
    cache.kill();
    cache.restart();
    assert_eq!(found(&self::client(&cache), 1..=1), ENTRIES as usize, "the last good one");
    let client = self::client(&cache);
    fill(&client, 3);
    run(&["snapshot", &cache.place()]).succeeded();
}

/// What it told when it started, now that it has ended: its snapshot was whole, and what a kill had
/// cut short was cleared away.
fn assert_came_back(cache: &Running, unfinished: usize) {
    let log = cache.log();
    assert!(log.contains(&format!("loaded {ENTRIES} of {ENTRIES} entries")), "{log}");
    assert!(!log.contains("a cold start") && !log.contains("no snapshot"), "{log}");
    let removed = log.contains(&format!("removed {unfinished} unfinished snapshots"));
    assert_eq!(removed, unfinished > 0, "{unfinished}: {log}");
}

#[test]
fn a_killed_cache_restarts_with_a_whole_snapshot() {
    let folder = folder();
    let mut cache = start(&place(&folder), &["--snapshot-every", "3ms"]);
    let seed = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().subsec_nanos();
    println!("kill times from the seed {seed}");
    let mut random = u64::from(seed) | 1;
    let (mut torn, mut unfinished) = (0, None);
    for round in 1..=12 {
        let client = client(&cache);
        fill(&client, round);
        // One that had begun before need not have all of this round.
        while client.admin().snapshot(PATIENCE).unwrap().joined {}
        // xorshift64 (Marsaglia 2003, "Xorshift RNGs").
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        let until = Instant::now() + Duration::from_micros(random % 40_000);
        // Writes go on until the end.
        let mut key = 0;
        while Instant::now() < until {
            client.cache().set(key % ENTRIES, value(key % ENTRIES, round)).unwrap();
            client.cache().get(key % ENTRIES).unwrap();
            key += 1;
        }
        cache.kill();
        unfinished.inspect(|&unfinished| assert_came_back(&cache, unfinished));
        let left = names(&folder).len() - 2;
        unfinished = Some(left);
        torn += left;
        cache.restart();
        let client = self::client(&cache);
        assert_eq!(found(&client, round..=round), ENTRIES as usize, "round {round}");
    }
    println!("{torn} of 12 were killed while a snapshot was being written");
}

#[test]
fn a_damaged_snapshot_is_a_cold_start_with_a_warning() {
    let folder = folder();
    let mut cache = start(&place(&folder), &[]);
    fill(&client(&cache), 1);
    run(&["snapshot", &cache.place()]).succeeded();
    cache.kill();
    let whole = fs::read(place(&folder)).unwrap();
    // A place in each part: magic, version, id, count, checksum; a block's count, keys, values,
    // heats, checksum; the same of a later block, and the last byte.
    let block = 8 + 17 * 4096;
    let in_block = [0, 4, 4 + 8 * 4096, 4 + 16 * 4096, 4 + 17 * 4096];
    let places = [0, 8, 16, 24, 32].into_iter();
    let places = places.chain(in_block.map(|at| 36 + at)).chain(in_block.map(|at| 36 + block + at));
    let places: Vec<usize> = places.chain([whole.len() - 1]).collect();
    for &at in &places {
        let mut flipped = whole.clone();
        flipped[at] ^= 1 << (at % 8);
        let mut cut = whole.clone();
        cut.truncate(at);
        for damaged in [flipped, cut] {
            // A file without the magic is another program's and refused; another test covers it.
            if !damaged.starts_with(&whole[..8]) {
                continue;
            }
            fs::write(place(&folder), damaged).unwrap();
            cache.restart();
            assert_eq!(found(&client(&cache), 1..=1), 0, "byte {at}");
            cache.kill();
            assert!(cache.log().contains("a cold start: "), "byte {at}: {}", cache.log());
        }
    }
    fs::write(place(&folder), whole).unwrap();
    cache.restart();
    assert_eq!(found(&client(&cache), 1..=1), ENTRIES as usize);
}

#[test]
fn serving_goes_on_while_a_snapshot_is_written() {
    let folder = folder();
    let cache = start(&place(&folder), &[]);
    let reader = client(&cache);
    fill(&reader, 1);
    let place_of_cache = cache.place();
    let snapshots = std::thread::spawn(move || {
        for _ in 0..5 {
            run(&["snapshot", &place_of_cache]).succeeded();
        }
    });
    let deadline = Instant::now() + PATIENCE;
    let mut reads = 0;
    while !snapshots.is_finished() {
        assert!(Instant::now() < deadline, "five snapshots take too long");
        let key = reads % ENTRIES;
        assert_eq!(reader.cache().get(key).unwrap(), Some(value(key, 1)));
        reads += 1;
    }
    snapshots.join().unwrap();
    assert!(reads > 10, "{reads} reads while five snapshots were written");
}

/// The line of a service that must not start. A service that starts, or hangs, fails the test.
fn refused(service: &str, snapshot: &str) -> String {
    let args = ["--log", "error", service, "--listen", "127.0.0.1:0", "--snapshot", snapshot];
    run(&args).failed_with_a_line()
}

#[test]
fn a_snapshot_must_be_a_regular_file() {
    use std::os::unix::fs::symlink;
    let folder = folder();
    let at = |name: &str| folder.path().join(name);
    assert!(Command::new("mkfifo").arg(at("fifo")).status().unwrap().success());
    symlink(at("fifo"), at("to_fifo")).unwrap();
    symlink("/dev/null", at("null")).unwrap();
    fs::create_dir(at("folder")).unwrap();
    let before = names(&folder);
    for service in ["cache", "serve"] {
        for (name, kind) in [
            ("fifo", "a FIFO"),
            ("to_fifo", "a FIFO"),
            ("null", "a device"),
            ("folder", "a directory"),
        ] {
            let line = refused(service, &text(at(name)));
            assert!(line.contains(name) && line.contains(kind), "{line}");
        }
    }
    let line = refused("cache", "/dev/stdout");
    assert!(line.contains("/dev/stdout") && line.contains("regular file"), "{line}");
    assert_eq!(names(&folder), before);
}

#[test]
fn a_link_is_followed_and_its_target_is_replaced() {
    let [folder, disk] = [folder(), folder()];
    let target = disk.path().join("data");
    std::os::unix::fs::symlink(&target, place(&folder)).unwrap();
    let mut cache = start(&place(&folder), &[]);
    fill(&client(&cache), 1);
    run(&["snapshot", &cache.place()]).succeeded();
    assert!(fs::symlink_metadata(place(&folder)).unwrap().is_symlink());
    assert_eq!(names(&disk), ["data", "data.lock"]);
    assert_eq!(fs::metadata(&target).unwrap().permissions().mode() & 0o777, 0o600);
    cache.kill();
    cache.restart();
    assert_eq!(found(&client(&cache), 1..=1), ENTRIES as usize);
    cache.signal(Signal::TERM);
    assert!(cache.wait().success());
    assert_eq!(names(&disk), ["data"], "a clean end removes the lock");
    assert_eq!(names(&folder), ["snapshot"]);
}

#[test]
fn a_second_process_on_one_snapshot_is_refused() {
    let folder = folder();
    let path = place(&folder);
    let mut cache = start(&path, &["--snapshot-every", "1ms"]);
    fill(&client(&cache), 1);
    run(&["snapshot", &cache.place()]).succeeded();
    std::os::unix::fs::symlink(&path, folder.path().join("link")).unwrap();
    let owner = format!("in use by process {}", cache.pid());
    // At any moment of a write, also while the owner hangs in the middle of one.
    for round in 0..6 {
        std::thread::sleep(Duration::from_micros(700 * round));
        cache.hang();
        let before = names(&folder);
        for path in [&path, &text(folder.path().join("link"))] {
            let line = refused("cache", path);
            assert!(line.contains(&owner), "{line}");
        }
        assert_eq!(names(&folder), before, "an unfinished snapshot of a live owner stays");
        cache.go_on();
    }
    cache.signal(Signal::TERM);
    assert!(cache.wait().success());
    let next = start(&path, &[]);
    // The answers come after the load, and so does its line in the log.
    assert_eq!(found(&client(&next), 1..=1), ENTRIES as usize);
    assert!(next.log().contains(&format!("loaded {ENTRIES} of")), "{}", next.log());
}

#[test]
fn a_cache_with_bytes_keeps_both_stores() {
    let folder = folder();
    let mut cache = start(&place(&folder), &["--bytes", "8MiB"]);
    fill(&client(&cache), 1);
    let printed = run(&["snapshot", &cache.place()]).succeeded();
    assert!(printed.starts_with("wrote 20,000 entries"), "{printed}");
    assert_eq!(
        names(&folder),
        ["snapshot", "snapshot.bytes", "snapshot.bytes.lock", "snapshot.lock"]
    );
    cache.kill();
    cache.restart();
    assert_eq!(found(&client(&cache), 1..=1), ENTRIES as usize);
    let stats = run(&["stats", "--over", "0s", &cache.place()]).succeeded();
    assert!(stats.contains("\nByte store\n"), "{stats}");
}
