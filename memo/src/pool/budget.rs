//! A budget for retries: a share of the requests, so that retries do not double the load of a fleet
//! in trouble.

/// A token bucket. Each row of a new request adds `percent` hundredths of a token, each row of a
/// retry takes a whole token. The bucket holds `burst` tokens at most and starts full, so that the
/// calls in flight on a replica that dies can be repeated. (Finagle's and gRPC's retry throttling
/// work this way.)
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

    /// Adds the share of a new request with this number of rows.
    pub(super) fn earn(&mut self, rows: usize) {
        self.level = (self.level + self.percent * rows as u64).min(self.most);
    }

    /// Takes one token for each row; `false`, and none, if there are too few.
    pub(super) fn spend(&mut self, rows: usize) -> bool {
        match self.level.checked_sub(100 * rows as u64) {
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
            budget.earn(1);
            for _ in 0..3 {
                retries += usize::from(budget.spend(1));
            }
        }
        assert!((1000..=1050).contains(&retries), "{retries}");
    }

    #[test]
    fn quiet_times_save_up_no_more_than_a_burst() {
        let mut budget = RetryBudget::new(100, 5);
        (0..1000).for_each(|_| budget.earn(1));
        assert_eq!((0..1000).filter(|_| budget.spend(1)).count(), 5);
        assert!(!RetryBudget::new(10, 0).spend(1));
    }

    #[test]
    fn a_retry_of_many_rows_takes_a_token_for_each() {
        let mut budget = RetryBudget::new(10, 5);
        assert!(!budget.spend(6), "five are saved up");
        assert!(budget.spend(5) && !budget.spend(1));
        budget.earn(20);
        assert!(budget.spend(2) && !budget.spend(1));
    }
}
