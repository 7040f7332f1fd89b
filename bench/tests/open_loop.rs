//! The open loop keeps its schedule for any behaviour of the server, and reports the fate of every
//! request.

// The exemption for tests does not reach the helpers beside them.
#![allow(clippy::unwrap_used)]

mod fake;

use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use afterimage_bench::workload::Population;
use afterimage_bench::{Arrivals, Mode, Plan, Span, run};
use afterimage_wire::proto::Role;
use fake::{Then, proper, right};

fn plan(addr: SocketAddr, rate: f64, time: Duration) -> Plan {
    Plan {
        mode: Mode::Open { rate, arrivals: Arrivals::Constant },
        stop: Span::Time(time),
        ..Plan::classify(addr, Arc::new(Population::drawn(1, 100)))
    }
}

/// The generator's self-test. One connection with a window of one sends 1000 requests a second for
/// two seconds; halfway the server sleeps for 200 ms. So 200 requests are due while it sleeps, and
/// the one that is due k ms after its beginning waits 200 - k ms: the 20th worst of 2000 waits 180
/// ms, the 100th worst 100 ms. Only one of them was sent in time to be delayed by the server
/// itself.
#[test]
fn a_stall_shows_in_latency_from_due_and_not_from_sent() {
    // Another program on this machine may add a stall of its own: one clean run in five is asked
    // for.
    let mut complaints = Vec::new();
    for _ in 0..5 {
        match stall() {
            Ok(()) => return,
            Err(complaint) => complaints.push(complaint),
        }
    }
    panic!("{}", complaints.join("\n"));
}

fn stall() -> Result<(), String> {
    let slept = Arc::new(Mutex::new(Duration::ZERO));
    let note = Arc::clone(&slept);
    let addr = fake::start(Role::Memo, move |_| {
        let note = Arc::clone(&note);
        Box::new(move |n, frame, replies| {
            if n == 1000 {
                let began = Instant::now();
                std::thread::sleep(Duration::from_millis(200));
                *note.lock().unwrap() = began.elapsed();
            }
            replies.push(right(frame));
            Then::Continue
        })
    });
    let report = run(&plan(addr, 1000.0, Duration::from_secs(2)), &mut |_| {}).unwrap();
    assert_eq!((report.sent, report.answered, report.skipped), (2000, 2000, 0));
    let stalled_ms = slept.lock().unwrap().as_secs_f64() * 1e3;
    assert!(stalled_ms >= 200.0);

    let (mut from_due, mut from_sent) = (hist(), hist());
    for latencies in report.histograms.values() {
        from_due.add(&latencies.from_due).unwrap();
        from_sent.add(&latencies.from_sent).unwrap();
    }
    let ms = |ns: u64| ns as f64 / 1e6;
    for (quantile, worst) in [(0.995, 10.0), (0.99, 20.0), (0.975, 50.0), (0.95, 100.0)] {
        let predicted = stalled_ms - worst;
        let measured = ms(from_due.value_at_quantile(quantile));
        if (measured - predicted).abs() > 0.05 * predicted {
            return Err(format!("at {quantile}: {measured:.1} ms, not {predicted:.1}"));
        }
        // The result of a tool without this correction.
        let uncorrected = ms(from_sent.value_at_quantile(quantile));
        if uncorrected > 0.2 * predicted {
            return Err(format!("from sent, at {quantile}: {uncorrected:.1} ms"));
        }
    }
    assert!(ms(from_sent.max()) > 0.95 * stalled_ms, "the one that the server delayed");
    Ok(())
}

fn hist() -> hdrhistogram::Histogram<u64> {
    afterimage_bench::Latencies::default().from_due
}

#[test]
fn every_arrival_is_sent_once_and_the_rate_is_kept() {
    let addr = fake::start(Role::Memo, |_| proper());
    let began = Instant::now();
    let plan =
        Plan { connections: 3, depth: 1000, ..plan(addr, 4000.0, Duration::from_millis(1500)) };
    let report = run(&plan, &mut |_| {}).unwrap();
    assert!(began.elapsed() >= Duration::from_millis(1500));
    assert_eq!((report.sent, report.answered, report.skipped), (6000, 6000, 0));
    assert_eq!(report.measured_s, 1.5);
    // Some of the last answers may come after the end.
    assert!((3000.0..4000.1).contains(&report.throughput_per_s), "{}", report.throughput_per_s);
    assert_eq!(report.settings.rate_per_s, Some(4000.0));
}

#[test]
fn poisson_arrivals_are_those_of_the_seed() {
    let addr = fake::start(Role::Memo, |_| proper());
    let sent = |seed| {
        let plan = Plan {
            mode: Mode::Open { rate: 2000.0, arrivals: Arrivals::Poisson },
            depth: 1000,
            seed,
            ..plan(addr, 2000.0, Duration::from_millis(500))
        };
        run(&plan, &mut |_| {}).unwrap().sent
    };
    let (first, second, third) = (sent(1), sent(1), sent(2));
    assert_eq!(first, second);
    // 1000 expected; five standard deviations are 158.
    assert!((842..=1158).contains(&first), "{first} sent");
    assert!((842..=1158).contains(&third), "{third} sent");
    assert_ne!(first, third, "these two seeds happen to give different numbers");
}

#[test]
fn a_count_ends_an_open_loop_too() {
    let addr = fake::start(Role::Memo, |_| proper());
    let plan = Plan {
        depth: 100,
        stop: Span::Requests(700),
        warmup: Span::Time(Duration::from_millis(100)),
        ..plan(addr, 2000.0, Duration::ZERO)
    };
    let report = run(&plan, &mut |_| {}).unwrap();
    assert_eq!((report.sent, report.answered, report.skipped), (700, 700, 0));
    assert!(report.measured_s > 0.34, "{} s", report.measured_s);
}

#[test]
fn what_was_due_and_never_sent_is_counted() {
    // Answers a hundred requests and then no more, without closing.
    let addr = fake::start(Role::Memo, |_| {
        Box::new(|n, frame, replies| {
            if n < 100 {
                replies.push(right(frame));
            }
            Then::Continue
        })
    });
    let plan = Plan {
        depth: 4,
        timeout: Duration::from_millis(300),
        ..plan(addr, 1000.0, Duration::from_secs(1))
    };
    let began = Instant::now();
    let report = run(&plan, &mut |_| {}).unwrap();
    assert!(began.elapsed() < Duration::from_secs(10));
    assert_eq!(report.answered, 100);
    assert_eq!(report.sent + report.skipped, 1000);
    assert_eq!(report.sent, report.answered + report.timed_out);
    assert!(report.timed_out >= 4 && report.skipped > 500, "{report}");
    assert_eq!(report.problems().len(), 2);
}

#[test]
fn reports_the_progress_of_a_run() {
    let addr = fake::start(Role::Memo, |_| proper());
    let mut heard = Vec::new();
    let plan = Plan {
        depth: 10,
        warmup: Span::Time(Duration::from_millis(600)),
        ..plan(addr, 1000.0, Duration::from_millis(1200))
    };
    run(&plan, &mut |progress| heard.push(progress)).unwrap();
    assert!(heard.len() >= 4, "{heard:?}");
    assert!(!heard[0].measuring && heard[heard.len() - 1].measuring, "{heard:?}");
    assert!(heard.iter().any(|progress| progress.rate > 0.0));
    assert!(heard.windows(2).all(|pair| pair[0].elapsed < pair[1].elapsed));
}
