//! Plans and servers that are refused.

use std::net::TcpListener;
use std::time::Duration;

use afterimage_bench::workload::Access;
use afterimage_bench::{Arrivals, BenchError, Mode, Plan, Span};
use afterimage_wire::Status;
use afterimage_wire::proto::{Role, Shape};

use crate::fake::{self, proper};
use crate::{cache_plan, go, plan};

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
