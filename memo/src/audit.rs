//! A sample of hits is asked about again, when the classifier has nothing else to do: what share of
//! the stored answers could be wrong is then a measured figure and not a belief.

use std::num::NonZeroU32;
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, AtomicU64, AtomicUsize, Ordering::Relaxed};
use std::time::{Duration, Instant};

use afterimage_core::{Answer, AnswerKind, Computed, Failure, Reply, Rows, Sink};
use afterimage_wire::proto::stats::Stats;
use afterimage_wire::splitmix::{STEP, mix};
use bytes::Bytes;

use crate::metrics;
use crate::key::RowHash;
use crate::models::Space;
use crate::sync;
use crate::upstream::Call;
use crate::waiter::Arrival;

/// Audits in flight at once: enough for the sample, too few to delay requests.
const MAX_UNDER_WAY: usize = 4;

/// The confidence of the bound that the statistics show.
const CONFIDENCE: f64 = 0.95;

/// The choice of hits to audit, and the results.
#[derive(Debug)]
pub(crate) struct Audit {
    every: NonZeroU32,
    /// Hits until the next one of the sample.
    left: AtomicI64,
    random: AtomicU64,
    under_way: AtomicUsize,
    agreed: AtomicU64,
    disagreed: AtomicU64,
    skipped: AtomicU64,
    failed: AtomicU64,
}

impl Audit {
    /// One of so many hits, on average and at random: a pattern in the requests finds no pattern
    /// here.
    pub(crate) fn new(every: NonZeroU32, seed: u64) -> Self {
        let count = || AtomicU64::new(0);
        let audit = Audit {
            every,
            left: AtomicI64::new(0),
            random: AtomicU64::new(seed),
            under_way: AtomicUsize::new(0),
            agreed: count(),
            disagreed: count(),
            skipped: count(),
            failed: count(),
        };
        audit.left.store(audit.gap(), Relaxed);
        audit
    }

    /// Whether this hit is one of the sample.
    #[inline]
    pub(crate) fn is_due(&self) -> bool {
        let due = self.left.fetch_sub(1, Relaxed) == 1;
        if due {
            self.left.store(self.gap(), Relaxed);
        }
        due
    }

    /// From 1 to twice the mean less 1, evenly.
    fn gap(&self) -> i64 {
        let bits = mix(self.random.fetch_add(STEP, Relaxed));
        1 + (bits % (2 * u64::from(self.every.get()) - 1)) as i64
    }

    /// Begins an audit, if the classifier `is_idle` and not too many are under way; counts it as
    /// skipped otherwise. True obliges to [`end`](Self::end) it.
    pub(crate) fn begin(&self, is_idle: impl FnOnce() -> bool) -> bool {
        if self.under_way.fetch_add(1, Relaxed) < MAX_UNDER_WAY && is_idle() {
            return true;
        }
        self.under_way.fetch_sub(1, Relaxed);
        self.skipped.fetch_add(1, Relaxed);
        false
    }

    /// The classifier agreed, or did not, or gave no answer.
    pub(crate) fn end(&self, agreed: Option<bool>) {
        self.under_way.fetch_sub(1, Relaxed);
        let counter = match agreed {
            Some(true) => &self.agreed,
            Some(false) => &self.disagreed,
            None => &self.failed,
        };
        counter.fetch_add(1, Relaxed);
    }

    pub(crate) fn stats(&self, stats: &mut Stats) {
        let disagreed = self.disagreed.load(Relaxed);
        let audits = self.agreed.load(Relaxed) + disagreed;
        stats.counter(&metrics::AUDITS, audits);
        stats.counter(&metrics::AUDITS_DISAGREED, disagreed);
        stats.counter(&metrics::AUDITS_SKIPPED, self.skipped.load(Relaxed));
        stats.counter(&metrics::AUDITS_FAILED, self.failed.load(Relaxed));
        let ppm = (upper_bound(disagreed, audits, CONFIDENCE) * 1e6).ceil();
        stats.gauge(&metrics::AUDIT_WRONG_HITS, ppm as u64);
    }
}

/// The highest rate of wrong hits that `wrong` found in `audits` do not speak against with this
/// confidence: the upper end of Clopper and Pearson's one-sided interval ("The use of confidence or
/// fiducial limits illustrated in the case of the binomial", Biometrika 26, 1934), the rate at
/// which so few would be found with probability 1 − `confidence`. For none found, that is
/// 1 − (1 − confidence)^(1/audits), about 3/audits: the rule of three.
fn upper_bound(wrong: u64, audits: u64, confidence: f64) -> f64 {
    if wrong >= audits {
        return 1.0;
    }
    let chance = 1.0 - confidence;
    if wrong == 0 {
        return -(chance.ln() / audits as f64).exp_m1();
    }
    // The probability falls with the rate, so halving finds it.
    let (mut low, mut high) = (wrong as f64 / audits as f64, 1.0);
    for _ in 0..60 {
        let rate = f64::midpoint(low, high);
        if at_most(wrong, audits, rate) > chance { low = rate } else { high = rate }
    }
    high
}

/// The probability of at most `wrong` in `audits` at this rate: the binomial's terms from the
/// last one down, each from the one before it, until they no longer count.
fn at_most(wrong: u64, audits: u64, rate: f64) -> f64 {
    let (k, n) = (wrong as f64, audits as f64);
    let choose = ln_factorial(n) - ln_factorial(k) - ln_factorial(n - k);
    let mut term = (choose + k * rate.ln() + (n - k) * (-rate).ln_1p()).exp();
    let (mut sum, mut i) = (0.0, k);
    while term > sum * 1e-12 {
        sum += term;
        term *= i / (n - i + 1.0) * (1.0 - rate) / rate;
        i -= 1.0;
    }
    sum
}

/// ln(x!) by Stirling's series (Abramowitz and Stegun, 6.1.41), exact to 10⁻¹⁰ from 16 on; the
/// product below.
fn ln_factorial(x: f64) -> f64 {
    if x < 16.0 {
        return (2..=x as u32).map(|i| f64::from(i).ln()).sum();
    }
    let z = x + 1.0;
    (z - 0.5) * z.ln() - z + 0.5 * std::f64::consts::TAU.ln() + 1.0 / (12.0 * z)
        - 1.0 / (360.0 * z.powi(3))
        + 1.0 / (1260.0 * z.powi(5))
}

/// The receiver of an audit's answer.
struct Question {
    audit: Arc<Audit>,
    space: Arc<Space>,
    hash: RowHash,
    request_id: u64,
    /// The answer that was stored, and given.
    stored: Answer,
    ttl: Option<Duration>,
}

impl Question {
    /// Asks the upstream about a hit again, if it has nothing else to do. `position` is the row's
    /// number in its request.
    #[cold]
    fn ask(
        audit: &Arc<Audit>,
        arrival: &Arrival<'_>,
        hash: RowHash,
        stored: Answer,
        (position, row): (u32, Bytes),
    ) {
        if !audit.begin(|| arrival.entry.upstream.is_idle()) {
            return;
        }
        let (audit, space) = (Arc::clone(audit), Arc::clone(arrival.space));
        let (model, client, ttl) = (Arc::clone(&space.model), arrival.client, arrival.ttl);
        let request_id = 0;
        let question = Question { audit, space, hash, request_id, stored, ttl };
        let reply = Reply::new(Arc::new(question), 0);
        let (rows, positions) = (Rows::from_buf([row]), Rows::from_buf([position]));
        let context = arrival.context.cloned();
        let call = Call { rows, positions, context, model, client, request_id, reply };
        arrival.entry.upstream.compute(vec![call]);
    }
}

/// Audits a hit if it is one of the sample: asks the upstream about it again. `row` gives the row
/// and its number in its request.
#[inline]
pub(crate) fn audit_hit(
    audit: Option<&Arc<Audit>>,
    arrival: &Arrival<'_>,
    hash: RowHash,
    stored: impl FnOnce() -> Answer,
    row: impl FnOnce() -> (u32, Bytes),
) {
    if let Some(audit) = audit
        && audit.is_due()
    {
        Question::ask(audit, arrival, hash, stored(), row());
    }
}

impl Sink<Result<Computed, Failure>> for Question {
    fn deliver(&self, _: u64, outcome: Result<Computed, Failure>, at: Option<Instant>) {
        let Question { audit, space, hash, request_id, stored, ttl } = self;
        // Another model's answer says nothing about this one's.
        let answer = match outcome {
            Ok(Computed { model, mut answers }) if *model == *space.model => answers.pop(),
            _ => None,
        };
        let answer = answer.filter(|answer| match answer {
            Answer::Label(label) => u32::from(*label) < space.model.classes(),
            Answer::Bytes(_) => space.model.answers == AnswerKind::Bytes,
        });
        let Some(answer) = answer else { return audit.end(None) };
        let agreed = answer == *stored;
        if !agreed {
            let key = format_args!("{:016x}", hash.store_key());
            tracing::error!(
                id = request_id, %key, stored = ?stored.label(), computed = ?answer.label(),
                "a stored answer is not the model's: it is replaced"
            );
            space.stores.write(&space.keys, *hash, &answer, *ttl, at.unwrap_or_else(sync::now));
        }
        audit.end(Some(agreed));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_bound_is_clopper_and_pearsons() {
        // Reckoned apart, in Python, from whole binomial sums with exact coefficients.
        for (wrong, audits, bound) in [
            (0, 1, 0.95),
            (0, 10, 0.258_865_58),
            (0, 1000, 0.002_991_25),
            (1, 10, 0.394_163_28),
            (5, 10, 0.777_559_02),
            (9, 10, 0.994_883_83),
        ] {
            let found = upper_bound(wrong, audits, 0.95);
            assert!((found - bound).abs() < 1e-5, "{wrong} of {audits}: {found}, not {bound}");
        }
        assert_eq!((upper_bound(0, 0, 0.95), upper_bound(4, 4, 0.95)), (1.0, 1.0));
    }

    #[test]
    fn the_bound_is_exceeded_once_in_twenty_audits() {
        for (wrong, audits) in
            [(1, 50), (7, 300), (100, 1_000), (3, 1_000_000), (500_000, 1_000_000)]
        {
            let bound = upper_bound(wrong, audits, 0.95);
            let found = at_most(wrong, audits, bound);
            assert!((found - 0.05).abs() < 1e-6, "{wrong} of {audits}: {found} at {bound}");
            assert!(bound > wrong as f64 / audits as f64);
        }
    }

    #[test]
    fn samples_one_in_n_and_skips_while_the_classifier_is_busy() {
        let audit = Audit::new(NonZeroU32::new(100).unwrap(), 1);
        let due = (0..1_000_000).filter(|_| audit.is_due()).count();
        assert!((9_000..11_000).contains(&due), "{due}");
        let all = Audit::new(NonZeroU32::MIN, 1);
        assert!((0..100).all(|_| all.is_due()));
        assert!(!all.begin(|| false));
        for _ in 0..MAX_UNDER_WAY {
            assert!(all.begin(|| true));
        }
        assert!(!all.begin(|| true));
        all.end(Some(true));
        assert!(all.begin(|| true));
        assert_eq!(all.skipped.load(Relaxed), 2);
    }
}
