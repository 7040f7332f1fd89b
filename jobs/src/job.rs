//! A job: its state, its lease, and the reasons to refuse a command.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use afterimage_core::Status;
use bytes::Bytes;

use crate::{Action, Code, JobId};

/// A point in time: milliseconds since 1970.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Timestamp(pub u64);

impl Timestamp {
    /// The time after this pause.
    #[must_use]
    pub fn after(self, pause: Duration) -> Self {
        let millis = u64::try_from(pause.as_millis()).unwrap_or(u64::MAX);
        // Times are stored as signed integers.
        Timestamp(self.0.saturating_add(millis).min(i64::MAX as u64))
    }

    /// The time from `earlier` to this one; zero if it is later.
    #[must_use]
    pub fn since(self, earlier: Timestamp) -> Duration {
        Duration::from_millis(self.0.saturating_sub(earlier.0))
    }
}

/// One table makes the number, the name, and the successors of every state.
macro_rules! states {
    ($($(#[$doc:meta])* $state:ident = $code:literal, $name:literal => [$($next:ident)*];)*) => {
        /// The state of a job.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
        #[non_exhaustive]
        pub enum State {
            $($(#[$doc])* $state,)*
        }

        impl State {
            /// Every state, in the order of their numbers.
            pub const ALL: &[State] = &[$(State::$state,)*];

            /// The number in files and on the wire.
            #[must_use]
            pub const fn code(self) -> u8 {
                match self { $(State::$state => $code,)* }
            }

            /// The state of a number.
            #[must_use]
            pub const fn from_code(code: u8) -> Option<State> {
                match code { $($code => Some(State::$state),)* _ => None }
            }

            /// The name, as commands and events have it.
            #[must_use]
            pub const fn name(self) -> &'static str {
                match self { $(State::$state => $name,)* }
            }

            /// The states that can follow it.
            #[must_use]
            pub const fn next(self) -> &'static [State] {
                match self { $(State::$state => &[$(State::$next,)*],)* }
            }
        }
    };
}

states! {
    /// Waits for a worker. A restart of the server keeps it.
    Queued = 1, "queued" => [Leased Cancelled Expired];
    /// A worker runs it. A lost lease queues it again; a restart of the server loses all leases.
    Leased = 2, "leased" => [Succeeded Failed Retrying Queued Cancelled Expired];
    /// An attempt has failed; the next one waits for the end of a pause.
    Retrying = 3, "retrying" => [Queued Cancelled Expired];
    /// Waits for its start time.
    Delayed = 4, "delayed" => [Queued Cancelled Expired];
    /// It has a result.
    Succeeded = 5, "succeeded" => [];
    /// All attempts have failed, or one failed for good. An administrator can queue it again.
    Failed = 6, "failed" => [Queued];
    /// A client has cancelled it. It can be queued again.
    Cancelled = 7, "cancelled" => [Queued];
    /// Its time was over before it had a result. It can be queued again.
    Expired = 8, "expired" => [Queued];
}

impl State {
    /// Whether the job has ended.
    #[must_use]
    pub const fn is_final(self) -> bool {
        matches!(self, State::Succeeded | State::Failed | State::Cancelled | State::Expired)
    }

    /// The state of a name.
    #[must_use]
    pub fn from_name(name: &str) -> Option<State> {
        State::ALL.iter().copied().find(|state| state.name() == name)
    }
}

impl fmt::Display for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// The fencing token of a lease: it increases with every lease of a store, also across restarts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Token(pub u64);

/// A worker that is attached to the server, a number of its own within the process.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct WorkerId(pub u64);

/// The right of one worker to run a job, for a time.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Lease {
    /// Its fencing token.
    pub token: Token,
    /// The worker.
    pub worker: WorkerId,
    /// The worker's name, for people.
    pub name: Arc<str>,
    /// The worker's code.
    pub code: Code,
    /// The lease is lost at this time, unless a heartbeat extends it.
    pub until: Timestamp,
    /// The lease is lost at this time in any case.
    pub deadline: Timestamp,
    /// The lease was granted at this time.
    pub since: Timestamp,
}

/// A job that has not ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Job {
    /// Its id.
    pub id: JobId,
    /// The definition's name.
    pub definition: Arc<str>,
    /// The definition's version at the time of submission.
    pub version: u32,
    /// Its state.
    pub state: State,
    /// Jobs of a higher priority start first.
    pub priority: u8,
    /// The input.
    pub input: Bytes,
    /// Its action, if equal jobs join it and its result is remembered.
    pub action: Option<Action>,
    /// The end of a delay or of a pause between attempts.
    pub due: Timestamp,
    /// Without a result at this time the job expires.
    pub expires: Option<Timestamp>,
    /// Leases that were granted.
    pub attempts: u32,
    /// Attempts that failed or lost their lease.
    pub failures: u32,
    /// The lease, in state `leased` only.
    pub lease: Option<Lease>,
    /// The worker's newest report on its progress.
    pub progress: Bytes,
}

impl Job {
    /// When [`Command::Tick`](crate::Command::Tick) changes it next, if no command comes before.
    #[must_use]
    pub fn next_due(&self) -> Option<Timestamp> {
        let own = match (self.state, &self.lease) {
            (State::Delayed | State::Retrying, _) => Some(self.due),
            (State::Leased, Some(lease)) => Some(lease.until.min(lease.deadline)),
            _ => None,
        };
        own.into_iter().chain(self.expires).min()
    }
}

/// How an attempt ended, as its worker reports it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The result.
    Succeeded(Bytes),
    /// An error.
    Failed {
        /// The error, for people.
        error: String,
        /// Whether another attempt can succeed.
        retry: bool,
    },
}

/// Why a command has no effect: a fault of the caller, or a limit.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Refused {
    /// There is no such job.
    #[error("there is no job {0}")]
    UnknownJob(JobId),
    /// There is no such definition.
    #[error("there is no definition {0:?}; start a worker for it, or create it first")]
    UnknownDefinition(String),
    /// The lease is lost: the job has ended, or another worker has it.
    #[error("the lease on job {0} is lost")]
    StaleToken(JobId),
    /// The state of the job does not allow the command.
    #[error("job {id} is {state}; {allowed}")]
    WrongState {
        /// The job.
        id: JobId,
        /// Its state.
        state: State,
        /// The states that allow the command.
        allowed: &'static str,
    },
    /// A value is not valid; the text names it.
    #[error("{0}")]
    Invalid(String),
    /// A limit is reached; the text names it.
    #[error("{0}")]
    Limit(String),
    /// The store cannot write. No command that changes a job is accepted.
    #[error("the store failed and accepts no changes: {0}; restart the server on a healthy disk")]
    Storage(Arc<str>),
}

impl Refused {
    /// The same for programs.
    #[must_use]
    pub fn status(&self) -> Status {
        match self {
            Refused::Limit(_) => Status::Overloaded,
            Refused::Storage(_) => Status::StorageFailed,
            _ => Status::BadArgument,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_state_has_its_number_and_its_name() {
        for &state in State::ALL {
            assert_eq!(State::from_code(state.code()), Some(state));
            assert_eq!(State::from_name(state.name()), Some(state));
            let leaves = state.next().iter().any(|next| *next != State::Queued);
            assert_eq!(state.is_final(), !leaves, "{state}");
        }
        assert_eq!(State::from_code(0), None);
    }
}
