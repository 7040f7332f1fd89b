//! Metrics of a proxy, besides those of its memo.

afterimage_core::metrics! {
    "Proxy" {
        PASSED = Counter("proxy_passed", Count, "other requests", "Requests that are no inference calls; they pass through");
        CALLS = Counter("proxy_calls", Count, "inference calls", "Inference calls");
        BYPASSED = Counter("proxy_bypassed", Count, "calls not stored", "Inference calls forwarded without the memo");
        UNREACHABLE = Counter("proxy_unreachable", Count, "server unreachable", "Requests without a response of a model server");
        OBSERVED_HITS = Counter("proxy_observed_hits", Count, "hits, if it were on", "Calls that memory would have answered");
        OBSERVED_SAVED = Counter("proxy_observed_saved_us", Micros, "time saved, if it were on", "Time of the server that hits would have saved");
        OBSERVED_OTHERS = Counter("proxy_observed_others", Count, "other answers", "Repeated calls whose answer differed from the first one");
        LOG_DROPPED = Counter("proxy_log_dropped", Count, "log lines dropped", "Lines of the access log that were dropped because its file was slow or failed");
    }
}
