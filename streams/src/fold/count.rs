//! The number of records.

use serde_json::{Value, json};

use super::{Corrupt, Fold, Saved};
use crate::record::Rejected;

/// See the module's documentation.
#[derive(Debug, Default)]
pub(super) struct Count(u64);

impl Fold for Count {
    fn update(&mut self, _: &[u8]) -> Result<(), Rejected> {
        self.0 = self.0.saturating_add(1);
        Ok(())
    }

    fn save(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(&self.0.to_le_bytes());
    }

    fn merge(&mut self, saved: &[u8]) -> Result<(), Corrupt> {
        let mut saved = Saved(saved);
        let count = saved.u64()?;
        saved.end()?;
        self.0 = self.0.checked_add(count).ok_or(Corrupt)?;
        Ok(())
    }

    fn value(&self) -> Value {
        json!({ "count": self.0 })
    }
}
