//! Servers that die, dawdle and go away, and a window deeper than all buffers.

use std::time::{Duration, Instant};

use afterimage_bench::{Plan, Span};
use afterimage_wire::proto::{Message, Role};

use crate::fake::{self, Then, encode, proper, right};
use crate::{go, plan};

#[test]
fn a_server_that_dies_is_reported_and_not_waited_for() {
    let addr = fake::start(Role::Memo, |_| {
        Box::new(|n, frame, replies| {
            if n == 300 {
                return Then::Hang;
            }
            replies.push(right(frame));
            Then::Continue
        })
    });
    let began = Instant::now();
    let report = go(&plan(addr)).unwrap();
    assert!(began.elapsed() < Duration::from_secs(15), "waited {:?}", began.elapsed());
    assert_eq!(report.disconnects.len(), 1);
    assert_eq!(report.answered, 300);
    assert!((1..=8).contains(&report.lost), "{} lost", report.lost);
    assert_eq!(report.sent + report.skipped, 1000);
}

#[test]
fn a_connection_that_dies_does_not_stop_the_others() {
    let addr = fake::start(Role::Memo, |number| {
        Box::new(move |n, frame, replies| {
            if number == 0 && n == 10 {
                return Then::Hang;
            }
            replies.push(right(frame));
            Then::Continue
        })
    });
    let report = go(&Plan { connections: 4, ..plan(addr) }).unwrap();
    assert_eq!(report.disconnects.len(), 1);
    assert_eq!(report.answered, 750 + 10);
}

#[test]
fn unanswered_requests_time_out_and_late_replies_are_counted() {
    let addr = fake::start(Role::Memo, |_| {
        let mut held = None;
        Box::new(move |n, frame, replies| {
            match n {
                100 => held = Some(right(frame)),
                101 => {}
                // Long after the reply was given up.
                900 => {
                    std::thread::sleep(Duration::from_millis(1200));
                    replies.extend(held.take());
                    replies.push(right(frame));
                }
                _ => replies.push(right(frame)),
            }
            Then::Continue
        })
    });
    let timeout = Duration::from_millis(400);
    // Two at a time: request 900 and the one after it time out, too.
    let report = go(&Plan { timeout, depth: 4, ..plan(addr) }).unwrap();
    assert!(report.timed_out >= 3, "{} timed out", report.timed_out);
    assert!(report.late >= 2, "{} late", report.late);
    assert_eq!(report.answered + report.timed_out, 1000);
}

#[test]
fn a_server_that_goes_away_in_order_loses_nothing() {
    let addr = fake::start(Role::Memo, |_| {
        Box::new(|n, frame, replies| {
            replies.push(right(frame));
            if n == 200 {
                replies.push(encode(0, &Message::GoAway { text: "restarting" }));
            }
            Then::Continue
        })
    });
    let report = go(&plan(addr)).unwrap();
    assert_eq!((report.lost, report.sent), (0, report.answered));
    assert!((201..=217).contains(&report.answered), "{} answered", report.answered);
    assert_eq!(report.skipped, 1000 - report.sent);
    assert_eq!(report.disconnects, ["the server is shutting down: restarting"]);
}

#[test]
fn a_window_above_all_buffers_does_not_block_a_server() {
    let addr = fake::start(Role::Memo, |_| proper());
    let stop = Span::Requests(60_000);
    let report = go(&Plan { depth: 60_000, stop, ..plan(addr) }).unwrap();
    assert_eq!(report.answered, 60_000);
}
