//! Folds: small states that records are added to.
//!
//! **The law of a fold.** The state depends on the records alone, and not on how they were divided
//! among chunks, threads and interruptions. So a fold has the same bytes after any of these.
//!
//! To add a fold, write a file in `fold/`, and add a line to [`FOLDS`].

mod count;
mod distinct;
pub mod exact;
mod numbers;
pub mod ports;
mod quantiles;

use serde_json::Value;

use crate::checkpoint::{Checkpoint, Damaged};
use crate::record::Rejected;

/// A computation over records, with a state that can be saved and merged.
///
/// ```
/// use afterimage_streams::fold;
///
/// let (mut first, mut second) = (fold::new("mean").unwrap(), fold::new("mean").unwrap());
/// first.update(b"1e16")?;
/// first.update(b"1")?;
/// second.update(b"-1e16")?;
/// let mut saved = Vec::new();
/// second.save(&mut saved);
/// first.merge(&saved).unwrap();
/// assert_eq!(first.value()["sum"], 1.0);
/// # Ok::<(), afterimage_streams::record::Rejected>(())
/// ```
pub trait Fold: Send {
    /// Adds a record, or the selected part of it. A rejected record changes nothing.
    ///
    /// # Errors
    /// If the fold cannot take the record.
    fn update(&mut self, record: &[u8]) -> Result<(), Rejected>;

    /// Appends the state. Equal states have equal bytes.
    fn save(&self, out: &mut Vec<u8>);

    /// Adds the records of a saved state.
    ///
    /// # Errors
    /// If the bytes are not a saved state of this fold. The state is unchanged then.
    fn merge(&mut self, saved: &[u8]) -> Result<(), Corrupt>;

    /// The result so far. Its JSON has at most 700 bytes, so that it fits in a progress message.
    fn value(&self) -> Value;

    /// Where the fold stores records, if it does.
    fn sink(&mut self) -> Option<&mut dyn Sink> {
        None
    }
}

/// A store of records, and of the checkpoint behind them.
pub trait Sink {
    /// Stores the records that the fold has taken since the last call, and the checkpoint behind
    /// them: both or neither.
    ///
    /// # Errors
    /// If they cannot be stored. The run cannot go on then.
    fn commit(&mut self, checkpoint: &Checkpoint) -> Result<(), SinkError>;
}

/// Why records cannot be stored.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SinkError {
    /// The database refuses the work.
    #[error("the database cannot be used")]
    Database(#[from] rusqlite::Error),
    /// The database has no run of this id.
    #[error("the database has no run {0:?} to resume")]
    Unknown(String),
    /// The database has a run of this id already.
    #[error("the database has a run {0:?} already; resume it, or choose another id")]
    Exists(String),
    /// Another client or instance continues the run.
    #[error("another connection continues this run")]
    Fenced,
    /// The checkpoint in the database is damaged.
    #[error("the checkpoint in the database is damaged")]
    Damaged(#[from] Damaged),
}

/// Bytes that are not a saved state.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the saved state is invalid")]
pub struct Corrupt;

/// The folds by name.
pub const FOLDS: [Entry; 5] = [
    Entry { name: "count", about: "Number of records", new: || Box::new(count::Count::default()) },
    Entry {
        name: "mean",
        about: "Exact mean, sum, minimum and maximum of numbers",
        new: || Box::new(numbers::Numbers::default()),
    },
    Entry {
        name: "quantiles",
        about: "Quantiles of numbers, within 0.8 %",
        new: || Box::new(quantiles::Quantiles::default()),
    },
    Entry {
        name: "distinct",
        about: "Estimate of the number of distinct records, with a standard error of 0.8 %",
        new: || Box::new(distinct::Distinct::default()),
    },
    Entry {
        name: ports::PORTS,
        about: "Sea ports of one JSON object, into a table of SQLite",
        new: || Box::new(ports::Ports::default()),
    },
];

/// A fold in the table.
#[derive(Debug)]
pub struct Entry {
    /// Its name on the command line and in the protocol.
    pub name: &'static str,
    /// One line for people.
    pub about: &'static str,
    new: fn() -> Box<dyn Fold>,
}

/// A fold without records; `None` if there is no fold of this name.
pub fn new(name: &str) -> Option<Box<dyn Fold>> {
    let entry = FOLDS.iter().find(|entry| entry.name == name)?;
    Some((entry.new)())
}

/// A float as JSON; `null` if it is infinite or not a number.
fn float(value: f64) -> Value {
    serde_json::Number::from_f64(value).map_or(Value::Null, Value::Number)
}

/// Reads numbers of a saved state.
struct Saved<'a>(&'a [u8]);

impl Saved<'_> {
    fn u64(&mut self) -> Result<u64, Corrupt> {
        let (bytes, rest) = self.0.split_first_chunk::<8>().ok_or(Corrupt)?;
        self.0 = rest;
        Ok(u64::from_le_bytes(*bytes))
    }

    fn u32(&mut self) -> Result<u32, Corrupt> {
        let (bytes, rest) = self.0.split_first_chunk::<4>().ok_or(Corrupt)?;
        self.0 = rest;
        Ok(u32::from_le_bytes(*bytes))
    }

    fn end(self) -> Result<(), Corrupt> {
        if self.0.is_empty() { Ok(()) } else { Err(Corrupt) }
    }
}
