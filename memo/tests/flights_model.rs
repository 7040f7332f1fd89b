//! The flights and the task that expires waiters, checked by loom in every interleaving that the
//! memory model allows: `RUSTFLAGS="--cfg loom" CARGO_TARGET_DIR=target/loom cargo test --release
//! -p afterimage-memo --test flights_model`.
//!
//! The rest of the service is as small as possible: a store of one value, a classifier that answers
//! or fails, and callers that count their replies.

#![cfg(loom)]

use loom::sync::Arc;
use loom::sync::atomic::{AtomicUsize, Ordering::Relaxed, Ordering::SeqCst};
use loom::thread;

use afterimage_memo::flights::{Flights, Join};
use afterimage_memo::single_task::SingleTask;

/// The reply that a caller got.
const NOTHING: usize = 0;
const LABEL: usize = 1;
const ERROR: usize = 2;
const LATE: usize = 3;
const FULL: usize = 4;

/// The state that all callers share.
struct World {
    flights: Flights<usize>,
    /// Whether the store has the answer.
    stored: AtomicUsize,
    calls: AtomicUsize,
    /// The number of calls that still fail.
    failing: AtomicUsize,
    /// Callers with a lower number have a deadline that has passed. The others have none.
    late: usize,
    /// The reply of each caller.
    told: Vec<AtomicUsize>,
}

impl World {
    fn new(callers: usize, failing: usize, max_waiting: usize) -> Arc<World> {
        Arc::new(World::of(callers, failing, max_waiting))
    }

    /// A world whose first `late` callers have no time left.
    fn with_late(late: usize, callers: usize) -> Arc<World> {
        Arc::new(World { late, ..World::of(callers, 0, 9) })
    }

    fn of(callers: usize, failing: usize, max_waiting: usize) -> World {
        World {
            flights: Flights::new(max_waiting),
            stored: AtomicUsize::new(0),
            calls: AtomicUsize::new(0),
            failing: AtomicUsize::new(failing),
            late: 0,
            told: (0..callers).map(|_| AtomicUsize::new(NOTHING)).collect(),
        }
    }

    fn tell(&self, caller: usize, what: usize) {
        let before = self.told[caller].swap(what, Relaxed);
        assert_eq!(before, NOTHING, "caller {caller} was told twice");
    }

    /// A request, as the memo handles it with an embedded store: it joins a flight, and the first
    /// waiter of the flight owes the answer.
    fn ask(&self, caller: usize, key: u128) {
        match self.flights.join(key, caller) {
            Join::Joined => {}
            Join::Full(caller) => self.tell(caller, FULL),
            Join::First(permit) => self.fly(caller, permit.transfer()),
        }
    }

    /// The same, after the check of the limit that refuses most requests before they join.
    fn ask_if_there_is_room(&self, caller: usize, key: u128) {
        match self.flights.is_full() {
            true => self.tell(caller, FULL),
            false => self.ask(caller, key),
        }
    }

    /// The duty of the first waiter: look up again, call if the call is wanted, write, complete.
    fn fly(&self, first: usize, key: u128) {
        let mut answer = LABEL;
        if self.stored.load(Relaxed) == 0 {
            // A flight that a caller without a deadline started is not searched: this caller stays
            // until the flight completes.
            if first < self.late && !self.is_wanted(key) {
                return;
            }
            self.calls.fetch_add(1, Relaxed);
            if self.failing.load(Relaxed) > 0 {
                self.failing.fetch_sub(1, Relaxed);
                answer = ERROR;
            } else {
                self.stored.store(1, Relaxed);
            }
        }
        for waiter in self.flights.complete(key) {
            self.tell(waiter, answer);
        }
    }

    /// Whether a waiter of the flight has time left; asked before an input is scored. If none has,
    /// the flight has ended.
    fn is_wanted(&self, key: u128) -> bool {
        let has_time =
            |waiters: &[usize]| waiters.iter().find(|&&caller| caller >= self.late).copied();
        let ended = self.flights.complete_unless(key, has_time).err();
        for &caller in ended.iter().flatten() {
            self.tell(caller, LATE);
        }
        ended.is_none()
    }

    /// Removes the waiters whose time is over.
    fn sweep(&self, leaves: impl FnMut(&usize) -> bool) {
        for caller in self.flights.remove_if(leaves) {
            self.tell(caller, LATE);
        }
    }

    fn told(&self, caller: usize) -> usize {
        self.told[caller].load(Relaxed)
    }

    /// Checks after the end of all threads that each caller got a reply and that no state remains.
    fn assert_settled(&self) {
        for caller in 0..self.told.len() {
            assert_ne!(self.told(caller), NOTHING, "caller {caller} was told nothing");
        }
        assert_eq!((self.flights.waiting(), self.flights.under_way()), (0, 0));
    }
}

fn spawn(world: &Arc<World>, act: impl FnOnce(&World) + 'static) -> thread::JoinHandle<()> {
    let world = Arc::clone(world);
    thread::spawn(move || act(&world))
}

/// Joins as waiter 0. Returns whether this starts a flight.
fn begins(flights: &Flights<usize>, key: u128) -> bool {
    match flights.join(key, 0) {
        Join::First(permit) => permit.transfer() == key,
        _ => false,
    }
}

fn join(threads: impl IntoIterator<Item = thread::JoinHandle<()>>) {
    for thread in threads {
        thread.join().expect("no caller panics");
    }
}

#[test]
fn two_callers_make_one_call_and_both_get_its_label() {
    loom::model(|| {
        let world = World::new(2, 0, 9);
        let other = spawn(&world, |world| world.ask(0, 7));
        world.ask(1, 7);
        join([other]);
        world.assert_settled();
        assert_eq!(world.calls.load(Relaxed), 1);
        assert_eq!([world.told(0), world.told(1)], [LABEL; 2]);
    });
}

#[test]
fn three_callers_make_one_call_and_all_get_its_label() {
    loom::model(|| {
        let world = World::new(3, 0, 9);
        let others = [spawn(&world, |w| w.ask(0, 7)), spawn(&world, |w| w.ask(1, 7))];
        world.ask(2, 7);
        join(others);
        world.assert_settled();
        assert_eq!(world.calls.load(Relaxed), 1);
        assert_eq!([world.told(0), world.told(1), world.told(2)], [LABEL; 3]);
    });
}

#[test]
fn a_failed_call_fails_its_waiters_and_the_next_one_calls() {
    loom::model(|| {
        let world = World::new(3, 1, 9);
        let other = spawn(&world, |world| world.ask(0, 7));
        world.ask(1, 7);
        join([other]);
        let failed = [0, 1].iter().filter(|&&caller| world.told(caller) == ERROR).count();
        // Both callers on the flight that failed, or one after the other.
        let calls = world.calls.load(Relaxed);
        assert_eq!((failed, calls), if failed == 2 { (2, 1) } else { (1, 2) });
        assert_eq!(world.stored.load(Relaxed), 2 - failed, "an error is never stored");
        world.ask(2, 7);
        world.assert_settled();
        assert_eq!((world.told(2), world.calls.load(Relaxed)), (LABEL, 2));
    });
}

#[test]
fn an_expired_waiter_is_answered_once_and_the_call_continues() {
    loom::model(|| {
        let world = World::new(2, 0, 9);
        // Caller 0 has no time left. It may be the first waiter.
        let others = [spawn(&world, |w| w.ask(0, 7)), spawn(&world, |w| w.sweep(|&c| c == 0))];
        world.ask(1, 7);
        join(others);
        world.assert_settled();
        assert_eq!(world.calls.load(Relaxed), 1);
        assert_eq!(world.told(1), LABEL);
        assert!([LABEL, LATE].contains(&world.told(0)));
    });
}

#[test]
fn expiry_and_completion_answer_no_waiter_twice() {
    loom::model(|| {
        let world = World::new(1, 0, 9);
        let others = [spawn(&world, |w| w.sweep(|_| true)), spawn(&world, |w| w.sweep(|_| true))];
        world.ask(0, 7);
        join(others);
        world.assert_settled();
    });
}

#[test]
fn a_call_without_time_left_is_not_made_and_all_are_answered() {
    loom::model(|| {
        let world = World::with_late(2, 2);
        let other = spawn(&world, |world| world.ask(0, 7));
        world.ask(1, 7);
        join([other]);
        world.assert_settled();
        assert_eq!(world.calls.load(Relaxed), 0);
        assert_eq!([world.told(0), world.told(1)], [LATE; 2]);
    });
}

#[test]
fn joining_an_ending_flight_keeps_it_or_starts_another() {
    loom::model(|| {
        let world = World::with_late(1, 2);
        let other = spawn(&world, |world| world.ask(0, 7));
        world.ask(1, 7);
        join([other]);
        world.assert_settled();
        assert_eq!(world.calls.load(Relaxed), 1);
        assert_eq!(world.told(1), LABEL);
        assert!([LABEL, LATE].contains(&world.told(0)));
    });
}

#[test]
fn of_successive_callers_only_the_one_with_time_left_calls() {
    loom::model(|| {
        let world = World::with_late(2, 3);
        let other = spawn(&world, |world| {
            world.ask(0, 7);
            world.ask(1, 7);
        });
        world.ask(2, 7);
        join([other]);
        world.assert_settled();
        assert_eq!(world.calls.load(Relaxed), 1);
        assert_eq!(world.told(2), LABEL);
        assert!((0..2).all(|caller| [LABEL, LATE].contains(&world.told(caller))));
    });
}

#[test]
fn an_emptied_flight_ends_or_continues_for_a_new_waiter() {
    loom::model(|| {
        let world = World::with_late(1, 2);
        assert!(begins(&world.flights, 7));
        world.sweep(|&caller| caller == 0);
        let other = spawn(&world, |world| world.fly(0, 7));
        world.ask(1, 7);
        join([other]);
        world.assert_settled();
        assert_eq!(world.calls.load(Relaxed), 1);
        assert_eq!([world.told(0), world.told(1)], [LATE, LABEL]);
    });
}

#[test]
fn callers_past_the_cap_are_turned_away_and_leave_no_trace() {
    loom::model(|| {
        let world = World::new(3, 0, 1);
        let others = [
            spawn(&world, |world| world.ask_if_there_is_room(0, 7)),
            spawn(&world, |world| world.ask_if_there_is_room(1, 1 << 127)),
        ];
        world.ask_if_there_is_room(2, 7);
        join(others);
        world.assert_settled();
        assert!((0..3).any(|caller| world.told(caller) == LABEL), "at least one has room");
        assert!(begins(&world.flights, 7), "the place is free again");
    });
}

#[test]
fn a_need_that_arises_as_the_sweeper_leaves_finds_one() {
    loom::model(|| {
        let (task, needs) = (Arc::new(SingleTask::new()), Arc::new(AtomicUsize::new(1)));
        assert!(task.start());
        let boarding = {
            let (task, needs) = (Arc::clone(&task), Arc::clone(&needs));
            thread::spawn(move || {
                needs.fetch_add(1, Relaxed);
                task.start()
            })
        };
        // The other thread expires the waiters that it has seen.
        needs.fetch_sub(1, Relaxed);
        let stays = !task.stop(|| needs.load(Relaxed) > 0);
        let took_over = boarding.join().unwrap();
        assert_eq!(needs.load(SeqCst), 1);
        assert!(stays ^ took_over, "one sweeper: the old one stays {stays}, a new one {took_over}");
    });
}

/// Requests of several rows, as the memo handles those for bytes: all rows join, and one call is
/// made for the rows whose flights begin here and that the store lacks.
struct Rows {
    flights: Flights<usize>,
    /// Whether the store has the answer of each row.
    stored: [AtomicUsize; 2],
    /// The calls for each row.
    calls: [AtomicUsize; 2],
    /// The reply of each row of each request: `LABEL` and the number of the row.
    told: [AtomicUsize; 4],
}

impl Rows {
    fn new() -> Arc<Rows> {
        Arc::new(Rows {
            flights: Flights::new(9),
            stored: Default::default(),
            calls: Default::default(),
            told: Default::default(),
        })
    }

    /// The request with this number for two rows.
    fn ask(&self, request: usize, rows: [usize; 2]) {
        let mut owed = Vec::new();
        for (position, row) in rows.into_iter().enumerate() {
            match self.flights.join(row as u128, 2 * request + position) {
                Join::First(permit) => owed.push(permit.transfer() as usize),
                Join::Joined => {}
                Join::Full(_) => panic!("there is room"),
            }
        }
        // As with labels: a flight may have completed between the lookup and the join.
        let is_stored = |row: &usize| self.stored[*row].load(Relaxed) == 1;
        let (found, missing): (Vec<usize>, Vec<usize>) = owed.into_iter().partition(is_stored);
        found.into_iter().for_each(|row| self.complete(row));
        for &row in &missing {
            self.calls[row].fetch_add(1, Relaxed);
            self.stored[row].store(1, Relaxed);
        }
        missing.into_iter().for_each(|row| self.complete(row));
    }

    fn complete(&self, row: usize) {
        for waiter in self.flights.complete(row as u128) {
            let before = self.told[waiter].swap(LABEL + row, Relaxed);
            assert_eq!(before, NOTHING, "row {waiter} was told twice");
        }
    }
}

/// Two requests of two rows at once: each row is computed once and answered in its place.
fn two_requests(one: [usize; 2], other: [usize; 2]) {
    loom::model(move || {
        let rows = Rows::new();
        let thread = {
            let rows = Arc::clone(&rows);
            thread::spawn(move || rows.ask(0, one))
        };
        rows.ask(1, other);
        join([thread]);
        for (told, row) in rows.told.iter().zip(one.into_iter().chain(other)) {
            assert_eq!(told.load(Relaxed), LABEL + row, "{one:?} and {other:?}");
        }
        let calls = |row: usize| rows.calls[row].load(Relaxed);
        let asked = |row: usize| usize::from(one.contains(&row) || other.contains(&row));
        assert_eq!([calls(0), calls(1)], [asked(0), asked(1)]);
        assert_eq!((rows.flights.waiting(), rows.flights.under_way()), (0, 0));
    });
}

#[test]
fn rows_of_two_requests_are_computed_once_and_in_order() {
    two_requests([0, 1], [0, 1]);
    two_requests([0, 1], [1, 0]);
    two_requests([0, 0], [0, 1]);
}
