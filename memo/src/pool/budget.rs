//! A budget for retries: a share of the requests, so that retries do not double the load of a fleet
//! in trouble.

/// A token bucket. Each new request adds `percent` hundredths of a token, each retry takes a whole
/// token. The bucket holds `burst` tokens at most and starts full, so that the calls in flight on a
/// replica that dies can be repeated. (Finagle's and gRPC's retry throttling work this way.)
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

    /// Adds the share of a new request.
    pub(super) fn earn(&mut self) {
        self.level = (self.level + self.percent).min(self.most);
    }

    /// Takes one token; `false` if there is none.
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
