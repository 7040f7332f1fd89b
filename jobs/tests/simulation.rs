//! Random histories of clients, workers, clock and disk, on virtual time. Every rule is checked
//! against a model of its own, and a faulty state machine for each rule must be caught.

#![allow(clippy::unwrap_used)]

use std::collections::{BTreeMap, HashMap};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::Duration;

use afterimage_jobs::engine::Decide;
use afterimage_jobs::machine::{Step, decide};
use afterimage_jobs::{
    Action, Attach, Changes, Code, Command, Definition, Engine, Event, Grant, Job, JobId, Kind,
    Outcome, Record, Recovered, Refused, Row, State, Submit, Timestamp, Token, Verdict, WorkerId,
};
use bytes::Bytes;
use proptest::prelude::*;

const LEASE: Duration = Duration::from_millis(1500);
const DEADLINE: Duration = Duration::from_millis(2500);

const HOUR: Duration = Duration::from_secs(3600);

/// The function that all workers compute.
fn f(input: &[u8]) -> Bytes {
    input.iter().rev().map(|byte| byte ^ 0x5a).collect()
}

fn definitions() -> Vec<Definition> {
    let of = |name: &str, memory| {
        Definition::new(name)
            .memory(memory)
            .max_attempts(1000)
            .backoff(Duration::from_millis(50), Duration::from_millis(400))
            .lease(LEASE)
            .deadline(DEADLINE)
    };
    vec![of("function", true), of("effect", false).concurrency(2)]
}

/// A disk that has the rows of all commits, and loses everything else in a crash.
#[derive(Default)]
struct Disk {
    kinds: BTreeMap<String, Kind>,
    jobs: BTreeMap<JobId, (Record, Option<Action>, Bytes)>,
    events: Vec<Event>,
    results: BTreeMap<JobId, (Option<u64>, u64, Bytes)>,
    epoch: u32,
}

impl Disk {
    fn commit(&mut self, rows: Vec<Row>) {
        for row in rows {
            match row {
                Row::Definition(kind) => {
                    self.kinds.insert(kind.definition.name.clone(), kind);
                }
                Row::Insert(record, action, input) => {
                    let before = self.jobs.insert(record.id, (record, action, input));
                    assert!(before.is_none(), "an id is used once");
                }
                Row::Update(record) => {
                    let entry = self.jobs.get_mut(&record.id);
                    entry.expect("only jobs on the disk change").0 = record;
                }
                Row::Event(event) => self.events.push(event),
                Row::Result { id, key, digest, output } => {
                    let short = key.map(|key| u64::from_le_bytes(key.0[..8].try_into().unwrap()));
                    let before = self.results.insert(id, (short, digest, output));
                    assert!(before.is_none(), "a job has one result");
                }
            }
        }
    }

    fn recover(&mut self) -> Recovered {
        self.epoch += 1;
        let live = self.jobs.values().filter(|(record, ..)| !record.state.is_final());
        let known = self.results.iter();
        Recovered {
            kinds: self.kinds.values().cloned().collect(),
            live: live.cloned().collect(),
            known: known
                .filter_map(|(id, (key, digest, _))| Some(((*key)?, *id, *digest)))
                .collect(),
            last_key: self.jobs.keys().last().map_or(0, |id| id.key()),
            last_event: self.events.len() as u64,
            epoch: self.epoch,
        }
    }

    /// Checks the log: dense, and a path of the state graph for each job.
    fn audit(&self) {
        let mut last: HashMap<JobId, &Event> = HashMap::new();
        for (index, event) in self.events.iter().enumerate() {
            assert_eq!(event.position, index as u64 + 1, "the log has no gaps");
            let before = last.insert(event.job, event);
            assert_eq!(event.previous, before.map_or(0, |before| before.position));
            match before {
                None => assert!(matches!(event.state, State::Queued | State::Delayed)),
                Some(before) => {
                    let is_step = before.state.next().contains(&event.state);
                    assert!(is_step, "{} to {} is not a step", before.state, event.state);
                }
            }
            let is_lease = event.state == State::Leased;
            let attempts = before.map_or(0, |before| before.attempt) + u32::from(is_lease);
            assert_eq!(event.attempt, attempts, "one attempt for each lease");
        }
        for (id, (record, ..)) in &self.jobs {
            let state = last.get(id).expect("a job has events").state;
            assert_eq!(record.state, state, "the job is in the state of its last event");
            assert_eq!(record.ended.is_some(), state.is_final());
            assert_eq!(self.results.contains_key(id), state == State::Succeeded);
        }
        for (id, (.., output)) in &self.results {
            assert_eq!(*output, f(&self.jobs[id].2), "a result is f of its input");
        }
    }
}

/// A lease, as the model of the simulation has it.
#[derive(Clone, Copy)]
struct Held {
    token: Token,
    until: Timestamp,
    deadline: Timestamp,
}

struct Simulation {
    engine: Engine,
    decide: Decide,
    disk: Disk,
    changes: Changes,
    now: Timestamp,
    workers: HashMap<WorkerId, Vec<Grant>>,
    /// Grants of workers that the server has forgotten. They still report ends.
    strays: Vec<Grant>,
    /// The newest lease of each job.
    held: HashMap<JobId, Held>,
    acked: Vec<JobId>,
    next_worker: u64,
    random: u64,
}

impl Simulation {
    fn new(decide: Decide) -> Self {
        let (mut disk, mut changes) = (Disk::default(), Changes::default());
        let now = Timestamp(1_700_000_000_000);
        let mut engine = Engine::recover(disk.recover(), now, &mut changes).with_decide(decide);
        for definition in definitions() {
            engine.define(definition, &mut changes).unwrap();
        }
        let mut simulation = Simulation {
            engine,
            decide,
            disk,
            changes,
            now,
            workers: HashMap::new(),
            strays: Vec::new(),
            held: HashMap::new(),
            acked: Vec::new(),
            next_worker: 1,
            random: 1,
        };
        simulation.commit();
        simulation
    }

    fn commit(&mut self) {
        self.disk.commit(std::mem::take(&mut self.changes.rows));
        self.changes.urgent = false;
        self.changes.remembered.clear();
        for (record, output) in std::mem::take(&mut self.changes.ended) {
            assert!(record.state.is_final());
            assert_eq!(output.is_some(), record.state == State::Succeeded);
            self.held.remove(&record.id);
        }
        for (worker, grant) in std::mem::take(&mut self.changes.grants) {
            let lease = Held {
                token: grant.token,
                until: self.now.after(LEASE),
                deadline: self.now.after(DEADLINE),
            };
            if let Some(before) = self.held.insert(grant.id, lease) {
                assert!(before.token < grant.token, "tokens increase");
            }
            match self.workers.get_mut(&worker) {
                Some(grants) => grants.push(grant),
                None => self.strays.push(grant),
            }
        }
        self.engine.validate();
    }

    fn submit(&mut self, definition: usize, input: u8, delay: u64, expires: u64) {
        let name = &definitions()[definition].name;
        let mut submit = Submit::new(name.clone(), vec![input, 1, 2]);
        (submit.delay, submit.expires) = (millis(delay), millis(expires));
        if let Some((_, id)) = self.engine.lookup(&submit) {
            // The server reads the result from the disk.
            let (.., output) = &self.disk.results[&id];
            assert_eq!(*output, f(&submit.input), "a remembered result is f of the input");
            return;
        }
        self.random += 1;
        let submitted = self.engine.submit(submit, self.random, self.now, &mut self.changes);
        let id = submitted.unwrap().id;
        self.commit();
        self.acked.push(id);
    }

    fn attach(&mut self, jobs: u32) {
        let worker = WorkerId(self.next_worker);
        self.next_worker += 1;
        let code = Code::of(&[b"code"]);
        let definitions = definitions().into_iter().map(|one| (one, code)).collect();
        let attach = Attach { name: format!("w{}", worker.0), definitions };
        self.engine.attach(worker, attach, &mut self.changes).unwrap();
        self.workers.insert(worker, Vec::new());
        self.engine.credit(worker, jobs, self.now, &mut self.changes);
        self.commit();
    }

    fn pick(&self, choice: usize) -> Option<WorkerId> {
        let mut ids: Vec<WorkerId> = self.workers.keys().copied().collect();
        ids.sort_unstable();
        ids.get(choice % ids.len().max(1)).copied()
    }

    fn detach(&mut self, choice: usize) {
        let Some(worker) = self.pick(choice) else { return };
        self.engine.detach(worker, self.now);
        let grants = self.workers.remove(&worker).unwrap();
        for grant in &grants {
            if let Some(held) =
                self.held.get_mut(&grant.id).filter(|held| held.token == grant.token)
            {
                held.until = held.until.min(self.now.after(afterimage_jobs::machine::GRACE));
            }
        }
        self.strays.extend(grants);
        self.commit();
    }

    /// Whether the model says that this lease is alive.
    fn is_held(&self, id: JobId, token: Token) -> bool {
        self.held.get(&id).is_some_and(|held| held.token == token)
    }

    fn beat(&mut self, choice: usize) {
        let Some(worker) = self.pick(choice) else { return };
        for grant in self.workers[&worker].clone() {
            let lease = (grant.id, grant.token);
            let verdict = self.engine.beat(worker, lease, Bytes::new(), self.now);
            if verdict != Verdict::Stop {
                assert!(self.is_held(grant.id, grant.token), "a stale lease was extended");
                self.held.get_mut(&grant.id).unwrap().until = self.now.after(LEASE);
            }
        }
    }

    fn finish(&mut self, choice: usize, job: usize, outcome: u8) {
        let Some(worker) = self.pick(choice) else { return };
        let grants = self.workers.get_mut(&worker).unwrap();
        if grants.is_empty() {
            return;
        }
        let grant = grants.swap_remove(job % grants.len());
        self.end(worker, grant, outcome);
    }

    /// A worker that the server has forgotten reports an end on another one's connection.
    fn stray(&mut self, choice: usize, job: usize, outcome: u8) {
        let Some(worker) = self.pick(choice) else { return };
        if self.strays.is_empty() {
            return;
        }
        let grant = self.strays.swap_remove(job % self.strays.len());
        self.end(worker, grant, outcome);
    }

    fn end(&mut self, worker: WorkerId, grant: Grant, outcome: u8) {
        let outcome = match outcome % 4 {
            0 => Outcome::Failed { error: "no".into(), retry: true },
            _ => Outcome::Succeeded(f(&grant.input)),
        };
        let lease = (grant.id, grant.token);
        let finished = self.engine.finish(worker, lease, outcome, self.now, &mut self.changes);
        match finished {
            Ok(()) => {
                assert!(self.is_held(grant.id, grant.token), "a stale token has ended a job");
                self.held.remove(&grant.id);
            }
            Err(error) => assert_eq!(error, Refused::StaleToken(grant.id)),
        }
        self.commit();
    }

    fn cancel(&mut self, choice: usize) {
        if self.acked.is_empty() {
            return;
        }
        let id = self.acked[choice % self.acked.len()];
        let is_live = self.engine.job(id).is_some();
        let cancelled = self.engine.cancel(id, self.now, &mut self.changes);
        assert_eq!(cancelled.is_ok(), is_live);
        self.commit();
        assert!(self.engine.job(id).is_none(), "a cancelled job has ended");
    }

    fn pass(&mut self, time: u64) {
        self.now = self.now.after(millis(time));
        self.engine.tick(self.now, &mut self.changes);
        // Every lease that is over by the model is over by the engine.
        let over: Vec<JobId> = self
            .held
            .iter()
            .filter(|(_, held)| held.until.min(held.deadline) <= self.now)
            .map(|(id, _)| *id)
            .collect();
        let now: HashMap<JobId, Token> =
            self.changes.grants.iter().map(|(_, grant)| (grant.id, grant.token)).collect();
        for id in over {
            let token = self.held[&id].token;
            let lease =
                self.engine.jobs().find(|job| job.id == id).and_then(|job| job.lease.clone());
            assert!(lease.is_none_or(|lease| lease.token != token), "a dead lease is alive");
            if !now.contains_key(&id) {
                self.held.remove(&id);
            }
        }
        self.commit();
    }

    /// Jobs are leased, and the server dies before it writes the leases.
    fn lose_leases(&mut self, jobs: u32) {
        if let Some(worker) = self.pick(0) {
            self.engine.credit(worker, jobs, self.now, &mut self.changes);
            let grants = std::mem::take(&mut self.changes.grants);
            self.strays.extend(grants.into_iter().map(|(_, grant)| grant));
        }
        self.crash();
    }

    /// The server dies. Rows without a commit are lost.
    fn crash(&mut self) {
        self.changes = Changes::default();
        let recovered = self.disk.recover();
        self.engine =
            Engine::recover(recovered, self.now, &mut self.changes).with_decide(self.decide);
        for (_, grants) in self.workers.drain() {
            self.strays.extend(grants);
        }
        self.held.clear();
        self.commit();
    }

    /// Lets healthy workers end all jobs, and checks the whole history.
    fn drain(&mut self) {
        for round in 0..2000 {
            if self.engine.jobs().next().is_none() {
                break;
            }
            if self.workers.is_empty() {
                self.attach(4);
            }
            self.pass(100);
            for choice in 0..self.workers.len() {
                self.beat(choice);
                self.finish(choice, 0, 1);
            }
            assert!(round < 1999, "jobs do not end: {:?}", self.engine.jobs().next());
        }
        for id in &self.acked {
            assert!(self.disk.jobs[id].0.state.is_final(), "an accepted job has ended");
        }
        self.disk.audit();
        assert!(self.disk.kinds.values().all(|kind| kind.unstable.is_none()));
    }
}

fn millis(time: u64) -> Duration {
    Duration::from_millis(time)
}

#[derive(Clone, Debug)]
enum Act {
    Submit { definition: usize, input: u8, delay: u64, expires: u64 },
    Attach(u32),
    Detach(usize),
    Beat(usize),
    Finish(usize, usize, u8),
    Stray(usize, usize, u8),
    Cancel(usize),
    Pass(u64),
    Crash,
    LoseLeases(u32),
}

fn act() -> impl Strategy<Value = Act> {
    let rarely = |most: u64| prop_oneof![4 => Just(0), 1 => 1..most];
    prop_oneof![
        8 => (0..2_usize, 0..12_u8, rarely(2000), rarely(8000)).prop_map(
            |(definition, input, delay, expires)| Act::Submit { definition, input, delay, expires }
        ),
        2 => (1..4_u32).prop_map(Act::Attach),
        1 => any::<usize>().prop_map(Act::Detach),
        4 => any::<usize>().prop_map(Act::Beat),
        8 => any::<(usize, usize, u8)>().prop_map(|(a, b, c)| Act::Finish(a, b, c)),
        3 => any::<(usize, usize, u8)>().prop_map(|(a, b, c)| Act::Stray(a, b, c)),
        1 => any::<usize>().prop_map(Act::Cancel),
        6 => (1..900_u64).prop_map(Act::Pass),
        1 => Just(Act::Crash),
        1 => (1..6_u32).prop_map(Act::LoseLeases),
    ]
}

fn simulate(acts: &[Act], decide: Decide) {
    let mut simulation = Simulation::new(decide);
    for act in acts {
        match *act {
            Act::Submit { definition, input, delay, expires } => {
                simulation.submit(definition, input, delay, expires);
            }
            Act::Attach(jobs) => simulation.attach(jobs),
            Act::Detach(choice) => simulation.detach(choice),
            Act::Beat(choice) => simulation.beat(choice),
            Act::Finish(choice, job, outcome) => simulation.finish(choice, job, outcome),
            Act::Stray(choice, job, outcome) => simulation.stray(choice, job, outcome),
            Act::Cancel(choice) => simulation.cancel(choice),
            Act::Pass(time) => simulation.pass(time),
            Act::Crash => simulation.crash(),
            Act::LoseLeases(jobs) => simulation.lose_leases(jobs),
        }
    }
    simulation.drain();
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, ..ProptestConfig::default() })]

    #[test]
    fn every_history_keeps_the_rules(acts in prop::collection::vec(act(), 1..150)) {
        simulate(&acts, decide);
    }
}

/// Whether one of some random histories shows that this state machine is faulty.
fn is_caught(faulty: Decide) -> bool {
    use proptest::strategy::ValueTree as _;
    let mut runner = proptest::test_runner::TestRunner::deterministic();
    let histories = prop::collection::vec(act(), 150);
    (0..200).any(|_| {
        let acts = histories.new_tree(&mut runner).unwrap().current();
        catch_unwind(AssertUnwindSafe(|| simulate(&acts, faulty))).is_err()
    })
}

type Decided = Result<Step, Refused>;

/// A faulty state machine for each rule.
const FAULTS: [(&str, Decide); 6] = [
    ("a finish is accepted with any token", |job, command, definition, now| match command {
        Command::Finish(_, outcome) if job.lease.is_some() => {
            let token = job.lease.as_ref().unwrap().token;
            decide(job, Command::Finish(token, outcome), definition, now)
        }
        command => decide(job, command, definition, now),
    }),
    ("a heartbeat is accepted with any token", |job, command, definition, now| match command {
        Command::Beat(_, worker) if job.lease.is_some() => {
            let token = job.lease.as_ref().unwrap().token;
            decide(job, Command::Beat(token, worker), definition, now)
        }
        command => decide(job, command, definition, now),
    }),
    ("a heartbeat extends the deadline", |job, command, definition, now| {
        let is_beat = matches!(command, Command::Beat(..));
        let decided = decide(job, command, definition, now);
        if let (true, Ok(_), Some(lease)) = (is_beat, &decided, &mut job.lease) {
            lease.deadline = now.after(definition.deadline);
        }
        decided
    }),
    ("a closed connection does not end leases", |job, command, definition, now| match command {
        Command::Disconnect(_) => Ok(Step::None),
        command => decide(job, command, definition, now),
    }),
    ("a lease never ends", |job, command, definition, now| {
        if command == Command::Tick
            && let Some(lease) = &mut job.lease
        {
            (lease.until, lease.deadline) = (now.after(HOUR), now.after(HOUR));
            job.expires = None;
            return Ok(Step::None);
        }
        decide(job, command, definition, now)
    }),
    ("a cancelled job is queued", |job: &mut Job, command, definition, now| -> Decided {
        let is_cancel = command == Command::Cancel;
        let decided = decide(job, command, definition, now)?;
        if is_cancel {
            job.state = State::Queued;
            return Ok(Step::To(State::Queued, String::new()));
        }
        Ok(decided)
    }),
];

#[test]
fn a_fault_in_each_rule_is_caught() {
    std::panic::set_hook(Box::new(|_| {}));
    let caught: Vec<(&str, bool)> =
        FAULTS.iter().map(|(name, faulty)| (*name, is_caught(*faulty))).collect();
    let _ = std::panic::take_hook();
    assert!(!is_caught(decide), "the right one keeps the rules");
    for (name, caught) in caught {
        assert!(caught, "not caught: {name}");
    }
}
