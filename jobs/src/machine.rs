//! The state machine of one job: what a command does to it. Pure; time is an argument.
//!
//! ```text
//!            ┌─────────┐ due  ┌────────┐ lease ┌────────┐ finish  ┌───────────┐
//!  submit ──▶│ delayed │─────▶│ queued │──────▶│ leased │────────▶│ succeeded │
//!            └─────────┘      └────────┘       └────────┘         └───────────┘
//!                                 ▲  ▲  lost lease │ │ │ error    ┌────────┐
//!                                 │  └─────────────┘ │ └─────────▶│ failed │
//!                                 │ due ┌──────────┐ │ error      └────────┘
//!                                 └─────│ retrying │◀┘
//!                                       └──────────┘
//! ```
//!
//! Every state that is not final also leads to `cancelled` and `expired`. A failed, cancelled or
//! expired job can be queued again.

use std::time::Duration;

use bytes::Bytes;

use crate::job::{Lease, Outcome, Refused, Timestamp};
use crate::{Definition, Job, State, Token, WorkerId};

/// What happens to a job.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Command {
    /// A worker starts an attempt.
    Lease(Lease),
    /// This worker has the token and is alive. The lease is extended.
    Beat(Token, WorkerId),
    /// The attempt with this token has ended.
    Finish(Token, Outcome),
    /// The connection of this worker has ended. Its lease is lost soon, unless it comes back.
    Disconnect(WorkerId),
    /// A client no longer wants the job.
    Cancel,
    /// Time has passed.
    Tick,
}

/// Time in which a worker can come back with its leases after its connection has ended.
pub const GRACE: Duration = Duration::from_secs(1);

/// A step from one state to another, or to the same one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Step {
    /// Nothing to record.
    None,
    /// The job has a new state. The text says why, for people.
    To(State, String),
    /// The job has succeeded with this result.
    Result(Bytes),
}

/// Applies a command to a job. A refused command changes nothing.
///
/// # Errors
/// [`Refused::StaleToken`] for a token that is not that of the current lease,
/// [`Refused::WrongState`] for a command that the state does not allow.
pub fn decide(
    job: &mut Job,
    command: Command,
    definition: &Definition,
    now: Timestamp,
) -> Result<Step, Refused> {
    match command {
        Command::Lease(lease) => {
            if job.state != State::Queued {
                let allowed = "only queued jobs can be leased";
                return Err(Refused::WrongState { id: job.id, state: job.state, allowed });
            }
            let worker = lease.name.to_string();
            job.attempts += 1;
            job.lease = Some(lease);
            Ok(to(job, State::Leased, worker))
        }
        Command::Beat(token, worker) => {
            let id = job.id;
            let lease = job.lease.as_mut().filter(|lease| lease.token == token);
            let lease = lease.ok_or(Refused::StaleToken(id))?;
            lease.until = now.after(definition.lease);
            // It may have come back on another connection.
            lease.worker = worker;
            Ok(Step::None)
        }
        Command::Finish(token, outcome) => {
            if job.lease.as_ref().is_none_or(|lease| lease.token != token) {
                return Err(Refused::StaleToken(job.id));
            }
            match outcome {
                Outcome::Succeeded(result) => {
                    to(job, State::Succeeded, String::new());
                    Ok(Step::Result(result))
                }
                Outcome::Failed { error, retry } => Ok(fail(job, definition, now, error, retry)),
            }
        }
        Command::Disconnect(worker) => {
            if let Some(lease) = job.lease.as_mut().filter(|lease| lease.worker == worker) {
                lease.until = lease.until.min(now.after(GRACE));
            }
            Ok(Step::None)
        }
        Command::Cancel => Ok(to(job, State::Cancelled, String::new())),
        Command::Tick => Ok(tick(job, definition, now)),
    }
}

fn tick(job: &mut Job, definition: &Definition, now: Timestamp) -> Step {
    if job.expires.is_some_and(|expires| expires <= now) {
        return to(job, State::Expired, "no result in time".to_owned());
    }
    match (job.state, &job.lease) {
        (State::Delayed | State::Retrying, _) if job.due <= now => {
            to(job, State::Queued, String::new())
        }
        (State::Leased, Some(lease)) if lease.deadline <= now => {
            let error = format!("{} did not finish within {:?}", lease.name, definition.deadline);
            fail(job, definition, now, error, true)
        }
        (State::Leased, Some(lease)) if lease.until <= now => {
            let why = format!("lost the lease of {}: no heartbeat", lease.name);
            job.failures += 1;
            match job.failures < definition.max_attempts {
                // A dead worker says nothing about the job: no pause.
                true => to(job, State::Queued, why),
                false => to(job, State::Failed, why),
            }
        }
        _ => Step::None,
    }
}

/// Ends an attempt with an error: the job gets another one after a pause, or fails.
fn fail(
    job: &mut Job,
    definition: &Definition,
    now: Timestamp,
    error: String,
    retry: bool,
) -> Step {
    job.failures += 1;
    if !retry || job.failures >= definition.max_attempts {
        return to(job, State::Failed, error);
    }
    job.due = now.after(definition.pause(job.failures));
    to(job, State::Retrying, error)
}

fn to(job: &mut Job, state: State, why: String) -> Step {
    if state != State::Leased {
        job.lease = None;
        job.progress = Bytes::new();
    }
    job.state = state;
    Step::To(state, why)
}
