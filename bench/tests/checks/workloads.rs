//! Requests, their order, and the mix of reads and writes.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use afterimage_bench::workload::Access;
use afterimage_bench::{Outcome, Plan, Span};
use afterimage_wire::proto::{Message, Role};

use crate::fake::{self, Then, encode, right};
use crate::{cache_plan, go, plan, wrong};

/// The requests of each connection of a run, in order.
type Log = Arc<Mutex<HashMap<usize, Vec<Vec<u8>>>>>;

fn recording(log: &Log) -> SocketAddr {
    let log = Arc::clone(log);
    fake::start(Role::Memo, move |number| {
        let log = Arc::clone(&log);
        Box::new(move |_, frame, replies| {
            log.lock().unwrap().entry(number).or_default().push(frame.body.to_vec());
            replies.push(right(frame));
            Then::Continue
        })
    })
}

#[test]
fn a_seed_asks_the_same_on_every_connection() {
    let asked = |seed| {
        let log = Log::default();
        let access = Access::Zipf { exponent: 1.1 };
        go(&Plan { connections: 3, access, seed, ..plan(recording(&log)) }).unwrap();
        let log = log.lock().unwrap();
        (0..3).map(|number| log[&number].clone()).collect::<Vec<_>>()
    };
    let first = asked(5);
    assert_eq!(first, asked(5));
    assert_ne!(first, asked(6));
    assert_eq!(first[1].len(), first[2].len());
    assert_ne!(first[1], first[2], "two connections ask the same");
}

#[test]
fn each_once_asks_about_every_image_once_and_ends() {
    let log = Log::default();
    let plan = Plan {
        access: Access::EachOnce,
        connections: 3,
        stop: Span::Time(Duration::from_secs(60)),
        ..plan(recording(&log))
    };
    let report = go(&plan).unwrap();
    assert_eq!((report.answered, report.skipped), (100, 0));
    let mut asked: Vec<Vec<u8>> = log.lock().unwrap().values().flatten().cloned().collect();
    asked.sort_unstable();
    asked.dedup();
    assert_eq!(asked.len(), 100);
}

#[test]
fn prefilling_asks_about_every_image_before_the_measurement() {
    let log = Log::default();
    let report = go(&Plan { prefill: true, ..plan(recording(&log)) }).unwrap();
    assert_eq!(report.answered, 1000);
    let log = log.lock().unwrap();
    let mut first: Vec<&Vec<u8>> = log[&0][..100].iter().collect();
    first.sort_unstable();
    first.dedup();
    assert_eq!((log[&0].len(), first.len()), (1100, 100));
}

/// A cache that keeps everything, and replaces value number `lie` that it reads by another.
fn cache(lie: Option<u64>) -> SocketAddr {
    let store = Arc::new(Mutex::new(HashMap::new()));
    fake::start(Role::Cache, move |_| {
        let store = Arc::clone(&store);
        let mut read = 0;
        Box::new(move |_, frame, replies| {
            match Message::decode(frame).unwrap() {
                Message::CacheWrite { key, value } => {
                    store.lock().unwrap().insert(key, value);
                }
                Message::CacheRead { key, .. } => {
                    let mut value = store.lock().unwrap().get(&key).copied();
                    if value.is_some() {
                        value = value.map(|v| if Some(read) == lie { v + 1 } else { v });
                        read += 1;
                    }
                    replies.push(encode(frame.header.id, &Message::CacheResp { value }));
                }
                _ => replies.push(right(frame)),
            }
            Then::Continue
        })
    })
}

#[test]
fn a_cache_is_read_and_written_in_the_given_mix() {
    let report = go(&Plan { connections: 2, ..cache_plan(cache(None), 0.7) }).unwrap();
    assert_eq!(report.sent, 1000);
    assert_eq!(report.writes, report.writes_confirmed);
    // Five standard deviations of a binomial with n = 1000, p = 0.3.
    assert!((228..=372).contains(&report.writes), "{} writes", report.writes);
    assert_eq!(report.answered, 1000 - report.writes);
    let count = |outcome| report.outcomes[&outcome].from_due.count;
    assert_eq!(count(Outcome::Hit) + count(Outcome::Miss), report.answered);
    assert!(report.hit_ratio.unwrap() > 0.5);
}

#[test]
fn writes_alone_are_confirmed_by_pings_that_count_for_nothing() {
    let report = go(&cache_plan(cache(None), 0.0)).unwrap();
    assert_eq!((report.sent, report.writes, report.writes_confirmed), (1000, 1000, 1000));
    assert_eq!((report.answered, report.hit_ratio), (0, None));
    assert!(report.fences >= 1000 / 8, "{} pings", report.fences);
}

#[test]
fn prefilled_keys_are_all_hits() {
    let report = go(&Plan { prefill: true, ..cache_plan(cache(None), 1.0) }).unwrap();
    assert_eq!((report.answered, report.hit_ratio), (1000, Some(1.0)));
}

#[test]
fn a_planted_wrong_value_fails_the_run() {
    let report = wrong(go(&Plan { prefill: true, ..cache_plan(cache(Some(500)), 1.0) }));
    assert_eq!(report.wrong, 1);
    assert_eq!(report.examples[0].answer, report.examples[0].expected + 1);
}
