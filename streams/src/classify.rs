//! Classification of all records of a file through a memo, as an ordinary client of it.
//!
//! The labels are written in the order of the records, one in each line. A checkpoint has the
//! length of the output beside the offset in the input, so that a run that continues writes each
//! label once.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::time::{Duration, Instant};

use afterimage_core::Origin;
use afterimage_wire::Client;
use afterimage_wire::client::CallError;
use serde_json::json;

use crate::checkpoint::Checkpoint;
use crate::folder::{FolderError, Lease};
use crate::record::Rejected;
use crate::run::{Plan, Report, RunError};
use crate::split::{Format, SplitError, Splitter};

/// The name in a plan.
pub const CLASSIFY: &str = "classify";

/// Bytes that are read, split and sent at once. The labels of a piece are written together.
const PIECE: usize = 4 << 20;

/// Why a file is not classified to its end.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ClassifyError {
    /// The file breaks its format, or the checkpoint belongs to another run.
    #[error(transparent)]
    Run(#[from] RunError),
    /// The checkpoint cannot be used.
    #[error(transparent)]
    Folder(#[from] FolderError),
    /// The memo has no answer.
    #[error("the memo has no answer")]
    Call(#[from] CallError),
    /// The input cannot be read.
    #[error("cannot read the input")]
    Read(#[source] io::Error),
    /// The output cannot be written.
    #[error("cannot write the output")]
    Write(#[source] io::Error),
    /// The output is shorter than the part of it that the run had written.
    #[error("the output has {found} bytes; the run had written {written}")]
    OutputShort {
        /// Its length.
        found: u64,
        /// The length at the checkpoint.
        written: u64,
    },
}

impl From<SplitError> for ClassifyError {
    fn from(error: SplitError) -> Self {
        ClassifyError::Run(error.into())
    }
}

/// A file that is being classified.
pub struct Classify {
    plan: Plan,
    splitter: Splitter,
    output: File,
    /// Bytes of the output.
    written: u64,
    hits: u64,
    misses: u64,
    coalesced: u64,
    lease: Option<Lease>,
    is_complete: bool,
}

impl Classify {
    /// A run that begins, or continues at `checkpoint`. Bytes of the output that are after the
    /// checkpoint are written again. `lease` stores checkpoints.
    ///
    /// # Errors
    /// If the checkpoint belongs to another plan, or the output does not fit it.
    pub fn new(
        plan: Plan,
        mut output: File,
        lease: Option<Lease>,
        checkpoint: Option<&Checkpoint>,
    ) -> Result<Self, ClassifyError> {
        let format: Format = plan.format.parse().map_err(RunError::Format)?;
        let mut splitter = Splitter::new(format, plan.limit)?;
        let mut numbers = [0; 4];
        let mut is_complete = false;
        if let Some(checkpoint) = checkpoint {
            if checkpoint.plan != plan {
                let plan = serde_json::to_string(&checkpoint.plan).unwrap_or_default();
                return Err(RunError::OtherPlan(plan).into());
            }
            splitter = Splitter::restore(format, plan.limit, &checkpoint.splitter)
                .map_err(|_| RunError::Corrupt)?;
            numbers = saved(&checkpoint.fold).ok_or(RunError::Corrupt)?;
            is_complete = checkpoint.is_complete;
        }
        let [written, hits, misses, coalesced] = numbers;
        let found = output.metadata().map_err(ClassifyError::Write)?.len();
        if found < written {
            return Err(ClassifyError::OutputShort { found, written });
        }
        output.set_len(written).map_err(ClassifyError::Write)?;
        output.seek(SeekFrom::Start(written)).map_err(ClassifyError::Write)?;
        Ok(Classify {
            plan,
            splitter,
            output,
            written,
            hits,
            misses,
            coalesced,
            lease,
            is_complete,
        })
    }

    /// The offset of the next byte that [`run`](Self::run) expects.
    pub fn position(&self) -> u64 {
        self.splitter.offset()
    }

    /// Classifies the records of `input`, and returns the counts. A checkpoint is stored each
    /// `checkpoint_every`, and also when the run ends with an error.
    ///
    /// # Errors
    /// [`ClassifyError`]. The output then ends with a whole record.
    pub async fn run(
        &mut self,
        client: &Client,
        input: &mut (dyn Read + Send),
        checkpoint_every: Duration,
        mut progress: impl FnMut(&Report),
    ) -> Result<Report, ClassifyError> {
        let mut done = self.drive(client, input, checkpoint_every, &mut progress).await;
        if let Err(ClassifyError::Folder(_)) = done {
            return Err(done.err().unwrap_or(FolderError::Fenced.into()));
        }
        self.is_complete = done.is_ok();
        let saved = self.save();
        if done.is_ok() {
            done = saved;
        }
        done.map(|()| self.report())
    }

    async fn drive(
        &mut self,
        client: &Client,
        input: &mut (dyn Read + Send),
        checkpoint_every: Duration,
        progress: &mut impl FnMut(&Report),
    ) -> Result<(), ClassifyError> {
        let (mut bytes, mut filled, mut spans) = (vec![0; PIECE], 0, Vec::new());
        let (mut saved, mut is_last) = (Instant::now(), self.is_complete);
        while !is_last {
            if filled == bytes.len() {
                // A record that is longer than a piece, within the limit.
                bytes.resize(bytes.len() * 2, 0);
            }
            while filled < bytes.len() && !is_last {
                match input.read(&mut bytes[filled..]) {
                    Ok(0) => is_last = true,
                    Ok(read) => filled += read,
                    Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                    Err(error) => return Err(ClassifyError::Read(error)),
                }
            }
            // The state counts only once the labels are written.
            let mut splitter = self.splitter.clone();
            spans.clear();
            let split = splitter.split(&bytes[..filled], is_last, &mut spans);
            let mut records = Vec::with_capacity(spans.len());
            for span in &spans {
                let offset = self.position() + span.start() as u64;
                records.push(span.of(&bytes).ok_or_else(|| RunError::Rejected {
                    index: self.records() + records.len() as u64,
                    offset,
                    reason: Rejected::TooLong { limit: self.plan.limit },
                })?);
            }
            let labels = client.classify_many(&records).await?;
            let consumed = split?;
            let mut lines = String::with_capacity(4 * labels.len());
            for label in labels {
                lines.push_str(&label.label.to_string());
                lines.push('\n');
                match label.origin {
                    Origin::Hit => self.hits += 1,
                    Origin::Miss => self.misses += 1,
                    Origin::Coalesced => self.coalesced += 1,
                }
            }
            self.output.write_all(lines.as_bytes()).map_err(ClassifyError::Write)?;
            self.written += lines.len() as u64;
            self.splitter = splitter;
            bytes.copy_within(consumed..filled, 0);
            filled -= consumed;
            if saved.elapsed() >= checkpoint_every {
                self.save()?;
                saved = Instant::now();
            }
            progress(&self.report());
        }
        Ok(())
    }

    fn records(&self) -> u64 {
        self.hits + self.misses + self.coalesced
    }

    /// Stores a checkpoint, after the output that it counts on.
    fn save(&self) -> Result<(), ClassifyError> {
        let Some(lease) = &self.lease else { return Ok(()) };
        self.output.sync_data().map_err(ClassifyError::Write)?;
        let mut splitter = Vec::new();
        self.splitter.save(&mut splitter);
        let numbers = [self.written, self.hits, self.misses, self.coalesced];
        lease.save(&Checkpoint {
            plan: self.plan.clone(),
            splitter,
            fold: numbers.into_iter().flat_map(u64::to_le_bytes).collect(),
            column: None,
            records: self.records(),
            refused: 0,
            is_complete: self.is_complete,
        })?;
        Ok(())
    }

    /// Counts so far.
    pub fn report(&self) -> Report {
        let (hits, misses, coalesced) = (self.hits, self.misses, self.coalesced);
        Report {
            bytes: self.position(),
            records: self.records(),
            value: json!({ "hits": hits, "misses": misses, "coalesced": coalesced }),
            ..Report::default()
        }
    }
}

/// The four numbers of a checkpoint.
fn saved(bytes: &[u8]) -> Option<[u64; 4]> {
    let (numbers, rest) = bytes.as_chunks::<8>();
    let numbers: [[u8; 8]; 4] = numbers.try_into().ok()?;
    rest.is_empty().then(|| numbers.map(u64::from_le_bytes))
}
