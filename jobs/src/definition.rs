//! Definitions: the predefined kinds of work, with their limits.

use std::time::Duration;

use crate::job::Refused;

/// The longest name of a definition, in bytes.
pub const MAX_NAME: usize = 100;

/// A predefined kind of work. Jobs name it; workers say which definitions they run.
///
/// ```
/// use std::time::Duration;
/// use afterimage_jobs::Definition;
///
/// let definition = Definition::new("resize").max_attempts(3).deadline(Duration::from_secs(60));
/// assert!(definition.memory);
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Definition {
    /// Its name: letters, digits, `.`, `_` and `-`.
    pub name: String,
    /// The version. A change of the version forgets all results.
    pub version: u32,
    /// Whether results are remembered. Only for work that is a function of its input.
    pub memory: bool,
    /// Attempts that may fail before the job fails.
    pub max_attempts: u32,
    /// The pause before the second attempt; it doubles with each further one.
    pub backoff: Duration,
    /// The longest pause.
    pub max_backoff: Duration,
    /// Time without a heartbeat after which a lease is lost.
    pub lease: Duration,
    /// The longest time of one attempt.
    pub deadline: Duration,
    /// Jobs of this definition that run at once; 0 means no limit.
    pub concurrency: u32,
}

impl Definition {
    /// A definition with default limits: results are remembered, 5 attempts, pauses from 1 s to
    /// 5 min, leases of 15 s, 1 h for one attempt.
    pub fn new(name: impl Into<String>) -> Self {
        Definition {
            name: name.into(),
            version: 1,
            memory: true,
            max_attempts: 5,
            backoff: Duration::from_secs(1),
            max_backoff: Duration::from_secs(300),
            lease: Duration::from_secs(15),
            deadline: Duration::from_secs(3600),
            concurrency: 0,
        }
    }

    /// Sets the version.
    #[must_use]
    pub fn version(mut self, version: u32) -> Self {
        self.version = version;
        self
    }

    /// Sets whether results are remembered.
    #[must_use]
    pub fn memory(mut self, memory: bool) -> Self {
        self.memory = memory;
        self
    }

    /// Sets the number of attempts that may fail.
    #[must_use]
    pub fn max_attempts(mut self, attempts: u32) -> Self {
        self.max_attempts = attempts;
        self
    }

    /// Sets the first and the longest pause between attempts.
    #[must_use]
    pub fn backoff(mut self, first: Duration, longest: Duration) -> Self {
        (self.backoff, self.max_backoff) = (first, longest);
        self
    }

    /// Sets the time without a heartbeat after which a lease is lost.
    #[must_use]
    pub fn lease(mut self, lease: Duration) -> Self {
        self.lease = lease;
        self
    }

    /// Sets the longest time of one attempt.
    #[must_use]
    pub fn deadline(mut self, deadline: Duration) -> Self {
        self.deadline = deadline;
        self
    }

    /// Sets the number of jobs that run at once; 0 means no limit.
    #[must_use]
    pub fn concurrency(mut self, jobs: u32) -> Self {
        self.concurrency = jobs;
        self
    }

    /// Checks names and limits.
    ///
    /// # Errors
    /// [`Refused::Invalid`] names the field, the value and the limit.
    pub fn check(&self) -> Result<(), Refused> {
        let invalid = |text: String| Err(Refused::Invalid(text));
        let is_name = |byte: u8| byte.is_ascii_alphanumeric() || b"._-".contains(&byte);
        if self.name.is_empty() || self.name.len() > MAX_NAME || !self.name.bytes().all(is_name) {
            let name: String = self.name.chars().take(MAX_NAME).collect();
            return invalid(format!(
                "the name {name:?} is not valid: use 1 to {MAX_NAME} letters, digits, '.', '_' and '-'"
            ));
        }
        if self.max_attempts == 0 {
            return invalid("max_attempts is 0; at least 1 attempt is needed".to_owned());
        }
        if self.lease < Duration::from_millis(100) {
            return invalid(format!("the lease is {:?}; the least is 100 ms", self.lease));
        }
        if self.deadline.is_zero() {
            return invalid("the deadline of an attempt is 0".to_owned());
        }
        Ok(())
    }

    /// The pause after this many failed attempts.
    #[must_use]
    pub fn pause(&self, failures: u32) -> Duration {
        let doublings = failures.saturating_sub(1).min(31);
        self.backoff.saturating_mul(1 << doublings).min(self.max_backoff)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_double_up_to_the_longest() {
        let definition =
            Definition::new("a").backoff(Duration::from_secs(1), Duration::from_secs(60));
        let pauses: Vec<u64> =
            [1, 2, 3, 7, u32::MAX].map(|failures| definition.pause(failures).as_secs()).into();
        assert_eq!(pauses, [1, 2, 4, 60, 60]);
    }

    #[test]
    fn an_invalid_definition_is_refused_by_name() {
        assert_eq!(Definition::new("train.v2_x-1").check(), Ok(()));
        for name in ["", "a b", "ä", &"x".repeat(MAX_NAME + 1)] {
            assert!(Definition::new(name).check().is_err(), "{name}");
        }
        assert!(Definition::new("a").max_attempts(0).check().is_err());
        assert!(Definition::new("a").lease(Duration::ZERO).check().is_err());
    }
}
