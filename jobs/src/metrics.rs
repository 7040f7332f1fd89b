//! Metrics of a jobs server.

afterimage_core::metrics! {
    "Jobs" {
        WAITING = Gauge("jobs_waiting", Count, "waiting", "Jobs that wait for a worker");
        RUNNING = Gauge("jobs_running", Count, "running", "Jobs that workers run");
        ACCEPTED = Counter("jobs_accepted", Count, "accepted", "Jobs that were queued");
        JOINED = Counter("jobs_joined", Count, "joined", "Submissions that joined an equal job");
        REMEMBERED = Counter("jobs_remembered", Count, "from memory", "Submissions that were answered from memory");
        SUCCEEDED = Counter("jobs_succeeded", Count, "succeeded", "Jobs that have a result");
        FAILED = Counter("jobs_failed", Count, "failed", "Jobs that failed, expired or were cancelled");
        COMMITS = Counter("jobs_commits", Count, "commits", "Transactions of the store");
        STORE_FAILED = Gauge("jobs_store_failed", Count, "store failed", "Whether the store has failed and accepts no changes");
    }
}
