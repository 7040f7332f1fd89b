//! Checkpoints: the state of a run after a whole record, as bytes.
//!
//! | bytes | contents |
//! | --- | --- |
//! | 8 | `AFSTRM01` |
//! | 4 + n | the plan, as JSON |
//! | 4 + n | the splitter |
//! | 4 + n | the fold |
//! | 4 | the column of CSV; the highest number for none |
//! | 8, 8 | records, refused records |
//! | 1 | whether the bytes have ended |
//! | 4 | CRC-32 of all bytes before |
//!
//! Numbers have their lowest byte first.

use crate::run::Plan;

const MAGIC: &[u8; 8] = b"AFSTRM01";

/// No column.
const NONE: u32 = u32::MAX;

/// The state of a run after a whole record.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Checkpoint {
    pub(crate) plan: Plan,
    pub(crate) splitter: Vec<u8>,
    pub(crate) fold: Vec<u8>,
    pub(crate) column: Option<u32>,
    pub(crate) records: u64,
    pub(crate) refused: u64,
    /// All bytes are processed, and the fold has the result.
    pub(crate) is_complete: bool,
}

/// Bytes that are not a checkpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the bytes are not a checkpoint, or are damaged")]
pub struct Damaged;

impl Checkpoint {
    /// The offset of the first byte that is not processed.
    pub fn offset(&self) -> u64 {
        // The splitter's state begins with it.
        self.splitter.first_chunk().map_or(0, |bytes| u64::from_le_bytes(*bytes))
    }

    /// The plan of the run.
    pub fn plan(&self) -> &Plan {
        &self.plan
    }

    /// The checkpoint of a run whose bytes have all been processed.
    #[must_use]
    pub fn completed(mut self) -> Self {
        self.is_complete = true;
        self
    }

    /// Whether all bytes are processed.
    pub fn is_complete(&self) -> bool {
        self.is_complete
    }

    /// The checkpoint as bytes. Equal states have equal bytes.
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut out = MAGIC.to_vec();
        let plan = serde_json::to_vec(&self.plan).unwrap_or_default();
        for part in [&plan, &self.splitter, &self.fold] {
            out.extend_from_slice(&(part.len() as u32).to_le_bytes());
            out.extend_from_slice(part);
        }
        out.extend_from_slice(&self.column.unwrap_or(NONE).to_le_bytes());
        out.extend_from_slice(&self.records.to_le_bytes());
        out.extend_from_slice(&self.refused.to_le_bytes());
        out.push(self.is_complete.into());
        out.extend_from_slice(&crc32fast::hash(&out).to_le_bytes());
        out
    }

    /// The checkpoint of these bytes.
    ///
    /// # Errors
    /// If they are not a checkpoint, or damaged.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, Damaged> {
        Checkpoint::parse(bytes).ok_or(Damaged)
    }

    fn parse(bytes: &[u8]) -> Option<Self> {
        let (body, sum) = bytes.split_last_chunk::<4>()?;
        if crc32fast::hash(body) != u32::from_le_bytes(*sum) {
            return None;
        }
        let mut rest = body.strip_prefix(MAGIC)?;
        let mut part = || {
            let (len, after) = rest.split_first_chunk::<4>()?;
            let (part, after) = after.split_at_checked(u32::from_le_bytes(*len) as usize)?;
            rest = after;
            Some(part)
        };
        let plan = serde_json::from_slice(part()?).ok()?;
        let (splitter, fold) = (part()?.to_vec(), part()?.to_vec());
        let (column, rest) = rest.split_first_chunk::<4>()?;
        let column = Some(u32::from_le_bytes(*column)).filter(|column| *column != NONE);
        let (records, rest) = rest.split_first_chunk::<8>()?;
        let (refused, rest) = rest.split_first_chunk::<8>()?;
        let is_complete = match rest {
            [0] => false,
            [1] => true,
            _ => return None,
        };
        let (records, refused) = (u64::from_le_bytes(*records), u64::from_le_bytes(*refused));
        Some(Checkpoint { plan, splitter, fold, column, records, refused, is_complete })
    }
}
