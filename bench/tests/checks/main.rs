//! The generator counts exactly and checks everything: servers that err, stall, send wrong answers
//! or end, and plans and servers that it refuses.

// The exemption for tests does not reach the helpers beside them.
#![allow(clippy::unwrap_used)]

#[path = "../fake/mod.rs"]
mod fake;
mod http;
mod peers;
mod records;
mod workloads;

use std::net::{SocketAddr, TcpListener};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use afterimage_bench::workload::{Access, Answers, Keys, Population};
use afterimage_bench::{Arrivals, BenchError, Mode, Outcome, Plan, Report, Span, Target, run};
use afterimage_wire::Status;
use afterimage_wire::proto::message::Origin;
use afterimage_wire::proto::{Message, Role, Shape};
use fake::{Then, class_of, classified, encode, error, proper, right};

fn images(count: usize) -> Arc<Population> {
    Arc::new(Population::drawn(1, count))
}

/// A plan that is quick: a thousand requests over 100 images, eight at a time.
fn plan(addr: SocketAddr) -> Plan {
    Plan {
        depth: 8,
        stop: Span::Requests(1000),
        timeout: Duration::from_secs(30),
        ..Plan::classify(addr, images(100))
    }
}

fn cache_plan(addr: SocketAddr, read_share: f64) -> Plan {
    let keys = Keys { count: 100, read_share, salt: 9 };
    Plan {
        depth: 8,
        stop: Span::Requests(1000),
        timeout: Duration::from_secs(30),
        ..Plan::cache(addr, keys)
    }
}

fn go(plan: &Plan) -> Result<Report, BenchError> {
    let result = run(plan, &mut |_| {});
    let report = match &result {
        Ok(report) => report,
        Err(BenchError::Wrong(report)) => report,
        Err(_) => return result,
    };
    let accounted =
        report.answered + report.failed + report.writes_confirmed + report.timed_out + report.lost;
    assert_eq!(report.sent, accounted, "a request is missing or counted twice: {report}");
    result
}

fn wrong(result: Result<Report, BenchError>) -> Report {
    match result {
        Err(BenchError::Wrong(report)) => *report,
        other => panic!("the run should have failed: {other:?}"),
    }
}

#[test]
fn every_request_is_counted_once() {
    let seen = Arc::new(Mutex::new(0u64));
    let counter = Arc::clone(&seen);
    let addr = fake::start(Role::Memo, move |_| {
        let counter = Arc::clone(&counter);
        Box::new(move |_, frame, replies| {
            *counter.lock().unwrap() += 1;
            replies.push(right(frame));
            Then::Continue
        })
    });
    let plan = Plan {
        connections: 7,
        threads: 3,
        stop: Span::Requests(10_001),
        warmup: Span::Requests(500),
        ..plan(addr)
    };
    let report = go(&plan).unwrap();
    assert_eq!((report.sent, report.answered), (10_001, 10_001));
    assert_eq!(*seen.lock().unwrap(), 10_501);
    assert_eq!(report.latency_from_due.count, 10_001);
    assert_eq!(report.latency_from_sent.count, 10_001);
    assert_eq!(report.problems(), [""; 0]);
    assert_eq!(report.hit_ratio, Some(0.0));
    assert!(report.throughput_per_s > 0.0 && report.measured_s > 0.0);
}

#[test]
fn a_planted_wrong_label_fails_the_run() {
    let addr = fake::start(Role::Memo, |_| {
        Box::new(|n, frame, replies| {
            let mut reply = right(frame);
            if n == 700 {
                let label = reply.len() - 2;
                reply[label] = (reply[label] + 1) % 10;
            }
            replies.push(reply);
            Then::Continue
        })
    });
    let report = wrong(go(&plan(addr)));
    assert_eq!((report.wrong, report.unexpected), (1, 0));
    let example = &report.examples[0];
    assert_eq!(example.answer, (example.expected + 1) % 10);
}

#[test]
fn a_wrong_label_in_the_warm_up_fails_the_run() {
    let addr = fake::start(Role::Memo, |_| {
        Box::new(|n, frame, replies| {
            let class = if n == 450 { 11 } else { 3 };
            replies.push(classified(frame.header.id, class, Origin::Miss));
            Then::Continue
        })
    });
    let report = wrong(go(&Plan { warmup: Span::Requests(500), ..plan(addr) }));
    assert_eq!(report.wrong, 1);
}

#[test]
fn checks_a_server_against_known_labels_and_another_run() {
    let population = images(100);
    let right_ones: Vec<u16> = (0..100).map(|i| class_of(population.image(i))).collect();
    let addr = fake::start(Role::Memo, |_| proper());
    let with = |addr, answers: &Arc<Answers>| {
        let (population, answers) = (Arc::clone(&population), Arc::clone(answers));
        Plan { target: Target::Classify { population, answers }, ..plan(addr) }
    };
    go(&with(addr, &Arc::new(Answers::known(&right_ones)))).unwrap();

    let first_come = Arc::new(Answers::first_come(100));
    go(&with(addr, &first_come)).unwrap();
    assert_eq!(first_come.expected(5), Some(right_ones[5]));

    // Consistent in itself, and not the other server's answers.
    let other = fake::start(Role::Memo, |_| {
        Box::new(|_, frame, replies| {
            let class = (class_of(frame.body) + 1) % 10;
            replies.push(classified(frame.header.id, class, Origin::Hit));
            Then::Continue
        })
    });
    go(&plan(other)).unwrap();
    assert_eq!(wrong(go(&with(other, &first_come))).wrong, 1000);
}

#[test]
fn replies_may_come_in_any_order() {
    let addr = fake::start(Role::Memo, |_| {
        let mut held = Vec::new();
        Box::new(move |n, frame, replies| {
            held.push(right(frame));
            // Every eighth request lets eight replies go, the last first.
            if n % 8 == 7 {
                replies.extend(held.drain(..).rev());
            }
            Then::Continue
        })
    });
    let report = go(&plan(addr)).unwrap();
    assert_eq!(report.answered, 1000);
}

#[test]
fn a_second_reply_and_a_reply_to_nothing_fail_the_run() {
    let addr = fake::start(Role::Memo, |_| {
        Box::new(|n, frame, replies| {
            replies.push(right(frame));
            if n == 10 {
                replies.push(right(frame));
            }
            if n == 20 {
                replies.push(classified(u64::MAX, 1, Origin::Miss));
            }
            Then::Continue
        })
    });
    let report = wrong(go(&plan(addr)));
    assert_eq!((report.unexpected, report.wrong), (2, 0));
}

#[test]
fn error_replies_are_counted_by_status_and_are_no_answers() {
    let addr = fake::start(Role::Memo, |_| {
        Box::new(|n, frame, replies| {
            replies.push(match n % 10 {
                3 => error(frame.header.id, Status::Overloaded),
                7 if n < 100 => error(frame.header.id, Status::Unknown(999)),
                _ => right(frame),
            });
            Then::Continue
        })
    });
    let report = go(&plan(addr)).unwrap();
    assert_eq!((report.answered, report.failed), (890, 110));
    assert_eq!(report.errors["overloaded"], 100);
    assert_eq!(report.errors["unknown status 999"], 10);
    assert_eq!(report.latency_from_due.count, 890);
    assert_eq!(report.outcomes[&Outcome::Failed].from_due.count, 110);
    assert_eq!(report.problems(), ["110 error replies"]);
}

#[test]
fn latencies_are_split_by_how_answers_came_about() {
    let addr = fake::start(Role::Memo, |_| {
        Box::new(|n, frame, replies| {
            let origin = match n % 4 {
                0 => Origin::Miss,
                1 => Origin::Coalesced,
                _ => Origin::Hit,
            };
            replies.push(classified(frame.header.id, class_of(frame.body), origin));
            Then::Continue
        })
    });
    let report = go(&plan(addr)).unwrap();
    let count = |outcome| report.outcomes[&outcome].from_sent.count;
    assert_eq!(count(Outcome::Miss), 250);
    assert_eq!(count(Outcome::Coalesced), 250);
    assert_eq!(count(Outcome::Hit), 500);
    assert_eq!(report.hit_ratio, Some(0.5));
}

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

#[test]
fn says_why_a_server_is_not_the_one_to_measure() {
    let nobody = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    assert!(matches!(go(&plan(nobody)), Err(BenchError::Connect { .. })));

    let closed = fake::start_with(fake::welcome(Role::Memo), b"secret", |_| proper());
    assert!(matches!(
        go(&plan(closed)),
        Err(BenchError::Refused { status: Status::Unauthenticated, .. })
    ));
    let report = go(&Plan { token: b"secret".to_vec(), ..plan(closed) }).unwrap();
    assert_eq!(report.answered, 1000);
    assert!(!serde_json::to_string(&report).unwrap().contains("secret"));

    // The other thread must not wait for ever for the one that failed.
    let pinned = Plan { pin: vec![1_000_000], threads: 2, connections: 2, ..plan(closed) };
    let pinned = Plan { token: b"secret".to_vec(), ..pinned };
    assert!(matches!(go(&pinned), Err(BenchError::Pin { cpu: 1_000_000, .. })));

    let other = fake::start(Role::Cache, |_| proper());
    assert!(matches!(go(&plan(other)), Err(BenchError::Service { service: Role::Cache, .. })));

    let mut welcome = fake::welcome(Role::Classifier);
    welcome.shape = Shape::new(&[32, 32, 3]).unwrap();
    let other = fake::start_with(welcome, b"", |_| proper());
    assert!(matches!(go(&plan(other)), Err(BenchError::Shape { image_len: 784, .. })));
}

#[test]
fn refuses_plans_that_contradict_themselves() {
    let addr = "127.0.0.1:1".parse().unwrap();
    let rate = |rate| Mode::Open { rate, arrivals: Arrivals::Constant };
    for (field, plan) in [
        ("connections", Plan { connections: 0, ..plan(addr) }),
        ("threads", Plan { threads: 2, ..plan(addr) }),
        ("depth", Plan { depth: 0, ..plan(addr) }),
        ("rate", Plan { mode: rate(0.0), ..plan(addr) }),
        ("rate", Plan { mode: rate(f64::NAN), ..plan(addr) }),
        ("timeout", Plan { timeout: Duration::ZERO, ..plan(addr) }),
        ("exponent", Plan { access: Access::Zipf { exponent: -1.0 }, ..plan(addr) }),
        ("warm-up", Plan { access: Access::EachOnce, warmup: Span::Requests(1), ..plan(addr) }),
        ("read share", cache_plan(addr, 1.5)),
    ] {
        match go(&plan) {
            Err(BenchError::Plan { what }) => assert!(what.contains(field), "{what}"),
            other => panic!("{field}: {other:?}"),
        }
    }
}
