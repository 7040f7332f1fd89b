//! Observation: the hits that memory would have given, and whether they would have been right.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

use afterimage_cache::ByteStore;
use afterimage_core::Answer;
use afterimage_wire::proto::stats::Stats;
use bytes::Bytes;
use sha2::{Digest, Sha256};

use crate::metrics;
use crate::policy::Bypass;

/// Memory for the digests of calls: about a million of them.
const MEMORY: u64 = 128 << 20;

/// Bytes of a digest of an answer.
const DIGEST: usize = 16;

/// The calls so far, as digests, with the digest of each answer.
#[derive(Debug)]
pub(crate) struct Observer {
    seen: Arc<ByteStore>,
    hits: AtomicU64,
    saved_us: AtomicU64,
    others: AtomicU64,
}

impl Observer {
    pub(crate) fn new() -> Self {
        Observer {
            seen: Arc::new(ByteStore::new(MEMORY, DIGEST)),
            hits: AtomicU64::new(0),
            saved_us: AtomicU64::new(0),
            others: AtomicU64::new(0),
        }
    }

    /// Notes the answers to a call, one for each key, and how long the server took.
    pub(crate) fn note(
        &self,
        model: &str,
        keys: &[Bytes],
        answers: &[Answer],
        took: Duration,
    ) -> Bypass {
        let now = Instant::now();
        let (mut hits, mut differs) = (0, false);
        for (key, answer) in keys.iter().zip(answers) {
            let Answer::Bytes(answer) = answer else { continue };
            let mut hasher = Sha256::new();
            hasher.update((model.len() as u64).to_le_bytes());
            hasher.update(model.as_bytes());
            hasher.update(key);
            let key = u128::from_le_bytes(head(hasher.finalize().into()));
            let answer = head(Sha256::digest(answer).into());
            let seen = self.seen.get(key, now);
            hits += u32::from(seen.is_some());
            let is_same = seen.as_ref().is_some_and(|seen| seen.value[..] == answer);
            differs |= seen.is_some() && !is_same;
            if !is_same {
                self.seen.insert(key, answer.to_vec().into(), None, now);
            }
        }
        // The server still computes the other rows.
        let saved = took * hits / u32::try_from(keys.len()).unwrap_or(u32::MAX).max(1);
        self.saved_us.fetch_add(saved.as_micros() as u64, Relaxed);
        self.others.fetch_add(u64::from(differs), Relaxed);
        if (hits as usize) < keys.len() {
            return Bypass::ObservedMiss;
        }
        self.hits.fetch_add(1, Relaxed);
        Bypass::ObservedHit
    }

    pub(crate) fn stats(&self, stats: &mut Stats) {
        stats.counter(&metrics::OBSERVED_HITS, self.hits.load(Relaxed));
        stats.counter(&metrics::OBSERVED_SAVED, self.saved_us.load(Relaxed));
        stats.counter(&metrics::OBSERVED_OTHERS, self.others.load(Relaxed));
    }

    /// The result so far, in one line.
    pub(crate) fn report(&self, calls: u64) -> String {
        let hits = self.hits.load(Relaxed);
        let share = if calls == 0 { 0.0 } else { hits as f64 * 100.0 / calls as f64 };
        let saved = Duration::from_micros(self.saved_us.load(Relaxed));
        let others = self.others.load(Relaxed);
        format!(
            "memory would have answered {hits} of {calls} calls ({share:.1} %) and saved {saved:.1?} \
             of the server's time; {others} repeated calls had another answer than before"
        )
    }
}

fn head(digest: [u8; 32]) -> [u8; DIGEST] {
    let mut head = [0; DIGEST];
    head.copy_from_slice(&digest[..DIGEST]);
    head
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_repeats_their_time_and_other_answers() {
        let (observer, took) = (Observer::new(), Duration::from_millis(3));
        let note = |model, key: &'static [u8], answer: &'static [u8]| {
            let answer = Answer::Bytes(Bytes::from_static(answer));
            observer.note(model, &[Bytes::from_static(key)], &[answer], took)
        };
        assert_eq!(note("a", b"x", b"1"), Bypass::ObservedMiss);
        assert_eq!(note("b", b"x", b"1"), Bypass::ObservedMiss);
        assert_eq!(note("a", b"x", b"1"), Bypass::ObservedHit);
        assert_eq!(note("a", b"x", b"2"), Bypass::ObservedHit);
        let report = observer.report(4);
        assert!(report.contains("2 of 4 calls (50.0 %)"), "{report}");
        assert!(report.contains("6.0ms") && report.contains("; 1 repeated"), "{report}");
    }
}
