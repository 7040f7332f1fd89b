//! All jobs of a server: the queue, leases, timers, and the memory of results. Pure: time and
//! randomness are arguments, and changes are returned as rows for the [`Store`](crate::Store).

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use fxhash::FxHashMap;

use crate::action::output_digest;
use crate::job::{Job, Lease, Outcome, Refused, State, Timestamp, Token, WorkerId};
use crate::machine::{Command, Step, decide};
use crate::store::{Event, Kind, Record, Recovered, Row};
use crate::{Action, Code, Definition, Ids, JobId, ResultKey};

/// The longest input and the longest result, in bytes.
pub const MAX_BYTES: usize = 1 << 20;

/// Jobs that have not ended, at most.
const MAX_LIVE: usize = 10_000_000;

/// The longest error or progress message that is kept, in bytes.
const MAX_DETAIL: usize = 1 << 10;

/// The priority of a job that names none.
pub const DEFAULT_PRIORITY: u8 = 100;

/// A job to queue.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Submit {
    /// The definition's name.
    pub definition: String,
    /// The input.
    pub input: Bytes,
    /// Jobs of a higher priority start first. The default is 100.
    pub priority: u8,
    /// The pause before the job is queued.
    pub delay: Duration,
    /// The job expires without a result after this time; zero means never.
    pub expires: Duration,
    /// The job runs, even if its result is remembered.
    pub fresh: bool,
}

impl Submit {
    /// A job of this definition.
    pub fn new(definition: impl Into<String>, input: impl Into<Bytes>) -> Self {
        Submit {
            definition: definition.into(),
            input: input.into(),
            priority: DEFAULT_PRIORITY,
            delay: Duration::ZERO,
            expires: Duration::ZERO,
            fresh: false,
        }
    }
}

/// An accepted job.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Submitted {
    /// Its id. Equal jobs in flight have one id.
    pub id: JobId,
    /// An equal job was there before: this submission waits for its result.
    pub joined: bool,
    /// Jobs of its definition that wait.
    pub waiting: u64,
}

/// A worker that wants jobs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Attach {
    /// A name for people.
    pub name: String,
    /// What it runs. A definition that does not exist is created.
    pub definitions: Vec<(Definition, Code)>,
}

/// A job for a worker.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Grant {
    /// The job.
    pub id: JobId,
    /// The token of the lease.
    pub token: Token,
    /// The definition's name.
    pub definition: Arc<str>,
    /// The number of the attempt, from 1.
    pub attempt: u32,
    /// Time without a heartbeat after which the lease is lost.
    pub lease: Duration,
    /// The longest time of the attempt.
    pub deadline: Duration,
    /// The input.
    pub input: Bytes,
}

/// The answer to a heartbeat.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// The lease is extended.
    GoOn,
    /// The lease is extended; less than a tenth of the time until the deadline is left.
    Soon,
    /// The lease is lost, or the job was cancelled: stop.
    Stop,
}

/// The effects of commands: rows for the store, jobs for workers, and jobs that have ended.
#[derive(Debug, Default)]
pub struct Changes {
    /// Rows to write.
    pub rows: Vec<Row>,
    /// Leases that were granted.
    pub grants: Vec<(WorkerId, Grant)>,
    /// Jobs that have ended, with their results.
    pub ended: Vec<(Record, Option<Bytes>)>,
    /// Results that are remembered from now on.
    pub remembered: Vec<(ResultKey, JobId, Bytes)>,
    /// Whether a row must be durable before its command is answered.
    pub urgent: bool,
}

/// The function that decides what a command does to a job: [`decide`], or a faulty one in tests.
#[doc(hidden)]
pub type Decide = fn(&mut Job, Command, &Definition, Timestamp) -> Result<Step, Refused>;

/// All jobs of a server.
#[derive(Debug)]
pub struct Engine {
    ids: Ids,
    epoch: u32,
    leases: u32,
    position: u64,
    names: HashMap<Arc<str>, usize>,
    kinds: Vec<Queue>,
    jobs: BTreeMap<JobId, Live>,
    timers: BTreeSet<(Timestamp, JobId)>,
    flights: FxHashMap<Action, JobId>,
    known: FxHashMap<u64, Known>,
    workers: HashMap<WorkerId, Worker>,
    decide: Decide,
}

/// A job with its place in the engine.
#[derive(Debug)]
struct Live {
    job: Job,
    kind: usize,
    /// Its entry in the timers.
    timer: Option<Timestamp>,
    /// The position of its newest event.
    event: u64,
    detail: String,
}

/// A remembered result.
#[derive(Clone, Copy, Debug)]
struct Known {
    id: JobId,
    output: u64,
}

/// A definition with its queue.
#[derive(Debug)]
struct Queue {
    name: Arc<str>,
    kind: Kind,
    /// Jobs that wait: high priorities first, then in the order of submission.
    ready: BTreeSet<(u8, JobId)>,
    /// Workers with credit.
    idle: BTreeSet<WorkerId>,
    /// The worker that got the last job.
    last: WorkerId,
    running: u32,
    counts: Counts,
}

/// Counts of one definition since the start of the server.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Submissions that were answered from memory.
    pub remembered: u64,
    /// Submissions that joined an equal job.
    pub joined: u64,
    /// Jobs that were accepted.
    pub accepted: u64,
    /// Jobs that have succeeded.
    pub succeeded: u64,
    /// Jobs that have ended without a result.
    pub failed: u64,
}

/// A definition as lists show it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Overview {
    /// The definition, its code, and whether it is unstable.
    pub kind: Kind,
    /// Jobs that wait.
    pub waiting: u64,
    /// Jobs that run.
    pub running: u32,
    /// Workers with credit for it.
    pub idle_workers: u32,
    /// Counts since the start.
    pub counts: Counts,
}

#[derive(Debug)]
struct Worker {
    name: Arc<str>,
    kinds: Vec<(usize, Code)>,
    credit: u32,
    is_draining: bool,
    leases: BTreeSet<JobId>,
}

impl Engine {
    /// An engine with the content of a store. Jobs that were leased are queued again: the workers
    /// learn at their next heartbeat that their leases are lost.
    pub fn recover(recovered: Recovered, now: Timestamp, changes: &mut Changes) -> Self {
        let mut engine = Engine {
            ids: Ids::after(recovered.last_key),
            epoch: recovered.epoch,
            leases: 0,
            position: recovered.last_event,
            names: HashMap::new(),
            kinds: Vec::new(),
            jobs: BTreeMap::new(),
            timers: BTreeSet::new(),
            flights: FxHashMap::default(),
            known: FxHashMap::default(),
            workers: HashMap::new(),
            decide,
        };
        recovered.kinds.into_iter().for_each(|kind| engine.add_kind(kind));
        for (key, id, output) in recovered.known {
            engine.known.insert(key, Known { id, output });
        }
        for (record, action, input) in recovered.live {
            // A definition is stored before its first job.
            let Some(&kind) = engine.names.get(&record.definition) else { continue };
            let job = Job {
                id: record.id,
                definition: Arc::clone(&engine.kinds[kind].name),
                version: record.version,
                state: record.state,
                priority: record.priority,
                input,
                action,
                due: record.due,
                expires: record.expires,
                attempts: record.attempts,
                failures: record.failures,
                lease: None,
                progress: Bytes::new(),
            };
            let (id, was_leased) = (job.id, job.state == State::Leased);
            if let Some(action) = job.action.filter(|_| job.state != State::Delayed) {
                engine.flights.entry(action).or_insert(id);
            }
            let (event, detail) = (record.event, record.detail);
            engine.jobs.insert(id, Live { job, kind, timer: None, event, detail });
            if was_leased {
                let live = engine.jobs.get_mut(&id).expect("it was just inserted");
                live.job.state = State::Queued;
                let why = "the server was restarted".to_owned();
                engine.record(id, State::Queued, why, None, now, changes);
            }
            engine.place(id);
        }
        engine
    }

    /// The same with another function for decisions.
    #[doc(hidden)]
    #[must_use]
    pub fn with_decide(mut self, decide: Decide) -> Self {
        self.decide = decide;
        self
    }

    /// Creates or changes a definition. A change of the version forgets its results and its code.
    ///
    /// # Errors
    /// [`Refused::Invalid`]
    pub fn define(&mut self, definition: Definition, changes: &mut Changes) -> Result<(), Refused> {
        definition.check()?;
        match self.names.get(definition.name.as_str()) {
            Some(&index) => {
                let kind = &mut self.kinds[index].kind;
                if kind.definition == definition {
                    return Ok(());
                }
                if kind.definition.version != definition.version {
                    (kind.code, kind.unstable) = (None, None);
                }
                kind.definition = definition;
                changes.rows.push(Row::Definition(kind.clone()));
            }
            None => {
                let kind = Kind { definition, code: None, unstable: None };
                changes.rows.push(Row::Definition(kind.clone()));
                self.add_kind(kind);
            }
        }
        changes.urgent = true;
        Ok(())
    }

    fn add_kind(&mut self, kind: Kind) {
        let name: Arc<str> = kind.definition.name.as_str().into();
        self.names.insert(Arc::clone(&name), self.kinds.len());
        self.kinds.push(Queue {
            name,
            kind,
            ready: BTreeSet::new(),
            idle: BTreeSet::new(),
            last: WorkerId(0),
            running: 0,
            counts: Counts::default(),
        });
    }

    /// The key of this submission's result, and the job that may have computed it.
    #[must_use]
    pub fn lookup(&self, submit: &Submit) -> Option<(ResultKey, JobId)> {
        let kind = &self.kinds[*self.names.get(submit.definition.as_str())?].kind;
        let key = kind.key(&submit.input).filter(|_| !submit.fresh)?;
        let known = self.known.get(&key.short())?;
        Some((key, known.id))
    }

    /// Counts a submission that was answered from memory.
    pub fn count_remembered(&mut self, definition: &str, hits: u64) {
        if let Some(&index) = self.names.get(definition) {
            self.kinds[index].counts.remembered += hits;
        }
    }

    /// Queues a job, or joins an equal one. [`lookup`](Self::lookup) comes before.
    ///
    /// # Errors
    /// [`Refused`] if there is no such definition, or a limit is reached.
    pub fn submit(
        &mut self,
        submit: Submit,
        random: u64,
        now: Timestamp,
        changes: &mut Changes,
    ) -> Result<Submitted, Refused> {
        let Some(&index) = self.names.get(submit.definition.as_str()) else {
            return Err(Refused::UnknownDefinition(submit.definition));
        };
        let bytes = submit.input.len();
        if bytes > MAX_BYTES {
            let text = format!("the input has {bytes} bytes; the limit is {MAX_BYTES}");
            return Err(Refused::Invalid(text));
        }
        let queue = &mut self.kinds[index];
        let Kind { definition, unstable, .. } = &queue.kind;
        let remembers = definition.memory && unstable.is_none();
        let action =
            remembers.then(|| Action::new(&definition.name, definition.version, &submit.input));
        let waiting = queue.ready.len() as u64;
        let is_delayed = !submit.delay.is_zero();
        if let Some(&id) = action.filter(|_| !is_delayed).and_then(|key| self.flights.get(&key)) {
            queue.counts.joined += 1;
            return Ok(Submitted { id, joined: true, waiting });
        }
        if self.jobs.len() >= MAX_LIVE {
            let text = format!("{MAX_LIVE} jobs have not ended; the server accepts no more");
            return Err(Refused::Limit(text));
        }
        queue.counts.accepted += 1;
        let job = Job {
            id: self.ids.next(now, random),
            definition: Arc::clone(&queue.name),
            version: definition.version,
            state: if is_delayed { State::Delayed } else { State::Queued },
            priority: submit.priority,
            input: submit.input,
            action,
            due: now.after(submit.delay),
            expires: Some(submit.expires)
                .filter(|time| !time.is_zero())
                .map(|time| now.after(time)),
            attempts: 0,
            failures: 0,
            lease: None,
            progress: Bytes::new(),
        };
        let id = job.id;
        self.insert(job, index, now, changes);
        changes.urgent = true;
        Ok(Submitted { id, joined: false, waiting })
    }

    /// Adds a new job, writes its first event, and gives it to a worker if one is idle.
    fn insert(&mut self, job: Job, kind: usize, now: Timestamp, changes: &mut Changes) {
        let (id, state, action) = (job.id, job.state, job.action);
        if let (Some(action), State::Queued) = (action, state) {
            self.flights.insert(action, id);
        }
        let live = Live { job, kind, timer: None, event: 0, detail: String::new() };
        self.jobs.insert(id, live);
        self.record(id, state, String::new(), None, now, changes);
        self.place(id);
        self.dispatch(kind, now, changes);
    }

    /// Attaches a worker. Definitions that do not exist are created; its code becomes theirs.
    ///
    /// # Errors
    /// [`Refused::Invalid`] for a definition with another version than that of the server.
    pub fn attach(
        &mut self,
        worker: WorkerId,
        attach: Attach,
        changes: &mut Changes,
    ) -> Result<(), Refused> {
        let mut kinds = Vec::new();
        for (definition, code) in attach.definitions {
            let (name, version) = (definition.name.clone(), definition.version);
            if !self.names.contains_key(name.as_str()) {
                self.define(definition, changes)?;
            }
            let index = self.names[name.as_str()];
            let kind = &mut self.kinds[index].kind;
            let known = kind.definition.version;
            if known > version {
                return Err(Refused::Invalid(format!(
                    "definition {name:?} has version {known}; the worker runs version {version}"
                )));
            }
            if known < version {
                (kind.definition.version, kind.code, kind.unstable) = (version, None, None);
            }
            if kind.code != Some(code) {
                kind.code = Some(code);
                changes.rows.push(Row::Definition(kind.clone()));
                changes.urgent = true;
                // Workers with this code may have credit since before it was replaced.
                let same = self
                    .workers
                    .iter()
                    .filter(|(_, worker)| worker.credit > 0 && worker.code(index) == Some(code));
                self.kinds[index].idle.extend(same.map(|(id, _)| *id));
            }
            kinds.push((index, code));
        }
        let name = truncated(attach.name).into();
        let leases = BTreeSet::new();
        self.workers.insert(worker, Worker { name, kinds, credit: 0, is_draining: false, leases });
        Ok(())
    }

    /// Allows the server to give this worker more jobs.
    pub fn credit(&mut self, worker: WorkerId, jobs: u32, now: Timestamp, changes: &mut Changes) {
        let Some(entry) = self.workers.get_mut(&worker).filter(|entry| !entry.is_draining) else {
            return;
        };
        entry.credit = entry.credit.saturating_add(jobs);
        let kinds = entry.kinds.clone();
        for &(kind, _) in &kinds {
            self.kinds[kind].idle.insert(worker);
        }
        for (kind, _) in kinds {
            self.dispatch(kind, now, changes);
        }
    }

    /// Gives a worker no more jobs.
    pub fn drain(&mut self, worker: WorkerId) {
        let Some(entry) = self.workers.get_mut(&worker) else { return };
        (entry.credit, entry.is_draining) = (0, true);
        for &(kind, _) in &entry.kinds {
            self.kinds[kind].idle.remove(&worker);
        }
    }

    /// Detaches a worker. Its leases are lost soon, unless it comes back.
    pub fn detach(&mut self, worker: WorkerId, now: Timestamp) {
        let Some(entry) = self.workers.remove(&worker) else { return };
        for (kind, _) in entry.kinds {
            self.kinds[kind].idle.remove(&worker);
        }
        for id in entry.leases {
            let Some(live) = self.jobs.get_mut(&id) else { continue };
            let definition = &self.kinds[live.kind].kind.definition;
            let step = (self.decide)(&mut live.job, Command::Disconnect(worker), definition, now);
            debug_assert_eq!(step, Ok(Step::None));
            self.arm(id);
        }
    }

    /// A heartbeat of a worker for one of its jobs.
    pub fn beat(
        &mut self,
        worker: WorkerId,
        (id, token): (JobId, Token),
        progress: Bytes,
        now: Timestamp,
    ) -> Verdict {
        let Some(live) = self.jobs.get_mut(&id) else { return Verdict::Stop };
        let definition = &self.kinds[live.kind].kind.definition;
        let before = live.job.lease.as_ref().map(|lease| lease.worker);
        let beat = Command::Beat(token, worker);
        if (self.decide)(&mut live.job, beat, definition, now).is_err() {
            return Verdict::Stop;
        }
        if let Some(before) = before.filter(|before| *before != worker) {
            self.workers.get_mut(&before).map(|entry| entry.leases.remove(&id));
            self.workers.get_mut(&worker).map(|entry| entry.leases.insert(id));
        }
        if !progress.is_empty() {
            live.job.progress = progress.slice(..progress.len().min(MAX_DETAIL));
        }
        let deadline = live.job.lease.as_ref().map_or(now, |lease| lease.deadline);
        match deadline.since(now) <= definition.deadline / 10 {
            true => Verdict::Soon,
            false => Verdict::GoOn,
        }
    }

    /// The end of an attempt. The worker gets its credit back, also if the finish is refused.
    ///
    /// # Errors
    /// [`Refused::StaleToken`] if the lease is lost; [`Refused::Invalid`] for a long result.
    pub fn finish(
        &mut self,
        worker: WorkerId,
        (id, token): (JobId, Token),
        mut outcome: Outcome,
        now: Timestamp,
        changes: &mut Changes,
    ) -> Result<(), Refused> {
        match &mut outcome {
            Outcome::Succeeded(output) if output.len() > MAX_BYTES => {
                let bytes = output.len();
                let error = format!("the result has {bytes} bytes; the limit is {MAX_BYTES}");
                outcome = Outcome::Failed { error, retry: false };
            }
            Outcome::Succeeded(_) => {}
            Outcome::Failed { error, .. } => *error = truncated(std::mem::take(error)),
        }
        let finished = self.command(id, Command::Finish(token, outcome), now, changes);
        changes.urgent |= finished.is_ok();
        self.credit(worker, 1, now, changes);
        finished.map_err(|error| match error {
            Refused::UnknownJob(id) => Refused::StaleToken(id),
            error => error,
        })
    }

    /// Cancels a job that has not ended. Its worker learns it at the next heartbeat.
    ///
    /// # Errors
    /// [`Refused::UnknownJob`] if it is not known or has ended.
    pub fn cancel(
        &mut self,
        id: JobId,
        now: Timestamp,
        changes: &mut Changes,
    ) -> Result<(), Refused> {
        self.command(id, Command::Cancel, now, changes)?;
        changes.urgent = true;
        Ok(())
    }

    /// Queues a job again that has ended without a result.
    ///
    /// # Errors
    /// [`Refused::WrongState`] if it has not ended, or has a result.
    pub fn retry(
        &mut self,
        record: Record,
        (action, input): (Option<Action>, Bytes),
        now: Timestamp,
        changes: &mut Changes,
    ) -> Result<(), Refused> {
        let (id, state) = (record.id, record.state);
        if self.jobs.contains_key(&id)
            || !state.next().contains(&State::Queued)
            || !state.is_final()
        {
            let state = self.jobs.get(&id).map_or(state, |live| live.job.state);
            let allowed = "only failed, cancelled and expired jobs can be retried";
            return Err(Refused::WrongState { id, state, allowed });
        }
        let Some(&kind) = self.names.get(&record.definition) else {
            return Err(Refused::UnknownDefinition(record.definition.to_string()));
        };
        let job = Job {
            id,
            definition: Arc::clone(&self.kinds[kind].name),
            version: record.version,
            state: State::Queued,
            priority: record.priority,
            input,
            action,
            due: now,
            expires: None,
            attempts: record.attempts,
            failures: 0,
            lease: None,
            progress: Bytes::new(),
        };
        if let Some(action) = action {
            self.flights.entry(action).or_insert(id);
        }
        let live = Live { job, kind, timer: None, event: record.event, detail: String::new() };
        self.jobs.insert(id, live);
        self.record(id, State::Queued, "retried by a client".to_owned(), None, now, changes);
        self.place(id);
        self.dispatch(kind, now, changes);
        changes.urgent = true;
        Ok(())
    }

    /// Applies everything that is due.
    pub fn tick(&mut self, now: Timestamp, changes: &mut Changes) {
        while let Some(&(due, id)) = self.timers.first() {
            if due > now {
                break;
            }
            self.timers.pop_first();
            if let Some(live) = self.jobs.get_mut(&id) {
                live.timer = None;
            }
            // A tick is never refused, and the job is known as long as it has a timer.
            let _ = self.command(id, Command::Tick, now, changes);
        }
    }

    /// When [`tick`](Self::tick) has something to do.
    #[must_use]
    pub fn next_due(&self) -> Option<Timestamp> {
        self.timers.first().map(|&(due, _)| due)
    }

    /// Gives a command to a job and writes its step.
    fn command(
        &mut self,
        id: JobId,
        command: Command,
        now: Timestamp,
        changes: &mut Changes,
    ) -> Result<(), Refused> {
        let live = self.jobs.get_mut(&id).ok_or(Refused::UnknownJob(id))?;
        let kind = live.kind;
        let before = (live.job.state, live.job.priority);
        let lease = live.job.lease.clone();
        let definition = &self.kinds[kind].kind.definition;
        let step = (self.decide)(&mut live.job, command, definition, now)?;
        let (state, why, output) = match step {
            Step::None => {
                self.arm(id);
                return Ok(());
            }
            Step::To(state, why) => (state, why, None),
            Step::Result(output) => (State::Succeeded, String::new(), Some(output)),
        };
        let queue = &mut self.kinds[kind];
        match before.0 {
            State::Queued => {
                queue.ready.remove(&(u8::MAX - before.1, id));
            }
            State::Leased => queue.running -= 1,
            _ => {}
        }
        if let Some(lease) = &lease
            && let Some(worker) = self.workers.get_mut(&lease.worker)
        {
            worker.leases.remove(&id);
        }
        if let (Some(output), Some(lease)) = (&output, &lease) {
            self.remember(id, lease.code, output, changes);
        }
        self.record(id, state, why, output, now, changes);
        self.place(id);
        if state == State::Queued || before.0 == State::Leased {
            self.dispatch(kind, now, changes);
        }
        Ok(())
    }

    /// Writes a result. It is remembered if the definition is a function, as far as is known.
    fn remember(&mut self, id: JobId, code: Code, output: &Bytes, changes: &mut Changes) {
        let live = &self.jobs[&id];
        let queue = &mut self.kinds[live.kind];
        let digest = output_digest(output);
        let is_current = live.job.version == queue.kind.definition.version;
        let mut key = live.job.action.filter(|_| is_current && queue.kind.remembers());
        if let Some(action) = key.take() {
            let found = action.by(code);
            match self.known.get(&found.short()) {
                Some(known) if known.output != digest => {
                    queue.kind.unstable = Some((known.id, id));
                    changes.rows.push(Row::Definition(queue.kind.clone()));
                }
                _ => {
                    self.known.insert(found.short(), Known { id, output: digest });
                    changes.remembered.push((found, id, output.clone()));
                    let key = Some(found);
                    changes.rows.push(Row::Result { id, key, digest, output: output.clone() });
                    return;
                }
            }
        }
        changes.rows.push(Row::Result { id, key: None, digest, output: output.clone() });
    }

    /// Writes a step of a job to the log, and removes a job that has ended.
    fn record(
        &mut self,
        id: JobId,
        state: State,
        detail: String,
        output: Option<Bytes>,
        now: Timestamp,
        changes: &mut Changes,
    ) {
        let live = self.jobs.get_mut(&id).expect("the caller has the job");
        self.position += 1;
        let previous = std::mem::replace(&mut live.event, self.position);
        live.detail.clone_from(&detail);
        let record = live.record(state.is_final().then_some(now));
        changes.rows.push(match previous {
            0 => Row::Insert(record.clone(), live.job.action, live.job.input.clone()),
            _ => Row::Update(record.clone()),
        });
        changes.rows.push(Row::Event(Event {
            position: self.position,
            previous,
            job: id,
            definition: Arc::clone(&live.job.definition),
            state,
            attempt: live.job.attempts,
            at: now,
            detail,
        }));
        if state.is_final() {
            let counts = &mut self.kinds[live.kind].counts;
            match state {
                State::Succeeded => counts.succeeded += 1,
                _ => counts.failed += 1,
            }
            let live = self.jobs.remove(&id).expect("it was just there");
            if let Some(timer) = live.timer {
                self.timers.remove(&(timer, id));
            }
            if let Some(action) = live.job.action
                && self.flights.get(&action) == Some(&id)
            {
                self.flights.remove(&action);
            }
            changes.ended.push((record, output));
        }
    }

    /// Puts a job where its state belongs: in the queue, and under its timer.
    fn place(&mut self, id: JobId) {
        let Some(live) = self.jobs.get(&id) else { return };
        if live.job.state == State::Queued {
            self.kinds[live.kind].ready.insert((u8::MAX - live.job.priority, id));
        }
        self.arm(id);
    }

    /// Sets the timer of a job. A timer that is too early stays: it is set again when it fires.
    fn arm(&mut self, id: JobId) {
        let Some(live) = self.jobs.get_mut(&id) else { return };
        let next = live.job.next_due();
        let is_early_enough = match (live.timer, next) {
            (Some(timer), Some(next)) => timer <= next,
            (timer, next) => timer == next,
        };
        if is_early_enough {
            return;
        }
        if let Some(timer) = std::mem::replace(&mut live.timer, next) {
            self.timers.remove(&(timer, id));
        }
        self.timers.extend(next.map(|next| (next, id)));
    }

    /// Gives jobs of a definition to workers with credit.
    fn dispatch(&mut self, kind: usize, now: Timestamp, changes: &mut Changes) {
        loop {
            let queue = &mut self.kinds[kind];
            let limit = queue.kind.definition.concurrency;
            if limit > 0 && queue.running >= limit {
                return;
            }
            let Some(&(_, id)) = queue.ready.first() else { return };
            let Some(worker) = queue.next_idle() else { return };
            let entry = self.workers.get_mut(&worker).filter(|entry| entry.credit > 0);
            let code = entry.as_ref().and_then(|entry| entry.code(kind));
            let code = code.filter(|&code| queue.kind.code == Some(code));
            let (Some(entry), Some(code)) = (entry, code) else {
                // Its code was replaced by that of a newer worker.
                queue.idle.remove(&worker);
                continue;
            };
            queue.last = worker;
            queue.running += 1;
            let definition = &queue.kind.definition;
            self.leases += 1;
            let token = Token((u64::from(self.epoch) << 32) | u64::from(self.leases));
            let lease = Lease {
                token,
                worker,
                name: Arc::clone(&entry.name),
                code,
                until: now.after(definition.lease),
                deadline: now.after(definition.deadline),
                since: now,
            };
            let (lease_time, deadline) = (definition.lease, definition.deadline);
            entry.leases.insert(id);
            entry.credit -= 1;
            if entry.credit == 0 {
                for &(kind, _) in &entry.kinds {
                    self.kinds[kind].idle.remove(&worker);
                }
            }
            self.command(id, Command::Lease(lease), now, changes)
                .expect("a job in the queue can be leased");
            let job = &self.jobs[&id].job;
            let grant = Grant {
                id,
                token,
                definition: Arc::clone(&job.definition),
                attempt: job.attempts,
                lease: lease_time,
                deadline,
                input: job.input.clone(),
            };
            changes.grants.push((worker, grant));
        }
    }

    /// A job that has not ended, and its progress.
    #[must_use]
    pub fn job(&self, id: JobId) -> Option<(Record, Bytes)> {
        let live = self.jobs.get(&id)?;
        Some((live.record(None), live.job.progress.clone()))
    }

    /// All jobs that have not ended, oldest first.
    pub fn jobs(&self) -> impl Iterator<Item = &Job> {
        self.jobs.values().map(|live| &live.job)
    }

    /// The key of the oldest job that has not ended, or of the next job.
    #[must_use]
    pub fn floor(&self) -> i64 {
        self.jobs.keys().next().map_or(i64::MAX, |id| id.key())
    }

    /// The definitions, by name.
    #[must_use]
    pub fn overview(&self) -> Vec<Overview> {
        let mut all: Vec<Overview> = self
            .kinds
            .iter()
            .map(|queue| Overview {
                kind: queue.kind.clone(),
                waiting: queue.ready.len() as u64,
                running: queue.running,
                idle_workers: queue.idle.len() as u32,
                counts: queue.counts,
            })
            .collect();
        all.sort_by(|one, other| one.kind.definition.name.cmp(&other.kind.definition.name));
        all
    }

    /// Waiting jobs, running jobs and counts of each definition.
    pub fn counts(&self) -> impl Iterator<Item = (u64, u32, &Counts)> {
        self.kinds.iter().map(|queue| (queue.ready.len() as u64, queue.running, &queue.counts))
    }

    /// Checks that all parts agree with each other.
    #[doc(hidden)]
    pub fn validate(&self) {
        for (index, queue) in self.kinds.iter().enumerate() {
            let of_kind = || self.jobs.values().filter(|live| live.kind == index);
            let queued = of_kind().filter(|live| live.job.state == State::Queued);
            let ready: BTreeSet<_> =
                queued.map(|live| (u8::MAX - live.job.priority, live.job.id)).collect();
            assert_eq!(queue.ready, ready, "the queue of {}", queue.name);
            let running = of_kind().filter(|live| live.job.state == State::Leased).count();
            assert_eq!(queue.running as usize, running, "running jobs of {}", queue.name);
            let limit = queue.kind.definition.concurrency as usize;
            assert!(limit == 0 || running <= limit, "{running} jobs run; the limit is {limit}");
        }
        for live in self.jobs.values() {
            assert!(!live.job.state.is_final());
            assert_eq!(live.job.lease.is_some(), live.job.state == State::Leased);
            let due = live.job.next_due();
            assert_eq!(live.timer.is_some(), due.is_some(), "{:?}", live.job);
            assert!(live.timer <= due, "a timer is not late");
        }
        let timers: BTreeSet<_> = self
            .jobs
            .values()
            .filter_map(|live| live.timer.map(|timer| (timer, live.job.id)))
            .collect();
        assert_eq!(self.timers, timers);
        for (worker, entry) in &self.workers {
            for id in &entry.leases {
                let lease = self.jobs.get(id).and_then(|live| live.job.lease.as_ref());
                assert_eq!(lease.map(|lease| lease.worker), Some(*worker));
            }
        }
    }
}

impl Live {
    fn record(&self, ended: Option<Timestamp>) -> Record {
        let job = &self.job;
        Record {
            id: job.id,
            definition: Arc::clone(&job.definition),
            version: job.version,
            state: job.state,
            priority: job.priority,
            attempts: job.attempts,
            failures: job.failures,
            due: job.due,
            expires: job.expires,
            ended,
            event: self.event,
            detail: self.detail.clone(),
        }
    }
}

impl Queue {
    /// The worker with credit after the one that got the last job.
    fn next_idle(&self) -> Option<WorkerId> {
        let after = self.idle.range(WorkerId(self.last.0 + 1)..).next();
        after.or_else(|| self.idle.first()).copied()
    }
}

impl Worker {
    fn code(&self, kind: usize) -> Option<Code> {
        self.kinds.iter().find(|(own, _)| *own == kind).map(|&(_, code)| code)
    }
}

impl Kind {
    /// Whether results are remembered.
    #[must_use]
    pub fn remembers(&self) -> bool {
        self.definition.memory && self.unstable.is_none()
    }

    /// The key of the result for an input; `None` if nothing is remembered, or no worker came yet.
    #[must_use]
    pub fn key(&self, input: &[u8]) -> Option<ResultKey> {
        let code = self.code.filter(|_| self.remembers())?;
        Some(Action::new(&self.definition.name, self.definition.version, input).by(code))
    }
}

/// A text without the part above the limit for details.
fn truncated(mut text: String) -> String {
    let mut end = MAX_DETAIL.min(text.len());
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    text.truncate(end);
    text
}
