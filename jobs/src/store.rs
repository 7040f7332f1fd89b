//! The trait of a store, and the rows that an engine writes to it.

use std::sync::Arc;

use bytes::Bytes;

use crate::{Action, Code, Definition, JobId, ResultKey, State, Timestamp};

/// A change to write. The rows of one commit are written in one transaction, in their order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Row {
    /// A definition is new or has changed.
    Definition(Kind),
    /// A job is new.
    Insert(Record, Option<Action>, Bytes),
    /// A job has changed.
    Update(Record),
    /// A job has made a step.
    Event(Event),
    /// A job has a result.
    Result {
        /// The job.
        id: JobId,
        /// The key of a result that is remembered.
        key: Option<ResultKey>,
        /// The short digest of the output.
        digest: u64,
        /// The result.
        output: Bytes,
    },
}

/// A definition and the facts that the server has learned about it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Kind {
    /// The definition.
    pub definition: Definition,
    /// The code of its newest worker. Only this code gets jobs.
    pub code: Option<Code>,
    /// Two jobs with one action and different results. Nothing is remembered any more.
    pub unstable: Option<(JobId, JobId)>,
}

/// A job as lists show it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Record {
    /// Its id. It contains the time of submission.
    pub id: JobId,
    /// The definition's name.
    pub definition: Arc<str>,
    /// The definition's version.
    pub version: u32,
    /// Its state.
    pub state: State,
    /// Its priority.
    pub priority: u8,
    /// Leases that were granted.
    pub attempts: u32,
    /// Attempts that failed or lost their lease.
    pub failures: u32,
    /// The end of a delay or a pause.
    pub due: Timestamp,
    /// Without a result at this time the job expires.
    pub expires: Option<Timestamp>,
    /// The end of the job.
    pub ended: Option<Timestamp>,
    /// The position of its newest event.
    pub event: u64,
    /// The newest reason: an error, or the name of the worker.
    pub detail: String,
}

/// A step of a job, in the log of all steps. The log has no gaps, and its order is that of the
/// commits.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Event {
    /// Its position in the log, from 1.
    pub position: u64,
    /// The position of the job's event before it; 0 for the first one.
    pub previous: u64,
    /// The job.
    pub job: JobId,
    /// The definition's name.
    pub definition: Arc<str>,
    /// The new state.
    pub state: State,
    /// The number of the attempt; 0 before the first one.
    pub attempt: u32,
    /// The time.
    pub at: Timestamp,
    /// The reason: an error, or the name of the worker.
    pub detail: String,
}

/// The jobs that a list has.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Filter {
    /// Jobs of this definition only.
    pub definition: Option<String>,
    /// Jobs in this state only.
    pub state: Option<State>,
    /// Jobs before this one only.
    pub before: Option<JobId>,
    /// The largest number of jobs.
    pub limit: u32,
}

impl Filter {
    /// Whether a list with this filter has the job.
    #[must_use]
    pub fn matches(&self, record: &Record) -> bool {
        self.definition.as_deref().is_none_or(|name| *name == *record.definition)
            && self.state.is_none_or(|state| state == record.state)
            && self.before.is_none_or(|before| record.id < before)
    }
}

/// The content of a store when a server starts.
#[derive(Clone, Debug, Default)]
pub struct Recovered {
    /// The definitions.
    pub kinds: Vec<Kind>,
    /// The jobs that have not ended, with action and input.
    pub live: Vec<(Record, Option<Action>, Bytes)>,
    /// The first bits of each remembered key, the job, and the short digest of its output.
    pub known: Vec<(u64, JobId, u64)>,
    /// The highest key of a job.
    pub last_key: i64,
    /// The position of the newest event.
    pub last_event: u64,
    /// The number of starts of a server on this store, this one included. It is stored.
    pub epoch: u32,
}

/// Why a store cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StoreError {
    /// Another process uses the store.
    #[error("{0} is in use by another process")]
    Locked(String),
    /// The file was written by a newer version.
    #[error("{file} has format {found}; this version reads up to {known}")]
    Newer {
        /// The file.
        file: String,
        /// Its format.
        found: i64,
        /// The newest known format.
        known: i64,
    },
    /// A row cannot be read.
    #[error("{0}")]
    Corrupt(String),
    /// The disk or the database failed.
    #[error("{0}")]
    Failed(String),
}

/// A place where jobs, results and events are kept. It blocks, and one thread calls it.
pub trait Store: Send + 'static {
    /// Reads the content, counts the start, and returns when that is durable.
    ///
    /// # Errors
    /// If the store cannot be read or written.
    fn recover(&mut self) -> Result<Recovered, StoreError>;

    /// Writes the rows in one transaction. They are durable when it returns. `floor` is the key of
    /// the oldest job that has not ended.
    ///
    /// # Errors
    /// If they may not be durable. The server then writes nothing any more.
    fn commit(&mut self, rows: &[Row], floor: i64) -> Result<(), StoreError>;

    /// The job with this id, and its result.
    ///
    /// # Errors
    /// If the store cannot be read.
    fn job(&mut self, id: JobId) -> Result<Option<(Record, Option<Bytes>)>, StoreError>;

    /// The action and the input of a job.
    ///
    /// # Errors
    /// If the store cannot be read.
    fn input(&mut self, id: JobId) -> Result<Option<(Option<Action>, Bytes)>, StoreError>;

    /// The result of a job, and the key under which it is remembered.
    ///
    /// # Errors
    /// If the store cannot be read.
    fn result(&mut self, id: JobId) -> Result<Option<(Option<ResultKey>, Bytes)>, StoreError>;

    /// Jobs, newest first.
    ///
    /// # Errors
    /// If the store cannot be read.
    fn list(&mut self, filter: &Filter) -> Result<Vec<Record>, StoreError>;

    /// The events after a position, in order.
    ///
    /// # Errors
    /// If the store cannot be read.
    fn events(&mut self, after: u64, limit: usize) -> Result<Vec<Event>, StoreError>;

    /// The events of a job, in order. `last` is the position of its newest event.
    ///
    /// # Errors
    /// If the store cannot be read.
    fn history(&mut self, last: u64) -> Result<Vec<Event>, StoreError>;
}
