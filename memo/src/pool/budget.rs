//! How often requests may be sent a second time: in proportion to those that are sent at all, so
//! that a fleet in trouble is not asked twice as much as one in health.

/// A token bucket: each new request adds `percent` hundredths of a token, each retry takes a whole
/// one. It holds `burst` at most, and begins full, so that what is in flight on a replica that dies
/// can be asked elsewhere. (Finagle's and gRPC's retry throttling work this way.)
#[derive(Debug)]
pub(super) struct RetryBudget {
    percent: u64,
    /// In hundredths of a token.
    level: u64,
    most: u64,
}

impl RetryBudget {
    pub(super) fn new(percent: u32, burst: u32) -> Self {
        let most = u64::from(burst) * 100;
        RetryBudget { percent: percent.into(), level: most, most }
    }

    /// A request is sent for the first time.
    pub(super) fn earn(&mut self) {
        self.level = (self.level + self.percent).min(self.most);
    }

    /// Whether one may be sent again.
    pub(super) fn spend(&mut self) -> bool {
        match self.level.checked_sub(100) {
            Some(level) => {
                self.level = level;
                true
            }
            None => false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn retries_are_a_share_of_the_requests_beyond_the_first_burst() {
        let mut budget = RetryBudget::new(10, 50);
        let mut retries = 0;
        for _ in 0..10_000 {
            budget.earn();
            for _ in 0..3 {
                retries += usize::from(budget.spend());
            }
        }
        assert!((1000..=1050).contains(&retries), "{retries}");
    }

    #[test]
    fn quiet_times_save_up_no_more_than_a_burst() {
        let mut budget = RetryBudget::new(100, 5);
        (0..1000).for_each(|_| budget.earn());
        assert_eq!((0..1000).filter(|_| budget.spend()).count(), 5);
        assert!(!RetryBudget::new(10, 0).spend());
    }
}
