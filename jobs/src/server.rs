//! An engine and a store behind one thread, which commits for all callers at once.
//!
//! The thread takes all commands that wait, applies them to the engine, writes their rows in one
//! transaction, and answers the callers after the commit. Only submissions, ends and changes by
//! clients wait for the disk; leases are written with the next of them, or a moment later.
//!
//! A failed commit stops all changes: they are refused with `storage_failed` until a restart,
//! because the state of the file is not known. Remembered results are still answered.

use std::collections::HashMap;
use std::fmt;
use std::hash::{BuildHasher as _, RandomState};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::thread::JoinHandle;
use std::time::{Duration, Instant, SystemTime};

use afterimage_wire::proto::stats::Stats;
use bytes::Bytes;
use fxhash::FxHashMap;
use quick_cache::Weighter;
use quick_cache::sync::Cache;

use crate::engine::{Attach, Changes, Counts, Engine, Grant, Overview, Submit, Submitted, Verdict};
use crate::job::{Outcome, Refused, Timestamp, Token, WorkerId};
use crate::message::Beat;
use crate::store::{Event, Filter, Kind, Record, Row, Store, StoreError};
use crate::{Definition, JobId, ResultKey, metrics};

/// Commands of one transaction, at most.
const MAX_BATCH: usize = 8192;

/// The longest time until a lease is written.
const LAZY: Duration = Duration::from_millis(50);

/// Jobs of one list, and events of one answer, at most.
const MAX_LIST: u32 = 1000;

/// The options of a server.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct ServerOptions {
    /// Memory for results that are answered without the store. The default is 64 MiB.
    pub memory: u64,
}

impl Default for ServerOptions {
    fn default() -> Self {
        ServerOptions { memory: 64 << 20 }
    }
}

/// The answer to a submission.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Accepted {
    /// The job was queued, or joined an equal one.
    Queued(Submitted),
    /// The result is remembered.
    Remembered {
        /// The job that computed it.
        id: JobId,
        /// The result.
        output: Bytes,
    },
}

/// The end of a job.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ended {
    /// The job in its final state.
    pub record: Record,
    /// The result, if it has succeeded.
    pub output: Option<Bytes>,
}

/// A job with its history.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Shown {
    /// The job.
    pub record: Record,
    /// The newest report of its worker.
    pub progress: Bytes,
    /// The result, if it has succeeded.
    pub output: Option<Bytes>,
    /// Its steps, in order.
    pub history: Vec<Event>,
}

/// The caller's function that gets an answer. The server's thread calls it, so it must not block.
pub type Reply<T> = Box<dyn FnOnce(Result<T, Refused>) + Send>;

/// A server of jobs. Clones share it. It ends when the last one is dropped.
#[derive(Clone)]
pub struct Server {
    shared: Arc<Shared>,
    _end: Arc<End>,
}

impl fmt::Debug for Server {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Server").finish_non_exhaustive()
    }
}

struct Shared {
    commands: Mutex<Sender<Message>>,
    memory: Cache<ResultKey, (JobId, Bytes), Weight>,
    kinds: RwLock<HashMap<String, Remembering>>,
    totals: Totals,
    next_worker: AtomicU64,
}

/// Numbers for statistics, which the thread writes after each turn.
#[derive(Default)]
struct Totals {
    waiting: AtomicU64,
    running: AtomicU64,
    accepted: AtomicU64,
    joined: AtomicU64,
    remembered: AtomicU64,
    succeeded: AtomicU64,
    failed: AtomicU64,
    commits: AtomicU64,
    has_failed: AtomicU64,
}

/// A definition, as the fast path for remembered results sees it.
struct Remembering {
    kind: Kind,
    hits: AtomicU64,
}

/// Joins the thread when the last handle is dropped.
struct End {
    commands: Sender<Message>,
    thread: Option<JoinHandle<()>>,
}

impl Drop for End {
    fn drop(&mut self) {
        let _ = self.commands.send(Message::Stop);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// The cost of a remembered result in memory.
#[derive(Clone)]
struct Weight;

impl Weighter<ResultKey, (JobId, Bytes)> for Weight {
    fn weight(&self, _: &ResultKey, (_, output): &(JobId, Bytes)) -> u64 {
        const ENTRY: u64 = 128;
        ENTRY + output.len() as u64
    }
}

enum Message {
    Submit(Submit, Reply<Accepted>, Option<Reply<Ended>>),
    Wait(JobId, Reply<Ended>),
    Show(JobId, Reply<Shown>),
    List(Filter, Reply<Vec<Record>>),
    Cancel(JobId, Reply<()>),
    Retry(JobId, Reply<()>),
    Definitions(Reply<Vec<Overview>>),
    Define(Definition, Reply<()>),
    Events { after: u64, limit: u32, wait: bool, reply: Reply<Vec<Event>> },
    Attach(WorkerId, Attach, Box<dyn Fn(Grant) + Send>, Reply<()>),
    Credit(WorkerId, u32),
    Drain(WorkerId),
    Detach(WorkerId),
    Beats(WorkerId, Vec<Beat>, Reply<Vec<(JobId, Verdict)>>),
    Finish(WorkerId, JobId, Token, Outcome, Reply<()>),
    Stop,
}

impl Server {
    /// Reads the store and starts the thread.
    ///
    /// # Errors
    /// If the store cannot be read or written.
    pub fn start(mut store: impl Store, options: &ServerOptions) -> Result<Self, StoreError> {
        let clock = Clock::start();
        let recovered = store.recover()?;
        let mut changes = Changes::default();
        let engine = Engine::recover(recovered, clock.now(), &mut changes);
        let (sender, receiver) = channel();
        let entries = usize::try_from(options.memory / 256).unwrap_or(usize::MAX);
        let shared = Arc::new(Shared {
            commands: Mutex::new(sender.clone()),
            memory: Cache::with_weighter(entries.max(64), options.memory, Weight),
            kinds: RwLock::default(),
            totals: Totals::default(),
            next_worker: AtomicU64::new(1),
        });
        let mut writer = Writer {
            engine,
            store: Box::new(store),
            shared: Arc::clone(&shared),
            clock,
            changes,
            answers: Vec::new(),
            lazy_since: None,
            waiting: HashMap::new(),
            watching: Vec::new(),
            sinks: HashMap::new(),
            failed: None,
            random: RandomState::new(),
            submissions: 0,
        };
        writer.learn_kinds();
        let run = move || writer.run(&receiver);
        let thread = std::thread::Builder::new().name("jobs".to_owned()).spawn(run);
        let thread = thread.map_err(|error| StoreError::Failed(error.to_string()))?;
        let end = End { commands: sender, thread: Some(thread) };
        Ok(Server { shared, _end: Arc::new(end) })
    }

    fn send(&self, message: Message) {
        // Without the thread the reply is dropped: its caller sees that.
        let _ = self.shared.commands.lock().unwrap_or_else(PoisonError::into_inner).send(message);
    }

    /// Queues a job. A result in memory is answered at once, without the thread. `ended` gets the
    /// end of the job, unless its result is remembered.
    pub fn submit(&self, submit: Submit, reply: Reply<Accepted>, ended: Option<Reply<Ended>>) {
        match self.remembered(&submit) {
            Some((id, output)) => reply(Ok(Accepted::Remembered { id, output })),
            None => self.send(Message::Submit(submit, reply, ended)),
        }
    }

    /// Adds the statistics.
    pub fn stats(&self, stats: &mut Stats) {
        let Totals { waiting, running, accepted, joined, .. } = &self.shared.totals;
        let Totals { remembered, succeeded, failed, commits, has_failed, .. } = &self.shared.totals;
        let of = |number: &AtomicU64| number.load(Ordering::Relaxed);
        let kinds = self.shared.kinds.read().unwrap_or_else(PoisonError::into_inner);
        let hits: u64 = kinds.values().map(|kind| of(&kind.hits)).sum();
        stats.gauge(&metrics::WAITING, of(waiting));
        stats.gauge(&metrics::RUNNING, of(running));
        stats.counter(&metrics::ACCEPTED, of(accepted));
        stats.counter(&metrics::JOINED, of(joined));
        stats.counter(&metrics::REMEMBERED, of(remembered) + hits);
        stats.counter(&metrics::SUCCEEDED, of(succeeded));
        stats.counter(&metrics::FAILED, of(failed));
        stats.counter(&metrics::COMMITS, of(commits));
        stats.gauge(&metrics::STORE_FAILED, of(has_failed));
    }

    fn remembered(&self, submit: &Submit) -> Option<(JobId, Bytes)> {
        if submit.fresh {
            return None;
        }
        let kinds = self.shared.kinds.read().unwrap_or_else(PoisonError::into_inner);
        let remembering = kinds.get(submit.definition.as_str())?;
        let found = self.shared.memory.get(&remembering.kind.key(&submit.input)?)?;
        remembering.hits.fetch_add(1, Ordering::Relaxed);
        Some(found)
    }

    /// Waits for the end of a job.
    pub fn wait(&self, id: JobId, reply: Reply<Ended>) {
        self.send(Message::Wait(id, reply));
    }

    /// Shows a job.
    pub fn show(&self, id: JobId, reply: Reply<Shown>) {
        self.send(Message::Show(id, reply));
    }

    /// Lists jobs, newest first, at most 1,000.
    pub fn list(&self, filter: Filter, reply: Reply<Vec<Record>>) {
        self.send(Message::List(filter, reply));
    }

    /// Cancels a job that has not ended.
    pub fn cancel(&self, id: JobId, reply: Reply<()>) {
        self.send(Message::Cancel(id, reply));
    }

    /// Queues a job again that has ended without a result.
    pub fn retry(&self, id: JobId, reply: Reply<()>) {
        self.send(Message::Retry(id, reply));
    }

    /// Lists the definitions.
    pub fn definitions(&self, reply: Reply<Vec<Overview>>) {
        self.send(Message::Definitions(reply));
    }

    /// Creates or changes a definition.
    pub fn define(&self, definition: Definition, reply: Reply<()>) {
        self.send(Message::Define(definition, reply));
    }

    /// Reads the log after a position, at most 1,000 events. With `wait` the answer has at least
    /// one event.
    pub fn events(&self, after: u64, limit: u32, wait: bool, reply: Reply<Vec<Event>>) {
        self.send(Message::Events { after, limit, wait, reply });
    }

    /// Attaches a worker, whose jobs go to `sink`. The server's thread calls it, so it must not
    /// block.
    pub fn attach(
        &self,
        attach: Attach,
        sink: Box<dyn Fn(Grant) + Send>,
        reply: Reply<()>,
    ) -> WorkerId {
        let worker = WorkerId(self.shared.next_worker.fetch_add(1, Ordering::Relaxed));
        self.send(Message::Attach(worker, attach, sink, reply));
        worker
    }

    /// Allows the server to give this worker more jobs.
    pub fn credit(&self, worker: WorkerId, jobs: u32) {
        self.send(Message::Credit(worker, jobs));
    }

    /// Gives a worker no more jobs.
    pub fn drain(&self, worker: WorkerId) {
        self.send(Message::Drain(worker));
    }

    /// Detaches a worker, for example when its connection has ended.
    pub fn detach(&self, worker: WorkerId) {
        self.send(Message::Detach(worker));
    }

    /// Reports that a worker works on these jobs.
    pub fn beat(&self, worker: WorkerId, beats: Vec<Beat>, reply: Reply<Vec<(JobId, Verdict)>>) {
        self.send(Message::Beats(worker, beats, reply));
    }

    /// Reports the end of an attempt.
    pub fn finish(
        &self,
        worker: WorkerId,
        (id, token): (JobId, Token),
        outcome: Outcome,
        reply: Reply<()>,
    ) {
        self.send(Message::Finish(worker, id, token, outcome, reply));
    }
}

/// The time of day at the start, and the time since then: it never goes back.
#[derive(Clone, Copy, Debug)]
struct Clock {
    start: Timestamp,
    since: Instant,
}

impl Clock {
    fn start() -> Self {
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        Clock { start: Timestamp::default().after(now), since: Instant::now() }
    }

    fn now(&self) -> Timestamp {
        self.start.after(self.since.elapsed())
    }

    /// The time from now to `then`.
    fn until(&self, then: Timestamp) -> Duration {
        then.since(self.now())
    }
}

/// An answer that waits for the commit. It gets the failure of the commit, if it has failed.
type Answer = Box<dyn FnOnce(Option<&Refused>) + Send>;

/// The thread.
struct Writer {
    engine: Engine,
    store: Box<dyn Store>,
    shared: Arc<Shared>,
    clock: Clock,
    changes: Changes,
    answers: Vec<Answer>,
    /// The time of the first row that is not written, if none of them is urgent.
    lazy_since: Option<Instant>,
    waiting: HashMap<JobId, Vec<Reply<Ended>>>,
    /// Readers of the log that wait for the next event, and their positions.
    watching: Vec<(u64, u32, Reply<Vec<Event>>)>,
    sinks: HashMap<WorkerId, Box<dyn Fn(Grant) + Send>>,
    failed: Option<Arc<str>>,
    /// Random bits of ids: a keyed hash of a count.
    random: RandomState,
    submissions: u64,
}

impl Writer {
    fn run(&mut self, commands: &Receiver<Message>) {
        // The steps of a recovery.
        self.commit();
        loop {
            let first = match self.timeout() {
                Some(time) => commands.recv_timeout(time),
                None => commands.recv().map_err(|_| RecvTimeoutError::Disconnected),
            };
            if self.failed.is_none() {
                self.engine.tick(self.clock.now(), &mut self.changes);
            }
            let mut stop = match first {
                Ok(message) => self.handle(message),
                Err(RecvTimeoutError::Timeout) => false,
                Err(RecvTimeoutError::Disconnected) => true,
            };
            for _ in 1..MAX_BATCH {
                match commands.try_recv() {
                    Ok(message) if !stop => stop = self.handle(message),
                    _ => break,
                }
            }
            let is_late = self.lazy_since.is_some_and(|since| since.elapsed() >= LAZY);
            let needs_commit = self.changes.urgent
                || !self.changes.ended.is_empty()
                || !self.watching.is_empty()
                || is_late
                || stop;
            if needs_commit && !self.changes.rows.is_empty() {
                self.commit();
            } else {
                if !self.changes.rows.is_empty() {
                    self.lazy_since.get_or_insert_with(Instant::now);
                }
                self.release(None);
            }
            if stop {
                return;
            }
        }
    }

    /// The time until there is something to do without a command.
    fn timeout(&self) -> Option<Duration> {
        let due = self.engine.next_due().filter(|_| self.failed.is_none());
        let due = due.map(|due| self.clock.until(due).max(Duration::from_millis(1)));
        let lazy = self.lazy_since.map(|since| LAZY.saturating_sub(since.elapsed()));
        due.into_iter().chain(lazy).min()
    }

    /// Writes all rows, and answers.
    fn commit(&mut self) {
        self.lazy_since = None;
        let rows = coalesced(std::mem::take(&mut self.changes.rows));
        if rows.is_empty() {
            return self.release(None);
        }
        let committed = match &self.failed {
            None => self.store.commit(&rows, self.engine.floor()),
            Some(text) => Err(StoreError::Failed(text.to_string())),
        };
        match committed {
            Ok(()) => {
                self.shared.totals.commits.fetch_add(1, Ordering::Relaxed);
                if rows.iter().any(|row| matches!(row, Row::Definition(_))) {
                    self.learn_kinds();
                }
                for (key, id, output) in std::mem::take(&mut self.changes.remembered) {
                    self.shared.memory.insert(key, (id, output));
                }
                self.release(None);
            }
            Err(error) => {
                if self.failed.is_none() {
                    tracing::error!(%error, "the store failed: no changes from now on");
                    self.failed = Some(error.to_string().into());
                    self.shared.totals.has_failed.store(1, Ordering::Relaxed);
                }
                self.changes.grants.clear();
                self.changes.ended.clear();
                self.changes.remembered.clear();
                let failure = self.failure().expect("it was just set");
                self.release(Some(&failure));
            }
        }
        self.watch();
    }

    /// Answers all callers, and hands out what the commands have caused.
    fn release(&mut self, failure: Option<&Refused>) {
        self.changes.urgent = false;
        self.count();
        self.answers.drain(..).for_each(|answer| answer(failure));
        for (worker, grant) in self.changes.grants.drain(..) {
            if let Some(sink) = self.sinks.get(&worker) {
                sink(grant);
            }
        }
        for (record, output) in self.changes.ended.drain(..) {
            let Some(replies) = self.waiting.remove(&record.id) else { continue };
            for reply in replies {
                reply(Ok(Ended { record: record.clone(), output: output.clone() }));
            }
        }
    }

    /// Writes the statistics of all definitions.
    fn count(&self) {
        let mut sum = Counts::default();
        let (mut waiting, mut running) = (0, 0);
        for (queued, leased, counts) in self.engine.counts() {
            (waiting, running) = (waiting + queued, running + u64::from(leased));
            sum.accepted += counts.accepted;
            sum.joined += counts.joined;
            sum.remembered += counts.remembered;
            sum.succeeded += counts.succeeded;
            sum.failed += counts.failed;
        }
        let totals = &self.shared.totals;
        for (total, number) in [
            (&totals.waiting, waiting),
            (&totals.running, running),
            (&totals.accepted, sum.accepted),
            (&totals.joined, sum.joined),
            (&totals.remembered, sum.remembered),
            (&totals.succeeded, sum.succeeded),
            (&totals.failed, sum.failed),
        ] {
            total.store(number, Ordering::Relaxed);
        }
    }

    /// Answers readers of the log whose next event is there.
    fn watch(&mut self) {
        for (after, limit, reply) in std::mem::take(&mut self.watching) {
            match self.read_events(after, limit) {
                Ok(events) if events.is_empty() => self.watching.push((after, limit, reply)),
                answer => reply(answer),
            }
        }
    }

    fn read_events(&mut self, after: u64, limit: u32) -> Result<Vec<Event>, Refused> {
        let limit = limit.clamp(1, MAX_LIST) as usize;
        self.store.events(after, limit).map_err(|error| unreadable(&error))
    }

    fn failure(&self) -> Option<Refused> {
        self.failed.clone().map(Refused::Storage)
    }

    /// Answers after the commit. A failed commit replaces success, but no refusal.
    fn answer<T: Send + 'static>(&mut self, reply: Reply<T>, result: Result<T, Refused>) {
        self.answers.push(Box::new(move |failure| match (failure, result) {
            (Some(failure), Ok(_)) => reply(Err(failure.clone())),
            (_, result) => reply(result),
        }));
    }

    /// Handles a message; true if it is the last one.
    fn handle(&mut self, message: Message) -> bool {
        let now = self.clock.now();
        match message {
            Message::Submit(submit, reply, ended) => self.submit(submit, reply, ended, now),
            Message::Wait(id, reply) => self.wait(id, reply),
            Message::Show(id, reply) => {
                self.flush();
                let shown = self.show(id);
                reply(shown);
            }
            Message::List(mut filter, reply) => {
                self.flush();
                filter.limit = filter.limit.clamp(1, MAX_LIST);
                reply(self.store.list(&filter).map_err(|error| unreadable(&error)));
            }
            Message::Cancel(id, reply) => {
                let result = self.change(|engine, changes| engine.cancel(id, now, changes));
                let result = match result {
                    Err(Refused::UnknownJob(id)) => self.explain(id),
                    result => result,
                };
                self.answer(reply, result);
            }
            Message::Retry(id, reply) => {
                let result = self.retry(id, now);
                self.answer(reply, result);
            }
            Message::Definitions(reply) => reply(Ok(self.overview())),
            Message::Define(definition, reply) => {
                let result = self.change(|engine, changes| engine.define(definition, changes));
                self.answer(reply, result);
            }
            Message::Events { after, limit, wait, reply } => {
                self.flush();
                match self.read_events(after, limit) {
                    Ok(events) if events.is_empty() && wait => {
                        self.watching.push((after, limit, reply));
                    }
                    answer => reply(answer),
                }
            }
            Message::Attach(worker, attach, sink, reply) => {
                let result = self.change(|engine, changes| engine.attach(worker, attach, changes));
                if result.is_ok() {
                    self.sinks.insert(worker, sink);
                }
                self.answer(reply, result);
            }
            Message::Credit(worker, jobs) => {
                let _ = self.change(|engine, changes| {
                    engine.credit(worker, jobs, now, changes);
                    Ok(())
                });
            }
            Message::Drain(worker) => self.engine.drain(worker),
            Message::Detach(worker) => {
                self.sinks.remove(&worker);
                self.engine.detach(worker, now);
            }
            Message::Beats(worker, beats, reply) => {
                let verdicts = beats.into_iter().map(|beat| {
                    let lease = (beat.id, beat.token);
                    (beat.id, self.engine.beat(worker, lease, beat.progress, now))
                });
                let verdicts = verdicts.collect();
                reply(Ok(verdicts));
            }
            Message::Finish(worker, id, token, outcome, reply) => {
                let result = self.change(|engine, changes| {
                    engine.finish(worker, (id, token), outcome, now, changes)
                });
                self.answer(reply, result);
            }
            Message::Stop => return true,
        }
        false
    }

    /// Changes the engine, unless the store has failed.
    fn change<T>(
        &mut self,
        change: impl FnOnce(&mut Engine, &mut Changes) -> Result<T, Refused>,
    ) -> Result<T, Refused> {
        match self.failure() {
            Some(failure) => Err(failure),
            None => change(&mut self.engine, &mut self.changes),
        }
    }

    /// Writes the rows that wait, so that the store has the newest state.
    fn flush(&mut self) {
        if !self.changes.rows.is_empty() {
            self.commit();
        }
    }

    fn submit(
        &mut self,
        submit: Submit,
        reply: Reply<Accepted>,
        ended: Option<Reply<Ended>>,
        now: Timestamp,
    ) {
        if let Some((id, output)) = self.remembered(&submit) {
            self.engine.count_remembered(&submit.definition, 1);
            return reply(Ok(Accepted::Remembered { id, output }));
        }
        self.submissions += 1;
        let random = self.random.hash_one(self.submissions);
        let result = self.change(|engine, changes| engine.submit(submit, random, now, changes));
        if let (Ok(submitted), Some(ended)) = (&result, ended) {
            self.waiting.entry(submitted.id).or_default().push(ended);
        }
        self.answer(reply, result.map(Accepted::Queued));
    }

    /// A remembered result, from memory or from the store.
    fn remembered(&mut self, submit: &Submit) -> Option<(JobId, Bytes)> {
        let (key, id) = self.engine.lookup(submit)?;
        if let Some(found) = self.shared.memory.get(&key) {
            return Some(found);
        }
        // It may be among the rows that are not written yet.
        self.flush();
        let (stored, output) = self.store.result(id).ok()??;
        if stored != Some(key) {
            return None;
        }
        self.shared.memory.insert(key, (id, output.clone()));
        Some((id, output))
    }

    fn wait(&mut self, id: JobId, reply: Reply<Ended>) {
        if self.engine.job(id).is_some() {
            return self.waiting.entry(id).or_default().push(reply);
        }
        self.flush();
        reply(match self.store.job(id) {
            Ok(Some((record, output))) => Ok(Ended { record, output }),
            Ok(None) => Err(Refused::UnknownJob(id)),
            Err(error) => Err(unreadable(&error)),
        });
    }

    fn show(&mut self, id: JobId) -> Result<Shown, Refused> {
        let stored = self.store.job(id).map_err(|error| unreadable(&error))?;
        let (record, output) = stored.ok_or(Refused::UnknownJob(id))?;
        let history = self.store.history(record.event).map_err(|error| unreadable(&error))?;
        let progress = self.engine.job(id).map(|(_, progress)| progress).unwrap_or_default();
        Ok(Shown { record, progress, output, history })
    }

    fn retry(&mut self, id: JobId, now: Timestamp) -> Result<(), Refused> {
        self.flush();
        let stored = self.store.job(id).map_err(|error| unreadable(&error))?;
        let (record, _) = stored.ok_or(Refused::UnknownJob(id))?;
        let input = self.store.input(id).map_err(|error| unreadable(&error))?;
        let input = input.ok_or(Refused::UnknownJob(id))?;
        self.change(|engine, changes| engine.retry(record, input, now, changes))
    }

    /// Why a job that the engine does not have cannot be cancelled.
    fn explain(&mut self, id: JobId) -> Result<(), Refused> {
        match self.store.job(id) {
            Ok(Some((record, _))) => {
                let allowed = "only jobs that have not ended can be cancelled";
                Err(Refused::WrongState { id, state: record.state, allowed })
            }
            Ok(None) => Err(Refused::UnknownJob(id)),
            Err(error) => Err(unreadable(&error)),
        }
    }

    fn overview(&mut self) -> Vec<Overview> {
        let mut all = self.engine.overview();
        let kinds = self.shared.kinds.read().unwrap_or_else(PoisonError::into_inner);
        for overview in &mut all {
            let fast = kinds.get(&overview.kind.definition.name);
            overview.counts.remembered += fast.map_or(0, |kind| kind.hits.load(Ordering::Relaxed));
        }
        all
    }

    /// Shows the definitions to the fast path.
    fn learn_kinds(&mut self) {
        let mut kinds = self.shared.kinds.write().unwrap_or_else(PoisonError::into_inner);
        for overview in self.engine.overview() {
            let name = overview.kind.definition.name.clone();
            let hits = kinds.get(&name).map_or(0, |kind| kind.hits.load(Ordering::Relaxed));
            kinds.insert(name, Remembering { kind: overview.kind, hits: hits.into() });
        }
    }
}

/// The rows with one row for each job: its newest state, in the place of its first row.
fn coalesced(rows: Vec<Row>) -> Vec<Row> {
    let mut places: FxHashMap<JobId, usize> = FxHashMap::default();
    let mut kept = Vec::with_capacity(rows.len());
    for row in rows {
        match row {
            Row::Update(record) => match places.get(&record.id).map(|&place| &mut kept[place]) {
                Some(Row::Insert(older, ..) | Row::Update(older)) => *older = record,
                _ => {
                    places.insert(record.id, kept.len());
                    kept.push(Row::Update(record));
                }
            },
            Row::Insert(record, action, input) => {
                places.insert(record.id, kept.len());
                kept.push(Row::Insert(record, action, input));
            }
            row => kept.push(row),
        }
    }
    kept
}

fn unreadable(error: &StoreError) -> Refused {
    Refused::Storage(error.to_string().into())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{State, Submit};

    #[test]
    fn rows_of_one_job_become_one_row() {
        let (now, mut changes) = (Timestamp(1000), Changes::default());
        let mut engine = Engine::recover(Default::default(), now, &mut changes);
        engine.define(Definition::new("a"), &mut changes).unwrap();
        let submit = Submit::new("a", "x");
        let id = engine.submit(submit, 7, now, &mut changes).unwrap().id;
        engine.cancel(id, now, &mut changes).unwrap();
        let rows = coalesced(changes.rows);
        let events = rows.iter().filter(|row| matches!(row, Row::Event(_))).count();
        let jobs: Vec<&Record> = rows
            .iter()
            .filter_map(|row| match row {
                Row::Insert(record, ..) => Some(record),
                Row::Update(_) => panic!("the row of the insert has the newest state"),
                _ => None,
            })
            .collect();
        assert_eq!((jobs.len(), jobs[0].state, jobs[0].event), (1, State::Cancelled, 2));
        assert_eq!(events, 2, "no event is dropped");
    }
}
