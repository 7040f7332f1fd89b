//! A run: a splitter and a fold over bytes, with counts. It does no I/O.

use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::checkpoint::Checkpoint;
use crate::fold::{self, Fold, SinkError};
use crate::record::{Record, Rejected, Selection};
use crate::split::{DEFAULT_LIMIT, Format, Span, SplitError, Splitter};

/// The parameters of a run that its result depends on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Plan {
    /// The name of the fold.
    pub fold: String,
    /// The format of the bytes, as text.
    pub format: String,
    /// The field that the fold takes; the whole record if there is none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub field: Option<String>,
    /// The longest record.
    #[serde(default = "default_limit")]
    pub limit: u32,
}

fn default_limit() -> u32 {
    DEFAULT_LIMIT
}

/// What to do with a record that the fold refuses.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum OnBad {
    /// End the run with an error.
    #[default]
    Stop,
    /// Count it and go on.
    Skip,
    /// Count it, keep it until [`Run::take_bad`], and go on.
    SetAside,
}

/// Why a run cannot start or go on.
#[derive(Clone, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RunError {
    /// There is no fold of this name.
    #[error("there is no fold {0:?}; the folds are {names}", names = names())]
    UnknownFold(String),
    /// The format cannot be used.
    #[error("{0}")]
    Format(String),
    /// The bytes break the format.
    #[error(transparent)]
    Split(#[from] SplitError),
    /// A record was refused.
    #[error("record {index} at byte {offset}: {reason}")]
    Rejected {
        /// The number of the record, from 0.
        index: u64,
        /// The offset of its first byte.
        offset: u64,
        /// The reason.
        reason: Rejected,
    },
    /// The checkpoint belongs to another plan.
    #[error("the checkpoint is of another run: {0}")]
    OtherPlan(String),
    /// The fold cannot store records.
    #[error("{}", chain(.0))]
    Sink(Arc<SinkError>),
    /// The checkpoint is invalid.
    #[error("the checkpoint is invalid")]
    Corrupt,
}

impl From<SinkError> for RunError {
    fn from(error: SinkError) -> Self {
        RunError::Sink(Arc::new(error))
    }
}

/// The error and its causes.
fn chain(error: &SinkError) -> String {
    let cause = std::error::Error::source(error);
    cause.map_or_else(|| error.to_string(), |cause| format!("{error}: {cause}"))
}

impl RunError {
    /// The offset of the bytes that the error is about.
    pub fn offset(&self) -> Option<u64> {
        match self {
            RunError::Split(error) => Some(error.offset),
            RunError::Rejected { offset, .. } => Some(*offset),
            _ => None,
        }
    }
}

fn names() -> String {
    fold::FOLDS.map(|entry| entry.name).join(", ")
}

/// A refused record that was skipped.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Bad {
    /// The offset of its first byte.
    pub offset: u64,
    /// Its bytes; none if it is above the limit.
    pub bytes: Vec<u8>,
    /// The reason.
    pub reason: Rejected,
}

/// The state of a run, for people and for progress bars.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Report {
    /// Bytes that are processed, from the start of the file.
    pub bytes: u64,
    /// Records that the fold took.
    pub records: u64,
    /// Records that it refused.
    pub refused: u64,
    /// Time spent on splitting, parsing and folding, in this run.
    pub computing_ms: u64,
    /// Time spent waiting for bytes, in this run.
    pub waiting_ms: u64,
    /// The result so far.
    pub value: Value,
}

/// A run over the bytes of one file or stream.
///
/// ```
/// use afterimage_streams::run::{OnBad, Plan, Run};
///
/// let plan = Plan { fold: "mean".into(), format: "lines".into(), field: None, limit: 1 << 20 };
/// let mut run = Run::new(plan.clone(), OnBad::Stop)?;
/// run.push(b"1\n2\n1")?;
/// let checkpoint = run.checkpoint();
/// // The checkpoint is after the last whole record: `1` may go on.
/// assert_eq!(checkpoint.offset(), 4);
///
/// let mut run = Run::resume(plan, OnBad::Stop, &checkpoint)?;
/// run.push(b"10\n11\n")?;
/// run.finish()?;
/// assert_eq!(run.value()["mean"], 6.0);
/// # Ok::<(), afterimage_streams::run::RunError>(())
/// ```
pub struct Run {
    plan: Plan,
    on_bad: OnBad,
    splitter: Splitter,
    selection: Selection,
    fold: Box<dyn Fold>,
    records: u64,
    refused: u64,
    /// The bytes of the record in progress.
    rest: Vec<u8>,
    spans: Vec<Span>,
    bad: Vec<Bad>,
}

/// Skipped records that are kept until [`Run::take_bad`].
const MAX_BAD: usize = 16;

impl Run {
    /// A run at the start of the bytes.
    ///
    /// # Errors
    /// If the plan names no fold or no format.
    pub fn new(plan: Plan, on_bad: OnBad) -> Result<Self, RunError> {
        let fold = fold::new(&plan.fold);
        let fold = fold.ok_or_else(|| RunError::UnknownFold(plan.fold.clone()))?;
        Run::with_fold(plan, on_bad, fold, None)
    }

    /// A run with a fold that the caller has made, at `checkpoint` if there is one.
    ///
    /// # Errors
    /// As those of [`new`](Self::new) and [`resume`](Self::resume).
    pub fn with_fold(
        plan: Plan,
        on_bad: OnBad,
        fold: Box<dyn Fold>,
        checkpoint: Option<&Checkpoint>,
    ) -> Result<Self, RunError> {
        let format: Format = plan.format.parse().map_err(RunError::Format)?;
        if plan.field.is_some() && !format.is_text() {
            return Err(RunError::Format(format!("records of format {format} have no fields")));
        }
        let mut run = Run {
            on_bad,
            splitter: Splitter::new(format, plan.limit)?,
            selection: Selection::new(format, plan.field.as_deref()),
            fold,
            records: 0,
            refused: 0,
            rest: Vec::new(),
            spans: Vec::new(),
            bad: Vec::new(),
            plan,
        };
        if let Some(checkpoint) = checkpoint {
            run.go_to(checkpoint)?;
        }
        Ok(run)
    }

    /// Continues at a checkpoint. The next byte is the one at its offset.
    ///
    /// # Errors
    /// If the checkpoint belongs to another plan, or is invalid.
    pub fn resume(plan: Plan, on_bad: OnBad, checkpoint: &Checkpoint) -> Result<Self, RunError> {
        let mut run = Run::new(plan, on_bad)?;
        run.go_to(checkpoint)?;
        Ok(run)
    }

    fn go_to(&mut self, checkpoint: &Checkpoint) -> Result<(), RunError> {
        if checkpoint.plan != self.plan {
            let plan = serde_json::to_string(&checkpoint.plan).unwrap_or_default();
            return Err(RunError::OtherPlan(plan));
        }
        self.splitter = Splitter::restore(self.format(), self.plan.limit, &checkpoint.splitter)
            .map_err(|_| RunError::Corrupt)?;
        self.fold.merge(&checkpoint.fold).map_err(|_| RunError::Corrupt)?;
        self.selection.set_column(checkpoint.column);
        (self.records, self.refused) = (checkpoint.records, checkpoint.refused);
        Ok(())
    }

    fn format(&self) -> Format {
        // Checked by `new`.
        self.plan.format.parse().unwrap_or(Format::Lines)
    }

    /// The plan.
    pub fn plan(&self) -> &Plan {
        &self.plan
    }

    /// The offset of the next byte that [`push`](Self::push) expects.
    pub fn position(&self) -> u64 {
        self.splitter.offset() + self.rest.len() as u64
    }

    /// Takes the next bytes, of any number.
    ///
    /// # Errors
    /// If the bytes break the format, or a record is refused and the run stops at bad records. The
    /// run cannot go on then.
    pub fn push(&mut self, bytes: &[u8]) -> Result<(), RunError> {
        // A piece bounds the memory for spans and for the bytes of the record in progress.
        bytes.chunks(PIECE).try_for_each(|piece| self.take(piece, false))
    }

    /// Takes the end of the bytes.
    ///
    /// # Errors
    /// As those of [`push`](Self::push).
    pub fn finish(&mut self) -> Result<(), RunError> {
        self.take(&[], true)
    }

    fn take(&mut self, bytes: &[u8], is_last: bool) -> Result<(), RunError> {
        let mut rest = std::mem::take(&mut self.rest);
        let input = if rest.is_empty() {
            bytes
        } else {
            rest.extend_from_slice(bytes);
            &rest
        };
        let offset = self.splitter.offset();
        let mut spans = std::mem::take(&mut self.spans);
        spans.clear();
        let split = self.splitter.split(input, is_last, &mut spans);
        let folded = self.fold(input, offset, &spans);
        self.spans = spans;
        // Records before the error come first.
        folded?;
        let consumed = split?;
        if rest.is_empty() {
            rest.extend_from_slice(&bytes[consumed..]);
        } else {
            rest.drain(..consumed);
        }
        self.rest = rest;
        self.commit(is_last)
    }

    /// Lets the fold store its records, with the state after the last whole one.
    fn commit(&mut self, is_complete: bool) -> Result<(), RunError> {
        if self.fold.sink().is_none() {
            return Ok(());
        }
        let mut checkpoint = self.checkpoint();
        if is_complete {
            checkpoint = checkpoint.completed();
        }
        if let Some(sink) = self.fold.sink() {
            sink.commit(&checkpoint)?;
        }
        Ok(())
    }

    fn fold(&mut self, input: &[u8], offset: u64, spans: &[Span]) -> Result<(), RunError> {
        let takes_all = self.plan.field.is_none();
        for span in spans {
            let at = offset + span.start() as u64;
            let folded = match span.of(input) {
                None => Err(Rejected::TooLong { limit: self.splitter.limit() }),
                Some(bytes) if takes_all => self.fold.update(bytes),
                Some(bytes) if self.selection.needs_header() => {
                    match self.selection.header(bytes) {
                        Ok(()) => continue,
                        Err(reason) => Err(reason),
                    }
                }
                Some(bytes) => {
                    let selected = self.selection.of(Record { bytes, offset: at });
                    selected.and_then(|selected| self.fold.update(&selected))
                }
            };
            match folded {
                Ok(()) => self.records += 1,
                Err(reason) => self.refuse(span.of(input), at, reason)?,
            }
        }
        Ok(())
    }

    #[cold]
    fn refuse(
        &mut self,
        bytes: Option<&[u8]>,
        offset: u64,
        reason: Rejected,
    ) -> Result<(), RunError> {
        let index = self.records + self.refused;
        if self.on_bad == OnBad::Stop || self.selection.needs_header() {
            return Err(RunError::Rejected { index, offset, reason });
        }
        self.refused += 1;
        if self.on_bad == OnBad::SetAside || self.bad.len() < MAX_BAD {
            let bytes = bytes.unwrap_or_default().to_vec();
            self.bad.push(Bad { offset, bytes, reason });
        }
        Ok(())
    }

    /// The records that were refused since the last call; with [`OnBad::Skip`], at most the first
    /// sixteen.
    pub fn take_bad(&mut self) -> Vec<Bad> {
        std::mem::take(&mut self.bad)
    }

    /// The state after the last whole record.
    pub fn checkpoint(&self) -> Checkpoint {
        let (mut splitter, mut fold) = (Vec::new(), Vec::new());
        self.splitter.save(&mut splitter);
        self.fold.save(&mut fold);
        Checkpoint {
            plan: self.plan.clone(),
            splitter,
            fold,
            column: self.selection.column(),
            records: self.records,
            refused: self.refused,
            is_complete: false,
        }
    }

    /// The result so far.
    pub fn value(&self) -> Value {
        self.fold.value()
    }

    /// Counts, times and the result so far.
    pub fn report(&self, computing: Duration, waiting: Duration) -> Report {
        Report {
            bytes: self.splitter.offset(),
            records: self.records,
            refused: self.refused,
            computing_ms: computing.as_millis() as u64,
            waiting_ms: waiting.as_millis() as u64,
            value: self.value(),
        }
    }
}

/// Bytes that are split at once.
const PIECE: usize = 64 << 10;
