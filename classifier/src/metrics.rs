//! Metrics of the compute engine.

afterimage_core::metrics! {
    "Classifier" {
        SCORED = Counter("engine_scored", Count, "images classified", "Images classified");
        BATCHES = Counter("engine_batches", Count, "batches", "Batches of images classified together");
        QUEUED = Gauge("engine_queued", Count, "queued", "Images waiting for a compute thread");
        BUSY = Counter("engine_busy_us", Micros, "compute time", "Time that compute threads spent on scoring");
        OVERLOADED = Counter("engine_overloaded", Count, "refused: queue full", "Images refused because the queue was full");
        EXPIRED = Counter("engine_expired", Count, "deadline exceeded in the queue", "Images whose deadline passed in the queue");
        ABANDONED = Counter("engine_abandoned", Count, "client gone, not scored", "Images not scored because their client disconnected");
        PANICKED = Counter("engine_panicked", Count, "panics", "Images whose scoring panicked");
    }
}
